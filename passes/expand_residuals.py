"""Expand residuals: what rounding a weight lost is rounded again, finer, and added.

    W  =  s (c1 + c2 / 2^(b-1) + c3 / 2^(2(b-1)) + ...) + rest            every c of b bits

With ``residual=0.5`` every order expands the half of the rows (output channels) whose rest has the largest sum of
magnitudes; a row that was left out competes again at the next order. The rest shrinks by 2^(b-1) per order, whatever
quantizer rounds. Because every scale is the last one divided by a power of two, the orders of a row are one integer,
``c1 2^(b-1) + c2``: where it fits int8 it becomes the one weight of the layer (4 + 4 bits reach 60), and nothing is
computed twice. Where it does not (8 + 8 bits) the weight becomes a sum of two; lowering gives each its own accumulators,
which meet in front of the one rounding.

With ``residual="outliers"`` the scale of a row is that of its weights within six deviations of their mean, and the few
beyond get +-n steps on top, n common to the row.

Level: qdq. Effect: LOSSY (weights move towards the float ones). Rows so small that a finer scale could not carry their
bias keep one order.
Source: Yvinec et al. 2023, REx, section 3; shift-aligned scales and bounds: docs/passes.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fxcompress import numerics
from fxcompress.analysis.encoded_weights import (
    EXPANSION,
    Expansion,
    from_rows,
    is_encoded,
    kernel_taps,
    layer_quantizer,
    rows,
)  # fmt: skip
from fxcompress.dialects import ADD, WEIGHTED
from fxcompress.graph import add_constant, argument, calls, constant, is_call
from fxcompress.meta import QParams, describe, inherit_origin, tensor_meta
from fxcompress.options import context
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan, Reject
from fxcompress.weight_quantizers import WeightQuantizer

from .quantize import weight_scale

ops = torch.ops.fxcompress
INT8 = 127
OUTLIER_DEVIATIONS = 6.0


@dataclass(frozen=True, eq=False)
class Part:
    """One int8 weight of a sum. codes: (O, K) float64; step: (O,) its scale in scales of the first order."""

    codes: Tensor
    step: Tensor


@dataclass(frozen=True, eq=False)
class Rounding:
    """How rows in steps of the first order are rounded: the target's quantizer and width."""

    quantizer: WeightQuantizer
    bits: int
    taps: int

    def __call__(self, v: Tensor) -> Tensor:
        return self.quantizer.encode(v, self.taps, self.bits).double()

    @property
    def error(self) -> float:
        """Bound on |v - code|."""
        return self.quantizer.error(self.bits)

    @property
    def finer(self) -> int:
        """Ratio of the scales of consecutive orders."""
        return 1 << (self.bits - 1)


class ExpandResiduals(Pass):
    name = "expand_residuals"
    level = Level.QDQ
    effect = Effect.LOSSY
    source = "Yvinec et al. 2023, REx, section 3"
    needs = frozenset({Fact.QUANTIZED})

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan, options = Plan(self.name, gm), context(gm).options
        if not options.residual:
            return plan
        originals = {node.name: node for node in context(gm).float_graph.graph.nodes}
        for node in calls(gm, *WEIGHTED):
            if is_encoded(node.args[1]) and EXPANSION not in node.meta:
                weight = constant(context(gm).float_graph, originals[node.name].args[1]).detach()
                parts, expansion = self._expand(gm, node, weight)
                if not expansion.residuals.any():
                    plan.rejects.append(Reject("no row of its weight needs a residual and can carry one", node))
                    continue
                where = "in one int8 weight" if len(parts) == 1 else f"in {len(parts)} accumulators"
                count = int((expansion.residuals > 0).sum())
                summary = f"{count} of {len(expansion.residuals)} rows get residuals, {where}"
                plan.matches.append(Match(node, summary, (parts, expansion)))
        return plan

    def apply(self, plan: Plan) -> PassResult:
        for match in plan.matches:
            parts, match.node.meta[EXPANSION] = match.data
            _replace_weight(plan.graph_module, match.node, parts)
            plan.applied += 1
        return PassResult(plan.graph_module, plan.applied > 0)

    def _expand(self, gm: fx.GraphModule, node: fx.Node, weight: Tensor) -> tuple[list[Part], Expansion]:
        options = context(gm).options
        codes, scale = (constant(gm, a) for a in node.args[1].args[:2])
        v, first = rows(node, weight.double() / scale), rows(node, codes)
        rounding = Rounding(layer_quantizer(gm, node), options.target.weight_bits, kernel_taps(weight))
        smallest, alike = _smallest_step(gm, node), options.weight_granularity == "tensor"
        if alike:
            smallest = smallest.max().expand_as(smallest)
        if options.residual == "outliers":
            return expand_outliers(v, first, rounding, smallest, alike)
        norm_scale = tensor_meta(node.args[1]).qparams.scale
        return expand_rows(v, first, norm_scale, rounding, smallest, options.residual, options.residual_orders, alike)


