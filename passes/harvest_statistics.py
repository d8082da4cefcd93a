"""Read what batch norm knows about its tensors, before folding destroys it.

    output of batch norm:   mean = beta    std = |gamma|              per channel, hard bounds unknown
    input of batch norm:    mean = mu      std = sqrt(var + eps)      unless it carries statistics already

The batch norm behind a graph input is the user's ``input_normalization``; the plain affines that other passes spell as
batch norm (eps 0) were not trained either: neither says anything about a distribution.

Level: float. Effect: EXACT (the graph is not touched).   Source: Nagel et al. 2019, section 4.1; Cai et al. 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.analysis.affine import batch_norm_affine, is_plain_affine
from fxcompress.dialects import BATCH_NORM
from fxcompress.graph import argument, constant, is_call
from fxcompress.meta import Statistics, describe, tensor_meta
from fxcompress.rewrite import Effect, Fact, Level, Match, RewriteRule


class HarvestStatistics(RewriteRule):
    name = "harvest_statistics"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "Nagel et al. 2019, Data-Free Quantization, section 4.1"
    establishes = frozenset({Fact.STATISTICS})

    def match(self, node: fx.Node) -> Match | None:
        if not is_call(node, BATCH_NORM) or tensor_meta(node).statistics is not None:
            return None
        gm = node.graph.owning_module
        scale, _ = batch_norm_affine(gm, node)  # raises for broken statistics
        if node.args[0].op == "placeholder" or is_plain_affine(gm, node):
            return None
        return Match(node, f"{len(scale)} channels")

    def rewrite(self, match: Match, gm: fx.GraphModule) -> None:
        node, source = match.node, match.node.args[0]
        mean, var = (constant(gm, argument(node, name)).double() for name in ("running_mean", "running_var"))
        gamma, beta = argument(node, "weight"), argument(node, "bias")
        describe(
            node,
            statistics=_gaussian(
                torch.zeros_like(mean) if beta is None else constant(gm, beta).double(),
                torch.ones_like(mean) if gamma is None else constant(gm, gamma).double().abs(),
            ),
        )
        along_channels = tensor_meta(source).channel_axis in (1, None)
        if tensor_meta(source).statistics is None and along_channels:
            describe(source, statistics=_gaussian(mean, (var + argument(node, "eps")).sqrt()))


def _gaussian(mean: Tensor, std: Tensor) -> Statistics:
    infinity = torch.full_like(mean, torch.inf)
    return Statistics(mean.detach(), std.detach(), -infinity, infinity, "batch_norm")
