"""Which units matter least: one function per criterion, ``criterion(evidence) -> scores (units,)``, low goes first.

W_n are the weights of a neuron, V_n the effective weights that read it (``evidence``), g_n the gradient of the objective by W_n; norms
are 2-norms. A unit of several rows, in several layers, has the sum of their scores: a channel of a residual stream counts for every
layer that writes it. Scores that are no effect on the objective are first divided by the mean of their layer. NaN says nothing: such
units stay.

    outgoing            |V_n|                                     He et al. 2014, "onorm"
    contribution        rms of the channel times |V_n|            Sun et al. 2024 (Wanda), of channels
    activation          rms of the channel where it is read
    l1, l2              |W_n|                                     magnitude
    mixed               l2 + activation
    batch_norm          |gamma_n|                                 Liu et al. 2017, network slimming
    gradient            |g_n|
    weight_gradient     |W_n| |g_n|
    integrated          sum_s |mu^s W_n| |g_n at mu^s W|          SInGE, Yvinec et al. 2022; a layer decays as a whole
    taylor              |<W_n, g_n>|                              Molchanov et al. 2019
    hessian             Tr(H_nn) / 2p |W_n|^2                     Yu et al. 2021 (HAP); H: Gauss-Newton of the outputs
    redundancy          distance to the most similar neuron       RED, Yvinec et al. 2021: of all that writes the channel; it is
    hashed              the same between weights rounded to the modes of their density (``hashing``)
    angular             1 - cosine to the most similar neuron     then merged into the most similar one that stays (``merging``)
    random              nothing at all
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..analysis.channel_groups import Layer, batch_norm_of
from ..graph import argument, constant
from .evidence import Evidence
from .hashing import hash_values
from .merging import neurons

DECAY, SMALLEST = 0.9, 0.05  # of SInGE: factor per step, and of the weights where the path ends
PROBES = 4  # output directions per batch of the Hessian's trace


@dataclass(frozen=True)
class Criterion:
    """``score`` gives units scores; ``needs_data``: it looks at examples; ``merges``: what goes is merged into what is similar, "equal"
    in size, or "scaled"."""

    score: Callable
    needs_data: bool
    merges: str | None = None


CRITERIA: dict[str, Criterion] = {}


def criterion(*, needs_data: bool = False, merges: str | None = None) -> Callable:
    """Register a function under its name.

    >>> @criterion()                                                           # doctest: +SKIP
    ... def largest(evidence):
    ...     return evidence.per_unit(lambda layer: relative(evidence.rows(layer).abs().amax(1)))
    """

    def register(score: Callable[[Evidence], Tensor]):
        CRITERIA[score.__name__] = Criterion(score, needs_data, merges)
        return score

    return register


@criterion()
def outgoing(evidence: Evidence) -> Tensor:
    return _or_magnitude(evidence, evidence.per_unit_read(lambda layer: relative(evidence.columns(layer).norm(dim=1))))


@criterion(needs_data=True)
def contribution(evidence: Evidence) -> Tensor:
    def given(layer: Layer) -> Tensor:
        return relative(evidence.columns(layer).norm(dim=1) * evidence.input_norms[layer.node])

    return _or_magnitude(evidence, evidence.per_unit_read(given))


def _or_magnitude(evidence: Evidence, scores: Tensor) -> Tensor:
    """Queries and keys are read by no layer: |W_n| then."""
    return torch.where(scores.isnan(), l2(evidence), scores)


@criterion()
def l1(evidence: Evidence) -> Tensor:
    return evidence.per_unit(lambda layer: relative(evidence.rows(layer).abs().sum(1)))


@criterion()
def l2(evidence: Evidence) -> Tensor:
    return evidence.per_unit(lambda layer: relative(evidence.rows(layer).norm(dim=1)))


@criterion()
def batch_norm(evidence: Evidence) -> Tensor:
    def gamma(layer: Layer) -> Tensor | None:
        norm = batch_norm_of(layer)
        weight = None if norm is None else argument(norm, "weight")
        if weight is None or len(constant(evidence.gm, weight)) != len(layer.rows.units):
            return None
        return relative(constant(evidence.gm, weight).abs())

    return evidence.per_unit(gamma)


@criterion(needs_data=True)
def activation(evidence: Evidence) -> Tensor:
    return evidence.per_unit_read(lambda layer: relative(evidence.input_norms[layer.node]))


@criterion(needs_data=True)
def mixed(evidence: Evidence) -> Tensor:
    return l2(evidence) + activation(evidence)


@criterion(needs_data=True)
def gradient(evidence: Evidence) -> Tensor:
    found = evidence.gradients()
    return evidence.per_unit(lambda layer: evidence.rows(layer, found).norm(dim=1))


@criterion(needs_data=True)
def weight_gradient(evidence: Evidence) -> Tensor:
    found = evidence.gradients()
    return evidence.per_unit(lambda layer: evidence.rows(layer).norm(dim=1) * evidence.rows(layer, found).norm(dim=1))


@criterion(needs_data=True)
def integrated(evidence: Evidence) -> Tensor:
    def along_path(layer: Layer) -> Tensor | None:
        if not bool(layer.rows.units.any()):
            return None
        norm, total, factor = evidence.rows(layer).norm(dim=1), 0.0, 1.0
        while factor >= SMALLEST:
            found = evidence.gradients(factor, layer)
            total = total + factor * norm * evidence.rows(layer, found).norm(dim=1)
            factor *= DECAY
        return total

    return evidence.per_unit(along_path)


@criterion(needs_data=True)
def taylor(evidence: Evidence) -> Tensor:
    found = evidence.gradients()
    return evidence.per_unit(lambda layer: (evidence.rows(layer) * evidence.rows(layer, found)).sum(1).abs())


@criterion(needs_data=True)
def hessian(evidence: Evidence) -> Tensor:
    """At the trained weights the Hessian of |f(x) - f_trained(x)|^2 / 2 is J^T J; E[(J^T v)^2] is its diagonal for v = +-1."""
    squares: dict[str, Tensor] = {}
    for _ in range(PROBES):
        found = evidence.gradients(objective=lambda outputs: sum((y * _signs(evidence, y)).sum() for y in outputs))
        squares = {target: squares.get(target, 0) + g.square() / PROBES for target, g in found.items()}

    return evidence.per_unit(
        lambda layer: evidence.rows(layer, squares).mean(1) / 2 * evidence.rows(layer).square().sum(1)
    )


def _signs(evidence: Evidence, like: Tensor) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=evidence.random).to(like.dtype) * 2 - 1


@criterion(merges="equal")
def redundancy(evidence: Evidence) -> Tensor:
    return _per_group(evidence, torch.cdist)


@criterion(merges="equal")
def hashed(evidence: Evidence) -> Tensor:
    return _per_group(evidence, lambda a, _: torch.cdist(h := hash_values(a), h))


@criterion(merges="scaled")
def angular(evidence: Evidence) -> Tensor:
    def cosines(a: Tensor, b: Tensor) -> Tensor:
        a, b = (torch.nn.functional.normalize(t, dim=1) for t in (a, b))
        return 1 - a @ b.t()

    return _per_group(evidence, cosines)


def _per_group(evidence: Evidence, distances: Callable) -> Tensor:
    """(units,) how far each unit is from the most similar one, by everything that writes them."""
    scores = torch.full((evidence.groups.count,), torch.nan, dtype=torch.float64)
    for group in evidence.groups.groups:
        nearest = relative(_to_nearest(neurons(evidence.groups, group), distances))
        scores[list(group.units)] = nearest * len(group.layers)
    return scores


@criterion()
def random(evidence: Evidence) -> Tensor:
    return torch.rand(evidence.groups.count, generator=evidence.random, dtype=torch.float64)


def _to_nearest(rows: Tensor, distances: Callable) -> Tensor:
    """(O,) distance of each row to the most similar row that has not gone yet, when the closest pairs lose one after another.

    Of a pair the one of smaller norm goes; rows that stay longest have the largest scores.
    """
    norms, table = rows.norm(dim=1), distances(rows, rows).fill_diagonal_(torch.inf)
    score, alive, largest = torch.zeros(len(rows), dtype=torch.float64), set(range(len(rows))), 0.0
    while len(alive) > 1:
        a, b = divmod(int(table.argmin()), len(rows))
        goes = a if norms[a] < norms[b] else b
        score[goes] = largest = max(largest, float(table[a, b]))  # what goes later has the larger score
        table[goes, :] = table[:, goes] = torch.inf
        alive.remove(goes)
    score[list(alive)] = largest + norms.max()
    return score


def relative(scores: Tensor) -> Tensor:
    """Scores (O,) of a layer divided by their mean, so that layers can be compared; all 1 if it is 0."""
    scores = scores.double()
    return scores / scores.mean() if scores.mean() > 0 else torch.ones_like(scores)
