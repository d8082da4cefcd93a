"""The channels of every tensor of a network, found operator by operator: what the rules of ``channel_rules`` see and change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..graph import is_constant, rank
from ..rewrite import Reject
from .affine_rules import Blocked
from .labels import FIXED, Labels
from .quantization import activations

NAN = float("nan")


@dataclass(frozen=True)
class Channels:
    """``labels`` int64 and ``rest`` float64 of one tensor, of its rank for one sample; each dimension 1 or the tensor's."""

    labels: Tensor
    rest: Tensor

    @classmethod
    def fixed(cls, node: fx.Node) -> Channels:
        """Nothing of the tensor can be removed."""
        ones = [1] * rank(node)
        return cls(torch.full(ones, FIXED), torch.full(ones, NAN, dtype=torch.float64))

    @property
    def varying(self) -> list[int]:
        return [dim for dim, size in enumerate(self.labels.shape) if size > 1]


@dataclass(frozen=True)
class Claim:
    """``user`` reads the constant ``target`` with ``labels`` along ``axis``; None: along whichever its result is cut.

    ``writes``: the constant is set to zero where the labels are masked.
    """

    user: fx.Node
    target: str
    axis: int | None
    labels: Tensor | None
    writes: bool


class Tracer:
    """What rules see and change: the channels of the tensors so far, labels, claims on constants."""

    def __init__(self, gm: fx.GraphModule, rules: Mapping[object, Rule]):
        self.gm, self.rules, self.labels = gm, rules, Labels()
        self.channels: dict[fx.Node, Channels] = {}
        self.claims: list[Claim] = []
        self.inputs: dict[fx.Node, Channels] = {}  # of layers, () or along their columns

    def of(self, node: fx.Node) -> Channels:
        return self.channels[node] if node in self.channels else Channels.fixed(node)

    def visit(self, node: fx.Node) -> None:
        """Label the tensor that ``node`` computes."""
        try:
            if node.op != "call_function":
                raise Blocked("it is a graph input", node)
            rule = self.rules.get(node.target)
            if rule is None:
                raise Blocked(f"nothing is known about {node.target}", node)
            self.channels[node] = rule(self, node)
        except Blocked as blocked:
            for source in activations(node):
                self.fix(self.of(source).labels, blocked.reject)
            self.channels[node] = Channels.fixed(node)

    def fix(self, labels: Tensor, reason: Reject) -> None:
        self.labels.fix(labels, reason)

    def along(self, channels: Channels, axis: int) -> Channels:
        """Labels and rest of a tensor whose other dimensions are not to be cut."""
        return Channels(self.labels.along(channels.labels, axis), uniform(channels.rest, axis))

    def claim(self, node: fx.Node, operand: object, axis: int, labels: Tensor, *, writes: bool) -> None:
        """``node`` reads the constant ``operand``, if there is one, with ``labels`` (size,) along ``axis``."""
        if operand is None:
            return
        if not is_constant(operand):
            raise Blocked("its weight is computed at run time", node)
        self.claims.append(Claim(node, operand.target, axis, labels, writes))


def uniform(values: Tensor, axis: int) -> Tensor:
    """``values`` made to vary along ``axis`` only: NaN where they differ along the others."""
    for dim in range(values.ndim):
        if dim != axis % values.ndim and values.shape[dim] > 1:
            first = values.narrow(dim, 0, 1)
            values = torch.where((values == first).all(dim, keepdim=True), first, NAN)
    return values


def zero_rest(node: fx.Node) -> Tensor:
    return torch.zeros([1] * rank(node), dtype=torch.float64)


#: ``rule(tracer, node)``: the channels of the tensor that a node computes. Raises ``Blocked`` where nothing is known.
Rule = Callable[[Tracer, fx.Node], Channels]
