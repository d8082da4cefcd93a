"""``State``: one walk over a qdq graph. Lowering rules are functions ``rule(state, node) -> Value``."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from ..graph import constant, is_constant, rank
from ..meta import along_axis, tensor_meta
from ..options import context
from .builder import Builder
from .values import Accumulator, Branch, Value

#: Data-free ranges of sums of correlated branches come out up to 1.7 times too narrow (docs/accuracy.md): a branch that
#: saturates in front of an addition would be wrong by many steps, one guard bit less costs 1/64 step.
DATA_FREE_HEADROOM = 2.0


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
        """``new``, the int32 form of ``node``, as an accumulator; its magnitude is that of the range chosen for ``node``."""
        return Accumulator((Branch(new, scale, bound, self.magnitude(node, bound * float(scale.abs().max()))),))

    def scale(self, node: fx.Node, value: Accumulator, factor: float) -> Accumulator:
        """``node``, which is ``factor`` times the unrounded ``value``."""
        scaled = value.scaled(factor)
        if len(scaled.branches) > 1:
            return scaled
        (branch,) = scaled.branches
        largest = branch.bound * float(branch.scale.abs().max())
        return replace(scaled, branches=(replace(branch, magnitude=self.magnitude(node, largest)),))

    def magnitude(self, node: fx.Node, largest: float) -> float | Tensor:
        """Largest |real| of an accumulator that has to be represented, at most ``largest``: per channel where that is known."""
        chosen, axis = tensor_meta(node).range, tensor_meta(node).channel_axis
        if chosen is None:
            return largest
        headroom = 1.0 if chosen.provenance.startswith("calibrated") else DATA_FREE_HEADROOM
        ends = torch.maximum(chosen.lo.abs(), chosen.hi.abs()).double()
        ends = along_axis(ends, axis, rank(node)) if axis is not None else ends.max()
        return (headroom * ends).clamp(max=largest)

    def index(self, node: fx.Node) -> fx.Node | Tensor:
        """An integer tensor as an argument: the node computed at run time, or the constant."""
        return constant(self.gm, node) if is_constant(node) else self.values[node].node
