"""Capturing gives a flat graph with its own weights and leaves the user's model as it was."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress import shapes
from fxcompress.capture import capture
from fxcompress.errors import CaptureError, InputError, ModelError, OptionError
from fxcompress.graph import calls, constant, output_node, placeholders, shape
from fxcompress.meta import tensor_meta
from fxcompress.options import context
from tests.support.float_graphs import aten
from tests.support.graphs import build, images


def assert_same(captured, model, args, kwargs=None, **tolerance):
    kwargs = kwargs or {}
    with torch.no_grad():
        expected = model(*args, **kwargs)
        actual = captured.interface.unflatten(captured.graph_module(*captured.interface.flatten(args, kwargs)))
    torch.testing.assert_close(actual, expected, **tolerance)


def batch_of(inputs, n):
    return tuple(torch.cat([x] * n)[:n] for x in inputs)


@pytest.mark.parametrize("name", ["classifier", "mlp", "conv1d", "two_inputs", "dict_output"])
def test_models_at_any_batch(name):
    model, inputs = build(name)
    captured = capture(model, batch_of(inputs, 1))
    for n in (1, 2, 5):
        assert_same(captured, model, batch_of(inputs, n))


def test_the_graph_is_flat():
    model, inputs = build("classifier")
    captured = capture(model, inputs)
    gm = captured.graph_module
    assert {n.op for n in gm.graph.nodes} == {"placeholder", "get_attr", "call_function", "output"}
    assert isinstance(output_node(gm).args[0], tuple)
    assert type(gm.graph._codegen) is torch.fx.graph.CodeGen
    assert not gm.training
    assert all("val" in n.meta for n in gm.graph.nodes if n.op != "output")
    assert isinstance(shape(placeholders(gm)[0])[0], torch.SymInt)
    assert "aten.batch_norm.default" in {str(n.target) for n in gm.graph.nodes}
    assert context(gm).example_inputs is captured.example_inputs


def test_shapes_are_known_without_computing_them(monkeypatch):
    model, inputs = build("classifier")
    gm = capture(model, inputs).graph_module
    monkeypatch.setattr(shapes, "_evaluate", None)
    shapes.propagate(gm)


def test_example_inputs_are_copies_of_batch_two_or_more():
    model, (x,) = build("conv_bn_relu")
    (single,) = capture(model, (x[:1],)).example_inputs
    assert torch.equal(single, torch.cat([x[:1]] * 2))
    (four,) = capture(model, (torch.cat([x, x]).double(),)).example_inputs
    assert four.shape[0] == 4
    assert four.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- the weights


def snapshot(model):
    """Everything a capture could disturb."""
    return (
        {k: (v.clone(), v._version, v.data_ptr()) for k, v in model.state_dict().items()},
        {k: (p.requires_grad, p.grad, p.dtype) for k, p in model.named_parameters()},
        {k: (m.training, sorted(m.__dict__), list(m._forward_hooks.items())) for k, m in model.named_modules()},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_model_is_not_touched(dtype):
    model, (x,) = build("residual_block")
    model = model.to(dtype)
    model.first.register_forward_hook(lambda module, args, output: output * 1)
    before = snapshot(model)
    captured = capture(model, (x.to(dtype),))
    after = snapshot(model)
    for key, (value, version, pointer) in before[0].items():
        assert torch.equal(value, after[0][key][0])
        assert (version, pointer) == after[0][key][1:]
    assert before[1:] == after[1:]
    gm = captured.graph_module
    assert not list(gm.parameters())
    assert all(b.dtype == torch.float32 and not b.requires_grad for b in gm.buffers())
    with torch.no_grad():
        for buffer in gm.buffers():
            buffer.zero_()
    assert torch.equal(model.state_dict()["first.0.weight"], before[0]["first.0.weight"][0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_are_computed_in_float32(dtype):
    model, (x,) = build("classifier")
    captured = capture(copy.deepcopy(model).to(dtype), (x.to(dtype),))
    assert_same(captured, copy.deepcopy(model).to(dtype).float(), (x.to(dtype).float(),))
    assert all(n.meta["val"].dtype == torch.float32 for n in captured.graph_module.graph.nodes if n.op != "output")


class CastsItself(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer.bfloat16()

    def forward(self, x):
        return self.layer(x.bfloat16()).float()


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv2d(3, 4, 1), (2, 3, 8, 8)), (nn.Linear(3, 4), (2, 3))])
def test_a_cast_to_half_precision_in_the_forward_is_what_the_error_is_about(layer, shape):
    """The model runs as the user has it; only the float32 copy does not."""
    with pytest.raises(InputError, match=r"test_capture.py:\d+.*BFloat16.*computed in float32.*dtype of the weights"):
        capture(CastsItself(layer).eval(), (torch.randn(shape),))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.b.weight = self.a.weight
        self.register_buffer("view", self.a.weight.data[:2])

    def forward(self, x):
        return self.c(self.b(self.a(x))) @ self.view.t()


def test_tied_weights_stay_tied():
    model, x = Tied().eval(), torch.randn(2, 4)
    captured = capture(model, (x,))
    gm = captured.graph_module
    a, b, c = calls(gm, aten.linear.default)
    assert a.args[1].target == b.args[1].target != c.args[1].target
    assert a.args[1].target != next(calls(gm, aten.t.default)).args[0].target  # a view has another shape
    assert_same(captured, model, (x,))


def test_unused_weights_are_dropped():
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    gm = capture(model, (torch.randn(2, 4),)).graph_module
    assert sorted(n for n, _ in gm.named_buffers()) == ["0.bias", "0.running_mean", "0.running_var", "0.weight"]


# ------------------------------------------------------------------------------------------------------------- origins


def test_origins_name_module_and_line():
    model, inputs = build("residual_block")
    gm = capture(model, inputs).graph_module
    conv = next(calls(gm, aten.conv2d.default))
    origin = tensor_meta(conv).origin
    assert origin.module == "first.0"
    name, line = origin.source.split(":")
    assert name == "graphs.py"
    assert int(line) > 0
    assert tensor_meta(conv.args[1]).origin.module == "first.0"
    add = next(calls(gm, aten.add.Tensor))
    assert tensor_meta(add).origin.module == ""
    assert tensor_meta(add).origin.source.startswith("graphs.py:")


# -------------------------------------------------------------------------------------------------- what can be captured


class Calls(nn.Module):
    """A model from a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("reexport", [False, True])
