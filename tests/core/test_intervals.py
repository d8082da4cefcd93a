"""Worst-case intervals: no input leaves them (soundness), some input reaches them (tightness)."""

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from fxcompress.analysis import interval_arithmetic
from fxcompress.analysis.interval_arithmetic import LIMIT, dot, exactly, product, repeated
from fxcompress.analysis.intervals import accumulator_intervals, bits_needed, tensor_intervals
from fxcompress.bilinear import WINOGRAD
from fxcompress.errors import AccumulatorError, VerificationError
from fxcompress.graph import output_node
from fxcompress.reference_bilinear import weight_sums
from fxcompress.reference_kernels import linear_resize_tables
from tests.support.integer_graphs import codes, int32, integer_graph, ops, weights


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def run_node(self, node):
        result = super().run_node(node)
        self.values = getattr(self, "values", {}) | {node: result}
        return result


def violations(gm, *inputs):
    """Names of nodes whose value leaves its interval."""
    recorder = Recorder(gm)
    recorder.run(*inputs)
    found = []
    for node, interval in tensor_intervals(gm).items():
        value = recorder.values[node].long()
        if bool((value < interval.lo).any() or (value > interval.hi).any()):
            found.append(node.name)
    return found


def result_interval(gm):
    return tensor_intervals(gm)[output_node(gm).args[0][0]]


def per_channel_codes(m, x):
    """Codes of an int32 input, clipped to m.lo..m.hi per channel."""
    return ops.requantize.default([x], [m.m], [m.p], [0], m.zero, 6, m.lo, m.hi)


