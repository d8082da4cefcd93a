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

    Raises ``InputError`` when it holds no tensor with a batch, an empty batch, or an object that is no plain constant.
    """
    first = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
    if first is None or first.ndim == 0:
        raise InputError("the example call holds no tensor with a batch dimension", stage="capture",
                         remedy="Pass at least one tensor whose dimension 0 is the batch.")  # fmt: skip
    if first.shape[0] == 0:
        raise InputError("the example batch is empty", stage="capture", expected="at least one sample")
    # The exporter orders keyword arguments as the signature does.
    known = [name for name in parameters if name in kwargs]
    kwargs = {name: kwargs[name] for name in (*known, *(k for k in kwargs if k not in known))}
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: _prepared(t, first.shape[0]), (tuple(args), kwargs))
    named = call_leaves(parameters, args, kwargs)
    leaves = tuple(_leaf(name, leaf, max(first.shape[0], 2)) for name, leaf in named)
    return ExampleCall(args, kwargs, parameters, leaves, tuple(leaf for _, leaf in named if isinstance(leaf, Tensor)))


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
