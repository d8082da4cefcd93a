"""Check the dialect: everything the later passes do not know is refused here, by name, all at once.

Changes nothing. Raises ``UnsupportedOperatorError`` listing each operator with its module path, source line and the way
out; nodes under ``keep_float`` may be anything. Source: DESIGN, "What is not in the dialect is refused by name".
"""

from __future__ import annotations

from torch import fx

from fxcompress.model_checks import check_supported
from fxcompress.rewrite import Effect, Fact, Level, Pass, PassResult, Plan


class CheckDialect(Pass):
    name = "check_dialect"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "docs/architecture.md"
    establishes = {Fact.NORMALIZED}

    def plan(self, gm: fx.GraphModule) -> Plan:
        check_supported(gm)
        return Plan(self.name, gm)

    def apply(self, plan: Plan) -> PassResult:
        return PassResult(plan.graph_module, False)
