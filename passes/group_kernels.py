"""Remove whole kernels so that convolutions become grouped ones, with 1/g of the multiplications.

    conv(x, W)  ->  select(conv(select(x, columns), blocks of W, groups=g), rows back)

Channels are sorted into groups by ``pruning/kernels``. Where the convolution in front, or behind, can take the order of the
channels into its own rows, or columns, no selection is left; else it is a move of bytes. Before the statistics are corrected,
the result is compared with the convolution whose removed kernels are zero, in float64 on the example inputs.

Level: float. Effect: SHRINKS. Site preconditions: a dense convolution whose weight nobody else reads.   Source: docs/pruning.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from fxcompress.analysis.channel_groups import ChannelGroups, Layer
from fxcompress.dialects import CONVOLUTIONS
from fxcompress.errors import OptionError
from fxcompress.graph import argument, calls, constant, copy_graph_module, is_call, is_constant, set_constant, twins
from fxcompress.meta import lies_in
from fxcompress.options import CompileOptions, context
from fxcompress.pruning.costs import Costs, nothing, weight_uses
from fxcompress.pruning.cut import shift_bias
from fxcompress.pruning.grouping import group_convolutions, owned
from fxcompress.pruning.kernels import Blocks, choose_groups
from fxcompress.pruning.report import Pruned, PruningReport
from fxcompress.pruning.statistics import chosen_correction, correct_statistics, correctable, expected_inputs
from fxcompress.pruning.weights import WEIGHT_CRITERIA
from fxcompress.rewrite import Effect, Match, PassResult, Plan, Reject

from ._pruning import SHORT, PruningPass

NARROWEST = 8  # channels in a group, unless round_to says otherwise: half a register of int32 sums


@dataclass(frozen=True, eq=False)
class _Grouped:
    groups: ChannelGroups
    layer: Layer
    blocks: Blocks
    cost: tuple[float, float]


class GroupKernels(PruningPass):
    """Kernel pruning, by the options ``pruning_granularity="kernels"``, ``pruning_ratio``, ``pruning_criterion``, ...

    Args:
        objective: a scalar of the flat outputs whose gradient criteria use; default: the predicted logits.

    >>> print(GroupKernels().plan(gm))                                         # doctest: +SKIP
    group_kernels: 2 rewrites, 1 refusals
      conv2d_1 [layer1.0.conv1 (resnet.py:61)]: 2 groups, 41 % of the squared scores go
    """

    name = "group_kernels"
    effect = Effect.SHRINKS

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan, options = Plan(self.name, gm), context(gm).options
        if options.pruning_granularity != "kernels" or not options.pruning_ratio or "pruning" in gm.meta:
            return plan
        groups = ChannelGroups(gm)
        layers, shared = {}, twins(gm.graph)
        for layer in groups.layers:
            reason = _unsuitable(layer, options, shared)
            if reason is None:
                layers[layer.rows.target] = layer
            else:
                plan.rejects.append(Reject(reason, layer.node))
        chosen, cost = self._choose(groups, layers, options)
        for target, blocks in chosen.items():
            summary = f"{blocks.groups} groups, {blocks.lost:.0%} of the squared scores go"
            plan.matches.append(Match(layers[target].node, summary, _Grouped(groups, layers[target], blocks, cost)))
        return plan

    def _choose(self, groups: ChannelGroups, layers: dict[str, Layer], options: CompileOptions):
        """(blocks per constant, cost before and after)."""
        if (earlier := context(groups.gm).choices.pruning) is not None:
            return {
                t: earlier.constants[t] for t in layers if isinstance(earlier.constants.get(t), Blocks)
            }, earlier.cost
        criterion = WEIGHT_CRITERIA[options.pruning_criterion]
        scores = criterion.score(self.evidence(groups, criterion.needs_data))
        values = {target: scores[target].square().flatten(2).sum(2) for target in layers}
        whole = getattr(Costs(groups).without(nothing(groups)), options.pruning_measure)
        uses = dict(weight_uses(groups.gm)) if options.pruning_measure == "macs" else {}
        costs = {
            t: constant(groups.gm, layer.node.args[1]).numel() * uses.get(t, 1) / whole for t, layer in layers.items()
        }
        chosen = choose_groups(values, costs, options.pruning_ratio, options.round_to or NARROWEST)
        saved = sum(costs[target] * (1 - 1 / blocks.groups) for target, blocks in chosen.items())
        if saved < options.pruning_ratio * (1 - SHORT):
            raise OptionError(f"pruning_ratio is {options.pruning_ratio}, but at most {saved:.3f} of the {options.pruning_measure} can be "
                              f"removed as kernels of {len(layers)} dense convolutions", stage=self.name,
                              remedy="Lower pruning_ratio or round_to, or name fewer ignored_layers.")  # fmt: skip
        return chosen, (whole, whole * (1 - saved))

    def apply(self, plan: Plan) -> PassResult:
        gm, options, parts = plan.graph_module, context(plan.graph_module).options, [m.data for m in plan.matches]
        if not parts:
            return PassResult(gm, False)
        groups, cost, correction = parts[0].groups, parts[0].cost, chosen_correction(gm, self.name)
        before = Costs(groups).without(nothing(groups))
        blocks = {part.layer.rows.target: part.blocks for part in parts}
        difference = self.difference(gm, partial(_masked_and_grouped, blocks=blocks), "kernels")
        expected = expected_inputs(groups) if correction == "analytic" else {}
        for part in parts:
            if (mean := expected.get(part.layer.node)) is not None:
                weight = constant(gm, part.layer.node.args[1]).double()
                lost = (weight * part.blocks.removed(weight.shape)).flatten(2).sum(2)
                shift_bias(gm, part.layer, lost @ mean.double())
        group_convolutions(gm, blocks)
        correct_statistics(gm, correction)
        grouped = ChannelGroups(gm)
        after = Costs(grouped).without(nothing(grouped))
        gm.meta["pruned"] = Pruned(torch.zeros(0, dtype=torch.bool), cost, correctable(gm) | blocks, correction)
        gm.meta["pruning"] = PruningReport(
            options.pruning_criterion, "global", options.pruning_measure, options.pruning_ratio, 1 - cost[1] / cost[0],
            (before.parameters, after.parameters), (before.macs, after.macs),
            [{"name": str(p.layer), "units": (kernels := p.blocks.rows.numel() * p.blocks.columns.numel()),
              "removed": kernels - kernels // p.blocks.groups, "layers": [str(p.layer)]} for p in parts],
            refusals=[str(reject) for reject in plan.rejects], difference=difference, correction=correction, cost=cost,
            granularity="kernels",
        )  # fmt: skip
        plan.applied = len(parts)
        return PassResult(gm, True)


def _unsuitable(layer: Layer, options: CompileOptions, shared: Mapping) -> str | None:
    """Why the kernels of a layer cannot be grouped."""
    node = layer.node
    if lies_in(node, options.ignored_layers):
        return "ignored_layers names it"
    if not is_call(node, *CONVOLUTIONS) or argument(node, "groups") != 1:
        return "it is no dense convolution"
    if not owned(node.args[1], shared) or not owned(argument(node, "bias"), shared):
        return "its weight has another reader"
    return None


def _masked_and_grouped(gm: fx.GraphModule, blocks: dict[str, Blocks]) -> tuple[fx.GraphModule, fx.GraphModule]:
    masked = copy_graph_module(gm)
    for node in calls(masked, *CONVOLUTIONS):
        if is_constant(node.args[1]) and (found := blocks.get(node.args[1].target)) is not None:
            weight = constant(masked, node.args[1])
            set_constant(masked, node.args[1].target, weight.masked_fill(found.removed(weight.shape), 0))
    return masked, group_convolutions(gm, blocks)
