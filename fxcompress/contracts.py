"""What integer operators ask of their operands beyond what shape propagation says: checked on every graph that comes from outside.

    check_contracts(gm)                  # VerificationError names the node, the argument and what was expected

Kernels rely on it: a weight of another size, a table of fewer entries or an index outside its tensor would make them read what is not
theirs. An argument means the same wherever it occurs, so most of this is by name; what ties several arguments is a rule per operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from .errors import VerificationError
from .graph import argument, constant, dtype, is_constant, one_sample_shape, rank
from .integer_ops import IntegerOp, integer_op
from .meta import place
from .sum_schedule import SumSchedule

aten = torch.ops.aten
MOST = (1 << 31) - 1  # elements of a tensor of one sample: kernels count in int32

#: Least value of integer arguments and of every entry of lists.
_LEAST = {
    "stride": 1, "dilation": 1, "kernel": 1, "groups": 1, "output_size": 1, "padding": 0, "output_padding": 0, "blocks": 1, "products": 1, "fraction_bits": 0,
}  # fmt: skip
#: Constants: their dtypes. What kernels read as an array of parameters is never computed at run time.
_INT32 = (torch.int32,)
_CONSTANTS = {
    "weight": (torch.int8,), "bias": _INT32, "table": _INT32, "lut": (torch.uint8, torch.int32),
    "multiplier": (torch.int32, torch.int64), "right_shift": _INT32, "shift": (torch.int64,), "lo": _INT32, "hi": _INT32,
    "index0": _INT32, "index1": _INT32, "weight1": _INT32, "pad_value": _INT32, "value": _INT32, "scale": (torch.float64,),
    "zero_point": _INT32, "a_zero_point": _INT32, "b_zero_point": _INT32, "encode": _INT32, "encode_a": _INT32, "encode_b": _INT32,
    "decode": _INT32,
}  # fmt: skip
#: (operator, argument): where they are others.
_OTHER_CONSTANTS = {("embedding", "weight"): (torch.uint8,), ("bilinear_linear", "weight"): (torch.int16,)}
_ZERO_POINTS = ("zero_point", "a_zero_point", "b_zero_point", "pad_value")
#: Operators whose parameters broadcast to the result of one sample.
_ELEMENTWISE = ("quantize", "dequantize", "requantize", "rescale", "clamp", "widen", "mul")
#: Operators whose tensor operand may be other than uint8 codes.
_ANY_DTYPE = ("quantize", "dequantize", "pad", "requantize", "rescale", "clamp", "embedding")


def check_contracts(gm: fx.GraphModule) -> None:
    """Raise ``VerificationError`` for the first operator whose operands the kernels are not written for.

    Nodes need ``node.meta["val"]``.
    """
    for node in gm.graph.nodes:
        if (
            node.op == "call_function"
            and isinstance(node.meta["val"], Tensor)
            and math.prod(one_sample_shape(node)) > MOST
        ):
            raise _refused(node, f"a tensor of {one_sample_shape(node)}", f"at most {MOST} elements per sample")
        if node.meta.get("keep_float"):
            continue
        if (row := integer_op(node.target)) is not None:
            _Contract(gm, node, row).check()
        elif node.target is aten.index_select.default and is_constant(node.args[2]):
            index, size = constant(gm, node.args[2]), one_sample_shape(node.args[0])[node.args[1]]
            if index.ndim != 1:
                raise _refused(node, f"index has shape {tuple(index.shape)}", "one dimension")
            _check_range(node, "index", index, 0, size - 1)


def _refused(node: fx.Node, found: str, expected: str) -> VerificationError:
    return VerificationError(found, stage="contracts", where=place(node), expected=expected)


def _check_range(node: fx.Node, name: str, value: Tensor, lo: int, hi: int) -> None:
    if value.numel() and (int(value.min()) < lo or int(value.max()) > hi):
        raise _refused(node, f"{name} spans {int(value.min())}..{int(value.max())}", f"{lo}..{hi}")


class _Contract:
    """The checks of one node of the dialect."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node, row: IntegerOp):
        self.gm, self.node, self.row = gm, node, row
        self.arguments = {p.name: argument(node, p.name) for p in row.overload._schema.arguments}

    def check(self) -> None:
        for name, value in self.arguments.items():
            self._check_argument(name, value)
        if (rule := _RULES.get(self.row.name)) is not None:
            rule(self)

    def _check_argument(self, name: str, value: object) -> None:
        entries = value if isinstance(value, list | tuple) else [value]
        for entry in entries:
            if name in _LEAST and not entry >= _LEAST[name]:
                raise self.refused(f"{name} is {value}", f"at least {_LEAST[name]}")
            if isinstance(entry, fx.Node) and name in _CONSTANTS:
                self._check_constant(name, entry)
            elif isinstance(entry, fx.Node) and self.row.name not in _ANY_DTYPE and name in ("x", "a", "b"):
                self.expect(dtype(entry) == torch.uint8, f"{name} is {dtype(entry)}", "uint8 codes")

    def _check_constant(self, name: str, node: fx.Node) -> None:
        self.expect(is_constant(node), f"{name} is computed at run time", "a constant")
        value = constant(self.gm, node)
        legal = _OTHER_CONSTANTS.get((self.row.name, name), _CONSTANTS[name])
        self.expect(value.dtype in legal, f"{name} is {value.dtype}", " or ".join(map(str, legal)))
        if self.row.name in _ELEMENTWISE:
            self._check_broadcasts(name, value)
        if name == "scale":
            self.expect(
                bool((torch.isfinite(value) & (value > 0)).all()),
                "a scale is not positive and finite",
                "positive numbers",
            )
        if name in _ZERO_POINTS:
            _check_range(self.node, name, value, 0, 255)

    def _check_broadcasts(self, name: str, value: Tensor) -> None:
        shape = one_sample_shape(self.node)
        fits = value.ndim <= len(shape) and all(
            n in (1, m) for n, m in zip(reversed(value.shape), reversed(shape), strict=False)
        )
        self.expect(fits, f"{name} has shape {tuple(value.shape)}", f"one that broadcasts to {tuple(shape)}")

    # -- what rules use

    def refused(self, found: str, expected: str) -> VerificationError:
        return _refused(self.node, found, expected)

    def expect(self, condition: bool, found: str, expected: str) -> None:
        if not condition:
            raise self.refused(found, expected)

    def __getitem__(self, name: str):
        return self.arguments[name]

    def shape(self, name: str) -> list[int]:
        node = self[name]
        return list(constant(self.gm, node).shape) if is_constant(node) else one_sample_shape(node)

    def has_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        found = tuple(constant(self.gm, self[name]).shape)
        self.expect(found in shapes, f"{name} has shape {found}", " or ".join(map(str, shapes)))

    def per_channel(self, name: str, channels: int) -> None:
        """One entry, or one per channel."""
        count = constant(self.gm, self[name]).numel()
        self.expect(count in (1, channels), f"{name} has {count} entries", f"1 or {channels}")

    def lists(self, length: int, *names: str) -> None:
        """Lists with one entry per spatial dimension, two for padding."""
        for name in names:
            expected = 2 * length if name in ("padding", "pad") else length
            self.expect(len(self[name]) == expected, f"{name} is {list(self[name])}", f"{expected} entries")


