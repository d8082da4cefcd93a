import json

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.report import Report, sqnr_db
from fxcompress.strict_json import dumps
from tests.support.graphs import build, images, randomize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dump")


@pytest.fixture(scope="module")
def net(folder):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
    return fxcompress.compile(randomize(model), example_inputs=images(2, 3, 8, 8), debug=folder)


def test_costs_agree_with_hand_counts(net):
    report = net.report()
    assert report.macs == 8 * 4 * 4 * 27 + 8 * 16 * 10
    assert [p.macs for p in report.products] == [8 * 4 * 4 * 27, 1280]
    assert report.parameters == 8 * 27 + 8 + 16 + 1280 + 10
    assert [p.weight_bytes for p in report.products] == [216, 1280]
    assert report.integer_bytes == sum(t.nbytes for _, t in net.graph_module.named_buffers())
    assert 216 + 1280 < report.integer_bytes < report.float_bytes / 2


def test_costs_of_grouped_transposed_and_matmul():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped = nn.Conv2d(4, 8, 3, groups=2, padding=1)
            self.up = nn.ConvTranspose2d(8, 6, 2, 2)

        def forward(self, x):
            y = self.grouped(x)
            return self.up(y), torch.matmul(y, y.transpose(2, 3))

    report = fxcompress.compile(randomize(Net()), example_inputs=images(2, 4, 5, 5)).report()
    assert {p.operator: p.macs for p in report.products} == {
        "conv": 8 * 25 * 18, "conv_transpose": 8 * 25 * 6 * 4, "matmul": 8 * 5 * 5 * 5,
    }  # fmt: skip


def test_the_report_is_data_and_text(net):
    report = net.report()
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again.to_dict() == report.to_dict() and str(again) == str(report)
    text = str(report)
    for fragment in ("fold_batch_norm", "Integer-only", f"{report.macs:,}", "guessed", "accumulator bits"):
        assert fragment in text


def test_resources_are_those_of_the_backend(net):
    found = net.report().resources
    assert found["activation_bytes_lower_bound"] <= found["activation_bytes"] <= found["arena_bytes"]
    assert found["packed_weight_bytes"] >= sum(p.weight_bytes for p in net.report().products)
    assert len(found["steps"]) <= len(net.graph_module.graph.nodes)
    assert {"node", "kernel", "nanoseconds", "layers"} == set(found["steps"][0])  # a debug folder: times are measured
    assert f"{found['arena_bytes']:,} bytes of arena" in str(net.report())


def test_every_layer_has_the_time_of_the_steps_that_compute_it(net):
    report = net.report()
    steps = report.resources["steps"]
    assert all(step["nanoseconds"] > 0 for step in steps)
    for product in report.products:
        own = [step for step in steps if product.node in step["layers"]]
        assert product.nanoseconds == sum(step["nanoseconds"] for step in own) > 0
        assert product.timed_with == [product.node] == own[0]["layers"]


def test_times_are_measured_on_request_only():
    model, inputs = build("mlp")
    report = fxcompress.compile(model, example_inputs=inputs).report()
    assert all(p.nanoseconds is None for p in report.products) and report.histograms == []
    assert {"node", "kernel"} == set(report.resources["steps"][0])


def test_histograms_count_every_value_beside_its_range(net):
    found = {(h.kind, h.node): h for h in net.report().histograms}
    weight = found["weight", "conv2d"]
    assert sum(weight.counts) == 8 * 27 and weight.outside == 0
    assert weight.range_lo <= weight.lo < weight.hi <= weight.range_hi == -weight.range_lo
    assert sum(found["activation", net.report().layers[0].node].counts) == 2 * 3 * 8 * 8
    for layer in net.report().layers:
        h = found["activation", layer.node]
        assert (h.range_lo, h.range_hi) == (layer.lo, layer.hi) and 0 <= h.outside < 0.05


