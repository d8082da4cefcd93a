"""Correct biases: what rounding adds to the mean of a layer's output is taken out of its bias again.

    analytic     b += -mean over positions of (W^ - W) * E[x]        no data: E[x] per channel from the statistics
    empirical    b += mean(float sum - quantized sum)                on calibration data, per channel, where the sum is seen

W^ are the dequantized integer weights. E[x] is that of the float network: batch norm's, propagated through clamps as a
clipped normal, or calibrated. The convolution is run on an image that holds E[x], so zero padding counts as it should. The
empirical correction goes through the layers in topological order and measures each with all those before it corrected: it
also takes out what the rounding and clipping of activations did.

A sum is seen where the clamp behind it (a ReLU, perhaps after an addition) lets it through, in the float network or in the
quantized one; everywhere without a clamp. The mean over all positions is what the source corrects. It asks the wrong ones: in
the last blocks of a ResNet most sums are far below 0, weaker signals bring them nearer to 0, and taking that mean out lowers
the few sums that are seen as well. At 4-bit activations ResNet-56's logits shrink to 0.37 of their size, and
EfficientNet-Lite0 falls to chance (docs/accuracy.md).

Level: qdq. Effect: LOSSY (biases move; the report says by how much). Layers without integer weights have nothing to correct.
Source: Nagel et al. 2019, Data-Free Quantization, section 4.2 and appendix B; the positions derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from fxcompress.analysis.encoded_weights import decode, is_encoded
from fxcompress.analysis.layer_weights import channel_dimension
from fxcompress.dialects import ADD, CHANNEL_CLAMP, CLAMP, WEIGHTED
from fxcompress.errors import CalibrationError
from fxcompress.graph import (
    add_constant,
    argument,
    bounds,
    calls,
    constant,
    is_call,
    is_constant,
    rank,
    shape,
    single_user,
)
from fxcompress.lockstep import Lockstep, record_inputs
from fxcompress.meta import along_axis, module_name, tensor_meta
from fxcompress.options import context
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan, Reject

CORRECTED = "bias_corrected"  # node.meta key: how, so that a layer is corrected once
#: Elements of the largest activation of all measured examples together: 256 MB of float32, which bounds the memory.
MOST_ELEMENTS = 1 << 26


class CorrectBias(Pass):
    name = "correct_bias"
    level = Level.QDQ
    effect = Effect.LOSSY
    source = "Nagel et al. 2019, section 4.2"
    needs = frozenset({Fact.QUANTIZED})

    def plan(self, gm: fx.GraphModule) -> Plan:
        """One match per layer whose bias moves.

        Raises ``CalibrationError`` when the option asks for "empirical" and there are no calibration data.
        """
        plan = Plan(self.name, gm)
        layers = [n for n in calls(gm, *WEIGHTED) if is_encoded(n.args[1]) and CORRECTED not in n.meta]
        if context(gm).options.bias_correction is None or not layers:
            return plan
        method, shifts = _shifts(gm, layers)
        for node in layers:
            shift = shifts[node]
            if shift is None:
                plan.rejects.append(Reject("no statistics reach its input", node))
            elif bool(shift.any()):
                rms, largest = float(shift.square().mean().sqrt()), float(shift.abs().max())
                summary = f"{method}: moves by {rms:.3g} rms, {largest:.3g} at most"
                plan.matches.append(Match(node, summary, (method, shift)))
        return plan

    def apply(self, plan: Plan) -> PassResult:
        gm = plan.graph_module
        for match in plan.matches:
            method, shift = match.data
            _move_bias(gm, match.node, shift)
            match.node.meta[CORRECTED] = method
            plan.applied += 1
        return PassResult(gm, plan.applied > 0)


def corrected_biases(gm: fx.GraphModule) -> dict[str, Tensor]:
    """The biases that were corrected in a qdq graph, by layer name: a further input shape reuses them."""
    layers = [n for n in calls(gm, *WEIGHTED) if CORRECTED in n.meta]
    return {n.name: constant(gm, n.args[2]).detach() for n in layers}


def _shifts(gm: fx.GraphModule, layers: list[fx.Node]) -> tuple[str, dict[fx.Node, Tensor | None]]:
    """How the corrections were found, and per layer the correction (O,) float64; None where nothing is known."""
    chosen, exact = context(gm).options.bias_correction, context(gm).float_graph
    if earlier := context(gm).choices.biases:
        none = torch.zeros(1, dtype=torch.float64)
        again = {n: earlier[n.name].double() - _bias(gm, n) if n.name in earlier else none for n in layers}
        return "as for the first input shape", again
    if chosen == "empirical" or (chosen == "auto" and context(gm).calibrate is not None):
        return "empirical", _measured(gm, exact, layers)
    return "analytic", _expected(gm, exact, layers)


def _bias(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    stored = argument(node, "bias")
    return torch.zeros((), dtype=torch.float64) if stored is None else constant(gm, stored).detach().double()


def _check_data(gm: fx.GraphModule) -> None:
    if context(gm).calibrate is None:
        raise CalibrationError('bias_correction="empirical" measures, and there are no calibration data', stage="correct_bias",
                               remedy='Pass calibration_data, or bias_correction="analytic".')  # fmt: skip


def _move_bias(gm: fx.GraphModule, node: fx.Node, shift: Tensor) -> None:
    bias = (_bias(gm, node) + shift).to(node.meta["val"].dtype)
    with gm.graph.inserting_before(node):
        new = add_constant(gm, f"{module_name(node)}.bias", bias, like=node)
    node.args = (*node.args[:2], new, *node.args[3:])


# ------------------------------------------------------------------------------------------------------------- analytic


def _expected(gm: fx.GraphModule, exact: fx.GraphModule, layers: list[fx.Node]) -> dict[fx.Node, Tensor | None]:
    originals = {node.name: node for node in exact.graph.nodes}
    return {node: _expected_shift(gm, node, exact, originals[node.name]) for node in layers}


def _expected_shift(gm: fx.GraphModule, node: fx.Node, exact: fx.GraphModule, original: fx.Node) -> Tensor | None:
    """-E[(W^ - W) x] per output channel (O,), float64."""
    source = original.args[0]
    meta = tensor_meta(source)
    if meta.statistics is None or not all(isinstance(n, int) for n in shape(source)[1:]):
        return None
    mean = along_axis(meta.statistics.mean.double(), meta.channel_axis, rank(source))
    image = mean.expand(1, *shape(source)[1:])
    error = decode(gm, node.args[1]) - constant(exact, original.args[1]).detach().double()
    output = node.target(image, error, None, *node.args[3:])
    return -output.mean([dim for dim in range(output.ndim) if dim != channel_dimension(node)])


# ------------------------------------------------------------------------------------------------------------ empirical


def _measured(gm: fx.GraphModule, exact: fx.GraphModule, layers: list[fx.Node]) -> dict[fx.Node, Tensor]:
    """Mean of float minus quantized sums (O,) of each layer where they are seen, those before it corrected."""
    _check_data(gm)
    batches = record_inputs(exact, context(gm).calibrate, _most_examples(gm))
    original, rounded = Lockstep(exact, batches), Lockstep(gm, batches)
    position, shifts = {node: i for i, node in enumerate(gm.graph.nodes)}, {}
    sums = {node: _clamped_sum(node, position) for node in layers}
    for node in sorted(layers, key=lambda layer: position[sums[layer][0]]):  # sums may follow further layers
        total, clamp = sums[node]
        values, axis = rounded.run_to(total.name), channel_dimension(node)
        seen = None if clamp is None else _inside(gm, clamp, axis)
        shifts[node] = shift = _mean_difference(original.run_to(total.name), values, axis, seen)
        correction = along_axis(shift.to(values[0].dtype), axis, rank(node))
        rounded.replace(total.name, [v + correction for v in values])
    return shifts


def _clamped_sum(node: fx.Node, position: dict[fx.Node, int]) -> tuple[fx.Node, fx.Node | None]:
    """The sum that a layer's bias goes into and the clamp that reads it; the layer and None without a clamp.

    Additions on the way must add something known by then: of two layers that are added, the later one answers for the sum.
    """
    total, reader = node, single_user(node)
    while reader is not None and is_call(reader, ADD) and shape(reader) == shape(node):
        if any(position[operand] > position[node] for operand in reader.all_input_nodes if operand is not total):
            return node, None
        total, reader = reader, single_user(reader)
    return (total, reader) if reader is not None and is_call(reader, CLAMP, CHANNEL_CLAMP) else (node, None)


def _inside(gm: fx.GraphModule, clamp: fx.Node, axis: int) -> Callable[[Tensor], Tensor]:
    """Where a clamp lets values through (bool, their shape)."""
    low, high = (b.flatten() if isinstance(b, Tensor) else b for b in bounds(gm, clamp))
    low, high = (along_axis(b, axis, rank(clamp)) if isinstance(b, Tensor) else b for b in (low, high))

    def inside(values: Tensor) -> Tensor:
        above = torch.ones_like(values, dtype=torch.bool) if low is None else values > low
        return above if high is None else above & (values < high)

    return inside


def _mean_difference(
    one: list[Tensor], other: list[Tensor], axis: int, seen: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Mean of one - other (O,) float64 over the positions that are ``seen`` in either; 0 for a channel without any."""
    dims = [dim for dim in range(one[0].ndim) if dim != axis]
    total, count = (torch.zeros(one[0].shape[axis], dtype=torch.float64) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        counted = torch.ones_like(a, dtype=torch.bool) if seen is None else seen(a) | seen(b)
        total += ((a - b) * counted).sum(dims, dtype=torch.float64)
        count += counted.sum(dims)
    return total / count.clamp(min=1)


def _most_examples(gm: fx.GraphModule) -> int:
    sizes = (
        math.prod(n for n in shape(node)[1:] if isinstance(n, int))
        for node in gm.graph.nodes
        if not is_constant(node) and "val" in node.meta and rank(node)
    )
    return max(1, MOST_ELEMENTS // max(sizes))
