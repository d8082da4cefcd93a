"""The contracts of integer operators: each refusal fires on a graph whose kernel would read what is not its own."""

import pytest
import torch

from fxcompress.contracts import _RULES, check_contracts
from fxcompress.errors import VerificationError
from fxcompress.integer_ops import INTEGER_OPS
from fxcompress.verify import verify
from tests.support import native_cases as cases
from tests.support.integer_graphs import codes, int32, integer_graph, ops, weights

X, ZERO = codes(2, 4, 6, 6), int32(3)
CONV = {"w": weights(8, 4, 3, 3), "b": torch.zeros(8, dtype=torch.int32), "z": ZERO}
UP = {"w": weights(4, 8, 2, 2), "b": None, "z": ZERO}
INDEX = torch.arange(6, dtype=torch.int32)


def conv(m, x, stride=(1, 1), padding=(0, 0, 0, 0), groups=1):
    return ops.conv.default(x, m.w, m.b, list(stride), list(padding), [1, 1], groups, m.z)


def pool(m, x):
    return ops.sum_pool.default(x, m.z, [2, 2], [2, 2], [0, 0, 0, 0])


def resize(m, x):
    return ops.resize.default(x, m.z, [m.i], [m.i], [m.f], 4)


def table(m, x):
    return ops.table.default(x, m.t)


def requantize(m, x):
    return ops.requantize.default([ops.widen.default(x, m.z)], [m.m], [m.p], [0], m.z, 6, m.z, m.h)


def requantize_with_constant(m, x):
    branches = [ops.widen.default(x, m.z), m.c], [m.one, m.m], [m.p, m.p], [0, 0]
    return ops.requantize.default(*branches, m.z, 6, m.z, m.h)


CHANNELS = {"z": ZERO, "h": int32(255), "c": int32(*range(6)), "one": int32(1 << 14)}


def graph(function, constants, x=X):
    return integer_graph(function, {k: v for k, v in constants.items() if v is not None}, x)


#: (graph that is right, constant to replace, by what, message)
SWAPPED = [
    (lambda: graph(conv, CONV), "b", int32(*range(7)), r"bias has shape \(7,\); expected \(8,\)"),
    (lambda: graph(conv, CONV), "w", weights(8, 3, 3, 3), "x has 4 channels; expected 3"),
    (lambda: graph(conv, CONV), "w", weights(8, 4, 3, 3).int(), "weight is torch.int32"),
    (lambda: graph(conv, CONV), "z", int32(1, 2, 3), "pad_value has 3 entries; expected 1 or 4"),
    (lambda: graph(conv, CONV), "z", int32(300), r"pad_value spans 300..300; expected 0..255"),
    (lambda: graph(pool, {"z": ZERO}), "z", int32(1, 2), "zero_point has 2 entries; expected 1 or 4"),
    (lambda: graph(resize, {"z": ZERO, "i": INDEX, "f": INDEX * 2}), "i", INDEX + 1, r"index0 spans 1..6; expected 0..5"),
    (lambda: graph(resize, {"z": ZERO, "i": INDEX, "f": INDEX * 2}), "f", INDEX[:4], "tables of different sizes"),
    (lambda: graph(table, {"t": codes(256)}), "t", codes(255), r"lut has shape \(255,\); expected \(256,\) or \(4, 256\)"),
    (lambda: graph(table, {"t": codes(256)}), "t", codes(3, 256), r"lut has shape \(3, 256\)"),
    (
        lambda: graph(requantize, {"z": ZERO, "m": int32(1 << 14), "p": int32(3), "h": int32(255)}), "m",
        torch.full((5, 1, 1), 1 << 14, dtype=torch.int32), r"multiplier has shape \(5, 1, 1\); expected one that broadcasts",
    ),
    (
        lambda: graph(requantize_with_constant, CHANNELS | {"m": int32(1 << 14), "p": int32(3)}), "m",
        torch.full((1, 6), 1 << 14, dtype=torch.int32), "multiplier has 2 dimensions; expected at most the 1 of its branch",
    ),
    (
        lambda: graph(lambda m, x: torch.ops.aten.index_select.default(x, 1, m.i), {"i": INDEX[:4]}), "i",
        int32(0, 4), r"index spans 0..4; expected 0..3",
    ),
    (
        lambda: graph(lambda m, x: torch.ops.aten.index_select.default(x, 1, m.i), {"i": INDEX[:4]}), "i",
        INDEX[None, :4], r"index has shape \(1, 4\); expected one dimension",
    ),
    (
        lambda: graph(lambda m, x: ops.dequantize.default(x, m.s, m.z), {"s": torch.ones((), dtype=torch.float64), "z": ZERO}), "s",
        torch.tensor(float("nan"), dtype=torch.float64), "a scale is not positive and finite",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("build", "name", "value", "message"), SWAPPED)
def test_constants_that_do_not_fit_are_refused(build, name, value, message):
    gm = build()
    check_contracts(gm)
    setattr(gm, name, value)
    with pytest.raises(VerificationError, match=f"contracts: .*{message}"):
        check_contracts(gm)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (3, [0, 1], r"stride is \[0, 1\]; expected at least 1"),
        (4, [0, -1, 0, 0], r"padding is .*; expected at least 0"),
        (4, [0, 0], r"padding is \[0, 0\]; expected 4 entries"),
        (5, [1], "dilation is .*; expected 2 entries"),
        (6, 3, "3 groups; expected a divisor of 8"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(argument, value, message):
    gm = graph(conv, CONV)
    node = next(n for n in gm.graph.nodes if n.target is ops.conv.default)
    node.update_arg(argument, value)
    with pytest.raises(VerificationError, match=f"contracts: .*{message}"):
        check_contracts(gm)


def test_parameters_computed_at_run_time_are_refused():
    gm = graph(conv, CONV)
    node = next(n for n in gm.graph.nodes if n.target is ops.conv.default)
    with gm.graph.inserting_before(node):
        computed = gm.graph.call_function(torch.ops.aten.clone.default, (node.args[2],))
    computed.meta["val"] = torch.empty(8, dtype=torch.int32)
    node.update_arg(2, computed)
    with pytest.raises(VerificationError, match="bias is computed at run time; expected a constant"):
        check_contracts(gm)


def test_codes_are_uint8():
    gm = graph(pool, {"z": ZERO})
    next(n for n in gm.graph.nodes if n.op == "placeholder").meta["val"] = torch.empty(2, 4, 6, 6, dtype=torch.int64)
    with pytest.raises(VerificationError, match=r"x is torch.int64; expected uint8 codes"):
        check_contracts(gm)


def test_the_table_of_an_embedding_is_codes():
    check_contracts(
        integer_graph(lambda m, i: ops.embedding.default(m.w, i), {"w": codes(5, 3)}, torch.tensor([[1, 4]] * 2))
    )


def test_verify_checks_contracts():
    gm = graph(table, {"t": codes(256)})
    gm.t = codes(16)
    with pytest.raises(VerificationError, match="contracts"):
        verify(gm)


def test_rules_belong_to_operators():
    assert _RULES.keys() <= INTEGER_OPS.keys()


@pytest.mark.parametrize(
    "strategy",
    ["conv", "linear", "matmul", "softmax", "layer_norm", "elementwise", "gate", "pooling", "resize", "selection"],
)
def test_what_the_kernels_are_tested_on_is_legal(strategy):
    from hypothesis import given

    @given(getattr(cases, f"{strategy}_cases")())
    def check(case):
        check_contracts(case.graph)

    check()
