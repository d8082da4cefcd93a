"""Gates learned by gradient through the whole network, under a penalty that grows until enough of them close.

    minimize over 0 <= g <= 1      loss / unit  +  mu sum_i w_i (g_i + kappa g_i (1 - g_i))           sum_i w_i = 1

w: what a gate saves. mu: the multiplier of the constraint sum_i w_i g_i <= open share; it rises while too much is open (dual ascent), and
the share falls from 1 to its end over the first half of the steps. kappa rises from 0 to 1 over the second half: it holds open gates at 1
and pulls the others to 0, since they will be rounded. unit: the loss with all gates half open, so that nothing depends on the loss's scale.
Products and terms of sums have a multiplier each.

Source: Yvinec 2023, section 4.2 (gates with a penalty); the multiplier: Bertsekas 1982; g (1 - g): Murray and Ng 2010.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..pruning.training import Settings, Trainer
from .gates import Gates

RATE = 0.05  # of Adam on gates: 20 steps close one
ASCENT = 0.5  # of the multipliers, per step and share too much


@dataclass
class _Constraint:
    """On one kind of gates: their parameters, what each saves, the share that may stay open, and its multiplier."""

    gates: list[nn.Parameter]
    weights: list[Tensor]
    share: float
    multiplier: float = 0.0

    def penalty(self, kappa: float) -> Tensor:
        return self.multiplier * sum(
            (w * (g + kappa * g * (1 - g))).sum() for g, w in zip(self.gates, self.weights, strict=True)
        )

    def follow(self, done: float) -> None:
        """After a step: gates into 0..1, and the multiplier towards the share of now."""
        share = 1 - (1 - self.share) * min(1.0, 2 * done)
        for gate in self.gates:
            gate.clamp_(0, 1)
        found = float(sum((w * g).sum() for g, w in zip(self.gates, self.weights, strict=True)))
        self.multiplier = max(0.0, self.multiplier + ASCENT * (found - share))


def learn_gates(
    network: nn.Module,
    gates: Sequence[Gates],
    savings: Sequence[float],
    data,
    settings: Settings,
    products: float,
    terms: float,
) -> None:
    """Train the gates, and nothing else, in place.

    Args:
        network: with gates, called like the model. savings: multiplications of a product, per ``gates``.
        settings: of the training; its optimizer and learning rate are those of weights and not used.
        products, terms: shares that may stay open, products weighted by their multiplications.
    """
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in weights:
        parameter.requires_grad_(False)
    constraints = [_constraint([g.products for g in gates], savings, products)]
    if terms < 1:
        constraints.append(_constraint([g.terms for g in gates], [1.0] * len(gates), terms))
    trained = [gate.requires_grad_(True) for constraint in constraints for gate in constraint.gates]
    state = {"done": 0.0, "unit": 1.0}

    def after_step() -> None:
        state["done"] = (trainer.step + 1) / settings.steps
        for constraint in constraints:
            constraint.follow(state["done"])

    def loss(outputs, wanted) -> Tensor:
        kappa = max(0.0, 2 * state["done"] - 1)
        return settings.objective(outputs, wanted) / state["unit"] + sum(c.penalty(kappa) for c in constraints)

    trainer = Trainer(network, data, replace(settings, optimizer=_adam, learning_rate=RATE, loss=loss), after_step)
    with torch.no_grad():
        for gate in trained:
            gate.fill_(0.5)
        state["unit"] = max(float(trainer.loss(network, trainer.examples.batch(0))), 1e-12)
        for gate in trained:
            gate.fill_(1.0)
    trainer.run(settings.steps)
    for parameter in weights:
        parameter.requires_grad_(True)


def _constraint(gates: list[nn.Parameter], savings: Sequence[float], share: float) -> _Constraint:
    total = sum(saving * len(gate) for gate, saving in zip(gates, savings, strict=True))
    return _Constraint(
        gates, [torch.full_like(gate, saving / total) for gate, saving in zip(gates, savings, strict=True)], share
    )


def _adam(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.9))
