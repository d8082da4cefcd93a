"""Fuse an explicit pad into the convolution that reads it.

    conv(pad(x, sides, value), w, padding=p, pad_value=z)  ->  conv(x, w, padding=p + sides, pad_value=value)

when both pads agree: ``value == z``, or the convolution does not pad itself. Source: own (docs/passes.md).
"""

from __future__ import annotations

import torch
from torch import fx

from fxcompress.graph import argument, constant, is_call, single_user
from fxcompress.rewrite import Effect, Fact, Level, Match, Reject, RewriteRule

ops = torch.ops.fxcompress


class FusePadding(RewriteRule):
    name = "fuse_padding"
    level = Level.INTEGER
    effect = Effect.EXACT
    source = "docs/passes.md"
    needs = {Fact.LOWERED}

    def match(self, node: fx.Node) -> Match | None:
        if is_call(node, ops.conv.default) and is_call(node.args[0], ops.pad.default):
            return Match(node, f"absorbs {node.args[0].name}")
        return None

    def check(self, match: Match) -> Reject | None:
        conv, pad = match.node, match.node.args[0]
        gm = conv.graph.owning_module
        if single_user(pad) is not conv:
            return Reject("the padded tensor has other consumers", conv)
        if len(pad.args[1]) != len(argument(conv, "padding")):
            return Reject("it pads channels", conv)
        if any(argument(conv, "padding")) and not _same_value(gm, pad.args[2], argument(conv, "pad_value")):
            return Reject("the two pads have different values", conv)
        return None

    def rewrite(self, match: Match, gm: fx.GraphModule) -> None:
        conv, pad = match.node, match.node.args[0]
        x, sides, value = pad.args
        conv.args = (
            x,
            *conv.args[1:4],
            [a + b for a, b in zip(conv.args[4], sides, strict=True)],
            *conv.args[5:7],
            value,
        )


def _same_value(gm: fx.GraphModule, a: fx.Node, b: fx.Node) -> bool:
    first, second = constant(gm, a), constant(gm, b)
    return first.shape == second.shape and torch.equal(first, second)
