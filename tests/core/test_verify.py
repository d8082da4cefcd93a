"""The verifier: a clean graph gets its certificate, each planted fault is refused by name."""

import json
import operator
from dataclasses import replace

import pytest
import torch

from fxcompress import integer_ops, numerics
from fxcompress.bilinear import STRASSEN
from fxcompress.errors import AccumulatorError, InputError, UserError, VerificationError
from fxcompress.graph import calls
from fxcompress.meta import Origin, describe
from fxcompress.options import Context
from fxcompress.verify import verify
from tests.support.integer_graphs import int32, integer_graph, node_named, ops, weights

aten = torch.ops.aten


def constants():
    forms = numerics.dyadic(torch.tensor([0.002, -0.003, 0.001, 0.004], dtype=torch.float64), 6)
    return {
        "scale": torch.tensor(0.02, dtype=torch.float64), "zero": int32(100), "none": int32(0), "lo": int32(0), "hi": int32(255),
        "w": weights(4, 3, 3, 3), "b": int32(1, -2, 3, -4), "fc": weights(5, 4), "out": torch.tensor(0.3, dtype=torch.float64),
        "m": forms.multiplier.reshape(4, 1, 1), "p": forms.right_shift.reshape(4, 1, 1),
    }  # fmt: skip


@pytest.fixture
def gm():
    """quantize, conv with ReLU in its bounds, sum of the pixels, requantize, linear, dequantize."""
    c = constants()
    flat = {"m1": c["m"].flatten(), "p1": c["p"].flatten()}

    def forward(m, x):
        q = ops.quantize.default(x, m.scale, m.zero, 0, 255)
        acc = ops.conv.default(q, m.w, m.b, [1, 1], [1, 1, 1, 1], [1, 1], 1, m.zero)
        codes = ops.requantize.default([acc], [m.m], [m.p], [0], m.zero, 6, m.zero, m.hi)
        pooled = ops.sum.default(codes, m.zero, [2, 3], False)
        features = ops.requantize.default([pooled], [m.m1], [m.p1], [0], m.lo, 6, m.lo, m.hi)
        return ops.dequantize.default(ops.linear.default(features, m.fc, None), m.out, m.none)

    graph = integer_graph(forward, c | flat, torch.randn(2, 3, 6, 6))
    describe(node_named(graph, "conv_default"), origin=Origin("features.conv", "model.py:7"))
    return graph


def refuses(gm, *fragments, error=VerificationError, **options):
    gm.recompile()
    with pytest.raises(error) as caught:
        verify(gm, **options)
    for fragment in fragments:
        assert fragment in str(caught.value)
    return caught.value


def only(gm, op):
    return next(calls(gm, op.default))


def insert_after(gm, node, target, *args):
    """``target(node, *args)`` between a node and its readers."""
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(target, (node, *args))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


# ---------------------------------------------------------------------------------------------------- certificates


def test_a_clean_graph_gets_its_certificate(gm):
    certificate = verify(gm)
    assert certificate.integer_only and certificate.exceptions == ()
    assert certificate.nodes == 7 and certificate.operators["requantize"] == 2
    assert certificate.accumulators.keys() == {"conv_default", "sum_default", "linear_default"}
    sum_of_pixels = 36 * 155  # codes 100..255 minus the zero point 100
    assert certificate.accumulators["sum_default"] == sum_of_pixels.bit_length() + 1
    assert certificate.constants == sum(b.nbytes for b in gm.buffers())
    assert json.loads(json.dumps(certificate.to_dict()))["integer_only"] is True


def test_the_certificate_reads_as_a_paragraph(gm):
    text = str(verify(gm))
    assert text.startswith("Integer-only: 7 operators (2 requantize, ") and "\n" not in text
    assert "No floating-point value exists between quantize and dequantize" in text
    assert "none of the 3 int32 tensors can overflow" in text
    assert str(replace(verify(gm), accumulators={})).endswith("dequantize.")


@pytest.mark.parametrize("inputs", [None, (torch.randn(1, 3, 6, 6),), (torch.zeros(0, 3, 6, 6),)])
def test_any_inputs_may_drive_the_run(gm, inputs):
    assert verify(gm, inputs).integer_only


def test_inputs_of_the_compilation_are_used(gm):
    gm.meta["fxcompress"] = Context(example_inputs=(torch.full((2, 3, 6, 6), float("nan")),))
    with pytest.raises(ValueError, match="NaN"):
        verify(gm)


@pytest.mark.parametrize("inputs", [(), (torch.zeros(2, 3, 6, 6, dtype=torch.uint8),), (torch.zeros(2, 3, 6, 6),) * 2])
def test_inputs_that_do_not_fit_the_placeholders_are_refused(gm, inputs):
    refuses(gm, "the example inputs are", "expected [torch.float32]", error=InputError, example_inputs=inputs)


