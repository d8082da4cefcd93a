"""Small, shared operations on fx graphs: constants, shapes, calls. Everything a pass does more than once."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence, Set

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from .meta import inherit_origin


def make_graph_module(root: torch.nn.Module | dict[str, Tensor], graph: fx.Graph) -> fx.GraphModule:
    """``fx.GraphModule(root, graph)`` whose Python code is generated when it is first called, printed or pickled.

    Passes rewrite a graph many times and look at it node by node; generating code each time would cost more than they do.
    """
    return _LazyGraphModule(root, graph)


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph copied, the tensors shared, ``gm.meta`` copied one level deep."""
    copied = make_graph_module(gm, copy.deepcopy(gm.graph))
    copied.meta = dict(gm.meta)
    return copied


def is_call(node: object, *targets) -> bool:
    """True if ``node`` is a call of one of the operator overloads ``targets``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def calls(gm: fx.GraphModule, *targets) -> Iterator[fx.Node]:
    """Calls of ``targets`` in topological order (a snapshot: the graph may be edited meanwhile)."""
    return iter([node for node in gm.graph.nodes if is_call(node, *targets)])


def is_constant(node: object) -> bool:
    """Whether it reads a parameter, a buffer or another constant."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def constant(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor behind a get_attr node. Treat it as immutable: several nodes may share it."""
    value: object = gm
    for part in node.target.split("."):
        value = getattr(value, part)
    return value


