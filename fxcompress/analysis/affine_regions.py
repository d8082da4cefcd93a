"""Where a per-channel affine map ``y = scale * x + shift`` can move to: the question behind batch-norm folding.

    backward_region(tensor, reader, affine)    into the layers that write ``tensor``
    forward_region(tensor, affine)             into the layers that read ``tensor``

Both walk the graph through every node that commutes with the map until each path ends in a layer that absorbs it, and
return a ``Region`` (what to edit, which tensors change meaning) or a ``Reject`` naming the obstacle. They never mutate.

    node                               backward                              forward
    conv, linear, transposed conv      absorb: output channels               absorb: input channels
    batch norm                         absorb                                absorb
    constant operand                   multiply-add into it                  divide it by the scale
    add, sub                           scale to both, shift to one           one scale, the shifts add up
    cat                                split by offsets                      joined; other operands keep (1, 0)
    average pool, mean, resize         unchanged (zero padding: no shift)    the same
    max pool                           unchanged if every scale > 0          the same
    homogeneous activation             unchanged if scale > 0, no shift      the same
    reshape, permute, slice, ...       follow the elements                   follow the elements
    constant pad                       if its value maps to itself           the same, or one value per channel
    anything else, inputs, outputs     blocked                               blocked

Source: Nagel et al. 2019 for adjacent pairs; for regions, commutation of each operator with the map, as tabled here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from .. import dialects as d
from ..graph import argument, is_call, is_constant, rank, shape, twins
from ..meta import place
from ..rewrite import Reject
from .affine import Affine
from .affine_rules import (
    CHANNELWISE,
    LAYERS,
    MOVEMENT,
    PAD,
    Blocked,
    is_transparent,
    mean_dimensions,
    padded_dimensions,
    pull_movement,
    push_movement,
    require_commuting,
    require_layer,
)
from .layer_weights import Twins

MEAN = torch.ops.aten.mean.dim


@dataclass(frozen=True, eq=False)
class Edit:
    """One leaf of a region: ``node`` absorbs ``affine``.

    Attributes:
        node: a weighted layer or batch norm; or the reader of a constant, or a pad, whose value changes.
        affine: backward, the map of the node's result; forward, of its input. For a constant: of the constant.
        constant: the constant operand of ``node`` to replace by its map.
        padding: (C,) what ``node`` must pad its input with from now on, instead of its own padding value.
    """

    node: fx.Node
    affine: Affine
    constant: fx.Node | None = None
    padding: Tensor | None = None


@dataclass(eq=False)
class Region:
    """All ``edits`` together move the map. ``tensors``: the map each tensor on the way takes on (backward) or loses."""

    edits: list[Edit] = field(default_factory=list)
    tensors: dict[fx.Node, Affine] = field(default_factory=dict)

    @property
    def layers(self) -> list[fx.Node]:
        """The layers that absorb the map."""
        return [e.node for e in self.edits if e.constant is None and is_call(e.node, *LAYERS)]


def backward_region(tensor: fx.Node, reader: fx.Node, affine: Affine, shared: Twins | None = None) -> Region | Reject:
    """Move ``affine``, which ``reader`` applies to ``tensor``, into everything that writes ``tensor``.

    Afterwards ``tensor`` holds what ``reader`` computed. No tensor on the way may have another consumer.
    ``shared``: ``twins`` of the graph, for a caller that asks about many nodes.
    """
    try:
        return _Backward(reader, twins(reader.graph) if shared is None else shared).search(tensor, affine)
    except Blocked as blocked:
        return blocked.reject


def forward_region(
    tensor: fx.Node, affine: Affine, bounds: tuple[float, float] | None = None, shared: Twins | None = None
) -> Region | Reject:
    """Move ``affine``, which computes ``tensor`` from some x, into everything that reads ``tensor``.

    Afterwards the readers take x. What was padded with v is then padded with ``(v - shift) / scale``: allowed only
    where these values lie within ``bounds``, the known interval of x, so that padding never widens x's range.
    """
    try:
        return _Forward(bounds, twins(tensor.graph) if shared is None else shared).search(tensor, affine)
    except Blocked as blocked:
        return blocked.reject


class _Backward:
    """Reverse topological order: when a node is reached, its readers inside the region have all said what they want."""

    def __init__(self, reader: fx.Node, shared: Twins):
        self.reader, self.shared = reader, shared
        self.region = Region()
        self.wanted: dict[fx.Node, Affine] = {}
        self.shiftable: dict[object, bool] = {}

    def search(self, tensor: fx.Node, affine: Affine) -> Region:
        self._want(self.reader, tensor, affine)
        passed_on = {
            self.reader
        }  # readers that take their operands mapped; a layer that absorbs takes its input as it is
        while self.wanted:
            node = max(self.wanted)
            affine = self.wanted.pop(node).settled()
            if node.op == "placeholder":
                raise Blocked("it is a graph input", node)
            outside = next((u for u in node.users if u not in passed_on), None)
            if outside is not None:
                raise Blocked(f"it is also read by {place(outside)}", node)
            self.region.tensors[node] = affine
            if is_call(node, *LAYERS):
                require_layer(node, affine, -1 if node.target is d.LINEAR else 1, self.shared)
                self.region.edits.append(Edit(node, affine))
            else:
                passed_on.add(node)
                self._pass_on(node, affine)
        return self.region

    def _pass_on(self, node: fx.Node, affine: Affine) -> None:
        """What the operands of a node that commutes must become."""
        if is_call(node, d.ADD, d.SUB):
            self._sum(node, affine)
        elif is_call(node, d.CAT):
            self._cat(node, affine)
        elif is_call(node, *MOVEMENT):
            self._want(node, node.args[0], affine.map(lambda t: pull_movement(node, t)))
        elif is_call(node, PAD):
            self._pad(node, affine)
        elif is_call(node, MEAN):
            self._mean(node, affine)
        elif is_transparent(node):
            require_commuting(node, affine)
            self._want(node, node.args[0], affine)
        else:
            raise Blocked(f"{node.target} does not commute with an affine map", node)

    def _want(self, reader: fx.Node, source: object, affine: Affine) -> None:
        """``source`` shall become ``affine(source)`` as far as ``reader`` is concerned."""
        if is_constant(source):
            if any(e.node is reader and e.constant is source for e in self.region.edits):
                raise Blocked("it reads one constant twice", reader)
            self.region.edits.append(Edit(reader, affine.settled(), constant=source))
            return
        if not isinstance(source, fx.Node) or rank(source) != affine.scale.ndim:
            raise Blocked("it broadcasts an operand", reader)
        if not affine.fits(shape(source)):
            raise Blocked(f"the map varies along a dimension that {source.name} does not have", reader)
        known = self.wanted.get(source, affine)
        self.wanted[source] = Affine(
            _agreed(known.scale, affine.scale, source), _agreed(known.shift, affine.shift, source)
        )

    def _sum(self, node: fx.Node, affine: Affine) -> None:
        left, right = node.args
        sign = -1 if node.target is d.SUB else 1
        if self._takes_shift(right) and not self._takes_shift(left):
            self._want(node, left, affine.without_shift())
            self._want(node, right, Affine(affine.scale, sign * affine.shift))
        else:
            self._want(node, left, affine)
            self._want(node, right, affine.without_shift())

    def _takes_shift(self, node: object) -> bool:
        """What writes ``node`` can absorb a shift, as far as operators tell."""
        stack = [node]  # no recursion: a chain of additions is as long as the network
        while stack:
            operands, decide = _shift_passes(stack[-1])
            answers = [self._known_shift(operand) for operand in operands]
            if decide is any and True in answers:  # found right here: the rest of the chain does not matter
                answers = [True]
            elif None in answers:
                stack.append(operands[answers.index(None)])
                continue
            self.shiftable[stack.pop()] = decide(answers)
        return self._known_shift(node)

    def _known_shift(self, node: object) -> bool | None:
        if not _shift_passes(node)[0]:
            return is_constant(node) or is_call(node, *LAYERS)
        return self.shiftable.get(node)

    def _cat(self, node: fx.Node, affine: Affine) -> None:
        dim, offset = argument(node, "dim") % rank(node), 0
        for operand in node.args[0]:
            size = shape(operand)[dim]
            self._want(node, operand, affine.map(lambda t, o=offset, n=size: _narrow(t, dim, o, n)))
            offset += size

    def _pad(self, node: fx.Node, affine: Affine) -> None:
        value = argument(node, "value") or 0
        if bool((affine.scale * value + affine.shift != value).any()):
            raise Blocked(f"its padding value {value} does not map to itself", node)
        inner = shape(node.args[0])
        for dim, before, _ in padded_dimensions(node):
            affine = affine.map(lambda t, k=dim, b=before: _narrow(t, k, b, inner[k]))
        self._want(node, node.args[0], affine)

    def _mean(self, node: fx.Node, affine: Affine) -> None:
        dims, keepdim = mean_dimensions(node)
        for dim in () if keepdim else dims:
            affine = affine.map(lambda t, k=dim: t.unsqueeze(k))
        self._want(node, node.args[0], affine)


class _Forward:
    """Topological order: when a node is reached, the maps of all its operands inside the region are known."""

    def __init__(self, bounds: tuple[float, float] | None, shared: Twins):
        self.bounds, self.shared = bounds, shared
        self.region = Region()
        self.readers: set[fx.Node] = set()

    def search(self, tensor: fx.Node, affine: Affine) -> Region:
        self._carries(tensor, affine)
        while self.readers:
            node = min(self.readers)
            self.readers.remove(node)
            if is_call(node, *LAYERS):
                self._layer(node)
            else:
                self._carries(node, self._result(node))
        return self.region

    def _carries(self, node: fx.Node, affine: Affine) -> None:
        """Old value of ``node`` = affine(new value)."""
        affine = affine.compact()
        if not affine.fits(shape(node)):
            raise Blocked("the map varies along a dimension without a fixed size", node)
        self.region.tensors[node] = affine
        self.readers.update(node.users)

    def _layer(self, node: fx.Node) -> None:
        if any(operand in self.region.tensors for operand in node.all_input_nodes[1:]):
            raise Blocked("it takes the tensor as its weight", node)
        affine = self.region.tensors[node.args[0]]
        require_layer(node, affine, -1 if node.target is d.LINEAR else 1, self.shared)
        if is_call(node, *d.TRANSPOSED_CONVOLUTIONS) and affine.shifts:
            raise Blocked("the borders of a transposed convolution see fewer shifts", node)
        padding = None
        if is_call(node, *d.CONVOLUTIONS) and any(argument(node, "padding")):
            padding = self._padding(node, affine, 0.0)
        self.region.edits.append(Edit(node, affine, padding=padding))

    def _result(self, node: fx.Node) -> Affine:
        if node.op == "output":
            raise Blocked("it is a graph output", node)
        if is_call(node, d.ADD, d.SUB):
            return self._sum(node)
        if is_call(node, d.CAT):
            return self._cat(node)
        affine = self.region.tensors.get(node.all_input_nodes[0])  # of operators with one activation, that one
        if affine is not None and is_call(node, *MOVEMENT):
            return affine.map(lambda t: push_movement(node, t))
        if affine is not None and is_call(node, PAD):
            return self._pad(node, affine)
        if affine is not None and is_call(node, MEAN):
            return self._mean(node, affine)
        if affine is not None and is_transparent(node):
            require_commuting(node, affine)
            return affine
        raise Blocked(f"{node.target} does not commute with an affine map", node)

    def _sum(self, node: fx.Node) -> Affine:
        maps = [self._operand(node, operand) for operand in node.args]
        scales = [m.scale for m in maps if m is not None]
        if not torch.equal(scales[0], scales[-1]):
            raise Blocked("its operands are scaled differently", node)
        for operand, affine in zip(node.args, maps):
            if affine is None:
                if not bool((scales[0] != 0).all()):
                    raise Blocked("a constant cannot be divided by a scale of 0", node)
                self.region.edits.append(Edit(node, Affine(scales[0], scales[0] * 0).inverse(), constant=operand))
        left, right = (0.0 if m is None else m.shift for m in maps)
        shift = left - right if node.target is d.SUB else left + right
        return Affine(scales[0], shift)

    def _operand(self, node: fx.Node, operand: object) -> Affine | None:
        """The map of an operand of a sum, None for a constant."""
        if is_constant(operand):
            return None
        if operand not in self.region.tensors:
            raise Blocked("another operand does not come through this batch norm", node)
        if _fixed_sizes(operand) != _fixed_sizes(node):
            raise Blocked("it broadcasts an operand", node)
        return self.region.tensors[operand]

    def _cat(self, node: fx.Node) -> Affine:
        dim = argument(node, "dim") % rank(node)
        maps = [self.region.tensors.get(operand) or Affine.identity(rank(node)) for operand in node.args[0]]
        lengths = [shape(operand)[dim] for operand in node.args[0]]
        return Affine(_join([m.scale for m in maps], lengths, dim), _join([m.shift for m in maps], lengths, dim))

    def _pad(self, node: fx.Node, affine: Affine) -> Affine:
        value = float(argument(node, "value") or 0)
        padded = [dim for dim, _, _ in padded_dimensions(node)]
        if any(t.shape[dim] > 1 for t in (affine.scale, affine.shift) for dim in padded):
            raise Blocked("it pads a dimension along which the map varies", node)
        padding = self._padding(node, affine, value)
        if padding is not None:
            self.region.edits.append(Edit(node, affine, padding=padding))
        return affine

    def _padding(self, node: fx.Node, affine: Affine, value: float) -> Tensor | None:
        """(C,) the x that maps to ``value``, None when ``value`` itself does."""
        if not bool((affine.scale * value + affine.shift != value).any()):
            return None
        if affine.varies_outside(1) or rank(node) < 3 or self.bounds is None:
            raise Blocked(f"its padding with {value:g} does not shift", node)
        scale, shift = affine.channels(shape(node.args[0])[1])
        padding = torch.where(shift == value, 0.0, value - shift) / torch.where(shift == value, 1.0, scale)
        lo, hi = self.bounds
        slack = 1e-6 * (hi - lo)
        if not bool(((padding >= lo - slack) & (padding <= hi + slack)).all()):
            raise Blocked(f"its padding would be {padding.min():g}..{padding.max():g}, outside {lo:g}..{hi:g}", node)
        return padding

    def _mean(self, node: fx.Node, affine: Affine) -> Affine:
        dims, keepdim = mean_dimensions(node)
        if any(t.shape[dim] > 1 for t in (affine.scale, affine.shift) for dim in dims):
            raise Blocked("it averages over values that are scaled differently", node)
        return affine if keepdim else affine.map(lambda t: t.squeeze(dims))


def _shift_passes(node: object) -> tuple[Sequence, Callable[[list], bool]]:
    """The operands that a shift of ``node`` may go to, and whether one or all must take it; none: it stays here."""
    if is_call(node, d.ADD, d.SUB):
        return node.args, any
    if is_call(node, d.CAT):
        return node.args[0], all
    return (node.args[:1] if is_call(node, MEAN, *CHANNELWISE, *MOVEMENT) else ()), all


def _fixed_sizes(node: fx.Node) -> list[int | None]:
    return [s if isinstance(s, int) else None for s in shape(node)]


def _narrow(t: Tensor, dim: int, start: int, length: int) -> Tensor:
    return t.narrow(dim, start, length) if t.shape[dim] > 1 else t


def _join(parts: list[Tensor], lengths: list[int], dim: int) -> Tensor:
    sizes = list(torch.broadcast_shapes(*(t.narrow(dim, 0, 1).shape for t in parts)))
    return torch.cat([t.expand(*sizes[:dim], n, *sizes[dim + 1 :]) for t, n in zip(parts, lengths)], dim)


def _agreed(one: Tensor, other: Tensor, source: fx.Node) -> Tensor:
    if bool(((one != other) & ~one.isnan() & ~other.isnan()).any()):
        raise Blocked("two paths want different maps of it", source)
    return torch.where(one.isnan(), other, one)
