"""Graphs with ``keep_float`` regions: the integer parts run natively, the float parts in PyTorch, as the user asked.

Nodes are grouped into parts that alternate between the two kinds; a part runs when all parts it reads from have run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx

from fxcompress.graph import is_constant, output_node, placeholders

from ..reference import ReferenceProgram


@dataclass(frozen=True, eq=False)
class Part:
    """One stretch of a graph as a module of its own; ``inputs`` and ``outputs`` name nodes of the whole graph."""

    is_float: bool
    graph_module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def has_float_regions(gm: fx.GraphModule) -> bool:
    return any(node.meta.get("keep_float") for node in gm.graph.nodes)


def split_regions(gm: fx.GraphModule) -> list[Part]:
    """The parts of ``gm`` in an order in which they can run."""
    number: dict[fx.Node, int] = dict.fromkeys(placeholders(gm), 0)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            earliest = max((number[n] for n in node.all_input_nodes if not is_constant(n)), default=0)
            number[node] = earliest + (earliest % 2 != bool(node.meta.get("keep_float")))
    parts = sorted({number[n] for n in number if n.op == "call_function"})
    return [_part(gm, [n for n in number if number[n] == p and n.op == "call_function"], bool(p % 2)) for p in parts]


def _part(gm: fx.GraphModule, nodes: list[fx.Node], is_float: bool) -> Part:
    members, graph, copies = set(nodes), fx.Graph(), {}
    inputs = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in members and not is_constant(a)))
    outputs = [n for n in nodes if any(user not in members for user in n.users)]
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        for constant in filter(is_constant, node.all_input_nodes):
            if constant not in copies:
                copies[constant] = graph.node_copy(constant)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in outputs))
    return Part(is_float, fx.GraphModule(gm, graph), tuple(n.name for n in inputs), tuple(n.name for n in outputs))


class MixedProgram:
    """Runs the parts of a graph one after the other. ``lower_native``: makes the program of an integer part."""

    def __init__(self, gm: fx.GraphModule, lower_native: Callable[[fx.GraphModule], object]):
        self._inputs = [n.name for n in placeholders(gm)]
        self._outputs = [n.name for n in output_node(gm).args[0]]
        self._parts = [
            (ReferenceProgram(part.graph_module) if part.is_float else lower_native(part.graph_module), part)
            for part in split_regions(gm)
        ]

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self._inputs, inputs, strict=True))
        for program, part in self._parts:
            values.update(zip(part.outputs, program.run(*(values[n] for n in part.inputs)), strict=True))
        return tuple(values[name] for name in self._outputs)

    def resources(self) -> dict:
        """Those of the native part that takes the most memory, and how many parts run in PyTorch."""
        native = [program.resources() for program, part in self._parts if not part.is_float]
        largest = max(native, key=lambda r: r["arena_bytes"], default={})
        return {**largest, "float_parts": len(self._parts) - len(native)}