def test_a_graph_without_shapes_takes_them_from_the_examples(gm):
    expected = verify(gm)
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    assert verify(gm, (torch.randn(2, 3, 6, 6),)) == expected


def test_verifying_changes_nothing(gm):
    before = gm.print_readable(print_output=False)
    assert verify(gm) == verify(gm)
    assert gm.print_readable(print_output=False) == before


# ------------------------------------------------------------------------------------------------- planted in the graph


def test_a_float_constant_is_named(gm):
    gm.b = gm.b.float()
    refuses(gm, "b", "torch.float32 constant")


def test_a_float_table_is_named(gm):
    gm.register_buffer("lut", torch.rand(256))
    new = insert_after(gm, only(gm, ops.quantize), ops.table.default)
    with gm.graph.inserting_before(new):
        new.args = (new.args[0], gm.graph.get_attr("lut"))
    refuses(gm, "lut", "torch.float32 constant", "please report it")


def test_a_scale_may_not_serve_as_anything_else(gm):
    dequantize = only(gm, ops.dequantize)
    dequantize.args = (dequantize.args[0], dequantize.args[1], dequantize.args[1])
    refuses(gm, "out", "torch.float64 constant")


@pytest.mark.parametrize(
    "target, args",
    [(aten.sigmoid.default, ()), (aten.mul.Tensor, (2,)), (aten.to.dtype, (torch.float32,)), (aten.add.Tensor, (1,))],
)
def test_a_foreign_operator_is_named(gm, target, args):
    new = insert_after(gm, only(gm, ops.conv), target, *args)
    refuses(gm, new.name, str(target), "an operator of the integer dialect")


@pytest.mark.parametrize("function", [operator.add, lambda x, y: x + y, torch.add])
def test_a_python_callable_is_named(gm, function):
    new = insert_after(gm, only(gm, ops.conv), function, 1)
    refuses(gm, new.name, "is a Python callable")


def test_calls_of_modules_and_methods_are_named(gm):
    gm.add_submodule("act", torch.nn.ReLU())
    conv = only(gm, ops.conv)
    for create in (gm.graph.call_module, gm.graph.call_method):
        with gm.graph.inserting_after(conv):
            new = create("act", (conv,))
        refuses(gm, new.name, f"{new.op} act", "call_function nodes only")
        gm.graph.erase_node(new)


def test_a_python_float_argument_is_named(gm):
    node = only(gm, ops.sum)
    node.args = (*node.args[:2], [2.0, 3], False)
    refuses(gm, node.name, "a Python float among its arguments")


def test_the_message_says_where_in_the_users_model(gm):
    conv = only(gm, ops.conv)
    conv.args = (*conv.args[:6], 1.0, conv.args[7])
    refuses(gm, "verify: conv_default [features.conv (model.py:7)]: a Python float among its arguments")


def test_a_float_value_is_named(gm):
    pooled = only(gm, ops.sum)
    pooled.meta["val"] = pooled.meta["val"].float()
    refuses(gm, pooled.name, "computes torch.float32")


def test_quantize_inside_the_graph_is_named(gm):
    new = insert_after(
        gm, only(gm, ops.conv), ops.quantize.default, node_named(gm, "scale"), node_named(gm, "zero"), 0, 255
    )
    refuses(gm, new.name, "quantize of conv_default inside the graph")


def test_dequantize_inside_the_graph_is_named(gm):
    conv, scale, zero = only(gm, ops.conv), node_named(gm, "scale"), node_named(gm, "zero")
    real = insert_after(gm, conv, ops.dequantize.default, scale, zero)
    codes = insert_after(gm, real, ops.quantize.default, scale, zero, 0, 255)
    refuses(gm, real.name, f"dequantize read by {codes.name}", "in front of a graph output")


def test_an_operator_that_reads_the_float_input_is_named(gm):
    conv = only(gm, ops.conv)
    conv.update_arg(0, next(n for n in gm.graph.nodes if n.op == "placeholder"))
    refuses(gm, conv.name, "reads the float graph input x")


def test_data_movement_of_the_float_input_is_named(gm):
    new = insert_after(gm, next(n for n in gm.graph.nodes if n.op == "placeholder"), aten.clone.default)
    only(gm, ops.quantize).update_arg(0, new.args[0])
    with gm.graph.inserting_before(new.next):
        gm.graph.output_node().args = ((*gm.graph.output_node().args[0], new),)
    refuses(gm, new.name, "reads the float graph input x")


# --------------------------------------------------------------------------------------------------- planted in a kernel


