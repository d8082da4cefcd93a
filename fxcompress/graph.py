"""Small, shared operations on fx graphs: constants, shapes, calls. Everything a pass does more than once."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from .meta import inherit_origin


def is_call(node: object, *targets) -> bool:
    """True if ``node`` is a call of one of the operator overloads ``targets``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def calls(gm: fx.GraphModule, *targets) -> Iterator[fx.Node]:
    """Calls of ``targets`` in topological order (a snapshot: the graph may be edited meanwhile)."""
    return iter([node for node in gm.graph.nodes if is_call(node, *targets)])


def is_constant(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def constant(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor behind a get_attr node. Treat it as immutable: several nodes may share it."""
    value: object = gm
    for part in node.target.split("."):
        value = getattr(value, part)
    return value


def add_constant(gm: fx.GraphModule, name: str, value: Tensor, like: fx.Node) -> fx.Node:
    """Register ``value`` as a buffer and return a get_attr node for it, at the current insertion point.

    ``name`` is a hint ("layer1.0.conv1.weight"); dots become underscores and a suffix makes it unique.
    The node inherits its origin from ``like``.
    """
    base = re.sub(r"\W", "_", name)
    unique, n = base, 0
    while hasattr(gm, unique):
        n += 1
        unique = f"{base}_{n}"
    gm.register_buffer(unique, value.detach())
    return inherit_origin(like, gm.graph.get_attr(unique))


def argument(node: fx.Node, name: str):
    """The value of an operator argument by its schema name, defaults included: ``argument(conv, "stride")``."""
    schema = node.target._schema
    for position, parameter in enumerate(schema.arguments):
        if parameter.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            if position < len(node.args):
                return node.args[position]
            if parameter.has_default_value():
                return parameter.default_value
            break
    raise KeyError(f"{node.target} has no argument {name!r}")


def shape(node: fx.Node) -> tuple:
    """Shape of the tensor a node computes; the batch dimension may be a SymInt."""
    return tuple(node.meta["val"].shape)


def dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def rank(node: fx.Node) -> int:
    return node.meta["val"].ndim


def is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def output_node(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in reversed(gm.graph.nodes) if n.op == "output")


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def single_user(node: fx.Node) -> fx.Node | None:
    """The one consumer of a node, None when there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def erase_dead(gm: fx.GraphModule) -> int:
    """Remove nodes nobody reads and constants no node names. Returns the number of nodes removed."""
    before = len(gm.graph.nodes)
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.delete_all_unused_submodules()
    used = {n.target for n in gm.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in (*gm.named_buffers(), *gm.named_parameters())]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(owner), leaf)
    return before - len(gm.graph.nodes)
