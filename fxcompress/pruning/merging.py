"""Redundant neurons: a removed channel that computes what another one computes is not lost, its readers read the other one (RED).

    x_r = scale x_t   =>   V_r x_r + V_t x_t = (V_t + scale V_r) x_t

Exact where everything that writes the two is alike: rows of all their layers with bias and batch norm folded in, and
constants on the way; approximate where they are similar. ``scale`` is 1, or, where all operators on the way are positively
homogeneous (ReLU, pooling, sums, not ReLU6 or SiLU), what fits best. Two channels can only be merged if they lie in the same
tensors and are read by the same layers; those over which a product of activations sums (queries and keys of a single head)
cannot.

Source: Yvinec et al. 2021, RED, section 3.2 (merging), and its angular form (thesis, equation 2.5); conditions derived here.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, fx

from .. import dialects as d
from ..analysis.affine_rules import is_transparent
from ..analysis.channel_groups import Axis, ChannelGroups, Group, batch_norm_of
from ..analysis.channel_layer_rules import goes_by_groups
from ..graph import argument, calls, constant, is_call, is_constant, set_constant
from ..meta import along_axis
from .costs import nothing

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Merges:
    """Per unit (units,): ``into``, the unit that takes over, 0 if none; ``scale``, the factor.

    ``error``: per unit |v_r - scale v_t| / |v_r| of what writes it; 0 where the merge is exact.
    """

    into: Tensor
    scale: Tensor
    error: Tensor

    @property
    def count(self) -> int:
        return int((self.into > 0).sum())


def find_merges(groups: ChannelGroups, removed: Tensor, scaled: bool = False) -> Merges:
    """For every removed unit (units,) the most similar one that stays; ``scaled``: by angle, where that is exact."""
    kinds = _kinds(groups)
    into, scale = torch.zeros(groups.count, dtype=torch.int64), torch.ones(groups.count, dtype=torch.float64)
    error = torch.zeros(groups.count, dtype=torch.float64)
    for group in groups.groups:
        units = torch.tensor(group.units)
        vectors, factors = neurons(groups, group), scaled and _keeps_factors(groups, group)
        for kind in kinds[units].unique().tolist():
            of_kind = (kinds[units] == kind) & (kind != 0)
            gone, kept = ((of_kind & (removed[units] == flag)).nonzero().flatten() for flag in (True, False))
            if len(gone) and len(kept):
                target, factor = _nearest(vectors[gone], vectors[kept], factors)
                into[units[gone]], scale[units[gone]] = units[kept[target]], factor
                left = vectors[gone] - factor[:, None] * vectors[kept[target]]
                error[units[gone]] = left.norm(dim=1) / vectors[gone].norm(dim=1).clamp(min=1e-300)
    return Merges(into, scale, error)


def _nearest(gone: Tensor, kept: Tensor, scaled: bool) -> tuple[Tensor, Tensor]:
    """(index of the kept row, factor > 0) for every row that goes."""
    if not scaled:
        distances = torch.cdist(gone, kept, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.argmin(1), torch.ones(len(gone), dtype=torch.float64)
    products, squares = gone @ kept.t(), kept.square().sum(1).clamp(min=1e-300)
    cosines = products / squares.sqrt()
    target = cosines.argmax(1)
    factor = products.gather(1, target[:, None]).flatten() / squares[target]
    return target, factor.clamp(min=0)


def neurons(groups: ChannelGroups, group: Group) -> Tensor:
    """(units, D) everything that writes a unit of the group: effective weights and biases of all layers, other constants as they are.

    The part of every layer is divided by its mean norm, so that layers count alike.
    """
    parts, folded, columns = [], set(), _column_axes(groups)
    for layer in group.layers:
        rows = constant(groups.gm, layer.node.args[0 if is_call(layer.node, d.EMBEDDING) else 1]).double()
        rows = rows.movedim(layer.rows.axis, 0).flatten(1)
        bias = None if is_call(layer.node, d.EMBEDDING) else argument(layer.node, "bias")
        shift = torch.zeros(len(rows), dtype=torch.float64)
        if bias is not None and constant(groups.gm, bias).numel() == len(rows):
            shift = constant(groups.gm, bias).double()
            folded.add(bias.target)
        folded.add(layer.rows.target)
        norm = batch_norm_of(layer)
        if norm is not None and constant(groups.gm, norm.args[3]).numel() == len(rows):
            weight, beta, mean, var = (None if a is None else constant(groups.gm, a).double() for a in norm.args[1:5])
            factor = (1.0 if weight is None else weight) / (var + argument(norm, "eps")).sqrt()
            rows, shift = rows * factor[:, None], factor * (shift - mean) + (0.0 if beta is None else beta)
            folded |= {a.target for a in norm.args[1:5] if a is not None}
        parts.append(_of_units(torch.cat([rows, shift[:, None]], 1), layer.rows.units, group))
    for axis in group.axes:
        if axis.target not in folded and (axis.target, axis.axis) not in columns:
            value = attrgetter(axis.target)(groups.gm).double()
            parts.append(_of_units(value.movedim(axis.axis, 0).reshape(len(axis.units), -1), axis.units, group))
    return torch.cat([part / part.norm(dim=1).mean().clamp(min=1e-300) for part in parts], 1)


def _of_units(values: Tensor, units: Tensor, group: Group) -> Tensor:
    """(units of the group, D): the rows of ``values`` that belong to each; a constant shape where a unit has as many rows as the others."""
    found = [values[units == unit].flatten() for unit in group.units]
    length = max(map(len, found))
    return torch.stack([torch.nn.functional.pad(part, (0, length - len(part))) for part in found])


def merge_columns(groups: ChannelGroups, merges: Merges) -> None:
    """Add the columns of the units that go to those of the units that take over, in place of the layers' weights."""
    for target, axis in _column_axes(groups).items():
        gone, kept, scale = pairs(axis.units, merges)
        if len(gone):
            value = attrgetter(axis.target)(groups.gm)
            added = value.double().index_select(axis.axis, gone) * along_axis(scale, axis.axis, value.ndim)
            set_constant(groups.gm, target[0], value.double().index_add(axis.axis, kept, added).to(value.dtype))


