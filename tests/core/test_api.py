"""``compile`` and ``CompiledModule`` as a user meets them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxcompress
from fxcompress.errors import (
    CalibrationError,
    CaptureError,
    InputError,
    ModelError,
    OptionError,
    PipelineError,
    UnsupportedOperatorError,
)
from fxcompress.report import sqnr_db
from tests.support.graphs import ConvBnRelu, DictOutput, ResidualBlock, TwoInputs, build, images, randomize


class Classifier(nn.Module):
    """Small residual classifier: (N, 3, 8, 8) to (N, 5)."""

    def __init__(self):
        super().__init__()
        self.stem = ConvBnRelu(3, 8)
        self.block = ResidualBlock(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    return randomize(Classifier())


@pytest.fixture(scope="module")
def x():
    return images(8, 3, 8, 8)


@pytest.fixture(scope="module")
def compiled(model, x):
    return fxcompress.compile(model, example_inputs=x, calibration_data=[x])


def test_the_integer_network_gives_the_float_answers(model, compiled, x):
    with torch.no_grad():
        assert sqnr_db(model(x), compiled(x)) > 25


@pytest.mark.parametrize("batch", [0, 1, 3, 17])
def test_any_batch_size_gives_each_example_its_own_result(compiled, x, batch):
    inputs = x.repeat(3, 1, 1, 1)[:batch]
    one_by_one = [compiled(inputs[i : i + 1]) for i in range(batch)]
    expected = torch.cat(one_by_one) if batch else torch.empty(0, 5)
    assert torch.equal(compiled(inputs), expected)


def test_memory_layout_and_precision_of_the_input_do_not_matter(compiled, x):
    expected = compiled(x)
    assert torch.equal(compiled(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(compiled(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)
    assert torch.equal(compiled(x.double()), expected)
    half = x.half()
    assert torch.equal(compiled(half), compiled(half.float()))


def test_the_user_s_model_is_not_modified(model, x):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = [n for n, _ in model.named_modules()]
    fxcompress.compile(model, "w4a8", example_inputs=x)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert names == [n for n, _ in model.named_modules()] and not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_compilation_is_deterministic(model, compiled, x):
    again = fxcompress.compile(model, example_inputs=x, calibration_data=[x])
    first, second = compiled.graph_module.state_dict(), again.graph_module.state_dict()
    assert list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)
    assert again.graph_module.code == compiled.graph_module.code


def test_constants_are_buffers_and_integers(compiled):
    assert list(compiled.parameters()) == []
    kinds = {t.dtype for name, t in compiled.graph_module.named_buffers() if not name.endswith("_scale")}
    assert kinds <= {torch.int8, torch.uint8, torch.int32, torch.int64}


def test_train_mode_and_repr(compiled):
    assert not compiled.train().training
    assert "w8a8" in repr(compiled) and "(batch, 3, 8, 8)" in repr(compiled)
    assert repr(nn.Sequential(compiled))


def test_copies_and_files_give_the_same_bits(compiled, x, tmp_path):
    expected = compiled(x)
    compiled.save(tmp_path / "model.fxc")
    loaded = fxcompress.load(tmp_path / "model.fxc")
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled)), loaded):
        assert torch.equal(other(x), expected)
        assert other.report().to_dict() == compiled.report().to_dict()
        assert other.verify_integer_only().integer_only


# ------------------------------------------------------------------------------------ when and for what it compiles


def test_without_example_inputs_it_compiles_at_the_first_call_from_the_weights_at_compile(model, x):
    original = copy.deepcopy(model)
    lazy = fxcompress.compile(original)
    for question in (lazy.report, lazy.verify_integer_only, lambda: lazy.save("never")):
        with pytest.raises(InputError, match="has not seen an input yet"):
            question()
    assert "first call" in repr(lazy)
    with torch.no_grad():
        original.head.weight.zero_()
        assert sqnr_db(model(x), lazy(x)) > 25


def test_another_image_size_compiles_again_with_the_same_scales(model, x):
    net = fxcompress.compile(model, example_inputs=x)
    large = images(2, 3, 12, 12, seed=3)
    with torch.no_grad():
        assert sqnr_db(model(large), net(large)) > 25
    first, second = (e.graph_module for e in net._executables)
    assert torch.equal(net(x), net(x))
    scales = [n for n, _ in first.named_buffers() if "multiplier" in n and "mean" not in n]
    assert scales and all(torch.equal(getattr(first, n), getattr(second, n)) for n in scales)


def test_a_loaded_model_names_the_shape_it_takes(compiled, tmp_path):
    compiled.save(tmp_path / "m.fxc")
    with pytest.raises(InputError, match=r"shape \(2, 3, 12, 12\); expected shape \(batch, 3, 8, 8\)"):
        fxcompress.load(tmp_path / "m.fxc")(images(2, 3, 12, 12))


# ----------------------------------------------------------------------------------------------------- calibration


def _forms(x):
    labels = torch.zeros(len(x), dtype=torch.int64)
    return {
        "tensor": x,
        "batches": [x[:4], x[4:]],
        "labeled": [(x[:4], labels[:4]), (x[4:], labels[4:])],
        "loader": DataLoader(TensorDataset(x, labels), batch_size=4),
        "generator": (batch for batch in (x[:4], x[4:])),
        "function": lambda model: (model(x[:4]), model(x[4:])),
    }


@pytest.mark.parametrize("form", ["tensor", "batches", "labeled", "loader", "generator", "function"])
def test_calibration_data_come_in_any_usual_form(model, compiled, x, form):
    net = fxcompress.compile(model, example_inputs=x, calibration_data=_forms(x)[form])
    assert torch.equal(net(x), compiled(x))


def test_the_first_calibration_batch_serves_as_example(model, x):
    for form in ("tensor", "labeled", "generator"):
        assert fxcompress.compile(model, calibration_data=_forms(x)[form]).report().passes


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "kl"])
def test_every_range_method_calibrates(model, x, method):
    net = fxcompress.compile(model, calibration_data=[x], range_method=method)
    with torch.no_grad():
        assert sqnr_db(model(x), net(x)) > 18
    assert any(layer.chosen_by == f"calibrated {method}" for layer in net.report().layers)


@pytest.mark.parametrize("empty", [[], iter([]), torch.empty(0, 3, 8, 8)])
def test_empty_calibration_data_are_refused(model, x, empty):
    with pytest.raises(CalibrationError, match="empty"):
        fxcompress.compile(model, example_inputs=x, calibration_data=empty)


def test_wrongly_shaped_calibration_data_are_refused(model, x):
    with pytest.raises(CalibrationError, match="does not fit the model"):
        fxcompress.compile(model, example_inputs=x, calibration_data=[images(4, 1, 8, 8)])


# ------------------------------------------------------------------------------------------ inputs, outputs, options


def test_raw_pixels_are_normalized_by_the_first_layer(model):
    pixels = torch.randint(0, 256, (8, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    mean, std = [120.0, 110.0, 100.0], [60.0, 55.0, 70.0]
    normalized = (pixels - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
    net = fxcompress.compile(model, example_inputs=pixels, input_range=(0, 255), input_normalization=(mean, std))
    with torch.no_grad():
        assert sqnr_db(model(normalized), net(pixels)) > 25
    assert torch.equal(net(pixels.to(torch.uint8)), net(pixels))
    images = pixels.to(torch.uint8)
    from_bytes = {"example_inputs": images, "calibration_data": [images], "input_normalization": (mean, std)}
    from_floats = {"example_inputs": pixels, "calibration_data": [pixels], "input_normalization": (mean, std)}
    assert torch.equal(
        fxcompress.compile(model, **from_bytes)(pixels), fxcompress.compile(model, **from_floats)(pixels)
    )
    entry = net.report().inputs[0]
    assert (entry["lo"], entry["hi"], entry["chosen_by"]) == (0, 255, "declared")


def test_a_guessed_input_range_is_reported(model, x):
    assert fxcompress.compile(model, example_inputs=x).report().inputs[0]["chosen_by"] == "guessed"


def test_integer_io_returns_integers_with_scales(model, compiled, x):
    net = fxcompress.compile(model, example_inputs=x, calibration_data=[x], integer_io=True)
    result = net(x)
    assert isinstance(result, fxcompress.QuantizedTensor) and result.values.dtype == torch.int32
    assert torch.equal(result.dequantize(), compiled(x))
    scale, zero_point, qmin, qmax = net._executables[0].input_scales[0]
    codes = fxcompress.numerics.quantize(x, scale, zero_point, qmin, qmax)
    assert torch.equal(net(codes).values, result.values)
    assert net.verify_integer_only().integer_only
    clone = copy.deepcopy(net)
    assert torch.equal(clone(x).values, result.values)


def test_keep_float_leaves_a_named_module_and_says_so(model, compiled, x):
    net = fxcompress.compile(model, example_inputs=x, calibration_data=[x], keep_float=["block.first"])
    certificate = net.verify_integer_only()
    assert not certificate.integer_only and any("block.first" in e for e in certificate.exceptions)
    assert "except" in str(certificate)
    with torch.no_grad():
        assert sqnr_db(model(x), net(x)) > 25
    assert torch.equal(copy.deepcopy(net)(x), net(x))


def test_two_inputs_by_position_and_by_name():
    model, inputs = build("two_inputs")
    net = fxcompress.compile(model, example_inputs=inputs)
    with torch.no_grad():
        assert sqnr_db(model(*inputs), net(*inputs)) > 25
    assert isinstance(model, TwoInputs)


def test_dict_output():
    model, inputs = build("dict_output")
    net = fxcompress.compile(model, example_inputs=inputs)
    with torch.no_grad():
        expected = model(*inputs)
    got = net(*inputs)
    assert isinstance(model, DictOutput) and list(got) == list(expected)
    assert all(sqnr_db(expected[k], got[k]) > 25 for k in expected)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(5, 4)

    def forward(self, batch, *, extra, scale=2.0):
        return (self.a(batch["x"]) + self.b(extra), {"first": self.a(batch["x"])})


def test_dict_and_keyword_inputs_tuple_and_dict_outputs():
    model = randomize(Keywords())
    batch, extra = {"x": images(3, 6)}, images(3, 5, seed=1)
    net = fxcompress.compile(model, calibration_data=lambda m: m(batch, extra=extra))
    with torch.no_grad():
        total, parts = net(batch, extra=extra)
        expected_total, expected_parts = model(batch, extra=extra)
    assert sqnr_db(expected_total, total) > 25 and sqnr_db(expected_parts["first"], parts["first"]) > 25
    with pytest.raises(InputError, match="scale"):
        net(batch, extra=extra, scale=3.0)


@pytest.mark.parametrize("target, floor", [("w6a8", 20), ("w4a8", 8), ("w8a4", 5), ("w2a8", -10)])
def test_other_bit_widths(model, x, target, floor):
    net = fxcompress.compile(model, target, calibration_data=[x])
    bits = int(target[1])
    limit = 2 ** (bits - 1) - 1
    for name, tensor in net.graph_module.named_buffers():
        if name.endswith("_weight"):
            assert int(tensor.abs().max()) <= limit
    with torch.no_grad():
        assert sqnr_db(model(x), net(x)) > floor


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"target": "int9"}, OptionError, "Did you mean 'int8'?"),
        ({"target": "w16a8"}, OptionError, "2 to 8 bits"),
        ({"range_methd": "mse"}, OptionError, "Did you mean 'range_method'?"),
        ({"range_method": "kld"}, OptionError, "Did you mean 'kl'?"),
        ({"backend": "referense"}, OptionError, "Did you mean 'reference'?"),
        ({"keep_float": ["blok"]}, OptionError, "Did you mean 'block'?"),
        ({"passes": []}, PipelineError, "level"),
    ],
)
def test_mistakes_in_the_options_teach(model, x, options, error, message):
    with pytest.raises(error) as caught:
        fxcompress.compile(model, **{"example_inputs": x, **options})
    assert message in str(caught.value)


def test_mistakes_in_the_model_are_found_before_any_work(x):
    broken = randomize(Classifier())
    with pytest.raises(ModelError, match="training mode"):
        fxcompress.compile(copy.deepcopy(broken).train())
    with torch.no_grad():
        broken.head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"head.*NaN"):
        fxcompress.compile(broken)


class Sorting(nn.Module):
    def forward(self, x):
        return torch.sort(x, dim=1).values


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_what_cannot_be_compiled_is_named(x):
    with pytest.raises(UnsupportedOperatorError, match="sort"):
        fxcompress.compile(Sorting().eval(), example_inputs=x)
    with pytest.raises(CaptureError):
        fxcompress.compile(Branching().eval(), example_inputs=x)


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda x: x[:, :2], "shape"),
        (lambda x: x[0], "dimensions"),
        (lambda x: x.to(torch.int64), "int64"),
        (lambda x: x.to(torch.complex64), "complex64"),
        (lambda x: "image.png", "str"),
        (lambda x: x * float("nan"), "NaN"),
    ],
)
def test_mistakes_in_a_call_name_the_argument(compiled, x, bad, message, tmp_path):
    compiled.save(tmp_path / "m.fxc")  # a loaded model cannot compile again for another size
    with pytest.raises(InputError, match=message):
        fxcompress.load(tmp_path / "m.fxc")(bad(x))


def test_debug_writes_a_folder(model, x, tmp_path):
    fxcompress.compile(model, example_inputs=x, debug=tmp_path / "dump")
    names = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert names[0] == "00_captured.txt" and {"report.json", "report.txt"} <= set(names)
    assert any(n.endswith("_fold_batch_norm.diff") for n in names)
    folded = next((tmp_path / "dump").glob("*_fold_batch_norm.txt")).read_text()
    assert "into stem.0 (backward)" in folded and "aten.batch_norm" not in folded.split("\n\n")[-1]
