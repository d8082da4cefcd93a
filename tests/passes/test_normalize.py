"""Every spelling becomes the one spelling, and computes the same."""

import copy
import operator

import pytest
import torch

from fxcompress.capture import capture
from fxcompress.dialects import check_level
from fxcompress.errors import UnsupportedOperatorError
from fxcompress.graph import calls, constant, erase_dead, placeholders
from fxcompress.meta import Origin, describe, tensor_meta
from fxcompress.passes.fold_constants import FoldConstants
from fxcompress.passes.normalize import Normalize
from fxcompress.rewrite import Level
from tests.support.float_graphs import FloatGraph, aten, outputs
from tests.support.graphs import MODELS, build
from tests.support.real import workload

TOLERANCE = 1e-12  # relative, in float64: a few roundings


def run(p, gm):
    """Apply a pass until it finds nothing; returns (rewrites, the last plan)."""
    total = 0
    while (plan := p.plan(gm)).matches:
        p.apply(plan)
        gm.graph.lint()
        total += plan.applied
        assert total < 200
    gm.recompile()
    return total, plan


def called(gm):
    return [n.target._schema.name.removeprefix("aten::") for n in gm.graph.nodes if n.op == "call_function"]


def graph(make, *shapes, dtype=torch.float64):
    g = FloatGraph(dtype=dtype)
    result = make(g, *(g.input(2, *shape) for shape in shapes))
    return g.finish(*(result if isinstance(result, tuple) else (result,)))


def frozen(gm):
    """The graph as it is now; constants are shared."""
    return torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))


def call(g, target, *args, **kwargs):
    """``g.call`` with keyword arguments."""
    node = g.graph.call_function(target, args, kwargs)
    plain = torch.fx.node.map_arg((args, kwargs), g.values.__getitem__)
    g.values[node] = target(*plain[0], **plain[1])
    return node


def assert_same(before, after, inputs, batches=(1, 2, 5)):
    for batch in batches:
        xs = [torch.cat([x] * 3)[:batch] for x in inputs]
        for a, b in zip(outputs(before, xs), outputs(after, xs), strict=True):
            assert a.shape == b.shape
            assert float((a - b).abs().max()) <= TOLERANCE * float(a.abs().max())


def one(target, *args, **kwargs):
    """A graph of one call whose first argument is the input."""
    return lambda g, x: call(g, target, x, *args, **kwargs)


def part(target, index, *args):
    return lambda g, x: g.call(operator.getitem, g.call(target, x, *args), index)


def inplace(target, *args, **kwargs):
    return lambda g, x: call(g, target, g.call(aten.mul.Tensor, x, 1.5), *args, **kwargs)


def unpooled_overlapping(g, x):
    pooled = g.call(aten.max_pool2d.default, x, [3, 3], [1, 1], [0, 0], [1, 1], False)
    positions = g.call(operator.getitem, g.call(aten.max_pool2d_with_indices.default, x, [3, 3], [1, 1]), 1)
    return g.call(aten.max_unpool2d.default, pooled, positions, [6, 8])


def viewed(g, x):
    batch = g.call(aten.sym_size.int, x, 0)
    return g.call(aten.view.default, x, [batch, -1])


def weight(g, *shape):
    return g.constant(g.normal(*shape), "weight")


IMAGE = (4, 6, 8)  # of every case that names no shape: (N, 4, 6, 8)

