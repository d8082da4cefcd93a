"""Builds of the kernel library for inspection: with sanitizers, or as separate objects."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "backends" / "native" / "src"


def compile_objects(folder: Path, *flags: str) -> list[Path]:
    """Compile every source into ``folder``."""

    def one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        compiler = ["gcc", "-std=c99"] if source.suffix == ".c" else ["g++", "-std=c++17"]
        subprocess.run([*compiler, "-fPIC", "-fopenmp", *flags, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sorted(p for p in SOURCE.iterdir() if p.suffix in (".c", ".cpp"))))


def build_sanitized(folder: Path) -> Path:
    """The library under AddressSanitizer and UndefinedBehaviourSanitizer; the first report ends the process."""
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    library = folder / "_kernels.so"
    subprocess.run(["g++", "-shared", *flags, "-fopenmp", "-o", library, *compile_objects(folder, *flags)], check=True)
    return library


def run_sanitized(library: Path, *pytest_arguments: str) -> subprocess.CompletedProcess:
    """Run tests in a process whose native backend is ``library``."""
    asan = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {
        **os.environ, "HYPOTHESIS_PROFILE": "few", "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-s",
        f"--kernel-library={library}",
        *pytest_arguments,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=SOURCE.parents[2])
