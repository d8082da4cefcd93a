"""Equalize consecutive layers: divide a channel where it is written, multiply it where it is read.

    W1[i] /= s_i    b1[i] /= s_i    W2[:, i] *= s_i    s_i = sqrt(r1_i / r2_i)
    r1_i = max|W1[i]| / max|W1|    r2_i = max|W2[:, i]| / max|W2|

Afterwards r1_i = r2_i for every channel: a weight scale shared by all rows, or by the columns of a row, loses least.
(Nagel et al. take r without the layer's maximum, which differs by one common factor per pair; with it, writers of different
magnitude can be compared, and a chain converges without drifting.) The channels may pass through anything that commutes with
a positive factor; all writers and readers of a residual stream share one s, from the largest of their r. Bounds of a clamp
other than 0 are divided as well, so that ReLU6 stays what it is: it becomes a clamp with one bound per channel. Chains
(depthwise layers in the middle) are swept until s settles. A channel that nothing writes or nothing reads (a row or column of
zeros, or of weights below 1e-4 of the layer's largest) keeps s = 1.

Level: float. Effect: EXACT. Arithmetic in float64; statistics and ranges are divided with their tensors.
Source: Nagel et al. 2019, Data-Free Quantization, section 4.1; docs/passes.md for clamps, ties and chains.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from fxcompress import dialects as d
from fxcompress.analysis.affine_rules import is_homogeneous
from fxcompress.analysis.layer_groups import CHANNEL_PAD, CLAMPS, FIXED, Group, LayerGroups
from fxcompress.analysis.layer_weights import largest_weights, scale_inputs, scale_outputs
from fxcompress.graph import add_constant, bounds, constant, is_call, is_constant
from fxcompress.meta import Range, Statistics, describe, module_name, tensor_meta
from fxcompress.options import context
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan

#: Rows and columns whose share of the layer's largest weight is smaller count as dead: real networks have many below 1e-6,
#: decayed weights of channels that batch norm made constant, and hardly any from there to 1e-2.
LOG_DEAD = math.log(1e-4)
SWEEPS = 100  # at most, per plan
NEGLIGIBLE = 0.04  # change of log s: ranges within 4 % of each other count as equal
SETTLED = NEGLIGIBLE / 2  # where sweeping stops, so that a second plan finds nothing to do


class EqualizeCrossLayer(Pass):
    name = "equalize_cross_layer"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "Nagel et al. 2019, section 4.1"
    needs = frozenset({Fact.BATCH_NORM_FOLDED})
    atomic = True  # groups share layers: half of a plan is not balanced

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan = Plan(self.name, gm)
        if not context(gm).options.equalize:
            return plan
        groups = LayerGroups(gm)
        scale = balance(gm, groups)
        for group in groups.groups:
            if group.blocked is not None:
                plan.rejects.append(group.blocked)
                continue
            own = scale[torch.cat([groups.outputs[n] for n in group.writers]).unique()]
            if bool((own != 1).any()):
                summary = f"{group}, {own.numel()} scales {float(own.min()):.3g}..{float(own.max()):.3g}"
                plan.matches.append(Match(group.writers[0], summary, (groups, scale)))
        return plan

    def apply(self, plan: Plan) -> PassResult:
        if plan.matches:
            groups, scale = plan.matches[0].data
            _rescale(plan.graph_module, groups, scale)
            plan.applied = len(plan.matches)
        return PassResult(plan.graph_module, plan.applied > 0)


# --------------------------------------------------------------------------------------------------------------- scales


def balance(gm: fx.GraphModule, groups: LayerGroups) -> Tensor:
    """The scale of every label, (groups.count,) float64: what its tensors are divided by; all 1 where that is settled."""
    layers = {node: _Layer(gm, node, groups) for node in groups.inputs}
    log_scale = torch.zeros(groups.count, dtype=torch.float64)
    for sweep in range(SWEEPS):
        largest = 0.0
        for group in groups.groups:
            written, read = _shares(layers, group, log_scale)
            alive = torch.minimum(written, read) > LOG_DEAD
            alive[FIXED] = False
            step = torch.where(alive, 0.5 * (written - read), 0.0)
            log_scale += step
            largest = max(largest, float(step.abs().max()))
        if sweep == 0 and largest <= NEGLIGIBLE:
            return torch.ones_like(log_scale)
        if largest <= SETTLED:
            break
    return log_scale.exp()


def _shares(layers: dict[fx.Node, _Layer], group: Group, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Per label, the logarithm of the largest weight that writes and that reads it, as a share of its layer's largest."""
    written, read = (torch.full_like(log_scale, -torch.inf) for _ in range(2))
    for node in group.writers:
        written.scatter_reduce_(0, layers[node].outputs, layers[node].row_shares(log_scale), "amax")
    for node in group.readers:
        read.scatter_reduce_(0, layers[node].inputs, layers[node].column_shares(log_scale), "amax")
    return written, read


