"""Where a float graph is cut into 8-bit codes: the question behind ranges, quantization and lowering.

Every activation is either

* an *accumulator*: the int32 result of a sum that its one consumer takes without rounding (conv + clamp,
  conv + add + clamp, a graph output), or
* *codes*: rounded to 8 bits once, right behind the last operator that could be fused.

Codes that only move (reshape, slice, max pool, concat) keep their values, so a tensor and its movements form a *tied
set* with one scale.
"""

from __future__ import annotations

import networkx as nx
from torch import fx

from ..dialects import (
    ADD,
    AVERAGES,
    CAT,
    CHANNEL_CLAMP,
    CLAMP,
    MATMUL,
    MAX_POOLS,
    MOVEMENT,
    MUL,
    NORMALIZATIONS,
    RESIZES,
    SOFTMAXES,
    SUB,
    UNARY,
    WEIGHTED,
)  # fmt: skip
from ..graph import is_call, is_constant, is_float, shape

#: Operators whose integer form is an int32 tensor that is rounded to codes later: sums, and normalized rows.
ACCUMULATING = WEIGHTED | AVERAGES | RESIZES | SOFTMAXES | NORMALIZATIONS | {ADD, SUB, MUL, MATMUL}
#: Operators that move codes or select among them: input and output share scale and zero point.
TYING = MOVEMENT | MAX_POOLS | {CAT}


def activations(node: fx.Node) -> list[fx.Node]:
    """The float activation inputs of a node (constants excluded), each once, in argument order."""
    return [a for a in node.all_input_nodes if not is_constant(a) and is_float(a)]


def is_activation(node: fx.Node) -> bool:
    """A float tensor that is computed or fed at run time."""
    return node.op in ("placeholder", "call_function") and is_float(node)


def is_function(node: fx.Node) -> bool:
    """An elementwise function of one tensor (numbers and defaults aside): a table when its input is codes."""
    if node.op != "call_function":
        return False
    if node.target in UNARY or node.target is CLAMP:
        return True
    return (
        is_call(node, ADD, SUB, MUL)
        and len(node.all_input_nodes) == 1
        and any(isinstance(a, int | float) for a in node.args[:2])
    )


def is_scaling(node: fx.Node) -> bool:
    """A product with a positive number: of an unrounded sum, it is part of the multiplier of the rounding."""
    return is_call(node, MUL) and isinstance(node.args[1], int | float) and node.args[1] > 0


def keeps_float(node: fx.Node) -> bool:
    """The user asked to leave this node in floating point (``keep_float``)."""
    return bool(node.meta.get("keep_float"))


class QuantizationPoints:
    """The cut of one float graph: which activations are accumulators, which are codes, which codes are tied.

    >>> points = QuantizationPoints(gm)                                       # doctest: +SKIP
    >>> [n.name for n in points.codes]                                        # doctest: +SKIP
    ['x', 'clamp', 'clamp_1', ...]
    """

    def __init__(self, gm: fx.GraphModule):
        self._raw: dict[fx.Node, bool] = {}
        self._terminal: dict[fx.Node, bool] = {}
        self._accumulator: dict[fx.Node, bool] = {}
        nodes = [n for n in gm.graph.nodes if is_activation(n)]
        for node in nodes:
            self._raw[node] = self._has_raw_value(node)
        for node in reversed(list(gm.graph.nodes)):
            self._terminal[node] = self._is_terminal(node)
        for node in nodes:
            self._accumulator[node] = self._is_accumulator(node)
        self.codes = [n for n in nodes if not self._accumulator[n] and self._needs_codes(n)]
        self._is_codes = set(self.codes)

    # -- queries

    def is_accumulator(self, node: fx.Node) -> bool:
        return self._accumulator.get(node, False)

    def is_codes(self, node: fx.Node) -> bool:
        return node in self._is_codes

    def reads_raw(self, node: fx.Node, user: fx.Node) -> bool:
        """``user`` takes the unrounded value of ``node``: graph outputs do, so that logits are not clipped."""
        return user.op == "output" and (self._raw[node] or keeps_float(node))

    def destination(self, node: fx.Node) -> fx.Node | None:
        """The codes an accumulator ends up in (conv -> clamp, conv -> add -> clamp), None for a graph output."""
        while self.is_accumulator(node):
            users = [u for u in node.users if u.op != "output"]
            if not users:
                return None
            node = users[0]
        return node if self.is_codes(node) else None

    def tied_sets(self) -> list[list[fx.Node]]:
        """Codes that must share one scale and zero point, each set in topological order."""
        graph = nx.Graph()
        graph.add_nodes_from(self.codes)
        for node in self.codes:
            if node.op == "call_function" and node.target in TYING and not keeps_float(node):
                graph.add_edges_from((a, node) for a in activations(node) if self.is_codes(a))
        position = {n: i for i, n in enumerate(self.codes)}
        sets = [sorted(component, key=position.__getitem__) for component in nx.connected_components(graph)]
        return sorted(sets, key=lambda tied: position[tied[0]])

    def sources(self, tied: list[fx.Node]) -> list[fx.Node]:
        """Members of a tied set that compute values (the others only move them): their ranges are the set's."""
        return [n for n in tied if n.op == "placeholder" or n.target not in TYING or keeps_float(n)] or tied[:1]

    def branches(self) -> list[fx.Node]:
        """Accumulators that join an addition: their magnitude decides the guard bits."""
        return [n for n in self._accumulator if self._accumulator[n] and any(is_call(u, ADD, SUB) for u in n.users)]

    # -- rules

    def _has_raw_value(self, node: fx.Node) -> bool:
        """The integer graph has an unrounded int32 form of this node's value."""
        if node.op != "call_function" or keeps_float(node):
            return False
        if node.target in ACCUMULATING or node.target is CHANNEL_CLAMP or is_function(node):
            return True
        moves = node.target in MOVEMENT or node.target is CAT
        return moves and all(self._raw[a] and len(a.users) == 1 for a in activations(node))

    def _is_terminal(self, node: fx.Node) -> bool:
        """Nothing but data movement and clamps of unrounded values lies between this node and the graph outputs."""
        if node.op == "output":
            return True
        return bool(node.users) and all(
            user.op == "output"
            or (
                is_call(user, CLAMP, CHANNEL_CLAMP, CAT, *MOVEMENT)
                and self._raw.get(user, False)
                and self._terminal[user]
            )
            for user in node.users
        )

    def _is_accumulator(self, node: fx.Node) -> bool:
        if not self._raw[node]:
            return False
        if self._terminal[node]:
            return True
        if len(node.users) != 1 or node.target not in ACCUMULATING:
            return False
        if is_function(node) and not (is_scaling(node) and self._accumulator[node.args[0]]):
            return False
        user = next(iter(node.users))
        if keeps_float(user):
            return False
        if is_call(user, CLAMP, CHANNEL_CLAMP) or is_scaling(user):
            return True
        return is_call(user, ADD, SUB) and not is_function(user) and shape(user) == shape(node)

    def _needs_codes(self, node: fx.Node) -> bool:
        if keeps_float(node):  # only where an integer operator reads it
            return any(u.op != "output" and not keeps_float(u) for u in node.users)
        return bool(node.users)


def ranged_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Nodes whose range is needed: the sources of every tied set, and the branches of additions."""
    points = QuantizationPoints(gm)
    wanted = {n for tied in points.tied_sets() for n in points.sources(tied)} | set(points.branches())
    return [n for n in gm.graph.nodes if n in wanted]
