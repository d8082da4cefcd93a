"""The requantization a kernel applies to its accumulators (``fxc_requantize``), from the arguments of the operator."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.graph import is_call
from fxcompress.numerics import Dyadic, rounding_constant

from . import structs
from .fusion import Group, parameter_dims
from .planner import Planner, branch_source
from .views import View

ops = torch.ops.fxcompress


@dataclass(frozen=True, eq=False)
class Target:
    """Where a kernel's results go: the node they are the value of, and what happens to the accumulators on the way."""

    node: fx.Node
    group: Group | None  # None: int32 accumulators

    @classmethod
    def of(cls, node: fx.Node, group: Group | None) -> Target:
        return cls(group.result if group else node, group)


def requantize_struct(planner: Planner, group: Group, channels: int | tuple[int, ...], *, folded: bool = False):
    """Pointer to the parameters of a group with ``channels`` entries per array, or as many as a shape of parameters has.

    ``folded``: the rounding constant of the host's branch is in its bias already.
    """
    constants = planner.constants
    args = group.requantize.args
    zero_point, guard_bits, lo, hi = (planner.constant(a) if isinstance(a, fx.Node) else a for a in args[4:8])
    branches = (structs.Branch * len(args[0]))()
    for position, i in enumerate(group.branches):
        source, d = args[0][i], branch_dyadic(planner, group, i)
        offset = rounding_constant(d, first=i == 0)
        is_host = group.host is not None and position == 0
        if is_host and folded:
            offset = torch.zeros_like(offset)
        elif not is_host and is_call(source, ops.widen.default):
            offset = offset - planner.constant(source.args[1])
        branches[position] = structs.Branch(
            constants.per_channel(offset, channels, "int32"), constants.per_channel(d.right_shift, channels, "int32"),
            constants.per_channel(d.multiplier, channels, "int16"), d.left_shift,
            int(planner.shapes[branch_source(source)].dtype == torch.int32),
        )  # fmt: skip
    zero = (zero_point.to(torch.int32) << guard_bits) + ((1 << guard_bits) >> 1)
    table = planner.constant(group.table.args[1]) if group.table is not None else None
    constants.keep(branches)
    return constants.pointer(structs.Requantize(
        len(branches), channels if isinstance(channels, int) else math.prod(channels), guard_bits, 0, ctypes.cast(branches, ctypes.POINTER(structs.Branch)),
        constants.per_channel(zero, channels, "int16"), constants.per_channel(lo, channels, "uint8"),
        constants.per_channel(hi, channels, "uint8"), None if table is None else constants.array(table, "uint8"),
    ))  # fmt: skip


def branch_dyadic(planner: Planner, group: Group, index: int) -> Dyadic:
    _, multiplier, right_shift, left_shift = group.requantize.args[:4]
    return Dyadic(planner.constant(multiplier[index]), planner.constant(right_shift[index]), left_shift[index])


def group_varying_dims(planner: Planner, group: Group) -> tuple[int, ...]:
    """The dimensions along which the parameters of a group's requantization vary."""
    return parameter_dims(planner.gm, group.requantize, planner.rank(group.requantize))


def pixel_branches(planner: Planner, target: Target, order: str, pixels, where=None) -> tuple[list[View], list[int]]:
    """The other branches of a group as tensors whose pixels are evenly spaced, and their pixel strides.

    where: selects the part of a branch that is needed; None: all of it.
    """
    if target.group is None:
        return [], []
    views, strides = [], []
    for view in planner.branch_inputs(target.group):
        view = evenly_spaced(planner, where(view) if where else view, order, target.node, pixels)
        views.append(view)
        strides.append(pixels(view).pixel_stride)
    return views, strides


def evenly_spaced(planner: Planner, view: View, order: str, node: fx.Node, pixels) -> View:
    """``view`` if one stride leads from each pixel to the next, else a dense copy."""
    found = pixels(view)
    return view if found is not None and found.pixel_stride is not None else planner.dense(view, order, node)


def with_channels_inside(planner: Planner, view: View, order: str, node: fx.Node, pixels) -> View:
    """``view`` if its channels lie side by side, else a dense copy."""
    return view if pixels(view) is not None else planner.dense(view, order, node)


def scalar(value: Tensor) -> int:
    """A zero point that must be one number. Raises ``ValueError`` for a per-channel one."""
    if value.numel() != 1:
        raise ValueError("per-channel zero points are not supported here")
    return int(value)
