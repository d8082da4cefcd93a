"""Fold batch norm, and what else scales and shifts channels by constants, into the neighboring layers.

At inference batch norm is y = a * x + d per channel, ``a = gamma / sqrt(var + eps)``, ``d = beta - a * mu``.

    backward, into the layers that write x:    W'[o, :] = a[o] * W[o, :]     b'[o] = a[o] * b[o] + d[o]
    forward, into the layers that read y:      W'[:, i] = W[:, i] * a[i]     b'[o] = b[o] + sum_i,k W[o, i, k] * d[i]

Between batch norm and those layers may lie anything that commutes with the map: additions, concatenations, pooling,
reshapes (``fxcompress.analysis.affine_regions`` has the table). One batch norm may fold into several layers; if one
path is blocked, none is touched. Forward past zero padding, the padding becomes ``-d/a`` of each channel, in an
explicit ``fxcompress::pad``: exact, and done only where these values lie in the known range of a graph input, which is
how ``input_normalization`` reaches the first layer.

Level: float. Effect: EXACT. Arithmetic in float64. Site preconditions: no tensor of the region has another consumer, no
weight another reader.   Source: Jacob et al. 2018, section 3.2 (adjacent pairs); regions: affine_regions.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.analysis.affine import Affine, affine_arguments, batch_norm_affine, constant_affine
from fxcompress.analysis.affine_regions import Edit, Region, backward_region, forward_region
from fxcompress.analysis.layer_weights import layer_channels, scale_inputs, scale_outputs
from fxcompress.dialects import BATCH_NORM
from fxcompress.graph import add_constant, argument, constant, erase_dead, is_call, rank, twins
from fxcompress.meta import carry, describe, inherit_origin, module_name, module_names, tensor_meta
from fxcompress.moments import declared_range
from fxcompress.rewrite import Effect, Fact, Level, Match, PassResult, Plan, Reject, RewriteRule
from fxcompress.shapes import compute


class FoldBatchNorm(RewriteRule):
    name = "fold_batch_norm"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "Jacob et al. 2018, section 3.2, extended to regions"
    needs = frozenset({Fact.STATISTICS})
    establishes = frozenset({Fact.BATCH_NORM_FOLDED})

    def match(self, node: fx.Node) -> Match | None:
        gm = node.graph.owning_module
        if not is_call(node, BATCH_NORM):
            return self._match_constant(gm, node)
        x, affine = node.args[0], Affine.per_channel(*batch_norm_affine(gm, node), ndim=rank(node))
        backward = backward_region(x, node, affine, self._shared)
        if isinstance(backward, Region):
            return Match(node, f"into {_names(backward)} (backward)", ("backward", x, backward))
        forward = forward_region(node, affine, _bounds(gm, x), self._shared)
        if isinstance(forward, Region):
            return Match(node, f"forward into {_names(forward)}", ("forward", x, forward))
        reasons = (f"{way}: {r.node.name}: {r.reason}" for way, r in (("backward", backward), ("forward", forward)))
        return Match(node, data=Reject("; ".join(reasons), node))

    def _match_constant(self, gm: fx.GraphModule, node: fx.Node) -> Match | None:
        """A multiplication or addition by constants along another axis than 1, such as the scale behind a linear."""
        found = constant_affine(gm, node)
        region = backward_region(found[0], node, found[1], self._shared) if found else None
        if isinstance(region, Region):
            return Match(node, f"into {_names(region)} (backward)", ("backward", found[0], region))
        return None

    def check(self, match: Match) -> Reject | None:
        return match.data if isinstance(match.data, Reject) else None

    def rewrite(self, match: Match, gm: fx.GraphModule) -> None:
        direction, x, region = match.data
        backward = direction == "backward"
        for tensor, affine in region.tensors.items():
            transform_meta(tensor, affine if backward else affine.inverse())
        if backward and (statistics := tensor_meta(match.node).statistics) is not None:
            describe(x, statistics=statistics)
        for edit in region.edits:
            apply_edit(gm, edit, backward)
        match.node.replace_all_uses_with(x)
        gm.graph.erase_node(match.node)

    _shared: dict | None = None  # constants named by several nodes, while many matches ask for them

    def plan(self, gm: fx.GraphModule) -> Plan:
        self._shared = twins(gm.graph)
        try:
            return super().plan(gm)
        finally:
            self._shared = None

    def apply(self, plan: Plan) -> PassResult:
        self._shared = twins(plan.graph_module.graph)  # new constants have new names
        try:
            result = super().apply(plan)
        finally:
            self._shared = None
        erase_dead(plan.graph_module)
        return result


def _names(region: Region) -> str:
    return module_names(region.layers) or "constants"


def _bounds(gm: fx.GraphModule, x: fx.Node) -> tuple[float, float] | None:
    """The interval that the user declared for every channel of a graph input, None for any other tensor."""
    declared = declared_range(gm, x) if x.op == "placeholder" else None
    return None if declared is None else (float(declared[0].max()), float(declared[1].min()))


def transform_meta(tensor: fx.Node, affine: Affine) -> None:
    """The tensor's values become ``affine`` of what they were, its statistics with them."""
    meta = tensor_meta(tensor)
    describe(tensor, statistics=affine.statistics(meta.statistics, meta.channel_axis), range=None)


