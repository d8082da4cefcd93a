"""SPIQ: a scale and a zero point for every channel of the activations, at no cost at run time.

    y_o = s_w[o] sum_c q_w[o, c] (q_x[c] - z_x[c]) + b_o      q_w = round(W[o, c] s_x[c] / s_w[o])

The consumers' weights absorb the scales (``quantize`` folds them in before it looks at the weights), their biases and the
code they pad with absorb the zero points, and the producer's requantization is per channel anyway. So the integer network has
the same operators, and no activation loses resolution to a wider neighbor. The codes do not depend on how channels are scaled
against each other: cross-layer equalization changes nothing any more.

A tied set (codes that only move between its members) is decided as one; ``analysis/code_channels.py`` says who can read
such codes, and the refusals are in the report. The range of a channel is mean +- k sigma of the unrounded sum, k =
``range_sigmas``, more behind a clamp, with calibration data too: the extremes of a few hundred examples are too narrow for
channels that open for one class only. Dead channels get a floor.

Level: float. Effect: EXACT (only qparams are chosen). Source: Yvinec et al. 2023, SPIQ, eq. 3-5; docs/passes.md for ties.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress import dialects as d
from fxcompress import numerics
from fxcompress.analysis.code_channels import ChannelSet, channel_sets
from fxcompress.analysis.quantization import QuantizationPoints
from fxcompress.graph import bounds, is_call, shape
from fxcompress.meta import QParams, Range, describe, tensor_meta
from fxcompress.options import context
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan, Reject

#: Least width of a channel, of the widest one's: dead ones have none.
FLOOR = 2.0**-12
#: Least width of a channel, of what is rounded to it: a ReLU that hardly ever opens needs no resolution of its own, and its
#: multiplier would take guard bits from all channels.
SHARE = 2.0**-5
#: Standard deviations, in units of ``range_sigmas``: a rectified channel that is seldom open is far from Gaussian. Where the
#: clamp has an upper bound (ReLU6), which ends the range anyway, more cost little. Chosen by SQNR on calibration images, which are
#: never evaluated on (docs/accuracy.md).
RECTIFIED, BOUNDED = 1.5, 3
PER_CHANNEL = ", per channel"  # how the provenance of a range ends that this pass chose


class Spiq(Pass):
    name = "spiq"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "Yvinec et al. 2023, SPIQ, eq. 3-5"
    needs = frozenset({Fact.RANGES})

    def plan(self, gm: fx.GraphModule) -> Plan:
        """One match per tied set that gets qparams per channel, at its first tensor; the others are refused aloud."""
        plan = Plan(self.name, gm)
        if not context(gm).options.spiq:
            return plan
        points = QuantizationPoints(gm)
        for found in channel_sets(points):
            if isinstance(found, Reject):
                plan.rejects.append(found)
                continue
            if tensor_meta(found.sources[0]).qparams is not None:
                continue
            ranges = {node: _range(gm, points, node) for node in found.sources}
            qparams = _qparams(found, ranges, context(gm).options.target.activation_bits)
            plan.matches.append(Match(found.sources[0], _summary(qparams[found.sources[0]]), (ranges, qparams)))
        return plan

    def apply(self, plan: Plan) -> PassResult:
        for match in plan.matches:
            ranges, qparams = match.data
            for node, q in qparams.items():
                describe(node, qparams=q, range=ranges.get(node, tensor_meta(node).range))
            plan.applied += 1
        return PassResult(plan.graph_module, plan.applied > 0)


def _qparams(found: ChannelSet, ranges: dict[fx.Node, Range], bits: int) -> dict[fx.Node, QParams]:
    """Qparams of every tensor of a set: its labels pick from those of all labels."""
    lo, hi = torch.zeros(2, found.count, dtype=torch.float64)
    for node, first in zip(found.sources, found.first, strict=True):
        channels = slice(first, first + shape(node)[found.axes[node]])
        lo[channels], hi[channels] = ranges[node].lo, ranges[node].hi
    lo, hi = _at_least(lo, hi, torch.tensor(FLOOR * float((hi - lo).max())))
    every = numerics.affine_qparams(lo, hi, bits, axis=0)
    return {
        node: QParams(every.scale[labels], every.zero_point[labels], every.qmin, every.qmax, found.axes[node])
        for node, labels in found.labels.items()
    }


def _range(gm: fx.GraphModule, points: QuantizationPoints, node: fx.Node) -> Range:
    """The range of every channel of a tensor that is computed, 0 included: (C,) float64, or () where only that is known."""
    chosen = tensor_meta(node).range
    if chosen is None:
        raise RuntimeError(f"{node.name} has no range: assign_ranges must run first")
    if chosen.provenance.endswith(PER_CHANNEL):  # an earlier compilation's, for another input shape
        return chosen
    lo, hi = _expected(gm, points, node) or (chosen.lo.double(), chosen.hi.double())
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    largest = torch.zeros_like(lo)
    for unrounded in _accumulators(points, node):
        if (before := tensor_meta(unrounded).range) is not None:
            ends = torch.maximum(before.lo.abs(), before.hi.abs()).double()
            largest = torch.maximum(largest, ends if ends.shape == lo.shape else ends.max())
    return Range(*_at_least(lo, hi, largest * SHARE), chosen.provenance + PER_CHANNEL)


def _expected(gm: fx.GraphModule, points: QuantizationPoints, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """mean +- k sigma of the unrounded sum, through the clamps behind it; None where its moments are not known."""
    clamps = []
    while is_call(node, d.CLAMP, d.CHANNEL_CLAMP) and points.is_accumulator(node.args[0]):
        clamps.append(node)
        node = node.args[0]
    if (stats := tensor_meta(node).statistics) is None:
        return None
    limits = [bounds(gm, clamp) for clamp in reversed(clamps)]
    factor = (BOUNDED if any(high is not None for _, high in limits) else RECTIFIED) if clamps else 1
    width = context(gm).options.range_sigmas * factor * _deviation(node)
    ends = stats.mean.double() - width, stats.mean.double() + width
    for limit in limits:
        low, high = (b.flatten() if isinstance(b, Tensor) else b for b in limit)
        ends = tuple(e.clamp(low, high) for e in ends)
    return ends


def _deviation(node: fx.Node) -> Tensor:
    """The standard deviation of a tensor; of a sum that was never measured the largest possible, that of correlated branches.

    Propagation takes branches as independent. Per tensor, the widest channel has room for what that gets wrong; here no channel has.
    """
    stats = tensor_meta(node).statistics
    if stats.provenance == "propagated" and is_call(node, d.ADD, d.SUB):
        branches = [tensor_meta(operand).statistics for operand in node.args[:2] if isinstance(operand, fx.Node)]
        if len(branches) == 2 and None not in branches:
            return sum(branch.std for branch in branches)
    return stats.std


def _at_least(lo: Tensor, hi: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """[lo, hi] stretched to a width: in proportion, upwards where it is empty."""
    factor = (width / (hi - lo)).clamp(min=1)
    return torch.where(hi > lo, lo * factor, 0.0), torch.where(hi > lo, hi * factor, width)


def _accumulators(points: QuantizationPoints, node: fx.Node) -> list[fx.Node]:
    """What is rounded to these codes: the unrounded sum behind the clamps, and the branches of an addition."""
    found = []
    for operand in node.all_input_nodes:
        if points.is_accumulator(operand):
            found += [operand, *_accumulators(points, operand)]
        elif is_call(node, d.ADD, d.SUB):
            found.append(operand)
    return found


def _summary(q: QParams) -> str:
    return (
        f"codes {q.qmin}..{q.qmax}, {len(q.scale)} scales {float(q.scale.min()):.4g}..{float(q.scale.max()):.4g}, "
        f"zero points {int(q.zero_point.min())}..{int(q.zero_point.max())}"
    )
