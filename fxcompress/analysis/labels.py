"""Labels: a name for every channel of every tensor, and which names mean the same.

The analyses of channels run the network on labels instead of values. A tensor's labels are int64, of its rank, each dimension
1 or the tensor's: (1, C, 1, 1) for an image. Elements of equal label share one fate, scaled alike (``layer_groups``) or
removed together (``channel_groups``); label 0, ``FIXED``, is the fate of what has to stay as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import networkx as nx
import torch
from torch import Tensor

FIXED = 0


class Labels:
    """Makes labels, ties them, fixes them; ``settle`` then numbers what is left.

    >>> labels = Labels()
    >>> a, b = labels.new([3]), labels.new([3])
    >>> labels.tied([a, b]); labels.fix(a[:1], "it is a graph output")
    tensor([1, 2, 3])
    >>> labels.settle()[torch.stack([a, b])]
    tensor([[0, 1, 2],
            [0, 1, 2]])
    """

    def __init__(self):
        self.count = 1
        self._ties = nx.utils.UnionFind()
        self._fixed: dict[int, object] = {}  # label -> why
        self._reasons: dict[int, object] = {}  # root -> why, once settled

    def new(self, sizes: Iterable[int]) -> Tensor:
        """Labels nobody has, of these sizes."""
        sizes = list(sizes)
        first, self.count = self.count, self.count + math.prod(sizes)
        return torch.arange(first, self.count).reshape(sizes)

    def tied(self, parts: list[Tensor], reason: object = None) -> Tensor:
        """Labels, broadcast to one shape, that must be equal element by element from now on; returns the first.

        What is tied to ``FIXED`` is fixed, for ``reason``.
        """
        parts = torch.broadcast_tensors(*parts)
        result = parts[0].clone()
        for other in parts[1:]:
            pairs = torch.stack([parts[0].flatten(), other.flatten()]).unique(dim=1)
            for a, b in pairs.t().tolist():
                if FIXED in (a, b):
                    self._fix(max(a, b), reason)
                elif a != b:
                    self._ties.union(a, b)
            result = torch.where(other == FIXED, other, result)
        return result

    def along(self, labels: Tensor, axis: int, reason: object = None) -> Tensor:
        """The labels, made to vary along ``axis`` only."""
        for dim in range(labels.ndim):
            if dim != axis % labels.ndim and labels.shape[dim] > 1:
                labels = self.tied([part.unsqueeze(dim) for part in labels.unbind(dim)], reason)
        return labels

    def fix(self, labels: Tensor, reason: object = None) -> None:
        for label in labels.unique().tolist():
            self._fix(label, reason)

    def _fix(self, label: int, reason: object) -> None:
        if label != FIXED:
            self._fixed.setdefault(label, reason)

    def settle(self) -> Tensor:
        """(labels made,): the number of each, equal for tied ones, without gaps in order of appearance; 0 is FIXED."""
        numbers, roots = {FIXED: FIXED}, []
        self._reasons = {}
        for label, why in self._fixed.items():
            self._reasons.setdefault(self._ties[label], why)
        for label in range(self.count):
            root = FIXED if label == FIXED else self._ties[label]
            roots.append(FIXED if root in self._reasons else root)
            numbers.setdefault(roots[-1], len(numbers))
        return torch.tensor([numbers[root] for root in roots])

    def why_fixed(self, label: int) -> object:
        """The first reason given for a label that ``settle`` found fixed, None for one that is free."""
        return self._reasons.get(self._ties[label]) if label != FIXED else None


def spread(vector: Tensor, axis: int, ndim: int) -> Tensor:
    """(C,) as a tensor of ``ndim`` dimensions that varies along ``axis``: (1, C, 1, 1)."""
    return vector.reshape([-1 if dim == axis else 1 for dim in range(ndim)])