# ------------------------------------------------------------------------------------------------------------- editing


def apply_edit(gm: fx.GraphModule, edit: Edit, backward: bool) -> None:
    """Carry out one edit of a backward or a forward region."""
    with gm.graph.inserting_before(edit.node):
        if edit.constant is not None:
            _rewrite_constant(gm, edit)
        elif is_call(edit.node, BATCH_NORM):
            _compose(gm, edit, backward)
        elif is_call(edit.node, torch.ops.aten.constant_pad_nd.default):
            _replace_pad(gm, edit)
        else:
            _rewrite_layer(gm, edit, backward)


def _rewrite_constant(gm: fx.GraphModule, edit: Edit) -> None:
    old = constant(gm, edit.constant)
    new = (edit.affine.scale * old.double() + edit.affine.shift).to(old.dtype)
    edit.node.replace_input_with(edit.constant, add_constant(gm, edit.constant.target, new, like=edit.constant))


def _compose(gm: fx.GraphModule, edit: Edit, backward: bool) -> None:
    """Two maps in a row are one."""
    scale, shift = batch_norm_affine(gm, edit.node)
    outer_scale, outer_shift = edit.affine.channels(len(scale))
    if backward:
        scale, shift = outer_scale * scale, outer_scale * shift + outer_shift
    else:
        scale, shift = scale * outer_scale, scale * outer_shift + shift
    edit.node.args = affine_arguments(gm, edit.node.args[0], scale, shift, like=edit.node)


def _rewrite_layer(gm: fx.GraphModule, edit: Edit, backward: bool) -> None:
    node = edit.node
    stored = constant(gm, node.args[1])
    weight = stored.detach().double()
    inputs, outputs = layer_channels(node, weight)
    bias = torch.zeros(outputs, dtype=torch.float64)
    if node.args[2:] and node.args[2] is not None:
        bias = constant(gm, node.args[2]).detach().double()
    if backward:
        scale, shift = edit.affine.channels(outputs)
        weight, bias = scale_outputs(node, weight, scale), scale * bias + shift
    else:
        scale, shift = edit.affine.channels(inputs)
        if edit.affine.shifts:
            bias = bias + scale_inputs(node, weight, shift).flatten(1).sum(1)
        weight = scale_inputs(node, weight, scale)
    x = node.args[0] if edit.padding is None else _explicit_pad(gm, node, edit.padding.to(stored.dtype))
    name = module_name(node)
    new_weight = add_constant(gm, f"{name}.weight", weight.to(stored.dtype), like=node)
    new_bias = add_constant(gm, f"{name}.bias", bias.to(stored.dtype), like=node)
    node.args = (x, new_weight, new_bias, *node.args[3:])
    if edit.padding is not None:
        node.update_arg(4, [0] * (rank(node) - 2))  # (x, weight, bias, stride, padding, dilation, groups)


def _explicit_pad(gm: fx.GraphModule, conv: fx.Node, value: Tensor) -> fx.Node:
    """Pad the input of a convolution with ``value`` (C,), as far as the convolution padded it with zeros."""
    sides = [side for p in argument(conv, "padding") for side in (p, p)]
    return _pad(gm, conv, conv.args[0], sides, value)


def _replace_pad(gm: fx.GraphModule, edit: Edit) -> None:
    """aten pads list the last dimension first, fxcompress::pad the first spatial dimension."""
    node = edit.node
    pad = list(argument(node, "pad")) + [0] * (2 * rank(node))
    sides = [side for i in reversed(range(rank(node) - 2)) for side in pad[2 * i : 2 * i + 2]]
    new = _pad(gm, node, node.args[0], sides, edit.padding.to(node.meta["val"].dtype))
    meta = tensor_meta(node)
    node.replace_all_uses_with(carry(node, new))
    describe(new, origin=meta.origin)
    gm.graph.erase_node(node)


def _pad(gm: fx.GraphModule, like: fx.Node, x: fx.Node, sides: list[int], value: Tensor) -> fx.Node:
    constant_node = add_constant(gm, f"{like.name}_padding", value, like=like)
    new = gm.graph.call_function(torch.ops.fxcompress.pad.default, (x, sides, constant_node))
    if like.meta.get("keep_float"):
        new.meta["keep_float"] = True
    inherit_origin(like, new)
    for node in (constant_node, new):
        compute(gm, node)  # later folds of this plan ask for shapes
    return new
