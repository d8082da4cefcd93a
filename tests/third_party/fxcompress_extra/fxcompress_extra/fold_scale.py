"""conv(x, w, b) * c  ->  conv(x, w * c, b * c)"""

import torch

from fxcompress import Effect, Level, Match, Reject, RewriteRule
from fxcompress.graph import add_constant, constant, is_call, single_user
from fxcompress.meta import describe

aten = torch.ops.aten


class FoldScale(RewriteRule):
    name = "fold_scale"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "distributivity"

    def match(self, node):
        if (
            is_call(node, aten.mul.Tensor)
            and is_call(node.args[0], aten.conv2d.default)
            and isinstance(node.args[1], float)
        ):
            return Match(node, f"scales the weights by {node.args[1]}")

    def check(self, match):
        if single_user(match.node.args[0]) is None:
            return Reject("the convolution has other consumers", match.node)

    def rewrite(self, match, gm):
        conv, factor = match.node.args
        for i, parameter in enumerate(conv.args[1:3], 1):
            if parameter is not None:
                with gm.graph.inserting_before(conv):
                    conv.update_arg(i, add_constant(gm, parameter.target, constant(gm, parameter) * factor, conv))
        describe(conv, statistics=None)
        match.node.replace_all_uses_with(conv)
