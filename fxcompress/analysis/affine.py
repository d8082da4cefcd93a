"""The per-channel affine map ``y = scale * x + shift``, and the operators that are one.

A map is broadcast against the tensor it acts on, so that one form serves channels in any dimension: the map of a batch
norm on (N, C, H, W) is (1, C, 1, 1), behind a flatten it is (1, C*H*W), behind a permute (1, 1, 1, C).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..dialects import ADD, MUL, SUB
from ..errors import ModelError
from ..graph import add_constant, argument, constant, is_call, is_constant, shape
from ..meta import Statistics, place


@dataclass(frozen=True, eq=False)
class Affine:
    """``x -> scale * x + shift``: float64, of the rank of x, each dimension 1 or that of x. NaN means "any value".

    >>> Affine.per_channel(torch.tensor([2.0, 3.0]), torch.zeros(2), ndim=4).scale.shape
    torch.Size([1, 2, 1, 1])
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def per_channel(cls, scale: Tensor, shift: Tensor, ndim: int, axis: int = 1) -> Affine:
        """Both (C,), along ``axis`` of a tensor of ``ndim`` dimensions."""
        axis %= ndim
        view = [1] * axis + [-1] + [1] * (ndim - 1 - axis)
        return cls(scale.double().reshape(view), shift.double().reshape(view))

    @classmethod
    def identity(cls, ndim: int) -> Affine:
        return cls(torch.ones([1] * ndim, dtype=torch.float64), torch.zeros([1] * ndim, dtype=torch.float64))

    @property
    def shifts(self) -> bool:
        return bool((self.shift != 0).any())

    @property
    def keeps_order(self) -> bool:
        return bool((self.scale > 0).all())

    def varies_outside(self, axis: int) -> bool:
        """Some entry depends on a dimension other than ``axis``."""
        axis %= self.scale.ndim
        return any(size > 1 for t in (self.scale, self.shift) for dim, size in enumerate(t.shape) if dim != axis)

    def fits(self, sizes: tuple) -> bool:
        """It acts on a tensor of these sizes without enlarging it; a symbolic size counts as unknown."""
        return all(
            a == 1 or (isinstance(s, int) and a == s)
            for t in (self.scale, self.shift)
            for a, s in zip(t.shape, sizes, strict=True)
        )

    def channels(self, count: int) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (count,), of a map that varies along one dimension at most."""
        return self.scale.flatten().expand(count), self.shift.flatten().expand(count)

    def map(self, change: Callable[[Tensor], Tensor]) -> Affine:
        return Affine(change(self.scale), change(self.shift))

    def compact(self) -> Affine:
        """The same map with every dimension along which it is constant shrunk to 1."""
        return self.map(_compact)

    def settled(self) -> Affine:
        """Compact, with the free entries chosen: they become the identity."""
        compact = self.compact()
        return Affine(compact.scale.nan_to_num(nan=1.0), compact.shift.nan_to_num(nan=0.0))

    def without_shift(self) -> Affine:
        return Affine(self.scale, Affine.identity(self.shift.ndim).shift)

    def inverse(self) -> Affine:
        """x from y; not finite where the scale is 0."""
        return Affine(1 / self.scale, -self.shift / self.scale)

    def statistics(self, before: Statistics | None, axis: int | None) -> Statistics | None:
        """Statistics of ``scale * x + shift``, per channel along ``axis``, from those of x; None if they do not follow."""
        if before is None or axis is None or self.varies_outside(axis):
            return None
        counts = {t.numel() for t in (self.scale, self.shift, before.mean)} - {1}
        if len(counts) > 1 or not bool(self.scale.isfinite().all() and self.shift.isfinite().all()):
            return None
        size = tuple(counts) or tuple(before.mean.shape)
        scale, shift = self.scale.flatten().expand(size), self.shift.flatten().expand(size)
        ends = [torch.where(scale == 0, shift, scale * end + shift) for end in (before.lo, before.hi)]
        return Statistics(
            mean=scale * before.mean + shift,
            std=scale.abs() * before.std,
            lo=torch.minimum(*ends),
            hi=torch.maximum(*ends),
            provenance=before.provenance,
        )


def _compact(t: Tensor) -> Tensor:
    infinity = torch.full((), torch.inf, dtype=t.dtype)
    for dim in range(t.ndim):
        if t.shape[dim] > 1:
            low = torch.where(t.isnan(), infinity, t).amin(dim, keepdim=True)
            high = torch.where(t.isnan(), -infinity, t).amax(dim, keepdim=True)
            if bool((low >= high).all()):
                t = torch.where(low > high, torch.nan, low)  # low > high: nothing but NaN
    return t


# --------------------------------------------------------------------------------------------- operators that are one


def batch_norm_affine(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C,) float64: ``gamma / sqrt(var + eps)`` and ``beta - scale * mean``.

    Raises ``ModelError`` for training mode, missing statistics, a variance that is negative or NaN.
    """
    mean, var = _vector(gm, node, "running_mean"), _vector(gm, node, "running_var")
    if argument(node, "training") or mean is None or var is None:
        raise _broken(node, "batch norm does not use running statistics",
                      "Create it with track_running_stats=True, train it and call model.eval().")  # fmt: skip
    variance = var + argument(node, "eps")
    good = (var >= 0) & (variance > 0)  # false for NaN, too
    if not bool(good.all()):
        raise _broken(node, f"running_var is negative, NaN or 0 without eps in {int((~good).sum())} channels",
                      "A variance cannot be: check the checkpoint.")  # fmt: skip
    gamma, beta = _vector(gm, node, "weight"), _vector(gm, node, "bias")
    scale = variance.rsqrt() if gamma is None else gamma / variance.sqrt()
    shift = -scale * mean if beta is None else beta - scale * mean
    if not bool(scale.isfinite().all() and shift.isfinite().all()):
        raise _broken(node, "batch norm has NaN or Inf parameters", "Repair the weights.")
    return scale, shift


