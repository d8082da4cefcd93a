"""``Executable``: one integer graph, lowered by a backend, with what maps a call to its tensors and back; saved and loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, fx

from . import artifact, numerics, shapes
from .backends import get_backend
from .backends.reference import ReferenceProgram
from .errors import ArtifactError
from .graph import output_node, placeholders
from .interface import Interface
from .options import Choices
from .report import Report
from .step_times import with_times
from .verify import Certificate, prove, verify


class QuantizedTensor(NamedTuple):
    """An integer output: ``real = scale * (values - zero_point)``; scale float64 and zero_point int32 broadcast to values."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantize(self) -> Tensor:
        """``scale * (values - zero_point)`` in float32."""
        return numerics.dequantize(self.values, self.scale, self.zero_point)


@dataclass
class Executable:
    """One compiled input shape: the verified integer graph and what is needed to call it.

    Attributes:
        graph_module: integer level, verified.
        interface: maps calls to flat tensors and back.
        report: how it came about.
        input_scales: per graph input (scale, zero_point, qmin, qmax), only with integer_io.
        output_scales: per graph output (scale, zero_point), None for a float output.
        choices: what a further input shape reuses.
        qdq: the graph between float and integers, for ``export_onnx``; None in a loaded model.
    """

    graph_module: fx.GraphModule
    interface: Interface
    report: Report
    backend: str
    input_scales: list
    output_scales: list
    choices: Choices | None = None
    qdq: fx.GraphModule | None = None

    def __post_init__(self):
        if self.report.certificate is None:  # cut short by max_rewrites: only eager execution runs such a graph
            self.program = ReferenceProgram(self.graph_module)
        else:
            self.program = get_backend(self.backend).lower(self.graph_module)
        self.report = replace(self.report, backend=self.backend, resources=self.program.resources())

    def __call__(self, inputs: tuple[Tensor, ...]):
        """The model's result for the flat inputs of a call (``interface.flatten``)."""
        if self.input_scales:
            inputs = [x if q is None or x.dtype == torch.uint8 else numerics.quantize(x, *q)
                      for x, q in zip(inputs, self.input_scales, strict=True)]  # fmt: skip
        outputs = self.program.run(*inputs)
        if any(s is not None for s in self.output_scales):
            outputs = tuple(
                y if s is None else QuantizedTensor(y, *s) for y, s in zip(outputs, self.output_scales, strict=True)
            )
        return self.interface.unflatten(outputs)

    def verify(self) -> Certificate:
        """Prove it again, on zeros (``verify.verify``)."""
        return verify(self.graph_module, self._zeros())

    def time_steps(self) -> None:
        """Measure one sample and put the times into the report. Codes are as fast as any others: zeros will do."""
        batch = self._zeros()
        sample = [x[:1] if leaf.batched else x for x, leaf in zip(batch, self.interface.tensor_inputs, strict=True)]
        self.report = with_times(self.report, self.graph_module, self.program.time_steps(*sample))

    def _zeros(self) -> list[Tensor]:
        return _examples(self.graph_module, self.interface, self.input_scales)

    def save(self) -> bytes:
        nodes, tensors = artifact.encode_graph(self.graph_module)
        document = {
            "nodes": nodes,
            "interface": self.interface.to_dict(),
            "report": self.report.to_dict(),
            "backend": self.backend,
            "input_scales": [_store(tensors, f"input.{i}", q) for i, q in enumerate(self.input_scales)],
            "output_scales": [_store(tensors, f"output.{i}", s) for i, s in enumerate(self.output_scales)],
        }
        return artifact.dumps(document, tensors)

    @classmethod
    def load(cls, document: dict, tensors: dict[str, Tensor], backend: str | None) -> Executable:
        try:
            scales = {key: [_fetch(tensors, s) for s in document[key]] for key in ("input_scales", "output_scales")}
            interface = Interface.from_dict(document["interface"])
            report = Report.from_dict(document["report"])
            constants = {k: v for k, v in tensors.items() if not k.startswith(("input.", "output."))}
            gm = artifact.decode_graph(document["nodes"], constants)
            examples = _examples(gm, interface, scales["input_scales"], torch.empty)
            if report.certificate is None:  # cut short by max_rewrites: it proves nothing, and PyTorch runs it
                shapes.trace_shapes(gm, examples)
            else:
                prove(gm, examples)
            _check_scales(gm, interface, scales)
            backend = backend or document["backend"]
        except ArtifactError:
            raise
        except Exception as error:  # of data that anybody may have written: whatever it is, the file is at fault
            raise ArtifactError(
                f"the document is malformed ({_short(error)})", stage="load", remedy="Save the model again."
            ) from error
        return cls(gm, interface, report, backend, **scales)


def _short(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_scales(gm: fx.GraphModule, interface: Interface, scales: dict[str, list]) -> None:
    """Raise ``ValueError`` unless there is a scale record, or None, for every input (or no input) and every output."""
    inputs, outputs = len(placeholders(gm)), len(output_node(gm).args[0])
    if len(scales["input_scales"]) not in (0, inputs) or len(scales["output_scales"]) != outputs:
        raise ValueError(
            f"{len(scales['input_scales'])} and {len(scales['output_scales'])} scales for {inputs} inputs and {outputs} outputs"
        )
    if any(isinstance(o, int) and o >= outputs for o in interface.outputs):
        raise ValueError(f"outputs {interface.outputs} of {outputs}")


def _store(tensors: dict[str, Tensor], name: str, entry: tuple | None) -> list | None:
    """Tensors of a scale record go beside the constants, under ``name``; integers stay in the document."""
    if entry is None:
        return None
    tensors[f"{name}.scale"], tensors[f"{name}.zero_point"] = entry[:2]
    return [name, *entry[2:]]


def _fetch(tensors: dict[str, Tensor], entry: list | None) -> tuple | None:
    if entry is None:
        return None
    name, *rest = entry
    return (tensors[f"{name}.scale"], tensors[f"{name}.zero_point"], *(int(r) for r in rest))


def _examples(gm: fx.GraphModule, interface: Interface, input_scales: list, make=torch.zeros) -> list[Tensor]:
    """An input of batch 2 for every placeholder, in the dtype the graph takes; ``make``: torch.zeros, or torch.empty for its shape alone."""
    result = []
    for i, leaf in enumerate(interface.tensor_inputs):
        codes = bool(input_scales) and input_scales[i] is not None
        dtype = torch.uint8 if codes else getattr(torch, leaf.dtype)
        result.append(make((2,) * leaf.batched + leaf.tail, dtype=dtype))
    if len(result) != len(placeholders(gm)):
        raise ArtifactError(
            f"{len(placeholders(gm))} graph inputs for {len(result)} arguments",
            stage="load",
            remedy="Save the model again.",
        )
    return result
