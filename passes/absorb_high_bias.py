"""Absorb high biases: what a ReLU adds to a channel nearly always moves into the biases of the layers that read it.

    y = relu(z), z ~ N(beta, gamma^2)      c = max(0, beta - 3 gamma)
    b1 -= c                                relu(z - c) = relu(z) - c      where z >= c
    b2 += sum over i and taps of W2[:, i] c_i

The channel then needs c less of the range that all channels share. The network is the same wherever z >= c; elsewhere
(0.13 % of the values, if z is Gaussian) y was below c and becomes c: the error is c - y, at most c. An upper bound of the
clamp becomes hi - c, per channel. Readers that pad with zeros would need the padding -c, which no code of the narrower
range stands for: refused. So is a clamp that is not at 0 below, and anything between that does not pass a shift on.

Level: float. Effect: LOSSY, as said above. Statistics move with their tensors.
Source: Nagel et al. 2019, Data-Free Quantization, section 4.1.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.analysis.affine import Affine
from fxcompress.analysis.affine_regions import Region, backward_region, forward_region
from fxcompress.analysis.layer_groups import CLAMPS
from fxcompress.dialects import CHANNEL_CLAMP
from fxcompress.graph import add_constant, bounds, erase_dead, is_call, rank, shape
from fxcompress.meta import along_axis, tensor_meta
from fxcompress.options import context
from fxcompress.rewrite import Effect, Fact, Level, Match, PassResult, Plan, Reject, RewriteRule

from .fold_batch_norm import apply_edit, transform_meta

SIGMAS = 3.0
NEGLIGIBLE = 1e-6  # of the deviation: a second run finds rounding errors only


class AbsorbHighBias(RewriteRule):
    name = "absorb_high_bias"
    level = Level.FLOAT
    effect = Effect.LOSSY
    source = "Nagel et al. 2019, section 4.1.3"
    needs = frozenset({Fact.STATISTICS, Fact.BATCH_NORM_FOLDED})

    def match(self, node: fx.Node) -> Match | None:
        gm = node.graph.owning_module
        if not is_call(node, *CLAMPS) or not context(gm).options.absorb_bias or not _is_relu(gm, node):
            return None
        z = node.args[0]
        excess = _excess(z)
        if excess is None or not bool((excess > 0).any()):
            return None
        axis, one = tensor_meta(z).channel_axis, torch.ones_like(excess)
        backward = backward_region(z, node, Affine.per_channel(one, -excess, rank(z), axis))
        forward = forward_region(node, Affine.per_channel(one, excess, rank(z), axis))
        summary = f"{int((excess > 0).sum())} of {len(excess)} channels by up to {float(excess.max()):.3g}"
        return Match(node, summary, (excess, backward, forward))

    def check(self, match: Match) -> Reject | None:
        for region in match.data[1:]:
            if not isinstance(region, Region):
                return Reject(f"{region.node.name}: {region.reason}", match.node)
        return None

    def rewrite(self, match: Match, gm: fx.GraphModule) -> None:
        excess, backward, forward = match.data
        for tensor, affine in backward.tensors.items():
            transform_meta(tensor, affine)
        for tensor, affine in forward.tensors.items():
            transform_meta(tensor, affine.inverse())
        for region in (backward, forward):
            for edit in region.edits:
                apply_edit(gm, edit, region is backward)
        _lower_ceiling(gm, match.node, excess)

    def apply(self, plan: Plan) -> PassResult:
        result = super().apply(plan)
        erase_dead(plan.graph_module)
        return result


def _is_relu(gm: fx.GraphModule, clamp: fx.Node) -> bool:
    lo, _ = bounds(gm, clamp)
    return lo is not None and not bool(torch.as_tensor(lo).any())


def _excess(z: fx.Node) -> Tensor | None:
    """``max(0, mean - 3 std)`` per channel (C,), None without per-channel statistics."""
    meta = tensor_meta(z)
    if meta.statistics is None or meta.statistics.channels is None or meta.channel_axis is None:
        return None
    if meta.statistics.channels != shape(z)[meta.channel_axis]:
        return None
    excess = meta.statistics.mean - SIGMAS * meta.statistics.std
    return torch.where(excess > NEGLIGIBLE * (1 + meta.statistics.std), excess, 0.0)


def _lower_ceiling(gm: fx.GraphModule, clamp: fx.Node, excess: Tensor) -> None:
    """clamp(z, 0, hi) -> clamp(z - c, 0, hi - c)."""
    _, hi = bounds(gm, clamp)
    if hi is None:
        return
    value, ndim = clamp.meta["val"], rank(clamp)
    new = torch.as_tensor(hi, dtype=torch.float64) - along_axis(excess, tensor_meta(clamp).channel_axis, ndim)
    with gm.graph.inserting_before(clamp):
        constants = [
            add_constant(gm, f"{clamp.name}_bound", v.to(value.dtype), clamp) for v in (torch.zeros_like(new), new)
        ]
    clamp.target, clamp.args, clamp.kwargs = CHANNEL_CLAMP, (clamp.args[0], *constants), {}
