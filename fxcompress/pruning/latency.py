"""Latency as a cost: what a network takes on this machine, predicted from a table of measured kernel times.

    table      nanoseconds of layers, each measured alone on a grid of channel counts (``layer_times``), in memory or in a file
    surface    between the points of the grid linear; a layer never takes longer than a larger one
    Latency    the sum over the layers that are left, for any set of units

On the grid a time is the least of all that belong to layers at least as large: other work on the machine only ever adds time, and
a layer can always be run as a larger one with zeros. So the cost falls, or stays, with every unit that is removed, which the
bisection of ``budgets`` relies on. Given a table, the cost is a function of the network alone.

Counted are convolutions, linear layers and products of activations, each with the rounding fused into it. What lies between them
(pooling, softmax, moves) is not: the ratio is one of their time.
"""

from __future__ import annotations

import bisect
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, fx

from ..analysis.channel_groups import ChannelGroups, Layer
from ..analysis.channel_layer_rules import goes_by_groups
from ..analysis.layer_weights import groups_of
from ..dialects import EMBEDDING, MATMUL
from ..errors import OptionError
from ..graph import calls, constant, is_call
from ..terminal import progress
from .budgets import default_round_to
from .costs import Costs, MatmulCost, nothing
from .layer_times import LayerShape, this_machine, time_layer

STAGE = "latency table"
PARTS = 4  # of a layer's channels, at which it is measured
FORMAT, VERSION = "fxcompress latency table", 1


class LatencyTable:
    """Times of layers, measured when they are first asked for.

    Args:
        times: {shape: nanoseconds} known already.
        machine: where they were measured; only there more are.
        measure: ``f(shape) -> nanoseconds``; default: the kernels of the native backend on this machine.

    >>> table = LatencyTable()                                                                # doctest: +SKIP
    >>> small = fxcompress.prune(model, x, pruning_measure="latency", latency_table=table)    # doctest: +SKIP
    >>> table.save("times.json")                                                              # doctest: +SKIP
    """

    def __init__(
        self,
        times: dict[LayerShape, float] | None = None,
        machine: str | None = None,
        measure: Callable[[LayerShape], float] = time_layer,
    ):
        self.times, self.machine, self._measure = dict(times or {}), machine, measure

    def need(self, shapes: Iterable[LayerShape]) -> None:
        """Measure those that are not known. Raises ``OptionError`` if the others were measured on another machine."""
        missing = list(dict.fromkeys(shape for shape in shapes if shape not in self.times))
        if not missing:
            return
        here = this_machine() if self._measure is time_layer else ""
        if self.machine not in (None, here):
            raise OptionError(f"{len(missing)} layer shapes are missing from the table, which was measured on {self.machine!r}",
                              stage=STAGE, expected=f"a complete table, or one of this machine, {here!r}",
                              remedy="Measure the table for this model where it is to run, or name another file.")  # fmt: skip
        self.machine = here
        with progress(len(missing)) as announce:
            for shape in missing:
                announce(f"timing {shape.operator} {shape.inputs} -> {shape.outputs}")
                self.times[shape] = self._measure(shape)

    def save(self, path: str | Path) -> None:
        """Write a JSON file that ``load`` reads. Raises ``OptionError`` where nothing can be written."""
        rows = [asdict(shape) | {"nanoseconds": spent} for shape, spent in self.times.items()]
        document = {"format": FORMAT, "version": VERSION, "machine": self.machine, "layers": rows}
        part = Path(f"{path}.part")
        try:
            part.write_text(json.dumps(document, indent=1))
            os.replace(part, path)
        except OSError as error:
            raise OptionError(f"the latency table {str(path)!r} cannot be written: {error.strerror}", stage=STAGE,
                              expected="the path of a file", remedy='Choose a file of your own, latency_table="times.json".') from error  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """The table that ``save`` wrote. Raises ``OptionError`` for any other file."""
        try:
            document = json.loads(Path(path).read_text())
            if document.get("format") != FORMAT or document["version"] != VERSION:
                raise ValueError(f"expected format {FORMAT!r}, version {VERSION}")
            times = {}
            for row in document["layers"]:
                spent = float(row.pop("nanoseconds"))
                if not 0 < spent < math.inf:
                    raise ValueError(f"a layer of {spent} nanoseconds")
                times[LayerShape(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})] = spent
            return cls(times, document["machine"])
        except OSError as error:
            reason, cause = error.strerror, error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason, cause = f"it is no latency table ({type(error).__name__}: {error})", error
        raise OptionError(f"the latency table {str(path)!r} cannot be read: {reason}", stage=STAGE,
                          expected="a file that LatencyTable.save wrote", remedy="Delete it, and it is measured anew.") from cause  # fmt: skip


#: Of all calls of this process that name no other.
IN_MEMORY = LatencyTable()


def open_table(given: LatencyTable | str | Path | None) -> tuple[LatencyTable, Callable[[], None]]:
    """(table, keep) of the option ``latency_table``; ``keep()`` writes a file again that was read, or is new, if it grew."""
    if given is None:
        return IN_MEMORY, lambda: None
    if isinstance(given, LatencyTable):
        return given, lambda: None
    table = LatencyTable.load(given) if Path(given).exists() else LatencyTable()
    known = len(table.times)
    return table, lambda: table.save(given) if len(table.times) > known else None


