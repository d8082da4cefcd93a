"""``compile``: the whole flow on one screen."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from .backends import get_backend
from .block_products import block_products
from .calibration import first_batch, make_calibration
from .calibration_data import blame_calibration, check_calibration
from .capture import Captured, capture
from .compiled import CompiledModule
from .dump import DumpFolder
from .effects import EffectWatch, Reference, leave_one_out
from .errors import CalibrationError, ModelError, OptionError
from .example_call import ExampleCall, check_ranges
from .executable import Executable
from .graph import constant, placeholders
from .histograms import value_histograms
from .interface import as_call
from .meta import tensor_meta
from .model_checks import check_model, check_names, mark_keep_float
from .model_kinds import check_kind
from .noise import LayerNoise, layer_noise, sqnr_db
from .options import Choices, CompileOptions, Context, Target, check_folder, context
from .packing import stored_bytes
from .pass_manager import PassManager
from .passes.correct_bias import corrected_biases
from .pipeline import build_passes
from .progress import progress
from .report import Report, layers, products
from .rewrite import Level
from .verify import Certificate, verify
from .weight_errors import exponents, network_bound, weight_errors

DEFAULT_BACKEND = "native"
EXAMPLES = 4  # at most, on which every pass is checked and the error per layer is measured


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
        input_normalization: (mean, std): the network takes raw values and normalises them in its first layer.
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


def _batch(args: tuple, kwargs: dict) -> int:
    """Length of dimension 0 of the first tensor of a call."""
    return next(x.shape[0] for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))


def _pixels(leaf):
    """A uint8 image as the float values it stands for."""
    return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.uint8 else leaf


@dataclass
class Compiler:
    """A snapshot of the model with everything needed to compile it for a call's shapes."""

    model: nn.Module
    options: CompileOptions
    calibration_data: object
    passes: list | None
    backend: str
    debug: str | Path | None
    manager: PassManager | None = field(default=None, repr=False)

    def build(self, args: tuple, kwargs: dict, choices: Choices | None = None) -> Executable:
        """capture -> passes -> verify -> report, for one set of input shapes."""
        clock = _Clock()
        captured = self.capture(args, kwargs, choices)
        gm = captured.graph_module
        clock.lap("capture")

        dump = DumpFolder(self.debug) if self.debug else None
        if dump:
            dump.captured(gm)
        complete = self.options.max_rewrites is None  # a graph cut short for bisection runs, but proves nothing
        measure = complete and choices is None and self._measures
        watch = EffectWatch(keep=measure)
        self.manager = PassManager(
            build_passes(self.passes, self.options.target),
            observer=lambda *event: [observe(*event) for observe in (watch, dump) if observe],
            max_rewrites=self.options.max_rewrites,
        )
        with progress(len(self.manager.passes) + complete) as announce:
            gm = self.manager.run(gm, announce)
            clock.lap("passes")
            announce("verify")
            certificate = verify(gm, context(gm).example_inputs) if complete else None
            clock.lap("verify")
            noise = []
            if measure:
                noise = self._measure(watch, announce)
                clock.lap("measuring passes")
        report = self._report(gm, certificate)
        report.effects, report.noise = watch.effects, noise
        report.seconds = clock.laps
        executable = self._executable(gm, captured, report)
        if measure:
            executable.time_steps()
        if dump:
            dump.report(executable.report)
        return executable

    def capture(self, args: tuple, kwargs: dict, choices: Choices | None = None) -> Captured:
        """The float graph for one set of input shapes, with all that passes may ask about the compilation."""
        if self._raw:
            args, kwargs = tree_map(_pixels, (args, kwargs))
        captured = capture(
            self.model,
            args,
            kwargs,
            input_normalization=self.options.input_normalization,
            check=self._check_example if choices is None else None,
        )
        mark_keep_float(captured.graph_module, self.options.keep_float)
        captured.graph_module.meta["fxcompress"] = self._context(captured, choices, _batch(args, kwargs))
        return captured

    @property
    def _raw(self) -> bool:
        """The network takes raw pixels, uint8 images among them."""
        return self.options.input_normalization is not None

    @property
    def _measures(self) -> bool:
        """What every pass wins is measured."""
        chosen = self.options.measure_passes
        return bool(self.debug) if chosen is None else chosen

    def _measure(self, watch: EffectWatch, announce: Callable[[str], None]) -> list[LayerNoise]:
        qdq_level = self.manager.levels.get(Level.QDQ)
        if qdq_level is None or not qdq_level.inputs:
            return []
        reference = Reference.of(qdq_level, self.manager.outputs)
        leave_one_out(self.manager.passes, watch, reference, announce)
        return layer_noise(reference.rounded, reference.noise)

    def _check_example(self, example: ExampleCall) -> None:
        check_ranges(example, self.options, calibrated=self.calibration_data is not None)

    def _context(self, captured: Captured, choices: Choices | None, batch: int) -> Context:
        calibrate = None
        if self.calibration_data is not None and choices is None:
            calibrate = make_calibration(self.calibration_data, captured.interface, raw=self._raw)
        leaves = captured.interface.tensor_inputs
        count = min(batch, EXAMPLES)  # capture repeats a single example, the checks need it once
        examples = (x[:count] if leaf.batched else x for leaf, x in zip(leaves, captured.example_inputs, strict=True))
        return Context(self.options, tuple(examples), calibrate, choices or Choices())

    def _report(self, gm: fx.GraphModule, certificate: Certificate | None) -> Report:
        float_level, qdq_level = self.manager.levels[Level.FLOAT], self.manager.levels.get(Level.QDQ)
        outputs = [
            sqnr_db(a, b) for a, b in zip(float_level.values, self.manager.last.values, strict=True)
        ] if not self.options.integer_io else []  # fmt: skip
        rows = products(gm, certificate.accumulators) if certificate else []
        weights = weight_errors(float_level.graph_module, qdq_level.graph_module) if qdq_level else []
        constants = [constant(gm, n) for n in gm.graph.nodes if n.op == "get_attr"]
        return Report(
            target=str(self.options.target),
            backend=self.backend,
            inputs=[_input_entry(n) for n in placeholders(float_level.graph_module) if tensor_meta(n).range],
            passes=[r.to_dict() for r in self.manager.records],
            layers=layers(float_level, qdq_level) if qdq_level else [],
            products=rows,
            block_products=block_products(gm),
            parameters=sum(p.numel() for p in self.model.parameters()),
            float_bytes=sum(_bytes(t) for t in self.model.state_dict().values()),
            weights=weights,
            exponents=exponents(float_level.graph_module, weights, self.options),
            histograms=value_histograms(float_level, qdq_level) if qdq_level and self._measures else [],
            weight_bound=network_bound(float_level.graph_module, weights, float_level.inputs, float_level.values)
            if weights
            else None,
            integer_bytes=sum(_bytes(t) for t in constants),
            stored_bytes=sum(stored_bytes(t) for t in constants),
            macs=sum(p.macs for p in rows),
            pruning=float_level.graph_module.meta.get("pruning"),
            output_sqnr=outputs,
            certificate={**certificate.to_dict(), "text": str(certificate)} if certificate else None,
        )

    def _executable(self, gm: fx.GraphModule, captured: Captured, report: Report) -> Executable:
        float_graph = self.manager.levels[Level.FLOAT].graph_module
        ranges = {n.name: tensor_meta(n).range for n in float_graph.graph.nodes if tensor_meta(n).range is not None}
        qdq_level = self.manager.levels.get(Level.QDQ)
        biases = corrected_biases(qdq_level.graph_module) if qdq_level else {}
        choices = Choices(ranges, biases, float_graph.meta.get("pruned"))
        input_scales = []
        if self.options.integer_io:
            input_scales = [_input_scale(n) for n in placeholders(gm)]
        output_scales = gm.meta.get("output_scales") or [None] * len(report.output_sqnr)
        gm.meta = {}
        self.manager = None
        return Executable(
            gm, captured.interface, report, self.backend, input_scales, output_scales, choices,
            qdq=qdq_level.graph_module if qdq_level else None,
        )  # fmt: skip

    def __deepcopy__(self, memo) -> Compiler:
        return self  # a snapshot: nothing changes it

    def __getstate__(self) -> dict:
        return {**self.__dict__, "manager": None}


class _Clock:
    """Wall time per step, and in total."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
        self.laps["total"] = now - self._start


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _input_entry(node: fx.Node) -> dict:
    chosen = tensor_meta(node).range
    lo, hi = chosen.bounds
    return {
        "name": node.name,
        "shape": [int(n) for n in node.meta["val"].shape[1:]],
        "lo": lo,
        "hi": hi,
        "chosen_by": chosen.provenance,
    }


def _input_scale(node: fx.Node) -> tuple | None:
    """Per-tensor (scale, zero_point, qmin, qmax) of an integer graph input."""
    q = tensor_meta(node).qparams
    return None if q is None else (*q.broadcast(node.meta["val"].ndim), q.qmin, q.qmax)
