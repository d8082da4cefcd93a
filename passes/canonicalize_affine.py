"""Spell every per-channel multiplication and addition as one operator: batch norm with mean 0, variance 1, eps 0.

    x * c  ->  batch_norm(x, weight=c, bias=0)       c: a number, (C,), (C, 1, 1), (1, C, 1, 1), ... along dimension 1
    x + c  ->  batch_norm(x, weight=1, bias=c)
    x - c  ->  batch_norm(x, weight=1, bias=-c)      c - x  ->  batch_norm(x, weight=-1, bias=c)
    a2 * (a1 * x + d1) + d2  ->  batch_norm(x, weight=a2 * a1, bias=a2 * d1 + d2)

so that ``fold_batch_norm`` folds them like any batch norm. Runs behind ``harvest_statistics``: these affines carry no
statistics of their own.

Level: float. Effect: EXACT. Site preconditions: the tensor's channels are its dimension 1, the constant varies along it only.
"""

from __future__ import annotations

from torch import fx

from fxcompress.analysis.affine import affine_arguments, batch_norm_affine, constant_affine, is_plain_affine
from fxcompress.dialects import ADD, BATCH_NORM, MUL, SUB
from fxcompress.graph import erase_dead, is_call, is_constant, rank, shape, single_user
from fxcompress.meta import carry, tensor_meta
from fxcompress.rewrite import Effect, Fact, Level, Match, PassResult, Plan, Reject, RewriteRule


class CanonicalizeAffine(RewriteRule):
    name = "canonicalize_affine"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "y = a x + d per channel is batch norm with mean 0 and variance 1"
    needs = frozenset({Fact.STATISTICS})

    def match(self, node: fx.Node) -> Match | None:
        if not is_call(node, ADD, SUB, MUL) or node.meta.get("keep_float"):
            return None
        if not any(is_constant(operand) or isinstance(operand, (int, float)) for operand in node.args):
            return None
        found = constant_affine(node.graph.owning_module, node)
        summary = "per-channel affine" if found is None else f"per-channel affine of {found[0].name}"
        return Match(node, summary, found)

    def check(self, match: Match) -> Reject | None:
        node = match.node
        if match.data is None:
            return Reject("the constant enlarges the tensor or nothing else is read", node)
        x, affine = match.data
        axis = tensor_meta(node).channel_axis
        if axis != 1 or rank(x) < 2:
            return Reject(f"the channel axis of its tensor is {axis}, batch norm scales axis 1", node)
        if affine.varies_outside(1):
            return Reject(f"the constant of shape {_constant_shape(node)} varies within a channel", node)
        return None

    def rewrite(self, match: Match, gm: fx.GraphModule) -> None:
        node = match.node
        x, affine = match.data
        scale, shift = affine.channels(shape(x)[1])
        if is_call(x, BATCH_NORM) and is_plain_affine(gm, x) and single_user(x) is node:
            inner_scale, inner_shift = batch_norm_affine(gm, x)
            x, scale, shift = x.args[0], scale * inner_scale, scale * inner_shift + shift
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(BATCH_NORM, affine_arguments(gm, x, scale, shift, like=node))
        node.replace_all_uses_with(carry(node, new))
        gm.graph.erase_node(node)

    def apply(self, plan: Plan) -> PassResult:
        result = super().apply(plan)
        erase_dead(plan.graph_module)
        return result


def _constant_shape(node: fx.Node) -> tuple:
    return next(tuple(shape(operand)) for operand in node.args if is_constant(operand))
