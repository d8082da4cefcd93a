"""Remove calls and constants that no output depends on.

Level: float. Effect: EXACT. Graph inputs stay: they are the interface.
"""

from __future__ import annotations

from torch import fx

from fxcompress.graph import erase_dead, output_node
from fxcompress.rewrite import Effect, Level, Match, Pass, PassResult, Plan


class EliminateDeadCode(Pass):
    """Nodes without a path to the output, and tensors no node names.

    >>> print(EliminateDeadCode().plan(gm))                                               # doctest: +SKIP
    eliminate_dead_code: 2 rewrites, 0 refusals
      relu_1 [aux (model.py:14)]: no output depends on it
      output: drop the unread constant aux_weight
    """

    name = "eliminate_dead_code"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "docs/passes.md"

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan = Plan(self.name, gm)
        alive: set[fx.Node] = set()
        for node in reversed(gm.graph.nodes):
            if node.op in ("placeholder", "output") or any(user in alive for user in node.users):
                alive.add(node)
        plan.matches = [Match(n, "no output depends on it") for n in gm.graph.nodes if n not in alive]
        read = {n.target for n in gm.graph.nodes if n.op == "get_attr"}
        unread = [name for name, _ in (*gm.named_parameters(), *gm.named_buffers()) if name not in read]
        plan.matches += [Match(output_node(gm), f"drop the unread constant {name}") for name in unread]
        return plan

    def apply(self, plan: Plan) -> PassResult:
        erase_dead(plan.graph_module)
        plan.applied = len(plan.matches)
        return PassResult(plan.graph_module, plan.applied > 0)
