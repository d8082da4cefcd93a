"""``State``: one walk over a qdq graph. Lowering rules are functions ``rule(state, node) -> Value``."""

from __future__ import annotations

from torch import Tensor, fx

from ..meta import tensor_meta
from ..options import context
from .builder import Builder
from .values import Accumulator, Branch, Value


class State:
    """What a lowering rule may read and write.

    Attributes:
        gm: the qdq graph being lowered.
        build: emits into the integer graph.
        values: what the qdq nodes so far became.
        integer_io: graph inputs and outputs stay integers.
    """

    def __init__(self, gm: fx.GraphModule):
        self.gm, self.build = gm, Builder(gm)
        self.values: dict[fx.Node, Value] = {}
        self.integer_io = context(gm).options.integer_io

    def accumulate(self, node: fx.Node, new: fx.Node, scale: Tensor, bound: int) -> Accumulator:
        """``new``, the int32 form of ``node``, as an accumulator; its magnitude is the range chosen for ``node``."""
        chosen = tensor_meta(node).range
        magnitude = max(abs(v) for v in chosen.bounds) if chosen is not None else bound * float(scale.max())
        return Accumulator((Branch(new, scale, bound, magnitude),))


def per_dim(value, n: int) -> list[int]:
    """An operator's int or int list as one number per spatial dimension ([] stays [])."""
    value = [value] if isinstance(value, int) else list(value)
    return value * n if len(value) == 1 else value