def expand_rows(
    v: Tensor,
    codes: Tensor,
    scale: Tensor,
    rounding: Rounding,
    smallest: Tensor,
    share: float,
    orders: int,
    alike: bool = False,
) -> tuple[list[Part], Expansion]:
    """``v`` (O, K), rounded to ``codes``, both in steps of ``scale`` (O,), as parts: up to ``orders - 1`` residuals a row.

    Each order expands the ``share`` of the rows with the largest rest. No step shrinks below ``smallest`` (O,) of the first.
    ``alike``: all rows of a part have one step, because the layer has one scale.
    """
    step = own = torch.ones(len(v), dtype=torch.float64)  # of the last part, and of the last order that a row got
    parts, residuals = [Part(codes, step)], torch.zeros(len(v), dtype=torch.int64)
    for _ in range(orders - 1):
        rest = v - sum(p.codes * p.step[:, None] for p in parts)
        chosen = _worst(rest.abs().sum(1) * scale, share) & (step / rounding.finer >= smallest) & (own == step)
        step = torch.where(chosen | (alike & chosen.any()), step / rounding.finer, step)
        own = torch.where(chosen, step, own)
        parts = _append(parts, Part(rounding(rest / step[:, None]) * chosen[:, None], step))
        residuals = residuals + chosen
    return parts, Expansion(residuals, rounding.error * own / parts[0].step)


def _worst(norm: Tensor, share: float) -> Tensor:
    """(O,) bool: the ceil(share * O) largest norms that are not 0."""
    chosen = torch.zeros(len(norm), dtype=torch.bool)
    chosen[norm.argsort(descending=True, stable=True)[: math.ceil(share * len(norm))]] = True
    return chosen & (norm > 0)


def _append(parts: list[Part], new: Part) -> list[Part]:
    """The sum with ``new``, whose steps divide those of the last part, in one int8 weight with it if it fits."""
    last = parts[-1]
    merged = last.codes * (last.step / new.step)[:, None] + new.codes
    if merged.abs().max() <= INT8:
        return [*parts[:-1], Part(merged, new.step)]
    return [*parts, new]


def expand_outliers(
    v: Tensor, codes: Tensor, rounding: Rounding, smallest: Tensor, alike: bool = False
) -> tuple[list[Part], Expansion]:
    """Rows with weights beyond ``OUTLIER_DEVIATIONS`` are rounded again without them; these get +-n steps on top.

    Returns a finer first part; for ``alike`` the rows share its step and n.
    """
    together = None if alike else 1  # what shares a scale
    center, deviation = v.mean(together, keepdim=True), v.std(together, correction=0, keepdim=True)
    outlier = (v - center).abs() > OUTLIER_DEVIATIONS * deviation
    limit = rounding.quantizer.largest(rounding.bits)
    largest = v.masked_fill(outlier, 0).abs().amax(1)
    chosen = outlier.any(1)
    if alike:
        largest, chosen = largest.max().expand_as(largest), chosen.any().expand_as(chosen)
    chosen = chosen & (largest > 0) & (largest / limit >= smallest)
    step = torch.where(chosen, largest / limit, 1.0)
    inner = v / step[:, None]
    codes = torch.where(chosen[:, None], rounding(inner.clamp(-limit, limit)), codes)
    outlier = outlier & chosen[:, None]
    rest = (inner - codes) * outlier
    total, count = rest.abs().sum(1), outlier.sum(1)
    if alike:
        total, count = total.sum().expand_as(total), count.sum().expand_as(count)
    jump = (total / count.clamp(min=1)).round().clamp(min=1)  # the mean of what is missing, in whole steps
    first, second = Part(codes, step), Part(rest.sign(), step * jump)
    merged = codes + second.codes * jump[:, None]
    parts = [Part(merged, step)] if merged.abs().max() <= INT8 else [first, second]
    left = (rest - second.codes * jump[:, None]).abs().amax(1).clamp(min=rounding.error)
    return parts, Expansion(outlier.any(1).long(), left)


def _smallest_step(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """(O,): the least factor by which the scale of a row may shrink so that its bias and its shift stay in range."""
    weight, x = tensor_meta(node.args[1]).qparams, tensor_meta(node.args[0]).qparams
    scale = weight.scale * x.scale if x.axis is None else weight.scale
    floor = torch.zeros_like(scale)
    if (bias := argument(node, "bias")) is not None:
        floor = constant(gm, bias).double().abs() / numerics.MAX_BIAS_CODE
    if (destination := _destination(node)) is not None:
        floor = torch.maximum(floor, destination.scale.max() * numerics.MIN_ACCUMULATOR_SCALE)
    return floor / scale


def _destination(node: fx.Node) -> QParams | None:
    """The codes that these accumulators are rounded to, None for a graph output."""
    while not is_call(node, ops.quantize.default):
        users = [u for u in node.users if u.op != "output"]
        if not users:
            return None
        node = users[0]
    return tensor_meta(node).qparams


def _replace_weight(gm: fx.GraphModule, node: fx.Node, parts: list[Part]) -> None:
    old = node.args[1]
    codes, scale, zero_point = (constant(gm, a) for a in old.args)
    q = tensor_meta(old).qparams
    with gm.graph.inserting_before(node):
        nodes = []
        for part in parts:
            code_node = add_constant(gm, old.args[0].target, from_rows(node, part.codes.to(torch.int8), codes), node)
            scale_node = add_constant(gm, old.args[1].target, scale * weight_scale(node, part.step, codes), node)
            zero_node = add_constant(gm, old.args[2].target, zero_point, node)
            real = gm.graph.call_function(ops.dequantize.default, (code_node, scale_node, zero_node))
            largest = int(part.codes.abs().max())
            qparams = replace(q, scale=q.scale * part.step, qmin=-largest, qmax=largest)
            describe(code_node, qparams=qparams)
            describe(inherit_origin(node, real), qparams=qparams)
            nodes.append(real)
        total = nodes[0]
        for real in nodes[1:]:
            total = inherit_origin(node, gm.graph.call_function(ADD, (total, real)))
    node.update_arg(1, total)
