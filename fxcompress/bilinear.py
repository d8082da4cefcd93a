"""Bilinear algorithms for matrix products: fewer products of blocks than the definition has, for more sums of blocks.

An algorithm for <n, m, p> is three integer tensors. With A cut into n x m blocks, B into m x p and C = A B into n x p:

    S_r = sum_ik a[r, i, k] A_ik      T_r = sum_kj b[r, k, j] B_kj      P_r = S_r T_r      C_ij = sum_r c[i, j, r] P_r

Everything else (number of products, additions, bits of the operands) is computed from these. Blocks need not commute, so an
algorithm applies to blocks again: ``algorithm.levels(2)``. It is exact if and only if

    sum_r a[r, i, k] b[r, h, j] c[x, y, r]  =  [k = h] [i = x] [j = y]        (Brent 1970)

which is checked in integers when an algorithm is registered.

    >>> STRASSEN.products, STRASSEN.additions, WINOGRAD.additions
    (7, Additions(a=5, b=5, c=8), Additions(a=4, b=4, c=7))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .analysis.interval_arithmetic import Interval, combinations_of, exactly
from .errors import OptionError
from .sum_schedule import SumSchedule, record, schedule, sums_without, terms_without


class Additions(NamedTuple):
    """Additions of blocks: of A, of B, of products into C."""

    a: int
    b: int
    c: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True, eq=False)
class BilinearAlgorithm:
    """One algorithm. Raises ``OptionError`` if the tensors do not fit each other.

    Attributes:
        name: what ``matmul_algorithm`` and the report call it.
        a: (R, n, m) integers, the block sums of the left operand.
        b: (R, m, p), of the right operand.
        c: (n, p, R), what each block of the result takes from the products.
        schedules: the additions: programs for the R sums of A, the R sums of B and the n p blocks of C, terms and blocks in
            row-major order. Found by sharing sub-sums if not given.
    """

    name: str
    a: Tensor
    b: Tensor
    c: Tensor
    schedules: tuple[SumSchedule, SumSchedule, SumSchedule] | None = None

    def __post_init__(self):
        for field in ("a", "b", "c"):
            object.__setattr__(self, field, torch.as_tensor(getattr(self, field), dtype=torch.int64))
        found = [tuple(t.shape) for t in (self.a, self.b, self.c)]
        if any(len(s) != 3 for s in found) or found != [(r := found[0][0], n := found[0][1], m := found[0][2]),
                                                        (r, m, p := found[1][2]), (n, p, r)]:  # fmt: skip
            raise OptionError(f"the algorithm {self.name!r} has coefficients of shapes {found}", stage="matmul_algorithm",
                              expected="(R, n, m), (R, m, p) and (n, p, R)")  # fmt: skip
        if self.schedules is None:
            found = (self.a.flatten(1), self.b.flatten(1), self.c.flatten(0, 1))
            object.__setattr__(self, "schedules", tuple(schedule(t.tolist()) for t in found))

    @classmethod
    def parse(cls, name: str, size: tuple[int, int, int], products: Iterable[str], results: Iterable[str]):
        """An algorithm as papers print it: ``products`` "(a11 + a22)(b11 + b22)", ``results`` "m1 + m4 - m5 + m7", rows of C first.

        Raises ``OptionError`` naming the formula that cannot be read.
        """
        n, m, p = size
        products, results = list(products), list(results)
        factors = [_factors(name, text) for text in products]
        a = torch.stack([_terms(name, left, "a", (n, m)) for left, _ in factors])
        b = torch.stack([_terms(name, right, "b", (m, p)) for _, right in factors])
        c = torch.stack([_terms(name, text, "m", (len(products),)) for text in results])
        return cls(name, a, b, c.reshape(n, p, len(products)) if len(results) == n * p else c)

    @property
    def size(self) -> tuple[int, int, int]:
        """(n, m, p): blocks along the rows of A, the sum, the columns of B."""
        return self.a.shape[1], self.a.shape[2], self.b.shape[2]

    @property
    def products(self) -> int:
        """How many products of blocks."""
        return self.a.shape[0]

    @property
    def additions(self) -> Additions:
        """Of its schedules."""
        return Additions(*(s.additions for s in self.schedules))

    @cached_property
    def defect(self) -> Tensor:
        """(n, p, n, m, m, p) integers: how the coefficient of A_ik B_hj in C_xy differs from the matrix product's. 0: exact."""
        n, m, p = self.size
        sides = (self.a.flatten(1)[:, :, None] * self.b.flatten(1)[:, None]).flatten(1)  # (R, nm mp)
        found = (self.c.reshape(n * p, -1) @ sides).reshape(n, p, n, m, m, p)
        rows, inner, columns = (torch.eye(size, dtype=torch.int64) for size in (n, m, p))
        return found - torch.einsum("xi,kh,yj->xyikhj", rows, inner, columns)

    @property
    def is_exact(self) -> bool:
        """Whether it computes the product of any two matrices."""
        return not bool(self.defect.any())

    def compose(self, inner: BilinearAlgorithm, name: str | None = None) -> BilinearAlgorithm:
        """This algorithm whose products are computed by ``inner``: the Kronecker product of the coefficients."""
        schedules = (
            _sums_of_sums(self.schedules[0], inner.schedules[0], self.size[:2], inner.size[:2]),
            _sums_of_sums(self.schedules[1], inner.schedules[1], self.size[1:], inner.size[1:]),
            _results_of_results(self, inner),
        )
        return BilinearAlgorithm(name or f"{self.name} of {inner.name}", torch.kron(self.a, inner.a),
                                 torch.kron(self.b, inner.b), torch.kron(self.c, inner.c), schedules)  # fmt: skip

    def levels(self, count: int) -> BilinearAlgorithm:
        """This algorithm applied to its own products, ``count`` levels in all (0: one product of whole matrices)."""
        result = NAIVE
        for _ in range(count):
            result = self if result is NAIVE else self.compose(result, self.name)
        return result

    def without(self, products: Iterable[int]) -> BilinearAlgorithm:
        """The algorithm with these products left out (0-based): no longer exact where they were needed."""
        gone = set(products)
        keep = [r for r in range(self.products) if r not in gone]
        a, b, c = self.schedules
        schedules = (sums_without(a, gone), sums_without(b, gone), terms_without(c, gone))
        return BilinearAlgorithm(self.name, self.a[keep], self.b[keep], self.c[..., keep], schedules)


