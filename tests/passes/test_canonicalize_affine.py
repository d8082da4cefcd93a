"""Every constant scale and shift along dimension 1 becomes one batch norm; everything else is refused with its reason."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.graph import calls
from fxcompress.meta import Origin, describe, tensor_meta
from fxcompress.passes.canonicalize_affine import CanonicalizeAffine
from fxcompress.passes.fold_batch_norm import FoldBatchNorm
from fxcompress.shapes import propagate
from tests.support.float_graphs import FloatGraph, aten, batch_norms, outputs

ADD, SUB, MUL = aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor


def canonicalize(gm):
    plan = CanonicalizeAffine().plan(gm)
    CanonicalizeAffine().apply(plan)
    propagate(gm)
    gm.graph.lint()
    gm.recompile()
    return plan


def targets(gm):
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


SHAPES = {
    2: [(), (3,), (1, 3)],
    3: [(3, 1), (1, 3, 1)],
    4: [(1,), (3, 1, 1), (1, 3, 1, 1)],
    5: [(3, 1, 1, 1), (1, 1, 1, 1, 1)],
}


@pytest.mark.parametrize(("rank", "shape"), [(rank, shape) for rank, shapes in SHAPES.items() for shape in shapes])
@pytest.mark.parametrize("target", [ADD, SUB, MUL])
@pytest.mark.parametrize("constant_first", [False, True])
def test_a_constant_along_the_channels_becomes_batch_norm(rank, shape, target, constant_first):
    g = FloatGraph()
    x, c = g.input(2, 3, *[4] * (rank - 2)), g.constant(g.normal(*shape))
    node = g.call(target, *((c, x) if constant_first else (x, c)))
    describe(node, origin=Origin("block.scale"))
    gm, inputs = g.finish(node)
    expected = outputs(gm, inputs)
    assert len(canonicalize(gm)) == 1
    assert targets(gm) == [aten.batch_norm.default]
    (bn,) = calls(gm, aten.batch_norm.default)
    assert tensor_meta(bn).origin.module == "block.scale" and tensor_meta(bn).statistics is None
    torch.testing.assert_close(outputs(gm, inputs), expected, rtol=1e-14, atol=1e-14)
    assert not CanonicalizeAffine().plan(gm).matches


def test_a_python_number_becomes_batch_norm():
    g = FloatGraph(dtype=torch.float32)
    gm, inputs = g.finish(g.call(SUB, 1.0, g.input(2, 3, 4, 4)))
    expected = outputs(gm, inputs)
    canonicalize(gm)
    assert targets(gm) == [aten.batch_norm.default]
    torch.testing.assert_close(outputs(gm, inputs), expected)


def test_a_chain_merges_into_one():
    g = FloatGraph()
    y = g.input(2, 3, 4, 4)
    for target in (MUL, ADD, SUB, MUL):
        y = g.call(target, y, g.constant(g.normal(3, 1, 1)))
    gm, inputs = g.finish(y)
    expected = outputs(gm, inputs)
    assert canonicalize(gm).applied == 4
    assert targets(gm) == [aten.batch_norm.default]
    torch.testing.assert_close(outputs(gm, inputs), expected, rtol=1e-13, atol=1e-13)
    assert len(list(gm.buffers())) == 4  # weight, bias, mean, var: intermediate constants are gone


def test_an_affine_that_others_read_is_not_merged_away():
    g = FloatGraph()
    inner = g.call(MUL, g.input(2, 3, 4, 4), 2.0)
    gm, inputs = g.finish(g.call(ADD, inner, 1.0), g.relu(inner))
    expected = outputs(gm, inputs)
    canonicalize(gm)
    first, second = calls(gm, aten.batch_norm.default)
    assert second.args[0] is first
    torch.testing.assert_close(outputs(gm, inputs), expected)


def test_a_trained_batch_norm_is_not_merged_here():
    g = FloatGraph()
    gm, _ = g.finish(g.call(MUL, g.batch_norm(g.input(2, 3, 4, 4)), 2.0))
    canonicalize(gm)
    assert batch_norms(gm) == 2  # the fold composes them and moves the statistics


REFUSED = {
    "a map per position": (lambda g: g.call(MUL, g.input(2, 3, 4, 4), g.constant(g.normal(1, 1, 4, 4))), r"\(1, 1, 4, 4\) varies"),
    "along the width": (lambda g: g.call(ADD, g.input(2, 3, 4, 4), g.constant(g.normal(4))), r"\(4,\) varies"),
    "channels last": (lambda g: g.call(MUL, g.linear(g.input(2, 5, 3), 4), g.constant(g.normal(4))), "channel axis of its tensor is 2"),
    "no channels": (lambda g: g.call(MUL, g.input(6), 2.0), "channel axis of its tensor is None"),
    "enlarging": (lambda g: g.call(MUL, g.input(2, 1, 4, 4), g.constant(g.normal(3, 1, 1))), "enlarges"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    build, reason = REFUSED[name]
    g = FloatGraph()
    gm, _ = g.finish(build(g))
    code = str(gm.graph)
    plan = canonicalize(gm)
    assert not plan.matches and len(plan.rejects) == 1
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(plan.rejects[0].reason)
    assert str(gm.graph) == code


def test_operators_on_two_activations_and_kept_floats_are_not_looked_at():
    g = FloatGraph()
    x = g.input(2, 3, 4, 4)
    kept = g.call(MUL, g.add(x, g.relu(x)), 2.0)
    kept.meta["keep_float"] = True
    gm, _ = g.finish(kept)
    plan = CanonicalizeAffine().plan(gm)
    assert not plan.matches and not plan.rejects


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["mul", "add", "rsub", "bn", "relu", "conv"]), min_size=1, max_size=8),
    seed=st.integers(0, 999),
)
def test_canonicalizing_and_folding_settle_and_keep_the_function(steps, seed):
    g = FloatGraph(seed)
    y = g.input(2, 3, 4, 4)
    for step in steps:
        if step == "mul":
            y = g.call(MUL, y, g.constant(g.normal(1, 3, 1, 1)))
        elif step == "add":
            y = g.add(y, 0.25)
        elif step == "rsub":
            y = g.call(SUB, g.constant(g.normal(3, 1, 1)), y)
        elif step == "bn":
            y = g.batch_norm(y)
        elif step == "relu":
            y = g.relu(y)
        else:
            y = g.conv(y, 3, 3, padding=1)
    gm, inputs = g.finish(y)
    expected = outputs(gm, inputs)
    canonicalize(gm)
    for _ in range(10):
        plan = FoldBatchNorm().plan(gm)
        FoldBatchNorm().apply(plan)
        propagate(gm)
        assert not CanonicalizeAffine().plan(gm).matches
        if not plan.matches:
            break
    gm.recompile()
    assert not plan.matches
    torch.testing.assert_close(outputs(gm, inputs), expected, rtol=1e-9, atol=1e-9)
