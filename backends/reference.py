"""The reference backend: eager execution of the integer graph, one integer kernel per node. Slow, and the meaning."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.graph import copy_graph_module
from fxcompress.integer_ops import INDEX_OPS, INTEGER_LEVEL

from .base import check_supported


class ReferenceProgram:
    """A copy of the graph; later edits of the original do not reach it."""

    def __init__(self, gm: fx.GraphModule):
        self._module = copy_graph_module(gm)

    @torch.no_grad()
    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        result = self._module(*inputs)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    def resources(self) -> dict:
        return {}

    def time_steps(self, *inputs: Tensor) -> list[int]:
        return []


class ReferenceBackend:
    name = "reference"

    def supports(self, node: fx.Node) -> str | None:
        """Every operator of the integer dialect, token ids and masks, and the float operators of ``keep_float`` regions."""
        if node.op in ("placeholder", "get_attr", "output"):
            return None
        if node.op != "call_function":
            return f"{node.op} {node.target} is not an operator call"
        if node.target in INTEGER_LEVEL | INDEX_OPS or node.meta.get("keep_float"):
            return None
        return f"{node.target} is not in the integer dialect"

    def lower(self, gm: fx.GraphModule) -> ReferenceProgram:
        check_supported(self, gm)
        return ReferenceProgram(gm)
