"""Folding keeps the function: one batch norm that folds and one that must not for every row of the table."""

import pytest
import torch

import fxcompress
from fxcompress.errors import ModelError
from fxcompress.graph import calls, constant, placeholders
from fxcompress.options import CompileOptions, Context
from fxcompress.passes.fold_batch_norm import FoldBatchNorm
from tests.support.float_graphs import (
    aten,
    batch_norms,
    blocked,
    graph,
    image,
    max_pool,
    outputs,
    positive,
    relative_error,
    run,
    shuffle,
    zero_pad,
)

BATCH_NORM = aten.batch_norm.default
PAD = torch.ops.fxcompress.pad.default


# ----------------------------------------------------------------------------------------- what lies behind or below


def avg_pool(g, x, padding=0, count_include_pad=True):
    return g.call(aten.avg_pool2d.default, x, [2, 2], [2, 2], [padding] * 2, False, count_include_pad, None)


def block_constant(g, x, block):
    """A batch norm behind a flatten whose parameters are those of the channels before it."""
    count = g.shape(x)[1] // block
    values = [g.uniform(0.5, 2, count).repeat_interleave(block) for _ in range(4)]
    return g.batch_norm(x, gamma=values[0], beta=values[1], mean=values[2], var=values[3])


def halves(g, x):
    """The first and the second half of 4 channels."""
    return [g.call(aten.slice.Tensor, x, 1, start, start + 2, 1) for start in (0, 2)]


def two_convs(g):
    x = image(g)
    return g.conv(x, 3), g.conv(x, 3, 3, padding=1)


BACKWARD = {
    "conv2d": lambda g: g.batch_norm(g.conv(image(g), 5, 3, padding=1, stride=2, dilation=2)),
    "conv without bias": lambda g: g.batch_norm(g.conv(image(g), 5, bias=False)),
    "conv1d": lambda g: g.batch_norm(g.conv(g.input(2, 3, 8), 5, 3)),
    "conv3d": lambda g: g.batch_norm(g.conv(g.input(2, 2, 4, 4, 4), 3, 3)),
    "grouped": lambda g: g.batch_norm(g.conv(image(g), 6, 3, groups=2)),
    "depthwise": lambda g: g.batch_norm(g.conv(image(g), 8, 3, groups=4)),
    "transposed": lambda g: g.batch_norm(g.conv_transpose(image(g), 3, 3, stride=2)),
    "transposed grouped": lambda g: g.batch_norm(g.conv_transpose(image(g), 6, 2, groups=2, bias=False)),
    "transposed 1d": lambda g: g.batch_norm(g.conv_transpose(g.input(2, 4, 6), 2, 3)),
    "linear": lambda g: g.batch_norm(g.linear(g.input(2, 3), 5)),
    "linear, permuted": lambda g: g.batch_norm(g.call(aten.permute.default, g.linear(g.input(2, 7, 3), 5), [0, 2, 1])),
    "linear, channels last": lambda g: g.batch_norm(
        g.call(aten.permute.default, g.linear(g.input(2, 4, 5, 3), 6), [0, 3, -3, 2])
    ),
    "another batch norm": lambda g: g.batch_norm(g.batch_norm(g.call(aten.tanh.default, image(g)))),
    "batch norm and conv": lambda g: g.batch_norm(g.add(g.batch_norm(g.call(aten.tanh.default, x := image(g))), g.conv(x, 4))),
    "without affine parameters": lambda g: g.batch_norm(g.conv(image(g), 5), affine=False),
    "add": lambda g: g.batch_norm(g.add(*two_convs(g))),
    "add, shift to the right": lambda g: positive(g, g.add(g.relu(g.conv(image(g), 3)), g.conv(image(g), 3))),
    "sub": lambda g: g.batch_norm(g.call(aten.sub.Tensor, *two_convs(g))),
    "cat": lambda g: g.batch_norm(g.cat(*two_convs(g))),
    "average pool": lambda g: g.batch_norm(avg_pool(g, g.conv(image(g), 3))),
    "padded average pool": lambda g: g.batch_norm(avg_pool(g, g.conv(image(g), 3), padding=1, count_include_pad=False)),
    "padded average pool, scale only": lambda g: g.scale(avg_pool(g, g.conv(image(g), 3), padding=1)),
    "adaptive pool": lambda g: g.batch_norm(g.call(aten.adaptive_avg_pool2d.default, g.conv(image(g), 3), [2, 3])),
    "mean": lambda g: g.batch_norm(g.call(aten.mean.dim, g.conv(image(g), 3), [2, 3])),
    "mean, keepdim": lambda g: g.batch_norm(g.call(aten.mean.dim, g.conv(image(g), 3), [-1, -2], True)),
    "resize": lambda g: g.batch_norm(g.call(aten.upsample_bilinear2d.vec, g.conv(image(g), 3), [9, 11], False, None)),
    "max pool": lambda g: positive(g, max_pool(g, g.conv(image(g), 3))),
    "relu": lambda g: g.scale(g.relu(g.conv(image(g), 3))),
    "leaky relu": lambda g: g.scale(g.call(aten.leaky_relu.default, g.conv(image(g), 3), 0.1)),
    "flatten": lambda g: block_constant(g, g.call(aten.reshape.default, g.conv(image(g), 3), [-1, 108]), 36),
    "channel shuffle": lambda g: g.batch_norm(shuffle(g, g.conv(image(g), 6))),
    "slice": lambda g: g.batch_norm(g.call(aten.slice.Tensor, g.conv(image(g), 3), 2, 1, 5, 2)),
    "select": lambda g: g.batch_norm(g.call(aten.select.int, g.conv(image(g), 3), 2, 1)),
    "index_select": lambda g: g.batch_norm(
        g.call(aten.index_select.default, g.conv(image(g), 4), 1, g.constant(torch.tensor([3, 1, 0, 2])))
    ),
    "nearest resize": lambda g: g.batch_norm(
        g.call(aten.index_select.default, g.conv(image(g), 4), 3, g.constant(torch.tensor([0, 0, 1, 1])))
    ),
    "expand": lambda g: g.batch_norm(
        g.call(aten.expand.default, g.call(aten.mean.dim, g.conv(image(g), 3), [2, 3], True), [-1, 3, 5, 5])
    ),
    "clone": lambda g: g.batch_norm(g.call(aten.clone.default, g.conv(image(g), 3))),
    "constant pad, scale only": lambda g: g.scale(zero_pad(g, g.conv(image(g), 3))),
    "constant operand": lambda g: g.batch_norm(g.add(g.conv(image(g), 3), g.constant(g.normal(1, 1, 6, 6)))),
    "concatenated constant": lambda g: g.batch_norm(
        g.cat(g.conv(image(g), 3), g.call(aten.expand.default, g.constant(g.normal(1, 2, 1, 1)), [2, 2, 6, 6]))
    ),
}  # fmt: skip

