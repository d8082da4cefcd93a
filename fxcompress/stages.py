"""The graphs between the passes, as modules that can be asked for a metric (``bisect``).

stages = Stages(gm, passes)        the passes run once; graphs[i] is the graph after i of them
cuts = Cuts(p, graphs[i])          cuts[k]: the next pass cut short after k rewrites
Network(graph, interface)          any of these graphs, called like the user's model
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import fx, nn

from .interface import Interface
from .pass_manager import PassManager, rounds
from .promises import Snapshot
from .rewrite import Match, Pass


class Values(dict):
    """``values[i]``, computed when it is asked for."""

    def __init__(self, compute: Callable[[int], object], known: dict | None = None):
        super().__init__(known or {})
        self.compute = compute

    def __missing__(self, key: int):
        self[key] = value = self.compute(key)
        return value


class Stages:
    """Every graph between the passes.

    Attributes:
        graphs: ``graphs[i]`` is the graph after i passes.
        changes: the i at which it is another graph than before, 0 first: passes that only add knowledge are skipped.
        rewrites: how many each pass made.
    """

    def __init__(self, gm: fx.GraphModule, passes: list[Pass]):
        snapshots: list[Snapshot] = []
        manager = PassManager(passes, observer=lambda record, before, gm: snapshots.append(before))
        manager.run(gm)
        snapshots.append(manager.last)
        self.passes = manager.passes
        self.graphs = [s.graph_module for s in snapshots]
        self.changes = [0, *(i for i in range(1, len(snapshots)) if not snapshots[i].same_graph(snapshots[i - 1]))]
        self.rewrites = [record.rewrites for record in manager.records]


class Cuts(Values):
    """``cuts[k]``: a pass cut short after k rewrites, as (graph, the match of the k-th)."""

    def __init__(self, p: Pass, gm: fx.GraphModule):
        super().__init__(self._cut)
        self.p, self.gm = p, gm

    def _cut(self, k: int) -> tuple[fx.GraphModule, Match]:
        gm = fx.GraphModule(self.gm, copy.deepcopy(self.gm.graph))
        gm.meta = dict(self.gm.meta)
        match = None
        try:
            for step in rounds(self.p, gm, k):  # propagates shapes: what does not fit shows here
                result, plan = step
                match = plan.matches[-1] if plan.matches else match
        except Exception as error:
            raise NotExecutable(f"cut short after {k} rewrites") from error
        result.recompile()
        return result, match


class NotExecutable(RuntimeError):
    """A pass cut short left a graph that does not run; the cause says how."""


class Network(nn.Module):
    """A flat graph, called like the user's model."""

    def __init__(self, graph: fx.GraphModule, interface: Interface):
        super().__init__()
        self.graph, self.interface = graph, interface
        self.eval()

    def forward(self, *args, **kwargs):
        return self.interface.unflatten(self.graph(*self.interface.flatten(args, kwargs)))
