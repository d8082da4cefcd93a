"""The report page: what it holds is the report, what it shows is what it holds, and it works without a network."""

import json
import math
import re
import shutil

import pytest
from torch import nn

import fxcompress
from fxcompress.page import render
from tests.support.graphs import build, images, randomize

NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def net(folder):
    """Something of everything: a fold, a residual, a refusal, a measured equalization."""
    model, _ = build("pre_activation")
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        model,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    return fxcompress.compile(
        randomize(model),
        example_inputs=images(2, 3, 16, 16),
        input_range=(-4, 4),
        weight_granularity="tensor",
        debug=folder,
    )


def embedded(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list) else value


def test_the_page_holds_the_report(net, folder):
    data = embedded((folder / "index.html").read_text())
    assert data["report"] == finite(json.loads(json.dumps(net.report().to_dict())))


def test_nothing_is_fetched(net, folder):
    html = (folder / "index.html").read_text()
    assert not re.search(r"<link|<img|<iframe|\bsrc=|@import|url\(", html)
    assert not re.search(r"(fetch|XMLHttpRequest|importScripts)\(", html)
    assert "Chris Pettitt" in html  # the notice of the layout library


def test_texts_cannot_end_the_data():
    html = render({"report": "</script><b>{{style}}"})
    assert embedded(html)["report"] == "</script><b>{{style}}" and "</script><b>" not in html


def test_the_graphs_are_those_behind_the_passes(net, folder):
    graphs = embedded((folder / "index.html").read_text())["graphs"]
    names = [stage["pass"] for stage in graphs["stages"]]
    assert names[0] == "captured" and names[-1] in ("lower_to_integer", "fuse_padding")
    order = ["captured", *fxcompress.default_passes().names]
    assert names == [name for name in order if name in names]
    for stage in graphs["stages"]:
        nodes = [graphs["nodes"][i] for i in stage["nodes"]]
        known: set[str] = set()
        for node in nodes:
            assert set(node["inputs"]) <= known, (stage["pass"], node)
            known.add(node["name"])
        assert [n["kind"] for n in nodes].count("boundary") == 2
    assert len(graphs["nodes"]) < sum(len(stage["nodes"]) for stage in graphs["stages"])  # what stays is kept once
    last = {graphs["nodes"][i]["name"] for i in graphs["stages"][-1]["nodes"]}
    assert last == {n.name for n in net.graph_module.graph.nodes if n.op != "get_attr"}


def test_labels_tell_convolutions_apart(net, folder):
    graphs = embedded((folder / "index.html").read_text())["graphs"]
    labels = {node["label"] for node in graphs["nodes"]}
    assert {"conv2d 3x3 /2", "conv 3x3 /2", "input", "output", "linear", "batch_norm"} <= labels
    assert "other" not in {node["kind"] for node in graphs["nodes"]}


# ------------------------------------------------------------------------------------------------------------ browser