BOUNDS = {
    "m": int32(1 << 14), "p": int32(0), "zero": int32(128),
    "lo": int32(0, 100, 128, 7).reshape(4, 1, 1), "hi": int32(255, 200, 128, 250).reshape(4, 1, 1),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- soundness

TABLES = [list(t) for t in zip(*[linear_resize_tables(6, 9, False, None, 6)] * 2, strict=True)]
MULTIPLIERS = {"b": torch.tensor([1 << 30, -(1 << 30), 0, (1 << 31) - 1]).reshape(4, 1, 1), "c": torch.tensor(30)}


def block_constants(algorithm, weight):
    """Programs and sums of blocks of a weight (O, K)."""
    programs = {name: s.tensor for name, s in zip(("encode_a", "encode_b", "decode"), algorithm.schedules, strict=True)}
    sums = weight_sums(weight, algorithm.schedules[0], algorithm.size).to(torch.int16)
    return {"z": int32(100), "w": sums, **programs}


BILINEAR = block_constants(WINOGRAD, weights(5, 4))
PRUNED = block_constants(WINOGRAD.without([3]), weights(5, 4))


def layer_in_blocks(m, q, axis):
    return ops.bilinear_linear.default(q, m.z, m.w, m.b, m.encode_b, m.decode, [2, 2, 2], axis)


def matmul_in_blocks(m, q, algorithm):
    swapped = torch.ops.aten.permute.default(q, [0, 1, 3, 2])
    return ops.bilinear_matmul.default(
        q, m.z, swapped, m.z, m.encode_a, m.encode_b, m.decode, [2, 2, 2], algorithm.products
    )


#: Operators behind per-channel codes of shape (N, 4, 6, 6), with their constants.
CONSUMERS = {
    "conv": (lambda m, q: ops.conv.default(q, m.w, m.b, [1, 2], [1, 0, 2, 1], [2, 1], 2, m.pad),
             {"w": weights(6, 2, 3, 3), "b": int32(*range(6)), "pad": int32(128, 0, 255, 9)}),
    "linear": (lambda m, q: ops.linear.default(q, m.w, None), {"w": weights(5, 6)}),
    "linear_last": (lambda m, q: ops.linear.default(torch.ops.aten.permute.default(q, [0, 2, 3, 1]), m.w, m.b),
                    {"w": weights(5, 4), "b": int32(*range(5))}),
    "conv_transpose": (lambda m, q: ops.conv_transpose.default(q, m.z, m.w, m.b, [2, 3], [1, 0, 2, 1], [1, 0], [1, 2], 2),
                       {"w": weights(4, 3, 3, 2), "b": int32(*range(6)), "z": int32(1, 100, 128, 99).reshape(4, 1, 1)}),
    "matmul": (lambda m, q: ops.matmul.default(q, m.z, torch.ops.aten.permute.default(q, [0, 1, 3, 2]), m.z), {"z": int32(128)}),
    "mul": (lambda m, q: ops.mul.default(q, m.z, m.gate, m.zero), {"z": int32(100), "gate": codes(4, 1, 1)}),
    "bilinear_linear": (lambda m, q: layer_in_blocks(m, q, 1), BILINEAR | {"b": int32(*range(5))}),
    "bilinear_linear_pruned": (lambda m, q: layer_in_blocks(m, q, 1), PRUNED | {"b": int32(*range(5)), "z": int32(1, 100, 128, 99)}),
    "bilinear_matmul": (lambda m, q: matmul_in_blocks(m, q, WINOGRAD), BILINEAR),
    "bilinear_matmul_pruned": (lambda m, q: matmul_in_blocks(m, q, WINOGRAD.without([3])), PRUNED),
    "sum_pool": (lambda m, q: ops.sum_pool.default(q, m.z, [3, 2], [2, 3], [1, 1, 0, 1]), {"z": int32(250)}),
    "adaptive": (lambda m, q: ops.adaptive_sum_pool.default(q, m.z, [4, 3]), {"z": int32(3)}),
    "sum": (lambda m, q: ops.sum.default(q, m.z, [1, 2], False), {"z": int32(100)}),
    "max_pool": (lambda m, q: ops.widen.default(ops.max_pool.default(q, [3, 3], [2, 2], [1, 1, 1, 1], [1, 1]), m.z),
                 {"z": int32(1, 2, 3, 4).reshape(4, 1, 1)}),
    "adaptive_max_pool": (lambda m, q: ops.widen.default(ops.adaptive_max_pool.default(q, [2, 2]), m.zero), {}),
    "pad": (lambda m, q: ops.widen.default(ops.pad.default(q, [1, 0, 0, 2], m.v), m.zero), {"v": int32(9, 8, 7, 6)}),
    "resize": (lambda m, q: ops.resize.default(q, m.z, [m.i0, m.j0], [m.i1, m.j1], [m.iw, m.jw], 6),
               {"z": int32(128), **{n: t for k, pair in zip(("0", "1", "w"), TABLES, strict=True)
                                    for n, t in zip((f"i{k}", f"j{k}"), pair, strict=True)}}),
    "table": (lambda m, q: ops.table.default(q, m.lut), {"lut": codes(4, 256, lo=-999, hi=999, dtype=torch.int32)}),
    "rescale": (lambda m, q: ops.rescale.default([ops.widen.default(q, m.z)] * 2, [m.b, m.b], [m.c, m.c]), {"z": int32(100), **MULTIPLIERS}),
    "clamp": (lambda m, q: ops.clamp.default(ops.widen.default(q, m.zero), m.low, m.high),
              {"low": int32(-10, 0, 5, -99).reshape(4, 1, 1), "high": int32(20)}),
    "movement": (lambda m, q: torch.ops.aten.reshape.default(
        torch.ops.aten.slice.Tensor(torch.ops.aten.permute.default(ops.widen.default(q, m.zero), [0, 2, 3, 1]), 3, 1, 3), [-1, 6, 12]), {}),
    "cat": (lambda m, q: torch.ops.aten.cat.default([ops.widen.default(q, m.zero), ops.widen.default(q, m.z)], 1), {"z": int32(9)}),
    "index_select": (lambda m, q: torch.ops.aten.index_select.default(ops.widen.default(q, m.zero), 1, m.i), {"i": torch.tensor([2, 0])}),
    "select_of_batch_rows": (lambda m, q: torch.ops.aten.reshape.default(ops.widen.default(q, m.zero), [-1, 6]), {}),
}  # fmt: skip


def consumer_graph(name):
    function, constants = CONSUMERS[name]
    example = torch.zeros(3, 4, 6, 6, dtype=torch.int32)
    return integer_graph(lambda m, x: function(m, per_channel_codes(m, x)), BOUNDS | constants, example)


@pytest.mark.parametrize("name", CONSUMERS)
def test_no_input_leaves_its_interval(name):
    gm = consumer_graph(name)
    extremes = torch.where(torch.rand(3, 4, 6, 6) < 0.5, -(1 << 24), 1 << 24).to(torch.int32)
    randoms = codes(3, 4, 6, 6, lo=-20000, hi=20000, dtype=torch.int32)
    for x in (extremes, randoms, extremes.clamp(min=0), torch.full_like(extremes, 1 << 24)):
        assert violations(gm, x) == []


def test_every_operator_has_an_interval_rule():
    from fxcompress.analysis.intervals import _RULES
    from fxcompress.integer_ops import INTEGER_LEVEL

    assert _RULES.keys() == INTEGER_LEVEL - {ops.dequantize.default}  # whose result is float


# ------------------------------------------------------------------------------------------------------- tightness


def exact_extremes(function, shape, lo, hi):
    """Smallest and largest value of each output of an affine integer function over codes in lo..hi: from its impulses."""
    base = torch.zeros(1, *shape, dtype=torch.uint8)
    constant = function(base).long()
    impulses = torch.eye(base.numel(), dtype=torch.uint8).reshape(-1, *shape)
    coefficients = function(impulses).long() - constant
    lo, hi = (t.expand(shape).flatten().reshape(-1, *[1] * (constant.ndim - 1)) for t in (lo, hi))
    ends = coefficients * lo, coefficients * hi
    return constant[0] + torch.minimum(*ends).sum(0), constant[0] + torch.maximum(*ends).sum(0)


def channel_extremes(lo, hi, axis):
    dims = [d for d in range(lo.ndim) if d != axis]
    return (lo.amin(dims), hi.amax(dims)) if dims else (lo, hi)


#: Affine operators of codes (N, 4, 5, 5) whose interval must be reached: result axis behind the batch, then as above.
TIGHT = {
    "conv": (0, lambda m, q: ops.conv.default(q, m.w, m.b, [1, 2], [0] * 4, [1, 2], 2, m.zero), {"w": weights(6, 2, 3, 2), "b": int32(*range(6))}),
    "depthwise": (0, lambda m, q: ops.conv.default(q, m.w, None, [1, 1], [0] * 4, [1, 1], 4, m.zero), {"w": weights(8, 1, 3, 3)}),
    "linear": (2, lambda m, q: ops.linear.default(q, m.w, m.b), {"w": weights(6, 5), "b": int32(*range(6))}),
    "conv_transpose": (0, lambda m, q: ops.conv_transpose.default(q, m.z, m.w, m.b, [2, 2], [0] * 4, [0, 0], [1, 1], 2),
                       {"w": weights(4, 3, 3, 3), "b": int32(*range(6)), "z": int32(128)}),
    "bilinear_linear": (0, lambda m, q: layer_in_blocks(m, q, 1), BILINEAR | {"b": int32(*range(5))}),
    "sum_pool": (0, lambda m, q: ops.sum_pool.default(q, m.z, [3, 3], [2, 2], [1] * 4), {"z": int32(128)}),
    "adaptive": (0, lambda m, q: ops.adaptive_sum_pool.default(q, m.z, [3, 2]), {"z": int32(128)}),
    "sum": (0, lambda m, q: ops.sum.default(q, m.z, [2, 3], False), {"z": int32(3)}),
    "widen": (0, lambda m, q: ops.widen.default(q, m.z), {"z": int32(3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", TIGHT)
@pytest.mark.parametrize("per_channel", [False, True])
def test_intervals_are_reached(name, per_channel):
    axis, function, constants = TIGHT[name]
    bounds = dict(BOUNDS) if per_channel else {**BOUNDS, "lo": int32(5), "hi": int32(251)}
    if name in ("conv_transpose", "sum_pool"):  # a border window misses elements, as if they were zero
        bounds["lo"], bounds["hi"] = bounds["lo"].clamp(max=128), bounds["hi"].clamp(min=128)
    example = torch.zeros(2, 4, 5, 5, dtype=torch.int32)
    gm = integer_graph(lambda m, x: function(m, per_channel_codes(m, x)), bounds | constants, example)
    buffers = type("Buffers", (), {k: v for k, v in (bounds | constants).items()})
    exact = exact_extremes(lambda q: function(buffers, q), (4, 5, 5), bounds["lo"], bounds["hi"])
    lo, hi = channel_extremes(*exact, axis)
    got = result_interval(gm)
    assert torch.equal(got.lo.flatten().expand_as(lo), lo) and torch.equal(got.hi.flatten().expand_as(hi), hi)


def test_a_table_counts_only_the_entries_its_codes_reach():
    lut = torch.arange(256, dtype=torch.int32) * 10
    gm = integer_graph(lambda m, x: ops.table.default(per_channel_codes(m, x), m.lut), BOUNDS | {"lut": lut},
                       torch.zeros(2, 4, 3, 3, dtype=torch.int32))  # fmt: skip
    interval = result_interval(gm)
    assert interval.lo.flatten().tolist() == [0, 1000, 1280, 70]
    assert interval.hi.flatten().tolist() == [2550, 2000, 1280, 2500]


def test_padding_widens_the_interval_only_when_there_is_padding():
    def bounds(padding):
        def function(m, x):
            return ops.conv.default(per_channel_codes(m, x), m.w, None, [1, 1], padding, [1, 1], 1, m.pad)

        constants = BOUNDS | {
            "lo": int32(10),
            "hi": int32(20),
            "w": torch.ones(1, 4, 1, 1, dtype=torch.int8),
            "pad": int32(30),
        }
        return result_interval(integer_graph(function, constants, torch.zeros(2, 4, 3, 3, dtype=torch.int32))).bounds

    assert bounds([0, 0, 0, 0]) == (40, 80)
    assert bounds([1, 1, 1, 1]) == (40, 120)


# ------------------------------------------------------------------------------------------------------ arithmetic


@given(st.integers(-(1 << 40), 1 << 40), st.integers(-(1 << 40), 1 << 40))
def test_bits_needed_is_minimal(a, b):
    lo, hi = min(a, b), max(a, b)
    n = bits_needed(lo, hi)
    assert -(1 << (n - 1)) <= lo and hi < 1 << (n - 1)
    assert n == 1 or lo < -(1 << (n - 2)) or hi >= 1 << (n - 2)


def test_products_and_sums_saturate_instead_of_wrapping():
    wide = exactly(-(1 << 40), 1 << 40)
    assert product(wide, wide).bounds == (-LIMIT, LIMIT)
    assert repeated(wide, 0, 1 << 30).bounds == (-LIMIT, LIMIT)
    narrow = exactly(-3, 5)
    assert product(narrow, exactly(-7, 2)).bounds == (-35, 21)
    assert repeated(narrow, 2, 4).bounds == (-12, 20)
    huge = torch.full((2, 3, 4), 1 << 30, dtype=torch.int32)
    assert dot(huge, 1, wide.map(lambda t: t.reshape(1))).bounds == (-LIMIT, LIMIT)


def test_an_interval_beyond_int32_is_returned_and_clipped_for_its_readers():
    def function(m, x):
        return ops.mul.default(ops.mul.default(x, m.zero, x, m.zero), m.zero, m.one, m.zero)

    gm = integer_graph(function, {"zero": int32(0), "one": int32(1)}, torch.zeros(2, 3, dtype=torch.int32))
    first, second = accumulator_intervals(gm).values()
    assert first.bits == 64 and second.bounds == (-(1 << 31), (1 << 31) - 1)


def test_accumulator_intervals_lists_the_int32_results_only():
    gm = consumer_graph("conv")
    assert [n.target for n in accumulator_intervals(gm)] == [ops.conv.default]
    assert ops.requantize.default in [n.target for n in tensor_intervals(gm)]


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_sum_over_the_batch_is_refused():
    gm = integer_graph(lambda m, x: ops.sum.default(x, m.z, [0], False), {"z": int32(0)}, codes(2, 3))
    with pytest.raises(AccumulatorError, match="over the batch"):
        accumulator_intervals(gm)


def test_weights_computed_at_run_time_are_refused():
    gm = integer_graph(lambda m, x, y: ops.linear.default(x, y, None), {}, codes(2, 3), weights(4, 3))
    with pytest.raises(VerificationError, match="computed at run time"):
        accumulator_intervals(gm)


def test_interpolation_weights_must_be_fractions():
    gm = integer_graph(
        lambda m, x: ops.resize.default(x, m.z, [m.i], [m.i], [m.w], 4),
        {"z": int32(0), "i": torch.tensor([0, 1]), "w": int32(0, 17)},
        codes(2, 3),
    )
    with pytest.raises(VerificationError, match="not fractions"):
        accumulator_intervals(gm)


def test_an_operator_outside_the_dialect_may_return_whatever_its_dtype_holds():
    gm = integer_graph(lambda m, x: torch.ops.aten.bitwise_not.default(x), {}, codes(2, 3))
    assert result_interval(gm).bounds == (0, 255)


def test_the_docstring_examples_hold():
    assert doctest.testmod(interval_arithmetic).failed == 0
