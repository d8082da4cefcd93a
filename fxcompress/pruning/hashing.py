"""Hashing of weights: values are rounded to the modes of their density, so that neurons which differ little become identical (RED).

    density(w) = sum_i exp(-(w - w_i)^2 / 2 bandwidth^2),    bandwidth = kappa * median gap of the sorted distinct values

Minima of the density part the line; every value becomes the maximum of its part. Exact zeros stay zero. kappa = 1, as
published, leaves a third of the values distinct whatever their number, 16 leaves 3 to 5 % (Gaussian, Laplace and Student-3
samples of 1e3 to 1e5 values).

Source: Yvinec et al. 2021, RED, equations 3 and 4, with half-open parts; thesis, section 2.1.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

KAPPA = 16.0
STEPS = 4  # points of the grid per bandwidth
MOST_POINTS = 1 << 20


def hash_values(values: Tensor, kappa: float = KAPPA) -> Tensor:
    """The values with each replaced by the mode of its part; float64, of the same shape.

    Order is kept; of two values that become one, all between them do. Fewer than two distinct values stay as they are.

    >>> len(hash_values(torch.randn(1000, dtype=torch.float64)).unique()) < 100
    True
    """
    values = values.double()
    distinct = values.unique()
    if len(distinct) < 2:
        return values
    low, high = float(distinct[0]), float(distinct[-1])
    step = max(kappa * float(distinct.diff().median()) / STEPS, (high - low) / MOST_POINTS)
    grid, density = _density(values.flatten(), low, high, step)
    modes = _modes(density)
    between = [int(density[a : b + 1].argmin()) + a for a, b in itertools.pairwise(modes)]
    part = torch.bucketize(values, grid[torch.tensor(between, dtype=torch.int64)], right=True)
    return torch.where(values == 0, 0.0, grid[torch.tensor(modes)][part])


def _density(values: Tensor, low: float, high: float, step: float) -> tuple[Tensor, Tensor]:
    """(points, density at them), up to a factor, of a kernel that is cut off at four bandwidths."""
    reach = 4 * STEPS
    count = math.ceil((high - low) / step) + 2 * reach + 1
    grid = low + (torch.arange(count, dtype=torch.float64) - reach) * step
    histogram = torch.bincount(((values - grid[0]) / step).round().long(), minlength=count).double()
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64) / STEPS
    kernel = (-offsets.square() / 2).exp()
    return grid, torch.nn.functional.conv1d(histogram[None, None], kernel[None, None], padding=reach)[0, 0]


def _modes(density: Tensor) -> list[int]:
    """Indices of the local maxima, of a plateau its center."""
    values, counts = torch.unique_consecutive(density, return_counts=True)
    ends = counts.cumsum(0)
    padded = torch.nn.functional.pad(values, (1, 1), value=-math.inf)
    peaks = (values > padded[:-2]) & (values > padded[2:])
    return ((ends - counts + ends - 1) // 2)[peaks].tolist()