def _weighted(c: _Contract, inputs: int, per_group: int, outputs: int) -> None:
    """Channels in the weight against those of x, and the bias."""
    c.expect(inputs == per_group, f"x has {inputs} channels", str(per_group))
    if c["bias"] is not None:
        c.has_shape("bias", (outputs,))


def _conv(c: _Contract) -> None:
    (outputs, depth, *kernel), x = c.shape("weight"), c.shape("x")
    c.expect(1 <= len(kernel) <= 3 and len(x) == len(kernel) + 2, f"x has {len(x)} dimensions", f"{len(kernel) + 2}")
    c.expect(outputs % c["groups"] == 0, f"{c['groups']} groups", f"a divisor of {outputs}")
    c.lists(len(kernel), "stride", "dilation", "padding")
    _weighted(c, x[1], depth * c["groups"], outputs)
    c.per_channel("pad_value", x[1])


def _conv_transpose(c: _Contract) -> None:
    (inputs, outputs, *kernel), x = c.shape("weight"), c.shape("x")
    c.expect(1 <= len(kernel) <= 3 and len(x) == len(kernel) + 2, f"x has {len(x)} dimensions", f"{len(kernel) + 2}")
    c.expect(inputs % c["groups"] == 0, f"{c['groups']} groups", f"a divisor of {inputs}")
    c.lists(len(kernel), "stride", "dilation", "padding", "output_padding")
    _weighted(c, x[1], inputs, outputs * c["groups"])
    c.per_channel("zero_point", x[1])


def _linear(c: _Contract) -> None:
    outputs, depth = c.shape("weight")
    _weighted(c, c.shape("x")[-1], depth, outputs)


def _window(c: _Contract) -> None:
    names = [n for n in ("kernel", "stride", "padding", "dilation", "output_size") if n in c.arguments]
    spatial = len(c[names[0]])
    c.expect(rank(c["x"]) == spatial + 2, f"x has {rank(c['x'])} dimensions", str(spatial + 2))
    c.lists(spatial, *names)
    if "zero_point" in c.arguments:
        c.per_channel("zero_point", c.shape("x")[1])