class Latency:
    """Predicted nanoseconds of a network without any set of its units.

    Args:
        groups: of the float graph.
        table: is asked for every layer on a grid now, for nothing later.

    >>> latency = Latency(groups, table); latency.without(removed)             # doctest: +SKIP
    """

    def __init__(self, groups: ChannelGroups, table: LatencyTable):
        layers = [_LayerTime(groups.gm, layer) for layer in groups.layers if not is_call(layer.node, EMBEDDING)]
        products = list(calls(groups.gm, MATMUL))
        table.need([s for layer in layers for s in layer.shapes] + [LayerShape.of(node) for node in products])
        self._layers = [(layer, Surface.of(layer.grid, table.times)) for layer in layers]
        self._products = []
        for node in products:
            cost = MatmulCost(groups, node)
            self._products.append((cost, table.times[LayerShape.of(node)] / cost.macs(nothing(groups))))

    def without(self, removed: Tensor) -> float:
        """``removed``: bool (units,). A product of activations takes the time of its share of multiplications."""
        layers = sum(surface(*layer.channels(removed)) for layer, surface in self._layers)
        return layers + sum(cost.macs(removed) * per_mac for cost, per_mac in self._products)


class _LayerTime:
    """A layer, its channels for any cut, and the shapes at which it is measured.

    ``grid``: {(inputs, outputs): shape}, counted in each group where the groups stay, else (1, groups).
    """

    def __init__(self, gm: fx.GraphModule, layer: Layer):
        self.layer, whole = layer, LayerShape.of(layer.node)
        self._by_groups = goes_by_groups(layer.node, constant(gm, layer.node.args[1]))
        groups = groups_of(layer.node)
        inputs, outputs = whole.inputs // groups, whole.outputs // groups
        self._whole = (1, groups) if self._by_groups else (inputs, outputs)
        if self._by_groups:
            self.grid = {(1, g): whole.resized(g * inputs, g * outputs, g) for g in channel_points(groups)}
        else:
            self.grid = {(i, o): whole.resized(i * groups, o * groups)
                         for i in channel_points(inputs) for o in channel_points(outputs)}  # fmt: skip
        self.shapes = list(self.grid.values())

    def channels(self, removed: Tensor) -> tuple[float, float]:
        """What is left of (inputs, outputs) of a group, or (1, groups)."""
        axes = self.layer.rows.units, self.layer.columns
        rows, columns = (float((~removed[units]).double().mean()) for units in axes)
        inputs, outputs = self._whole
        return (1, outputs * rows) if self._by_groups else (inputs * columns, outputs * rows)


def channel_points(channels: int) -> list[int]:
    """The numbers of channels at which a layer is measured: the smallest that pruning rounds to, and quarters of all of them.

    >>> channel_points(64), channel_points(3)
    ([8, 16, 32, 48, 64], [1, 2, 3])
    """
    step = default_round_to(channels)
    quarters = {min(channels, -(-channels * k // (PARTS * step)) * step) for k in range(1, PARTS + 1)}
    return sorted({step} | quarters)


class Surface:
    """Times over two counts of channels, linear between the points of a grid, constant below it.

    >>> Surface([1, 2], [4, 8], [[1.0, 5.0], [7.0, 3.0]])(2, 4)        # more than (2, 8): noise
    3.0
    """

    def __init__(self, inputs: list[int], outputs: list[int], times: list[list[float]]):
        self._inputs, self._outputs = inputs, outputs
        self._times = [list(row) for row in times]
        for i in reversed(range(len(inputs))):
            for o in reversed(range(len(outputs))):
                larger = [
                    self._times[a][b] for a, b in ((i + 1, o), (i, o + 1)) if a < len(inputs) and b < len(outputs)
                ]
                self._times[i][o] = min([self._times[i][o], *larger])

    @classmethod
    def of(cls, grid: dict[tuple[int, int], LayerShape], times: dict[LayerShape, float]) -> Surface:
        inputs, outputs = (sorted({point[axis] for point in grid}) for axis in (0, 1))
        return cls(inputs, outputs, [[times[grid[i, o]] for o in outputs] for i in inputs])

    def __call__(self, inputs: float, outputs: float) -> float:
        (i, s), (o, t) = _position(self._inputs, inputs), _position(self._outputs, outputs)
        near, far = ((1 - t) * self._times[a][o] + t * self._times[a][min(o + 1, len(self._outputs) - 1)]
                     for a in (i, min(i + 1, len(self._inputs) - 1)))  # fmt: skip
        return (1 - s) * near + s * far


def _position(points: list[int], value: float) -> tuple[int, float]:
    """(index of the point below, share of the way to the next)."""
    if value <= points[0]:
        return 0, 0.0
    index = bisect.bisect_right(points, value) - 1
    if index == len(points) - 1:
        return index, 0.0
    return index, (value - points[index]) / (points[index + 1] - points[index])


def cost_function(
    groups: ChannelGroups, measure: str, table: LatencyTable | str | Path | None
) -> Callable[[Tensor], float]:
    """What the graph costs without units (units,) bool: "macs", "parameters", or "latency" in nanoseconds by the table."""
    if measure != "latency":
        costs = Costs(groups)
        return lambda removed: getattr(costs.without(removed), measure)
    opened, keep = open_table(table)
    latency = Latency(groups, opened)
    keep()
    return latency.without
