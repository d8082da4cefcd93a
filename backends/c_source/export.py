"""``export_c``: an integer network as C99 source for a device that has integers and little else.

    model.h             sizes, shapes, scales; int model_run(const uint8_t *in_x, int32_t *out0)
    model.c             weights and parameters as constants, a static arena, one kernel call per step
    model_test.c        main: runs recorded samples and compares every value
    fxc_kernels.h, .c   the portable kernels, as they are in the native library

No heap, no floating point, no mathematical library. The plan (which nodes one kernel computes, where tensors lie, what is only a view)
is that of the native backend with its scalar kernels, so there is one planner and the same bits.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fxcompress.errors import ArtifactError, OptionError

from ..native.memory_plan import plan_memory
from ..native.packing import PackedWeights
from ..native.planner import Planner
from ..native.views import Uses
from ..reference import ReferenceBackend
from .core import Core
from .definitions import Definitions
from .text import header_text, source_text, test_text

_KERNELS = Path(__file__).resolve().parent.parent / "native" / "src"
_KERNEL_FILES = ("fxc_kernels.h", "fxc_kernels.c")
_RECORDED = 2  # random samples in the test when none are given


@dataclass(frozen=True)
class CSource:
    """What ``CompiledModule.export_c`` wrote, and what it takes on the device.

    Attributes:
        directory, files: where the source is.
        core: the integer graph that the C code computes, with its inputs and outputs; the reference backend runs it.
        weight_bytes, constant_bytes: weights; biases, multipliers, shifts, tables.
        parameter_bytes: the parameters of the kernel calls, where pointers have 32 bits.
        arena_bytes: of all activations, a constant of the program.
        input_bytes, output_bytes: of the caller's buffers.
    """

    directory: Path
    files: tuple[str, ...]
    core: Core = field(repr=False, compare=False)
    weight_bytes: int
    constant_bytes: int
    parameter_bytes: int
    arena_bytes: int
    input_bytes: int
    output_bytes: int

    @property
    def flash_bytes(self) -> int:
        """Constants. The code of the kernels and of ``model_run`` comes on top: a few KB (docs/deployment.md)."""
        return self.weight_bytes + self.constant_bytes + self.parameter_bytes

    @property
    def ram_bytes(self) -> int:
        """Arena, inputs and outputs. The stack comes on top: less than 1 KB."""
        return self.arena_bytes + self.input_bytes + self.output_bytes

    def to_dict(self) -> dict[str, int]:
        """The bytes, for the report."""
        names = ("weight", "constant", "parameter", "flash", "arena", "input", "output", "ram")
        return {f"{name}_bytes": getattr(self, f"{name}_bytes") for name in names}

    def __str__(self) -> str:
        return (
            f"{self.directory}: {', '.join(self.files)}\n"
            f"flash {self.flash_bytes:,} bytes: {self.weight_bytes:,} weights, {self.constant_bytes:,} other constants, "
            f"{self.parameter_bytes:,} parameters of calls; the code of the kernels comes on top\n"
            f"RAM {self.ram_bytes:,} bytes: {self.arena_bytes:,} arena, {self.input_bytes:,} inputs, {self.output_bytes:,} outputs"
        )


def export_c(
    core: Core, directory: str | Path, name: str = "model", samples: tuple[Tensor, ...] | None = None
) -> CSource:
    """Write the C source of ``core`` into ``directory`` (created).

    Args:
        name: prefix of files and symbols, a C identifier.
        samples: one tensor of codes per input, a multiple of the batch long, for the test; None: random codes.

    Raises:
        OptionError: the name is no C identifier, or the samples do not fill whole batches. ArtifactError: a file cannot be written.
        BackendError: a node cannot be planned.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name):
        raise OptionError(f"name is {name!r}", stage="C export", expected="a C identifier", remedy='Pass name="model".')
    planner = Planner(core.graph_module, core.meta_inputs(), PackedWeights(), prefer="scalar", over_reads=False)
    arena_bytes = _plan_arena(planner)
    definitions = Definitions(planner.constants)
    source = source_text(name, planner, definitions, core)
    result = CSource(
        Path(directory),
        (f"{name}.h", f"{name}.c", f"{name}_test.c", *_KERNEL_FILES),
        core,
        definitions.bytes(weights=True),
        definitions.bytes(weights=False),
        definitions.parameter_bytes,
        arena_bytes,
        sum(p.bytes for p in core.inputs),
        sum(p.bytes for p in core.outputs),
    )
    recorded = _record(core, samples)
    texts = {
        f"{name}.h": header_text(name, core, result),
        f"{name}.c": source,
        f"{name}_test.c": test_text(name, core, *recorded),
    }
    _write(result.directory, texts)
    return result


def _plan_arena(planner: Planner) -> int:
    """Place every buffer; returns the bytes of all."""
    uses = Uses()
    counters = planner.counters.values()
    for i, step in enumerate(planner.steps):
        for view in (step.out, *step.inputs):
            if view.buffer not in counters:
                uses.touch(view.buffer, i)
    return plan_memory(uses).bytes if uses.first else 0


def _record(core: Core, samples: tuple[Tensor, ...] | None) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """(inputs, outputs) of each call, outputs by the reference backend."""
    if samples is None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(_RECORDED * p.shape[0], *p.shape[1:]) for p in core.inputs]
        samples = tuple(torch.randint(0, 256 if p.dtype == torch.uint8 else 2, shape, generator=generator).to(p.dtype)
                        for p, shape in zip(core.inputs, shapes, strict=True))  # fmt: skip
    counts = {len(x) / p.shape[0] for x, p in zip(samples, core.inputs, strict=True)}
    if len(counts) > 1 or not min(counts) >= 1 or min(counts) % 1:
        raise OptionError(f"there are {[len(x) for x in samples]} samples", stage="C export",
                          expected=f"a multiple of the batch, {[p.shape[0] for p in core.inputs]}", remedy="Pass whole batches.")  # fmt: skip
    calls = [
        [x[i * p.shape[0] : (i + 1) * p.shape[0]].contiguous() for x, p in zip(samples, core.inputs, strict=True)]
        for i in range(int(min(counts)))
    ]
    program = ReferenceBackend().lower(core.graph_module)
    return calls, [[y.contiguous() for y in program.run(*call)] for call in calls]


def _write(directory: Path, texts: dict[str, str]) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in texts.items():
            (directory / name).write_text(content)
        for name in _KERNEL_FILES:
            shutil.copyfile(_KERNELS / name, directory / name)
    except OSError as error:
        raise ArtifactError(f"cannot write into {directory}: {error.strerror}", stage="C export",
                            expected="a folder", remedy="Choose a folder of your own.") from error  # fmt: skip
