"""Histograms of weights and activations beside the ranges that were chosen for them: what a range cuts off, and what it wastes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .analysis.encoded_weights import is_encoded, rows, summands
from .dialects import WEIGHTED
from .graph import calls, constant
from .meta import QParams, along_axis, tensor_meta
from .promises import Snapshot

QUANTIZE = torch.ops.fxcompress.quantize.default
BINS = 64


@dataclass
class ValueHistogram:
    """The float values of one tensor, and the range its codes stand for.

    Attributes:
        node: of the float graph; a weight goes by the name of its layer.
        kind: "weight" or "activation" (on the example inputs).
        lo, hi: the extremes of the values; counts: of ``BINS`` equal bins between them.
        range_lo, range_hi: what the codes reach, of the widest channel where each has its own.
        outside: share 0..1 of the values that saturate.
    """

    node: str
    kind: str
    lo: float
    hi: float
    counts: list[int]
    range_lo: float
    range_hi: float
    outside: float


def value_histograms(float_level: Snapshot, qdq_level: Snapshot) -> list[ValueHistogram]:
    """One per integer weight, and one per tensor of codes that is in the float graph too."""
    rounded = qdq_level.graph_module
    chosen = {n.args[0].name: tensor_meta(n).qparams for n in calls(rounded, QUANTIZE)}
    return [*_weights(float_level.graph_module, rounded), *_activations(float_level, chosen)]


def _weights(exact: fx.GraphModule, rounded: fx.GraphModule) -> list[ValueHistogram]:
    originals = {node.name: node for node in exact.graph.nodes}
    found = []
    for node in calls(rounded, *WEIGHTED):
        if is_encoded(node.args[1]) and node.name in originals:
            weight = constant(exact, originals[node.name].args[1]).detach()
            reach = sum(_reach(rounded, summand) for summand in summands(node.args[1]))
            reach = rows(node, reach.expand_as(weight)).amax(1, keepdim=True)
            found.append(_histogram(node.name, "weight", rows(node, weight), -reach, reach))
    return found


def _reach(gm: fx.GraphModule, dequantize: fx.Node) -> Tensor:
    """The largest value of every row of an integer weight's summand, shaped like its scale."""
    return constant(gm, dequantize.args[1]).double() * tensor_meta(dequantize).qparams.qmax


def _activations(float_level: Snapshot, chosen: dict[str, QParams]) -> list[ValueHistogram]:
    found: list[ValueHistogram] = []

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if node.name in chosen and value.is_floating_point():
                q = chosen[node.name]
                ends = [along_axis(q.scale * (code - q.zero_point), q.axis, value.ndim) for code in (q.qmin, q.qmax)]
                found.append(_histogram(node.name, "activation", value.double(), *ends))
            return value

    if float_level.inputs:
        with torch.no_grad():
            Recorder(float_level.graph_module, garbage_collect_values=True).run(*float_level.inputs)
    return found


def _histogram(node: str, kind: str, values: Tensor, lowest: Tensor, highest: Tensor) -> ValueHistogram:
    """``lowest``, ``highest``: what the codes reach, broadcasting against ``values``. Half a step beyond is no saturation."""
    slack = (highest - lowest) / 255 / 2
    outside = ((values < lowest - slack) | (values > highest + slack)).double().mean()
    lo, hi = float(values.min()), float(values.max())
    counts = torch.histc(values.float(), BINS, lo, hi) if lo < hi else torch.tensor([float(values.numel())])
    return ValueHistogram(
        node, kind, lo, hi, [int(c) for c in counts], float(lowest.min()), float(highest.max()), float(outside)
    )  # fmt: skip
