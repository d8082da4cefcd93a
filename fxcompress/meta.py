"""What passes share about a tensor: one ``TensorMeta`` in ``node.meta["fxcompress"]``.

Copy rules (the pass manager checks them after every pass):

* ``carry(old, new)``: ``new`` computes the *same tensor* as ``old``: everything is copied.
* a rewrite that *changes* what a node computes must replace or drop the node's ``statistics`` and ``range``
  (``describe(node, statistics=...)``); an unchanged ``Statistics`` object on a changed tensor is an error.
* a node inserted from nothing carries only an origin: ``inherit_origin(source, node)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

META_KEY = "fxcompress"


@dataclass(frozen=True)
class Origin:
    """Where a node came from in the user's program: ``module`` "layer1.0.conv1", ``source`` "model.py:31"."""

    module: str = ""
    source: str = ""

    def __str__(self) -> str:
        if self.module and self.source:
            return f"{self.module} ({self.source})"
        return self.module or self.source or "<graph>"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Distribution of a tensor, per channel ``(C,)`` along the node's channel axis or for all of it ``()``.

    Attributes:
        mean, std: float64 moments.
        lo, hi: float64 bounds of the values; hard support where known (ReLU: lo >= 0), else +-inf.
        provenance: "batch_norm", "propagated", "calibrated", "declared" (input_range) or "guessed".
    """

    mean: Tensor
    std: Tensor
    lo: Tensor
    hi: Tensor
    provenance: str

    def __post_init__(self):
        shapes = {tuple(t.shape) for t in (self.mean, self.std, self.lo, self.hi)}
        if len(shapes) != 1 or self.mean.ndim > 1:
            raise ValueError(f"Statistics need four tensors of one shape () or (C,), got {shapes}")

    @property
    def channels(self) -> int | None:
        """Number of channels, None when the statistics describe the whole tensor."""
        return self.mean.shape[0] if self.mean.ndim else None


@dataclass(frozen=True, eq=False)
class Range:
    """The interval chosen to be represented: float64 ``lo``, ``hi``, () or (C,); values outside saturate.

    ``provenance``: how it was chosen, for the report: "batch_norm 6 sigma", "calibrated mse", "declared", "guessed".
    """

    lo: Tensor
    hi: Tensor
    provenance: str

    @property
    def bounds(self) -> tuple[float, float]:
        """(lowest lo, highest hi) over the channels."""
        return float(self.lo.min()), float(self.hi.max())


@dataclass(frozen=True, eq=False)
class QParams:
    """``real = scale * (q - zero_point)``, ``qmin <= q <= qmax``.

    Attributes:
        scale: float64, shape () or (C,), > 0.
        zero_point: int32, same shape as scale, within [qmin, qmax].
        qmin, qmax: the code range, e.g. 0..255 (activations) or -127..127 (weights).
        axis: channel axis of a per-channel scale, None for a scalar one.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    axis: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes: uint8 or int8."""
        return torch.uint8 if self.qmin >= 0 else torch.int8

    def same(self, other: QParams) -> bool:
        """Whether codes mean the same numbers in both."""
        return (
            (self.qmin, self.qmax, self.axis) == (other.qmin, other.qmax, other.axis)
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )

    def broadcast(self, ndim: int) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) shaped to broadcast against a tensor of ``ndim`` dimensions."""
        return along_axis(self.scale, self.axis, ndim), along_axis(self.zero_point, self.axis, ndim)


def along_axis(vector: Tensor, axis: int | None, ndim: int) -> Tensor:
    """Shape a (C,) vector as (C, 1, ...) so that it broadcasts along ``axis`` of an ``ndim`` tensor; () is kept."""
    if vector.ndim == 0 or axis is None:
        return vector
    return vector.reshape([-1] + [1] * (ndim - 1 - axis % ndim))


@dataclass(frozen=True)
class TensorMeta:
    """The shared facts about the tensor a node computes. ``channel_axis`` is set by shape propagation."""

    origin: Origin = Origin()
    channel_axis: int | None = None
    statistics: Statistics | None = None
    range: Range | None = None
    qparams: QParams | None = None


def tensor_meta(node: fx.Node) -> TensorMeta:
    return node.meta.get(META_KEY) or TensorMeta()


def describe(node: fx.Node, **changes) -> None:
    """Replace fields of the node's ``TensorMeta``: ``describe(node, statistics=None)``."""
    node.meta[META_KEY] = replace(tensor_meta(node), **changes)


def carry(old: fx.Node, new: fx.Node) -> fx.Node:
    """``new`` computes the same tensor as ``old``: copy everything known about it (shape included)."""
    new.meta[META_KEY] = tensor_meta(old)
    for key in ("val", "nn_module_stack", "stack_trace"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    return new


def inherit_origin(source: fx.Node, new: fx.Node) -> fx.Node:
    """``new`` is a fresh tensor created on behalf of ``source``: only the origin is copied."""
    new.meta[META_KEY] = TensorMeta(origin=tensor_meta(source).origin)
    return new


def module_name(node: fx.Node) -> str:
    """The user's module that a node came from, "layer1.0.conv1"; the name of the node where that is not known."""
    return tensor_meta(node).origin.module or node.name


def module_names(nodes: Sequence[fx.Node], shown: int = 3) -> str:
    """Those of the first nodes, for messages: "conv1, conv2, conv3 and 2 more"."""
    names = ", ".join(map(module_name, nodes[:shown]))
    return names if len(nodes) <= shown else f"{names} and {len(nodes) - shown} more"


def lies_in(node: fx.Node, modules: Iterable[str]) -> bool:
    """Whether a node came from one of these modules or from inside one: "layer1.0.conv1" lies in "layer1"."""
    path = f"{tensor_meta(node).origin.module}."
    return any(path.startswith(f"{module}.") for module in modules)


def place(node: fx.Node) -> str:
    """Node and origin for messages: "conv2d_3 [layer1.0.conv1 (model.py:31)]"."""
    origin = str(tensor_meta(node).origin)
    return node.name if origin == "<graph>" else f"{node.name} [{origin}]"
