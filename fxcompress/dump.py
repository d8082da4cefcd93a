"""Text dumps: a readable listing per pass, what changed, and its checks.

``DumpFolder`` writes, for pass number NN: ``NN_name.txt`` (what it did, what it refused, its checks, the graph afterwards)
and ``NN_name.diff`` (the listing before against after). ``00_captured.txt`` is the graph as it came from the exporter,
``report.txt`` and ``report.json`` the report.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

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
    return "\n".join(line for node in gm.graph.nodes if (line := _line(gm, node)))


def _line(gm: fx.GraphModule, node: fx.Node) -> str:
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
        text = f"%{node.name}: {kind} = {_operator(node.target)}({', '.join(args)})"
    notes = _notes(node)
    return f"{text}  # {'; '.join(notes)}" if notes else text


def _operator(target) -> str:
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


class DumpFolder:
    """Observer of a ``PassManager`` that writes the dumps into ``path`` (created; files of an older run are overwritten)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        for old in (*self.path.glob("[0-9][0-9]_*.txt"), *self.path.glob("[0-9][0-9]_*.diff")):
            old.unlink()
        self._number, self._previous = 0, ""

    def captured(self, gm: fx.GraphModule) -> None:
        self._previous = listing(gm)
        (self.path / "00_captured.txt").write_text(self._previous + "\n")

    def __call__(self, record, before, gm: fx.GraphModule) -> None:
        self._number += 1
        stem = f"{self._number:02d}_{record.name}"
        text = listing(gm)
        changed = text != self._previous
        (self.path / f"{stem}.txt").write_text("\n\n".join([_header(record, changed), text]) + "\n")
        if changed:
            lines = difflib.unified_diff(
                self._previous.splitlines(), text.splitlines(), "before", "after", lineterm="", n=2
            )
            (self.path / f"{stem}.diff").write_text("\n".join(lines) + "\n")
        self._previous = text

    def report(self, report) -> None:
        (self.path / "report.txt").write_text(str(report) + "\n")
        (self.path / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")


def _header(record, changed: bool) -> str:
    head = [
        f"pass {record.name}: {record.level} level, {record.effect}{', ' + record.source if record.source else ''}",
        f"{record.rewrites} rewrites, {len(record.refusals)} refusals, {record.seconds:.3f} s"
        f" + {record.check_seconds:.3f} s of checks{'' if changed else ' (unchanged)'}",
    ]
    if record.output_change is not None:
        head.append(f"largest change of an output: {record.output_change:.3g} relative")
    if record.checks:
        head.append("checked: " + ", ".join(record.checks))
    return "\n".join(head + [f"  {m}" for m in record.matches] + [f"  {r}" for r in record.refusals])