#: name -> (graph of one input, operators afterwards) or (graph, operators, shape)
SPELLINGS = {
    # reshapes
    "view": (viewed, ["reshape"]),
    "flatten": (one(aten.flatten.using_ints, 1), ["reshape"]),
    "flatten batch": (one(aten.flatten.using_ints, 0, 1), ["reshape"]),
    "unflatten": (one(aten.unflatten.int, 1, [2, 2]), ["reshape"]),
    "squeeze": (one(aten.squeeze.dim, 1), ["reshape"], (1, 6)),
    "unsqueeze": (one(aten.unsqueeze.default, 1), ["reshape"]),
    "same shape": (one(aten.flatten.using_ints, 1), [], (4,)),
    "reshape of reshape": (lambda g, x: g.call(aten.view.default, viewed(g, x), [-1, 8, 24]), ["reshape"]),
    "clone": (one(aten.clone.default), []),
    "dropout": (one(aten.dropout.default, 0.5, False), []),
    "to": (one(aten.to.dtype, torch.float64), []),
    "transpose": (one(aten.transpose.int, 1, -1), ["permute"]),
    "mT": (one(aten.mT.default), ["permute"]),
    "movedim": (one(aten.movedim.int, 1, -1), ["permute"]),
    "negative permute": (one(aten.permute.default, [0, -2, -1, -3]), ["permute"]),
    "identity permute": (one(aten.permute.default, [0, 1, 2, 3]), []),
    "pixel_shuffle": (one(aten.pixel_shuffle.default, 2), ["reshape", "permute", "reshape"]),
    "pixel_unshuffle": (one(aten.pixel_unshuffle.default, 2), ["reshape", "permute", "reshape"]),
    "channel_shuffle": (one(aten.channel_shuffle.default, 2), ["index_select"]),
    # parts
    "slice": (one(aten.slice.Tensor, 2, -3, 9223372036854775807, 2), ["slice"]),
    "whole slice": (one(aten.slice.Tensor, 2, 0, 9223372036854775807), []),
    "slice of the batch, whole": (one(aten.slice.Tensor, 0, 0, 9223372036854775807), []),
    "narrow": (one(aten.narrow.default, 1, 1, 2), ["slice"]),
    "select": (one(aten.select.int, 1, -1), ["slice", "reshape"]),
    "chunk": (part(aten.chunk.default, 1, 2, 1), ["slice"]),
    "split": (part(aten.split.Tensor, 1, 3, 1), ["slice"]),
    "split sizes": (part(aten.split_with_sizes.default, 1, [1, 3], 1), ["slice"]),
    "unbind": (part(aten.unbind.int, 2, 1), ["slice", "reshape"]),
    "cat of one": (lambda g, x: g.call(aten.cat.default, [x], 1), []),
    "cat, negative": (lambda g, x: g.call(aten.cat.default, [x, x], -3), ["cat"]),
    "cat zeros": (lambda g, x: g.call(aten.cat.default, [x, g.call(aten.zeros_like.default, x)], 1), ["constant_pad_nd"]),
    "ones cat": (lambda g, x: g.call(aten.cat.default, [g.call(aten.ones_like.default, x), x, x], 1), ["cat", "constant_pad_nd"]),
    "stack": (lambda g, x: g.call(aten.stack.default, [x, x], 1), ["reshape", "reshape", "cat"]),
    "repeat": (one(aten.repeat.default, [1, 2, 1, 3]), ["cat", "cat"]),
    "pad": (one(aten.pad.default, [1, 0, 2, 1, 0, 0]), ["constant_pad_nd"]),
    "no pad": (one(aten.constant_pad_nd.default, [0, 0, 0, 0]), []),
    # selections by index
    "flip": (one(aten.flip.default, [1, -1]), ["index_select", "index_select"]),
    "roll": (one(aten.roll.default, [1, -2], [1, 2]), ["index_select", "index_select"]),
    "repeat_interleave": (one(aten.repeat_interleave.self_int, 2, 1), ["index_select"]),
    "index": (lambda g, x: g.call(aten.index.Tensor, x, [None, g.constant(torch.tensor([-1, 0, 2]))]), ["index_select"]),
    "reflect": (one(aten.pad.default, [1, 2, 3, 0], "reflect"), ["index_select", "index_select"]),
    "replicate": (one(aten.replication_pad2d.default, [1, 2, 0, 0]), ["index_select"]),
    "circular": (one(aten.pad.default, [1, 2], "circular"), ["index_select"], (4, 6)),
    "nearest": (one(aten.upsample_nearest2d.vec, None, [2.0, 1.0]), ["index_select"]),
    "nearest size": (one(aten.upsample_nearest2d.vec, [7, 11], None), ["index_select", "index_select"]),
    "nearest factor": (one(aten.upsample_nearest2d.vec, None, [1.4, 0.6]), ["index_select", "index_select"]),
    "nearest exact": (one(aten._upsample_nearest_exact1d.vec, [5], None), ["index_select"], (2, 8)),
    "bilinear": (one(aten.upsample_bilinear2d.vec, None, False, [2.0, 2.0]), ["upsample_bilinear2d"]),
    "bilinear, uneven": (one(aten.upsample_bilinear2d.vec, None, False, [1.3, 1.3]), ["upsample_bilinear2d"]),
    "bilinear, its own size at another step": (one(aten.upsample_bilinear2d.vec, None, False, [1.1, 1.1]), ["upsample_bilinear2d"]),
    "bilinear to itself": (one(aten.upsample_bilinear2d.vec, [6, 8], True, None), []),
    # activations
    "relu": (one(aten.relu.default), ["clamp"]),
    "relu_": (inplace(aten.relu_.default), ["mul", "clamp"]),
    "relu6": (one(aten.relu6.default), ["clamp"]),
    "hardtanh_": (inplace(aten.hardtanh_.default, 0.0, 6.0), ["mul", "clamp"]),
    "clamp_min": (one(aten.clamp_min.default, 0.25), ["clamp"]),
    "clip": (one(aten.clip.default, None, 0.25), ["clamp"]),
    "no clamp": (one(aten.clamp.default, -float("inf"), None), []),
    "threshold": (one(aten.threshold.default, 0.25, 0.25), ["clamp"]),
    "leaky_relu_": (inplace(aten.leaky_relu_.default), ["mul", "leaky_relu"]),
    "prelu": (lambda g, x: g.call(aten.prelu.default, x, weight(g, 4)), ["clamp", "clamp", "mul", "add"]),
    "prelu of one slope": (lambda g, x: g.call(aten.prelu.default, x, weight(g, 1)), ["leaky_relu"]),
    "rrelu": (one(aten.rrelu.default, 0.1, 0.3, False), ["leaky_relu"]),
    "glu": (one(aten.glu.default, 1), ["slice", "slice", "sigmoid", "mul"]),
    "silu": (lambda g, x: g.call(aten.mul.Tensor, g.call(aten.sigmoid.default, x), x), ["silu"]),
    "mish": (lambda g, x: g.call(aten.mul.Tensor, x, g.call(aten.tanh.default, g.call(aten.softplus.default, x))), ["mish"]),
    "hardsigmoid": (lambda g, x: g.call(aten.div.Tensor, relu6_plus_3(g, x), 6), ["hardsigmoid"]),
    "hardswish": (lambda g, x: g.call(aten.div.Tensor, g.call(aten.mul.Tensor, x, relu6_plus_3(g, x)), 6), ["hardswish"]),
    "x hardsigmoid": (lambda g, x: g.call(aten.mul.Tensor, g.call(aten.div.Tensor, relu6_plus_3(g, x), 6), x), ["hardswish"]),
    # arithmetic
    "add alpha": (lambda g, x: call(g, aten.add.Tensor, x, g.call(aten.abs.default, x), alpha=2), ["abs", "mul", "add"]),
    "add_ number": (inplace(aten.add_.Tensor, 1), ["mul", "add"]),
    "add nothing": (one(aten.add.Tensor, 0), []),
    "constant first": (lambda g, x: g.call(aten.add.Tensor, weight(g, 6, 8), x), ["add"]),
    "sub number": (one(aten.sub.Tensor, 2), ["add"]),
    "sub constant": (lambda g, x: call(g, aten.sub.Tensor, x, weight(g, 8), alpha=3), ["add"]),
    "constant sub": (lambda g, x: g.call(aten.sub.Tensor, weight(g, 8), x), ["mul", "add"]),
    "sub": (lambda g, x: g.call(aten.sub.Tensor, x, g.call(aten.abs.default, x)), ["abs", "sub"]),
    "rsub": (one(aten.rsub.Scalar, 1, 2), ["mul", "add"]),
    "mul Scalar": (one(aten.mul.Scalar, 2), ["mul"]),
    "mul one element": (lambda g, x: g.call(aten.mul.Tensor, weight(g, 1), x), ["mul"]),
    "mul 1": (one(aten.mul.Tensor, 1), []),
    "mul ones": (lambda g, x: g.call(aten.mul.Tensor, x, g.call(aten.ones_like.default, x)), []),
    "two fills": (lambda g, x: g.call(aten.add.Tensor, g.call(aten.zeros_like.default, x), g.call(aten.ones_like.default, x)), ["mul", "add"]),
    "zeros for a layer": (lambda g, x: g.call(aten.cat.default, [g.call(aten.conv2d.default, g.call(aten.zeros_like.default, x), weight(g, 3, 4, 1, 1), weight(g, 3)), x], 1), ["mul", "conv2d", "cat"]),
    "full_like": (one(aten.full_like.default, 2.5), ["mul", "add"]),
    "state of zeros": (lambda g, x: g.call(aten.add.Tensor, g.call(aten.mul.Tensor, x, g.call(aten.zeros_like.default, x)), g.call(aten.tanh.default, x)), ["tanh"]),
    "div number": (one(aten.div.Tensor, 3), ["mul"]),
    "div constant": (lambda g, x: g.call(aten.div.Tensor, x, weight(g, 8)), ["mul"]),
    "div": (lambda g, x: g.call(aten.div.Tensor, x, g.call(aten.exp.default, x)), ["exp", "reciprocal", "mul"]),
    "square": (one(aten.square.default), ["pow"]),
    "addcmul": (lambda g, x: call(g, aten.addcmul.default, x, x, x, value=0.5), ["mul", "mul", "add"]),
    "maximum": (lambda g, x: g.call(aten.maximum.default, x, g.call(aten.neg.default, x)), ["neg", "sub", "clamp", "add"]),
    "max with a number": (lambda g, x: g.call(aten.max.other, x, weight(g)), ["clamp"]),
    "expand": (lambda g, x: g.call(aten.mul.Tensor, g.call(aten.expand_as.default, g.call(aten.mean.dim, x, [2, 3], True), x), x), ["mean", "mul"]),
    "expand kept": (lambda g, x: g.call(aten.expand.default, g.call(aten.mean.dim, x, [2], True), [-1, -1, 3, -1]), ["mean", "expand"]),
    # convolution and batch norm
    "conv": (lambda g, x: g.call(aten.conv2d.default, x, weight(g, 5, 4, 3, 3)), ["conv2d"]),
    "conv same": (lambda g, x: g.call(aten.conv2d.padding, x, weight(g, 5, 4, 3, 3), None, [1, 1], "same"), ["conv2d"]),
    "conv same, even": (lambda g, x: g.call(aten.conv2d.padding, x, weight(g, 5, 4, 4, 3), None, [1, 1], "same"), ["constant_pad_nd", "conv2d"]),
    "conv valid": (lambda g, x: g.call(aten.conv1d.padding, x, weight(g, 5, 4, 3), None, [2], "valid"), ["conv1d"], (4, 9)),
    "convolution": (lambda g, x: g.call(aten.convolution.default, x, weight(g, 6, 2, 3, 3), weight(g, 6), [2], [1], [1], False, [0], 2), ["conv2d"]),
    "transposed": (lambda g, x: g.call(aten.convolution.default, x, weight(g, 4, 3, 2, 2), None, [2], [1], [1], True, [1], 1), ["conv_transpose2d"]),
    "conv_transpose1d": (lambda g, x: g.call(aten.conv_transpose1d.default, x, weight(g, 4, 3, 2), None, [2]), ["conv_transpose1d"], (4, 9)),
    "native batch norm": (lambda g, x: g.call(operator.getitem, g.call(aten._native_batch_norm_legit_no_training.default, x, *(g.constant(g.uniform(0.5, 1, 4)) for _ in range(4)), 0.1, 1e-3), 0), ["batch_norm"]),
    # products
    "linear": (lambda g, x: g.call(aten.linear.default, x, weight(g, 5, 8)), ["linear"]),
    "matmul": (lambda g, x: g.call(aten.matmul.default, x, weight(g, 8, 5)), ["linear"]),
    "matmul vector": (lambda g, x: g.call(aten.matmul.default, x, weight(g, 8)), ["linear", "reshape"]),
    "constant matmul": (lambda g, x: g.call(aten.matmul.default, weight(g, 5, 6), x), ["permute", "linear", "permute"]),
    "matmul of activations": (lambda g, x: g.call(aten.matmul.default, x, g.call(aten.mT.default, x)), ["permute", "matmul"]),
    "mm": (lambda g, x: g.call(aten.mm.default, x, weight(g, 7, 5)), ["linear"], (7,)),
    "addmm": (lambda g, x: g.call(aten.addmm.default, weight(g, 5), x, weight(g, 7, 5)), ["linear"], (7,)),
    "addmm scaled": (lambda g, x: call(g, aten.addmm.default, weight(g, 5), x, weight(g, 7, 5), beta=2, alpha=3), ["linear", "mul", "add"], (7,)),
    "bmm": (lambda g, x: g.call(aten.bmm.default, x, g.call(aten.mT.default, x)), ["permute", "matmul"], (3, 5)),
    "einsum linear": (lambda g, x: g.call(aten.einsum.default, "nchw,kc->nkhw", [x, weight(g, 5, 4)]), ["permute", "linear", "permute"]),
    "einsum two weights dims": (lambda g, x: g.call(aten.einsum.default, "nctv,kvw->nkctw", [x, weight(g, 3, 8, 5)]), ["linear", "reshape", "permute"]),
    "einsum batched": (lambda g, x: g.call(aten.einsum.default, "nchw,ncvw->nchv", [x, x]), ["permute", "matmul"]),
    "einsum merged": (lambda g, x: g.call(aten.einsum.default, "nchw,nkhw->nck", [x, x]), ["reshape", "permute", "reshape", "matmul"]),
    # pooling and reductions
    "max_pool": (one(aten.max_pool2d.default, [2]), ["max_pool2d"]),
    "max_pool with indices": (part(aten.max_pool2d_with_indices.default, 0, [3, 3], [2, 2], [1, 1]), ["max_pool2d"]),
    "adaptive max": (part(aten.adaptive_max_pool2d.default, 0, [3, 2]), ["max_pool2d"]),
    "uneven adaptive max": (part(aten.adaptive_max_pool2d.default, 0, [4, 4]), ["fxcompress::adaptive_max_pool"]),
    "instance norm of each sample": (one(aten.instance_norm.default, None, None, None, None, True, 0.1, 1e-5, False), ["group_norm"]),
    "amax": (one(aten.amax.default, [2, 3]), ["max_pool2d", "reshape"]),
    "amax over channels": (one(aten.amax.default, [1]), ["reshape", "max_pool2d", "reshape"]),
    "amax over rows, kept": (one(aten.amax.default, [-2], True), ["max_pool2d"]),
    "amax over channels and rows": (one(aten.amax.default, [1, 2]), ["reshape", "max_pool2d", "reshape"]),
    "amin": (one(aten.amin.default, [3]), ["neg", "reshape", "max_pool2d", "reshape", "neg"]),
    "largest of a dimension": (part(aten.max.dim, 0, 1), ["reshape", "max_pool2d", "reshape"]),
    "smallest of a dimension": (part(aten.min.dim, 0, 1, True), ["neg", "reshape", "max_pool2d", "reshape", "neg"]),
    "avg_pool": (one(aten.avg_pool2d.default, [2, 2]), ["avg_pool2d"]),
    "avg_pool1d": (one(aten.avg_pool1d.default, [3], [2], [1]), ["avg_pool1d"], (4, 9)),
    "global avg_pool": (one(aten.avg_pool2d.default, [6, 8]), ["mean"]),
    "adaptive 1": (one(aten.adaptive_avg_pool2d.default, [1, 1]), ["mean"]),
    "adaptive even": (one(aten.adaptive_avg_pool2d.default, [3, 2]), ["avg_pool2d"]),
    "adaptive uneven": (one(aten.adaptive_avg_pool2d.default, [4, 2]), ["adaptive_avg_pool2d"]),
    "adaptive same": (one(aten.adaptive_avg_pool2d.default, [6, 8]), []),
    "mean": (one(aten.mean.dim, [-1, -2]), ["mean", "reshape"]),
    "sum": (one(aten.sum.dim_IntList, [2, 3], True), ["mean", "mul"]),
    "mean of one element": (one(aten.mean.dim, [2, 3]), ["reshape"], (4, 1, 1)),
}  # fmt: skip