def test_exported_programs(reexport):
    model, (x,) = build("residual_block")
    dynamic = None if reexport else ({0: torch.export.Dim("n", min=1)},)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    captured = capture(program, (x,))
    if not reexport:
        assert captured.interface.parameters == ("x",)
        assert tensor_meta(next(calls(captured.graph_module, aten.conv2d.default))).origin.module == "first.0"
    assert_same(captured, model, (torch.cat([x, x, x]),))


def test_graph_modules():
    model, (x,) = build("residual_block")
    first = capture(model, (x,))
    captured = capture(first.graph_module, (x,))  # ATen already: used as it is, copied
    assert captured.graph_module is not first.graph_module
    assert not {b.data_ptr() for b in captured.graph_module.buffers()} & {
        b.data_ptr() for b in first.graph_module.buffers()
    }
    assert tensor_meta(next(calls(captured.graph_module, aten.conv2d.default))).origin.module == "first.0"
    assert torch.equal(captured.graph_module(x)[0], model(x))
    assert_same(capture(torch.fx.symbolic_trace(model), (x,)), model, (torch.cat([x, x]),))


def test_keyword_arguments_in_any_order():
    class TwoKeywords(nn.Module):
        def forward(self, x, *, a, b):
            return x + 2 * a - b

    x, a, b = (images(2, 3, seed=i) for i in range(3))
    model = TwoKeywords().eval()
    for example in ({"a": a, "b": b}, {"b": b, "a": a}):
        captured = capture(model, (x,), example)
        assert_same(captured, model, (x,), {"b": b, "a": a})


def test_variadic_arguments():
    class Sum(nn.Module):
        def forward(self, *xs, bias):
            return sum(xs) + bias

    model, xs, bias = Sum().eval(), (images(1, 3), images(1, 3, seed=1)), images(1, 3, seed=2)
    captured = capture(model, xs, {"bias": bias})
    assert [leaf.name for leaf in captured.interface.inputs] == ["args[0]", "args[1]", "bias"]
    assert_same(captured, model, batch_of(xs, 3), {"bias": batch_of((bias,), 3)[0]})
    with pytest.raises(CaptureError, match=r"the forward takes \*\*kwargs.*names its keyword arguments"):
        capture(Calls(lambda *xs, **named: sum(xs) + named["bias"]).eval(), xs, {"bias": bias})


def test_one_tensor_passed_twice():
    x = images(1, 3)
    captured = capture(Calls(lambda a, b: a - b).eval(), (x, x))
    y = images(4, 3, seed=1)
    assert_same(captured, Calls(lambda a, b: a - b), (y, 2 * y))


def test_gradient_mode_in_the_forward_adds_nothing():
    @torch.no_grad()
    def forward(x):
        return F.relu(x)

    gm = capture(Calls(forward).eval(), (images(2, 3),)).graph_module
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [aten.relu.default]


def test_assertions_are_removed():
    gm = capture(Calls(lambda x: x.to(torch.float32) + 1).eval(), (images(2, 3),)).graph_module
    assert not any("assert" in str(n.target) for n in gm.graph.nodes)


# ------------------------------------------------------------------------------------------------------------- refusals


def _branches(x):
    return x if x.sum() > 0 else -x


def _fixed_batch(x):
    return x.reshape(2, -1)


