"""Replace what is computed from constants alone by its value.

    weight_norm(v, g)       ->  one constant             add(relu(p), 1.0)  ->  one constant
    arange(8), zeros(3, 4)  ->  one constant

Only the last call of a constant computation becomes a constant; what leads to it is then dead. Computed in float64, rounded
once to the dtype of the result.

Level: float. Effect: EXACT. Site preconditions: deterministic, at most 64 MiB more than what it is computed from.
"""

from __future__ import annotations

from torch import Tensor, fx

from fxcompress.graph import add_constant, ancestors, constant, erase_dead, is_constant
from fxcompress.rewrite import Effect, Level, Match, Pass, PassResult, Plan, Reject

from ._expression import static_nodes, static_value

MAX_GROWTH = 64 << 20  # bytes a folded constant may exceed its inputs by


class FoldConstants(Pass):
    """Constant computations become constants.

    >>> FoldConstants().plan(gm)                                                          # doctest: +SKIP
    fold_constants: 1 rewrites, 0 refusals
      _weight_norm [conv (model.py:12)]: constant (16, 3, 3, 3)
    """

    name = "fold_constants"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "docs/passes.md"

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan = Plan(self.name, gm)
        static = static_nodes(gm)
        for node in gm.graph.nodes:
            if node not in static or node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
                continue
            if static.issuperset(node.users):
                continue  # dead, or an intermediate value
            sources = filter(is_constant, ancestors(node))
            growth = _bytes(node.meta["val"]) - sum(_bytes(constant(gm, n)) for n in sources)
            if growth > MAX_GROWTH:
                plan.rejects.append(Reject(f"the constant would take {growth >> 20} MiB more than its inputs", node))
            else:
                plan.matches.append(Match(node, f"constant {tuple(node.meta['val'].shape)}"))
        return plan

    def apply(self, plan: Plan) -> PassResult:
        gm = plan.graph_module
        values: dict[fx.Node, object] = {}
        for match in plan.matches:
            node = match.node
            value = static_value(gm, node, values).to(node.meta["val"].dtype)
            with gm.graph.inserting_before(node):
                # a view (expand, a slice) would keep, and save, the memory it looks at
                folded = add_constant(gm, node.name, value.contiguous().clone(), node)
            node.replace_all_uses_with(folded)
            plan.applied += 1
        erase_dead(gm)
        return PassResult(gm, plan.applied > 0)


def _bytes(tensor: Tensor) -> int:
    return int(tensor.numel()) * tensor.element_size()
