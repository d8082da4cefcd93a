"""Which channels of a network are removed together, and what is cut with them: the question behind structured pruning.

Channels of one label (``channel_units``) are a *unit*: a channel of a chain of layers, the same channel of all layers that write
to a residual stream, an attention head. A unit is removed by cutting indices along axes of constants.

    conv1 (rows), bn1, conv2 (columns)                          a chain: one unit per channel
    conv1, conv3, downsample (rows), conv2, conv4 (columns)     a residual stream

Units that the same layers write form a ``Group``: they cost alike and can be compared. Printing a group lists what a cut of
any of them takes, before anything is cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..dialects import BATCH_NORM, EMBEDDING, WEIGHTED
from ..graph import is_call, single_user
from ..meta import module_name, place
from ..rewrite import Reject
from .channel_units import Units
from .labels import FIXED


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a constant, ``units`` (size,) along it; 0 stays.

    ``writes``: masking zeroes the constant there (rows of a weight); else it only reads the channels (columns).
    """

    target: str
    axis: int
    units: Tensor
    writes: bool


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution, linear or embedding.

    ``rows``: the axis of its weight that computes its outputs. ``columns`` (I,): units of the channels it reads;
    ``rest`` (I,): what each is once it is masked, float64. An embedding reads none.
    """

    node: fx.Node
    rows: Axis
    columns: Tensor | None = None
    rest: Tensor | None = None

    def __str__(self) -> str:
        return module_name(self.node)


@dataclass(frozen=True, eq=False)
class Group:
    """Units that the same layers write, and the axes of constants they are cut from."""

    units: tuple[int, ...]
    layers: tuple[Layer, ...]
    axes: tuple[Axis, ...]

    @property
    def name(self) -> str:
        names = list(dict.fromkeys(map(str, self.layers)))
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def __str__(self) -> str:
        rows = [
            (a.target, f"axis {a.axis}", "writes" if a.writes else "reads", _ranges(self._indices(a)))
            for a in self.axes
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(text.ljust(w) for text, w in zip(row, widths)), row[3]]) for row in rows]
        return "\n".join([f"{self.name}: {len(self.units)} units", *(f"  {line}" for line in lines)])

    def _indices(self, axis: Axis) -> list[int]:
        return torch.isin(axis.units, torch.tensor(self.units)).nonzero().flatten().tolist()


class ChannelGroups:
    """Units and groups of a normalized float graph whose shapes are known.

    Args:
        gm: the graph.
        ignored_layers: names of modules whose outputs stay.

    Attributes:
        count: units are 1 .. count - 1; 0, ``FIXED``, is what stays.
        tensors: per activation the units of its elements, of its rank for one sample; they vary along one dimension at most.
        axes: every axis of a constant that is cut. layers: all of them.
        groups: in topological order. refusals: layers none of whose outputs can be removed, with the reason.

    >>> print(ChannelGroups(gm).groups[1])                                     # doctest: +SKIP
    layer1.0.conv1: 16 units
      layer1.0.conv1.weight  axis 0  writes  0-15
      layer1.0.bn1.weight    axis 0  writes  0-15
      layer1.0.conv2.weight  axis 1  reads   0-15
    """

    def __init__(self, gm: fx.GraphModule, ignored_layers: Sequence[str] = ()):
        self.gm, self._units = gm, Units(gm, ignored_layers)
        self.count, self.tensors = int(self._units.numbers.max()) + 1, self._units.tensors
        claims = self._units.tracer.claims
        written = {(c.target, axis) for c in claims if c.writes for axis, _ in self._units.resolved(c)}
        cuts = self._units.cuts
        self.axes = [Axis(t, axis, units, (t, axis) in written) for t in cuts for axis, units in cuts[t].items()]
        self.layers = [self._layer(claim) for claim in claims if _is_weight(claim)]
        self.groups = self._find_groups()
        self.refusals = [self._refusal(layer) for layer in self.layers if not bool(layer.rows.units.any())]

    def _layer(self, claim) -> Layer:
        numbers, read = self._units.numbers, self._units.tracer.inputs.get(claim.user)
        rows = Axis(claim.target, claim.axis, numbers[claim.labels], True)
        return Layer(claim.user, rows) if read is None else Layer(claim.user, rows, numbers[read.labels], read.rest)

    def _find_groups(self) -> list[Group]:
        writers: dict[int, list[int]] = defaultdict(list)
        for position, layer in enumerate(self.layers):
            for unit in layer.rows.units.unique().tolist():
                writers[unit].append(position)
        found: dict[tuple, list[int]] = defaultdict(list)
        for unit in sorted(writers.keys() - {FIXED}):
            found[tuple(writers[unit])].append(unit)
        cut_by: dict[int, list[Axis]] = defaultdict(list)
        for axis in self.axes:
            for unit in axis.units.unique().tolist():
                cut_by[unit].append(axis)
        return [Group(tuple(units), tuple(self.layers[p] for p in positions),
                      tuple(dict.fromkeys(axis for unit in units for axis in cut_by[unit])))
                for positions, units in sorted(found.items())]  # fmt: skip

    def _refusal(self, layer: Layer) -> Reject:
        claim = next(c for c in self._units.tracer.claims if c.user is layer.node and _is_weight(c))
        why = self._units.why_fixed(int(claim.labels[0]))
        if why is None:
            return Reject("its inputs are fixed", layer.node)
        return Reject(why.reason if why.node is layer.node else f"{place(why.node)}: {why.reason}", layer.node)


def batch_norm_of(layer: Layer) -> fx.Node | None:
    """The batch norm that is the only reader of a layer's result."""
    user = single_user(layer.node)
    return user if user is not None and is_call(user, BATCH_NORM) else None


def _is_weight(claim) -> bool:
    """The claim on the rows of a layer's weight."""
    if not claim.writes or claim.axis is None or not is_call(claim.user, *WEIGHTED, EMBEDDING):
        return False
    return claim.target == claim.user.args[0 if is_call(claim.user, EMBEDDING) else 1].target


def _ranges(indices: list[int]) -> str:
    """0-3, 7, 12-15"""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