BACKWARD_REFUSED = {
    "other consumer": (lambda g: (c := g.conv(image(g), 3), g.batch_norm(c)), "also read by output"),
    "linear, another axis": (lambda g: g.batch_norm(g.linear(g.input(2, 5, 3), 5)), "varies along another axis"),
    "weight computed": (
        lambda g: g.batch_norm(g.conv(image(g), 3, weight=g.call(aten.tanh.default, g.constant(g.normal(3, 4, 1, 1))))),
        "weight is computed at run time",
    ),
    "add of an input": (lambda g: g.batch_norm(g.add(g.conv(x := image(g, 3), 3), x)), "graph input"),
    "sub of a nonlinear branch": (
        lambda g: g.batch_norm(g.call(aten.sub.Tensor, g.conv(x := image(g), 3), g.call(aten.tanh.default, g.conv(x, 3)))),
        "aten.tanh.default does not commute",
    ),
    "broadcast sum": (
        lambda g: g.batch_norm(g.add(g.conv(x := image(g), 3), g.conv(g.call(aten.mean.dim, x, [1], True), 1))),
        "does not have",
    ),
    "cat with a nonlinear branch": (
        lambda g: positive(g, g.cat(g.conv(x := image(g), 3), g.relu(g.conv(x, 3)))),
        "does not commute with a shift",
    ),
    "padded average pool": (lambda g: g.batch_norm(avg_pool(g, g.conv(image(g), 3), padding=1)), "counts zero padding"),
    "mean over channels": (
        lambda g: g.batch_norm(g.call(aten.mean.dim, g.call(aten.tanh.default, g.conv(image(g), 3)), [2])),
        "aten.tanh.default",
    ),
    "max pool, negative scale": (lambda g: g.scale(max_pool(g, g.conv(image(g), 3)), positive=False), "not positive"),
    "relu, shift": (lambda g: positive(g, g.relu(g.conv(image(g), 3))), "does not commute with a shift"),
    "relu, negative scale": (lambda g: g.scale(g.relu(g.conv(image(g), 3)), positive=False), "not positive"),
    "relu6": (lambda g: g.scale(g.call(aten.clamp.default, g.conv(image(g), 3), 0, 6)), "clamp.default does not commute"),
    "flatten, free parameters": (
        lambda g: g.batch_norm(g.call(aten.reshape.default, g.conv(image(g), 3), [-1, 108])),
        "varies along another axis",
    ),
    "copies": (
        lambda g: g.batch_norm(g.call(aten.index_select.default, g.conv(image(g), 2), 1, g.constant(torch.tensor([0, 0, 1])))),
        "copies of one element",
    ),
    "repeated channel": (
        lambda g: g.batch_norm(g.call(aten.expand.default, g.conv(image(g), 1), [-1, 3, -1, -1])),
        "copies of one element",
    ),
    "constant pad, shift": (lambda g: g.batch_norm(zero_pad(g, g.conv(image(g), 3))), "does not map to itself"),
    "product": (lambda g: g.scale(g.call(aten.mul.Tensor, *two_convs(g))), "aten.mul.Tensor does not commute"),
    "graph input": (lambda g: g.batch_norm(image(g)), "graph input"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", BACKWARD)
def test_folds_backward(name, dtype):
    gm, inputs = graph(BACKWARD[name], dtype)
    before, expected = batch_norms(gm), outputs(gm, inputs)
    plan = FoldBatchNorm().plan(gm)
    assert str(plan.matches[-1]).endswith("(backward)")
    removed = run(FoldBatchNorm(), gm)
    assert removed >= 1 and batch_norms(gm) == before - removed
    assert relative_error(expected, outputs(gm, inputs)) < (1e-5 if dtype is torch.float32 else 1e-10)
    assert not FoldBatchNorm().plan(gm).matches


@pytest.mark.parametrize("name", BACKWARD_REFUSED)
def test_refuses_backward(name):
    build, reason = BACKWARD_REFUSED[name]
    gm, _ = graph(build)
    code = str(gm.graph)
    plan = FoldBatchNorm().plan(gm)
    assert not plan.matches and len(plan.rejects) == 1
    assert reason in plan.rejects[0].reason.split("; forward: ")[0]
    FoldBatchNorm().apply(plan)
    assert str(gm.graph) == code


# ------------------------------------------------------------------------------------------------------------ forward


def transformer_split(g):
    return g.linear(
        g.call(aten.permute.default, g.call(aten.reshape.default, g.batch_norm(blocked(g)), [-1, 4, 36]), [0, 2, 1]), 3
    )


FORWARD = {
    "part of the batch": lambda g: g.conv(g.call(aten.slice.Tensor, g.batch_norm(blocked(g)), 0, 0, 1, 1), 3),
    "conv": lambda g: g.conv(g.batch_norm(blocked(g)), 3, 3),
    "grouped": lambda g: g.conv(g.batch_norm(blocked(g)), 6, 3, groups=2, bias=False),
    "depthwise": lambda g: g.conv(g.batch_norm(blocked(g)), 8, 3, groups=4),
    "linear": lambda g: g.linear(g.batch_norm(g.call(aten.tanh.default, g.input(2, 5))), 3),
    "linear over positions": transformer_split,
    "several layers": lambda g: (g.conv(y := g.batch_norm(blocked(g)), 3), g.conv(y, 2, 3)),
    "another batch norm": lambda g: g.relu(g.batch_norm(avg_pool(g, g.batch_norm(blocked(g))))),
    "transposed, scale only": lambda g: g.conv_transpose(g.scale(blocked(g), positive=False), 6, 3, groups=2, padding=1),
    "zero padding, scale only": lambda g: g.conv(g.scale(blocked(g), positive=False), 3, 3, padding=1),
    "relu, scale only": lambda g: g.conv(g.relu(g.scale(blocked(g))), 3, 3, padding=1),
    "max pool": lambda g: g.conv(max_pool(g, positive(g, blocked(g))), 3),
    "average pool": lambda g: g.conv(avg_pool(g, g.batch_norm(blocked(g))), 3),
    "mean": lambda g: g.linear(g.call(aten.mean.dim, g.batch_norm(blocked(g)), [2, 3]), 3),
    "flatten": lambda g: g.linear(g.call(aten.reshape.default, g.batch_norm(blocked(g)), [-1, 144]), 3),
    "channel shuffle": lambda g: g.conv(shuffle(g, g.batch_norm(blocked(g))), 6, groups=2),
    "slice": lambda g: g.conv(g.call(aten.slice.Tensor, g.batch_norm(blocked(g)), 1, 1, 3, 1), 3),
    "cat": lambda g: g.conv(g.cat(x := blocked(g), g.batch_norm(x)), 3),
    "cat with a constant": lambda g: g.conv(g.cat(g.constant(g.normal(2, 1, 6, 6)), g.batch_norm(blocked(g))), 3),
    "add of two paths": lambda g: g.conv(g.add(avg_pool(g, y := g.batch_norm(blocked(g))), avg_pool(g, y)), 3),
    "add of a constant": lambda g: g.conv(g.add(g.batch_norm(blocked(g)), g.constant(g.normal(1, 1, 6, 6))), 3),
    "constant minus": lambda g: g.conv(g.call(aten.sub.Tensor, g.constant(g.normal(1, 4, 6, 6)), g.batch_norm(blocked(g))), 3),
    "constant pad, scale only": lambda g: g.conv(zero_pad(g, g.scale(blocked(g))), 3, 3),
}  # fmt: skip

FORWARD_REFUSED = {
    "sum of halves": (lambda g: g.conv(g.add(*halves(g, g.batch_norm(blocked(g)))), 3), "operands are scaled differently"),
    "divided average pool, shift": (
        lambda g: g.conv(g.call(aten.avg_pool2d.default, g.batch_norm(blocked(g)), [2, 2], [2, 2], [0, 0], False, True, 3), 3),
        "counts zero padding or has its own divisor",
    ),
    "zero padding": (lambda g: g.conv(g.batch_norm(blocked(g)), 3, 3, padding=1), "padding with 0 does not shift"),
    "constant pad": (lambda g: g.conv(zero_pad(g, g.batch_norm(blocked(g))), 3, 3), "padding with 0 does not shift"),
    "transposed": (lambda g: g.conv_transpose(g.batch_norm(blocked(g)), 3), "see fewer shifts"),
    "linear, another axis": (lambda g: g.linear(g.batch_norm(blocked(g)), 3), "varies along another axis"),
    "relu": (lambda g: g.conv(g.relu(positive(g, blocked(g))), 3), "does not commute with a shift"),
    "sigmoid": (lambda g: g.conv(g.call(aten.sigmoid.default, g.batch_norm(blocked(g))), 3), "aten.sigmoid.default"),
    "max pool, negative scale": (lambda g: g.conv(max_pool(g, g.scale(blocked(g), positive=False)), 3), "not positive"),
    "padded average pool": (lambda g: g.conv(avg_pool(g, g.batch_norm(blocked(g)), padding=1), 3), "counts zero padding"),
    "one reader of several": (
        lambda g: (g.conv(y := g.batch_norm(blocked(g)), 3), g.call(aten.sigmoid.default, y)),
        "aten.sigmoid.default",
    ),
    "graph output": (lambda g: g.batch_norm(blocked(g)), "graph output"),
    "skip connection": (lambda g: g.conv(g.add(x := blocked(g), g.batch_norm(x)), 3), "does not come through"),
    "constant, scale of 0": (
        lambda g: g.conv(g.add(g.batch_norm(blocked(g), gamma=torch.zeros(4)), g.constant(g.normal(1, 1, 6, 6))), 3),
        "divided by a scale of 0",
    ),
    "mean over channels": (
        lambda g: g.conv(g.call(aten.mean.dim, g.batch_norm(blocked(g)), [1], True), 3),
        "scaled differently",
    ),
    "pads the batch norm's axis": (
        lambda g: g.conv(g.call(aten.constant_pad_nd.default, g.scale(blocked(g)), [0, 0, 0, 0, 1, 1], 0.0), 3),
        "pads a dimension along which the map varies",
    ),
    "computed weight": (
        lambda g: g.call(aten.conv2d.default, x := blocked(g), g.batch_norm(x), None, [1, 1], [0, 0], [1, 1], 1),
        "as its weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", FORWARD)
def test_folds_forward(name, dtype):
    gm, inputs = graph(FORWARD[name], dtype)
    before, expected = batch_norms(gm), outputs(gm, inputs)
    plan = FoldBatchNorm().plan(gm)
    assert plan.matches[0].summary.startswith("forward into ")
    removed = run(FoldBatchNorm(), gm)
    assert removed >= 1 and batch_norms(gm) == before - removed
    assert relative_error(expected, outputs(gm, inputs)) < (1e-5 if dtype is torch.float32 else 1e-10)


@pytest.mark.parametrize("name", FORWARD_REFUSED)
def test_refuses_forward(name):
    build, reason = FORWARD_REFUSED[name]
    gm, _ = graph(build)
    plan = FoldBatchNorm().plan(gm)
    assert not plan.matches and len(plan.rejects) == 1
    assert reason in plan.rejects[0].reason.split("; forward: ")[1]


# ------------------------------------------------------------------------------------------------ input normalization


def declare(gm, **options):
    gm.meta["fxcompress"] = Context(options=CompileOptions(**options))


def normalized_input(g, channels=3):
    """What ``input_normalization`` puts behind a graph input that is declared as 0..255."""
    x = image(g, channels)
    g.inputs[0].copy_(g.uniform(0, 255, *g.shape(x)))
    mean, std = g.uniform(90, 130, channels), g.uniform(50, 70, channels)
    return g.call(BATCH_NORM, x, None, None, g.constant(mean), g.constant(std * std), False, 0.0, 0.0, False)


INPUT_LAYERS = {
    "padded conv": lambda g, y: g.conv(y, 4, 3, padding=1, stride=2),
    "pad then conv": lambda g, y: g.conv(g.call(aten.constant_pad_nd.default, y, [0, 1, 2, 3], 0.0), 4, 3),
    "pad then padded conv": lambda g, y: g.conv(zero_pad(g, y), 4, 3, padding=1),
    "two convs": lambda g, y: g.add(g.conv(y, 4, 3, padding=1), g.conv(y, 4, 5, padding=2)),
    "one-sided pad": lambda g, y: g.conv(g.call(aten.constant_pad_nd.default, y, [1, 2], 0.0), 4, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUT_LAYERS)
def test_input_normalization_folds_exactly_padding_included(name):
    gm, inputs = graph(lambda g: INPUT_LAYERS[name](g, normalized_input(g)))
    declare(gm, input_range=(0, 255))
    expected = outputs(gm, inputs)
    assert run(FoldBatchNorm(), gm) == 1 and batch_norms(gm) == 0
    pads = list(calls(gm, PAD))
    assert pads and not list(calls(gm, aten.constant_pad_nd.default))
    values = [constant(gm, pad.args[2]) for pad in pads]
    assert all(v.min() >= 0 and v.max() <= 255 for v in values)
    assert relative_error(expected, outputs(gm, inputs)) < 1e-10


def test_padding_that_would_leave_the_input_range_is_refused():
    gm, _ = graph(lambda g: g.conv(normalized_input(g), 4, 3, padding=1))
    declare(gm, input_range=[(0, 100)])
    (reject,) = FoldBatchNorm().plan(gm).rejects
    assert "outside 0..100" in reject.reason


def test_the_range_may_be_declared_per_channel():
    gm, inputs = graph(lambda g: g.conv(normalized_input(g), 4, 3, padding=1))
    declare(gm, input_range=([0, 0, 0], [255, 100, 255]))
    (reject,) = FoldBatchNorm().plan(gm).rejects
    assert "outside 0..100" in reject.reason
    declare(gm, input_range=([0, 0, 0], [255, 200, 255]))
    expected = outputs(gm, inputs)
    assert run(FoldBatchNorm(), gm) == 1 and batch_norms(gm) == 0
    assert relative_error(expected, outputs(gm, inputs)) < 1e-10


def test_ranges_are_counted_over_the_float_inputs():
    class TokenAndImage(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = torch.nn.Embedding(5, 4), torch.nn.BatchNorm2d(3)
            self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
            self.norm.running_mean.fill_(0.5)

        def forward(self, token, image):
            return self.conv(self.norm(image)) + self.table(token)[:, :, None, None]

    inputs = torch.tensor([1, 2]), torch.rand(2, 3, 6, 6)
    net = fxcompress.compile(TokenAndImage().eval(), example_inputs=inputs, input_range=[(-1, 1)])
    (record,) = (r for r in net.report().passes if r["name"] == "fold_batch_norm")
    assert record["rewrites"] == 1


def test_without_a_declared_range_padding_is_refused():
    gm, _ = graph(lambda g: g.conv(normalized_input(g), 4, 3, padding=1))
    declare(gm, input_range=[None])
    assert len(FoldBatchNorm().plan(gm).rejects) == 1


# ------------------------------------------------------------------------------------------------- the other promises


def test_reference_vector():
    def build(g):
        conv = g.call(
            aten.linear.default,
            g.input(2, 2),
            g.constant(torch.tensor([[1.0, -2], [0.5, 3]])),
            g.constant(torch.tensor([0.4, 0])),
        )
        vectors = ([2, -0.5], [0.1, 0.2], [0.3, -1], [0.25, 4])
        gamma, beta, mean, var = (torch.tensor(v, dtype=torch.float64) for v in vectors)
        return g.batch_norm(conv, gamma=gamma, beta=beta, mean=mean, var=var, eps=1e-5)

    gm, _ = graph(build)
    run(FoldBatchNorm(), gm)
    (linear,) = calls(gm, aten.linear.default)
    weight, bias = (constant(gm, a).flatten() for a in linear.args[1:3])
    torch.testing.assert_close(
        weight, weight.new_tensor([3.99992, -7.99984, -0.12499984, -0.74999906]), atol=2e-7, rtol=0
    )
    torch.testing.assert_close(bias, bias.new_tensor([0.499992, -0.04999969]), atol=2e-7, rtol=0)


def test_a_zero_gamma_leaves_the_constant_beta():
    gm, inputs = graph(
        lambda g: g.batch_norm(g.conv(image(g), 2), gamma=torch.tensor([0.0, 1]), beta=torch.tensor([7.0, 1]))
    )
    expected = outputs(gm, inputs)
    run(FoldBatchNorm(), gm)
    (conv,) = calls(gm, aten.conv2d.default)
    assert not constant(gm, conv.args[1])[0].any() and constant(gm, conv.args[2])[0] == 7
    assert relative_error(expected, outputs(gm, inputs)) < 1e-10


def test_a_negative_variance_raises():
    gm, _ = graph(lambda g: g.batch_norm(g.conv(image(g), 2), var=torch.tensor([1.0, -1])))
    with pytest.raises(ModelError, match="running_var"):
        FoldBatchNorm().plan(gm)


def test_a_weight_with_two_readers_is_refused_by_name():
    def build(g):
        weight, x = g.constant(g.normal(4, 4, 1, 1)), image(g)
        return g.batch_norm(g.conv(g.relu(g.conv(x, 4, weight=weight)), 4, weight=weight))

    gm, _ = graph(build)
    plan = FoldBatchNorm().plan(gm)
    assert not plan.matches and "weight shared with conv2d_default [conv0]" in plan.rejects[0].reason


def test_two_get_attr_nodes_of_one_weight_are_shared_too():
    def build(g):
        weight = g.constant(g.normal(4, 4, 1, 1))
        again = g.graph.get_attr(weight.target)
        g.values[again] = g.values[weight]
        return g.batch_norm(g.conv(g.relu(g.conv(image(g), 4, weight=weight)), 4, weight=again))

    gm, _ = graph(build)
    assert "weight shared" in FoldBatchNorm().plan(gm).rejects[0].reason


def test_the_model_keeps_its_parameters():
    gm, _ = graph(lambda g: g.batch_norm(g.conv(image(g), 3)))
    (conv,) = calls(gm, aten.conv2d.default)
    weight = constant(gm, conv.args[1])
    before, version = weight.clone(), weight._version
    run(FoldBatchNorm(), gm)
    assert torch.equal(weight, before) and weight._version == version
    assert len(list(gm.buffers())) == 2  # nothing of the batch norm is left


def test_the_summary_names_the_layers():
    gm, _ = graph(lambda g: g.batch_norm(g.cat(*(g.conv(x, 1) for x in [image(g)] for _ in range(5)))))
    (match,) = FoldBatchNorm().plan(gm).matches
    assert match.summary == "into conv4, conv3, conv2 and 2 more (backward)"


def test_a_scale_behind_a_linear_over_positions_folds():
    def build(g):
        y = g.call(aten.mul.Tensor, g.linear(g.input(2, 5, 3), 4), g.constant(g.normal(4)))
        return g.add(y, g.constant(g.normal(1, 5, 4)))  # varies over the positions: stays

    gm, inputs = graph(build)
    expected = outputs(gm, inputs)
    assert run(FoldBatchNorm(), gm) == 1
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [aten.linear.default, aten.add.Tensor]
    assert relative_error(expected, outputs(gm, inputs)) < 1e-10


def test_placeholders_are_left_alone():
    gm, _ = graph(lambda g: g.conv(g.batch_norm(image(g)), 3))
    run(FoldBatchNorm(), gm)
    assert len(placeholders(gm)) == 1 and batch_norms(gm) == 0
