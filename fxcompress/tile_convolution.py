"""Convolution in tiles with fewer multiplications (Winograd's minimal filtering), in integers: derived, not typed in.

One dimension, m results of r taps from a tile of t = m + r - 1 inputs, element by element, with t products instead of m r:

    scale * y = result @ ((weight @ g) * (data @ d))                 y_i = sum_k g_k d_(i+k)

Cook-Toom: interpolating the product of polynomials of degree m - 1 and r - 1 at t - 1 points and infinity multiplies them with t products;
its transpose is the filter. Interpolation divides by differences of points, so the rows of ``data`` are scaled to the smallest integers
and ``result`` makes up for it: everything is an integer, and the result is ``scale`` times the convolution, hence divisible. Two dimensions
nest: (m t)^2 for tiles of t x t, scale^2.

    >>> F2.scale, F4.scale, F2.multiplications_saved, F4.multiplications_saved
    (2, 24, 2.25, 4.0)

Sources: Toom 1963; Cook 1966; Winograd 1980, Arithmetic complexity of computations; Lavin and Gray 2016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from .errors import OptionError
from .sum_schedule import SumSchedule, record, schedule

STAGE = "conv_algorithm"


@dataclass(frozen=True, eq=False)
class ConvolutionAlgorithm:
    """One algorithm, the same in both dimensions. Raises ``OptionError`` if the matrices do not fit each other.

    Attributes:
        name: what ``conv_algorithm`` and the report call it.
        weight: (R, r) integers, the weight's side of the R products.
        data: (R, t) integers, the tile's.
        result: (m, R) integers, what each result takes from the products.
        scale: the results are as many times the convolution.
    """

    name: str
    weight: Tensor
    data: Tensor
    result: Tensor
    scale: int

    def __post_init__(self):
        for field in ("weight", "data", "result"):
            object.__setattr__(self, field, torch.as_tensor(getattr(self, field), dtype=torch.int64))
        (products, taps), m = self.weight.shape, len(self.result)
        if self.data.shape != (products, m + taps - 1) or self.result.shape != (m, products) or self.scale < 1:
            found = [tuple(t.shape) for t in (self.weight, self.data, self.result)]
            raise OptionError(f"the algorithm {self.name!r} has matrices of shapes {found} and the scale {self.scale}", stage=STAGE,
                              expected="(R, r), (R, m + r - 1), (m, R) and a whole number >= 1")  # fmt: skip

    @property
    def outputs(self) -> int:
        """m, along one dimension."""
        return self.result.shape[0]

    @property
    def taps(self) -> int:
        return self.weight.shape[1]

    @property
    def tile(self) -> int:
        """t, inputs along one dimension."""
        return self.data.shape[1]

    @property
    def products(self) -> int:
        """Of a tile of two dimensions."""
        return self.data.shape[0] ** 2

    @property
    def multiplications_saved(self) -> float:
        """Multiplications of the definition over those of a whole tile."""
        return (self.outputs * self.taps) ** 2 / self.products

    @cached_property
    def defect(self) -> Tensor:
        """(m, r, t) integers: how the coefficient of g_k d_j in y_i differs from scale [j = i + k]. 0: exact."""
        i, k, j = (torch.arange(n) for n in (self.outputs, self.taps, self.tile))
        wanted = self.scale * (j == (i[:, None] + k)[..., None])
        return torch.einsum("ir,rk,rj->ikj", self.result, self.weight, self.data) - wanted

    @property
    def is_exact(self) -> bool:
        return not bool(self.defect.any())

    @cached_property
    def encode(self) -> SumSchedule:
        """The additions of a tile: from t^2 inputs, row by row, to the data's side of the R^2 products."""
        return _nested(schedule(self.data.tolist()))

    @cached_property
    def decode(self) -> SumSchedule:
        """The additions of the results: from R^2 products to m^2 results."""
        return _nested(schedule(self.result.tolist()))

    def weight_operands(self, weight: Tensor) -> Tensor:
        """(R^2, O, C) int64, the weight's side of the products, from (O, C, r, r)."""
        return torch.einsum("ak,ockl,bl->aboc", self.weight, weight.to(torch.int64), self.weight).flatten(0, 1)


def _nested(program: SumSchedule) -> SumSchedule:
    """The program along the rows of a square grid, then along the columns of what it found; both row-major."""

    def run(terms: list) -> list:
        rows = [program.run(terms[i : i + program.inputs]) for i in range(0, len(terms), program.inputs)]
        columns = [program.run(column) for column in zip(*rows, strict=True)]
        return [value for row in zip(*columns, strict=True) for value in row]

    return record(program.inputs**2, run)


