"""Data-free statistics and ranges: batch-norm moments propagated through the float graph.

    conv + BN      N(beta, gamma^2)                 range beta +- 6 |gamma|
    clamp          moments of the clipped Gaussian  range clamp(beta +- 6 |gamma|)
    add            means add, variances add         deviations of the range add in quadrature
    conv, linear   sum W m + b,  sum W^2 v          range mean +- 6 std
    average        mean and variance kept           range mean +- 6 std

The rule of each operator is in ``moment_rules.py``, the arithmetic in ``gaussian.py``; here are the walk and the graph
inputs. A node behind an operator without a rule, or whose moments are not finite, has no estimate.
Source: Nagel et al. 2019, sections 4.1-4.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from . import gaussian as g
from .analysis.quantization import activations
from .errors import InputError, OptionError
from .gaussian import Moments
from .graph import is_float, placeholders, shape
from .meta import Range, Statistics, place, tensor_meta
from .moment_rules import RULES, View
from .options import context, declared_ranges, parse_range

MEASURED = ("batch_norm", "calibrated")  # provenances that win over propagation
GUESS_MARGIN = 0.1  # of the width, on both sides


@dataclass(frozen=True, eq=False)
class Estimate:
    """What is believed about a tensor: its distribution, and the interval that should be representable."""

    statistics: Statistics
    range: Range

    @classmethod
    def of(cls, m: Moments, provenance: str, range_provenance: str | None = None) -> Estimate:
        statistics = Statistics(m.mean, m.std, m.lo[g.SUPPORT], m.hi[g.SUPPORT], provenance)
        return cls(statistics, Range(m.lo[g.RANGE], m.hi[g.RANGE], range_provenance or provenance))

    @property
    def moments(self) -> Moments:
        s, r = self.statistics, self.range
        bounds = [torch.stack([hard.double(), torch.broadcast_to(soft.double(), hard.shape)])
                  for hard, soft in ((s.lo, r.lo), (s.hi, r.hi))]  # fmt: skip
        return Moments(s.mean.double(), s.std.double() ** 2, *bounds)


def propagate(gm: fx.GraphModule, known: Mapping[fx.Node, Estimate] | None = None) -> dict[fx.Node, Estimate]:
    """Estimates for the float activations of a float graph whose shapes are known, in topological order.

    ``known`` estimates (calibrated ones, say) and statistics already on a node with provenance "batch_norm" or
    "calibrated" win over the rules. Statistics and ranges are per channel (C,) along the node's channel axis where the
    rules can follow it, else (). Raises ``InputError`` for a float input without a range (see ``input_estimate``).

    >>> propagate(gm)[relu].range.bounds                                      # doctest: +SKIP
    (0.0, 6.3)
    """
    known = known or {}
    view = View(gm, context(gm).options.range_sigmas)
    estimates = {}
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "call_function") or not is_float(node):
            continue
        estimate = known.get(node) or _estimate(view, node)
        if estimate is not None:
            estimates[node], view.moments[node] = estimate, estimate.moments
    return estimates


def _estimate(view: View, node: fx.Node) -> Estimate | None:
    ruled = _ruled(view, node)
    stats = tensor_meta(node).statistics
    if stats is None or stats.provenance not in MEASURED:
        if node.op == "placeholder":
            return input_estimate(view.gm, node) if node.users else None
        return None if ruled is None else Estimate.of(ruled, "propagated", f"propagated {view.sigmas:g} sigma")
    if ruled is not None:  # batch norm does not know that its input comes from a ReLU
        lo, hi = (torch.broadcast_to(bound[g.SUPPORT], stats.lo.shape) for bound in (ruled.lo, ruled.hi))
        stats = replace(stats, lo=stats.lo.clamp(lo, hi), hi=stats.hi.clamp(lo, hi))
    chosen = tensor_meta(node).range or Range(
        *gaussian_range(stats, view.sigmas), f"{stats.provenance} {view.sigmas:g} sigma"
    )
    return Estimate(stats, chosen)


def _ruled(view: View, node: fx.Node) -> Moments | None:
    """What the operator's rule says; None without a rule, with an unknown input, or when the moments are not finite."""
    rule = RULES.get(node.target)
    if rule is None or any(n not in view.moments for n in activations(node)):
        return None
    m = rule(view, node)
    if m is None:
        return None
    axis = tensor_meta(node).channel_axis
    if m.mean.ndim and (axis is None or shape(node)[axis] != m.mean.shape[0]):
        m = g.pooled(m)
    m = g.consistent(m)
    return m if m.is_finite else None


def gaussian_range(stats: Statistics, sigmas: float) -> tuple[Tensor, Tensor]:
    """mean +- sigmas * std inside the support [stats.lo, stats.hi]: two float64 tensors shaped like the statistics."""
    m = g.normal(stats.mean, stats.std, stats.lo, stats.hi, sigmas)
    return m.lo[g.RANGE], m.hi[g.RANGE]


# ------------------------------------------------------------------------------------------------------- graph inputs


def declared_range(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """(lo, hi) of a float placeholder from ``options.input_range``, float64 () or (C,); None when not declared."""
    given = context(gm).options.input_range
    inputs = [n for n in placeholders(gm) if is_float(n)]
    given = declared_ranges(given, len(inputs))[inputs.index(node)]
    if given is None:
        return None
    lo, hi = parse_range(given, of=f" for {node.name}")
    channels = tensor_meta(node).channel_axis
    if lo.ndim and (channels is None or lo.shape != (shape(node)[channels],)):
        raise OptionError(f"input_range for {node.name} has {lo.numel()} pairs", stage="ranges",
                          expected="one (lo, hi), or one for each channel", remedy="For pixels divided by 255 it is (0, 1).")  # fmt: skip
    return lo, hi


def input_estimate(gm: fx.GraphModule, node: fx.Node) -> Estimate:
    """A placeholder's estimate: declared (uniform on its range), else guessed from the example input.

    A guess is the example's range widened by 10 % of its width on both sides. Raises ``InputError`` when there is
    neither, or when the example is constant or not finite.
    """
    declared = declared_range(gm, node)
    if declared is not None:
        lo, hi = declared
        return Estimate.of(g.interval((lo + hi) / 2, (hi - lo) / math.sqrt(12), lo, hi), "declared")
    examples, position = context(gm).example_inputs, placeholders(gm).index(node)
    remedy = "Pass input_range=(lo, hi), calibration_data, or example_inputs with typical values."
    if position >= len(examples):
        raise InputError("the range of this input is unknown", stage="ranges", where=place(node), remedy=remedy)
    example = examples[position].double()
    if not example.numel() or not torch.isfinite(example).all() or example.min() == example.max():
        raise InputError("the range of this input cannot be guessed: the example is empty, constant or not finite",
                         stage="ranges", where=place(node), remedy=remedy)  # fmt: skip
    lo, hi = example.min(), example.max()
    margin = GUESS_MARGIN * (hi - lo)
    return Estimate.of(g.interval(example.mean(), example.std(correction=0), lo - margin, hi + margin), "guessed")