def twins(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The get_attr nodes of every constant that several of them name: its readers are the users of all."""
    named: dict[str, list[fx.Node]] = {}
    for node in graph.find_nodes(op="get_attr"):
        named.setdefault(node.target, []).append(node)
    return {target: nodes for target, nodes in named.items() if len(nodes) > 1}


def add_constant(gm: fx.GraphModule, name: str, value: Tensor, like: fx.Node) -> fx.Node:
    """Register ``value`` as a buffer and return a get_attr node for it, at the current insertion point.

    ``name`` is a hint ("layer1.0.conv1.weight"); dots become underscores and a suffix makes it unique.
    The node inherits its origin from ``like``. The buffer requires a gradient if ``value`` is computed from what does.
    """
    unique = _unused_name(gm, re.sub(r"\W", "_", name))
    gm.register_buffer(unique, value.detach().requires_grad_(value.requires_grad))
    return inherit_origin(like, gm.graph.get_attr(unique))


def set_constant(gm: fx.GraphModule, target: str, value: Tensor) -> None:
    """Another tensor in the place of a constant; a parameter stays one."""
    path, _, name = target.rpartition(".")
    module = gm.get_submodule(path)
    value = value.detach()
    if name in module._parameters:
        module._parameters[name] = torch.nn.Parameter(value, requires_grad=module._parameters[name].requires_grad)
    else:
        delattr(module, name)
        module.register_buffer(name, value)


class ConstantPool:
    """New constants of a graph by name, each stored once however many nodes read it."""

    def __init__(self, gm: fx.GraphModule):
        self._gm, self._targets = gm, {}

    def read(self, name: str, value: Tensor, like: fx.Node) -> fx.Node:
        """A get_attr node, at the current insertion point, of the constant of that name: ``value`` when it is first asked for."""
        if name in self._targets:
            return inherit_origin(like, self._gm.graph.get_attr(self._targets[name]))
        node = add_constant(self._gm, name, value, like)
        self._targets[name] = node.target
        return node


def _unused_name(gm: fx.GraphModule, base: str) -> str:
    """``base``, else with the number after those in use: a thousand constants may ask for one name."""
    if not hasattr(gm, base):
        return base
    used, unused = 0, 1
    while hasattr(gm, f"{base}_{unused}"):
        used, unused = unused, 2 * unused
    while unused - used > 1:
        middle = (used + unused) // 2
        used, unused = (middle, unused) if hasattr(gm, f"{base}_{middle}") else (used, middle)
    return f"{base}_{unused}"


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


def set_argument(node: fx.Node, name: str, value: object) -> None:
    """Give an operator argument another value, by its schema name."""
    position = next(i for i, a in enumerate(node.target._schema.arguments) if a.name == name)
    if position < len(node.args):
        node.args = (*node.args[:position], value, *node.args[position + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: value}


def per_dimension(value: int | Sequence[int], dimensions: int) -> list[int]:
    """An operator's int or int list (stride, padding, ...) as one number per spatial dimension; [] stays []."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dimensions if len(values) == 1 else values


def bounds(gm: fx.GraphModule, clamp: fx.Node) -> tuple[float | Tensor | None, float | Tensor | None]:
    """(min, max) of a clamp: numbers, or float64 tensors where they are constants of the graph; None is no bound."""
    values = (argument(clamp, name) for name in ("min", "max"))
    return tuple(constant(gm, v).detach().double() if isinstance(v, fx.Node) else v for v in values)


def shape(node: fx.Node) -> tuple:
    """Shape of the tensor a node computes; the batch dimension may be a SymInt."""
    return tuple(node.meta["val"].shape)


def one_sample_shape(node: fx.Node) -> list[int]:
    """Shape of the tensor a node computes for a batch of one: a dimension (batch * 4) is 4."""
    return [int(n.node.expr.subs(dict.fromkeys(n.node.expr.free_symbols, 1))) if isinstance(n, torch.SymInt) else n
            for n in shape(node)]  # fmt: skip


def dtype(node: fx.Node) -> torch.dtype:
    """Of the tensor that the node computes."""
    return node.meta["val"].dtype


def rank(node: fx.Node) -> int:
    """How many dimensions its tensor has."""
    return node.meta["val"].ndim


def is_float(node: fx.Node) -> bool:
    """Whether it computes a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def output_node(gm: fx.GraphModule) -> fx.Node:
    """The node that returns."""
    return next(n for n in reversed(gm.graph.nodes) if n.op == "output")


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    """The inputs, in order."""
    return gm.graph.find_nodes(op="placeholder")


def owners(gm: fx.GraphModule, targets: Set) -> dict[str, str]:
    """For every node, by name, the last call of one of ``targets`` on the way to it, itself included.

    What follows a layer up to the next one (a clamp, an addition, its rounding) belongs to it; where branches meet, to the last.
    """
    position: dict[fx.Node, int] = {}
    layers: list[str] = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in targets:
            layers.append(node.name)
            position[node] = len(layers) - 1
        elif inputs := [position[a] for a in node.all_input_nodes if a in position]:
            position[node] = max(inputs)
    return {node.name: layers[i] for node, i in position.items()}


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Everything that a node is computed from, itself left out."""
    seen, stack = set(), [node]
    while stack:
        new = [source for source in stack.pop().all_input_nodes if source not in seen]
        seen.update(new)
        stack += new
    return seen


def single_user(node: fx.Node) -> fx.Node | None:
    """The one consumer of a node, None when there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def erase_dead(gm: fx.GraphModule) -> int:
    """Remove nodes nobody reads and constants no node names. Returns the number of nodes removed."""
    before = len(gm.graph.nodes)
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            gm.graph.erase_node(node)
    _drop_unread(gm, {n.target for n in gm.graph.nodes if n.op in ("get_attr", "call_module")})
    return before - len(gm.graph.nodes)


def _drop_unread(gm: fx.GraphModule, targets: set[str]) -> None:
    """Remove the tensors and submodules that lie neither on the way to a target nor below one."""
    used = {target[: m.start()] for target in targets for m in re.finditer(r"\.|$", target)}
    stack = [("", gm)]
    while stack:
        prefix, module = stack.pop()
        names = [*module._parameters, *module._buffers, *module._modules]
        for name in names:
            if prefix + name not in used:
                delattr(module, name)
            elif name in module._modules and prefix + name not in targets:
                stack.append((f"{prefix}{name}.", module._modules[name]))