def _shape_result(x):
    return x, x.shape[0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            _branches,
            r"test_capture.py:\d+: torch.export failed: the branch 'return x if x.sum\(\) > 0 else -x' depends on",
        ),
        (_fixed_batch, r"the model fixes the batch size.*Write the batch as x.shape\[0\]"),
        (_shape_result, r"returns .*, a number computed from the shapes"),
        (lambda x: None, r"returns no tensor"),
        (lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)), r"without control flow operators"),
    ],
)
def test_capture_errors(function, message):
    with pytest.raises(CaptureError, match=message) as error:
        capture(Calls(function).eval(), (images(2, 3),))
    if "torch.export failed" in message:
        assert error.value.__cause__ is not None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, y: x + y, r"fails on args\[0\] float32 \(2, 3\): TypeError: .*missing 1 required"),
        (lambda x: x @ torch.ones(5, 5), r"RuntimeError: mat1 and mat2 .*Pass the shapes the model takes"),
    ],
)
def test_a_model_that_does_not_run_on_the_example(function, message):
    with pytest.raises(InputError, match=message):
        capture(Calls(function).eval(), (images(2, 3),))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count.add_(1)
        return x + self.count


def test_state_in_the_forward():
    with pytest.raises(CaptureError, match="the forward writes to count"):
        capture(Counter().eval(), (images(2, 3),))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "no tensor with a batch dimension"),
        ((torch.tensor(1.0),), "no tensor with a batch dimension"),
        ((torch.zeros(0, 3),), "the example batch is empty"),
        ((torch.zeros(2, 3), object()), r"argument args\[1\] is a object; expected a real tensor"),
        ((torch.zeros(2, 3, dtype=torch.complex64),), "is a complex tensor"),
    ],
)
def test_unusable_examples(args, message):
    with pytest.raises(InputError, match=message):
        capture(Calls(lambda *xs: xs[0]).eval(), args)


def test_what_is_not_a_module():
    with pytest.raises(ModelError, match=r"the model is a function; expected an nn.Module"):
        capture(F.relu, (images(2, 3),))
    with pytest.raises(ModelError, match="Pass the Python module it was made from"):
        capture(torch.jit.trace(nn.ReLU(), images(2, 3)), (images(2, 3),))


def test_the_model_is_checked_first():
    with pytest.raises(ModelError, match="training mode"):
        capture(nn.Dropout(), (images(2, 3),))


# --------------------------------------------------------------------------------------------------- input normalization


@pytest.mark.parametrize(
    ("mean", "std"), [(0.5, 0.25), ([0.1, 0.2, 0.3], [0.5, 1.0, 2.0]), (torch.tensor(3.0), [1.0, 2.0, 4.0])]
)
def test_input_normalization(mean, std):
    model, (x,) = build("conv_bn_relu")
    captured = capture(model, (x,), input_normalization=(mean, std))
    gm = captured.graph_module
    first = placeholders(gm)[0]
    (norm,) = first.users
    assert norm.target is aten.batch_norm.default
    assert tensor_meta(norm).origin.module == "input_normalization"
    assert tensor_meta(norm).channel_axis == 1
    assert torch.equal(captured.example_inputs[0], x)  # raw
    shift, scale = (torch.as_tensor(v).reshape(-1, 1, 1) for v in (mean, std))
    torch.testing.assert_close(gm(x)[0], model((x - shift) / scale))
    assert constant(gm, norm.args[3]).shape == (3,)


def test_input_normalization_skips_integer_inputs():
    class Masked(nn.Module):
        def forward(self, ids, x):
            return x * 2 + ids[:, None]

    gm = capture(
        Masked().eval(), (torch.zeros(2, dtype=torch.int64), images(2, 3)), input_normalization=(1.0, 2.0)
    ).graph_module
    (norm,) = calls(gm, aten.batch_norm.default)
    assert norm.args[0] is placeholders(gm)[1]


@pytest.mark.parametrize(
    ("normalization", "message"),
    [
        ((0.5, 0.0), r"std is \[0.0, 0.0, 0.0\]; expected positive numbers"),
        (([0.1, 0.2], 1.0), "mean has 2 values; expected one finite number, or one for each of 3 channels"),
        ((0.1, float("nan")), "std has 1 values"),
    ],
)
def test_input_normalization_errors(normalization, message):
    model, (x,) = build("conv_bn_relu")
    with pytest.raises(OptionError, match=message):
        capture(model, (x,), input_normalization=normalization)


class CountsAndComplains(nn.Module):
    def forward(self, x):
        print("half way", file=sys.stderr)
        return x[:, : int(x.sum())]


def test_a_failed_export_does_not_print_its_graph(capsys):
    with pytest.raises(CaptureError, match="depends on the values"):
        capture(CountsAndComplains().eval(), (torch.rand(2, 8),), {})
    assert set(capsys.readouterr().err.split("\n")) == {"half way", ""}
