"""Remove whole residual branches: x + f(x) without f is x.

    every sum of a tensor and of what is computed from it   ->  drop the branch that moves the outputs least for its cost  ->  again

Where layers are narrow, time goes with their number rather than with their width: channels of a ResNet-56 can only be removed by
kernel tiles of 16, and its first stage has no more than that. Removing a branch saves all of its layers' time, whatever the kernels.

A branch is dropped, and the change of the outputs taken anew, until the ratio is reached; what is compared is
|f(x) - f'(x)|^2 / |f(x)|^2 on the first examples, without labels. What a branch costs is counted in MACs, in parameters or in the time of
native kernels, which blocks of equal MACs share unevenly. Afterwards batch-norm statistics are measured again, with data.

Level: float. Effect: SHRINKS. Precondition: batch norm is not folded yet, so that its statistics can follow.
Not in the default list: ``fxcompress.prune_branches``, or ``PassManager([..., PruneBranches(0.3)])``.
Source: Veit et al. 2016, "Residual networks behave like ensembles of relatively shallow networks"; greedy choice derived here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from fxcompress import dialects as d
from fxcompress.analysis.channel_groups import ChannelGroups
from fxcompress.analysis.quantization import activations
from fxcompress.errors import OptionError
from fxcompress.graph import ancestors, argument, calls, copy_graph_module, erase_dead, is_call, shape
from fxcompress.meta import lies_in, module_name
from fxcompress.options import context
from fxcompress.pruning.costs import Cost, Costs, nothing
from fxcompress.pruning.latency import LatencyTable, cost_function
from fxcompress.pruning.report import PruningReport
from fxcompress.pruning.statistics import collect, measure_statistics
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan, Reject
from fxcompress.shapes import propagate

EXAMPLES = 64  # on which branches are compared


@dataclass(frozen=True, eq=False)
class Branch:
    """A sum that stays defined without one of its operands: what is left is ``sum.args[kept]``. ``inside``: what then is dead."""

    sum: fx.Node
    kept: int
    inside: frozenset[fx.Node]

    @property
    def layers(self) -> list[fx.Node]:
        return [node for node in self.sum.graph.nodes if node in self.inside and is_call(node, *d.WEIGHTED)]


def branches(gm: fx.GraphModule) -> list[Branch]:
    """The residual branches of a normalized graph whose shapes are known, in topological order.

    The operand that stays is one that the branch is computed from, of the shape of the sum; some layer with weights goes.
    """
    found = []
    for node in calls(gm, d.ADD):
        if len(activations(node)) == 2 and argument(node, "alpha") == 1:
            found += [branch for branch in (_branch(node, kept) for kept in (0, 1)) if branch is not None][:1]
    return found


def _branch(node: fx.Node, kept: int) -> Branch | None:
    stays, goes = node.args[kept], node.args[1 - kept]
    if shape(stays) != shape(node) or stays not in ancestors(goes):
        return None
    inside = _dies_with(goes, node)
    return Branch(node, kept, frozenset(inside)) if any(is_call(n, *d.WEIGHTED) for n in inside) else None


def _dies_with(dropped: fx.Node, user: fx.Node) -> set[fx.Node]:
    """What nobody reads once ``user`` no longer reads ``dropped``."""
    dead: set[fx.Node] = set()
    stack = [dropped]
    while stack:
        node = stack.pop()
        read = node.users.keys() - dead - ({user} if node is dropped else set())
        if node.op == "call_function" and node not in dead and not read:
            dead.add(node)
            stack += node.all_input_nodes
    return dead


def without(gm: fx.GraphModule, name: str) -> fx.GraphModule:
    """A copy of the graph without the branch of the sum of that name."""
    copied = copy_graph_module(gm)
    _drop(copied, [name])
    return copied


def _drop(gm: fx.GraphModule, names: list[str]) -> None:
    """One after the other: what an earlier one took with it is no branch any more."""
    for name in names:
        for branch in branches(gm):
            if branch.sum.name == name:
                branch.sum.replace_all_uses_with(branch.sum.args[branch.kept])
        erase_dead(gm)


class PruneBranches(Pass):
    """Drop the residual branches that matter least, until ``pruning_ratio`` of what the network costs is gone.

    Args:
        pruning_ratio: share of ``measure``, 0 <= ratio < 1; the last branch may take more than was asked for.
        measure: "macs", "parameters" or "latency".
        latency_table: for "latency": a ``LatencyTable`` or a file; None: measured, and forgotten.

    >>> print(PruneBranches(0.3).plan(gm))                                     # doctest: +SKIP
    prune_branches: 9 rewrites, 3 refusals
      add_4 [layer1.4 (resnet.py:66)]: drop conv2d_9, conv2d_10: 3.8 % of the macs
    """

    name = "prune_branches"
    level = Level.FLOAT
    effect = Effect.SHRINKS
    needs = {Fact.NORMALIZED}
    invalidates = {Fact.STATISTICS}
    atomic = True
    source = "Veit et al. 2016; docs/pruning.md"

    def __init__(
        self, pruning_ratio: float, measure: str = "macs", latency_table: LatencyTable | str | Path | None = None
    ):
        if not isinstance(pruning_ratio, int | float) or not 0 <= pruning_ratio < 1:
            raise OptionError(
                f"pruning_ratio is {pruning_ratio!r}", stage=self.name, expected="a number, 0 <= ratio < 1"
            )
        self.pruning_ratio, self.measure = pruning_ratio, measure
        self._table = LatencyTable() if latency_table is None else latency_table

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan, found = Plan(self.name, gm), {branch.sum.name: branch for branch in branches(gm)}
        plan.rejects = [Reject("no operand is computed from the other", node) for node in calls(gm, d.ADD)
                        if len(activations(node)) == 2 and node.name not in found]  # fmt: skip
        if "pruning" in gm.meta or not self.pruning_ratio:  # done: another share of what is left would be too much
            return plan
        for name, saved in self._choose(gm).items():
            branch = found[name]
            names = ", ".join(node.name for node in branch.layers)
            plan.matches.append(Match(branch.sum, f"drop {names}: {saved:.1%} of the {self.measure}", name))
        return plan

    def cost(self, gm: fx.GraphModule) -> float:
        """Of a whole network, in MACs, parameters or predicted nanoseconds."""
        groups = ChannelGroups(gm)
        return cost_function(groups, self.measure, self._table)(nothing(groups))

    def _choose(self, gm: fx.GraphModule) -> dict[str, float]:
        """{name of a sum: share of the cost}, the first to go first. Raises ``OptionError`` where all branches together are not enough."""
        ignored, batches = context(gm).options.ignored_layers, _examples(gm)
        expected, current, chosen = _run(gm, batches), gm, {}
        total = left = self.cost(gm)
        while left > (1 - self.pruning_ratio) * total:
            removable = [b for b in branches(current) if not any(lies_in(node, ignored) for node in b.layers)]
            if not removable:
                raise OptionError(f"pruning_ratio is {self.pruning_ratio}, but all residual branches together have {1 - left / total:.3f} of the {self.measure}",
                                  stage=self.name, remedy="Lower pruning_ratio, or remove channels: fxcompress.prune.")  # fmt: skip
            rest = {b.sum.name: without(current, b.sum.name) for b in removable}
            cost = {name: self.cost(smaller) for name, smaller in rest.items()}
            change = {name: _change(_run(smaller, batches), expected) for name, smaller in rest.items()}
            best = min(rest, key=lambda name: change[name] / max(left - cost[name], 1e-30))
            chosen[best] = (left - cost[best]) / total
            current, left = rest[best], cost[best]
        return chosen

    def apply(self, plan: Plan) -> PassResult:
        gm, names = plan.graph_module, [match.data for match in plan.matches]
        if not names:
            return PassResult(gm, False)
        before, cost, calibrate = _size(gm), self.cost(gm), context(gm).calibrate
        groups = [{"name": module_name(b.sum), "units": 1, "removed": int(b.sum.name in names),
                   "layers": [module_name(node) for node in b.layers]} for b in branches(gm)]  # fmt: skip
        refusals = [str(reject) for reject in plan.rejects]
        _drop(gm, names)
        propagate(gm)
        after, left = _size(gm), self.cost(gm)
        if calibrate is not None:
            measure_statistics(gm, calibrate)
        gm.meta["pruning"] = PruningReport(
            "output change", "branches", self.measure, self.pruning_ratio, 1 - left / cost,
            (before.parameters, after.parameters), (before.macs, after.macs), groups, refusals=refusals,
            correction=None if calibrate is None else "measured", cost=(cost, left),
        )  # fmt: skip
        plan.applied = len(names)
        return PassResult(gm, True)


def _size(gm: fx.GraphModule) -> Cost:
    groups = ChannelGroups(gm)
    return Costs(groups).without(nothing(groups))


def _examples(gm: fx.GraphModule) -> list[tuple[Tensor, ...]]:
    calibrate = context(gm).calibrate
    return collect(calibrate, EXAMPLES) if calibrate is not None else [tuple(context(gm).example_inputs)]


@torch.no_grad()
def _run(gm: fx.GraphModule, batches: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """All outputs, in float64, batch after batch."""
    return [y.double() for batch in batches for y in fx.Interpreter(gm).run(*batch) if isinstance(y, Tensor)]


def _change(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """|outputs - expected|^2 / |expected|^2; infinite where an output is no longer a number."""
    error = sum(float((a - b).square().sum()) for a, b in zip(outputs, expected, strict=True))
    return error / max(sum(float(b.square().sum()) for b in expected), 1e-300) if error == error else float("inf")
