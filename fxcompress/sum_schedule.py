"""Straight-line programs for several sums of the same terms: sub-sums that occur in more than one are computed once.

    schedule([[1, 1, 0], [1, 1, -1]])       # y0 = x0 + x1; y1 = x0 + x1 - x2
    2 additions: t3 = t0 + t1; t4 = t3 - t2

``schedule`` is greedy: the pair of terms that occurs in the most sums (up to a common factor) becomes a new term. Programs of programs
are made with ``record``. Operators of the integer dialect take a program as one tensor, so that a graph says which additions run.

Source: Paar 1997, Optimized arithmetic for Reed-Solomon encoders, with signs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

#: (i, ci, j, cj): the sum ci t_i + cj t_j, with i < j, ci > 0 and no common factor.
Pair = tuple[int, int, int, int]


@dataclass(frozen=True)
class SumSchedule:
    """Terms 0..inputs-1 are given; step k computes term inputs + k.

    Attributes:
        inputs: number of given terms.
        steps: (i, ci, j, cj): the new term is ci t_i + cj t_j.
        outputs: (i, c) per sum: it is c t_i; (-1, 0) for an empty one.
    """

    inputs: int
    steps: tuple[Pair, ...]
    outputs: tuple[tuple[int, int], ...]

    @property
    def additions(self) -> int:
        """Additions and subtractions of two terms."""
        return len(self.steps)

    def run(self, terms: Sequence) -> list:
        """The sums of ``terms`` (numbers, tensors, symbols); an empty sum is 0."""
        values = list(terms)
        for i, ci, j, cj in self.steps:
            values.append(_scaled(values[i], ci) + _scaled(values[j], cj))
        return [_scaled(values[i], c) if c else 0 for i, c in self.outputs]

    @property
    def coefficients(self) -> Tensor:
        """(sums, inputs) int64: what the sums are of the given terms."""
        units = list(torch.eye(self.inputs, dtype=torch.int64))
        zero = torch.zeros(self.inputs, dtype=torch.int64)
        return torch.stack([zero + row for row in self.run(units)])

    @property
    def tensor(self) -> Tensor:
        """(steps + sums, 4) int32: rows (i, ci, j, cj), of the sums (i, c, -1, 0)."""
        rows = [*self.steps, *((i, c, -1, 0) for i, c in self.outputs)]
        return torch.tensor(rows, dtype=torch.int32)

    @classmethod
    def from_tensor(cls, program: Tensor, inputs: int, sums: int) -> SumSchedule:
        """The program behind ``tensor``. Raises ``ValueError`` for a row that names a term which does not exist yet."""
        rows = [tuple(row) for row in program.tolist()]
        steps, outputs = rows[: len(rows) - sums], rows[len(rows) - sums :]
        legal = len(rows) >= sums and program.ndim == 2 and program.shape[1] == 4
        legal = legal and all(0 <= i < inputs + k and 0 <= j < inputs + k for k, (i, _, j, _) in enumerate(steps))
        if not legal or not all((0 <= i < inputs + len(steps) or c == 0) and j == -1 for i, c, j, _ in outputs):
            raise ValueError(f"no program for {sums} sums of {inputs} terms")
        return cls(inputs, tuple(steps), tuple((i, c) for i, c, _, _ in outputs))


def _scaled(value, factor: int):
    return value if factor == 1 else -value if factor == -1 else factor * value


# ------------------------------------------------------------------------------------------------- recorded programs


@dataclass(frozen=True)
class _Term:
    """factor * t_index of the program that is being recorded."""

    steps: list
    inputs: int
    index: int
    factor: int = 1

    def __neg__(self):
        return -1 * self

    def __rmul__(self, factor: int):
        return _Term(self.steps, self.inputs, self.index, factor * self.factor) if factor else 0

    def __add__(self, other):
        if other == 0:
            return self
        common = math.gcd(self.factor, other.factor)
        common = -common if self.factor < 0 else common
        self.steps.append((self.index, self.factor // common, other.index, other.factor // common))
        return _Term(self.steps, self.inputs, self.inputs + len(self.steps) - 1, common)

    __radd__ = __add__


def record(inputs: int, function: Callable[[list], Sequence]) -> SumSchedule:
    """The program that ``function`` runs on its ``inputs`` terms, without the steps that no result needs.

    >>> record(3, lambda t: [t[0] + t[1], t[2]]).additions
    1
    """
    steps: list[Pair] = []
    results = function([_Term(steps, inputs, i) for i in range(inputs)])
    outputs = [(-1, 0) if isinstance(term, int) else (term.index, term.factor) for term in results]
    needed = {i for i, _ in outputs}
    for k in reversed(range(len(steps))):
        if inputs + k in needed:
            needed |= {steps[k][0], steps[k][2]}
    kept = [k for k in range(len(steps)) if inputs + k in needed]
    place = {i: i for i in range(-1, inputs)} | {inputs + k: inputs + at for at, k in enumerate(kept)}
    moved = tuple((place[i], ci, place[j], cj) for i, ci, j, cj in (steps[k] for k in kept))
    return SumSchedule(inputs, moved, tuple((place[i], c) for i, c in outputs))


def sums_without(program: SumSchedule, gone: Iterable[int]) -> SumSchedule:
    """The program without some of its sums."""
    gone = set(gone)
    return record(program.inputs, lambda terms: [s for r, s in enumerate(program.run(terms)) if r not in gone])


def terms_without(program: SumSchedule, gone: Iterable[int]) -> SumSchedule:
    """The same sums of the remaining terms."""
    gone = set(gone)

    def run(terms: list) -> list:
        rest = iter(terms)
        return program.run([0 if i in gone else next(rest) for i in range(program.inputs)])

    return record(program.inputs - len(gone), run)


# --------------------------------------------------------------------------------------------------- the greedy search


def schedule(coefficients: Iterable[Sequence[int]]) -> SumSchedule:
    """The program for the sums ``coefficients[r][i] * t_i``; integers, one row per sum."""
    rows = [list(map(int, row)) for row in coefficients]
    inputs = len(rows[0]) if rows else 0
    sums = [{i: c for i, c in enumerate(row) if c} for row in rows]
    counts = Counter(pair for terms in sums for pair in _pairs(terms))
    steps: list[Pair] = []
    while counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        new = inputs + len(steps)
        steps.append(best)
        for terms in sums:
            if best[0] in terms and best[2] in terms and _pair(terms, best[0], best[2]) == best:
                _replace(terms, best, new, counts)
    return SumSchedule(inputs, tuple(steps), tuple(next(iter(terms.items()), (-1, 0)) for terms in sums))


def _pairs(terms: dict[int, int]) -> Iterable[Pair]:
    return (_pair(terms, i, j) for i, j in combinations(sorted(terms), 2))


def _pair(terms: dict[int, int], i: int, j: int) -> Pair:
    factor = math.gcd(terms[i], terms[j]) * (1 if terms[i] > 0 else -1)
    return i, terms[i] // factor, j, terms[j] // factor


def _replace(terms: dict[int, int], pair: Pair, new: int, counts: Counter) -> None:
    """Write ``new`` for the pair in one sum; ``counts`` follow."""
    counts.subtract(_pairs(terms))
    factor = terms.pop(pair[0]) // pair[1]
    del terms[pair[2]]
    terms[new] = factor
    counts.update(_pairs(terms))
    for spent in [p for p, count in counts.items() if count == 0]:
        del counts[spent]
