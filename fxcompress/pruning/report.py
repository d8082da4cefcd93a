"""What a pruning did, as data and as a table."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pruned:
    """What a further input shape repeats: the units ``removed`` (units,) bool, the ``cost`` (before, after) at the shape they were chosen
    for, and the vectors of the smaller network (statistics, biases) after its correction, by name."""

    removed: Tensor
    cost: tuple[float, float]
    vectors: dict[str, Tensor]
    correction: str | None


@dataclass
class PruningReport:
    """What ``prune`` leaves in ``graph_module.meta["pruning"]``.

    Attributes:
        criterion, budget, measure, ratio: as asked for.
        saved: share of the measure that was removed.
        parameters, macs: (before, after); MACs per sample, parameters without batch-norm statistics.
        groups: one entry per group of tied layers: name, units, removed, layers.
        slices: what was cut, one entry per axis of a constant: target, axis, indices, and writes: True where zeroing these
            indices of the original masks the channels, False where they are only read.
        refusals: layers whose outputs all stay, with the reason.
        difference: largest relative difference, in float64 on the example inputs, of the smaller network from the original
            with the removed channels zeroed.
        correction: "measured", "analytic" or None.
        cost: (before, after) of the measure, at the input shape that was pruned: nanoseconds that the table predicts for "latency".
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

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        table = Table(
            "layers that go together", "units", "removed", title=f"pruned by {self.criterion}, {self.budget} budget"
        )
        for group in self.groups:
            table.add_row(group["name"], str(group["units"]), str(group["removed"]))
        totals = Table("", "before", "after", "removed")
        rows = [("parameters", self.parameters), ("MACs per sample", self.macs)]
        if self.measure == "latency":
            rows.append(("nanoseconds of the layers (table)", tuple(map(round, self.cost))))
        for name, (before, after) in rows:
            totals.add_row(name, f"{before:,}", f"{after:,}", f"{1 - after / max(before, 1):.1%}")
        console = Console(file=io.StringIO(), width=120, force_terminal=False)
        console.print(table)
        console.print(totals)
        for refusal in self.refusals:
            console.print(refusal, soft_wrap=True, highlight=False)
        return console.file.getvalue().rstrip()
