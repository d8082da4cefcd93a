"""What says which products of a gated network matter least, and which terms of its sums.

    random             seeded
    magnitude          |c_r| |S_r|, relative to the layer's others
    output             |c_r P_r|^2 on the examples, relative to the layer's others
    gradient           |dz / dS_r|^2
    weight_gradient    (dz / dlambda_r)^2, which is <S_r, dz / dS_r>^2

z = <v, outputs> with random signs v: in expectation these are diagonals of the Hessian of |outputs - those of the network|^2 / 2, which
needs no labels and does not vanish where the network is its own teacher. Terms of sums have the score of their product by magnitude and
output, and (dz / dgamma)^2 by gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..pruning.training import called
from .gates import GatedLayer

Scores = list[tuple[Tensor, Tensor]]  # per layer: of its products (R,), of its terms (T,)

# Every criterion takes the gated layers, the network they are in, calls of it with few examples each, over which it sums, and a generator.


def random(layers: Sequence[GatedLayer], network: nn.Module, calls: Sequence, generator: torch.Generator) -> Scores:
    return [
        tuple(torch.rand(len(g), generator=generator) for g in (layer.gates.products, layer.gates.terms))
        for layer in layers
    ]


def magnitude(layers, network, calls, generator) -> Scores:
    return [_with_terms(layer, layer.sums.detach().flatten(1).norm(dim=1) * _readers(layer).sqrt()) for layer in layers]


def output(layers, network, calls, generator) -> Scores:
    totals = [torch.zeros(len(layer.gates.products)) for layer in layers]
    handles = [layer.register_forward_hook(_adder(total)) for layer, total in zip(layers, totals, strict=True)]
    try:
        with torch.no_grad():
            for call in calls:
                called(network, call)
    finally:
        for handle in handles:
            handle.remove()
    return [_with_terms(layer, total) for layer, total in zip(layers, totals, strict=True)]


def gradient(layers, network, calls, generator) -> Scores:
    return _squared_gradients(layers, network, calls, generator, lambda layer: layer.sums)


def weight_gradient(layers, network, calls, generator) -> Scores:
    return _squared_gradients(layers, network, calls, generator, None)


#: Ranking criteria by name; all but the first two look at examples.
CRITERIA = {f.__name__: f for f in (random, magnitude, output, gradient, weight_gradient)}


def _readers(layer: GatedLayer) -> Tensor:
    """(R,) results that read each product."""
    return layer.gates.algorithm.c.flatten(0, 1).count_nonzero(0).double()


def _with_terms(layer: GatedLayer, scores: Tensor) -> tuple[Tensor, Tensor]:
    gates, relative = layer.gates, scores.double() / scores.double().sum().clamp(min=1e-30)
    shares = relative / _readers(layer).clamp(min=1)  # one result alone
    return relative, torch.cat([relative[[r for r, _, _ in gates.encode]], shares[[r for _, _, r in gates.decode]]])


def _adder(total: Tensor) -> Callable:
    """A hook that adds up what each product alone gives."""

    def add(layer: GatedLayer, inputs: tuple[Tensor], result: Tensor) -> None:
        b, c = layer.gates.coefficients()
        for r in range(len(total)):
            alone = layer.block.apply(
                inputs[0], layer.sums[r : r + 1], torch.zeros_like(layer.bias), b[r : r + 1], c[..., r : r + 1]
            )
            total[r] += alone.square().sum()

    return add


def _squared_gradients(layers, network, calls, generator, also: Callable | None) -> Scores:
    """Of the gates; of products by ``also(layer)`` (R, ...) if given."""
    of = [layer.gates.products if also is None else also(layer) for layer in layers]
    terms = [layer.gates.terms for layer in layers]
    leaves = list({id(p): p for p in (*of, *terms)}.values())
    totals = {id(p): torch.zeros(len(p), dtype=torch.float64) for p in leaves}
    for call in calls:
        with torch.enable_grad():
            outputs = [y for y in pytree.tree_leaves(called(network, call)) if isinstance(y, Tensor)]
            signs = [torch.randint(0, 2, y.shape, generator=generator).to(y.dtype) * 2 - 1 for y in outputs]
            z = sum((y * v).sum() for y, v in zip(outputs, signs, strict=True))
            found = torch.autograd.grad(z, leaves)
        for parameter, g in zip(leaves, found, strict=True):
            totals[id(parameter)] += g.double().square().reshape(len(g), -1).sum(1)
    return [(totals[id(p)], totals[id(t)]) for p, t in zip(of, terms, strict=True)]
