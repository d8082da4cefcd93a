"""Histograms of activations on calibration data, in one pass and constant memory.

histograms = observe(gm, nodes, lambda model: model(x))     # node -> Histogram
lo, hi = choose_range(histograms[node], "mse", bits=8)       # range_methods.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn

from .errors import CalibrationError
from .meta import Statistics, place, tensor_meta

BINS = 4096
_CHUNK = 1 << 22  # elements per torch.histc call, whose float32 counts are exact below 2^24


class Histogram:
    """Streaming distribution of one tensor.

    ``counts`` (4096,) float64 are equal bins over [-limit, limit] and hold every value but the exact zeros, counted in
    ``zeros``. The limit is the power of two at or above the largest magnitude; it doubles when a larger value arrives and
    neighboring bins merge, so that a generator is read only once. ``mean``, ``std``, ``lo``, ``hi``: float64, exact, (C,)
    along ``axis`` or ().

    >>> h = Histogram(); h.update(torch.tensor([0.0, 1.0, 3.0])); (h.min, h.max, float(h.zeros), float(h.counts.sum()))
    (0.0, 3.0, 1.0, 2.0)
    """

    def __init__(self, axis: int | None = None):
        self.axis = axis
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.zeros = 0.0
        self.limit = 0.0
        self.number = 0  # values seen per channel
        self.mean = self.lo = self.hi = self._squares = torch.zeros((), dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Take in one batch: finite floats of any shape, at least one."""
        x = x.detach()
        lo, hi = self._update_moments(x)
        self._grow(max(-lo, hi))
        if self.limit == 0:
            self.zeros += x.numel()
            return
        for part in x.flatten().float().split(_CHUNK):
            zeros = part.numel() - int(torch.count_nonzero(part))
            counts = torch.histc(part, BINS, -self.limit, self.limit).double()
            counts[BINS // 2] -= zeros  # histc puts 0 into the bin [0, width)
            self.zeros += zeros
            self.counts += counts

    @property
    def min(self) -> float:
        return float(self.lo.min())

    @property
    def max(self) -> float:
        return float(self.hi.max())

    @property
    def std(self) -> Tensor:
        return (self._squares / self.number).clamp(min=0).sqrt()

    @property
    def edges(self) -> Tensor:
        """Bin boundaries, (4097,) float64."""
        return torch.linspace(-self.limit, self.limit, BINS + 1, dtype=torch.float64)

    def statistics(self) -> Statistics:
        """Per channel where the tensor has a channel axis; lo and hi are the extremes seen."""
        return Statistics(self.mean, self.std, self.lo, self.hi, "calibrated")

    def _update_moments(self, x: Tensor) -> tuple[float, float]:
        """Chan et al. 1979: exact merging of means and sums of squared deviations. Returns the batch's extremes."""
        kept = None if self.axis is None else self.axis % x.ndim
        dims = [d for d in range(x.ndim) if d != kept]
        var, mean = (t.double() for t in torch.var_mean(x, dims, correction=0))
        lo, hi = x.amin(dims).double(), x.amax(dims).double()
        number = x.numel() // mean.numel()
        total = self.number + number
        delta = mean - self.mean
        self._squares = self._squares + var * number + delta**2 * self.number * number / total
        self.mean = self.mean + delta * number / total
        self.lo = lo if self.number == 0 else torch.minimum(self.lo, lo)
        self.hi = hi if self.number == 0 else torch.maximum(self.hi, hi)
        self.number = total
        return float(lo.min()), float(hi.max())

    def _grow(self, largest: float) -> None:
        """Limits are powers of two: bins of one limit are unions of bins of any smaller one."""
        mantissa, exponent = math.frexp(largest)
        limit = 0.0 if largest == 0 else math.ldexp(1.0, exponent - (mantissa == 0.5))
        if self.limit == 0:
            self.limit = limit
        while self.limit < limit:
            self.limit *= 2
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : 3 * BINS // 4] = merged


def observe(gm: fx.GraphModule, nodes: Iterable[fx.Node], run: Callable[[nn.Module], None]) -> dict[fx.Node, Histogram]:
    """Run ``run(module)``, where ``module`` takes the graph's flat inputs, and record the values of ``nodes``.

    Intermediate tensors are dropped as soon as their last reader has run. Raises ``CalibrationError`` when a recorded
    value is NaN or infinite (naming the node) and when ``run`` never called the module.
    """
    histograms = {node: Histogram(tensor_meta(node).channel_axis) for node in nodes}
    recorder = _Recorder(gm, histograms)
    with torch.no_grad():
        run(recorder)
    if any(h.number == 0 for h in histograms.values()):
        raise CalibrationError("calibration ran no example through the model", stage="calibration",
                               expected="at least one", remedy="Check that calibration_data is not empty.")  # fmt: skip
    return histograms


class _Recorder(nn.Module):
    """The graph as a module that updates a histogram for every recorded node."""

    def __init__(self, gm: fx.GraphModule, histograms: dict[fx.Node, Histogram]):
        super().__init__()
        self.interpreter = _RecordingInterpreter(gm, histograms)
        self.eval()

    def forward(self, *inputs: Tensor) -> object:
        return self.interpreter.run(*inputs)


class _RecordingInterpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, histograms: dict[fx.Node, Histogram]):
        super().__init__(gm, garbage_collect_values=True)
        self.extra_traceback = False
        self.histograms = histograms

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if node in self.histograms and value.numel():
            if not all(map(math.isfinite, torch.aminmax(value.detach()))):  # NaN is both minimum and maximum
                raise CalibrationError("the calibration data give NaN or infinity here", stage="calibration",
                                       where=place(node), expected="finite activations",
                                       remedy="Check the preprocessing of the calibration data.")  # fmt: skip
            self.histograms[node].update(value)
        return value