def copy_neurons(groups: ChannelGroups, merges: Merges, gm: fx.GraphModule) -> None:
    """What the merged network computes: in ``gm``, a copy of the graph, every unit that goes becomes one of that which takes over."""
    columns, scaled = _column_axes(groups), _scaled_constants(groups)
    for axis in groups.axes:
        gone, kept, scale = pairs(axis.units, merges)
        if (axis.target, axis.axis) not in columns and len(gone):
            value = attrgetter(axis.target)(gm)
            copied = value.index_select(axis.axis, kept)
            if axis.target in scaled:
                copied = copied * along_axis(scale, axis.axis, value.ndim).to(value.dtype)
            set_constant(gm, axis.target, value.index_copy(axis.axis, gone, copied))


def _scaled_constants(groups: ChannelGroups) -> set[str]:
    """The constants that take a neuron's factor: gamma and beta behind a layer, else its weight and bias."""
    found = set()
    for layer in groups.layers:
        norm = batch_norm_of(layer)
        operands = layer.node.args[1:3] if norm is None or norm.args[1] is None else norm.args[1:3]
        found |= {a.target for a in operands if isinstance(a, fx.Node)}
    return found


def _column_axes(groups: ChannelGroups) -> dict[tuple[str, int], Axis]:
    """The axes along which layers read channels, by (constant, axis)."""
    axes = {(axis.target, axis.axis): axis for axis in groups.axes}
    found = {}
    for layer in groups.layers:
        if layer.columns is not None and not goes_by_groups(layer.node, constant(groups.gm, layer.node.args[1])):
            key = layer.rows.target, 0 if is_call(layer.node, *d.TRANSPOSED_CONVOLUTIONS) else 1
            if key in axes:
                found[key] = axes[key]
    return found


def pairs(units: Tensor, merges: Merges) -> tuple[Tensor, Tensor, Tensor]:
    """(indices that go, indices that take over, factors) among ``units`` (size,); the n-th of a unit with the n-th of the other."""
    gone, kept, scale = [], [], []
    for unit in units[merges.into[units] > 0].unique().tolist():
        own, other = ((units == u).nonzero().flatten().tolist() for u in (unit, int(merges.into[unit])))
        gone, kept, scale = gone + own, kept + other, scale + [float(merges.scale[unit])] * len(own)
    return torch.tensor(gone, dtype=torch.int64), torch.tensor(kept, dtype=torch.int64), torch.tensor(scale).double()


def _kinds(groups: ChannelGroups) -> Tensor:
    """(units,) a number per unit, equal for units that lie in the same tensors and constants as often; 0: not to be merged."""
    random = torch.Generator().manual_seed(0)
    kinds = torch.zeros(groups.count, dtype=torch.int64)
    for units in [axis.units for axis in groups.axes] + [units.flatten() for units in groups.tensors.values()]:
        weight = int(torch.randint(1, 1 << 40, (), generator=random))
        kinds += torch.bincount(units, minlength=groups.count) * weight  # as a hash of the counts: wraps
    kinds[kinds == 0] = 1
    for node in calls(groups.gm, d.MATMUL):
        for operand, dim in zip(node.args[:2], (-1, -2), strict=True):
            units = groups.tensors.get(operand)
            if units is not None and units.ndim >= 2 and units.shape[dim] > 1:
                kinds[units.flatten()] = 0
    return kinds


def _keeps_factors(groups: ChannelGroups, group: Group) -> bool:
    """Whether f(a x) = a f(x), a > 0, holds of every operator on tensors of the group."""
    own = nothing(groups)
    own[list(group.units)] = True
    directly = {batch_norm_of(layer) for layer in group.layers}
    plain_norm = any(norm is not None and None in norm.args[1:3] for norm in directly)
    readers = [layer.node for layer in group.layers if layer.columns is not None]
    if plain_norm or any(goes_by_groups(node, constant(groups.gm, node.args[1])) for node in readers):
        return False
    touched = (node for node, units in groups.tensors.items() if bool(own[units].any()))
    return all(node in directly or _keeps_factor(node) for node in touched)


def _keeps_factor(node: fx.Node) -> bool:
    if is_call(node, d.ADD, d.SUB):  # of a constant it would shift the channel
        return all(isinstance(a, fx.Node) and not is_constant(a) for a in node.args[:2])
    return is_transparent(node) or is_call(node, *d.WEIGHTED, *d.MOVEMENT, d.CAT, aten.mean.dim)