def relu6_plus_3(g, x):
    return g.call(aten.relu6.default, g.call(aten.add.Tensor, x, 3))


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_spelling(name):
    make, expected, *shape = SPELLINGS[name]
    gm, inputs = graph(make, *(shape or [IMAGE]))
    before = frozen(gm)
    rewrites, last = run(Normalize(), gm)
    assert called(gm) == expected
    assert rewrites > 0 or called(before) == expected
    assert not last.rejects
    assert_same(before, gm, inputs)
    check_level(gm, Level.FLOAT)


def test_numbers_of_the_spellings():
    conv = next(calls(normalized(SPELLINGS["conv same, even"][0]), aten.conv2d.default))
    assert conv.args[3:] == ([1, 1], [1, 1], [1, 1], 1)
    pad = next(calls(normalized(SPELLINGS["conv same, even"][0]), aten.constant_pad_nd.default))
    assert pad.args[1:] == ([0, 0, 0, 1], 0.0)
    assert next(calls(normalized(SPELLINGS["slice"][0]), aten.slice.Tensor)).args[1:] == (2, 3, 6, 2)
    assert next(calls(normalized(viewed), aten.reshape.default)).args[1] == [-1, 192]
    assert next(calls(normalized(one(aten.relu6.default)), aten.clamp.default)).args[1:] == (0.0, 6.0)
    pool = next(calls(normalized(SPELLINGS["max_pool"][0]), aten.max_pool2d.default))
    assert pool.args[1:] == ([2, 2], [2, 2], [0, 0], [1, 1], False)