@pytest.fixture(scope="module")
def page(net, folder):
    """The page in a browser that may load this one file and nothing else."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        mistakes, requests = [], []
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((folder / "index.html").as_uri())
        page.evaluate("window.fxcompress.ready")
        yield page
        assert mistakes == []
        assert all(url.startswith(("file:", "blob:")) for url in requests) and requests
        browser.close()


def decibels(value) -> str:
    return NONE if value is None else f"{value:.1f}" if math.isfinite(value) else "exact"


def texts(page, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def test_the_layers_on_the_page_are_those_of_the_report(net, page):
    report = net.report()
    noise, weights = ({e.node: e for e in entries} for entries in (report.noise, report.weights))
    assert page.locator("#layer-table tr[data-layer]").count() == len(report.products)
    for product in report.products:
        cells = texts(page, f'#layer-table tr[data-layer="{product.node}"] td')
        layer, weight = noise.get(product.node), weights.get(product.node)
        assert cells[3:6] == [
            decibels(layer and layer.sqnr),
            decibels(layer and layer.own_sqnr),
            decibels(weight and weight.sqnr),
        ]
        assert cells[8] == str(product.accumulator_bits) and cells[10] == f"{product.weight_bytes:,}"
        assert cells[11].split()[0].replace(",", "").replace(".", "").isdigit()


def test_the_passes_on_the_page_are_those_of_the_report(net, page):
    for record in net.report().passes:
        cells = texts(page, f'#passes tr[data-pass="{record["name"]}"] td')
        assert cells[4:6] == [f"{record['rewrites']:,}", str(len(record["refusals"]))]
        assert cells[8] == ", ".join(decibels(v) for v in record["output_sqnr"] or [])
        assert cells[9] == ", ".join(decibels(v) for v in record["output_sqnr_without"] or [])
        if record["output_sqnr_without"]:
            gain = record["output_sqnr_with"][0] - record["output_sqnr_without"][0]
            assert float(cells[10].removesuffix(" dB").replace(MINUS, "-")) == pytest.approx(gain, abs=0.051)


def test_the_summary_is_that_of_the_report(net, page):
    report, cards = net.report(), texts(page, "#summary .value")
    assert cards[0] == f"{report.output_sqnr[0]:.1f} dB" and cards[5] == "proven"
    assert float(cards[2].split()[0]) == pytest.approx(report.macs / 1000, rel=0.01)
    spent = sum(step["nanoseconds"] for step in report.resources["steps"])
    number, unit = cards[3].split()
    assert float(number) * {"ns": 1, "µs": 1e3, "ms": 1e6}[unit] == pytest.approx(spent, rel=0.01)
    assert report.certificate["text"] in page.inner_text("#certificate")


def test_layers_are_sorted_by_a_click(net, page):
    heading = page.locator("#layer-table th", has_text="own dB")
    for direction in ("ascending", "descending"):
        heading.click()
        assert heading.get_attribute("aria-sort") == direction
        shown = [float(t) for t in texts(page, "#layer-table tr[data-layer] td:nth-child(5)") if t != NONE]
        assert shown == sorted(shown, reverse=direction == "descending") and len(shown) > 2
    page.locator("#layer-table th", has_text="#").click()
    assert [int(t) for t in texts(page, "#layer-table tr[data-layer] td:nth-child(1)")] == list(
        range(1, len(net.report().products) + 1)
    )


def test_a_layer_unfolds_into_histograms_and_effects(net, page):
    layer = net.report().weights[0].node
    page.locator(f'#layer-table tr[data-layer="{layer}"]').click()
    assert page.locator("tr.detail svg").count() == 3
    kernels = {step["kernel"] for step in net.report().resources["steps"] if layer in step["layers"]}
    assert kernels and all(kernel in page.inner_text("tr.detail dl") for kernel in kernels)
    rows = texts(page, "tr.detail table.effects tbody tr")
    effects = [e for e in net.report().effects if e.node == layer]
    assert len(rows) == len(effects) > 2
    for row, effect in zip(rows, effects, strict=True):
        assert effect.pass_name in row and all(text in row for text in effect.done)
        if effect.sqnr is not None:
            assert f"{decibels(effect.sqnr_without)} → {decibels(effect.sqnr)}" in row
    page.locator(f'#layer-table tr[data-layer="{layer}"]').click()
    assert page.locator("tr.detail").count() == 0


def test_a_pass_is_shown_with_its_changes_and_refusals(net, page):
    record = next(p for p in net.report().passes if p["name"] == "fold_batch_norm")
    assert record["refusals"]
    page.locator('#passes tr[data-pass="fold_batch_norm"]').click()
    page.wait_for_function("window.fxcompress.views.after.graph && window.fxcompress.views.before.graph")
    assert page.locator("#did li").count() == record["rewrites"] == len(record["matches"])
    reasons = texts(page, "#refused li")
    assert len(reasons) == len(record["refusals"])
    assert all(
        refusal.split(" because ", 1)[1] in reason for refusal, reason in zip(record["refusals"], reasons, strict=True)
    )
    removed = page.evaluate(
        "[...fxcompress.views.before.marks].filter(([, mark]) => mark === 'removed').map(([name]) => name)"
    )
    kept = set(page.evaluate("fxcompress.views.after.graph.nodes.map(node => node.name)"))
    assert removed and not kept & set(removed) and all("norm" in name for name in removed)
    assert set(page.evaluate("[...fxcompress.views.after.refused.keys()]")) == set(record["refusal_nodes"])


def test_every_pass_can_be_stepped_through(net, page):
    page.evaluate("window.fxcompress.choosePass('')")
    seen = []
    for _ in range(len(net.report().passes)):
        page.locator("#next").click()
        page.wait_for_function("window.fxcompress.views.after.graph && window.fxcompress.views.before.graph")
        name = page.evaluate("document.getElementById('pass').value")
        if name in seen:
            break
        seen.append(name)
    assert seen[0] == "normalize" and {"fold_batch_norm", "quantize", "lower_to_integer"} <= set(seen)


def test_nodes_do_not_overlap_and_are_found_by_name(net, page):
    page.evaluate("window.fxcompress.choosePass('')")
    page.wait_for_function("window.fxcompress.views.after.graph && window.fxcompress.views.before.graph")
    boxes = page.evaluate("fxcompress.views.after.graph.nodes.map(node => [node.x, node.y])")
    for i, (x, y) in enumerate(boxes):
        assert all(abs(x - u) >= 244 or abs(y - v) >= 40 for u, v in boxes[i + 1 :])
    page.fill("#find", "linear")
    assert page.evaluate("fxcompress.views.after.chosen") == "linear"
    page.fill("#find", "")


def test_a_network_that_was_not_measured_says_so(tmp_path):
    model, (x,) = build("mlp")
    fxcompress.compile(model, example_inputs=x, debug=tmp_path, measure_passes=False, backend="reference")
    data = embedded((tmp_path / "index.html").read_text())
    assert data["report"]["noise"] == [] and data["report"]["resources"] == {}
