"""Turn batch norm that could not be folded into a depthwise 1x1 convolution.

    batch_norm(x)  ->  conv(x, weight=a (C, 1, *1), bias=d, groups=C)       a = gamma/sqrt(var+eps), d = beta - a*mu

With one weight per channel and per-channel scales the weight quantizes to +-127 without error, so the integer form is
one multiply-add per channel. A tensor (N, C) passes as (N, C, 1).

Level: float. Effect: EXACT. Site preconditions: rank 2 to 5.
"""

from __future__ import annotations

import torch
from torch import fx

from fxcompress.analysis.affine import batch_norm_affine
from fxcompress.dialects import BATCH_NORM
from fxcompress.graph import add_constant, erase_dead, is_call, rank
from fxcompress.meta import carry, inherit_origin
from fxcompress.rewrite import Effect, Fact, Level, Match, PassResult, Plan, Reject, RewriteRule

aten = torch.ops.aten
_CONVOLUTION = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}


class ExpandBatchNorm(RewriteRule):
    name = "expand_batch_norm"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "a per-channel affine map is a depthwise 1x1 convolution"
    needs = frozenset({Fact.BATCH_NORM_FOLDED})

    def match(self, node: fx.Node) -> Match | None:
        if is_call(node, BATCH_NORM) and not node.meta.get("keep_float"):
            return Match(node, "into a depthwise 1x1 convolution")
        return None

    def check(self, match: Match) -> Reject | None:
        if not 2 <= rank(match.node) <= 5:
            return Reject(f"no convolution takes a tensor of rank {rank(match.node)}", match.node)
        return None

    def rewrite(self, match: Match, gm: fx.GraphModule) -> None:
        node, x, graph = match.node, match.node.args[0], gm.graph
        scale, shift = batch_norm_affine(gm, node)
        count, ndim, dtype = len(scale), max(rank(node), 3), node.meta["val"].dtype
        spatial = ndim - 2
        with graph.inserting_before(node):
            weight = add_constant(gm, f"{node.name}_weight", scale.reshape(-1, 1, *[1] * spatial).to(dtype), like=node)
            bias = add_constant(gm, f"{node.name}_bias", shift.to(dtype), like=node)
            if rank(node) == 2:
                x = inherit_origin(node, graph.call_function(aten.reshape.default, (x, [-1, count, 1])))
            ones, zeros = [1] * spatial, [0] * spatial
            new = graph.call_function(_CONVOLUTION[ndim], (x, weight, bias, ones, zeros, ones, count))
            if rank(node) == 2:
                inherit_origin(node, new)
                new = graph.call_function(aten.reshape.default, (new, [-1, count]))
        node.replace_all_uses_with(carry(node, new))
        graph.erase_node(node)

    def apply(self, plan: Plan) -> PassResult:
        result = super().apply(plan)
        erase_dead(plan.graph_module)
        return result
