"""``Target``, ``CompileOptions`` and the ``Context`` that travels with a graph through the passes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor, fx

from .bilinear import ALGORITHMS
from .errors import OptionError, nearest
from .pruning.granularity import PARTIAL, check_choice, granularity, ratio_of
from .pruning.latency import LatencyTable
from .pruning.report import Pruned
from .tile_convolution import CONV_ALGORITHMS
from .weight_quantizers import QUANTIZERS

RANGE_METHODS = ("minmax", "percentile", "mse", "kl")
PRUNING_CORRECTIONS = ("auto", "measured", "analytic", None)
#: Options that are one of a few values.
_CHOICES = {
    "range_method": RANGE_METHODS,
    "integer_io": (True, False),
    "residual_inputs": (True, False),
    "weight_granularity": ("channel", "tensor"),
    "weight_quantizer": (None, *QUANTIZERS),
    "equalize": (None, True, False),
    "absorb_bias": (True, False),
    "spiq": (None, True, False),
    "measure_passes": (None, True, False),
    "bias_correction": ("auto", "analytic", "empirical", None),
    "pruning_correction": PRUNING_CORRECTIONS,
}
#: Without effect where nothing is pruned.
OF_PRUNING = (
    "pruning_granularity",
    "pruning_measure",
    "pruning_criterion",
    "pruning_budget",
    "pruning_correction",
    "latency_table",
    "round_to",
    "ignored_layers",
)
#: Numbers that may be left open.
_OPTIONAL = ("max_rewrites", "round_to")
#: Options that are numbers: what is legal, how the message says it, and what to do.
_NUMBERS = {
    "percentile": (lambda v: 50 < v <= 100, "a number with 50 < percentile <= 100",
                   "99.99 keeps all but one value in ten thousand."),
    "range_sigmas": (lambda v: 0 < v < float("inf"), "a positive number", "6 is the usual choice."),
    "residual_orders": (lambda v: v >= 2 and v == int(v), "a whole number >= 2",
                        "2 adds one residual of the target's width to the first rounding."),
    "matmul_levels": (lambda v: v >= 1 and v == int(v), "a whole number >= 1", "Each level cuts the blocks again; 1 is the usual choice."),
    "max_rewrites": (lambda v: v >= 0 and v == int(v), "None or a whole number >= 0", "None means no limit."),
    "pruning_ratio": (lambda v: 0 <= v < 1, "a number with 0 <= pruning_ratio < 1", "0.3 removes 30 %."),
    "round_to": (lambda v: v >= 1 and v == int(v), "None or a whole number >= 1", "1 allows any number of channels."),
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Bit widths: ``weight_bits`` and ``activation_bits``, 2..8 each. "int8" is "w8a8".

    >>> Target.parse("w4a8")
    Target(weight_bits=4, activation_bits=8)
    """

    weight_bits: int = 8
    activation_bits: int = 8

    def __post_init__(self):
        bits = self.weight_bits, self.activation_bits
        if not all(isinstance(b, Integral) and 2 <= b <= 8 for b in bits):
            raise OptionError(f"target {self!s} asks for {bits[0]!r}-bit weights and {bits[1]!r}-bit activations",
                              stage="compile", expected="2 to 8 bits each", remedy='Choose for example "w4a8".')  # fmt: skip

    @classmethod
    def parse(cls, text: str | Target) -> Target:
        """The bit widths that a name such as "int8" or "w4a8" stands for. Raises ``OptionError``."""
        if isinstance(text, Target):
            return text
        match = re.fullmatch(r"w(\d+)a(\d+)", {"int8": "w8a8"}.get(text, text)) if isinstance(text, str) else None
        if match is None:
            raise OptionError(
                f"unknown target {text!r}",
                stage="compile",
                expected='"int8" or "w<weight bits>a<activation bits>"',
                remedy=_nearest_target(text),
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits}"


