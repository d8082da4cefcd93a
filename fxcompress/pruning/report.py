"""What a pruning did, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from rich.table import Table
from torch import Tensor

from ..terminal import printed
from .merging import Merges


@dataclass(frozen=True, eq=False)
class Pruned:
    """What a further input shape repeats: the units ``removed`` (units,) bool, the ``cost`` (before, after) at the shape they were chosen
    for, and the constants of the smaller network after its correction (statistics, biases; weights with zeros; the blocks of grouped
    kernels), by name; ``merges``: which units were merged into others."""

    removed: Tensor
    cost: tuple[float, float]
    constants: dict
    correction: str | None
    merges: Merges | None = None


@dataclass
class PruningReport:
    """What ``prune`` leaves in ``graph_module.meta["pruning"]``.

    Attributes:
        criterion, budget, measure, ratio: as asked for.
        saved: share of the measure that was removed; where single weights are pruned, of weights that are zero.
        parameters, macs: (before, after); MACs per sample that dense kernels execute, parameters without batch-norm statistics.
        groups: one entry per group of tied layers: name, units, removed, layers. Units are channels, weights or kernels.
        slices: what was cut, one entry per axis of a constant: target, axis, indices, and writes: True where zeroing these
            indices of the original masks the channels, False where they are only read.
        refusals: layers whose outputs all stay, with the reason.
        difference: largest relative difference, in float64 on the example inputs, of the smaller network from the original
            with the removed channels zeroed.
        correction: "measured", "analytic" or None.
        cost: (before, after) of the measure, at the input shape that was pruned: nanoseconds that the table predicts for "latency".
        granularity: "channels", "unstructured", "N:M" or "kernels".
        nonzero, nonzero_macs: (before, after), where single weights were pruned: those of these layers that are not zero, and the
            MACs per sample by them, which a machine that skips zeros would execute.
        merged, merge_error: removed channels that were merged into similar ones, and the largest relative distance of what writes
            them from what writes those; 0 where merging is exact.
    """

    criterion: str
    budget: str
    measure: str
    ratio: float
    saved: float
    parameters: tuple[int, int]
    macs: tuple[int, int]
    groups: list[dict] = field(default_factory=list)
    slices: list[dict] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    difference: float = 0.0
    correction: str | None = None
    cost: tuple[float, float] = (0, 0)
    granularity: str = "channels"
    nonzero: tuple[int, int] = (0, 0)
    nonzero_macs: tuple[int, int] = (0, 0)
    merged: int = 0
    merge_error: float = 0.0

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def sparse(self) -> bool:
        """Single weights are zero, and nothing is smaller."""
        return self.granularity not in ("channels", "kernels")

    def summary(self) -> str:
        """One line."""
        if self.sparse:
            (w0, w1), (m0, m1) = self.nonzero, self.nonzero_macs
            zeros = f"{1 - w1 / max(w0, 1):.1%} of the weights are zero, {1 - m1 / max(m0, 1):.1%} of the MACs multiply by them"
            return f"{zeros} and are executed all the same ({self.granularity}, {self.criterion})"
        (p0, p1), (m0, m1) = self.parameters, self.macs
        channels = self.granularity == "channels"
        how = f"{self.criterion}, {self.budget}" if channels else f"{self.granularity}, {self.criterion}"
        return f"{1 - p1 / p0:.1%} of the parameters, {1 - m1 / m0:.1%} of the MACs ({how})"

    def __str__(self) -> str:
        title = f"pruned by {self.criterion}, {self.budget} budget"
        if self.granularity != "channels":
            title = f"{self.granularity} pruning by {self.criterion}"
        unit = "weights" if self.sparse else "kernels" if self.granularity == "kernels" else "units"
        table = Table("layers that go together" if unit == "units" else "layer", unit, "removed", title=title)
        for group in self.groups:
            table.add_row(group["name"], str(group["units"]), str(group["removed"]))
        totals = Table("", "before", "after", "removed")
        for name, (before, after) in self._totals():
            totals.add_row(name, f"{before:,}", f"{after:,}", f"{1 - after / max(before, 1):.1%}")
        return printed(table, totals, *self._remarks(), *self.refusals)

    def _remarks(self) -> list[str]:
        found = []
        if self.sparse:
            found.append("Dense kernels multiply by zeros at full price: no time is saved. A saved int8 model does not store the zeros.")  # fmt: skip
        if self.merged:
            found.append(f"{self.merged} merged into similar ones, at a relative distance of {self.merge_error:.3g} or less")  # fmt: skip
        return found

    def _totals(self) -> list[tuple[str, tuple[int, int]]]:
        rows = [("parameters", self.parameters), ("MACs per sample", self.macs)]
        if self.sparse:
            rows = [("weights that are not zero", self.nonzero), ("MACs executed per sample", self.macs),
                    ("MACs by weights that are not zero", self.nonzero_macs)]  # fmt: skip
        if self.measure == "latency":
            rows.append(("nanoseconds of the layers (table)", tuple(map(round, self.cost))))
        return rows
