"""Run a graph node by node on several batches at once, so that one node's result can be changed before its readers run.

walk = Lockstep(gm, batches)
values = walk.run_to("conv2d_3")                          # one tensor per batch
walk.replace("conv2d_3", [v + shift for v in values])      # what the readers of conv2d_3 will see
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from .graph import constant, placeholders


class Lockstep:
    """One walk over ``gm``; each batch is a tuple of its flat inputs. A value is dropped when its last reader has run."""

    def __init__(self, gm: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]]):
        self.gm, self.batches = gm, batches
        self.values: dict[fx.Node, list] = {}
        self.by_name = {node.name: node for node in gm.graph.nodes}
        self._pending = iter(gm.graph.nodes)
        self._last_read: dict[fx.Node, fx.Node] = {}
        for node in gm.graph.nodes:
            for source in node.all_input_nodes:
                self._last_read[source] = node

    def run_to(self, name: str) -> list[Tensor]:
        """The values of the node called ``name``, one per batch. Nodes must be asked for in topological order."""
        target = self.by_name[name]
        while target not in self.values:
            self._step(next(self._pending))
        return self.values[target]

    def replace(self, name: str, values: list[Tensor]) -> None:
        """Let the readers of a node see ``values`` instead of what it computed."""
        self.values[self.by_name[name]] = values

    def _step(self, node: fx.Node) -> None:
        with torch.no_grad():
            self.values[node] = self._run(node)
        for source in node.all_input_nodes:
            if self._last_read[source] is node:
                del self.values[source]

    def _run(self, node: fx.Node) -> list:
        if node.op == "placeholder":
            position = placeholders(self.gm).index(node)
            return [batch[position] for batch in self.batches]
        if node.op == "get_attr":
            return [constant(self.gm, node)] * len(self.batches)
        results = []
        for i in range(len(self.batches)):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n, i=i: self.values[n][i])
            results.append(node.target(*args, **kwargs))
        return results


def record_inputs(gm: fx.GraphModule, run: Callable[[nn.Module], None], examples: int) -> list[tuple[Tensor, ...]]:
    """The first ``examples`` examples, in batches of flat inputs, that ``run`` feeds to a module which computes ``gm``."""
    recorder = _Recorder(gm, examples)
    with torch.no_grad():
        run(recorder)
    return recorder.batches


class _Recorder(nn.Module):
    def __init__(self, gm: fx.GraphModule, examples: int):
        super().__init__()
        self.gm, self.missing, self.batches = gm, examples, []
        self.eval()

    def forward(self, *inputs: Tensor) -> object:
        count = min(inputs[0].shape[0], self.missing)
        if count:
            self.batches.append(tuple(x[:count].clone() for x in inputs))
            self.missing -= count
        return self.gm(*inputs)
