"""``Compiler``: the whole flow on one screen: capture, passes, verify, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from .block_products import block_products
from .calibration import make_calibration
from .capture import Captured, capture
from .dump import DumpFolder
from .effects import EffectWatch, Reference, leave_one_out
from .example_call import ExampleCall, check_ranges
from .executable import Executable
from .graph import constant, placeholders
from .histograms import value_histograms
from .meta import tensor_meta
from .model_checks import mark_keep_float
from .noise import LayerNoise, layer_noise, sqnr_db
from .options import Choices, CompileOptions, Context, context
from .packing import stored_bytes
from .pass_manager import PassManager
from .passes.correct_bias import corrected_biases
from .pipeline import build_passes
from .report import Report, layers, products
from .rewrite import Level
from .terminal import progress
from .torch_modes import exact
from .verify import Certificate, verify
from .weight_errors import exponents, network_bound, weight_errors

EXAMPLES = 4  # at most, on which every pass is checked and the error per layer is measured


def _batch(args: tuple, kwargs: dict) -> int:
    """Length of dimension 0 of the first tensor of a call."""
    return next(x.shape[0] for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))


def _pixels(leaf):
    """A uint8 image as the float values it stands for."""
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype == torch.uint8 else leaf


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

    @exact
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


def _bytes(tensor: Tensor) -> int:
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