def normalized(make, *shapes):
    gm, _ = graph(make, *(shapes or [IMAGE]))
    run(Normalize(), gm)
    return gm


def test_hand_written_channel_shuffle_is_one_selection():
    def shuffle(g, x):
        y = g.call(aten.transpose.int, g.call(aten.view.default, x, [-1, 2, 2, 6, 8]), 1, 2)
        return g.call(aten.view.default, g.call(aten.contiguous.default, y), [-1, 4, 6, 8])

    gm, inputs = graph(shuffle, IMAGE)
    before = frozen(gm)
    run(Normalize(), gm)
    assert called(gm) == ["index_select"]
    assert constant(gm, next(calls(gm, aten.index_select.default)).args[2]).tolist() == [0, 2, 1, 3]
    assert_same(before, gm, inputs)


@pytest.mark.parametrize("window, size", [((2, 2), (4, 6, 8)), ((2, 3), (3, 7, 10))])
def test_unpooling_puts_each_value_where_the_first_maximum_was(window, size):
    """Half of the windows of a ReLU hold several zeros, which are all largest: the first one counts."""

    def make(g, x):
        x = g.call(aten.relu.default, x)
        pooled = g.call(aten.max_pool2d_with_indices.default, x, list(window))
        values = g.call(aten.add.Tensor, g.call(operator.getitem, pooled, 0), 1.5)
        return g.call(aten.max_unpool2d.default, values, g.call(operator.getitem, pooled, 1), list(size[1:]))

    gm, inputs = graph(make, size)
    before = frozen(gm)
    assert not run(Normalize(), gm)[1].rejects
    check_level(gm, Level.FLOAT)
    assert_same(before, gm, inputs)


