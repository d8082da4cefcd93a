"""From a histogram to the interval worth representing: min-max, percentile, mean squared error, KL divergence.

Every method returns finite (lo, hi) with lo <= 0 <= hi inside the observed extremes widened to 0, which must be a code
exactly (padding, ReLU). An all-zero tensor gives (0, 0). ``bits`` is the width of the unsigned affine codes.

Sources: percentile and KL: Migacz 2017 (TensorRT); mean squared error: Banner et al. 2019, here exact per histogram bin.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .numerics import affine_qparams
from .observers import BINS, Histogram

_SHRINK = 2.0 ** (-torch.arange(97, dtype=torch.float64) / 16)  # candidate clips: 1 down to 1/64 of the extreme
_SWEEPS = 6
_KL_START, _KL_STEP = 128, 8  # bins; TensorRT starts there too


def choose_range(histogram: Histogram, method: str, bits: int = 8, percentile: float = 99.99) -> tuple[float, float]:
    """Range by the method of that name: "minmax", "percentile", "mse" or "kl"."""
    if method == "percentile":
        return percentile_range(histogram, bits, percentile)
    return METHODS[method](histogram, bits)


def minmax_range(histogram: Histogram, bits: int = 8) -> tuple[float, float]:
    return min(histogram.min, 0.0), max(histogram.max, 0.0)


def percentile_range(histogram: Histogram, bits: int = 8, percentile: float = 99.99) -> tuple[float, float]:
    """Keep ``percentile`` percent of the values, exact zeros included; what is cut is shared by the sides that exist."""
    lo, hi = minmax_range(histogram)
    sides = (lo < 0) + (hi > 0)
    total = histogram.zeros + float(histogram.counts.sum())
    cut = total * (1 - percentile / 100) / max(sides, 1)
    if lo < 0:
        lo = max(lo, min(0.0, -_tail_quantile(histogram.counts.flip(0), histogram, cut)))
    if hi > 0:
        hi = min(hi, max(0.0, _tail_quantile(histogram.counts, histogram, cut)))
    return (lo, hi) if lo < hi else minmax_range(histogram)  # nearly all zeros: what is left must not vanish


def _tail_quantile(counts: Tensor, histogram: Histogram, cut: float) -> float:
    """Value above which ``cut`` of the counts lie, linear inside a bin; exact zeros sit at the middle edge."""
    above = torch.cat([counts.flip(0).cumsum(0).flip(0), counts.new_zeros(1)])  # counts above each edge
    above[: BINS // 2] += histogram.zeros
    bin_ = min(int((above > cut).sum()) - 1, BINS - 1)  # the last edge with more than ``cut`` above it
    if bin_ < 0:
        return -histogram.limit
    share = (above[bin_] - cut) / (above[bin_] - above[bin_ + 1]).clamp(min=1e-300)
    return float(histogram.edges[bin_] + share.clamp(max=1) * (histogram.edges[bin_ + 1] - histogram.edges[bin_]))


# ------------------------------------------------------------------------------------------------ mean squared error


def mse_range(histogram: Histogram, bits: int = 8) -> tuple[float, float]:
    """Minimize the expected squared error of the affine codes over clips of 1 to 1/64 of the extremes.

    A coarse grid over both ends finds the valley (one outlier makes a second one), descent over the two in turn its floor.
    """
    extremes = [torch.tensor(e, dtype=torch.float64) for e in minmax_range(histogram)]
    coarse = [e * _SHRINK[::6] if e != 0 else e.reshape(1) for e in extremes]
    los, his = (grid.flatten() for grid in torch.meshgrid(*coarse, indexing="ij"))
    best = quantization_error(histogram, los, his, bits).argmin()
    clips = [los[best], his[best]]
    for _ in range(_SWEEPS):
        before = list(clips)
        for side in (0, 1):
            if extremes[side] == 0:
                continue
            candidates = list(clips)
            candidates[side] = extremes[side] * _SHRINK
            clips[side] = candidates[side][quantization_error(histogram, *candidates, bits).argmin()]
        if clips == before:
            break
    return float(clips[0]), float(clips[1])


def quantization_error(histogram: Histogram, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """Mean of (x - Q(x))^2 for each candidate range; lo, hi float64 () or (K,), result (K,).

    Values are uniform inside a bin; the error is integrated exactly, so it is right even where a bin is wider than a
    step. With step s and the nearest code k of x, the antiderivative of the rounding error is
    ``k s^3/12 + (x - k s)^3/3``; outside the codes it grows by ``(x - end)^3/3``.
    """
    q = affine_qparams(*(t.reshape(-1, 1) for t in torch.broadcast_tensors(lo, hi)), bits)
    bottom, top = q.scale * (q.qmin - q.zero_point), q.scale * (q.qmax - q.zero_point)
    filled = histogram.counts.nonzero().flatten()
    if not len(filled):
        return torch.zeros_like(q.scale.flatten())
    first, last = int(filled[0]), int(filled[-1]) + 1
    x = histogram.edges[first : last + 1]
    inside = torch.clamp(x, bottom, top)
    code = torch.round(inside / q.scale)
    integral = code * q.scale**3 / 12 + (inside - code * q.scale) ** 3 / 3 + (x - inside) ** 3 / 3
    total = histogram.zeros + histogram.counts.sum()
    return (integral.diff(dim=1) / (x[1] - x[0])) @ histogram.counts[first:last] / total


# -------------------------------------------------------------------------------------------------------- KL divergence


def kl_range(histogram: Histogram, bits: int = 8) -> tuple[float, float]:
    """The clip of |x| whose quantized histogram is closest to the clipped one in KL(P || Q).

    2048 bins of |x|; Q merges the bins below the clip into 2^bits levels (2^(bits-1) when both signs occur) and spreads
    each level over its nonempty bins. Exact zeros are left out: they are a code whatever the clip. The measure does not
    see how far a clipped value was moved, so a histogram of few or repeated values is easily clipped too hard.
    """
    lo, hi = minmax_range(histogram)
    folded = histogram.counts[BINS // 2 :] + histogram.counts[: BINS // 2].flip(0)
    if not folded.any():
        return lo, hi
    used = int(folded.nonzero().max()) + 1
    levels = 1 << (bits if lo == 0 or hi == 0 else bits - 1)
    stops = [*range(max(levels, _KL_START), used, _KL_STEP), used]
    divergence = {stop: _divergence(folded, stop, levels) for stop in stops}
    clip = min(divergence, key=divergence.get) * histogram.limit / folded.numel()
    return max(lo, -clip), min(hi, clip)


def _divergence(counts: Tensor, stop: int, levels: int) -> float:
    """KL(P || Q) with P the first ``stop`` bins plus the clipped tail in the last one."""
    kept = counts[:stop]
    p = kept.clone()
    p[-1] += counts[stop:].sum()
    support = p > 0
    level = torch.arange(stop) * levels // stop
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, kept)
    filled = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, support.double())
    q = (mass / filled.clamp(min=1))[level][support]
    p = p[support]
    p, q = p / p.sum(), q / q.sum().clamp(min=1e-300)
    return float((p * (p / q.clamp(min=1e-12)).log()).sum())


METHODS: dict[str, Callable[..., tuple[float, float]]] = {
    "minmax": minmax_range,
    "percentile": percentile_range,
    "mse": mse_range,
    "kl": kl_range,
}
