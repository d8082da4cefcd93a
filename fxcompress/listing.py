"""A graph as text: one readable line per operation, with shapes, dtypes, scales and where it came from in the user's program."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .graph import constant
from .meta import tensor_meta

_SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.uint8: "u8",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "bool",
}  # fmt: skip
_INLINE = 4  # constants of at most that many elements are printed by value


def tensor_text(value: Tensor) -> str:
    """ "f32[N, 16, 32, 32]"; symbolic sizes print as N."""
    sizes = ", ".join("N" if isinstance(s, torch.SymInt) else str(s) for s in value.shape)
    return f"{_SHORT.get(value.dtype, value.dtype)}[{sizes}]"


def listing(gm: fx.GraphModule) -> str:
    """The graph as text, one line per operation: result, type, operator, arguments, what is known, and where it came from."""
    return "\n".join(line for node in gm.graph.nodes if (line := node_text(gm, node)))


def node_text(gm: fx.GraphModule, node: fx.Node) -> str:
    """One line of the listing; empty for a constant."""
    if node.op == "get_attr":  # shown where it is used
        return ""
    if node.op == "output":
        return f"return {_argument(gm, node.args[0])}"
    value = node.meta.get("val")
    kind = tensor_text(value) if isinstance(value, Tensor) else type(value).__name__
    if node.op == "placeholder":
        text = f"%{node.name}: {kind} = input"
    else:
        args = [_argument(gm, a) for a in node.args] + [f"{k}={_argument(gm, v)}" for k, v in node.kwargs.items()]
        text = f"%{node.name}: {kind} = {operator_name(node.target)}({', '.join(args)})"
    notes = _notes(node)
    return f"{text}  # {'; '.join(notes)}" if notes else text


def operator_name(target) -> str:
    """ "aten.conv2d", "fxc.requantize"."""
    return str(target).removesuffix(".default").replace("fxcompress.", "fxc.")


def _argument(gm: fx.GraphModule, value) -> str:
    if isinstance(value, fx.Node):
        if value.op != "get_attr":
            return f"%{value.name}"
        tensor = constant(gm, value)
        return _small(tensor) if tensor.numel() <= _INLINE else f"{value.target}: {tensor_text(tensor)}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_argument(gm, v) for v in value) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _small(tensor: Tensor) -> str:
    values = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in tensor.flatten().tolist()]
    return values[0] if tensor.numel() == 1 else "[" + ", ".join(values) + "]"


def _notes(node: fx.Node) -> list[str]:
    meta, notes = tensor_meta(node), []
    if meta.qparams is not None and meta.qparams.axis is None:
        notes.append(f"scale {float(meta.qparams.scale):.6g} zero {int(meta.qparams.zero_point)}")
    elif meta.range is not None:
        lo, hi = meta.range.bounds
        notes.append(f"range [{lo:.5g}, {hi:.5g}] {meta.range.provenance}")
    if meta.statistics is not None and meta.qparams is None:
        s = meta.statistics
        notes.append(f"mean {float(s.mean.mean()):.4g} std {float(s.std.mean()):.4g} ({s.provenance})")
    if str(meta.origin) != "<graph>":
        notes.append(str(meta.origin))
    return notes
