"""What may be given as the model: a plain float ``nn.Module``, ``GraphModule`` or ``ExportedProgram``, with real weights.

check_kind(model)       no wrapper, no scripted, compiled or quantized module, no file name, ...     ModelError
check_tensors(model)    every parameter and buffer is there: initialized, dense, not on "meta"       ModelError
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from .errors import ModelError

_QUANTIZED = ("holds weights that are quantized already", "Pass the float model it was made from.")
#: Where a class comes from -> what such a module is, and what to pass instead.
_NOT_PLAIN = {
    "torch.nn.parallel": ("is a wrapper for training on several devices", "Pass the module inside: model.module."),
    "torch.distributed": ("is a wrapper for training on several devices", "Pass the module inside: model.module."),
    "torch._dynamo": ("comes from torch.compile", "Pass the module inside: model._orig_mod."),
    "torch.jit": ("is TorchScript", "Pass the Python module it was made from."),
    "fxcompress.compiled": ("is compiled by fxcompress already", "Pass the float model it was made from."),
    "torch.ao.nn.quantized": _QUANTIZED,
    "torch.ao.nn.intrinsic.quantized": _QUANTIZED,
    "torch.ao.nn.sparse.quantized": _QUANTIZED,
}


def check_kind(model: object) -> None:
    """Raise ``ModelError`` unless ``model`` is a module that can be captured, and so is every module in it."""
    if isinstance(model, ExportedProgram):
        return
    if not isinstance(model, nn.Module):
        raise model_error(
            "", f"the model is {_described(model)}", _remedy(model), "an nn.Module, GraphModule or ExportedProgram"
        )
    if isinstance(model, fx.GraphModule) and any(not hook.__module__.startswith("torch.") for hook in _hooks(model)):
        raise model_error("", "a GraphModule has forward hooks, which its graph does not show",
                          "Write them into the graph, or pass the module it was traced from.")  # fmt: skip
    for path, module in model.named_modules():
        for origin, (found, remedy) in _NOT_PLAIN.items():
            if any(base.__module__.startswith(origin) for base in type(module).__mro__):
                raise model_error(path, f"{type(module).__name__} {found}", remedy)


def _hooks(model: nn.Module) -> Iterator[Callable]:
    """Forward hooks; torch.export puts one of its own on the modules it makes."""
    yield from model._forward_pre_hooks.values()
    yield from model._forward_hooks.values()


def _described(model: object) -> str:
    if isinstance(model, type):
        return f"the class {model.__name__}"
    if isinstance(model, str | PurePath):
        return repr(str(model))
    if isinstance(model, Mapping):
        return "a state_dict"
    return "None" if model is None else f"a {type(model).__name__}"


def _remedy(model: object) -> str:
    if isinstance(model, type):
        return f"Make an instance: {model.__name__}()."
    if isinstance(model, Mapping):
        return "Build the module, then load the weights into it: model.load_state_dict(state_dict)."
    if isinstance(model, str | PurePath):
        return "Load the file first; a network that fxcompress saved is read by fxcompress.load."
    if callable(model):
        return "Call the function in the forward of an nn.Module."
    return "Pass the trained model itself."


def check_tensors(model: nn.Module) -> None:
    """Raise ``ModelError`` for a parameter or buffer that is lazy, sparse, quantized, complex or without values.

    Parameters must be floating point: half, bfloat16 and float64 are taken as float32. Buffers may be integers.
    """
    for kind, name, tensor in _tensors(model):
        where, _, leaf = name.rpartition(".")
        if is_lazy(tensor):
            raise model_error(where, f"{kind} {leaf} is not initialized", "Run the model once: model(example).")
        if tensor.is_meta:
            count, total = sum(t.is_meta for _, _, t in _tensors(model)), sum(1 for _ in _tensors(model))
            raise model_error(
                where, f"{kind} {leaf} is on the meta device ({count} of {total} tensors are): it has no values",
                'Give it memory and values: model.to_empty(device="cpu"), then model.load_state_dict(...).',
            )  # fmt: skip
        if tensor.is_quantized:
            raise model_error(where, f"{kind} {leaf} is quantized ({_short(tensor.dtype)})", _QUANTIZED[1])
        if str(tensor.layout) != "torch.strided":
            raise model_error(
                where, f"{kind} {leaf} has the layout {_short(tensor.layout)}", "Store it dense: tensor.to_dense()."
            )
        if tensor.is_complex() or (kind == "parameter" and not tensor.is_floating_point()):
            raise model_error(where, f"{kind} {leaf} has dtype {_short(tensor.dtype)}",
                              "Complex networks cannot be compiled: compute with real and imaginary parts." if tensor.is_complex()
                              else "Pass the float model; integer tables belong into buffers.",
                              "a floating-point dtype")  # fmt: skip


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    yield from (("parameter", name, tensor) for name, tensor in model.named_parameters())
    yield from (("buffer", name, tensor) for name, tensor in model.named_buffers())


def _short(kind: object) -> str:
    return str(kind).removeprefix("torch.")


def model_error(path: str, found: str, remedy: str, expected: str = "") -> ModelError:
    return ModelError(found, stage="model check", where=path, expected=expected, remedy=remedy)
