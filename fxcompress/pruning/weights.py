"""Which single weights go: scores per weight, and the zeros that a share or a pattern makes of them.

    magnitude       |w|
    contribution    |w| rms of the channel it reads           Sun et al. 2024 (Wanda)
    taylor          |w g|, g: gradient of the objective       Molchanov et al. 2019
    random

Unstructured, a global budget compares weights of different layers by LAMP: the square of a score divided by the sum of the
squares of all scores of its layer that are no smaller (Lee et al. 2021). That is the share of what is then left of the layer,
so that scales of layers, which batch norm takes back, do not count, and the last weight of a layer stays. Patterns N:M keep
the N largest of every M weights along the input channels, as the sparse tensor cores of GPUs want them; a layer whose input
channels are no multiple of M has no such runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from ..analysis.channel_groups import Layer
from ..analysis.layer_weights import groups_of
from ..dialects import EMBEDDING, TRANSPOSED_CONVOLUTIONS
from ..graph import constant, is_call
from .criteria import Criterion
from .evidence import Evidence

Scores = dict[str, Tensor]  # per constant, of its shape
PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


def pattern(granularity: str) -> tuple[int, int] | None:
    """(N, M) of "N:M", None for another granularity."""
    found = PATTERN.fullmatch(granularity)
    return None if found is None else (int(found[1]), int(found[2]))


def prunable_layers(evidence: Evidence) -> list[Layer]:
    """Convolutions and linear layers, one for every weight."""
    layers = {
        layer.rows.target: layer for layer in reversed(evidence.groups.layers) if not is_call(layer.node, EMBEDDING)
    }
    return [layer for layer in evidence.groups.layers if layers.get(layer.rows.target) is layer]


# ----------------------------------------------------------------------------------------------------------------- scores


def magnitude(evidence: Evidence) -> Scores:
    return {layer.rows.target: _weight(evidence, layer).abs() for layer in prunable_layers(evidence)}


def contribution(evidence: Evidence) -> Scores:
    scores = {}
    for layer in prunable_layers(evidence):
        weight, rms = _weight(evidence, layer), evidence.input_norms[layer.node].double()
        scores[layer.rows.target] = along_inputs(layer.node, weight.abs()).mul(per_row(layer.node, rms, weight))
        scores[layer.rows.target] = from_inputs(layer.node, scores[layer.rows.target], weight)
    return scores


def taylor(evidence: Evidence) -> Scores:
    found = evidence.gradients()
    return {
        layer.rows.target: (_weight(evidence, layer) * found[layer.rows.target]).abs()
        for layer in prunable_layers(evidence)
    }


def random(evidence: Evidence) -> Scores:
    return {layer.rows.target: torch.rand(_weight(evidence, layer).shape, generator=evidence.random, dtype=torch.float64)
            for layer in prunable_layers(evidence)}  # fmt: skip


WEIGHT_CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, False),
    "contribution": Criterion(contribution, True),
    "taylor": Criterion(taylor, True),
    "random": Criterion(random, False),
}


def _weight(evidence: Evidence, layer: Layer) -> Tensor:
    return constant(evidence.gm, layer.node.args[1]).detach().double()


# ------------------------------------------------------------------------------------------------- layouts of a weight


def along_inputs(node: fx.Node, weight: Tensor) -> Tensor:
    """(O, *K, I/G) view of a layer's weight: consecutive elements read consecutive channels of a group."""
    if not is_call(node, *TRANSPOSED_CONVOLUTIONS):  # (O, I/G, *K)
        return weight.movedim(1, -1)
    groups = groups_of(node)  # (I, O/G, *K)
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return blocks.movedim(1, -1).flatten(0, 1)


def from_inputs(node: fx.Node, rows: Tensor, like: Tensor) -> Tensor:
    """Inverse of ``along_inputs``: a tensor of the shape of the weight ``like``."""
    if not is_call(node, *TRANSPOSED_CONVOLUTIONS):
        return rows.movedim(-1, 1)
    groups = groups_of(node)
    return rows.unflatten(0, (groups, -1)).movedim(-1, 1).reshape(like.shape)


def per_row(node: fx.Node, channels: Tensor, weight: Tensor) -> Tensor:
    """Values (I,) of the channels that a layer reads, shaped to multiply ``along_inputs``."""
    groups = groups_of(node)
    rows = along_inputs(node, weight)
    blocks = channels.reshape(groups, -1).repeat_interleave(rows.shape[0] // groups, 0)
    return blocks.reshape(rows.shape[0], *[1] * (rows.ndim - 2), -1)


# ------------------------------------------------------------------------------------------------------------------ zeros


def smallest(scores: Mapping[str, Tensor], ratio: float, budget: str) -> Scores:
    """bool per constant: the weights that go so that ``ratio`` of all are gone, one of every layer at least staying.

    ``budget``: "global" (LAMP), or "uniform", the same share of every layer. Of equal scores the first goes.
    """
    if budget == "uniform":
        return {target: _lowest(score.flatten(), ratio).reshape(score.shape) for target, score in scores.items()}
    relative = torch.cat([lamp(score.flatten()) for score in scores.values()])
    removed = _lowest(relative, ratio, keep=len(scores))
    parts = removed.split([score.numel() for score in scores.values()])
    return {target: part.reshape(score.shape) for (target, score), part in zip(scores.items(), parts, strict=True)}


def lamp(score: Tensor) -> Tensor:
    """score^2 / sum of the squares of all (n,) that are sorted behind it or are it; 1 for the largest."""
    order = score.argsort(stable=True)
    squares = score[order].square()
    left = squares.flip(0).cumsum(0).flip(0)
    result = torch.empty_like(squares)
    result[order] = torch.where(left > 0, squares / left, 0.0)
    result[order[-1]] = 1.0
    return result


def _lowest(score: Tensor, ratio: float, keep: int = 1) -> Tensor:
    """bool (n,): the share ``ratio`` of the smallest scores, at least ``keep`` not among them."""
    removed = torch.zeros(len(score), dtype=torch.bool)
    removed[score.argsort(stable=True)[: min(round(ratio * len(score)), len(score) - keep)]] = True
    return removed


def outside_pattern(node: fx.Node, score: Tensor, kept: int, run: int) -> Tensor | None:
    """bool, of the weight's shape: all but the ``kept`` largest scores of every ``run`` along the input channels; None where
    these are no multiple of ``run``. Of equal scores the first stays."""
    rows = along_inputs(node, score)
    if rows.shape[-1] % run:
        return None
    runs = rows.reshape(*rows.shape[:-1], -1, run)
    order = runs.argsort(dim=-1, descending=True, stable=True)
    removed = torch.ones(runs.shape, dtype=torch.bool).scatter_(-1, order[..., :kept], False)
    return from_inputs(node, removed.reshape(rows.shape), score)
