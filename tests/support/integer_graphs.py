"""Integer-level graphs written by hand, as the passes would leave them.

gm = integer_graph(lambda m, x: ops.widen.default(x, m.zero), {"zero": int32(3)}, codes(2, 4))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from fxcompress.shapes import trace_shapes

ops = torch.ops.fxcompress


class _Traced(nn.Module):
    def __init__(self, function: Callable, constants: dict[str, Tensor]):
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, value)


_FORWARDS = {
    1: lambda self, x: self.function(self, x),
    2: lambda self, x, y: self.function(self, x, y),
    3: lambda self, x, y, z: self.function(self, x, y, z),
}


def integer_graph(function: Callable, constants: dict[str, Tensor], *examples: Tensor) -> fx.GraphModule:
    """Trace ``function(constants, *inputs)``; the batch becomes symbolic. Its result is made a flat tuple."""
    forward = _FORWARDS[len(examples)]
    module = type("Traced", (_Traced,), {"forward": forward})(function, constants)
    gm = fx.symbolic_trace(module)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    if not isinstance(output.args[0], tuple):
        output.args = ((output.args[0],),)
    gm.recompile()
    trace_shapes(gm, examples)
    return gm


def int32(*values) -> Tensor:
    """int32(3) is a scalar, int32(1, 2) a vector."""
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.int32)


def codes(*shape: int, lo: int = 0, hi: int = 255, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Random codes in lo..hi."""
    return torch.randint(lo, hi + 1, shape, dtype=torch.int64).to(dtype)


def weights(*shape: int) -> Tensor:
    """Random int8 weight codes in -127..127."""
    return codes(*shape, lo=-127, hi=127, dtype=torch.int8)


def node_named(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)