@pytest.mark.parametrize(
    "kernel, found",
    [
        (lambda x, *rest: (x.float() @ torch.ones(6, 6)).to(torch.int32).sum((2, 3)), "torch.float32"),
        (lambda x, *rest: (x.sum((2, 3)) * 2.5).int(), "the number 2.5"),
        (lambda x, *rest: torch.full((x.shape[0], 4), 7.0, dtype=torch.int32), "the number 7.0"),
    ],
)
def test_a_kernel_that_computes_in_float_is_named(gm, monkeypatch, kernel, found):
    row = integer_ops.INTEGER_OPS["sum"]
    monkeypatch.setitem(integer_ops.INTEGER_OPS, "sum", replace(row, reference=kernel))
    refuses(gm, "sum_default", "in its kernel touches", found)


def test_no_kernel_of_the_dialect_touches_floats():
    """Every reference kernel under the mode, with the calls of the operator tests."""
    from fxcompress.verify import IntegerOnly
    from tests.core.test_integer_ops import CALLS, activation, arguments

    for name in CALLS.keys() - {"quantize", "dequantize"}:
        called_with = arguments(name, activation(name, 2))
        with IntegerOnly(None):
            integer_ops.INTEGER_OPS[name].reference(*called_with)


# ------------------------------------------------------------------------------------------------------- keep_float


def float_region():
    """An 8-bit layer, a sigmoid and a float bias kept in float, and codes again."""

    def forward(m, x):
        q = ops.quantize.default(x, m.scale, m.zero, 0, 255)
        real = ops.dequantize.default(q, m.scale, m.zero)
        kept = aten.add.Tensor(aten.sigmoid.default(real), m.bias)
        back = ops.quantize.default(kept, m.scale, m.zero, 0, 255)
        return ops.dequantize.default(ops.widen.default(back, m.zero), m.scale, m.none)

    gm = integer_graph(forward, constants() | {"bias": torch.rand(4)}, torch.randn(2, 4))
    for name in ("sigmoid_default", "add_tensor"):
        describe(node_named(gm, name), origin=Origin("head.act"))
    return gm


def test_regions_kept_in_float_are_listed():
    gm = float_region()
    for name in ("sigmoid_default", "add_tensor"):
        node_named(gm, name).meta["keep_float"] = True
    certificate = verify(gm)
    assert not certificate.integer_only and certificate.exceptions == ("head.act",)
    assert str(certificate).startswith("Integer-only except head.act: ")
    assert "Outside these no floating-point value exists" in str(certificate)


@pytest.mark.parametrize("allowed", [["head"], ["head.act"], ["sigmoid_default", "add_tensor"]])
def test_float_may_be_allowed_by_module_or_node(allowed):
    assert verify(float_region(), allow_float=allowed).exceptions == ("head.act",)


@pytest.mark.parametrize("allowed", [[], ["hea"], ["head.action"]])
def test_nothing_else_is_allowed(allowed):
    refuses(float_region(), "head.act", allow_float=allowed)


# ---------------------------------------------------------------------------------------------------- accumulators


def test_an_accumulator_beyond_int32_is_refused_with_its_bits(gm):
    gm.b = int32(0, 0, (1 << 31) - 1, 0)
    error = refuses(
        gm, "conv_default [features.conv (model.py:7)]", "needs 33 bits", "keep_float", error=AccumulatorError
    )
    assert isinstance(error, UserError)


def test_a_left_shift_that_overflows_is_refused(gm):
    node = only(gm, ops.requantize)
    node.args = (*node.args[:3], [20], *node.args[4:])
    refuses(gm, node.name, "conv_default shifted left by 20 reaches", "32 bits", error=AccumulatorError)


def test_the_rounding_constant_counts():
    """|acc| + 2^(p-1): 2^30 more tips an accumulator that fits by itself; 2^29 does not."""

    def graph(p):
        def function(m, x):
            return ops.requantize.default([ops.table.default(x, m.lut)], [m.m], [m.p], [0], m.z, 6, m.z, m.hi)

        lut = torch.full((256,), 1 << 30, dtype=torch.int32)
        c = {"lut": lut, "m": int32(-20000), "p": int32(p), "z": int32(0), "hi": int32(255)}
        return integer_graph(function, c, torch.zeros(2, 3, dtype=torch.uint8))

    assert verify(graph(30)).accumulators == {"table_default": 32}
    refuses(graph(31), "table_default shifted left by 0", "needs 33 bits", error=AccumulatorError)


