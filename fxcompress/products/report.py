"""What leaving products out did, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from rich.table import Table

from ..terminal import printed


@dataclass
class ProductReport:
    """What ``prune_products`` leaves in ``graph_module.meta["products"]``. Numbers are per sample.

    Attributes:
        algorithm, size: its name; blocks (n, m, p).
        criterion, shared: as asked for.
        multiplications: of the network, (before, after).
        additions: in sums of blocks, (with the products that are left, with the terms that are left).
        layers: one entry per layer in blocks: name, closed (products, from 1), terms (closed ones, from 1), multiplications (before,
            after), additions.
        refusals: layers that stay as they were, with the reason.
        difference: largest relative change of the outputs on the example inputs.
    """

    algorithm: str
    size: tuple[int, int, int]
    criterion: str
    shared: bool
    multiplications: tuple[int, int]
    additions: tuple[int, int]
    layers: list[dict] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    difference: float = 0.0

    @property
    def removed(self) -> float:
        """Share of the network's multiplications."""
        return 1 - self.multiplications[1] / self.multiplications[0]

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        title = f"{self.algorithm} {' x '.join(map(str, self.size))}, products left out by {self.criterion}"
        table = Table(
            "layer", "products left out", "terms left out", "multiplications", "before", "additions", title=title
        )
        for row in self.layers:
            before, after = row["multiplications"]
            closed = ", ".join(map(str, row["closed"])) or "none: as it was"
            table.add_row(
                row["name"], closed, str(len(row["terms"])), f"{after:,}", f"{before:,}", f"{row['additions']:,}"
            )
        before, after = self.multiplications
        total = (f"multiplications {before:,} -> {after:,} ({self.removed:.1%} removed), additions in sums of blocks {self.additions[1]:,} "
                 f"({self.additions[0]:,} with every term), outputs change by {self.difference:.3g}")  # fmt: skip
        return printed(table, total, *self.refusals)
