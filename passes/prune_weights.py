"""Set single weights to zero: a share of them (unstructured), or all but N of every M (2:4).

    score every weight  ->  zeros (pruning/weights)  ->  correct the statistics

Shapes stay and so do the multiplications that dense kernels execute; what gets smaller is the saved file, which stores no
zeros (``packing``), and the work of a machine that skips them. Zeros stay zero in every later pass: batch norm, equalizing and
ranges scale rows and columns, and symmetric codes have a code 0.

Level: float. Effect: LOSSY. On the weights before batch norm folds, whose statistics follow.   Source: docs/pruning.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.analysis.channel_groups import ChannelGroups, Layer
from fxcompress.errors import OptionError
from fxcompress.graph import constant, set_constant
from fxcompress.meta import lies_in
from fxcompress.options import CompileOptions, context
from fxcompress.pruning.costs import Costs, nothing, weight_uses
from fxcompress.pruning.cut import shift_bias
from fxcompress.pruning.evidence import Evidence
from fxcompress.pruning.report import Pruned, PruningReport
from fxcompress.pruning.statistics import chosen_correction, correct_statistics, correctable, expected_inputs
from fxcompress.pruning.weights import (
    WEIGHT_CRITERIA,
    along_inputs,
    outside_pattern,
    pattern,
    per_row,
    prunable_layers,
    smallest,
)
from fxcompress.rewrite import Effect, Match, PassResult, Plan, Reject

from ._pruning import PruningPass


@dataclass(frozen=True, eq=False)
class _Zeros:
    """``removed``, bool, of the shape of the layer's weight."""

    groups: ChannelGroups
    layer: Layer
    removed: Tensor


