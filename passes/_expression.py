"""Small expressions over graph nodes, and their construction with constants folded on the way.

    Op(mul, x, Op(reciprocal, c))      c a constant  ->  mul(x, c')     c' = 1/c, one new constant

A spelling rule looks at a node and returns the expression it should be; nothing changes until ``replace``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from fxcompress.errors import InternalError
from fxcompress.graph import add_constant, constant, is_constant
from fxcompress.meta import carry, inherit_origin
from fxcompress.shapes import compute


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


def is_static(node: object) -> bool:
    """True for a constant, and for a call that computes the same from constants every time."""
    if not isinstance(node, fx.Node):
        return False
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen or is_constant(current):
            continue
        if current.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(current.target, "tags", ()):
            return False
        seen.add(current)
        stack += current.all_input_nodes
    return True


def evaluate(target: Callable, args: tuple, kwargs: dict) -> object:
    """The result of a call on constants, computed in float64 on copies of them (an in-place operator is harmless)."""

    def widened(value: object) -> object:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() and value.dtype != torch.float64 else value.clone()
        if isinstance(value, (list, tuple)):
            return [widened(v) for v in value]
        return value

    with torch.no_grad():
        return target(*[widened(a) for a in args], **{k: widened(v) for k, v in kwargs.items()})


def replace(gm: fx.GraphModule, node: fx.Node, expression: Expression) -> fx.Node:
    """Compute ``expression`` instead of ``node``, which is erased; returns the node that now holds the value.

    The expression must compute the tensor ``node`` computed: shape and meta are taken over.
    """
    with gm.graph.inserting_before(node):
        new = _build(gm, expression, like=node, result=node)
    if new is node:
        raise InternalError(f"{node.name} cannot replace itself", stage="replace")
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return new


def _build(gm: fx.GraphModule, expression: object, like: fx.Node, result: fx.Node | None = None) -> object:
    """The node of an expression, made on behalf of ``like``; ``result`` is given for the outermost call."""
    if isinstance(expression, Tensor):
        return _constant(gm, f"{like.name}_constant", expression, like)
    if isinstance(expression, (list, tuple)):
        return [_build(gm, e, like) for e in expression]
    if not isinstance(expression, Op):
        return expression
    args = tuple(_build(gm, a, like) for a in expression.args)
    inputs: list[fx.Node] = []
    fx.map_arg(args, inputs.append)
    if inputs and all(is_constant(n) for n in inputs):
        values = fx.map_arg(args, lambda n: constant(gm, n))
        value = evaluate(expression.target, values, expression.kwargs)
        value = value.float() if value.is_floating_point() else value
        return _constant(gm, f"{inputs[0].target}_{like.name}", value.contiguous(), like)
    new = gm.graph.call_function(expression.target, args, expression.kwargs)
    new = inherit_origin(like, new) if result is None else carry(result, new)
    if like.meta.get("keep_float"):
        new.meta["keep_float"] = True
    compute(gm, new, known=result is not None)
    return new


def _constant(gm: fx.GraphModule, name: str, value: Tensor, like: fx.Node) -> fx.Node:
    node = add_constant(gm, name, value, like)
    compute(gm, node)
    return node
