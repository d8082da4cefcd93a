"""Small expressions over graph nodes, and their construction with constants folded on the way.

    Op(mul, x, Op(reciprocal, c))      c a constant  ->  mul(x, c')     c' = 1/c, one new constant

A spelling rule looks at a node and returns the expression it should be; nothing changes until ``replace``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, fx

from fxcompress.graph import add_constant, constant, is_constant
from fxcompress.meta import inherit_origin
from fxcompress.shapes import compute

aten = torch.ops.aten


class Op:
    """A call to be made: operator overload and arguments (nodes, further ``Op``s, new constant tensors, numbers)."""

    __slots__ = ("args", "kwargs", "target")

    def __init__(self, target: Callable, *args, **kwargs):
        self.target, self.args, self.kwargs = target, args, kwargs

    def is_same_call(self, node: fx.Node) -> bool:
        """True if ``node`` is this very call already."""
        return self.target is node.target and _equal(self.args, node.args) and self.kwargs == node.kwargs

    def __str__(self) -> str:
        return f"{_operator_name(self.target)}({', '.join(_text(a) for a in self.args)})"


class Refused(str):
    """What a rule returns when it recognizes an operator but cannot spell this use of it: the reason."""


Expression = Op | fx.Node | Tensor


def _equal(a: object, b: object) -> bool:
    if isinstance(a, (Op, Tensor)):
        return False
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and a == b)


def _operator_name(target: Callable) -> str:
    return target._schema.name.removeprefix("aten::") if hasattr(target, "_schema") else target.__name__


def _text(argument: object) -> str:
    if isinstance(argument, Tensor):
        return f"constant{list(argument.shape)}"
    if isinstance(argument, (list, tuple)):
        return "[" + ", ".join(_text(a) for a in argument) + "]"
    return str(argument)


def static_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """The constants, and the calls that compute the same from constants every time."""
    static: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if is_constant(node) or (_is_deterministic(node) and all(n in static for n in node.all_input_nodes)):
            static.add(node)
    return static


def is_static(node: object) -> bool:
    """``node in static_nodes(gm)`` for one node, looking only at what it is computed from."""
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current in seen or is_constant(current):
            continue
        if not isinstance(current, fx.Node) or not _is_deterministic(current):
            return False
        seen.add(current)
        stack += current.all_input_nodes
    return True


def static_value(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, object] | None = None) -> object:
    """The float64 value of a static node, memoized in ``values``."""
    values = {} if values is None else values
    needed, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current not in values and current not in needed:
            needed.add(current)
            stack += current.all_input_nodes
    for current in sorted(needed):  # in topological order
        if is_constant(current):
            values[current] = constant(gm, current)
        else:
            args, kwargs = (fx.map_arg(a, values.__getitem__) for a in (current.args, current.kwargs))
            values[current] = evaluate(current.target, args, kwargs)
    return values[node]


def _is_deterministic(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded not in tags


def functional_overload(target: object) -> object:
    """The out-of-place twin of an in-place overload (add_.Tensor -> add.Tensor); None without one; else ``target``."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return target
    name = schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None)


def evaluate(target: Callable, args: tuple, kwargs: dict) -> object:
    """The result of a call on constants, computed in float64 on copies of them (an in-place operator is harmless)."""

    def widened(value: object) -> object:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() and value.dtype != torch.float64 else value.clone()
        if isinstance(value, (list, tuple)):
            return [widened(v) for v in value]
        return value

    return target(*[widened(a) for a in args], **{k: widened(v) for k, v in kwargs.items()})


def replace(gm: fx.GraphModule, node: fx.Node, expression: Expression) -> fx.Node:
    """Compute ``expression`` instead of ``node``; returns the node that now holds the value.

    The expression must compute the tensor ``node`` computed. If it is a call, ``node`` becomes that call and keeps its
    name, shape and meta, so that a reader finds the names of the captured graph again; else ``node`` is erased.
    """
    with gm.graph.inserting_before(node):
        new = _Builder(gm, node).build(expression, outermost=True)
    if new is not node:
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    return new


class _Builder:
    """Makes the nodes of an expression that stands for ``node``; a part used twice is made once."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node):
        self.gm, self.node = gm, node
        self._made: dict[int, fx.Node] = {}

    def build(self, expression: object, *, outermost: bool = False) -> object:
        if isinstance(expression, (list, tuple)):
            return [self.build(e) for e in expression]
        if not isinstance(expression, (Op, Tensor)):
            return expression
        if id(expression) not in self._made:
            make = self._constant if isinstance(expression, Tensor) else self._call
            self._made[id(expression)] = make(expression, outermost)
        return self._made[id(expression)]

    def _call(self, op: Op, outermost: bool) -> fx.Node:
        args = tuple(self.build(a) for a in op.args)
        inputs: list[fx.Node] = []
        fx.map_arg(args, inputs.append)
        if inputs and all(map(is_constant, inputs)):
            return self._constant(self._value(op, args, inputs), name=inputs[0].target)
        if outermost:
            self.node.target, self.node.args, self.node.kwargs = op.target, args, dict(op.kwargs)
            compute(self.gm, self.node, known=True)
            return self.node
        new = inherit_origin(self.node, self.gm.graph.call_function(op.target, args, op.kwargs))
        if self.node.meta.get("keep_float"):
            new.meta["keep_float"] = True
        compute(self.gm, new)
        return new

    def _value(self, op: Op, args: tuple, inputs: list[fx.Node]) -> Tensor:
        """The value of a call on constants, rounded once, to the dtype of what it is computed from."""
        value = evaluate(op.target, fx.map_arg(args, partial(constant, self.gm)), op.kwargs)
        if value.is_floating_point():
            dtypes = [constant(self.gm, n).dtype for n in inputs]
            value = value.to(next((d for d in dtypes if d.is_floating_point), torch.float32))
        return value.contiguous()

    def _constant(self, value: Tensor, outermost: bool = False, *, name: str = "constant") -> fx.Node:
        new = add_constant(self.gm, f"{name}_{self.node.name}", value, self.node)
        compute(self.gm, new)
        return new