def _sums_of_sums(
    outer: SumSchedule, inner: SumSchedule, size: Sequence[int], inner_size: Sequence[int]
) -> SumSchedule:
    """The sums of a composition: those of ``outer`` over every block of its blocks, then those of ``inner``."""

    def run(terms: list) -> list:
        blocks = _blocks_of_blocks(terms, size, inner_size)
        sums = zip(*(outer.run(block) for block in blocks), strict=True)  # per product, its blocks
        return [result for blocks_of_sum in sums for result in inner.run(blocks_of_sum)]

    return record(outer.inputs * inner.inputs, run)


def _results_of_results(outer: BilinearAlgorithm, inner: BilinearAlgorithm) -> SumSchedule:
    size, inner_size = (outer.size[0], outer.size[2]), (inner.size[0], inner.size[2])

    def run(products: list) -> list:
        groups = [products[r * inner.products : (r + 1) * inner.products] for r in range(outer.products)]
        blocks = zip(
            *(inner.schedules[2].run(group) for group in groups), strict=True
        )  # per inner block, its outer products
        results = [outer.schedules[2].run(block) for block in blocks]
        order = _blocks_of_blocks(list(range(len(results) * len(results[0]))), size, inner_size)
        place = {at: results[i][j] for i, row in enumerate(order) for j, at in enumerate(row)}
        return [place[at] for at in range(len(place))]

    return record(outer.products * inner.products, run)


def _blocks_of_blocks(terms: list, size: Sequence[int], inner: Sequence[int]) -> list[list]:
    """Row-major blocks of a (size * inner) grid as [inner block][outer block]."""
    grid = (
        torch.arange(len(terms))
        .reshape(size[0], inner[0], size[1], inner[1])
        .permute(1, 3, 0, 2)
        .flatten(2)
        .flatten(0, 1)
    )
    return [[terms[i] for i in row] for row in grid.tolist()]


def operand_range(coefficients: Tensor, lo: int, hi: int) -> Interval:
    """(R,): what sums ``coefficients`` (R, ...) of elements in lo..hi span: S_r of ``algorithm.a``, T_r of ``algorithm.b``.

    >>> operand_range(WINOGRAD.a, -128, 127).bounds, operand_range(WINOGRAD.a, -128, 127).bits
    ((-510, 510), 10)
    """
    return combinations_of(exactly(lo, hi), coefficients.flatten(1))


# ----------------------------------------------------------------------------------------------- formulas as printed

_FACTORS = re.compile(r"\s*(?:\(([^()]*)\)|([ab]\d\d))\s*\*?\s*(?:\(([^()]*)\)|([ab]\d\d))\s*")
_TERM = re.compile(r"\s*([+-]?)\s*(\d*)\s*\*?\s*([abm])(\d+)\s*")


