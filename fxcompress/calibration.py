"""The user's calibration data, in any of their usual forms, as one function that runs a module on them.

calibrate = make_calibration(loader, captured.interface)
histograms = observe(gm, nodes, calibrate)
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath

import torch
import torch.utils.data
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from .errors import CalibrationError, FxcompressError, InputError
from .interface import Interface, TailShapeError

CHUNK = 32  # examples per forward pass when the data are one big tensor
EXAMPLES = 4  # taken from the first batch as example call

_FORMS = (
    "a tensor, an iterable of inputs, of (input, label) pairs or of keyword dicts, or a function that takes the model"
)


def make_calibration(
    calibration_data: object, interface: Interface, *, raw: bool = False
) -> Callable[[nn.Module], None]:
    """A function that runs a module, which takes the *flat* inputs of ``interface``, on the calibration data.

    Args:
        calibration_data: one of

            * a tensor: a set of examples for a one-input model, run in chunks of 32;
            * an iterable (list, ``DataLoader``, generator) of batches: a tensor, a tuple of the model's inputs, an
              (inputs, label) tuple, or a dict of keyword arguments. What is a label is told from the model's inputs;
            * a callable: it gets a module that takes the same call as the user's model, and runs it on what it likes.

        interface: how the user's call maps to flat tensors.
        raw: the network takes raw pixels (``input_normalization``), so uint8 images are inputs; otherwise they are a
            forgotten preprocessing and refused.

    An iterator is read once and its batches are kept, so that several passes can calibrate. Nothing is read before the
    first use. The function raises ``CalibrationError`` for no data, for batches that are not the model's inputs and for
    a batch the model fails on.

    >>> make_calibration(torch.rand(100, 3, 32, 32), interface)(recorder)                     # doctest: +SKIP
    """
    if callable(calibration_data) and not isinstance(calibration_data, Iterable):
        return lambda module: _run_callable(calibration_data, module, interface)
    batches = _batches(calibration_data, interface)
    return lambda module: _run_batches(batches, module, interface, raw)


def _batches(data: object, interface: Interface) -> Iterable:
    if isinstance(data, Tensor):
        if data.ndim and data.shape[0] == 0:
            raise _empty()
        inputs = interface.tensor_inputs
        if len(inputs) != 1:
            names = ", ".join(leaf.name for leaf in inputs)
            raise CalibrationError(f"calibration_data is one tensor, the model has the inputs {names}", stage="calibration",
                                   remedy=f"Pass a list of batches: [({names}), ...].")  # fmt: skip
        return data.split(CHUNK) if inputs[0].batched else [data]
    if isinstance(data, Mapping):
        return [data]
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise _another_kind(data)
    if isinstance(data, list | tuple) and not data:
        raise _empty()
    return _Kept(data) if isinstance(data, Iterator) else data


class _Kept:
    """An iterator that can be read again: batches are kept as they come."""

    def __init__(self, source: Iterator):
        self.source, self.kept = source, []

    def __iter__(self) -> Iterator:
        yield from self.kept
        for batch in self.source:
            self.kept.append(batch)
            yield batch


def _run_batches(batches: Iterable, module: nn.Module, interface: Interface, raw: bool) -> None:
    count = 0
    with torch.no_grad():
        for batch in batches:
            _run(module, batch_inputs(batch, interface, count, raw), f"batch {count}")
            count += 1
    if count == 0:
        raise _empty()


def batch_inputs(batch: object, interface: Interface, number: int = 0, raw: bool = False) -> tuple[Tensor, ...]:
    """The flat inputs in a batch: the first reading of it that the model's interface accepts.

    A tuple is read as the model's inputs, else as inputs followed by one label, whose inputs may be nested.
    """
    mistake = None
    for args, kwargs in _readings(batch):
        try:
            inputs = interface.flatten(args, kwargs)
        except InputError as error:
            mistake = error if mistake is None or isinstance(error, TailShapeError) else mistake
        else:
            if raw:
                inputs = tuple(x.float() if x.dtype == torch.uint8 else x for x in inputs)
            _check_values(inputs, interface, number)
            return inputs
    found = mistake.found if mistake else f"it is {_described(batch)}"
    expected = ", ".join(f"{leaf.name} {leaf.shape_text} {leaf.dtype}" for leaf in interface.tensor_inputs)
    raise CalibrationError(f"calibration batch {number} ({_described(batch)}) does not fit the model: {found}", stage="calibration",
                           expected=expected, remedy=f"calibration_data may be {_FORMS}.") from mistake  # fmt: skip


def _check_values(inputs: tuple[Tensor, ...], interface: Interface, number: int) -> None:
    for leaf, tensor in zip(interface.tensor_inputs, inputs):
        if tensor.numel() == 0:
            raise CalibrationError(f"calibration batch {number} holds no values", stage="calibration", where=leaf.name,
                                   remedy="Drop empty batches.")  # fmt: skip
        if leaf.dtype == "float32" and not tensor.is_floating_point():  # the interface lets codes pass
            raise CalibrationError(f"calibration batch {number} has dtype uint8", stage="calibration", where=leaf.name,
                                   expected="float32", remedy="Preprocess it as for the model, or pass x.float().")  # fmt: skip


def _readings(batch: object) -> Iterator[tuple[tuple, dict]]:
    """(args, kwargs) that a batch may stand for, the most literal first."""
    if isinstance(batch, Mapping):
        yield (), dict(batch)
        yield (batch,), {}
    elif isinstance(batch, tuple | list):
        yield tuple(batch), {}
        yield (batch,), {}
        if len(batch) > 1:
            yield tuple(batch[:-1]), {}
        if len(batch) == 2 and isinstance(batch[0], Mapping | tuple | list):
            yield from _readings(batch[0])
    else:
        yield (batch,), {}


def _described(batch: object) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)}"
    leaves = [str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in pytree.tree_leaves(batch)]
    return f"a {type(batch).__name__} of " + ", ".join(leaves) if leaves else f"an empty {type(batch).__name__}"


def _run_callable(function: Callable, module: nn.Module, interface: Interface) -> None:
    calibrated = CalibratedModel(module, interface)
    with torch.no_grad():
        function(calibrated)
    if calibrated.calls == 0:
        raise CalibrationError("calibration_data is a function that never called the model it was given", stage="calibration",
                               remedy="Call its argument on example inputs: lambda model: model(x).")  # fmt: skip


class CalibratedModel(nn.Module):
    """Takes the user's call, runs the flat module and returns what the user's model would."""

    def __init__(self, module: nn.Module, interface: Interface):
        super().__init__()
        self.module, self.interface, self.calls = module, interface, 0
        self.eval()

    def forward(self, *args, **kwargs) -> object:
        self.calls += 1
        try:
            inputs = self.interface.flatten(args, kwargs)
        except InputError as error:
            raise CalibrationError(f"call {self.calls} of the model by calibration_data: {error.found}", stage="calibration",
                                   expected=error.expected, remedy=error.remedy) from error  # fmt: skip
        return self.interface.unflatten(_run(self.module, inputs, f"call {self.calls}"))


def _run(module: nn.Module, inputs: tuple[Tensor, ...], which: str) -> object:
    try:
        return module(*inputs)
    except FxcompressError:
        raise
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
        raise CalibrationError(f"the model failed on calibration {which} of shape {shapes}: {str(error).splitlines()[0]}",
                               stage="calibration", remedy="Check that the model runs on these inputs.") from error  # fmt: skip


def _empty() -> CalibrationError:
    return CalibrationError("calibration_data is empty", stage="calibration", expected="at least one example",
                            remedy="100 to 500 examples are usual; a generator must not be used up before.")  # fmt: skip


# ------------------------------------------------------------------------------ an example call from calibration data


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
        raise _another_kind(data)
    if isinstance(data, Tensor | Mapping):
        data = [data]
    if isinstance(data, list | tuple):
        if not data or (isinstance(data[0], Tensor) and len(data) == 1 and not data[0].numel()):
            raise _empty()
        for number, batch in enumerate(data):
            _check_batch(_example(batch, model), f"calibration batch {number}")


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
        raise _another_kind(function)
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise CalibrationError("calibration_data is a function that does not take one argument", stage="calibration",
                               expected="a function of the model", remedy="For example: lambda model: model(x).") from None  # fmt: skip
    except ValueError:  # a builtin without a signature
        return


def _another_kind(data: object) -> CalibrationError:
    if isinstance(data, torch.utils.data.Dataset):
        remedy = "Batch the data set: torch.utils.data.DataLoader(dataset, batch_size=32)."
    elif isinstance(data, str | bytes | PurePath):
        remedy = "Load and preprocess the files first."
    else:
        remedy = "About 100 typical inputs are usual."
    kind = f"the class {data.__name__}" if isinstance(data, type) else type(data).__name__
    return CalibrationError(f"calibration_data is {kind}", stage="calibration", expected=_FORMS, remedy=remedy)


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


def first_batch(calibration_data: object, model: nn.Module | ExportedProgram) -> tuple[tuple | dict | None, object]:
    """(example inputs, calibration data to use from now on): a few examples of the first batch serve as example call.

    None as example for a callable, whose batches nobody has seen yet. An iterator is wrapped so that the batch read here
    is not lost. Labels are told from inputs by the parameters of the model that have no default.
    """
    if callable(calibration_data) and not isinstance(calibration_data, Iterable):
        return None, calibration_data
    if isinstance(calibration_data, Tensor | Mapping):
        return few(_example(calibration_data, model)), calibration_data
    if not isinstance(calibration_data, Iterable) or isinstance(calibration_data, str | bytes):
        raise _another_kind(calibration_data)
    if isinstance(calibration_data, Iterator):
        calibration_data = _Kept(calibration_data)
    for first in calibration_data:
        return few(_example(first, model)), calibration_data
    raise _empty()


def _example(batch: object, model: nn.Module | ExportedProgram) -> tuple | dict:
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


def few(example: tuple | dict) -> tuple | dict:
    """The first examples of a batch: every pass is checked on them. No other tensor's length may look like a batch."""
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, Tensor) and t.ndim]
    if not tensors:
        return example
    batch = tensors[0].shape[0]
    others = {t.shape[0] for t in tensors} - {batch}
    count = next(n for n in itertools.count(EXAMPLES) if n not in others)
    return pytree.tree_map_only(Tensor, lambda t: t[:count] if t.ndim and t.shape[0] == batch else t, example)
