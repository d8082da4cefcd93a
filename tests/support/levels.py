"""Compare the qdq and the integer level of one compilation, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress import Level, PassManager, default_passes
from fxcompress.capture import capture
from fxcompress.graph import is_call
from fxcompress.model_checks import mark_keep_float
from fxcompress.options import CompileOptions, Context

QUANTIZE = torch.ops.fxcompress.quantize.default


def compile_levels(
    model, inputs: tuple[Tensor, ...], *, calibrate: bool = False, **options
) -> dict[Level, fx.GraphModule]:
    """The final graph of each level, compiled by the default passes; ``calibrate``: ranges from the example inputs."""
    options = CompileOptions.build(**options)
    captured = capture(model, inputs, input_normalization=options.input_normalization)
    mark_keep_float(captured.graph_module, options.keep_float)
    captured.graph_module.meta["fxcompress"] = Context(
        options, captured.example_inputs, (lambda module: module(*captured.example_inputs)) if calibrate else None
    )
    manager = PassManager(default_passes(options.target))
    gm = manager.run(captured.graph_module)
    return {level: snapshot.graph_module for level, snapshot in manager.levels.items()} | {Level.INTEGER: gm}


@dataclass
class Difference:
    """How many of ``size`` codes differ between the two levels, and by how many steps at most."""

    count: int
    size: int
    steps: int


def code_differences(levels: dict[Level, fx.GraphModule], *inputs: Tensor) -> dict[str, Difference]:
    """Per tensor: integer codes against the qdq level *fed with the integer codes of the tensors before it*.

    Every operator is thus judged on its own, without the errors it inherits.
    """
    integer = _Recorder(levels[Level.INTEGER])
    integer.run(*inputs)
    checker = _Forced(levels[Level.QDQ], integer.values)
    checker.run(*inputs)
    return checker.differences


class _Recorder(fx.Interpreter):
    def __init__(self, gm):
        super().__init__(gm)
        self.values: dict[str, Tensor] = {}

    def run_node(self, node):
        self.values[node.name] = value = super().run_node(node)
        return value


class _Forced(fx.Interpreter):
    def __init__(self, gm, codes: dict[str, Tensor]):
        super().__init__(gm)
        self.codes, self.differences = codes, {}

    def run_node(self, node):
        value = super().run_node(node)
        if not is_call(node, QUANTIZE):
            return value
        source = node.args[0].name
        forced = self.codes[node.name] if node.name in self.codes else self.codes[source]
        difference = (value.int() - forced.int()).abs()
        self.differences[source] = Difference(int((difference > 0).sum()), difference.numel(), int(difference.max()))
        return forced
