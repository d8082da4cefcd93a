"""The native backend: C++ kernels chosen at run time, a flat plan, one library call per inference.

The way of the data: ``planner`` walks the integer graph (rules in ``emit*``, fused groups from ``fusion``) and yields steps on
``views`` of buffers; ``memory_plan`` places the buffers in one arena; ``program`` hands the steps to the library (``kernels``,
``structs`` mirror ``src/``).
"""

from __future__ import annotations

import copy

from torch import fx

from ..base import check_supported
from .kernels import kernel_library
from .program import NativePlan, NativeProgram
from .regions import MixedProgram, has_float_regions

__all__ = ["NativeBackend", "NativePlan", "NativeProgram"]


class NativeBackend:
    """Runs integer graphs on the kernels of this processor.

    Args:
        prefer: name of a kernel row or instruction set to take wherever it accepts ("scalar", "avx2", ...); default: the
            first row of the table.
        num_threads: threads per inference; default: torch's setting at the call.
    """

    name = "native"

    def __init__(self, prefer: str | None = None, num_threads: int | None = None):
        self.prefer, self.num_threads = prefer, num_threads

    def supports(self, node: fx.Node) -> str | None:
        """Every operator with a rule in ``emit``, and ``keep_float`` regions, which PyTorch runs."""
        from .emit import RULES

        if node.op in ("placeholder", "get_attr", "output") or node.meta.get("keep_float"):
            return None
        if node.op != "call_function" or node.target not in RULES:
            return f"{node.target} has no native kernel"
        return None

    def lower(self, gm: fx.GraphModule) -> NativeProgram | MixedProgram:
        kernel_library()  # a library that is missing is an error now, not at the first inference
        check_supported(self, gm)
        gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        return MixedProgram(gm, self._lower) if has_float_regions(gm) else self._lower(gm)

    def _lower(self, gm: fx.GraphModule) -> NativeProgram:
        return NativeProgram(gm, self.prefer, self.num_threads)