def _nearest_target(text: object) -> str:
    bits = re.fullmatch(r"u?int([2-7])", text) if isinstance(text, str) else None
    if bits:
        return f'Write "w{bits[1]}a8" for {bits[1]}-bit weights, "w{bits[1]}a{bits[1]}" for activations too.'
    return nearest(str(text), ["int8", "w8a8", "w6a8", "w4a8", "w8a4", "w4a4"])


@dataclass(frozen=True)
class CompileOptions:
    """Everything ``compile`` was told, validated on construction.

    Attributes:
        target: bit widths.
        input_range: (lo, hi) of every float graph input, or a list with one pair (or None) per input.
        input_normalization: (mean, std), scalars or per channel, of the first float input: the compiled network then
            takes raw values in ``input_range`` and normalizes them itself, folded into its first layer.
        keep_float: names of submodules left in floating point on purpose.
        integer_io: outputs are returned as integers with their scales.
        range_method: how calibrated ranges are chosen: "minmax", "percentile", "mse" or "kl".
        percentile: share of the values kept by "percentile", in percent.
        range_sigmas: half width of data-free ranges in standard deviations. None: 6 (Nagel et al. 2019), 4 for activations
            of 4 bits and fewer, where resolution is worth more than the tails.
        weight_granularity: "channel" (one weight scale per output channel) or "tensor" (one per layer, for machines that
            have no per-channel requantization).
        weight_quantizer: how weights are rounded: "nearest", "squant" or "power" (``weight_quantizers.py``). None: "squant" below
            8 bits where a layer's input is never negative, else "nearest".
        residual: share of the rows of every weight that get a further residual per order, 0..1, the worst first, or
            "outliers": one for the weights beyond six deviations (``passes/expand_residuals.py``).
        residual_orders: rounding and residuals together, at least 2.
        residual_inputs: layers also read what rounding their input lost (``passes/expand_inputs.py``).
        equalize: balance the weights of consecutive layers (``passes/equalize_cross_layer.py``). None: where it was measured
            to help (docs/passes.md), with one weight scale per tensor.
        absorb_bias: move what a ReLU always adds into the next bias (``passes/absorb_high_bias.py``).
        spiq: a scale and zero point for every channel of the activations, where all their readers can take it
            (``passes/spiq.py``). None: off (docs/passes.md).
        bias_correction: "analytic" (from statistics), "empirical" (measured on calibration data), None (off) or "auto":
            empirical with calibration data, else analytic.
        matmul_algorithm: how products of matrices are computed: "naive", "strassen", "winograd", an algorithm of one's own
            (``bilinear.register_algorithm``), or "auto", what takes the fewest multiplications (``passes/multiply_in_blocks.py``).
        matmul_levels: at most as many levels of blocks.
        conv_algorithm: how 3x3 convolutions of stride 1 are computed: "direct", "winograd2" or "winograd4" (tiles of 2x2 or 4x4
            results), an algorithm of one's own (``tile_convolution.register_conv_algorithm``), or "auto", what takes the fewest
            multiplications of those that are proven to fit (``passes/convolve_in_tiles.py``).
        max_rewrites: stop after that many rewrites (bisection); None: no limit.
        measure_passes: compile once more without each pass, and report what it wins at every layer (docs/passes.md). Takes a
            few times as long. None: where there is a debug folder.
        pruning_ratio: share of ``pruning_measure`` to remove by structured pruning (``passes/prune_channels.py``); 0: none. Where
            single weights are pruned, the share of them.
        pruning_granularity: what is removed as a whole: "channels", "kernels" (``passes/group_kernels.py``), "unstructured" or "N:M",
            such as "2:4" (``passes/prune_weights.py``); a pattern is its own ratio.
        pruning_measure: "macs", "parameters" or "latency", what the native kernels take on this machine (``pruning/latency.py``).
        latency_table: measured times for "latency": a ``LatencyTable``, or a file that is read and completed. None: in memory.
        pruning_criterion: what says which channels or weights matter least (``pruning/criteria.py``, ``pruning/weights.py``). None:
            "outgoing" for channels, "magnitude" for kernels and weights.
        pruning_budget: how much goes where: "global", "uniform" or "importance" (``pruning/budgets.py``).
        pruning_correction: statistics after the cut: "measured" on calibration data, "analytic", None, or "auto": measured
            with calibration data, else analytic (``pruning/statistics.py``).
        round_to: numbers of channels stay multiples of this; None: what fills the registers of the native kernels.
        ignored_layers: names of modules none of whose outputs are pruned.
    """

    target: Target = Target()
    input_range: tuple | list | None = None
    input_normalization: tuple | None = None
    keep_float: tuple[str, ...] = ()
    integer_io: bool = False
    range_method: str = "mse"
    percentile: float = 99.99
    range_sigmas: float | None = None
    weight_granularity: str = "channel"
    weight_quantizer: str | None = None
    residual: float | str = 0.0
    residual_orders: int = 2
    residual_inputs: bool = False
    equalize: bool | None = None
    absorb_bias: bool = False
    spiq: bool | None = None
    bias_correction: str | None = "auto"
    matmul_algorithm: str = "naive"
    matmul_levels: int = 1
    conv_algorithm: str = "direct"
    max_rewrites: int | None = None
    measure_passes: bool | None = None
    pruning_ratio: float = 0.0
    pruning_granularity: str = "channels"
    pruning_measure: str = "macs"
    pruning_criterion: str | None = None
    pruning_budget: str = "global"
    pruning_correction: str | None = "auto"
    latency_table: LatencyTable | str | Path | None = None
    round_to: int | None = None
    ignored_layers: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "target", Target.parse(self.target))
        for name in ("keep_float", "ignored_layers"):
            object.__setattr__(self, name, _module_names(name, getattr(self, name)))
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                texts = [c for c in choices if isinstance(c, str)]
                remedy = nearest(str(value), texts) if texts else f"Choose {' or '.join(map(repr, choices))}."
                if texts and None in choices:
                    remedy += " None is possible, too."
                raise OptionError(f"unknown {name} {value!r}", stage="compile", remedy=remedy)
        for name, algorithms in (("matmul_algorithm", ALGORITHMS), ("conv_algorithm", ("direct", *CONV_ALGORITHMS))):
            if (value := getattr(self, name)) not in (known := ("auto", *algorithms)):
                raise OptionError(f"unknown {name} {value!r}", stage="compile", remedy=nearest(str(value), known))
        if self.equalize is None:
            object.__setattr__(self, "equalize", self.weight_granularity == "tensor")
        if self.spiq is None:
            object.__setattr__(self, "spiq", False)
        if self.range_sigmas is None:
            object.__setattr__(self, "range_sigmas", 6.0 if self.target.activation_bits > 4 else 4.0)
        for name, (legal, expected, remedy) in _NUMBERS.items():
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL) and not (_is_number(value) and legal(value)):
                raise OptionError(f"{name} is {value!r}", stage="compile", expected=expected, remedy=remedy)
        self._check_pruning()
        if not isinstance(self.latency_table, LatencyTable | str | Path | None):
            raise OptionError(f"latency_table is a {type(self.latency_table).__name__}", stage="compile",
                              expected="a LatencyTable or the path of a file", remedy='Pass latency_table="times.json".')  # fmt: skip
        self._check_weights()
        for pair in self.input_range if _is_list_of_ranges(self.input_range) else [self.input_range]:
            if pair is not None:
                parse_range(pair)
        if self.input_normalization is not None:
            _check_normalization(self.input_normalization)

    def _check_pruning(self) -> None:
        name = self.pruning_granularity
        kind = granularity(name)
        object.__setattr__(self, "pruning_ratio", ratio_of(name, self.pruning_ratio))
        if self.pruning_criterion is None:
            object.__setattr__(self, "pruning_criterion", kind.criterion)
        check_choice(name, "pruning_criterion", self.pruning_criterion, kind.criteria)
        check_choice(name, "pruning_budget", self.pruning_budget, kind.budgets)
        check_choice(name, "pruning_measure", self.pruning_measure, kind.measures)

    def _check_weights(self) -> None:
        quantizer, bits = QUANTIZERS[self.weight_quantizer or "nearest"], self.target.weight_bits
        if bits > quantizer.widest:
            raise OptionError(f'weight_quantizer="{quantizer.name}" reaches code {quantizer.largest(bits)} at {bits} bits; int8 holds 127',
                              stage="compile", expected=f"weights of at most {quantizer.widest} bits",
                              remedy=f'Choose "w{quantizer.widest}a{self.target.activation_bits}", or weight_quantizer="squant".')  # fmt: skip
        if self.residual != "outliers" and not (_is_number(self.residual) and 0 <= self.residual <= 1):
            raise OptionError(f"residual is {self.residual!r}", stage="compile", expected='a share 0..1 or "outliers"',
                              remedy="0.5 gives every second row a residual.")  # fmt: skip

    @classmethod
    def build(cls, **values) -> CompileOptions:
        """Construct from what the user wrote.

        Raises ``OptionError`` for an unknown name, with the nearest known one, and for options that contradict each other.
        """
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise OptionError(f"unknown option {name!r}", stage="compile", remedy=nearest(name, known))
        options = cls(**values)
        if "percentile" in values and options.range_method != "percentile":
            raise OptionError(f"percentile={options.percentile} has no effect with range_method={options.range_method!r}",
                              stage="compile", remedy='Pass range_method="percentile" too, or drop percentile.')  # fmt: skip
        if "residual_orders" in values and options.residual in (0, "outliers"):
            raise OptionError(f"residual_orders={options.residual_orders} has no effect with residual={options.residual!r}",
                              stage="compile", remedy="Pass residual=0.5 too, or drop residual_orders.")  # fmt: skip
        without = [n for n in PARTIAL if n in values and n not in granularity(options.pruning_granularity).options]
        if without:
            raise OptionError(f'{without[0]} has no effect with pruning_granularity="{options.pruning_granularity}"', stage="compile",
                              remedy='Drop it, or pass pruning_granularity="channels".')  # fmt: skip
        if "latency_table" in values and options.pruning_measure != "latency":
            raise OptionError(f'latency_table has no effect with pruning_measure="{options.pruning_measure}"', stage="compile",
                              remedy='Pass pruning_measure="latency" too, or drop it.')  # fmt: skip
        unused = [name for name in values if name in OF_PRUNING]
        if unused and options.pruning_ratio == 0:
            raise OptionError(f"{unused[0]} has no effect with pruning_ratio=0", stage="compile",
                              remedy="Pass pruning_ratio=0.3 too, or drop it.")  # fmt: skip
        if "matmul_levels" in values and options.matmul_algorithm == "naive":
            raise OptionError(f"matmul_levels={options.matmul_levels} has no effect with matmul_algorithm=\"naive\"", stage="compile",
                              remedy='Pass matmul_algorithm="winograd" too, or drop matmul_levels.')  # fmt: skip
        return options


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _module_names(option: str, names: object) -> tuple[str, ...]:
    """Names of modules as a tuple; one may stand for itself."""
    if isinstance(names, str):
        return (names,)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        kinds = type(names).__name__ if not isinstance(names, list | tuple) else [type(n).__name__ for n in names]
        raise OptionError(f"{option} is {kinds}", stage="compile", expected="names of submodules",
                          remedy=f'Pass the names that model.named_modules() lists, {option}=["head.norm"].')  # fmt: skip
    return tuple(names)


