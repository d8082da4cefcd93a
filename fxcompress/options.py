"""``Target``, ``CompileOptions`` and the ``Context`` that travels with a graph through the passes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, fx

from .errors import OptionError, nearest

RANGE_METHODS = ("minmax", "percentile", "mse", "kl")


@dataclass(frozen=True)
class Target:
    """Bit widths: ``weight_bits`` and ``activation_bits``, 2..8 each. "int8" is "w8a8".

    >>> Target.parse("w4a8")
    Target(weight_bits=4, activation_bits=8)
    """

    weight_bits: int = 8
    activation_bits: int = 8

    @classmethod
    def parse(cls, text: str | Target) -> Target:
        if isinstance(text, Target):
            return text
        match = re.fullmatch(r"w(\d+)a(\d+)", {"int8": "w8a8"}.get(text, text)) if isinstance(text, str) else None
        if match is None:
            raise OptionError(
                f"unknown target {text!r}",
                stage="compile",
                expected='"int8" or "w<weight bits>a<activation bits>"',
                remedy=nearest(str(text), ["int8", "w8a8", "w6a8", "w4a8", "w8a4", "w4a4"]),
            )
        bits = int(match[1]), int(match[2])
        if not all(2 <= b <= 8 for b in bits):
            raise OptionError(f"target {text!r} asks for {bits[0]}-bit weights and {bits[1]}-bit activations",
                              stage="compile", expected="2 to 8 bits each", remedy='Choose for example "w4a8".')  # fmt: skip
        return cls(*bits)

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits}"


@dataclass(frozen=True)
class CompileOptions:
    """Everything ``compile`` was told, validated on construction.

    Attributes:
        target: bit widths.
        input_range: (lo, hi) of every float graph input, or a list with one pair (or None) per input.
        input_normalization: (mean, std), scalars or per channel, of the first float input: the compiled network then
            takes raw values in ``input_range`` and normalises them itself, folded into its first layer.
        keep_float: names of submodules left in floating point on purpose.
        integer_io: outputs are returned as integers with their scales.
        range_method: how calibrated ranges are chosen: "minmax", "percentile", "mse" or "kl".
        percentile: share of the values kept by "percentile", in percent.
        range_sigmas: half width of data-free ranges in standard deviations. None: 6 (Nagel et al. 2019), 4 for activations
            of 4 bits and fewer, where resolution is worth more than the tails.
        max_rewrites: stop after that many rewrites (bisection); None: no limit.
    """

    target: Target = Target()
    input_range: tuple | list | None = None
    input_normalization: tuple | None = None
    keep_float: tuple[str, ...] = ()
    integer_io: bool = False
    range_method: str = "mse"
    percentile: float = 99.99
    range_sigmas: float | None = None
    max_rewrites: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "target", Target.parse(self.target))
        if isinstance(self.keep_float, str):
            object.__setattr__(self, "keep_float", (self.keep_float,))
        object.__setattr__(self, "keep_float", tuple(self.keep_float))
        if self.range_method not in RANGE_METHODS:
            raise OptionError(f"unknown range_method {self.range_method!r}", stage="compile",
                              remedy=nearest(str(self.range_method), RANGE_METHODS))  # fmt: skip
        if not 50 < self.percentile <= 100:
            raise OptionError(f"percentile is {self.percentile}", stage="compile", expected="50 < percentile <= 100",
                              remedy="99.99 keeps all but one value in ten thousand.")  # fmt: skip
        if self.range_sigmas is None:
            object.__setattr__(self, "range_sigmas", 6.0 if self.target.activation_bits > 4 else 4.0)
        if not self.range_sigmas > 0:
            raise OptionError(f"range_sigmas is {self.range_sigmas}", stage="compile", expected="a positive number",
                              remedy="6 is the usual choice.")  # fmt: skip
        if self.max_rewrites is not None and self.max_rewrites < 0:
            raise OptionError(f"max_rewrites is {self.max_rewrites}", stage="compile", expected="None or >= 0",
                              remedy="None means no limit.")  # fmt: skip

    @classmethod
    def build(cls, **values) -> CompileOptions:
        """Construct from keywords; an unknown name raises ``OptionError`` with the nearest known one."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise OptionError(f"unknown option {name!r}", stage="compile", remedy=nearest(name, known))
        return cls(**values)


@dataclass
class Context:
    """What passes may ask about the compilation; it rides in ``gm.meta["fxcompress"]``.

    Attributes:
        options: the user's options.
        example_inputs: flat float32 graph inputs, one per placeholder, on which passes are checked.
        calibrate: runs the calibration data through a graph module, None without calibration data.
        ranges: ranges of an earlier compilation by node name (a further input shape reuses them).
    """

    options: CompileOptions = field(default_factory=CompileOptions)
    example_inputs: tuple[Tensor, ...] = ()
    calibrate: Callable[[torch.nn.Module], None] | None = None
    ranges: dict | None = None


def context(gm: fx.GraphModule) -> Context:
    """The compilation context of a graph; a default one for a graph made by hand."""
    return gm.meta.setdefault("fxcompress", Context())
