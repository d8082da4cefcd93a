"""Which layers a backend's steps compute, so that measured times can be told per layer.

A step computes the value of one node; the nodes between it and the values of other steps are fused into it. Steps in bands
(native backend) compute several layers at once: their time belongs to all of them together.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from .graph import is_call
from .report import MULTIPLYING, Report


def with_times(report: Report, gm: fx.GraphModule, nanoseconds: list[int]) -> Report:
    """The report with the time of every step of its resources, and of every multiplying layer of the integer graph."""
    if not nanoseconds:
        return report
    layers = fused_layers(gm, [step["node"] for step in report.resources["steps"]])
    steps = [
        step | {"nanoseconds": spent, "layers": names}
        for step, spent, names in zip(report.resources["steps"], nanoseconds, layers, strict=True)
    ]
    times: dict[str, int] = {}
    together: dict[str, list[str]] = {}
    for step in steps:
        for name in step["layers"]:
            times[name] = times.get(name, 0) + step["nanoseconds"]
            together[name] = step["layers"]
    products = [replace(p, nanoseconds=times.get(p.node), timed_with=together.get(p.node, [])) for p in report.products]
    return replace(report, products=products, resources=report.resources | {"steps": steps})


def fused_layers(gm: fx.GraphModule, outputs: list[str]) -> list[list[str]]:
    """For every step, by the name of the node it computes: the multiplying nodes in it, in topological order."""
    by_name = {node.name: node for node in gm.graph.nodes}
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    ends = set(outputs)
    found = []
    for name in outputs:
        inside, stack = set(), [by_name[name]]
        while stack:
            node = stack.pop()
            if node in inside or (node.name in ends and node.name != name):
                continue
            inside.add(node)
            stack += node.all_input_nodes
        found.append([n.name for n in sorted(inside, key=position.get) if is_call(n, *MULTIPLYING)])
    return found
