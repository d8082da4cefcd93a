"""Assign ranges: every float activation gets statistics, and the interval that its 8-bit codes should cover.

    calibrated   chosen from the values observed on calibration data (``range_methods.py``)
    data-free    batch-norm moments propagated through the graph (``moments.py``), +- ``range_sigmas`` sigma

Only tensors that are quantized are observed; everything else gets the propagated estimate, which then starts from the
observed tensors. Graph inputs are never clipped: a declared ``input_range`` holds, else the calibrated extremes. Branches
of additions stay unrounded and only need their extremes. Values do not change.

Level: float. Effect: EXACT. Source: Nagel et al. 2019, section 4.1 (data-free); Krishnamoorthi 2018, section 3 (calibrated).
"""

from __future__ import annotations

import torch
from torch import fx

from fxcompress.analysis.quantization import QuantizationPoints, is_activation, keeps_float, ranged_nodes
from fxcompress.errors import CalibrationError
from fxcompress.meta import Range, Statistics, describe, place, tensor_meta
from fxcompress.moments import Estimate, declared_range, propagate
from fxcompress.observers import Histogram, observe
from fxcompress.options import context
from fxcompress.range_methods import choose_range
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan, Reject

INPUT_TOLERANCE = 0.1  # of the declared width: calibration inputs outside it are a mistake in the preprocessing


class AssignRanges(Pass):
    name = "assign_ranges"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "Nagel et al. 2019, section 4.1; Krishnamoorthi 2018, section 3"
    needs = {Fact.IN_DIALECT, Fact.STATISTICS, Fact.BATCH_NORM_FOLDED}
    establishes = {Fact.RANGES}

    def plan(self, gm: fx.GraphModule) -> Plan:
        """One match per tensor without a range. Runs the calibration data when a tensor to be quantized has none.

        Raises ``CalibrationError`` when such a tensor cannot be estimated without data.
        """
        plan = Plan(self.name, gm)
        pending = [n for n in gm.graph.nodes if is_activation(n) and tensor_meta(n).range is None]
        if not pending:
            return plan
        needed = ranged_nodes(gm)
        reused = context(gm).choices.ranges
        observed = self._calibrated(gm, [n for n in needed if n in pending and n.name not in reused])
        estimates = propagate(gm, observed)
        for node in pending:
            if node in estimates:
                plan.matches.append(_match(node, _reuse(estimates[node], reused.get(node.name))))
            elif node in needed:
                raise _no_statistics(node)
            else:
                plan.rejects.append(Reject("nothing is known about it without data, and it needs no range", node))
        return plan

    def apply(self, plan: Plan) -> PassResult:
        for match in plan.matches:
            describe(match.node, statistics=match.data.statistics, range=match.data.range)
            plan.applied += 1
        return PassResult(plan.graph_module, plan.applied > 0)

    def _calibrated(self, gm: fx.GraphModule, nodes: list[fx.Node]) -> dict[fx.Node, Estimate]:
        run = context(gm).calibrate
        if run is None or not nodes:
            return {}
        points = QuantizationPoints(gm)
        histograms = observe(gm, nodes, run)
        return {n: _estimate(gm, n, h, points.is_accumulator(n)) for n, h in histograms.items()}


def _estimate(gm: fx.GraphModule, node: fx.Node, histogram: Histogram, unrounded: bool) -> Estimate:
    """Observed statistics and the chosen range, cut per channel to the values that channel took."""
    options = context(gm).options
    stats = histogram.statistics()
    if node.op == "placeholder":
        if (declared := declared_range(gm, node)) is not None:
            _check_declared(node, stats, *declared)
            lo, hi = (torch.broadcast_to(bound, stats.mean.shape) for bound in declared)
            return Estimate(stats, Range(lo, hi, "declared"))
        if float(stats.lo.min()) == float(stats.hi.max()):
            raise CalibrationError(f"every calibration value of this input is {float(stats.lo.min()) + 0.0:g}", stage="assign_ranges",
                                   where=place(node), expected="typical inputs", remedy="Check how the data are loaded.")  # fmt: skip
        method = "minmax"
    else:
        method = "minmax" if unrounded else options.range_method
    lo, hi = choose_range(histogram, method, options.target.activation_bits, options.percentile)
    return Estimate(stats, Range(stats.lo.clamp(lo, hi), stats.hi.clamp(lo, hi), f"calibrated {method}"))


def _check_declared(node: fx.Node, stats: Statistics, lo: torch.Tensor, hi: torch.Tensor) -> None:
    margin = INPUT_TOLERANCE * (hi - lo)
    if (stats.lo < lo - margin).any() or (stats.hi > hi + margin).any():
        found = f"calibration inputs span [{float(stats.lo.min()):.5g}, {float(stats.hi.max()):.5g}]"
        raise CalibrationError(found, stage="assign_ranges", where=place(node),
                               expected=f"values in input_range [{float(lo.min()):.5g}, {float(hi.max()):.5g}]",
                               remedy="Preprocess the calibration data like the model's inputs, or correct input_range.")  # fmt: skip


def _reuse(estimate: Estimate, earlier: Range | None) -> Estimate:
    return estimate if earlier is None else Estimate(estimate.statistics, earlier)


def _match(node: fx.Node, estimate: Estimate) -> Match:
    lo, hi = estimate.range.bounds
    return Match(node, f"[{lo:.6g}, {hi:.6g}] {estimate.range.provenance}", estimate)


def _no_statistics(node: fx.Node) -> CalibrationError:
    return CalibrationError(
        "no statistics reach this tensor, so its range is unknown",
        stage="assign_ranges",
        where=place(node),
        expected="calibration data" if not keeps_float(node) else "calibration data, as it comes out of a float module",
        remedy="Pass calibration_data (about 100 examples).",
    )
