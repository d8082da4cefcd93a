"""Run the list of passes: check the order, plan, apply, verify each result, time it, record it.

After every pass the manager lints the graph, propagates shapes, checks the level's dialect, checks that statistics still
describe the tensors they sit on, and checks the promise of an EXACT pass on the example inputs: if an output moves by
more than 1e-4 relative, the pass is applied again to a float64 copy, and beyond 1e-9 there it is at fault.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .dialects import check_level
from .errors import PassContractError, PipelineError
from .graph import erase_dead
from .noise import sqnr_db
from .options import context
from .promises import InFloat64, Snapshot, check_exact, check_statistics, check_untouched
from .published import published_pass
from .rewrite import Effect, Fact, Level, Match, Pass, Plan
from .shapes import propagate

MAX_ROUNDS = 100  # plans of one pass before it is called divergent


@dataclass
class PassRecord:
    """What one pass did.

    Attributes:
        rewrites: how many changes; matches: what they were, at ``match_nodes``.
        refusals: places declined, with reasons, at ``refusal_nodes``.
        output_change: largest relative change of an output on the example; output_sqnr: dB of each output against the captured
            network, None where the pass changed nothing or made other types.
        output_sqnr_without, output_sqnr_with: the same at the end of the qdq level, compiled without this pass and with it, if
            measured (``effects.py``); without: how it was left out, or why it cannot be.
    """

    name: str
    level: str
    effect: str
    source: str = ""
    seconds: float = 0.0
    check_seconds: float = 0.0
    rewrites: int = 0
    matches: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    output_change: float | None = None
    checks: list[str] = field(default_factory=list)
    match_nodes: list[str] = field(default_factory=list)
    refusal_nodes: list[str] = field(default_factory=list)
    output_sqnr: list[float] | None = None
    output_sqnr_without: list[float] | None = None
    output_sqnr_with: list[float] | None = None
    without: str = ""

    def to_dict(self) -> dict:
        """Plain data."""
        return dict(self.__dict__)


class TorchPass(Pass):
    """A pass written for torch (``callable(gm) -> PassResult | None``) as an entry of our pipeline.

    >>> manager = PassManager([*default_passes("int8")[:3], as_pass(my_torch_pass)])          # doctest: +SKIP
    """

    name = "torch_pass"
    level = Level.FLOAT
    effect = Effect.EXACT
    atomic = True

    def __init__(self, function: Callable, *, name: str, level: Level, effect: Effect):
        self.function, self.name, self.level, self.result_level, self.effect = function, name, level, level, effect
        self._done: set[int] = set()

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan = Plan(self.name, gm)
        if id(gm) not in self._done:
            plan.matches.append(Match(next(iter(gm.graph.nodes)), "run"))
        return plan

    def apply(self, plan: Plan) -> PassResult:
        gm = plan.graph_module
        result = self.function(gm) or PassResult(gm, False)
        self._done = {id(gm), id(result.graph_module)}
        result.graph_module.meta.setdefault("fxcompress", context(gm))
        plan.applied = int(result.modified)
        return result


def as_pass(function, *, name: str | None = None, level: Level = Level.FLOAT, effect: Effect = Effect.EXACT) -> Pass:
    """A ``Pass`` from a Pass (returned as it is), a Pass class, any callable written for ``torch.fx.passes.infra``, or the name
    of a pass that an installed package publishes (``published.py``)."""
    if isinstance(function, str):
        return published_pass(function)
    if isinstance(function, Pass):
        return function
    if isinstance(function, type) and issubclass(function, Pass):
        return function()
    if not callable(function):
        raise PipelineError(
            f"{function!r} is not a pass",
            stage="compile",
            expected="a Pass or a callable(gm) -> PassResult",
            remedy="Derive it from fxcompress.Pass or RewriteRule, or return a PassResult.",
        )
    return TorchPass(
        function, name=name or getattr(function, "__name__", type(function).__name__), level=level, effect=effect
    )


def check_order(passes: Sequence[Pass], known: Sequence[Pass] = ()) -> Level:
    """The level the list ends at. ``known``: passes that messages may recommend beside those of the list.

    Raises ``PipelineError`` unless names are unique, levels follow each other and every need is established before.
    """
    facts: set[Fact] = set()
    level, seen = Level.FLOAT, {}
    for p in passes:
        if p.name in seen:
            raise PipelineError(
                f"the name {p.name!r} occurs twice", stage="compile", remedy="Remove one, or rename it."
            )
        seen[p.name] = p
        if p.level is not level:
            raise PipelineError(
                f"{p.name} runs at the {p.level.value} level but the graph is at the {level.value} level there",
                stage="compile",
                remedy=f"Move it {'before' if p.level is Level.FLOAT else 'after'} the pass that changes the level.",
            )
        if missing := p.needs - facts:
            names = ", ".join(sorted(f.name for f in missing))
            provider = next((q.name for q in (*passes, *known) if q.establishes & missing), None)
            raise PipelineError(
                f"{p.name} needs {names}, which no earlier pass establishes",
                stage="compile",
                remedy=f"Put {provider} before it." if provider else "Add a pass that establishes it.",
            )
        facts = (facts | p.establishes) - p.invalidates
        level = p.result_level
    return level


class PassManager:
    """Runs passes in the order given.

    Args:
        passes: the list; the order is checked against the declared facts on construction.
        observer: called as ``observer(record, before, gm)`` after each pass (the dump folder).
        max_rewrites: stop after that many rewrites in total (bisection); None: no limit.
    """

    def __init__(self, passes: Sequence, *, observer: Callable | None = None, max_rewrites: int | None = None):
        self.passes = [as_pass(p) for p in passes]
        check_order(self.passes)
        self.observer, self.max_rewrites = observer, max_rewrites
        self.levels: dict[Level, Snapshot] = {}  # the last graph of each level
        self.outputs: tuple | None = None  # of the captured network on the example inputs
        self.last: Snapshot | None = None
        self.records: list[PassRecord] = []

    def run(self, gm: fx.GraphModule, announce: Callable[[str], None] = lambda text: None) -> fx.GraphModule:
        """Run every pass on ``gm`` (which is changed) and return the resulting graph module.

        ``announce(name)`` is called when a pass begins.
        """
        facts: set[Fact] = set()
        self.last = Snapshot(gm, context(gm).example_inputs)
        self.outputs = self.last.values
        self.levels[Level.FLOAT] = self.last
        for p in self.passes:
            if self._budget() == 0:
                break
            announce(p.name)
            gm = self._run_one(p, gm, facts)
            facts = (facts | p.establishes) - p.invalidates
        return gm

    def _budget(self) -> int | None:
        return None if self.max_rewrites is None else max(0, self.max_rewrites - sum(r.rewrites for r in self.records))

    def _run_one(self, p: Pass, gm: fx.GraphModule, facts: set[Fact]) -> fx.GraphModule:
        record = PassRecord(p.name, p.level.value, p.effect.value, p.source)
        before = self.last
        start = time.perf_counter()
        gm, plan = self._apply(p, gm, record)
        record.seconds = time.perf_counter() - start
        refused = {str(r): r.node.name for r in plan.rejects}
        record.refusals, record.refusal_nodes = list(refused), list(refused.values())
        self.records.append(record)
        start = time.perf_counter()
        self.last = self._check(p, gm, before, record, facts) if record.rewrites else before
        self.levels[p.result_level] = self.last
        record.check_seconds = time.perf_counter() - start
        if self.observer is not None:
            self.observer(record, before, gm)
        return gm

    def _apply(self, p: Pass, gm: fx.GraphModule, record: PassRecord) -> tuple[fx.GraphModule, Plan]:
        for step in rounds(p, gm, self._budget()):
            gm, plan = step
            record.matches += [str(m) for m in plan.matches]
            record.match_nodes += [m.node.name for m in plan.matches]
            record.rewrites += plan.applied
        return gm, plan

    def _check(self, p: Pass, gm: fx.GraphModule, before: Snapshot, record: PassRecord, facts: set[Fact]) -> Snapshot:
        gm.graph.lint()
        gm.recompile()
        if Fact.IN_DIALECT in facts | p.establishes:
            check_level(gm, p.result_level, stage=p.name)
            record.checks.append(f"{p.result_level.value} dialect")
        after = Snapshot(gm, context(gm).example_inputs)
        check_untouched(p.name, before, after)
        if after.same_graph(before):
            record.output_change = 0.0
            record.checks.append("the graph is the same, only what is known about it changed")
        elif before.inputs and p.effect is Effect.EXACT:
            exactly = None
            if p.level is not Level.INTEGER:
                exactly = InFloat64(before, lambda original: _reapply(p, original, record.rewrites))
            record.output_change = check_exact(p.name, before, after, exactly)
            record.checks.append(f"same function ({record.output_change:.1e} relative)")
            check_statistics(p.name, before, after, exactly)
            record.checks.append("statistics describe their tensors")
        elif before.inputs and p.effect is not Effect.EXACT and _same_dtypes(before.values, after.values):
            record.output_change = before.relative_change(after)
        if record.output_change and _same_dtypes(self.outputs, after.values):
            record.output_sqnr = [sqnr_db(a, b) for a, b in zip(self.outputs, after.values, strict=True)]
        return after


def rounds(p: Pass, gm: fx.GraphModule, limit: int | None = None) -> Iterator[tuple[fx.GraphModule, Plan]]:
    """Plan and apply until a plan is empty; yields (graph so far, plan) after each round, the empty plan last.

    ``limit``: how many rewrites are allowed in all; an atomic plan that exceeds it is not applied at all.
    """
    for _ in range(MAX_ROUNDS):
        plan = p.plan(gm)
        if limit is not None:
            plan.matches = [] if p.atomic and len(plan.matches) > limit else plan.matches[:limit]
        if plan.matches:
            gm = p.apply(plan).graph_module
            limit = None if limit is None else limit - plan.applied
            erase_dead(gm)
            propagate(gm)
        yield gm, plan
        if plan.applied == 0 or p.result_level is not p.level:
            return
    raise PassContractError(f"still finds work after {MAX_ROUNDS} rounds", stage=p.name, where=str(plan.matches[0]))


def _reapply(p: Pass, gm: fx.GraphModule, rewrites: int) -> fx.GraphModule:
    """The pass once more on another copy of the graph it had, with at most as many rewrites."""
    *_, (result, _) = rounds(p, gm, rewrites)
    return result


def _same_dtypes(before, after) -> bool:
    """Outputs can be compared as they are (integer_io turns them into integers of another scale)."""
    return [a.dtype for a in before] == [b.dtype for b in after]