def cook_toom(name: str, outputs: int, points: Sequence[int], taps: int = 3) -> ConvolutionAlgorithm:
    """The algorithm of Cook and Toom for ``outputs`` results of ``taps`` taps, over ``points`` and infinity.

    points: outputs + taps - 2 different whole numbers. Small ones of both signs keep operands narrow and the scale small.
    Raises ``OptionError`` for other points.
    """
    count = outputs + taps - 2
    if len(set(points)) != count or len(points) != count or not all(isinstance(p, int) for p in points):
        raise OptionError(f"the points {list(points)} for {outputs} results of {taps} taps", stage=STAGE,
                          expected=f"{count} different whole numbers")  # fmt: skip
    rows = [_lagrange(points, i) for i in range(count)] + [_from_roots(points)]
    factors = [_to_integers(row) for row in rows]  # factor * row is the smallest integer multiple
    scale = math.lcm(*(f.numerator for f in factors))
    data = [[int(f * v) for v in row] for f, row in zip(factors, rows, strict=True)]
    result = _powers(points, outputs).T * torch.tensor([int(scale / f) for f in factors])
    return ConvolutionAlgorithm(name, _powers(points, taps), torch.tensor(data), result, scale)


def _powers(points: Sequence[int], count: int) -> Tensor:
    """(points + 1, count): the values of 1, x, x^2, ...; at infinity the highest only."""
    return torch.tensor([[p**k for k in range(count)] for p in points] + [[0] * (count - 1) + [1]])


def _lagrange(points: Sequence[int], index: int) -> list[Fraction]:
    """Coefficients, constant first, of the polynomial that is 1 at one point and 0 at the others; as many as points + 1."""
    others = [p for i, p in enumerate(points) if i != index]
    at_point = math.prod(points[index] - p for p in others)
    return [value / at_point for value in _from_roots(others)] + [Fraction(0)]


def _from_roots(roots: Sequence[int]) -> list[Fraction]:
    """Coefficients of prod (x - root), constant first."""
    found = [Fraction(1)]
    for root in roots:
        found = [high - root * low for high, low in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found


def _to_integers(row: Sequence[Fraction]) -> Fraction:
    """The least positive factor that makes integers of a row."""
    numerators, denominators = [v.numerator for v in row], [v.denominator for v in row]
    return Fraction(math.lcm(*denominators), math.gcd(*numerators))


def exact_division(scale: int) -> tuple[int, int]:
    """(b, c) with (x b + 2^(c-1)) >> c = x / scale for every int32 multiple x of ``scale``: b below 2^31, an operand of ``rescale``.

    b differs from 2^c / scale by at most 1/2, unless scale is a power of two and b is exact; otherwise c >= 32, so that the error
    |x| / 2 <= 2^30 is below one half of 2^c and rounding removes it.
    """
    shift = 30 + (scale - 1).bit_length()
    return (2 * (1 << shift) + scale) // (2 * scale), shift


#: What ``conv_algorithm`` may name, besides "direct" and "auto".
CONV_ALGORITHMS: dict[str, ConvolutionAlgorithm] = {}


def register_conv_algorithm(algorithm: ConvolutionAlgorithm) -> ConvolutionAlgorithm:
    """Make ``algorithm`` a value of ``conv_algorithm``, after proving that it convolves.

    Raises:
        OptionError: its name is taken, or it computes something else: names the result and the term that is wrong.

    >>> register_conv_algorithm(cook_toom("winograd3", 3, (0, 1, -1, 2)))                 # doctest: +SKIP
    """
    if algorithm.name in ("direct", "auto", *CONV_ALGORITHMS):
        raise OptionError(f"an algorithm named {algorithm.name!r} exists", stage=STAGE, remedy="Choose another name.")
    if not algorithm.is_exact:
        i, k, j = algorithm.defect.nonzero()[0].tolist()
        wanted = algorithm.scale * (j == i + k)
        found = wanted + int(algorithm.defect[i, k, j])
        raise OptionError(f"the algorithm {algorithm.name!r} has {found} g{k} d{j} in y{i}", stage=STAGE, expected=str(wanted),
                          remedy="Derive it with cook_toom.")  # fmt: skip
    CONV_ALGORITHMS[algorithm.name] = algorithm
    return algorithm


#: F(2x2, 3x3) and F(4x4, 3x3).
F2 = register_conv_algorithm(cook_toom("winograd2", 2, (0, 1, -1)))
F4 = register_conv_algorithm(cook_toom("winograd4", 4, (0, 1, -1, 2, -2)))
