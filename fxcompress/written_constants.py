"""What a forward computes from numbers alone by writing into parts of tensors: a constant.

index = torch.zeros(9, 9); index[1:, 1:] = grid; index[0, :] = 5      ->  one constant (relative positions of BEiT, Swin)

Written in place, such tensors have no out-of-place spelling; computed once, in the order of the graph, they need none.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .graph import add_constant, constant


def fold_written_constants(gm: fx.GraphModule) -> int:
    """Replace what is computed from numbers alone by its value if any of it is written in place. Returns how many.

    A tensor that the rest of the graph reads before the last write stays: ``check_aliasing`` judges it.
    """
    if not any(map(_writes, gm.graph.nodes)):
        return 0
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    numbers: dict[fx.Node, object] = {}
    with torch.no_grad():
        for node in position:
            if node.op == "get_attr":
                if (value := constant(gm, node)).ndim == 0:  # a number; parameters are folded later, in float64
                    numbers[node] = value.clone()
            elif _is_repeatable(node) and all(n in numbers for n in node.all_input_nodes):
                numbers[node] = node.target(*fx.map_arg(node.args, numbers.get), **fx.map_arg(node.kwargs, numbers.get))
    written = [position[n] for n in numbers if _writes(n)]
    if any(_writes(n) and n not in numbers and _views(n) & numbers.keys() for n in position):
        return 0  # values that are not constant are written among them
    folded = 0
    for node, value in numbers.items() if written else ():
        readers = [user for user in node.users if user not in numbers]
        if (
            node.op == "call_function"
            and readers
            and isinstance(value, Tensor)
            and min(map(position.get, readers)) > max(written)
        ):
            with gm.graph.inserting_before(node):
                new = add_constant(gm, node.name, value.contiguous().clone(), node)
            for reader in readers:
                reader.replace_input_with(node, new)
            folded += 1
    if folded:
        for node in reversed(numbers):
            if not node.users and node.op == "call_function":
                gm.graph.erase_node(node)
    return folded


def _writes(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def _views(node: fx.Node) -> set[fx.Node]:
    """What an in-place call may write to: its first argument, what that may be a view of, and so on."""
    found = set()
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        found.add(node)
    return found


def _is_repeatable(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded not in tags
