"""Bring every clamp right behind the operation that accumulates, where it costs nothing.

    clamp(clamp(x, a, b), c, d)       ->  clamp(x, clip(a, c, d), clip(b, c, d))
    clamp(max_pool(x))                ->  max_pool(clamp(x))             clamp is monotone
    clamp(reshape(x)), slice, ...     ->  reshape(clamp(x))              values only move
    clamp(constant_pad_nd(x, v))      ->  constant_pad_nd(clamp(x), clip(v))
    clamp(cat([x, y]))                ->  cat([clamp(x), clamp(y)])

Level: float. Effect: EXACT. Site preconditions: every node between the accumulating operation and the clamp has one user.
Each rewrite removes a clamp or moves one towards the inputs, so it ends.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxcompress.dialects import (
    ADD,
    AVERAGES,
    BATCH_NORM,
    CAT,
    CLAMP,
    MATMUL,
    MAX_POOLS,
    MOVEMENT,
    MUL,
    NORMALIZATIONS,
    SUB,
    WEIGHTED,
)  # fmt: skip
from fxcompress.graph import bounds, is_call
from fxcompress.meta import carry, describe, inherit_origin, tensor_meta
from fxcompress.rewrite import Effect, Level, Match, Reject, RewriteRule
from fxcompress.shapes import compute

PAD = torch.ops.aten.constant_pad_nd.default
#: Operations whose int32 result is rounded to codes: a clamp right behind them is the bounds of that rounding.
ACCUMULATING = WEIGHTED | AVERAGES | NORMALIZATIONS | {ADD, SUB, MUL, MATMUL, BATCH_NORM}
PASSED = MAX_POOLS | MOVEMENT | {CAT}


class FuseActivation(RewriteRule):
    """Merge consecutive clamps and move clamps towards the operation they limit.

    >>> print(FuseActivation().plan(gm))                                                  # doctest: +SKIP
    fuse_activation: 1 rewrites, 0 refusals
      clamp_3 [features.relu (net.py:20)]: before max_pool2d
    """

    name = "fuse_activation"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "docs/passes.md"

    def match(self, node: fx.Node) -> Match | None:
        if not is_call(node, CLAMP):
            return None
        source = node.args[0]
        if is_call(source, CLAMP):
            return Match(node, f"merge with {source.name}")
        return Match(node, f"before {source.name}") if is_call(source, *PASSED) else None

    def check(self, match: Match) -> Reject | None:
        for node in _origins(match.node.args[0]):
            if len(node.users) != 1:
                return Reject(f"{node.name} has {len(node.users)} users", match.node)
            if not is_call(node, *ACCUMULATING, CLAMP, *PASSED):
                return Reject(f"{node.name} does not accumulate", match.node)
            if bool(node.meta.get("keep_float")) != bool(match.node.meta.get("keep_float")):
                return Reject(f"only one of them and {node.name} is kept in float", match.node)
        return None

    def rewrite(self, match: Match, gm: fx.GraphModule) -> None:
        clamps = _step(gm, match.node)
        while clamps:  # as far as each can go
            again = self.match(clamps.pop())
            if again is not None and self.check(again) is None:
                clamps += _step(gm, again.node)


def _step(gm: fx.GraphModule, clamp: fx.Node) -> list[fx.Node]:
    """Merge a clamp with the one before it, or move it in front of its source; returns the new clamps, the last first."""
    source = clamp.args[0]
    if is_call(source, CLAMP):
        clamp.args = (source.args[0], *merged(bounds(gm, source), bounds(gm, clamp)))
        gm.graph.erase_node(source)
        return []
    moved = _move(gm, clamp, source)
    origin = tensor_meta(source).origin
    clamp.replace_all_uses_with(carry(clamp, source))  # the source now computes what the clamp did
    describe(source, origin=origin)
    gm.graph.erase_node(clamp)
    return moved[::-1]


def _origins(node: fx.Node) -> list[fx.Node]:
    """``node``, what it passes values on from, and so on, up to the first nodes that compute."""
    found, stack = {}, [node]
    while stack:
        current = stack.pop()
        if current not in found:
            found[current] = None
            if is_call(current, *PASSED):
                stack += current.args[0] if is_call(current, CAT) else [current.args[0]]
    return list(found)


def clip(value: float, lo: float | None, hi: float | None) -> float:
    """min(max(value, lo), hi) where None is no bound."""
    raised = value if lo is None else max(value, lo)
    return raised if hi is None else min(raised, hi)


def merged(inner: tuple, outer: tuple) -> tuple[float | None, float | None]:
    """Bounds of the one clamp that is outer(inner(x)).

    >>> merged((0.0, None), (None, 6.0))
    (0.0, 6.0)
    """
    lo = clip(-math.inf if inner[0] is None else inner[0], *outer)
    hi = clip(math.inf if inner[1] is None else inner[1], *outer)
    return None if lo == -math.inf else lo, None if hi == math.inf else hi


def _move(gm: fx.GraphModule, clamp: fx.Node, source: fx.Node) -> list[fx.Node]:
    """Put the clamp on the operands of ``source``; returns the new clamps."""
    lo, hi = bounds(gm, clamp)
    new: dict[fx.Node, fx.Node] = {}
    with gm.graph.inserting_before(source):
        for operand in dict.fromkeys(source.args[0] if is_call(source, CAT) else [source.args[0]]):
            new[operand] = inherit_origin(clamp, gm.graph.call_function(CLAMP, (operand, lo, hi)))
            if clamp.meta.get("keep_float"):
                new[operand].meta["keep_float"] = True
            compute(gm, new[operand])
    for operand, limited in new.items():
        source.replace_input_with(operand, limited)
    if is_call(source, PAD):
        value = source.args[2] if len(source.args) > 2 else 0.0
        source.args = (*source.args[:2], clip(float(value), lo, hi))
    return list(new.values())
