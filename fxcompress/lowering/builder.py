"""``Builder`` emits integer operators into a new graph and turns one kind of value into another."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from .. import numerics
from ..errors import AccumulatorError
from ..graph import add_constant, make_graph_module
from ..meta import QParams, TensorMeta, describe, place, tensor_meta
from .values import OUTPUT_BITS, Accumulator, Bound, Branch, Codes, Float, Function, Index, Value, output_scale

ops = torch.ops.fxcompress


class Builder:
    """Emits integer operators into a new graph. ``origin`` is the qdq node being lowered: names and origins follow it."""

    def __init__(self, gm: fx.GraphModule):
        self.gm = make_graph_module(gm, fx.Graph())
        self.gm.meta = dict(gm.meta)
        self.graph = self.gm.graph
        self.origin: fx.Node | None = None

    def call(self, op, *args, name: str | None = None) -> fx.Node:
        """Call ``op``; tensors among the arguments (also inside lists) become buffers."""
        args = tuple(
            self._constants(a, f"{self.origin.name}_{p.name}") for a, p in zip(args, op._schema.arguments, strict=False)
        )
        node = self.graph.create_node("call_function", op, args, name=name or self.origin.name)
        node.meta["fxcompress"] = TensorMeta(origin=tensor_meta(self.origin).origin)
        return node

    def call_constant(self, value: Tensor, name: str) -> fx.Node:
        """A buffer for ``value`` at this point of the graph."""
        return add_constant(self.gm, name, value.contiguous(), self.origin)

    def _constants(self, value, name: str):
        if isinstance(value, Tensor):
            return self.call_constant(value, name)
        if isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
            return [self._constants(v, f"{name}_{i}") for i, v in enumerate(value)]
        return value

    # -- conversions between values

    def widen(self, codes: Codes) -> Branch:
        """Codes as an int32 branch that is zero at real 0."""
        q = codes.qparams
        node = self.call(ops.widen.default, codes.node, _zero_point(q, self.origin), name=f"{codes.node.name}_wide")
        lo, hi = ((code - q.zero_point) for code in (q.qmin, q.qmax))
        bound = int(torch.maximum(lo.abs(), hi.abs()).max())
        scale, _ = q.broadcast(self.rank)
        return Branch(node, scale, bound, bound * scale)

    def branches(self, value: Value) -> tuple[Branch, ...]:
        """The branches ``value`` contributes to a sum."""
        if isinstance(value, Accumulator):
            if value.clamped:
                raise RuntimeError("a clamped accumulator cannot join a sum: quantize must round it first")
            return value.branches
        return (self.widen(value),)

    @property
    def rank(self) -> int:
        return self.origin.meta["val"].ndim

    def requantize(self, acc: Accumulator, q: QParams, name: str) -> Codes:
        """All branches into codes ``q`` with one rounding; the clamp becomes the code bounds."""
        scale, zero_point = q.broadcast(self.rank)
        steps = max((float((b.magnitude / scale).max()) for b in acc.branches), default=1.0)
        guard = numerics.guard_bits(steps) if len(acc.branches) > 1 else numerics.MAX_GUARD_BITS
        multipliers = [b.scale / scale for b in acc.branches]
        while not all(
            _fits(b, m, guard, i == 0) for i, (b, m) in enumerate(zip(acc.branches, multipliers, strict=True))
        ):
            guard -= 1  # fewer guard bits need a smaller left shift
            if guard < 0:
                raise AccumulatorError("an accumulator does not fit int32 after its left shift", stage="lower_to_integer",
                                       where=place(self.origin), remedy="Name the module in keep_float.")  # fmt: skip
        dyadics = [numerics.dyadic(m, guard) for m in multipliers]
        lo, hi = _code_bounds(acc, q, scale, zero_point)
        node = self.call(
            ops.requantize.default,
            [b.node for b in acc.branches],
            [d.multiplier for d in dyadics],
            [d.right_shift for d in dyadics],
            [d.left_shift for d in dyadics],
            zero_point, guard, lo, hi,
            name=name,
        )  # fmt: skip
        return self.codes(node, q)

    def codes(self, node: fx.Node, q: QParams) -> Codes:
        describe(node, qparams=q, range=tensor_meta(self.origin).range, statistics=tensor_meta(self.origin).statistics)
        return Codes(node, q)

    def tabulate(self, function: Function, q: QParams, name: str) -> Codes:
        """The function as a table of codes: exact for every input code."""
        values = _table_values(function)
        scale, zero_point = (q.scale, q.zero_point) if q.axis is None else (q.scale[:, None], q.zero_point[:, None])
        lut = numerics.quantize_offline(values, scale, zero_point, q.qmin, q.qmax).to(torch.uint8)
        return self.codes(self.call(ops.table.default, function.codes.node, lut, *_table_axis(function), name=name), q)

    def to_codes(self, value: Value, q: QParams, name: str) -> Codes:
        """``value`` rounded to codes ``q``; the new node, if one is needed, is called ``name``."""
        if isinstance(value, Codes):
            return value if value.qparams.same(q) else self.requantize(Accumulator((self.widen(value),)), q, name)
        if isinstance(value, Function):
            return self.tabulate(value, q, name)
        if isinstance(value, Float):
            scale, zero_point = q.broadcast(self.rank)
            return self.codes(
                self.call(ops.quantize.default, value.node, scale, zero_point, q.qmin, q.qmax, name=name), q
            )
        return self.requantize(value, q, name)

    def to_accumulator(self, value: Accumulator | Codes | Function) -> Accumulator:
        """``value`` as a sum, of one branch if it is none yet."""
        if isinstance(value, Accumulator):
            return value
        return Accumulator((self.widen(value) if isinstance(value, Codes) else self._tabulate_wide(value),))

    def to_single(self, value: Accumulator | Function) -> Branch:
        """``value`` as one int32 tensor with a scale (graph outputs), clamped if it was clamped."""
        value = self.to_accumulator(value)
        if len(value.branches) > 1:
            value = replace(value, branches=(self.rescale(value.branches, output_scale(value.branches)),))
        (branch,) = value.branches
        if value.clamped:
            lo, hi = torch.broadcast_tensors(
                *(
                    torch.full_like(branch.scale, limit, dtype=torch.int32)
                    if bound is None
                    else torch.round(bound / branch.scale).clamp(numerics.INT32_MIN, numerics.INT32_MAX).to(torch.int32)
                    for bound, limit in ((value.lo, numerics.INT32_MIN), (value.hi, numerics.INT32_MAX))
                )
            )
            branch = replace(branch, node=self.call(ops.clamp.default, branch.node, lo, hi))
        return branch

    def rescale(self, branches: tuple[Branch, ...], scale: float) -> Branch:
        """Sum of branches at one scalar ``scale``, int32, by the 31-bit form."""
        pairs = [numerics.dyadic31(b.scale / scale) for b in branches]
        node = self.call(ops.rescale.default, [b.node for b in branches], [b for b, _ in pairs], [c for _, c in pairs])
        magnitude = sum(b.largest for b in branches)
        return Branch(node, torch.tensor(scale, dtype=torch.float64), int(magnitude / scale) + 1, magnitude)

    def _tabulate_wide(self, function: Function) -> Branch:
        values = _table_values(function)
        scale = float(values.abs().max()) * 2.0**-OUTPUT_BITS or 1.0
        lut = torch.round(values / scale).to(torch.int32)
        node = self.call(ops.table.default, function.codes.node, lut, *_table_axis(function))
        return Branch(node, torch.tensor(scale, dtype=torch.float64), int(lut.abs().max()), float(values.abs().max()))

    def to_float(self, value: Value) -> fx.Node:
        """Leave the integers: the boundary operator in front of a graph output or a ``keep_float`` region."""
        if isinstance(value, Float | Index):
            return value.node
        if isinstance(value, Codes):
            node, (scale, zero_point) = value.node, value.qparams.broadcast(self.rank)
        else:
            branch = self.to_single(value)
            node, scale, zero_point = branch.node, branch.scale, torch.zeros((), dtype=torch.int32)
        return self.call(ops.dequantize.default, node, scale, zero_point, name=f"{self.origin.name}_real")


def _zero_point(q: QParams, node: fx.Node) -> Tensor:
    return q.broadcast(node.meta["val"].ndim)[1]


def _fits(branch: Branch, multiplier: Tensor, guard: int, first: bool) -> bool:
    """The shifted accumulator stays inside int32 for any input."""
    d = numerics.dyadic(multiplier, guard)
    rounding = int(numerics.rounding_constant(d, first).abs().max())
    return (branch.bound + rounding) << d.left_shift < 1 << 31


def _code_bounds(acc: Accumulator, q: QParams, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """The real clamp bounds as codes, int32, broadcastable like the scale."""

    def code(bound: Bound, limit: int) -> Tensor:
        if bound is None:
            return torch.full_like(zero_point, limit)
        return (torch.round(bound / scale) + zero_point).clamp(q.qmin, q.qmax).to(torch.int32)

    return torch.broadcast_tensors(code(acc.lo, q.qmin), code(acc.hi, q.qmax))


def _table_axis(function: Function) -> tuple[int, ...]:
    axis = function.codes.qparams.axis
    return () if axis is None else (axis,)


def _table_values(function: Function) -> Tensor:
    """Real function values for codes 0..255: (256,) or (C, 256); codes beyond qmax repeat the last value.

    The codes cover 0 even where the tensor never is 0: outside the function's domain they hold the nearest value inside.
    """
    q = function.codes.qparams
    codes = torch.arange(256, dtype=torch.float64).clamp(q.qmin, q.qmax)
    if q.axis is None:
        return _nearest_finite(function.apply(q.scale * (codes - q.zero_point)))
    rows = function.apply(q.scale[:, None] * (codes - q.zero_point[:, None]))
    return torch.stack([_nearest_finite(row) for row in rows])


def _nearest_finite(values: Tensor) -> Tensor:
    """NaN and infinities of a (256,) table replaced by the finite entry nearest to them."""
    inside = values.isfinite().nonzero().flatten()
    if len(inside) in (0, len(values)):
        return values
    distance = (torch.arange(len(values))[:, None] - inside).abs()
    return values[inside[distance.argmin(1)]]
