"""``inspect``, ``bench``, ``diff`` and ``passes``: what only looks, from parsed arguments to an exit status."""

from __future__ import annotations

import argparse
import difflib
import inspect as python_inspect
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import errors
from ..compiled import CompiledModule, load
from ..dump import listing
from ..executable import QuantizedTensor
from ..pipeline import default_passes, reasons
from ..published import published_passes
from ..report import sqnr_db
from ..terminal import progress
from .output import show

_WARMUP = 3


def inspect_model(args: argparse.Namespace) -> int:
    network = load(args.file)
    certificate = network.verify_integer_only() if args.verify else None
    text = str(network.report()) + (f"\n\nverified again: {certificate}" if certificate else "")
    data = {"report": network.report().to_dict()} | ({"verified": certificate.to_dict()} if certificate else {})
    if args.graph:
        text, data["graph"] = f"{text}\n\n{listing(network.graph_module)}", listing(network.graph_module).splitlines()
    show(data, text, args.json)
    return 0


def random_inputs(network: CompiledModule, batch: int) -> list[Tensor]:
    """One tensor per tensor of a call: seeded values of the range each input was compiled for, zeros where they are integers."""
    ranges = {entry["name"]: (entry["lo"], entry["hi"]) for entry in network.report().inputs}
    generator, result = torch.Generator().manual_seed(0), []
    for leaf, node in zip(
        network.interface.tensor_inputs, network.graph_module.graph.find_nodes(op="placeholder"), strict=True
    ):
        shape = ((batch,) if leaf.batched else ()) + leaf.tail
        lo, hi = ranges.get(node.name, (0.0, 1.0))
        values = lo + (hi - lo) * torch.rand(shape, generator=generator)
        result.append(values if leaf.dtype == "float32" else torch.zeros(shape, dtype=getattr(torch, leaf.dtype)))
    return result


def call_of(network: CompiledModule, tensors: list[Tensor]) -> dict:
    """The keyword arguments of a call with these tensors. Raises ``OptionError`` where arguments are nested."""
    rest, call = iter(tensors), {}
    for leaf in network.interface.inputs:
        if not leaf.name.isidentifier():
            raise errors.OptionError(f"the argument {leaf.name} is part of a container", stage="command line",
                                     remedy="Run the model from Python: fxcompress.load(file).")  # fmt: skip
        call[leaf.name] = next(rest) if leaf.is_tensor else leaf.value
    return call


def bench_model(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    network = load(args.file, backend=args.backend)
    call = call_of(network, random_inputs(network, args.batch))
    with torch.inference_mode(), progress(1) as announce:
        announce(f"measuring for {args.seconds:g} s")
        for _ in range(_WARMUP):
            network(**call)
        times, stop = [], time.perf_counter() + args.seconds
        while not times or time.perf_counter() < stop:
            start = time.perf_counter()
            network(**call)
            times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    minimum, median = times[0], times[len(times) // 2]
    macs = network.report().macs * args.batch
    data = {
        "backend": network.report().backend, "batch": args.batch, "threads": torch.get_num_threads(), "runs": len(times),
        "minimum_ms": minimum, "median_ms": median, "gmac_per_second": macs / minimum / 1e6,
    }  # fmt: skip
    text = (f"{data['backend']}, batch {args.batch}, {data['threads']} threads: {minimum:.3f} ms at best, {median:.3f} ms median of "
            f"{len(times)} runs; {data['gmac_per_second']:.1f} GMAC/s")  # fmt: skip
    show(data, text, args.json)
    return 0


def diff_models(args: argparse.Namespace) -> int:
    networks = [load(args.first), load(args.second)]
    reports = [n.report() for n in networks]
    graphs = [listing(n.graph_module).splitlines() for n in networks]
    changes = list(difflib.unified_diff(*graphs, args.first, args.second, lineterm="", n=1))
    tensors = [dict(n.graph_module.named_buffers()) for n in networks]
    changed = sorted(
        k for k in tensors[0].keys() | tensors[1].keys() if not _equal(tensors[0].get(k), tensors[1].get(k))
    )
    data = {
        "target": [r.target for r in reports], "macs": [r.macs for r in reports], "stored_bytes": [r.stored_bytes for r in reports],
        "output_sqnr": [r.output_sqnr for r in reports], "graph": changes, "constants": changed,
        "answers": _answers(networks, args.samples), "same": not changes and not changed,
    }  # fmt: skip
    show(data, _diff_text(args, data), args.json)
    return 0 if data["same"] else 1


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def _answers(networks: list[CompiledModule], samples: int) -> dict | None:
    """How much the outputs differ on the same random inputs; None where the two take other inputs."""
    inputs = [random_inputs(n, samples) for n in networks]
    if [x.shape for x in inputs[0]] != [x.shape for x in inputs[1]]:
        return None
    with torch.inference_mode():
        outputs = [[_real(y) for y in tree_leaves(n(**call_of(n, inputs[0])), is_leaf=_is_quantized)] for n in networks]
    if [y.shape for y in outputs[0]] != [y.shape for y in outputs[1]]:
        return None
    first = [y.flatten(1) if y.ndim > 1 else y[:, None] for y in outputs[0]]
    second = [y.reshape(x.shape) for x, y in zip(first, outputs[1], strict=True)]
    return {
        "sqnr": [sqnr_db(a, b) for a, b in zip(first, second, strict=True)],
        "agreement": [(a.argmax(1) == b.argmax(1)).double().mean().item() for a, b in zip(first, second, strict=True)],
    }


def _is_quantized(value: object) -> bool:
    return isinstance(value, QuantizedTensor)


def _real(value: Tensor | QuantizedTensor) -> Tensor:
    return value.dequantize() if _is_quantized(value) else value.float()


def _diff_text(args: argparse.Namespace, data: dict) -> str:
    if data["same"]:
        return f"{args.first} and {args.second} are the same network"
    lines = [f"{name}: {a} -> {b}" for name in ("target", "macs", "stored_bytes") for a, b in [data[name]] if a != b]
    lines += data["graph"]
    if data["constants"]:
        shown = ", ".join(data["constants"][:8]) + (", ..." if len(data["constants"]) > 8 else "")
        lines.append(f"{len(data['constants'])} constants differ: {shown}")
    if (answers := data["answers"]) is None:
        lines.append("they take or return other shapes: answers not compared")
    else:
        lines += [
            f"output {i}: {quality:.1f} dB from the first, largest entry in the same place for {share:.0%} of {args.samples} random inputs"
            for i, (quality, share) in enumerate(zip(answers["sqnr"], answers["agreement"], strict=True))
        ]
    return "\n".join(lines)


def list_passes(args: argparse.Namespace) -> int:
    why, rows = reasons(), []
    for number, p in enumerate(default_passes(args.target), start=1):
        what = (python_inspect.getdoc(python_inspect.getmodule(type(p))) or "").split("\n\n")[0].replace("\n", " ")
        rows.append({"number": number, "name": p.name, "level": str(p.level.value), "effect": p.effect.name, "what": what,
                     "why_here": why[p.name], "source": p.source})  # fmt: skip
    published = published_passes()
    if args.json:
        show({"default": rows, "published": published}, "", as_json=True)
        return 0
    table = Table("", "pass", "level", "effect", "what it does", "why it stands here")
    for row in rows:
        table.add_row(str(row["number"]), row["name"], row["level"], row["effect"], row["what"], row["why_here"])
    Console(width=None if Console().is_terminal else 160, markup=False, emoji=False).print(table)
    for name, package in published.items():
        print(f"published by {package}: {name} (compile --insert-after PASS {name})")
    return 0
