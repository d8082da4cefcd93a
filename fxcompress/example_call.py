"""The example call, prepared for tracing: batch of 2 or more, float32, on the CPU, every leaf named.

Which leaves are batched is decided here once: those whose dimension 0 has the length of the first tensor's dimension 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from .errors import InputError
from .interface import InputLeaf, call_leaves, is_plain_constant
from .options import CompileOptions, declared_ranges, parse_range

INSIDE = 0.1  # share of an example that must lie in the declared input_range: less, and one of the two is wrong


@dataclass(frozen=True)
class ExampleCall:
    """A call of the model with copies of the user's tensors.

    Attributes:
        args, kwargs: the call.
        parameters: names of the model's positional parameters.
        leaves: one record per leaf of the call, in the order a trace sees them.
        tensors: the tensor leaves, in the same order.
    """

    args: tuple
    kwargs: dict
    parameters: tuple[str, ...]
    leaves: tuple[InputLeaf, ...]
    tensors: tuple[Tensor, ...]

    @property
    def tensor_leaves(self) -> list[InputLeaf]:
        return [leaf for leaf in self.leaves if leaf.is_tensor]

    def dynamic_shapes(self) -> ShapesCollection:
        """One symbolic batch, at least 1, shared by the batched leaves."""
        batch = Dim("batch", min=1)
        collection = ShapesCollection()
        for leaf, tensor in zip(self.tensor_leaves, self.tensors, strict=True):
            if leaf.batched:
                collection[tensor] = {0: batch}
        return collection


def example_call(parameters: tuple[str, ...], args: tuple, kwargs: dict) -> ExampleCall:
    """Prepare an example call of a model whose positional parameters are called ``parameters``.

    Raises ``InputError`` when it holds no tensor with a batch, an empty batch, a tensor without finite values, or an
    object that is no plain constant.
    """
    first = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
    if first is None or first.ndim == 0:
        leaves = pytree.tree_leaves((args, kwargs))
        kinds = ", ".join("Tensor of no dimensions" if isinstance(x, Tensor) else type(x).__name__ for x in leaves)
        raise InputError(f"the example call holds no tensor with a batch dimension: {kinds or 'nothing'}", stage="capture",
                         remedy=_CONVERSIONS.get(kinds, "Pass at least one tensor whose dimension 0 is the batch."))  # fmt: skip
    if first.shape[0] == 0:
        raise InputError("the example batch is empty", stage="capture", expected="at least one sample",
                         remedy="Pass one batch of typical inputs.")  # fmt: skip
    for name, leaf in call_leaves(parameters, args, kwargs):
        if isinstance(leaf, Tensor):
            _check_tensor(name, leaf)
    # The exporter orders keyword arguments as the signature does.
    known = [name for name in parameters if name in kwargs]
    kwargs = {name: kwargs[name] for name in (*known, *(k for k in kwargs if k not in known))}
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: _prepared(t, first.shape[0]), (tuple(args), kwargs))
    named = call_leaves(parameters, args, kwargs)
    leaves = tuple(_leaf(name, leaf, max(first.shape[0], 2)) for name, leaf in named)
    return ExampleCall(args, kwargs, parameters, leaves, tuple(leaf for _, leaf in named if isinstance(leaf, Tensor)))


#: What else people pass as an example -> how to make a tensor of it.
_CONVERSIONS = {
    "ndarray": "Make a tensor of it: torch.from_numpy(array).",
    "generator": "Pass one batch, next(iter(...)), or all of it as calibration_data.",
    "DataLoader": "Pass one batch, next(iter(loader)), or the loader as calibration_data.",
}


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse what cannot be traced or would spoil every later check on the example."""
    where = f"argument {name}"
    if tensor.is_meta:
        raise InputError("the example is on the meta device: it has no values", stage="capture", where=where,
                         remedy="Pass a tensor with typical values.")  # fmt: skip
    if tensor.layout is not torch.strided or tensor.is_quantized:
        found = tensor.dtype if tensor.is_quantized else tensor.layout
        raise InputError(f"the example is {str(found).removeprefix('torch.')}", stage="capture", where=where,
                         expected="a dense tensor of plain numbers", remedy="Pass x.to_dense() or x.dequantize().")  # fmt: skip
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"the example has {count} NaN or Inf of {tensor.numel()} values", stage="capture", where=where,
                         remedy="Every pass is checked on the example: pass typical inputs.")  # fmt: skip


def check_ranges(example: ExampleCall, options: CompileOptions, calibrated: bool) -> None:
    """Raise ``InputError`` when the range of a float input cannot be told, or the declared one is not that of the example."""
    floats = [(leaf, t) for leaf, t in zip(example.tensor_leaves, example.tensors) if t.is_floating_point()]
    for (leaf, tensor), declared in zip(floats, declared_ranges(options.input_range, len(floats)), strict=True):
        if tensor.numel() == 0:
            continue
        lo, hi = (float(v) for v in tensor.aminmax())
        if declared is None and lo == hi and not calibrated:
            raise InputError(f"the range cannot be guessed from an example of which every value is {lo:g}", stage="capture",
                             where=f"argument {leaf.name}",
                             remedy="Pass input_range=(lo, hi), calibration_data, or example_inputs with typical values.")  # fmt: skip
        if declared is None:
            continue
        low, high = (float(f(bound)) for f, bound in zip((torch.min, torch.max), parse_range(declared)))
        inside = float(((tensor >= low) & (tensor <= high)).float().mean())
        if inside < INSIDE:
            raise InputError(f"{inside:.0%} of the example's values lie in input_range ({low:g}, {high:g}), they span ({lo:g}, {hi:g})",
                             stage="capture", where=f"argument {leaf.name}",
                             remedy="Correct input_range, or preprocess the example like the model's inputs.")  # fmt: skip


def positional_parameters(forward: Callable) -> tuple[str, ...]:
    """Names of the parameters that may be passed by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds)


def _prepared(tensor: Tensor, batch: int) -> Tensor:
    """A copy (a tensor passed twice is two inputs), in float32, a batch of 1 doubled."""
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return torch.cat([tensor, tensor]) if batch == 1 and tensor.ndim and tensor.shape[0] == 1 else tensor.clone()


def _leaf(name: str, leaf: object, batch: int) -> InputLeaf:
    if isinstance(leaf, Tensor) and not leaf.is_complex():
        batched = leaf.ndim > 0 and leaf.shape[0] == batch
        return InputLeaf(name, tuple(leaf.shape[batched:]), str(leaf.dtype).removeprefix("torch."), batched)
    if not is_plain_constant(leaf):
        kind = "complex tensor" if isinstance(leaf, Tensor) else type(leaf).__name__
        raise InputError(f"argument {name} is a {kind}", stage="capture",
                         expected="a real tensor, number, string, bool or None",
                         remedy="Wrap the model in a module that takes tensors and builds the object itself.")  # fmt: skip
    return InputLeaf(name, value=leaf)
