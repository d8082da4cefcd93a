"""The graphs between the passes as data for the page: every node once, every pass a list of them."""

from __future__ import annotations

import re

import torch
from torch import Tensor, fx

from ..dialects import CONVOLUTIONS, WEIGHTED
from ..graph import argument, constant, is_call, is_constant, owners
from ..listing import node_text, tensor_text
from ..meta import tensor_meta
from ..report import MULTIPLYING

#: What kind of work an operator does, for its color: the first pattern in its name.
_KINDS = {
    "rounding": r"quantize|rescale|widen",
    "normalization": r"norm|softmax",
    "weights": r"conv|linear|matmul|addmm|bmm|embedding|scaled_dot_product",
    "pooling": r"pool|mean|sum$",
    "activation": r"relu|clamp|hardtanh|sigmoid|tanh|silu|gelu|swish|elu|mish|softplus|table|exp|erf|sqrt|pow|log",
    "sum": r"^(i?add|i?sub|i?mul|div)",
    "movement": r"view|reshape|flatten|permute|transpose|slice|select|pad|cat|stack|expand|clone|contiguous|split|chunk|index|upsample|resize|squeeze",
}


class GraphStory:
    """Observer of a ``PassManager``: the graph behind every pass that changed its listing.

    Attributes:
        nodes: every distinct node; stages: {"pass", "level", "nodes": positions in ``nodes``}, "captured" first.
    """

    def __init__(self):
        self.nodes: list[dict] = []
        self.stages: list[dict] = []
        self._index: dict[str, int] = {}

    def add(self, name: str, level: str, gm: fx.GraphModule) -> None:
        """The graph behind the pass ``name``; nothing if it is the one before."""
        known = {node for node in gm.graph.nodes if node.op == "placeholder"}
        owner = owners(gm, WEIGHTED | frozenset(MULTIPLYING))
        positions = []
        for node in gm.graph.nodes:
            if node.op == "placeholder" or not known.isdisjoint(node.all_input_nodes):  # computed from an input
                known.add(node)
                positions.append(self._position(_entry(gm, node, known, owner.get(node.name, ""))))
        if not self.stages or positions != self.stages[-1]["nodes"]:
            self.stages.append({"pass": name, "level": level, "nodes": positions})

    def to_dict(self) -> dict:
        return {"nodes": self.nodes, "stages": self.stages}

    def _position(self, entry: dict) -> int:
        key = repr(entry)
        if key not in self._index:
            self._index[key] = len(self.nodes)
            self.nodes.append(entry)
        return self._index[key]


def _entry(gm: fx.GraphModule, node: fx.Node, drawn: set[fx.Node], layer: str) -> dict:
    value = node.meta.get("val")
    return {
        "name": node.name,
        "label": _label(gm, node),
        "kind": _kind(node),
        "shape": tensor_text(value) if isinstance(value, Tensor) else "",
        "module": tensor_meta(node).origin.module,
        "text": node_text(gm, node),
        "inputs": [a.name for a in node.all_input_nodes if a in drawn],
        "layer": layer,
    }


def _kind(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return "boundary"
    name = _operator(node)
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), "other")


def _operator(node: fx.Node) -> str:
    """ "conv2d" for ``aten.conv2d.default``, "requantize" for ``fxcompress.requantize.default``."""
    return getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))


def _label(gm: fx.GraphModule, node: fx.Node) -> str:
    """ "conv2d 3x3 /2 depthwise": the operator with what tells it from its neighbors."""
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    name = _operator(node)
    if not is_call(node, *CONVOLUTIONS, torch.ops.fxcompress.conv.default):
        return name
    weight = _weight_shape(gm, node.args[1])
    if weight is None:
        return name
    words = [name, "x".join(map(str, weight[2:]))]
    stride, groups = argument(node, "stride"), argument(node, "groups")
    if max(stride) > 1:
        words.append(f"/{max(stride)}")
    if groups > 1:
        words.append("depthwise" if groups == weight[0] else f"{groups} groups")
    return " ".join(words)


def _weight_shape(gm: fx.GraphModule, node: object) -> tuple | None:
    if is_constant(node):
        return tuple(constant(gm, node).shape)
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None