def _resize(c: _Contract) -> None:
    sizes, dims = c.shape("x"), len(c["index0"])
    c.expect(1 <= dims <= len(sizes) - 2, f"{dims} dimensions are interpolated", f"1..{len(sizes) - 2}")
    c.expect(c["fraction_bits"] <= 15, f"fraction_bits is {c['fraction_bits']}", "0..15")
    for i in range(dims):
        tables = [constant(c.gm, c[name][i]) for name in ("index0", "index1", "weight1")]
        c.expect(
            len({tuple(t.shape) for t in tables}) == 1 and tables[0].ndim == 1,
            "tables of different sizes",
            "equal ones",
        )
        for name, table in zip(("index0", "index1"), tables, strict=False):
            _check_range(c.node, name, table, 0, sizes[len(sizes) - dims + i] - 1)
    c.per_channel("zero_point", sizes[1])


def _pad(c: _Contract) -> None:
    c.expect(
        len(c["pad"]) % 2 == 0 and len(c["pad"]) // 2 <= rank(c["x"]) - 1,
        f"pad is {list(c['pad'])}",
        "two entries per dimension",
    )
    value = constant(c.gm, c["value"])
    c.expect(
        value.ndim == 0 or tuple(value.shape) == (one_sample_shape(c.node)[1],),
        f"value has shape {tuple(value.shape)}",
        "() or (C,)",
    )


def _table(c: _Contract) -> None:
    channels = c.shape("x")[c["axis"]] if -rank(c["x"]) <= c["axis"] < rank(c["x"]) else 0
    c.has_shape("lut", (256,), (channels, 256))


def _boundary(c: _Contract) -> None:
    if c.row.name == "quantize":
        c.expect(0 <= c["qmin"] <= c["qmax"] <= 255, f"codes {c['qmin']}..{c['qmax']}", "0..255")
    else:
        c.expect(dtype(c["q"]) in (torch.uint8, torch.int32), f"q is {dtype(c['q'])}", "codes or accumulators")


def _branches(c: _Contract) -> None:
    names = [n for n in ("acc", "multiplier", "right_shift", "left_shift", "shift") if n in c.arguments]
    c.expect(
        len({len(c[n]) for n in names}) == 1 and len(c["acc"]) > 0, "branches without their parameters", "one each"
    )
    for name in (n for n in ("multiplier", "right_shift", "shift") if n in c.arguments):
        for acc, parameter in zip(c["acc"], c[name], strict=True):
            dimensions = constant(c.gm, parameter).ndim
            c.expect(
                dimensions <= rank(acc), f"{name} has {dimensions} dimensions", f"at most the {rank(acc)} of its branch"
            )


def _matmul(c: _Contract) -> None:
    c.per_channel("a_zero_point", 1)
    c.per_channel("b_zero_point", 1)


def _program(c: _Contract, name: str, inputs: int, sums: int) -> None:
    """A program of sums whose steps only name terms that exist."""
    try:
        SumSchedule.from_tensor(constant(c.gm, c[name]), inputs, sums)
    except (ValueError, TypeError) as error:
        raise c.refused(f"{name}: {error}", "a program of sums") from error


def _bilinear_linear(c: _Contract) -> None:
    (products, rows, columns), x, outputs = c.shape("weight"), c.shape("x"), constant(c.gm, c["bias"]).numel()
    c.lists(3, "blocks")
    c.expect(c["axis"] in (1, -1, len(x) - 1), f"axis is {c['axis']}", "1 or the last")
    n, m, p = c["blocks"]
    c.expect(
        (rows, columns) == (-(-outputs // n), -(-x[c["axis"]] // m)),
        f"blocks of the weight {(rows, columns)}",
        f"{outputs} x {x[c['axis']]} in {n} x {m}",
    )
    c.has_shape("bias", (outputs,))
    c.per_channel("zero_point", x[c["axis"]])
    _program(c, "encode", m * p, products)
    _program(c, "decode", products, n * p)


def _bilinear_matmul(c: _Contract) -> None:
    _matmul(c)
    c.lists(3, "blocks")
    n, m, p = c["blocks"]
    _program(c, "encode_a", n * m, c["products"])
    _program(c, "encode_b", m * p, c["products"])
    _program(c, "decode", c["products"], n * p)


def _embedding(c: _Contract) -> None:
    c.expect(dtype(c["index"]) == torch.int64, f"index is {dtype(c['index'])}", "int64")
    c.expect(c.shape("weight")[0] > 0, "an empty table", "rows")


_RULES: dict[str, Callable[[_Contract], None]] = {
    "conv": _conv, "conv_transpose": _conv_transpose, "linear": _linear, "sum_pool": _window, "max_pool": _window,
    "adaptive_sum_pool": _window, "adaptive_max_pool": _window, "resize": _resize, "pad": _pad, "table": _table,
    "softmax": lambda c: c.has_shape("table", (256,)), "quantize": _boundary, "dequantize": _boundary,
    "requantize": _branches, "rescale": _branches, "matmul": _matmul, "embedding": _embedding,
    "bilinear_linear": _bilinear_linear, "bilinear_matmul": _bilinear_matmul,
}  # fmt: skip
