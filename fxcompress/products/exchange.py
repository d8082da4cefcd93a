"""Exchanges: a closed product opens and an open one closes, as long as the loss of the whole network falls.

Every product's gradient at what is closed says to first order which one to open; the loss of a few candidates decides. What to close next is
decided likewise, among those whose gradient says that it helps and those that are ranked lowest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..pruning.training import Settings, Trainer, train_mode
from .network import BlockNetwork

BATCHES = 4  # of examples that judge
CANDIDATES = 4  # tried per exchange and reason
Products = list[set[int]]  # closed, per layer
Unit = tuple[int, int]  # number of its gates, product


def exchange_products(
    network: BlockNetwork, trainable: nn.Module, starts: Sequence[Products], ranking: Sequence[Tensor], means: Sequence[Tensor], removed: float,
    data, settings: Settings, rounds: int,
) -> Products:  # fmt: skip
    """What is closed after at most ``rounds`` exchanges, from the best of ``starts``.

    Args:
        trainable: the network with gates, whose gates this changes.
        ranking: (R,) scores of products per layer, the low ones matter least.
        means: (O,) per layer, of the whole network: those of layers without products are kept, as their biases will.
        removed: share of multiplications that must stay removed.
        settings: whose loss and examples judge.
    """
    with train_mode(trainable, settings.update_batch_norm) as module:
        judge = _Judge(network, module, Trainer(trainable, data, settings), means)
        loss, best = min(((judge.loss(start), start) for start in starts), key=lambda found: found[0])
        for _ in range(rounds):
            found = _exchange(network, judge, best, ranking, removed)
            if found is None or found[0] >= loss:
                break
            loss, best = found
    return best


class _Judge:
    """The loss with some products closed, on the same examples every time, and its gradient by gates."""

    def __init__(self, network: BlockNetwork, module: nn.Module, trainer: Trainer, means: Sequence[Tensor]):
        self.network, self.module, self.trainer = network, module, trainer
        self.levels = (
            [nn.Parameter(mean) for mean in means] if trainer.settings.update_batch_norm else [None] * len(means)
        )
        self.batches = [trainer.examples.batch(step) for step in range(BATCHES)]

    @torch.no_grad()
    def loss(self, closed: Products) -> float:
        self._close(closed)
        return sum(float(self.trainer.loss(self.module, batch)) for batch in self.batches)

    def gradient(self, closed: Products) -> dict[Unit, float]:
        self._close(closed)
        gates = [g.products.requires_grad_(True) for g in self.network.gates]
        total = [torch.zeros_like(gate) for gate in gates]
        for batch in self.batches:
            with torch.enable_grad():
                found = torch.autograd.grad(self.trainer.loss(self.module, batch), gates)
            total = [t + f for t, f in zip(total, found, strict=True)]
        return {(g, r): float(value) for g, values in enumerate(total) for r, value in enumerate(values)}

    @torch.no_grad()
    def _close(self, closed: Products) -> None:
        for layer, products, level in zip(self.network.layers, closed, self.levels, strict=True):
            layer.level = level if products else None
            for gates in layer.gates.parameters():
                gates.fill_(1.0)
            layer.gates.products[list(products)] = 0.0


def _exchange(
    network: BlockNetwork, judge: _Judge, closed: Products, ranking: Sequence[Tensor], removed: float
) -> tuple[float, Products] | None:
    """The best exchange that was tried, with its loss; None where none keeps enough removed."""
    members = [network.members(gates) for gates in network.gates]
    gradient = judge.gradient(closed)
    scores = {(g, r): float(sum(ranking[i][r] for i in members[g])) / network.savings[g] for g, r in gradient}
    gone = {unit for unit in gradient if unit[1] in closed[members[unit[0]][0]]}

    def changed(products: Products, unit: Unit) -> Products:
        return [mine ^ {unit[1]} if i in members[unit[0]] else mine for i, mine in enumerate(products)]

    def tried(products: Products, units: list[Unit]) -> list[tuple[float, Unit, Products]]:
        candidates = [(unit, changed(products, unit)) for unit in units]
        return [(judge.loss(candidate), unit, candidate) for unit, candidate in candidates]

    opened = tried(closed, sorted(gone, key=gradient.get)[:CANDIDATES])
    if not opened:
        return None
    _, back, products = min(opened, key=lambda t: t[:2])
    enough = [unit for unit in gradient if unit not in gone and _allowed(network, changed(products, unit), removed)]
    units = {unit for key in (lambda u: -gradient[u], scores.get) for unit in sorted(enough, key=key)[:CANDIDATES]}
    found = tried(products, sorted(units - {back}))
    if not found:
        return None
    loss, _, products = min(found, key=lambda t: t[:2])
    return loss, products


def _allowed(network: BlockNetwork, closed: Products, removed: float) -> bool:
    """Enough is removed, and every layer keeps a product."""
    return network.saved(closed) >= removed * network.multiplications and all(
        len(products) < network.algorithm.products for products in closed
    )