def _vector(gm: fx.GraphModule, node: fx.Node, name: str) -> Tensor | None:
    value = argument(node, name)
    return None if value is None else constant(gm, value).detach().double()


def _broken(node: fx.Node, found: str, remedy: str) -> ModelError:
    return ModelError(found, stage="batch norm", where=place(node), remedy=remedy)


def affine_arguments(gm: fx.GraphModule, x: fx.Node, scale: Tensor, shift: Tensor, like: fx.Node) -> tuple:
    """Arguments that make ``aten.batch_norm`` compute ``scale * x + shift`` (both (C,)): mean 0, variance 1, eps 0.

    Registers the constants at the current insertion point, in the dtype of x.
    """
    dtype = x.meta["val"].dtype
    values = {"weight": scale, "bias": shift, "mean": torch.zeros_like(scale), "var": torch.ones_like(scale)}
    constants = [add_constant(gm, f"{like.name}_{name}", value.to(dtype), like) for name, value in values.items()]
    return (x, *constants, False, 0.0, 0.0, False)


def is_plain_affine(gm: fx.GraphModule, node: fx.Node) -> bool:
    """A batch norm as ``affine_arguments`` spells it: it says nothing about the distribution of its input."""
    mean, var = _vector(gm, node, "running_mean"), _vector(gm, node, "running_var")
    return argument(node, "eps") == 0 and not bool(mean.any()) and bool((var == 1).all())


def constant_affine(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, Affine] | None:
    """(x, map) if ``node`` is mul, add or sub of an activation x and a constant that does not enlarge x, else None."""
    if not is_call(node, ADD, SUB, MUL) or node.kwargs:
        return None
    activations = [a for a in node.args if isinstance(a, fx.Node) and not is_constant(a)]
    if len(activations) != 1 or len(node.args) != 2:
        return None
    (x,) = activations
    first = node.args[0] is x
    other = node.args[1 if first else 0]
    value = constant(gm, other).detach() if isinstance(other, fx.Node) else torch.tensor(other)
    ndim = len(shape(x))
    if value.ndim > ndim:
        return None
    value = value.double().reshape([1] * (ndim - value.ndim) + list(value.shape))
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    if node.target is MUL:
        affine = Affine(value, zero)
    elif node.target is ADD:
        affine = Affine(one, value)
    else:
        affine = Affine(one, -value) if first else Affine(-one, value)
    return (x, affine.compact()) if affine.fits(shape(x)) else None
