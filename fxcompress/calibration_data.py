"""What calibration data may be, told apart and checked before anything is run.

check_calibration(data, model)      another kind of object, nothing at all, NaN, no tensors       CalibrationError
example_of(batch, model)            the model's inputs in a batch, without a label
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath

import torch
import torch.utils.data
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from .errors import CalibrationError, InputError

FORMS = (
    "a tensor, an iterable of inputs, of (input, label) pairs or of keyword dicts, or a function that takes the model"
)


def check_calibration(data: object, model: nn.Module | ExportedProgram) -> None:
    """Raise ``CalibrationError`` for what can be seen before the data are run: another kind of object, and in lists and
    tensors, whose batches may be looked at twice, nothing at all, no tensor, empty or meta tensors, NaN and Inf.
    """
    if data is None:
        return
    if callable(data) and not isinstance(data, Iterable):
        _check_callable(data)
        return
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise another_kind(data)
    if isinstance(data, Tensor | Mapping):
        data = [data]
    if isinstance(data, list | tuple):
        if not data or (isinstance(data[0], Tensor) and len(data) == 1 and not data[0].numel()):
            raise empty()
        for number, batch in enumerate(data):
            _check_batch(example_of(batch, model), f"calibration batch {number}")


def _check_batch(call: tuple | dict, which: str) -> None:
    leaves = pytree.tree_leaves_with_path(call)
    tensors = [leaf for _, leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        kinds = ", ".join(type(leaf).__name__ for _, leaf in leaves) or "nothing"
        remedy = (
            "torch.from_numpy(array) makes a tensor of an array."
            if "ndarray" in kinds
            else "Load and preprocess it first."
        )
        raise CalibrationError(
            f"{which} holds no tensor: {kinds}", stage="calibration", expected="the model's inputs", remedy=remedy
        )
    for tensor in tensors:
        if tensor.is_meta or not tensor.numel():
            raise CalibrationError(f"{which} holds no values", stage="calibration", remedy="Drop empty batches.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise CalibrationError(f"{which} has {count} NaN or Inf of {tensor.numel()} values", stage="calibration",
                                   remedy="Check the preprocessing of the calibration data.")  # fmt: skip


def _check_callable(function: Callable) -> None:
    if isinstance(function, type | nn.Module):
        raise another_kind(function)
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise CalibrationError("calibration_data is a function that does not take one argument", stage="calibration",
                               expected="a function of the model", remedy="For example: lambda model: model(x).") from None  # fmt: skip
    except ValueError:  # a builtin without a signature
        return


def another_kind(data: object) -> CalibrationError:
    if isinstance(data, torch.utils.data.Dataset):
        remedy = "Batch the data set: torch.utils.data.DataLoader(dataset, batch_size=32)."
    elif isinstance(data, str | bytes | PurePath):
        remedy = "Load and preprocess the files first."
    else:
        remedy = "About 100 typical inputs are usual."
    kind = f"the class {data.__name__}" if isinstance(data, type) else type(data).__name__
    return CalibrationError(f"calibration_data is {kind}", stage="calibration", expected=FORMS, remedy=remedy)


def empty() -> CalibrationError:
    return CalibrationError("calibration_data is empty", stage="calibration", expected="at least one example",
                            remedy="100 to 500 examples are usual; a generator must not be used up before.")  # fmt: skip


@contextlib.contextmanager
def blame_calibration(when: bool) -> Iterator[None]:
    """When the first calibration batch serves as example, an ``InputError`` about it is a ``CalibrationError``."""
    try:
        yield
    except InputError as error:
        if not when:
            raise
        raise CalibrationError(f"the first batch of calibration_data, taken as example: {error.found}", stage="calibration",
                               where=error.where, expected=error.expected, remedy=error.remedy) from error  # fmt: skip


def example_of(batch: object, model: nn.Module | ExportedProgram) -> tuple | dict:
    """The model's inputs in a batch: all of it if the parameters take it, else without its last element (a label)."""
    names, required = _parameters(model)
    if isinstance(batch, Mapping):
        return dict(batch) if names is None or set(batch) <= names else (batch,)
    if not isinstance(batch, tuple | list):
        return (batch,)
    if names is None or not batch:
        return tuple(batch)
    nested = batch[0]
    if len(batch) == 2 and isinstance(nested, Mapping) and set(nested) <= names:
        return dict(nested)
    if len(batch) == 2 and isinstance(nested, tuple | list) and len(nested) == required > 1:
        return tuple(nested)
    return tuple(batch[:-1] if len(batch) > max(required, 1) else batch)


def _parameters(model: nn.Module | ExportedProgram) -> tuple[set[str] | None, int]:
    """Names of the model's parameters, None when it takes anything, and how many inputs it cannot do without."""
    module = model.module() if isinstance(model, ExportedProgram) else model
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None, 0
    required = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    return {p.name for p in parameters}, required
