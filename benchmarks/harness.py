"""What every benchmark shares: machine facts, timing, JSON.

Benchmarks run serially on an otherwise idle machine. A time is the minimum over repeats (what the code costs) with the
median and the spread beside it (how far to trust it). Claims come with the command and ``machine_facts()``.

    timing = measure(lambda: model(x), repeats=10)
    print(timing)                                   # 12.3 ms (median 12.6, +4 %)
    write_json("results.json", "models", [asdict(timing)])
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
#: Instruction sets that decide which integer kernels a CPU can run.
ISA_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")


@dataclass(frozen=True)
class Timing:
    """Seconds over repeats of one thing."""

    minimum: float
    median: float
    maximum: float
    repeats: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        seconds = sorted(seconds)
        return cls(seconds[0], statistics.median(seconds), seconds[-1], len(seconds))

    @property
    def spread(self) -> float:
        """(median - minimum) / minimum: a few percent on a quiet machine."""
        return (self.median - self.minimum) / self.minimum

    def __str__(self) -> str:
        unit, factor = ("s", 1) if self.minimum >= 1 else ("ms", 1e3)
        return f"{self.minimum * factor:.3g} {unit} (median {self.median * factor:.3g}, +{self.spread:.0%})"


def measure(run: Callable[[], object], *, repeats: int = 5, warmup: int = 1) -> Timing:
    """Wall time of ``run()``, after ``warmup`` calls that do not count."""
    for _ in range(warmup):
        run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)


def machine_facts() -> dict[str, object]:
    """CPU, instruction sets, threads, versions and commit: what a figure depends on besides the code."""
    cpu = _cpuinfo()
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "networkx")},
        "commit": _commit(),
    }


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _commit() -> str:
    """Short hash of the checkout, with "+" when files differ from it; "" outside a git checkout."""
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def describe_machine() -> str:
    """The facts in one line, for the head of a printed table."""
    facts = machine_facts()
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, load {facts['load']}; "
        f"{' '.join(facts['isa']) or 'no known SIMD'}; torch {facts['versions']['torch']}; commit {facts['commit'] or '-'}"
    )


def write_json(path: str | os.PathLike, benchmark: str, rows: list[dict]) -> None:
    """Write ``rows`` with the machine facts; parent folders are created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": benchmark, "machine": machine_facts(), "rows": rows}, indent=1) + "\n")
