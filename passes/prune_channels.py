"""Remove channels, neurons and attention heads, and make the layers smaller.

    score every unit (criteria)  ->  choose which go (budgets)  ->  cut rows and columns (cut)  ->  correct the statistics

What goes together and what stays, and why, is said by ``analysis/channel_groups``. Before the statistics are corrected, the smaller
network is compared with the larger one whose removed channels are zero, in float64 on the example inputs.

Level: float. Effect: SHRINKS. Precondition: batch norm is not folded yet, so that its statistics can follow the cut.
Source: docs/pruning.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from fxcompress.analysis.channel_groups import ChannelGroups
from fxcompress.errors import InputError, OptionError
from fxcompress.options import CompileOptions, context
from fxcompress.pruning.budgets import Choice, choose
from fxcompress.pruning.costs import Costs, nothing
from fxcompress.pruning.criteria import CRITERIA
from fxcompress.pruning.cut import mask, shrink
from fxcompress.pruning.latency import cost_function
from fxcompress.pruning.merging import Merges, find_merges
from fxcompress.pruning.report import Pruned, PruningReport
from fxcompress.pruning.statistics import chosen_correction, correct_statistics, correctable, expected_inputs
from fxcompress.rewrite import Effect, Match, PassResult, Plan

from ._pruning import SHORT, PruningPass


@dataclass(frozen=True)
class _Part:
    """What a match of the plan carries: all matches share the groups; ``units`` are removed from one group."""

    groups: ChannelGroups
    units: list[int]
    choice: Choice


class PruneChannels(PruningPass):
    """Structured pruning by the options ``pruning_ratio``, ``pruning_criterion``, ...; does nothing at ratio 0.

    Args:
        objective: a scalar of the flat outputs whose gradient criteria use; default: the predicted logits.

    >>> print(PruneChannels().plan(gm))                                        # doctest: +SKIP
    prune_channels: 27 rewrites, 1 refusals
      conv2d_1 [layer1.0.conv1 (resnet.py:61)]: 4 of 16 units of layer1.0.conv1
    """

    name = "prune_channels"
    effect = Effect.SHRINKS

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan, options = Plan(self.name, gm), context(gm).options
        if not options.pruning_ratio or options.pruning_granularity != "channels":
            return plan
        groups = ChannelGroups(gm, options.ignored_layers)
        plan.rejects = groups.refusals
        if "pruning" in gm.meta:  # done: another share of what is left would be too much
            return plan
        choice = self._choice(groups, options)
        for group in groups.groups:
            units = [unit for unit in group.units if choice.removed[unit]]
            if units:
                summary = f"{len(units)} of {len(group.units)} units of {group.name}"
                plan.matches.append(Match(group.layers[0].node, summary, _Part(groups, units, choice)))
        return plan

    def _choice(self, groups: ChannelGroups, options: CompileOptions) -> Choice:
        if (earlier := context(groups.gm).choices.pruning) is not None:
            return _repeated(groups, earlier)
        choice = self.choose(groups, options, options.pruning_ratio)
        if choice.saved < options.pruning_ratio * (1 - SHORT):
            raise _too_much(options, choice.saved, groups)
        return choice

    def choose(
        self, groups: ChannelGroups, options: CompileOptions, ratio: float, gone: Tensor | None = None
    ) -> Choice:
        """The units to remove for ``ratio`` as the options say, those that are ``gone`` already (units,) among them."""
        criterion = CRITERIA[options.pruning_criterion]
        needs_data = criterion.needs_data or options.pruning_budget == "importance"
        evidence = self.evidence(groups, needs_data)
        scores = criterion.score(evidence)
        cost = cost_function(groups, options.pruning_measure, options.latency_table)
        if gone is not None:
            scores = scores.masked_fill(gone, -torch.inf)
        choice = choose(evidence, scores, ratio=ratio, budget=options.pruning_budget,
                        cost=cost, round_to=options.round_to)  # fmt: skip
        return choice if gone is None else Choice(choice.removed | gone, choice.cost)

    def apply(self, plan: Plan) -> PassResult:
        gm, options, parts = plan.graph_module, context(plan.graph_module).options, [m.data for m in plan.matches]
        if not parts:
            return PassResult(gm, False)
        groups, choice, removed = parts[0].groups, parts[0].choice, nothing(parts[0].groups)
        for part in parts:
            removed[part.units] = True
        costs = Costs(groups)
        before, after = costs.without(nothing(groups)), costs.without(removed)
        slices, merges = _slices(groups, removed), _merges(groups, removed)
        difference = self.difference(gm, partial(_masked_and_smaller, removed=removed, merges=merges), "channels")
        correction = _cut(groups, Choice(removed, choice.cost), merges)
        gm.meta["pruning"] = PruningReport(
            options.pruning_criterion, options.pruning_budget, options.pruning_measure, options.pruning_ratio, choice.saved,
            (before.parameters, after.parameters), (before.macs, after.macs),
            [{"name": group.name, "units": len(group.units), "removed": int(removed[list(group.units)].sum()),
              "layers": [str(layer) for layer in group.layers]} for group in groups.groups],
            slices, [str(reject) for reject in plan.rejects], difference, correction, choice.cost,
            merged=0 if merges is None else merges.count, merge_error=0.0 if merges is None else float(merges.error.max()),
        )  # fmt: skip
        plan.applied = len(parts)
        return PassResult(gm, True)


def _repeated(groups: ChannelGroups, earlier: Pruned) -> Choice:
    """What was removed for another input shape."""
    if len(earlier.removed) != groups.count:
        raise InputError("the network has other channels at this input shape than at the one it was pruned for",
                         stage="prune_channels", remedy="Compile the model for this shape on its own.")  # fmt: skip
    return Choice(earlier.removed, earlier.cost)


def _merges(groups: ChannelGroups, removed: Tensor) -> Merges | None:
    """Which of the removed units others take over, None where the criterion is another one."""
    if (earlier := context(groups.gm).choices.pruning) is not None:
        return earlier.merges
    kind = CRITERIA[context(groups.gm).options.pruning_criterion].merges
    return None if kind is None else find_merges(groups, removed, scaled=kind == "scaled")


def _cut(groups: ChannelGroups, choice: Choice, merges: Merges | None) -> str | None:
    """Cut the graph and correct its statistics; returns how."""
    gm = groups.gm
    correction = chosen_correction(gm, "prune_channels")
    shrink(groups, choice.removed, expected_inputs(groups) if correction == "analytic" else None, merges)
    correct_statistics(gm, correction)
    gm.meta["pruned"] = Pruned(choice.removed, choice.cost, correctable(gm), correction, merges)
    return correction


def _slices(groups: ChannelGroups, removed: Tensor) -> list[dict]:
    cut = ((axis, removed[axis.units].nonzero().flatten().tolist()) for axis in groups.axes)
    return [{"target": a.target, "axis": a.axis, "writes": a.writes, "indices": gone} for a, gone in cut if gone]


def _masked_and_smaller(
    gm: fx.GraphModule, removed: Tensor, merges: Merges | None
) -> tuple[fx.GraphModule, fx.GraphModule]:
    groups = ChannelGroups(gm, context(gm).options.ignored_layers)
    return mask(groups, removed, merges), shrink(groups, removed, merges=merges)


def _too_much(options: CompileOptions, saved: float, groups: ChannelGroups) -> OptionError:
    reasons = "; ".join(str(reject) for reject in groups.refusals[:3])
    found = f"pruning_ratio is {options.pruning_ratio}, but at most {saved:.3f} of the {options.pruning_measure} can be removed"
    return OptionError(found + (f" ({len(groups.refusals)} layers stay: {reasons})" if reasons else ""), stage="prune_channels",
                       remedy="Lower pruning_ratio or round_to, or name fewer ignored_layers.")  # fmt: skip
