"""ONNX export of the qdq level: QuantizeLinear and DequantizeLinear around float operators, which other runtimes turn into integer
kernels of their own.

    export_onnx(qdq, example_inputs, names, "model.onnx")

torch's exporter does the work. Before it, the boundary between codes and reals is respelled as two operators that translate one to one
(``onnx_quantize``, ``onnx_dequantize``), and what the exporter does not know in ATen. What DequantizeLinear cannot say (weights with a scale per
input channel, ``spiq``) is a cast and a product.

The codes of narrower activations are cut off in front of QuantizeLinear, which saturates at 8 bits only.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx, library, nn
from torch.nn import functional as F

from fxcompress.dialects import ADAPTIVE_MAX_POOL
from fxcompress.errors import ArtifactError, BackendError, UnsupportedOperatorError
from fxcompress.float_ops import MASKED_SOFTMAX, masked_softmax
from fxcompress.graph import calls, constant
from fxcompress.reference_kernels import adaptive_max_pool

ops = torch.ops.fxcompress
OPSET = 21

_LIBRARY = library.Library("fxcompress", "FRAGMENT")
_LIBRARY.define("onnx_quantize(Tensor x, Tensor scale, Tensor zero_point, int axis) -> Tensor")
_LIBRARY.define("onnx_dequantize(Tensor q, Tensor scale, Tensor zero_point, int axis) -> Tensor")


def _along(parameter: Tensor, axis: int, rank: int) -> Tensor:
    return parameter.reshape([-1] + [1] * (rank - 1 - axis)) if parameter.ndim else parameter


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """saturate(round_half_even(x / scale) + zero_point); scale and zero_point () or (C,) along ``axis``."""
    limits = torch.iinfo(zero_point.dtype)
    codes = torch.round(x / _along(scale, axis, x.ndim)) + _along(zero_point, axis, x.ndim)
    return codes.clamp(limits.min, limits.max).to(zero_point.dtype)


def _dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """(q - zero_point) * scale."""
    distance = q.to(torch.int32) - _along(zero_point.to(torch.int32), axis, q.ndim)
    return distance * _along(scale, axis, q.ndim)


_LIBRARY.impl("onnx_quantize", _quantize, "CompositeExplicitAutograd")
_LIBRARY.impl("onnx_dequantize", _dequantize, "CompositeExplicitAutograd")
for _name, _dtype in (("onnx_quantize", None), ("onnx_dequantize", torch.float32)):
    library.register_fake(
        f"fxcompress::{_name}", lambda x, s, z, axis, dtype=_dtype: torch.empty_like(x, dtype=dtype or z.dtype), lib=_LIBRARY
    )  # fmt: skip


def _translations() -> dict[Callable, Callable]:
    """Our operator -> function that builds the ONNX node."""
    from onnxscript import opset21 as opset

    def quantize(x, scale, zero_point, axis: int):
        return opset.QuantizeLinear(x, scale, zero_point, axis=axis)

    def dequantize(q, scale, zero_point, axis: int):
        return opset.DequantizeLinear(q, scale, zero_point, axis=axis)

    return {ops.onnx_quantize.default: quantize, ops.onnx_dequantize.default: dequantize}


# ------------------------------------------------------------------------------------------------------ respelling


def _pad(x: Tensor, pad: list[int], value: Tensor) -> Tensor:
    """``fxcompress::pad`` lists its dimensions first to last, torch last to first."""
    value = value.reshape([-1] + [1] * (x.ndim - 2)) if value.ndim else value
    sides = [side for i in range(len(pad) - 2, -1, -2) for side in pad[i : i + 2]]
    return F.pad(x - value, sides) + value


_SPELLINGS = {ops.pad.default: _pad, ADAPTIVE_MAX_POOL: adaptive_max_pool, MASKED_SOFTMAX: masked_softmax}


class QdqModule(nn.Module):
    """A qdq graph as a module that torch's exporter translates.

    >>> torch.allclose(QdqModule(gm)(x)[0], gm(x)[0])                                          # doctest: +SKIP
    """

    def __init__(self, gm: fx.GraphModule):
        super().__init__()
        self.graph_module = gm
        for node in calls(gm, ops.quantize.default, ops.dequantize.default):
            scale, zero_point = (constant(gm, a) for a in node.args[1:3])
            # per channel or per tensor, () or one varying dimension; anything else is not ONNX's to say
            vector = (
                scale.reshape(-1)
                if sum(n > 1 for n in scale.shape) == 1
                else scale.reshape(())
                if scale.numel() == 1
                else scale
            )
            zeros = zero_point.expand_as(scale).reshape(vector.shape)
            self.register_buffer(f"{node.name}_scale", vector.float())
            self.register_buffer(f"{node.name}_zero_point", zeros.to(_code_dtype(gm, node)))
            if node.target is ops.quantize.default and tuple(node.args[3:5]) != (0, 255):
                for i, limit in enumerate(node.args[3:5]):
                    self.register_buffer(f"{node.name}_limit{i}", (scale * (limit - zero_point)).float())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _Spelled(self).run(*inputs)


def _code_dtype(gm: fx.GraphModule, node: fx.Node) -> torch.dtype:
    if node.target is ops.quantize.default:
        return torch.uint8 if node.args[3] >= 0 else torch.int8
    source = node.args[0]
    return constant(gm, source).dtype if source.op == "get_attr" else torch.uint8 if source.args[3] >= 0 else torch.int8


class _Spelled(fx.Interpreter):
    def __init__(self, module: QdqModule):
        super().__init__(module.graph_module)
        self.owner = module

    def run_node(self, node: fx.Node):
        if node.op != "call_function":
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.target in _SPELLINGS:
            return _SPELLINGS[node.target](*args, **kwargs)
        if node.target in (ops.quantize.default, ops.dequantize.default):
            return self._boundary(node, *args)
        return super().run_node(node)

    def _boundary(self, node: fx.Node, x: Tensor, given_scale: Tensor, *_) -> Tensor:
        scale, zero_point = (getattr(self.owner, f"{node.name}_{what}") for what in ("scale", "zero_point"))
        varying = [d for d, n in enumerate(given_scale.shape) if n > 1]
        axis = varying[0] + x.ndim - given_scale.ndim if varying else 1
        if node.target is ops.quantize.default:
            if hasattr(self.owner, f"{node.name}_limit0"):
                x = x.clamp(*(getattr(self.owner, f"{node.name}_limit{i}") for i in (0, 1)))
            return ops.onnx_quantize.default(x, scale, zero_point, axis)
        if len(varying) > 1:
            return (x.float() - zero_point.float()) * scale
        return ops.onnx_dequantize.default(x, scale, zero_point, axis)


# ------------------------------------------------------------------------------------------------------- exporting


def check_packages() -> None:
    """Raises ``BackendError`` where the packages that write ONNX are missing."""
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
    except ImportError as error:
        raise BackendError(f"the package {error.name} is not installed", stage="ONNX export",
                           remedy='Install what the export needs: pip install "fxcompress[onnx]".') from error  # fmt: skip


def export_onnx(
    qdq: fx.GraphModule, inputs: Sequence[Tensor], batched: Sequence[bool], names: Sequence[str], path: str | Path
) -> None:
    """Write a qdq graph as an ONNX model, its batch dynamic.

    Args:
        inputs: an example of each graph input, its batch at least 2.
        batched: which of them have a batch in dimension 0.
        names: of the inputs; outputs are output0, output1, ...

    Raises:
        BackendError: onnx or onnxscript are not installed. UnsupportedOperatorError: torch's exporter has no translation for an
        operator. ArtifactError: the file cannot be written.
    """
    check_packages()
    if not (folder := Path(path).absolute().parent).is_dir():
        raise _unwritable(path, f"No such file or directory: {folder}")
    batch = torch.export.Dim("batch", min=1)
    outputs = next(n for n in reversed(qdq.graph.nodes) if n.op == "output").args[0]
    with _quiet():
        try:
            program = torch.onnx.export(
                QdqModule(qdq).eval(), tuple(inputs), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=[re.sub(r"\W+", "_", name).strip("_") for name in names],
                output_names=[f"output{i}" for i in range(len(outputs))],
                dynamic_shapes={"inputs": tuple({0: batch} if b else None for b in batched)},
                custom_translation_table=_translations(),
            )  # fmt: skip
        except Exception as error:
            raise UnsupportedOperatorError(f"torch.onnx.export failed: {_first_line(error)}", stage="ONNX export",
                                           remedy="Its cause is chained; CompiledModule.export_c and .save take every network.") from error  # fmt: skip
    try:
        program.save(Path(path))
    except OSError as error:
        raise _unwritable(path, error.strerror) from error


def _unwritable(path: str | Path, reason: str) -> ArtifactError:
    return ArtifactError(f"cannot write {path}: {reason}", stage="ONNX export", expected="a file name in an existing folder",
                         remedy="Check the path.")  # fmt: skip


def _first_line(error: BaseException) -> str:
    """Of the innermost cause: the exporter wraps it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns about versions."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
