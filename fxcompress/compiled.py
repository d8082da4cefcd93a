"""``CompiledModule``: the integer network as a drop-in ``nn.Module``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import artifact
from .backends.c_source import CoreOptions, CSource, export_c, integer_core
from .backends.onnx_qdq import export_onnx
from .errors import ArtifactError, InputError
from .executable import Executable
from .interface import Interface, TailShapeError, as_call
from .report import Report
from .torch_modes import exact
from .verify import Certificate


class CompiledModule(nn.Module):
    """The compiled network. Call it like the original; it has no parameters and no mode.

    Made by ``fxcompress.compile`` and ``fxcompress.load``. Without example inputs it compiles at the first call (from the
    weights as they were at ``compile``); a call with other sizes behind the batch compiles once more, with the same scales.

    Attributes:
        graph_module: the integer ``torch.fx.GraphModule``; its constants are registered buffers.
    """

    def __init__(self, compiler=None, executable: Executable | None = None):
        super().__init__()
        self._compiler = compiler
        self._executables: list[Executable] = []
        if executable is not None:
            self._add(executable)
        self.eval()

    def _add(self, executable: Executable) -> Executable:
        if not self._executables:
            self.graph_module = executable.graph_module
        self._executables.append(executable)
        return executable

    @property
    def _first(self) -> Executable:
        if not self._executables:
            raise InputError("the model has not seen an input yet", stage="compile",
                             remedy="Call it once, or pass example_inputs to fxcompress.compile.")  # fmt: skip
        return self._executables[0]

    @property
    def interface(self) -> Interface:
        """Names, shapes and dtypes of inputs and outputs (of the first shape compiled for)."""
        return self._first.interface

    def specialize(self, *args, **kwargs) -> CompiledModule:
        """Compile for the shapes of this call (done by the first call otherwise). Returns self."""
        self._select(args, kwargs)
        return self

    def _select(self, args: tuple, kwargs: dict) -> tuple[Executable, tuple[Tensor, ...]]:
        """The executable for the shapes of a call, and the call's flat inputs."""
        other_size = None
        for executable in self._executables:
            try:  # anything wrong but the size is raised
                return executable, executable.interface.flatten(args, kwargs)
            except TailShapeError as error:
                other_size = other_size or error
        if self._compiler is None:
            raise other_size
        choices = self._executables[0].choices if self._executables else None
        added = self._add(self._compiler.build(args, kwargs, choices))
        return added, added.interface.flatten(args, kwargs)

    def forward(self, *args, **kwargs):
        """The integer network's outputs, in the structure and dtype of the model's. Raises ``InputError`` for inputs it was not compiled for."""
        executable, inputs = self._select(args, kwargs)
        return executable(inputs)

    def report(self) -> Report:
        """What was done, what it costs, what was proven. ``print(report)`` is a table, ``.to_dict()`` the data."""
        return self._first.report

    def verify_integer_only(self) -> Certificate:
        """Prove again that nothing between input and output is floating point, and that no accumulator overflows.

        Raises ``VerificationError`` naming the node, or ``AccumulatorError``.
        """
        return self._first.verify()

    def save(self, path: str | Path) -> None:
        """Write the network to one file (safetensors, data only). ``fxcompress.load`` reads it back."""
        data = self._first.save()
        try:
            Path(path).write_bytes(data)
        except (OSError, TypeError) as error:
            reason = getattr(error, "strerror", None) or f"it is a {type(path).__name__}"
            raise ArtifactError(f"cannot write {path}: {reason}", stage="save", expected="a file name in an existing folder",
                                remedy="Check the path.") from error  # fmt: skip

    def export_c(
        self, directory: str | Path, *, name: str = "model", batch: int = 1, channels_last: bool = False,
        common_scale: bool = True, samples: Tensor | Sequence | Mapping | None = None,
    ) -> CSource:  # fmt: skip
        """Write the network as portable C99 source: no heap, no floating point, no library beyond memcpy and memset.

        Args:
            directory: created; receives ``<name>.h``, ``<name>.c``, ``<name>_test.c`` and the kernels.
            name: prefix of files, symbols and macros.
            batch: samples per call.
            channels_last: images go in and out as (N, H, W, C), as cameras give them; saves the memory of a copy.
            common_scale: int32 outputs with a scale per channel are brought to one scale (in integers), so that the largest integer
                belongs to the largest value. False: the accumulators as ``integer_io=True`` gives them.
            samples: one call's inputs, as the network takes them, a multiple of ``batch`` long; the test runs them and compares. None:
                random codes.

        Returns:
            A ``CSource``: the files, bytes of flash and RAM (also in ``report().resources["c_source"]``), and the exported graph.

        Raises:
            UnsupportedOperatorError: parts of the network are in float (``keep_float``); all of them are listed.

        >>> print(net.export_c("firmware/model", channels_last=True, samples=images[:4]))             # doctest: +SKIP
        """
        first = self._first
        options = CoreOptions(batch, channels_last, common_scale)
        core = integer_core(first.graph_module, first.input_scales, first.output_scales, options)
        recorded = None
        if samples is not None:
            recorded = core.codes(first.interface.flatten(*as_call(samples)))
        source = export_c(core, directory, name, recorded)
        first.report.resources["c_source"] = source.to_dict()
        return source

    def export_onnx(self, path: str | Path) -> None:
        """Write the network with its scales as ONNX (QuantizeLinear, DequantizeLinear), which onnxruntime and others run in integers.

        The weights are the same integers; other runtimes round between layers by rules of their own, so outputs agree closely, not bit
        for bit (docs/deployment.md). Inputs and outputs are float, the batch is free.

        Raises:
            BackendError: the packages of ``pip install "fxcompress[onnx]"`` are missing.
            ArtifactError: the model was loaded from a file, which holds integers only, or ``path`` cannot be written.

        >>> net.export_onnx("model.onnx")                                                               # doctest: +SKIP
        """
        first = self._first
        if first.qdq is None:
            raise ArtifactError("a saved model holds its integers only, not the graph that ONNX can say", stage="ONNX export",
                                remedy="Export where you compile: fxcompress.compile(...).export_onnx(path).")  # fmt: skip
        leaves = first.interface.tensor_inputs
        inputs = [torch.zeros((2,) * x.batched + x.tail, dtype=getattr(torch, x.dtype)) for x in leaves]
        export_onnx(first.qdq, inputs, [x.batched for x in leaves], [x.name for x in leaves], path)

    def train(self, mode: bool = True) -> CompiledModule:
        """Integers do not train: ``train()`` is ignored so that a surrounding model may switch modes."""
        return super().train(False)

    def extra_repr(self) -> str:
        if not self._executables:
            return f"compiles at the first call, target={self._compiler.options.target}"
        r = self.report()
        inputs = ", ".join(f"{leaf.name}: {leaf.shape_text}" for leaf in self._first.interface.tensor_inputs)
        return (f"target={r.target}, backend={r.backend}, {inputs}, {len(r.products)} multiplying layers, "
                f"{r.macs:,} MACs, {r.integer_bytes:,} bytes")  # fmt: skip

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def __deepcopy__(self, memo) -> CompiledModule:
        return _restore(*self.__reduce__()[1])

    def __reduce__(self):
        saved = [e.save() for e in self._executables]
        return _restore, (saved, [e.choices for e in self._executables], self._compiler)


def _restore(saved: list[bytes], choices: list, compiler) -> CompiledModule:
    module = CompiledModule(compiler)
    for data, chosen in zip(saved, choices, strict=True):
        executable = Executable.load(*artifact.loads(data), backend=None)
        executable.choices = chosen
        module._add(executable)
    return module


@exact
def load(path: str | Path, *, backend: str | None = None) -> CompiledModule:
    """Read a model saved by ``CompiledModule.save``. No code in the file is executed.

    ``backend``: run it on another backend than it was compiled for. Raises ``ArtifactError`` for a damaged or foreign file.

    >>> model = fxcompress.load("resnet20.fxc")                                     # doctest: +SKIP
    """
    document, tensors = artifact.read(path)
    return CompiledModule(executable=Executable.load(document, tensors, backend))
