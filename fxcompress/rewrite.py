"""What a pass is: it looks (``plan``), says what it will do and what it refuses, and only then changes (``apply``).

    class MyPass(RewriteRule):
        name = "my_pass"; level = Level.FLOAT; effect = Effect.EXACT; source = "..."
        def match(self, node): ...            # Match or None; looks, never mutates
        def check(self, match): ...           # None, or Reject("weight shared with layer4.conv", node)
        def rewrite(self, match, gm): ...     # the only mutation

A ``Pass`` plans for the whole graph; a ``RewriteRule`` is a pass whose plan is its matches. Result types follow
``torch.fx.passes.infra``: passes written for torch (callables returning ``PassResult``) run in the same pipeline.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .meta import place

__all__ = ["Effect", "Fact", "Level", "Match", "Pass", "PassResult", "Plan", "Reject", "RewriteRule"]


class Level(enum.Enum):
    """The three levels of the graph; each has its dialect in ``dialects.py``."""

    FLOAT = "float"
    QDQ = "qdq"
    INTEGER = "integer"


class Effect(enum.Enum):
    """EXACT: the same function up to float rounding (checked). LOSSY: values change, the report says by how much.
    SHRINKS: the same interface with fewer parameters."""

    EXACT = "exact"
    LOSSY = "lossy"
    SHRINKS = "shrinks"


class Fact(enum.Enum):
    """What passes establish for each other; the pass manager checks the order of the list against them."""

    NORMALIZED = "one spelling per operation"
    IN_DIALECT = "operators of the float dialect only, or refused by name"
    STATISTICS = "batch-norm statistics harvested onto tensors"
    BATCH_NORM_FOLDED = "batch norm folded wherever that is exact"
    RANGES = "every tensor to be quantized has a range"
    QUANTIZED = "quantize/dequantize nodes in place"
    LOWERED = "integer operators only"


@dataclass
class Match:
    """One place where a pass applies. ``node`` anchors it, ``summary`` says what will happen, ``data`` travels along."""

    node: fx.Node
    summary: str = ""
    data: Any = None

    def __str__(self) -> str:
        return f"{place(self.node)}: {self.summary}" if self.summary else place(self.node)


@dataclass
class Reject:
    """A place where a pass looked and declined, with its reason: "weight shared with layer4.conv"."""

    reason: str
    node: fx.Node

    def __str__(self) -> str:
        return f"not applied at {place(self.node)} because {self.reason}"


@dataclass
class Plan:
    """What a pass will change and what it refuses. Printing it changes nothing."""

    pass_name: str
    graph_module: fx.GraphModule
    matches: list[Match] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    applied: int = 0  # rewrites carried out so far; ``apply`` counts them

    def __str__(self) -> str:
        head = f"{self.pass_name}: {len(self.matches)} rewrites, {len(self.rejects)} refusals"
        return "\n".join([head, *(f"  {m}" for m in self.matches), *(f"  {r}" for r in self.rejects)])

    def __len__(self) -> int:
        return len(self.matches)


class Pass:
    """Base of every pass. Subclasses declare the class attributes below and define ``plan`` and ``apply``.

    Attributes:
        name: snake_case verb phrase, unique in a pipeline; the file is named after it.
        level: the level of the graph the pass runs on; ``result_level`` when it moves the graph to another.
        effect: what it promises about the function.
        needs, establishes, invalidates: sets of ``Fact``.
        source: paper and equation, or the place in docs/ that derives it.
        atomic: the plan is applied as a whole or not at all (``max_rewrites`` cannot cut it).
    """

    name: ClassVar[str]
    level: ClassVar[Level]
    effect: ClassVar[Effect]
    source: ClassVar[str] = ""
    needs: ClassVar[frozenset[Fact]] = frozenset()
    establishes: ClassVar[frozenset[Fact]] = frozenset()
    invalidates: ClassVar[frozenset[Fact]] = frozenset()
    result_level: ClassVar[Level | None] = None
    atomic: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:  # an abstract base such as RewriteRule
            return
        for attribute, kind in (("name", str), ("level", Level), ("effect", Effect)):
            if not isinstance(getattr(cls, attribute, None), kind):
                raise TypeError(f"{cls.__name__} must declare {attribute}: {kind.__name__}")
        for attribute in ("needs", "establishes", "invalidates"):
            setattr(cls, attribute, frozenset(getattr(cls, attribute)))
            if not all(isinstance(fact, Fact) for fact in getattr(cls, attribute)):
                raise TypeError(f"{cls.__name__}.{attribute} must be a set of Fact")
        if cls.result_level is None:
            cls.result_level = cls.level

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Look at the graph and list what will change and what is refused. Never mutates."""
        raise NotImplementedError

    def apply(self, plan: Plan) -> PassResult:
        """Carry out ``plan.matches`` and count them in ``plan.applied``: the only mutation.

        The pass manager plans and applies until a plan has no match left. Parameters are immutable: register a new
        constant instead of writing into an old one (other graphs share it).
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{self.name}: {self.level.value} {self.effect.value}>"


class RewriteRule(Pass):
    """A pass whose plan is its matches, found node by node in topological order."""

    def match(self, node: fx.Node) -> Match | None:
        """The pattern anchored at ``node``, or None. Looks only."""
        raise NotImplementedError

    def check(self, match: Match) -> Reject | None:
        """None if the rewrite is legal here, else the reason why not."""
        return None

    def rewrite(self, match: Match, gm: fx.GraphModule) -> None:
        """Change the graph at this match."""
        raise NotImplementedError

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan = Plan(self.name, gm)
        for node in gm.graph.nodes:
            if (match := self.match(node)) is not None:
                reject = self.check(match)
                (plan.matches if reject is None else plan.rejects).append(match if reject is None else reject)
        return plan

    def apply(self, plan: Plan) -> PassResult:
        """Rewrite every match that still stands: an earlier rewrite of the same plan may have consumed it."""
        gm = plan.graph_module
        alive = set(gm.graph.nodes)
        for match in plan.matches:
            if match.node not in alive or match.node._erased:
                continue
            current = self.match(match.node)
            if current is not None and self.check(current) is None:
                self.rewrite(current, gm)
                plan.applied += 1
        return PassResult(gm, plan.applied > 0)
