"""How far integer weights are from the float ones: measured and proven, per layer and for the whole network.

Layer: a quantizer errs by at most ``error(bits)`` steps, and the step of a row is that of its last residual, so

    |W - W^| <= error * s_K,    s_K = s_1 / 2^((K-1)(bits-1))                  for every weight of a row with K orders

Network: with operator norms ``sigma_l >= |W_l|`` and ``e_l >= |W_l - W^_l|``, activations that shrink distances and keep 0, and
no biases, a chain moves by at most ``(prod (sigma_l + e_l) - prod sigma_l) |x|``; sums and concatenations extend this to graphs.
The operator norm of a convolution is bounded by ``sqrt(|.|_1 |.|_inf)``, the largest column and row sums of magnitudes: any
stride and padding, no singular values. The published bounds for K orders (Yvinec et al. 2023, eq. 3.18 and E.10) do not
hold; these do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .analysis.encoded_weights import EXPANSION, decode, is_encoded, layer_quantizer, rows, summands
from .analysis.quantization import is_activation, is_scaling
from .dialects import (
    ADAPTIVE_AVERAGE_POOLS,
    ADAPTIVE_MAX_POOL,
    ADD,
    AVERAGE_POOLS,
    CAT,
    CHANNEL_CLAMP,
    CLAMP,
    MAX_POOLS,
    SUB,
    WEIGHTED,
)  # fmt: skip
from .graph import argument, bounds, calls, constant, is_call, output_node
from .meta import tensor_meta
from .options import CompileOptions, context
from .power_exponent import ExponentChoice, exponent_choice

ops, aten = torch.ops.fxcompress, torch.ops.aten


@dataclass
class WeightError:
    """The weight of one layer.

    Attributes:
        rows: output channels; residuals: further orders of all of them together; accumulators: int32 sums added up.
        largest_error, bound: of |W - W^|, measured and proven, real units; sqnr: dB of the weight.
        sigma, error: bounds on the operator norms of W and W - W^.
    """

    node: str
    origin: str
    rows: int
    residuals: int
    accumulators: int
    largest_error: float
    bound: float
    sqnr: float
    sigma: float
    error: float


def weight_errors(exact: fx.GraphModule, rounded: fx.GraphModule) -> list[WeightError]:
    """One entry per layer with an integer weight. ``exact``, ``rounded``: float and qdq level of one compilation."""
    originals = {node.name: node for node in exact.graph.nodes}
    layers = [n for n in calls(rounded, *WEIGHTED) if is_encoded(n.args[1]) and n.name in originals]
    return [_layer(rounded, node, constant(exact, originals[node.name].args[1]).detach().double()) for node in layers]


def _layer(gm: fx.GraphModule, node: fx.Node, weight: Tensor) -> WeightError:
    difference = decode(gm, node.args[1]) - weight
    noise, signal = float(difference.square().sum()), float(weight.square().sum())
    expansion = node.meta.get(EXPANSION)
    return WeightError(
        node.name,
        tensor_meta(node).origin.module,
        len(rows(node, weight)),
        0 if expansion is None else int(expansion.residuals.sum()),
        len(summands(node.args[1])),
        float(difference.abs().max()),
        _bound(gm, node),
        10 * math.log10(signal / noise) if noise and signal else math.inf,
        operator_norm(node, weight),
        operator_norm(node, difference),
    )


def exponents(exact: fx.GraphModule, errors: list[WeightError], options: CompileOptions) -> ExponentChoice | None:
    """With ``weight_quantizer="power"``: what its exponent 1/2 costs against the best one."""
    if options.weight_quantizer != "power" or not errors:
        return None
    layers = [n for n in exact.graph.nodes if n.name in {e.node for e in errors}]
    weights = [rows(n, constant(exact, n.args[1]).detach()) for n in layers]
    if options.weight_granularity == "tensor":
        weights = [w.reshape(1, -1) for w in weights]
    return exponent_choice(weights, options.target.weight_bits)


def _bound(gm: fx.GraphModule, node: fx.Node) -> float:
    """The largest |W - W^| that the rounding allows."""
    codes, step = (constant(gm, a) for a in summands(node.args[1])[0].args[:2])
    if (expansion := node.meta.get(EXPANSION)) is not None:
        error = expansion.error[:, None]
    else:
        error = layer_quantizer(gm, node).error(context(gm).options.target.weight_bits)
    return float((rows(node, step.expand(codes.shape)) * error).max())


def operator_norm(node: fx.Node, weight: Tensor) -> float:
    """Upper bound of |layer(x)| / |x| in Euclidean norms: sqrt of the largest row sum times the largest column sum of |W|.

    A row is one output channel. A column is one input channel: what it sends to all outputs that read it.
    """
    magnitudes = rows(node, weight).abs()
    groups = node.args[6] if len(node.args) > 6 else 1
    taps = math.prod(weight.shape[2:])
    columns = magnitudes.reshape(groups, magnitudes.shape[0] // groups, -1, taps).sum((1, 3))
    return math.sqrt(float(magnitudes.sum(1).max()) * float(columns.max()))


# ------------------------------------------------------------------------------------------------------ the network

#: |f(x) - f(y)| <= gain |x - y| and f(0) = 0; what padding adds counts as a bias.
_GAINS = {
    aten.tanh.default: 1.0, aten.abs.default: 1.0, aten.neg.default: 1.0, aten.silu.default: 1.1, aten.gelu.default: 1.13,
    aten.hardswish.default: 1.5, aten.mean.dim: 1.0, aten.reshape.default: 1.0, aten.permute.default: 1.0,
    aten.slice.Tensor: 1.0, aten.select.int: 1.0, aten.clone.default: 1.0, ops.pad.default: 1.0, aten.constant_pad_nd.default: 1.0,
}  # fmt: skip


@dataclass
class NetworkBound:
    """Without its biases the network moves by at most ``absolute |x|``, and maps x to at most ``gain |x|``.

    Attributes:
        relative: their ratio.
        share: ``absolute |x| / |f(x)|`` of the worst example, None without examples: from 1 on the bound allows more than the
            outputs themselves, and says nothing. Norms multiply along the network, so it does for most deep ones.
        reason: why there is no bound, all others then None: an operator has none.
    """

    absolute: float | None
    gain: float | None
    relative: float | None
    reason: str = ""
    share: float | None = None

    def __str__(self) -> str:
        if self.absolute is None:
            return f"an unknown amount: {self.reason}"
        if self.share is None:
            return f"at most {self.absolute:.3g} of the norm of the input (proven)"
        if self.share < 1:
            return f"at most {self.share:.2g} of the outputs on the example (proven)"
        return "an unknown amount: what can be proven is more than the outputs themselves (weight_bound has it)"


def network_bound(
    exact: fx.GraphModule, errors: list[WeightError], inputs: Sequence[Tensor] = (), outputs: Sequence[Tensor] = ()
) -> NetworkBound:
    """The bound of the largest graph output, from the layers' norms. ``exact``: float level; inputs, outputs: an example."""
    bound = _bound_of_network(exact, errors)
    if bound.absolute is not None and inputs:
        bound.share = bound.absolute * _largest_ratio(inputs, outputs)
    return bound