@pytest.mark.parametrize(
    "factor, dtype, found",
    [
        (1, torch.int16, None),
        (1, torch.int32, "weight is torch.int32; expected torch.int16"),
        (70, torch.int16, "a sum of blocks of x spans -17850..35700; expected -32768..32767"),
    ],
)
def test_sums_of_blocks_must_fit_int16(factor, dtype, found):
    _, encode, decode = (s.tensor for s in STRASSEN.schedules)
    encode[-STRASSEN.products :, 1] *= factor
    c = {"w": weights(7, 2, 2).to(dtype), "b": int32(0, 0, 0, 0), "z": int32(0), "encode": encode, "decode": decode}

    def forward(m, x):
        return ops.bilinear_linear.default(x, m.z, m.w, m.b, m.encode, m.decode, STRASSEN.size, -1)

    gm = integer_graph(forward, c, torch.zeros(2, 4, dtype=torch.uint8))
    if found is None:
        assert verify(gm).integer_only
    else:
        refuses(gm, "bilinear_linear_default", found)


@pytest.mark.parametrize(
    "position, value, found",
    [
        (1, int32(1 << 15), "|multiplier| spans 32768..32768; expected 16384..32767"),
        (1, int32(-100), "|multiplier| spans 100..100"),
        (2, int32(32), "right_shift spans 32..32; expected 0..31"),
        (2, int32(-1), "right_shift spans -1..-1"),
        (3, -1, "left_shift spans -1..-1"),
        (4, int32(256), "zero_point spans 256..256; expected 0..255"),
        (5, 7, "guard_bits spans 7..7; expected 0..6"),
        (6, int32(-1), "lo spans -1..-1"),
        (7, int32(300), "hi spans 300..300"),
        (6, int32(251), "lo is above hi"),
    ],
)
def test_requantization_constants_outside_the_kernels_ranges_are_refused(position, value, found):
    names = ("multiplier", "right_shift", None, "zero_point", None, "lo", "hi")
    c = {
        "multiplier": int32(20000),
        "right_shift": int32(3),
        "zero_point": int32(0),
        "lo": int32(0),
        "hi": int32(250),
        "z": int32(0),
    }

    def forward(m, x):
        acc = ops.widen.default(x, m.z)
        args = [[acc], [m.multiplier], [m.right_shift], [0], m.zero_point, 6, m.lo, m.hi]
        if isinstance(value, int):
            args[position] = [value] if position == 3 else value
        return ops.requantize.default(*args)

    example = torch.zeros(2, 3, dtype=torch.uint8)
    assert verify(integer_graph(lambda m, x: ops.requantize.default(
        [ops.widen.default(x, m.z)], [m.multiplier], [m.right_shift], [0], m.zero_point, 6, m.lo, m.hi), c, example)).integer_only  # fmt: skip
    changed = c if isinstance(value, int) else c | {names[position - 1]: value}
    refuses(integer_graph(forward, changed, example), "requantize_default", found)


def test_a_requantization_of_codes_is_refused():
    def function(m, x):
        return ops.requantize.default([x], [m.m], [m.p], [0], m.z, 6, m.z, m.hi)

    c = {"m": int32(20000), "p": int32(3), "z": int32(0), "hi": int32(255)}
    refuses(
        integer_graph(function, c, torch.zeros(2, 3, dtype=torch.uint8)), "its branch x is torch.uint8; expected int32"
    )


@pytest.mark.parametrize(
    "b, c, found",
    [
        (1 << 31, 31, "multiplier spans"),
        (1 << 30, 63, "shift spans 63..63; expected 1..62"),
        (1 << 30, 0, "shift spans 0..0"),
    ],
)
def test_rescaling_constants_outside_the_kernels_ranges_are_refused(b, c, found):
    def graph(b, c):
        def function(m, x):
            return ops.rescale.default([ops.widen.default(x, m.z)], [m.b], [m.c])

        return integer_graph(
            function, {"z": int32(0), "b": torch.tensor(b), "c": torch.tensor(c)}, torch.zeros(2, 3, dtype=torch.uint8)
        )

    assert verify(graph(1 << 30, 30)).integer_only
    refuses(graph(b, c), "rescale_default", found)


def test_a_sum_of_rescaled_branches_must_fit_int64():
    def graph(branches):
        def function(m, x):
            return ops.rescale.default([ops.table.default(x, m.lut)] * branches, [m.b] * branches, [m.c] * branches)

        lut = torch.full((256,), -(1 << 31), dtype=torch.int32)
        c = {"lut": lut, "b": torch.tensor((1 << 31) - 1), "c": torch.tensor(1)}
        return integer_graph(function, c, torch.zeros(2, 3, dtype=torch.uint8))

    assert verify(graph(3)).integer_only
    refuses(graph(5), "rescale_default", "summed over its branches", "64 bits", error=AccumulatorError)
