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
    """The library under AddressSanitizer and UndefinedBehaviorSanitizer; the first report ends the process."""
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    library = folder / "_kernels.so"
    subprocess.run(["g++", "-shared", *flags, "-fopenmp", "-o", library, *compile_objects(folder, *flags)], check=True)
    return library


def sanitizer_environment(*more_options: str) -> dict[str, str]:
    """The environment of a Python process that loads a sanitized library; ``more_options`` of AddressSanitizer, "name=value"."""
    # The C++ library too: the sanitizer looks for __cxa_throw when it is loaded, before Python has loaded anything.
    preloaded = (_gcc_file(name) for name in ("libasan.so", "libstdc++.so.6"))
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": ":".join(("detect_leaks=0", "abort_on_error=1", *more_options)),
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _gcc_file(name: str) -> str:
    """Where the compiler's library of that name lies."""
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_sanitized(library: Path, *pytest_arguments: str) -> subprocess.CompletedProcess:
    """Run tests in a process whose native backend is ``library``."""
    options = ("-q", "-s", "-p", "no:cacheprovider", f"--kernel-library={library}")
    command = [sys.executable, "-m", "pytest", *options, *pytest_arguments]
    environment = sanitizer_environment() | {"HYPOTHESIS_PROFILE": "few"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=SOURCE.parents[2])