class _Layer:
    """The largest weight of every pair of channels, (G, O/G, I/G) logarithms, with the labels of rows and columns.

    float32 is precise enough for finding scales; what they are applied to is float64.
    """

    def __init__(self, gm: fx.GraphModule, node: fx.Node, groups: LayerGroups):
        self.largest = largest_weights(node, constant(gm, node.args[1]).detach()).float().log()
        self.inputs, self.outputs = groups.inputs[node], groups.outputs[node]

    def row_shares(self, log_scale: Tensor) -> Tensor:
        """(O,): the largest weight of every row after scaling, over the layer's largest; -inf for a row of zeros."""
        count, _, columns = self.largest.shape
        rows = (self.largest + log_scale[self.inputs].float().reshape(count, 1, columns)).amax(2).flatten()
        rows = rows - log_scale[self.outputs]
        return rows - rows.max()

    def column_shares(self, log_scale: Tensor) -> Tensor:
        """(I,), likewise."""
        count, rows, _ = self.largest.shape
        columns = (self.largest - log_scale[self.outputs].float().reshape(count, rows, 1)).amax(1).flatten()
        columns = columns + log_scale[self.inputs]
        return columns - columns.max()


# -------------------------------------------------------------------------------------------------------------- editing


def _rescale(gm: fx.GraphModule, groups: LayerGroups, scale: Tensor) -> None:
    for node in groups.scaled_tensors():
        factor = scale[groups.labels[node]]
        _rescale_meta(node, factor)
        if is_call(node, *CLAMPS) and not is_homogeneous(node):
            _rescale_bounds(gm, node, factor)
        elif is_call(node, d.ADD, d.SUB, CHANNEL_PAD):
            _rescale_constants(gm, node, factor)
    for node in groups.inputs:
        columns, rows = scale[groups.inputs[node]], scale[groups.outputs[node]]
        if bool((columns != 1).any() or (rows != 1).any()):
            _rescale_layer(gm, node, columns, rows)


def _rescale_layer(gm: fx.GraphModule, node: fx.Node, columns: Tensor, rows: Tensor) -> None:
    stored = constant(gm, node.args[1]).detach()
    weight = scale_outputs(node, scale_inputs(node, stored.double(), columns), 1 / rows)
    name = module_name(node)
    with gm.graph.inserting_before(node):
        node.update_arg(1, add_constant(gm, f"{name}.weight", weight.to(stored.dtype), like=node))
        if len(node.args) > 2 and node.args[2] is not None:
            bias = constant(gm, node.args[2]).detach().double() / rows
            node.update_arg(2, add_constant(gm, f"{name}.bias", bias.to(stored.dtype), like=node))


def _rescale_bounds(gm: fx.GraphModule, node: fx.Node, factor: Tensor) -> None:
    """The clamp, in place, with bounds (C, 1, 1)."""
    dtype = node.meta["val"].dtype
    values = [None if b is None else torch.as_tensor(b, dtype=torch.float64) / factor[0] for b in bounds(gm, node)]
    with gm.graph.inserting_before(node):
        new = [None if v is None else add_constant(gm, f"{node.name}_bound", v.to(dtype), like=node) for v in values]
    node.target, node.args, node.kwargs = d.CHANNEL_CLAMP, (node.args[0], *new), {}


def _rescale_constants(gm: fx.GraphModule, node: fx.Node, factor: Tensor) -> None:
    """A constant operand of a sum; the values (C,) that a pad puts around an image."""
    for old in [a for a in node.args if is_constant(a)]:
        value = constant(gm, old).detach()
        divisor = factor.flatten() if is_call(node, CHANNEL_PAD) else factor
        with gm.graph.inserting_before(node):
            node.replace_input_with(
                old, add_constant(gm, old.target, (value.double() / divisor).to(value.dtype), like=node)
            )


def _rescale_meta(node: fx.Node, factor: Tensor) -> None:
    """Statistics and range of the tensor, divided; dropped where its channels do not all have one factor."""
    meta = tensor_meta(node)
    axis = meta.channel_axis
    if bool((factor == 1).all()):
        return
    if axis is None or any(n > 1 for dim, n in enumerate(factor.shape) if dim != axis):
        describe(node, statistics=None, range=None)
        return
    s = factor.flatten() if factor.numel() > 1 else factor.flatten()[0]
    old, chosen = meta.statistics, meta.range
    describe(
        node,
        statistics=None
        if old is None
        else Statistics(*(t / s for t in (old.mean, old.std, old.lo, old.hi)), old.provenance),
        range=None if chosen is None else Range(chosen.lo / s, chosen.hi / s, chosen.provenance),
    )