def declared_ranges(given: tuple | list | None, inputs: int) -> list:
    """``input_range`` as one (lo, hi) pair or None for each of the float ``inputs``; a single pair holds for all of them.

    Raises ``OptionError`` for a list of another length.
    """
    if not _is_list_of_ranges(given):
        return [given] * inputs
    if len(given) != inputs:
        raise OptionError(f"input_range lists {len(given)} ranges, the model has {inputs} float inputs",
                          stage="compile", remedy="Give one (lo, hi) or None per float input.")  # fmt: skip
    return given


def _is_list_of_ranges(given: object) -> bool:
    return isinstance(given, list) and not (len(given) == 2 and all(map(_is_number, given)))


def parse_range(given: object, of: str = "") -> tuple[Tensor, Tensor]:
    """(lo, hi), numbers or one per channel, as float64 tensors. Raises ``OptionError`` unless finite and lo < hi."""
    try:
        lo, hi = torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64) for v in given))
        legal = lo.ndim <= 1 and bool((lo < hi).all()) and bool(torch.isfinite(torch.stack([lo, hi])).all())
    except (TypeError, ValueError, RuntimeError):
        legal = False
    if not legal:
        raise OptionError(f"input_range{of} is {given!r}", stage="compile", expected="finite (lo, hi) with lo < hi",
                          remedy="For pixels divided by 255 it is (0, 1).")  # fmt: skip
    return lo, hi