def _factors(name: str, text: str) -> tuple[str, str]:
    match = _FACTORS.fullmatch(text)
    if match is None:
        raise _unreadable(name, text, "two factors, (a11 + a22)(b11 - b12)")
    return match[1] or match[2], match[3] or match[4]


def _terms(name: str, text: str, letter: str, size: Sequence[int]) -> Tensor:
    """The coefficients of a sum such as "a11 - 2 a12" as a tensor of ``size``."""
    result, at = torch.zeros(size, dtype=torch.int64), 0
    while at < len(text):
        match = _TERM.match(text, at)
        if match is None or match[3] != letter or (at and not match[1]):
            raise _unreadable(name, text, f"a sum of {letter}...")
        index = tuple(int(d) - 1 for d in (match[4] if len(size) > 1 else [match[4]]))
        if len(index) != len(size) or any(not 0 <= i < n for i, n in zip(index, size, strict=True)):
            raise _unreadable(name, text, f"indices up to {letter}{''.join(map(str, size))}")
        result[index] += int(f"{match[1]}{match[2] or 1}")
        at = match.end()
    return result


def _unreadable(name: str, text: str, expected: str) -> OptionError:
    return OptionError(f"{text!r} in the algorithm {name!r}", stage="matmul_algorithm", expected=expected,
                       remedy='Write products as "(a11 + a22)(b11 + b22)" and results as "m1 + m4 - m5".')  # fmt: skip


# --------------------------------------------------------------------------------------------------- the algorithms

NAIVE = BilinearAlgorithm("naive", torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1))

#: Strassen 1969, Gaussian elimination is not optimal.
STRASSEN = BilinearAlgorithm.parse(
    "strassen", (2, 2, 2),
    ["(a11 + a22)(b11 + b22)", "(a21 + a22) b11", "a11 (b12 - b22)", "a22 (b21 - b11)", "(a11 + a12) b22",
     "(a21 - a11)(b11 + b12)", "(a12 - a22)(b21 + b22)"],
    ["m1 + m4 - m5 + m7", "m3 + m5", "m2 + m4", "m1 - m2 + m3 + m6"],
)  # fmt: skip

#: Winograd 1971, On multiplication of 2 x 2 matrices: 15 additions, the fewest possible with 7 products.
WINOGRAD = BilinearAlgorithm.parse(
    "winograd", (2, 2, 2),
    ["a11 b11", "a12 b21", "(a11 + a12 - a21 - a22) b22", "a22 (b11 - b12 - b21 + b22)", "(a21 + a22)(b12 - b11)",
     "(a21 + a22 - a11)(b11 - b12 + b22)", "(a11 - a21)(b22 - b12)"],
    ["m1 + m2", "m1 + m3 + m5 + m6", "m1 - m4 + m6 + m7", "m1 + m5 + m6 + m7"],
)  # fmt: skip

#: What ``matmul_algorithm`` may name.
ALGORITHMS: dict[str, BilinearAlgorithm] = {}


def register_algorithm(algorithm: BilinearAlgorithm) -> BilinearAlgorithm:
    """Make ``algorithm`` a value of ``matmul_algorithm``, after proving that it multiplies matrices.

    Raises:
        OptionError: its name is taken, or it computes something else: names the block of C and the term that is wrong.

    >>> register_algorithm(BilinearAlgorithm.parse("two columns", (1, 1, 2), ["a11 b11", "a11 b12"], ["m1", "m2"]))  # doctest: +SKIP
    """
    if algorithm.name in ALGORITHMS or algorithm.name == "auto":
        raise OptionError(
            f"an algorithm named {algorithm.name!r} exists", stage="matmul_algorithm", remedy="Choose another name."
        )
    if not algorithm.is_exact:
        x, y, i, k, h, j = (int(v) + 1 for v in algorithm.defect.nonzero()[0])
        found = int(algorithm.defect[x - 1, y - 1, i - 1, k - 1, h - 1, j - 1]) + (x == i and y == j and k == h)
        raise OptionError(f"the algorithm {algorithm.name!r} has {found} a{i}{k} b{h}{j} in c{x}{y}", stage="matmul_algorithm",
                          expected=str(int(x == i and y == j and k == h)), remedy="Check the signs of its formulas.")  # fmt: skip
    ALGORITHMS[algorithm.name] = algorithm
    return algorithm


for _algorithm in (NAIVE, STRASSEN, WINOGRAD):
    register_algorithm(_algorithm)
