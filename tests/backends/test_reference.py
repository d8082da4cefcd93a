"""The reference backend runs the integer graph itself; an unknown backend is refused with the nearest name."""

import copy
import math

import pytest
import torch

from fxcompress import numerics
from fxcompress.backends import BACKENDS, Backend, Program, get_backend
from fxcompress.errors import OptionError, UnsupportedOperatorError
from fxcompress.graph import calls
from fxcompress.integer_ops import INTEGER_LEVEL
from tests.support.integer_graphs import codes, int32, integer_graph, node_named, ops, weights

aten = torch.ops.aten


def forward(m, x):
    """Codes in, accumulators and codes out."""
    acc = ops.linear.default(x, m.w, m.b)
    return acc, ops.requantize.default([acc], [m.m], [m.p], [0], m.z, 6, m.z, m.hi)


@pytest.fixture
def gm():
    form = numerics.dyadic(torch.tensor(0.01, dtype=torch.float64), 6)
    constants = {
        "w": weights(4, 6),
        "b": int32(1, 2, 3, 4),
        "m": form.multiplier,
        "p": form.right_shift,
        "z": int32(9),
        "hi": int32(200),
    }
    return integer_graph(forward, constants, codes(3, 6))


def test_it_computes_what_the_operators_mean(gm):
    x = codes(5, 6)
    acc, y = get_backend("reference").lower(gm).run(x)
    expected = [[sum(int(w) * int(v) for w, v in zip(row, values, strict=True)) + int(b) for row, b in zip(gm.w, gm.b, strict=True)]
                for values in x]  # fmt: skip
    assert acc.tolist() == expected
    rounded = [[min(200, max(9, math.floor(v * 0.01 + 0.5) + 9)) for v in row] for row in expected]
    assert (y.int() - torch.tensor(rounded)).abs().max() <= 1


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_any_batch(gm, batch):
    program = get_backend("reference").lower(gm)
    x = codes(batch, 6)
    for whole, *rows in zip(program.run(x), *(program.run(x[i : i + 1]) for i in range(batch)), strict=True):
        assert whole.shape[0] == batch
        assert torch.equal(whole, torch.cat([whole[:0], *rows]))


def test_several_inputs_in_the_order_of_the_placeholders():
    gm = integer_graph(
        lambda m, x, y: ops.matmul.default(x, m.z, y, m.z), {"z": int32(3)}, codes(2, 3, 4), codes(2, 4, 5)
    )
    a, b = codes(2, 3, 4), codes(2, 4, 5)
    (y,) = get_backend("reference").lower(gm).run(a, b)
    assert torch.equal(y.long(), (a.long() - 3) @ (b.long() - 3))


def test_the_program_outlives_edits_of_the_graph(gm):
    x = codes(2, 6)
    program = get_backend("reference").lower(gm)
    before = program.run(x)
    requantize = next(calls(gm, ops.requantize.default))
    requantize.update_arg(5, 3)
    gm.w = torch.zeros_like(gm.w)
    gm.recompile()
    assert all(torch.equal(a, b) for a, b in zip(program.run(x), before, strict=True))


def test_the_graph_is_left_alone(gm):
    before = gm.print_readable(print_output=False)
    weights_before = copy.deepcopy(gm.state_dict())
    get_backend("reference").lower(gm).run(codes(2, 6))
    assert gm.print_readable(print_output=False) == before
    assert all(torch.equal(v, weights_before[k]) for k, v in gm.state_dict().items())


def test_every_operator_of_the_dialect_is_supported(gm):
    node = next(calls(gm, ops.linear.default))
    for target in INTEGER_LEVEL:
        node.target = target
        assert get_backend("reference").supports(node) is None


def test_foreign_operators_are_refused_by_name_unless_kept_in_float(gm):
    linear = next(calls(gm, ops.linear.default))
    with gm.graph.inserting_after(linear):
        foreign = gm.graph.call_function(aten.neg.default, (linear,))
    reference = get_backend("reference")
    assert reference.supports(foreign) == "aten.neg.default is not in the integer dialect"
    with pytest.raises(UnsupportedOperatorError, match=r"reference backend: neg_default: aten\.neg\.default is not in"):
        reference.lower(gm)
    foreign.meta["keep_float"] = True
    assert reference.supports(foreign) is None
    assert len(reference.lower(gm).run(codes(2, 6))) == 2


def test_calls_of_modules_are_refused(gm):
    gm.add_submodule("act", torch.nn.ReLU())
    with gm.graph.inserting_after(node_named(gm, "x")):
        call = gm.graph.call_module("act", (node_named(gm, "x"),))
    assert get_backend("reference").supports(call) == "call_module act is not an operator call"


def test_backends_and_programs_follow_the_protocol(gm):
    for name, backend in BACKENDS.items():
        assert isinstance(backend, Backend) and backend.name == name
    assert isinstance(get_backend("reference").lower(gm), Program)


def test_an_unknown_backend_is_refused_with_the_nearest_name():
    with pytest.raises(OptionError, match=r"unknown backend 'referense'\. Did you mean 'reference'\?"):
        get_backend("referense")