class PruneWeights(PruningPass):
    """Zeros in weights, by the options ``pruning_granularity``, ``pruning_ratio`` and ``pruning_criterion``.

    Args:
        objective: a scalar of the flat outputs whose gradient criteria use; default: the predicted logits.

    >>> print(PruneWeights().plan(gm))                                         # doctest: +SKIP
    prune_weights: 3 rewrites, 1 refusals
      conv2d_1 [layer1.0.conv1 (resnet.py:61)]: 1152 of 2304 weights
    """

    name = "prune_weights"
    effect = Effect.LOSSY

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan, options = Plan(self.name, gm), context(gm).options
        if options.pruning_granularity in ("channels", "kernels") or not options.pruning_ratio or "pruning" in gm.meta:
            return plan
        groups = ChannelGroups(gm)
        removed = self._removed(groups, options, plan)
        for layer in prunable_layers(Evidence(groups)):
            zeros = removed.get(layer.rows.target)
            if zeros is not None and bool(zeros.any()):
                summary = f"{int(zeros.sum())} of {zeros.numel()} weights"
                plan.matches.append(Match(layer.node, summary, _Zeros(groups, layer, zeros)))
        return plan

    def _removed(self, groups: ChannelGroups, options: CompileOptions, plan: Plan) -> dict[str, Tensor]:
        """bool per weight; layers that are left alone join the refusals."""
        layers = []
        criterion = WEIGHT_CRITERIA[options.pruning_criterion]
        evidence = self.evidence(groups, criterion.needs_data)
        for layer in prunable_layers(evidence):
            if lies_in(layer.node, options.ignored_layers):
                plan.rejects.append(Reject("ignored_layers names it", layer.node))
            else:
                layers.append(layer)
        if (earlier := context(groups.gm).choices.pruning) is not None:  # another input shape: the same zeros
            return {layer.rows.target: earlier.constants[layer.rows.target] == 0 for layer in layers}
        found = criterion.score(evidence)
        scores = {layer.rows.target: found[layer.rows.target] for layer in layers}
        if (kept_of := pattern(options.pruning_granularity)) is None:
            removed = smallest(scores, options.pruning_ratio, options.pruning_budget) if scores else {}
            _check_reached(options, removed)
            return removed
        removed = {
            layer.rows.target: outside_pattern(layer.node, scores[layer.rows.target], *kept_of) for layer in layers
        }
        for layer in layers:
            if removed[layer.rows.target] is None:
                channels = along_inputs(layer.node, scores[layer.rows.target]).shape[-1]
                plan.rejects.append(
                    Reject(f"each output reads {channels} channels, no multiple of {kept_of[1]}", layer.node)
                )
        return {target: zeros for target, zeros in removed.items() if zeros is not None}

    def apply(self, plan: Plan) -> PassResult:
        gm, options, parts = plan.graph_module, context(plan.graph_module).options, [m.data for m in plan.matches]
        if not parts:
            return PassResult(gm, False)
        groups, correction = parts[0].groups, chosen_correction(gm, self.name)
        before = Costs(groups).without(nothing(groups))
        expected = expected_inputs(groups) if correction == "analytic" else {}
        counts = [_counts(gm, parts)]
        for part in parts:
            _zero(gm, part, expected.get(part.layer.node))
        counts.append(_counts(gm, parts))
        correct_statistics(gm, correction)
        earlier = context(gm).choices.pruning
        (weights, used, macs), (_, used_after, macs_after) = counts
        cost = (used, used_after) if earlier is None else earlier.cost
        constants = correctable(gm) | {p.layer.rows.target: constant(gm, p.layer.node.args[1]) for p in parts}
        gm.meta["pruned"] = Pruned(torch.zeros(0, dtype=torch.bool), cost, constants, correction)
        gm.meta["pruning"] = PruningReport(
            options.pruning_criterion, options.pruning_budget, "weights", options.pruning_ratio, 1 - used_after / weights,
            (before.parameters, before.parameters), (before.macs, before.macs),
            [{"name": str(p.layer), "units": p.removed.numel(), "removed": int(p.removed.sum()), "layers": [str(p.layer)]}
             for p in parts],
            refusals=[str(reject) for reject in plan.rejects], correction=correction, cost=cost,
            granularity=options.pruning_granularity, nonzero=(used, used_after), nonzero_macs=(macs, macs_after),
        )  # fmt: skip
        plan.applied = len(parts)
        return PassResult(gm, True)


def _check_reached(options: CompileOptions, removed: dict[str, Tensor]) -> None:
    total = sum(zeros.numel() for zeros in removed.values())
    share = sum(int(zeros.sum()) for zeros in removed.values()) / max(total, 1)
    if share < options.pruning_ratio - 1 / max(total, 1):
        raise OptionError(f"pruning_ratio is {options.pruning_ratio}, but at most {share:.3f} of the weights can be removed",
                          stage="prune_weights", remedy="Lower pruning_ratio, or name fewer ignored_layers.")  # fmt: skip


def _counts(gm: fx.GraphModule, parts: list[_Zeros]) -> tuple[int, int, int]:
    """(weights, those that are not zero, MACs per sample by these) of the layers that are pruned."""
    weights = {part.layer.rows.target: constant(gm, part.layer.node.args[1]) for part in parts}
    used = {target: int(weight.count_nonzero()) for target, weight in weights.items()}
    macs = sum(uses * used[target] for target, uses in weight_uses(gm) if target in used)
    return sum(weight.numel() for weight in weights.values()), sum(used.values()), macs


def _zero(gm: fx.GraphModule, part: _Zeros, mean: Tensor | None) -> None:
    """The zeros of one layer; what they took on average from its outputs goes into its bias."""
    node = part.layer.node
    weight = constant(gm, node.args[1]).detach()
    left = weight.masked_fill(part.removed, 0)
    if mean is not None:
        lost = along_inputs(node, (weight - left).double()) * per_row(node, mean.double(), weight)
        shift_bias(gm, part.layer, lost.flatten(1).sum(1))
    set_constant(gm, node.args[1].target, left)
