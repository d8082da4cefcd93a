"""One spelling for reshapes and permutations.

view, flatten, squeeze, unsqueeze, ...     ->  reshape(x, [-1, static sizes])       no symbolic integer survives
transpose, movedim, t, ...                 ->  permute(x, order)
channel shuffles written with either       ->  index_select(x, 1, order)
clone, contiguous, dropout in eval mode    ->  x
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.graph import is_call, rank, shape

from ._constructors import EXPAND, PERMUTE, RESHAPE, gathered, permuted, reshaped, same_shape, same_size, static
from ._expression import Expression, Op, Refused
from ._spell_tokens import converted

aten = torch.ops.aten


def to_own_shape(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """view, flatten, squeeze, ... (x) -> reshape(x, [-1, static sizes of the result])"""
    return reshaped(call.args[0], shape(call))


def identity(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """clone, contiguous, dropout in eval mode, ... (x) -> x"""
    return call.args[0]


# ------------------------------------------------------------------------------------------------------------ permute


def permute(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """permute(x, dims), dims >= 0"""
    n = rank(call.args[0])
    return permuted(call.args[0], [d % n for d in call.args[1]])


def transpose(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """transpose(x, a, b), swapaxes -> permute;  t(x), mT(x): the last two dimensions"""
    n = rank(call.args[0])
    if n < 2:
        return call.args[0]
    a, b = (d % n for d in (call.args[1:3] if len(call.args) > 1 else (n - 2, n - 1)))
    order = list(range(n))
    order[a], order[b] = b, a
    return permuted(call.args[0], order)


def reverse_dimensions(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """x.T -> permute(x, [n-1, ..., 0])"""
    return permuted(call.args[0], list(range(rank(call)))[::-1])


def move_dimensions(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """movedim(x, source, destination) -> permute"""
    n = rank(call.args[0])
    source, target = ([d % n for d in ([a] if isinstance(a, int) else a)] for a in call.args[1:3])
    rest = iter([d for d in range(n) if d not in source])
    return permuted(call.args[0], [source[target.index(i)] if i in target else next(rest) for i in range(n)])


def expand(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused | None:
    """expand(x, sizes), expand_as -> expand with -1 where the size stays; nothing to expand -> x"""
    x, sizes = call.args[0], shape(call)
    own = (1,) * (len(sizes) - rank(x)) + shape(x)
    if same_shape(own, sizes):
        return reshaped(x, sizes)
    if any(not same_size(a, b) and not static(b) for a, b in zip(own, sizes)):
        return Refused("it expands to the batch")
    leading = len(sizes) - rank(x)
    return Op(
        EXPAND, x, [-1 if i >= leading and same_size(a, b) else int(b) for i, (a, b) in enumerate(zip(own, sizes))]
    )


# ----------------------------------------------------------------------------------------------------------- shuffles


def pixel_shuffle(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused | None:
    """(N, C r r, H, W) -> reshape (N, C, r, r, H, W) -> permute (N, C, H, r, W, r) -> reshape (N, C, H r, W r)"""
    (x, r), (n, c, h, w) = call.args, shape(call)
    return _shuffled(x, (n, c, r, r, h // r, w // r), [0, 1, 4, 2, 5, 3], shape(call))


def pixel_unshuffle(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """(N, C, H r, W r) -> reshape (N, C, H, r, W, r) -> permute (N, C, r, r, H, W) -> reshape (N, C r r, H, W)"""
    (x, r), (n, c, h, w) = call.args, shape(call)
    return _shuffled(x, (n, c // r // r, h, r, w, r), [0, 1, 3, 5, 2, 4], shape(call))


def _shuffled(x: fx.Node, sizes: tuple, order: list[int], result: tuple) -> Expression | Refused:
    inner = reshaped(x, sizes)
    return inner if isinstance(inner, Refused) else reshaped(Op(PERMUTE, inner, order), result)


def channel_shuffle(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """channel_shuffle(x, g) -> index_select along the channels"""
    return gathered(call.args[0], {1: _shuffle_index(shape(call)[1], call.args[1])}, shape(call))


def _shuffle_index(channels: int, groups: int) -> Tensor:
    return torch.arange(channels).reshape(groups, -1).t().flatten()


def reshape(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """reshape(permute(reshape(x))) that only exchanges groups and channels is a channel shuffle; reshape of reshape is one

    (N, g c, *S) -> (N, g, c, *S) -> (N, c, g, *S) -> (N, c g, *S)     =  index_select(x, 1, shuffle(g))
    """
    inner = call.args[0]
    if is_call(inner, PERMUTE) and is_call(inner.args[0], RESHAPE):
        x, grouped = inner.args[0].args[0], shape(inner.args[0])
        swaps = list(inner.args[1]) == [0, 2, 1, *range(3, len(grouped))] and static(grouped[1])
        rest = same_shape((grouped[0], *grouped[3:]), (shape(x)[0], *shape(x)[2:]))
        if swaps and rest and same_shape(shape(x), shape(call)):
            return gathered(x, {1: _shuffle_index(shape(x)[1], grouped[1])}, shape(x))
    if is_call(inner, RESHAPE):
        return reshaped(inner.args[0], shape(call))
    return reshaped(inner, shape(call))


#: overload -> rule(call, gm)
RESHAPES = {
    **dict.fromkeys(
        [
            aten.view.default, aten._unsafe_view.default, aten.view_as.default, aten.reshape_as.default,
            aten.flatten.using_ints, aten.unflatten.int, aten.ravel.default, aten.squeeze.default, aten.squeeze.dim,
            aten.squeeze.dims, aten.unsqueeze.default,
        ],
        to_own_shape,
    ),
    aten.reshape.default: reshape,
    **dict.fromkeys(
        [
            aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default,
            aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.positive.default, aten.dropout.default,
            aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default,
        ],
        identity,
    ),
    **dict.fromkeys(
        [
            aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default,
            aten.type_as.default,
        ],
        converted,
    ),
    aten.permute.default: permute,
    **dict.fromkeys(
        [aten.transpose.int, aten.t.default, aten.mT.default, aten.swapaxes.default, aten.swapdims.default], transpose
    ),
    aten.numpy_T.default: reverse_dimensions,
    aten.movedim.int: move_dimensions,
    aten.movedim.intlist: move_dimensions,
    aten.expand.default: expand,
    aten.expand_as.default: expand,
    aten.pixel_shuffle.default: pixel_shuffle,
    aten.pixel_unshuffle.default: pixel_unshuffle,
    aten.channel_shuffle.default: channel_shuffle,
}  # fmt: skip