def _largest_ratio(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """The largest |x| / |f(x)| of the examples, Euclidean norms of all inputs and of all outputs together."""
    of_inputs, of_outputs = (
        sum(t.double().reshape(len(t), -1).square().sum(1) for t in tensors if t.ndim).sqrt()
        for tensors in (inputs, outputs)
    )
    return float((of_inputs / of_outputs).max())


def _bound_of_network(exact: fx.GraphModule, errors: list[WeightError]) -> NetworkBound:
    norms = {e.node: (e.sigma, e.error) for e in errors}
    known: dict[fx.Node, tuple[float, float]] = {}  # node -> (gain, shift): |v| <= gain |x|, |v - v^| <= shift |x|
    for node in exact.graph.nodes:
        if not is_activation(node):
            continue
        if node.op == "placeholder":
            known[node] = (1.0, 0.0)
            continue
        inputs = [known[a] for a in node.all_input_nodes if a in known]
        if (result := _propagate(exact, node, inputs, norms)) is None:
            return NetworkBound(None, None, None, f"{node.target} at {node.name} has no bound")
        known[node] = result
    gain, shift = max((known[n] for n in output_node(exact).all_input_nodes if n in known), key=lambda pair: pair[1])
    return NetworkBound(shift, gain, shift / gain if gain else 0.0)


def _propagate(gm: fx.GraphModule, node: fx.Node, inputs: list, norms: dict) -> tuple[float, float] | None:
    if node.name in norms:
        ((gain, shift),), (sigma, error) = inputs, norms[node.name]
        return sigma * gain, (sigma + error) * (gain + shift) - sigma * gain
    if is_call(node, ADD, SUB):  # a constant operand is a bias
        return sum(g for g, _ in inputs), sum(s for _, s in inputs)
    if is_call(node, CAT):
        return math.hypot(*(g for g, _ in inputs)), math.hypot(*(s for _, s in inputs))
    factor = _gain(gm, node)
    if factor is None or len(inputs) != 1:
        return None
    ((gain, shift),) = inputs
    return factor * gain, factor * shift


def _gain(gm: fx.GraphModule, node: fx.Node) -> float | None:
    """The Lipschitz constant of an operator with one input that keeps 0, None for others."""
    if is_call(node, CLAMP, CHANNEL_CLAMP):
        lo, hi = (torch.as_tensor(0.0 if b is None else b) for b in bounds(gm, node))
        return 1.0 if bool((lo <= 0).all() and (hi >= 0).all()) else None
    if is_call(node, aten.leaky_relu.default):
        return max(1.0, abs(float(argument(node, "negative_slope"))))
    if is_scaling(node):
        return float(node.args[1])
    if is_call(node, *MAX_POOLS, *AVERAGE_POOLS):
        return _overlap(node)
    if is_call(node, *ADAPTIVE_AVERAGE_POOLS):
        return 1.0 if set(node.args[1]) == {1} else None
    if is_call(node, aten.index_select.default):
        return math.sqrt(int(constant(gm, node.args[2]).bincount().max()))
    return _GAINS.get(node.target)


def _overlap(node: fx.Node) -> float | None:
    """sqrt of the number of windows that read one value: each may take all of it, none amplifies it."""
    if is_call(node, ADAPTIVE_MAX_POOL):
        return None
    kernel, stride = argument(node, "kernel_size"), argument(node, "stride") or argument(node, "kernel_size")
    sizes = zip(kernel, stride if len(stride) == len(kernel) else stride * len(kernel), strict=True)
    return math.sqrt(math.prod(-(-k // s) for k, s in sizes))
