"""Check the dialect: everything the later passes do not know is refused here, by name, all at once.

Changes nothing. Raises ``UnsupportedOperatorError`` listing each operator with its module path, source line and the way
out; nodes under ``keep_float`` may be anything. Source: docs/architecture.md.
"""

from __future__ import annotations

from torch import fx

from fxcompress.model_checks import check_supported
from fxcompress.rewrite import Effect, Fact, Level, Pass, PassResult, Plan

from ._expression import Refused
from .normalize import spelling


class CheckDialect(Pass):
    name = "check_dialect"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "docs/architecture.md"
    needs = {Fact.NORMALIZED}
    establishes = {Fact.IN_DIALECT}

    def plan(self, gm: fx.GraphModule) -> Plan:
        spelled = {node: spelling(node, gm) for node in gm.graph.nodes}
        check_supported(gm, reasons={n: str(reason) for n, reason in spelled.items() if isinstance(reason, Refused)})
        return Plan(self.name, gm)

    def apply(self, plan: Plan) -> PassResult:
        return PassResult(plan.graph_module, False)
