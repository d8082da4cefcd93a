"""``compile``: what the user says, checked before any work; ``compiler.py`` does the work."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backends import get_backend
from .calibration import first_batch
from .calibration_data import blame_calibration, check_calibration
from .compiled import CompiledModule
from .compiler import Compiler
from .errors import CalibrationError, ModelError, OptionError
from .interface import as_call
from .model_checks import check_model, check_names
from .model_kinds import check_kind
from .options import CompileOptions, Target, check_folder
from .pipeline import build_passes
from .torch_modes import exact

DEFAULT_BACKEND = "native"


@exact
def compile(
    model: nn.Module,
    target: str | Target = "int8",
    *,
    example_inputs: Tensor | Sequence | Mapping | None = None,
    calibration_data: Iterable | Callable | None = None,
    input_range: Sequence | None = None,
    input_normalization: Sequence | None = None,
    passes: Sequence | None = None,
    backend: str | None = None,
    debug: str | Path | None = None,
    keep_float: Sequence[str] = (),
    integer_io: bool = False,
    **options: Any,
) -> CompiledModule:
    """Compile a trained PyTorch model into a network without floating-point operations.

    Args:
        model: a module in eval mode, an ``ExportedProgram`` or a ``GraphModule``. It is not modified.
        target: "int8" (= "w8a8"), "w6a8", "w4a8", "w8a4", ...: bits of weights and activations, 2..8 each.
        example_inputs: one call's inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Any
            batch size. Without them, and without calibration data, compilation happens at the first call.
        calibration_data: None (ranges from batch-norm statistics), an iterable of inputs or of (input, label) batches,
            or a callable that is given the model and runs data through it.
        input_range: (lo, hi) of the inputs, or one pair per input. Default: from calibration data, else guessed from the
            example inputs (the report says so).
        input_normalization: (mean, std): the network takes raw values and normalizes them in its first layer.
        passes: a list from ``default_passes(target)``, edited; default that list.
        backend: what runs the result: "native" (default; compiled kernels) or "reference" (PyTorch, slow). The same bits.
        debug: folder for the dumps of every pass (environment variable FXCOMPRESS_DEBUG does the same).
        keep_float: names of submodules to leave in floating point; the certificate lists them.
        integer_io: outputs are ``QuantizedTensor`` (integers with scale); inputs may be uint8 codes.
        options: further fields of ``CompileOptions`` (``range_method``, ``range_sigmas``, ...).

    Returns:
        A ``CompiledModule``: call it like ``model``.

    Raises:
        UserError: a subclass naming what to fix (errors.py); InternalError: a pass broke its contract.

    >>> net = fxcompress.compile(model, example_inputs=torch.rand(1, 3, 32, 32), input_range=(0, 1))   # doctest: +SKIP
    """
    compiler, call = prepare(
        model, target, example_inputs=example_inputs, calibration_data=calibration_data, input_range=input_range,
        input_normalization=input_normalization, passes=passes, backend=backend, debug=debug, keep_float=keep_float,
        integer_io=integer_io, **options,
    )  # fmt: skip
    compiled = CompiledModule(compiler)
    if call is not None:
        args, kwargs = call
        with blame_calibration(when=example_inputs is None):
            compiled.specialize(*args, **kwargs)
    return compiled


def prepare(
    model: nn.Module,
    target: str | Target = "int8",
    *,
    example_inputs: Tensor | Sequence | Mapping | None = None,
    calibration_data: Iterable | Callable | None = None,
    input_range: Sequence | None = None,
    input_normalization: Sequence | None = None,
    passes: Sequence | None = None,
    backend: str | None = None,
    debug: str | Path | None = None,
    keep_float: Sequence[str] = (),
    integer_io: bool = False,
    **options: Any,
) -> tuple[Compiler, tuple[tuple, dict] | None]:
    """Everything before any work: ``compile``'s arguments checked, a snapshot of the model, and the example call if known."""
    checked = CompileOptions.build(
        target=target, input_range=input_range, input_normalization=input_normalization, keep_float=keep_float,
        integer_io=integer_io, **options,
    )  # fmt: skip
    if calibration_data is None and (unused := {"range_method", "percentile"} & options.keys()):
        raise OptionError(f"{min(unused)} has no effect without calibration_data", stage="compile",
                          remedy="Pass calibration_data (about 100 examples), or drop the option.")  # fmt: skip
    if calibration_data is None and checked.bias_correction == "empirical":
        raise CalibrationError('bias_correction="empirical" measures, and there are no calibration data', stage="compile",
                               remedy='Pass calibration_data, or bias_correction="analytic".')  # fmt: skip
    if passes is not None:
        passes = build_passes(passes, checked.target)  # a wrong list is an error now, not at the first call
    backend = get_backend(DEFAULT_BACKEND if backend is None else backend).name
    debug = debug or os.environ.get("FXCOMPRESS_DEBUG") or None
    if debug is not None:
        check_folder(debug)
    snapshot = take_snapshot(model)
    check_names(snapshot, checked.keep_float)
    check_names(snapshot, checked.ignored_layers, "ignored_layers")
    check_calibration(calibration_data, model)

    compiler = Compiler(snapshot, checked, calibration_data, passes, backend, debug)
    if example_inputs is None and calibration_data is not None:
        example_inputs, compiler.calibration_data = first_batch(calibration_data, model)
    return compiler, None if example_inputs is None else as_call(example_inputs)


@torch.no_grad()  # weights made in inference mode have no gradients to track
def take_snapshot(model) -> nn.Module:
    """A copy of the model with the weights as they are now. Raises ``ModelError`` for a model that cannot be compiled."""
    check_kind(model)
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module(check_guards=False)
    check_model(model)
    # A computed attribute (the weight of torch.nn.utils.weight_norm) is copied as a value: deepcopy refuses it.
    attributes = [t for module in model.modules() for t in vars(module).values() if isinstance(t, torch.Tensor)]
    memo = {id(t): t.detach().clone() for t in attributes if not t.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(f"the model cannot be copied ({type(error).__name__}: {error})", stage="model check",
                         remedy="copy.deepcopy(model) must work: remove locks, files and generators from its attributes.") from error  # fmt: skip