def _check_normalization(given: object) -> None:
    """(mean, std) of finite numbers, one each or one per channel; the number of channels is known after capture only."""
    try:
        mean, std = (torch.as_tensor(v, dtype=torch.float64) for v in given)
    except (TypeError, ValueError, RuntimeError):
        raise OptionError(f"input_normalization is {given!r}", stage="compile", expected="(mean, std)",
                          remedy="Numbers, or one number per channel: ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).") from None  # fmt: skip
    if not bool(torch.isfinite(mean).all()):
        raise OptionError(f"mean of input_normalization is {mean.tolist()}", stage="compile", expected="finite numbers",
                          remedy="The network computes (x - mean) / std.")  # fmt: skip
    if not bool((std > 0).all()):
        raise OptionError(f"std of input_normalization is {std.tolist()}", stage="compile", expected="positive numbers",
                          remedy="The network computes (x - mean) / std.")  # fmt: skip


def check_folder(path: str | Path) -> None:
    """Create the folder ``path`` of the dumps. Raises ``OptionError`` when nothing can be written into it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, TypeError) as error:
        reason = "a file is in the way" if isinstance(error, FileExistsError) else getattr(error, "strerror", None)
        reason = reason or f"it is a {type(path).__name__}"
        raise OptionError(f"the debug folder {str(path)!r} cannot be written: {reason}", stage="compile",
                          expected="the path of a folder", remedy="Choose a folder of your own, debug='dumps'.") from error  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """What a compilation chose from data or statistics, by node name: ``Range`` of activations, corrected biases (O,); and
    what it pruned."""

    ranges: dict = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    pruning: Pruned | None = None


@dataclass
class Context:
    """What passes may ask about the compilation; it rides in ``gm.meta["fxcompress"]``.

    Attributes:
        options: the user's options.
        example_inputs: flat float32 graph inputs, one per placeholder, on which passes are checked.
        calibrate: runs the calibration data through a graph module, None without calibration data.
        choices: those of an earlier compilation (a further input shape reuses them).
        float_graph: the float graph as it was quantized, node for node (``quantize`` sets it): what errors are measured from.
    """

    options: CompileOptions = field(default_factory=CompileOptions)
    example_inputs: tuple[Tensor, ...] = ()
    calibrate: Callable[[torch.nn.Module], None] | None = None
    choices: Choices = field(default_factory=Choices)
    float_graph: fx.GraphModule | None = None


def context(gm: fx.GraphModule) -> Context:
    """The compilation context of a graph; a default one for a graph made by hand."""
    return gm.meta.setdefault("fxcompress", Context())
