"""Set the smallest weights of every layer to zero: w -> w if |w| > threshold * max|w| else 0.

A lossy pass with an option, and one that looks at the whole graph. What it costs is in the report: ``measure_passes=True``.
"""

from dataclasses import dataclass

import torch

from fxcompress import Effect, Level, Match, Pass, PassResult, Plan, Reject
from fxcompress.dialects import WEIGHTED
from fxcompress.graph import add_constant, calls, constant, is_constant
from fxcompress.meta import describe


@dataclass(frozen=True)
class Options:
    """threshold: share 0..1 of a layer's largest weight below which weights are zeroed."""

    threshold: float = 0.01


class ZeroSmallWeights(Pass):
    name = "zero_small_weights"
    level = Level.FLOAT
    effect = Effect.LOSSY
    source = "Han et al. 2015, section 3"

    def __init__(self, options: Options = Options()):
        self.options = options

    def plan(self, gm):
        plan = Plan(self.name, gm)
        for node in calls(gm, *WEIGHTED):
            if not is_constant(node.args[1]):
                plan.rejects.append(Reject("its weight is computed", node))
                continue
            weight = constant(gm, node.args[1])
            small = (weight.abs() <= self.options.threshold * weight.abs().max()) & (weight != 0)
            if small.any():
                share = float(small.double().mean())
                plan.matches.append(Match(node, f"{share:.1%} of the weights", torch.where(small, 0.0, weight)))
        return plan

    def apply(self, plan):
        for match in plan.matches:
            node, gm = match.node, plan.graph_module
            with gm.graph.inserting_before(node):
                node.update_arg(1, add_constant(gm, node.args[1].target, match.data, node))
            describe(node, statistics=None)
            plan.applied += 1
        return PassResult(plan.graph_module, plan.applied > 0)