#: name -> (graph, part of the reason)
REFUSED = {
    "unpooling of overlapping windows": (unpooled_overlapping, "windows that lie side by side"),
    "batch slice": (one(aten.slice.Tensor, 0, 0, 1), "slices the batch"),
    "batch select": (one(aten.select.int, 0, 0), "a sample of the batch"),
    "batch mean": (one(aten.mean.dim, [0, 2]), "reduces the batch"),
    "mean of all": (one(aten.mean.default), "reduces the batch"),
    "batch flip": (one(aten.flip.default, [0]), "rearranges the batch"),
    "batch roll": (one(aten.roll.default, [1], [0]), "rearranges the batch"),
    "batch split": (part(aten.split.Tensor, 0, 1, 0), "splits the batch"),
    "max over separate dimensions": (one(aten.amax.default, [1, 3]), "dimensions that are not adjacent"),
    "max over the batch": (one(aten.amax.default, [0]), "reduces the batch"),
    "division by zero": (one(aten.div.Tensor, 0), "divides by zero"),
    "einsum of three": (lambda g, x: g.call(aten.einsum.default, "nchw,kc,kj->njhw", [x, weight(g, 3, 4), weight(g, 3, 5)]), "not a product of two"),
    "einsum outer": (lambda g, x: g.call(aten.einsum.default, "nchw,k->nchwk", [x, weight(g, 3)]), "not a matrix product"),
    "two indices": (lambda g, x: g.call(aten.index.Tensor, x, [None, *[g.constant(torch.tensor([0, 1])) for _ in range(2)]]), "one constant index"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    make, reason = REFUSED[name]
    gm, _ = graph(make, IMAGE)
    plan = Normalize().plan(gm)
    assert not plan.matches
    assert any(reason in str(r) for r in plan.rejects), plan


def test_computed_weights_become_matmul():
    def make(g, x, y):
        return g.call(aten.linear.default, x, g.call(aten.squeeze.dim, g.call(aten.mean.dim, y, [0], True), 0))

    gm, inputs = graph(make, (4, 5), (3, 5))
    before = frozen(gm)
    Normalize().apply(Normalize().plan(gm))
    gm.recompile()
    assert "matmul" in called(gm)
    assert "linear" not in called(gm)
    assert_same(before, gm, inputs)


def test_attention_is_spelled_out():
    def make(g, q, k, v):
        return g.call(aten.scaled_dot_product_attention.default, q, k, v)

    gm, inputs = graph(make, *[(2, 5, 4)] * 3)
    before = frozen(gm)
    run(Normalize(), gm)
    assert called(gm) == ["permute", "matmul", "mul", "softmax", "matmul"]
    assert_same(before, gm, inputs)


def test_negative_padding_is_a_slice():
    class Crop(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.pad(x, (-1, 2, 0, -2))

    x = torch.randn(2, 3, 6, 7)
    gm = capture(Crop().eval(), (x,)).graph_module
    run(Normalize(), gm)
    assert called(gm) == ["slice", "slice", "constant_pad_nd"]
    assert torch.equal(gm(x)[0], Crop()(x))


def test_in_place_change_seen_through_another_view_is_an_error():
    def make(g, x):
        y = g.call(aten.mul.Tensor, x, 2.0)
        part = g.call(aten.slice.Tensor, y, 1, 0, 2)
        g.call(aten.relu_.default, y)
        return part

    gm, _ = graph(make, IMAGE)
    with pytest.raises(UnsupportedOperatorError, match=r"relu_.*reads through another view.*out of place"):
        Normalize().plan(gm)


def test_in_place_chain_on_one_view_is_fine():
    def make(g, x):
        y = g.call(aten.view.default, g.call(aten.mul.Tensor, x, 2.0), [-1, 192])
        return g.call(aten.add_.Tensor, g.call(aten.relu_.default, y), 1)

    assert called(normalized(make)) == ["mul", "reshape", "clamp", "add"]


def test_a_swap_across_the_batch_is_no_channel_shuffle():
    def swap(g, x):
        y = g.call(aten.permute.default, g.call(aten.view.default, x, [-1, 2, 2, 3]), [0, 2, 1, 3])
        return g.call(aten.reshape.default, y, [-1, 8, 3])

    gm, inputs = graph(swap, (8, 3))
    before = frozen(gm)
    run(Normalize(), gm)
    assert called(gm) == ["reshape", "permute", "reshape"]
    assert_same(before, gm, inputs)


def test_integer_arithmetic_is_left_alone():
    gm, _ = graph(lambda g, x: g.call(aten.relu.default, g.call(aten.argmax.default, x, 1)), IMAGE)
    assert not Normalize().plan(gm).matches


def test_a_limited_plan_never_drops_a_copy_that_is_written_to():
    def make(g, x):
        y = g.call(aten.clone.default, x)
        return g.call(aten.relu_.default, y), g.call(aten.neg.default, x)

    gm, inputs = graph(make, IMAGE)
    before = frozen(gm)
    plan = Normalize().plan(gm)
    assert [m.node.name for m in plan.matches] == ["relu__default", "clone_default"]
    plan.matches = plan.matches[:1]
    Normalize().apply(plan)
    gm.recompile()
    assert_same(before, gm, inputs)


def test_mixed_dtypes_are_left_to_the_dialect_check():
    gm, _ = graph(lambda g, x: g.call(aten.mul.Tensor, x, g.constant(torch.arange(8))), IMAGE)
    assert not Normalize().plan(gm).matches


def test_origin_and_keep_float_are_taken_over():
    def make(g, x):
        y = g.call(aten.glu.default, x, 1)
        describe(y, origin=Origin("gate", "net.py:7"))
        y.meta["keep_float"] = True
        return y

    gm = normalized(make)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            assert str(tensor_meta(node).origin) == "gate (net.py:7)"
            assert node.meta["keep_float"]


def test_shapes_are_known_at_once():
    gm, _ = graph(one(aten.glu.default, 1), IMAGE)
    Normalize().apply(Normalize().plan(gm))
    assert all("val" in n.meta for n in gm.graph.nodes if n.op != "output")


def test_plan_prints_the_new_spelling_and_changes_nothing():
    gm, _ = graph(SPELLINGS["matmul"][0], IMAGE)
    text, before = str(Normalize().plan(gm)), gm.graph.python_code("self").src
    assert "linear(x0, permute(weight0, [1, 0]), None)" in text
    assert gm.graph.python_code("self").src == before


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name):
    model, inputs = build(name)
    captured = capture(model, inputs)
    gm = captured.graph_module
    for p in (FoldConstants(), Normalize()):
        run(p, gm)
    erase_dead(gm)
    check_level(gm, Level.FLOAT)
    assert not any(isinstance(s, torch.fx.Node) and s.target is aten.sym_size.int for s in gm.graph.nodes)
    assert len(placeholders(gm)) == len(inputs)
    for batch in (1, 5):
        xs = [torch.cat([x] * 3)[:batch] for x in inputs]
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(model(*xs))
            actual = gm(*xs)
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["resnet20", "resnet8", "kws", "vww", "ad"])
def test_real_models(name):
    work = workload(name, limit=5)
    x = work.inputs[:5].float()
    captured = capture(work.model, (x[:2],), input_normalization=work.normalization)
    gm = captured.graph_module
    run(Normalize(), gm)
    check_level(gm, Level.FLOAT)
    mean, std = (0.0, 1.0) if work.normalization is None else work.normalization
    shift, scale = (torch.as_tensor(v, dtype=torch.float32).reshape(-1, *[1] * (x.ndim - 2)) for v in (mean, std))
    with torch.no_grad():
        for batch in (1, 2, 5):
            expected = work.model((x[:batch] - shift) / scale)
            error = (gm(x[:batch])[0] - expected).abs().max()
            assert float(error) <= 1e-5 * float(expected.abs().max())
