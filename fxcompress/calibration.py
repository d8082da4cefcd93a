"""The user's calibration data, in any of their usual forms, as one function that runs a module on them.

calibrate = make_calibration(loader, captured.interface)
histograms = observe(gm, nodes, calibrate)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.utils.data
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from .calibration_data import FORMS, another_kind, empty, example_of
from .errors import CalibrationError, FxcompressError, InputError
from .interface import Interface, TailShapeError

CHUNK = 32  # examples per forward pass when the data are one big tensor
EXAMPLES = 4  # taken from the first batch as example call


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
            raise empty()
        inputs = interface.tensor_inputs
        if len(inputs) != 1:
            names = ", ".join(leaf.name for leaf in inputs)
            raise CalibrationError(f"calibration_data is one tensor, the model has the inputs {names}", stage="calibration",
                                   remedy=f"Pass a list of batches: [({names}), ...].")  # fmt: skip
        return data.split(CHUNK) if inputs[0].batched else [data]
    if isinstance(data, Mapping):
        return [data]
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise another_kind(data)
    if isinstance(data, list | tuple) and not data:
        raise empty()
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
        raise empty()


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
                           expected=expected, remedy=f"calibration_data may be {FORMS}.") from mistake  # fmt: skip


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


# ------------------------------------------------------------------------------ an example call from calibration data


def first_batch(calibration_data: object, model: nn.Module | ExportedProgram) -> tuple[tuple | dict | None, object]:
    """(example inputs, calibration data to use from now on): a few examples of the first batch serve as example call.

    None as example for a callable, whose batches nobody has seen yet. An iterator is wrapped so that the batch read here
    is not lost. Labels are told from inputs by the parameters of the model that have no default.
    """
    if callable(calibration_data) and not isinstance(calibration_data, Iterable):
        return None, calibration_data
    if isinstance(calibration_data, Tensor | Mapping):
        return few(example_of(calibration_data, model)), calibration_data
    if not isinstance(calibration_data, Iterable) or isinstance(calibration_data, str | bytes):
        raise another_kind(calibration_data)
    if isinstance(calibration_data, Iterator):
        calibration_data = _Kept(calibration_data)
    for first in calibration_data:
        return few(example_of(first, model)), calibration_data
    raise empty()


def few(example: tuple | dict) -> tuple | dict:
    """The first examples of a batch: every pass is checked on them. No other tensor's length may look like a batch."""
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, Tensor) and t.ndim]
    if not tensors:
        return example
    batch = tensors[0].shape[0]
    others = {t.shape[0] for t in tensors} - {batch}
    count = next(n for n in itertools.count(EXAMPLES) if n not in others)
    return pytree.tree_map_only(Tensor, lambda t: t[:count] if t.ndim and t.shape[0] == batch else t, example)
