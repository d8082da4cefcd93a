"""Loads the compiled kernel library (built with the package by ``setup.py``) and lists its kernel table."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from importlib import machinery
from pathlib import Path

from fxcompress.errors import BackendError

from . import structs

_REMEDY = 'Install the package again where a C++17 compiler with OpenMP is available (`pip install .`), or use backend="reference".'


@dataclass(frozen=True)
class KernelRow:
    """One kernel: an implementation of ``op`` for the instruction set ``isa`` (``src/kernel_row.h``)."""

    name: str
    op: str
    isa: str
    available: bool
    c: structs.Kernel

    def accepts(self, params: ctypes.Structure) -> bool:
        return not self.c.accepts or bool(self.c.accepts(ctypes.addressof(params)))

    def units(self, params: ctypes.Structure) -> int:
        return self.c.units(ctypes.addressof(params))

    def scratch_bytes(self, params: ctypes.Structure) -> int:
        return self.c.scratch_bytes(ctypes.addressof(params)) if self.c.scratch_bytes else 0


def kernel_library_path() -> Path | None:
    """Where the build put the library."""
    paths = [p for suffix in machinery.EXTENSION_SUFFIXES for p in Path(__file__).parent.glob(f"_kernels{suffix}")]
    return paths[0] if paths else None


@functools.cache
def kernel_library() -> ctypes.CDLL:
    """The library, loaded once. Raises ``BackendError`` if it was not built, does not load or has another layout."""
    path = kernel_library_path()
    if path is None:
        raise BackendError("the kernel library was not built", stage="native backend", remedy=_REMEDY)
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(
            f"the kernel library does not load: {error}", stage="native backend", remedy=_REMEDY
        ) from error
    lib.fxc_kernel_row.restype = ctypes.POINTER(structs.Kernel)
    lib.fxc_struct_size.restype = ctypes.c_int64
    lib.fxc_run_program.restype = None
    lib.fxc_run_program.argtypes = [
        ctypes.POINTER(structs.Program), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int32, ctypes.c_void_p,
    ]  # fmt: skip
    for name, mirror in structs.STRUCTS.items():
        if lib.fxc_struct_size(name.encode()) != ctypes.sizeof(mirror):
            raise BackendError(f"the kernel library is of another version: {name} has "
                               f"{lib.fxc_struct_size(name.encode())} bytes, not {ctypes.sizeof(mirror)}",
                               stage="native backend", remedy=_REMEDY)  # fmt: skip
    return lib


@functools.cache
def kernel_table() -> tuple[KernelRow, ...]:
    """All kernels in order of preference, those this processor cannot run included.

    >>> [row.name for row in kernel_table() if row.op == "conv" and row.available]   # doctest: +SKIP
    """
    lib, rows = kernel_library(), []
    while pointer := lib.fxc_kernel_row(len(rows)):
        c = pointer.contents
        isa = c.isa.decode()
        available = isa in ("scalar", "float") or bool(lib.fxc_has_isa(c.isa))
        rows.append(KernelRow(c.name.decode(), c.op.decode(), isa, available, c))
    return tuple(rows)


def select(op: str, params: ctypes.Structure, prefer: str | None = None) -> KernelRow:
    """The first row of ``op`` that this processor has and that accepts ``params``.

    ``prefer``: the name of a row, or of an instruction set whose rows come first where they accept.
    """
    rows = [row for row in kernel_table() if row.op == op and row.available and row.accepts(params)]
    rows.sort(key=lambda row: prefer not in (row.name, row.isa))  # stable: the table's order otherwise
    if not rows:
        raise BackendError(f"no kernel for {op} on this processor", stage="native backend", remedy=_REMEDY)
    return rows[0]