def test_what_a_range_cuts_off_is_counted():
    """A declared range of half the input: uniform values in (-1, 1), half of them beyond."""
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    net = fxcompress.compile(nn.Linear(64, 4).eval(), example_inputs=x, input_range=(-0.5, 0.5), measure_passes=True)
    (histogram,) = [h for h in net.report().histograms if h.kind == "activation"]
    expected = float((x.abs() > 0.5 + 0.5 / 255).double().mean())
    assert histogram.outside == pytest.approx(expected, abs=0.02) and 0.4 < expected < 0.6


def test_the_reference_backend_has_no_resources_to_report(net, tmp_path):
    net.save(tmp_path / "net.fxc")
    report = fxcompress.load(tmp_path / "net.fxc", backend="reference").report()
    assert report.backend == "reference" and report.resources == {}


def test_layer_errors_are_those_of_the_qdq_level(net):
    for layer in net.report().layers:
        assert layer.sqnr > 25 and layer.lo <= 0 <= layer.hi
    assert net.report().layers[0].chosen_by == "guessed"


def test_every_pass_is_in_the_report_with_time_and_refusals():
    model, inputs = build("pre_activation")
    report = fxcompress.compile(model, example_inputs=inputs).report()
    assert [p["name"] for p in report.passes] == fxcompress.default_passes("int8").names
    folding = next(p for p in report.passes if p["name"] == "fold_batch_norm")
    assert folding["refusals"] and all("not applied at" in r and "because" in r for r in folding["refusals"])
    assert all(p["seconds"] >= 0 for p in report.passes) and set(report.seconds) == {
        "capture",
        "passes",
        "verify",
        "total",
    }


def test_sqnr():
    x = torch.tensor([1.0, -1.0])
    assert sqnr_db(x, x) == float("inf") and sqnr_db(torch.zeros(2), x) == float("-inf")
    assert sqnr_db(x, x * 1.1) == pytest.approx(20.0, abs=1e-5)


def test_the_text_names_every_pass_and_every_refusal():
    model, inputs = build("residual_block")
    report = fxcompress.compile(model, example_inputs=inputs, equalize=True).report()
    text = " ".join(str(report).split())
    assert all(p["name"] in text for p in report.passes)
    assert any(p["refusals"] for p in report.passes)
    for p in report.passes:
        for refusal in p["refusals"]:
            place, _, reason = refusal.removeprefix("not applied at ").partition(" because ")
            assert reason.split()[0] in text and all(word in text for word in place.split())


# ------------------------------------------------------------------------------------------------------------ dumps


def test_the_folder_tells_the_story_in_order(net, folder):
    names = sorted(p.name for p in folder.iterdir())
    listings = [n for n in names if n.endswith(".txt") and n[0].isdigit()]
    assert listings[0] == "00_captured.txt"
    assert [n[3:-4] for n in listings[1:]] == fxcompress.default_passes("int8").names
    assert json.loads((folder / "report.json").read_text()) == json.loads(dumps(net.report().to_dict()))


def test_a_listing_shows_types_constants_ranges_and_origins(net, folder):
    text = next(folder.glob("*_lower_to_integer.txt")).read_text()
    for fragment in (
        "fxc.conv(",
        "u8[N, 3, 8, 8]",
        "i32[N, 8, 4, 4]",
        "fxc.requantize(",
        "scale",
        "fxc.linear(",
        "return [",
    ):
        assert fragment in text, fragment


def test_unchanged_passes_say_so_and_changes_have_a_diff(folder):
    (unchanged,) = folder.glob("*_fold_constants.txt")
    assert "(unchanged)" in unchanged.read_text() and not list(folder.glob("*_fold_constants.diff"))
    (diff,) = folder.glob("*_fold_batch_norm.diff")
    lines = diff.read_text().splitlines()
    assert any(line.startswith("-") and "aten.batch_norm" in line for line in lines)


def test_the_environment_variable_dumps_too(tmp_path, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_DEBUG", str(tmp_path / "from_environment"))
    model, inputs = build("mlp")
    fxcompress.compile(model, example_inputs=inputs)
    assert (tmp_path / "from_environment" / "report.txt").exists()
