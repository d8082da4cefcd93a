"""Builds and runs exported C source as its user would, with every warning an error."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from fxcompress.backends.c_source import CSource

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1")


def compiler() -> str:
    """The C compiler, or a visible skip."""
    return shutil.which("gcc") or shutil.which("cc") or pytest.skip("no C compiler")


@functools.cache
def _kernels(source: str, flags: tuple[str, ...]) -> Path:
    """The object of the kernels, the same for every network."""
    target = Path(tempfile.mkdtemp(prefix="fxc_kernels_")) / "kernels.o"
    subprocess.run([compiler(), *flags, "-c", source, "-o", target], check=True)
    return target


def run_test(source: CSource, *more_flags: str) -> str:
    """Compile the exported test with ``STRICT`` and run it; what it printed. Fails on a warning or a wrong value."""
    flags = (*STRICT, *more_flags)
    program = source.directory / "test"
    name = source.files[1].removesuffix(".c")
    kernels = _kernels(
        str(Path(__file__).resolve().parents[2] / "backends" / "native" / "src" / "fxc_kernels.c"), flags
    )
    files = [source.directory / f"{name}.c", source.directory / f"{name}_test.c", kernels]
    subprocess.run([compiler(), *flags, "-o", program, *files], check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout
