"""One spelling for tokens: embeddings of integer inputs, tokens that every sample shares, and integers themselves.

embedding(table, expand(constant ids))        ->  a constant that broadcasts
cat([expand(class token), x], 1)              ->  constant_pad_nd(x) + constant
mask.to(bool)                                 ->  ne(mask, 0);   x[arange(batch)[:, None], arange(n)]  ->  x
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.dialects import ADD, EMBEDDING
from fxcompress.graph import argument, dtype, is_call, is_float, rank, shape

from ._constructors import CAT, EXPAND, PAD, gathered, reshaped, same_size, static
from ._expression import Expression, Op, Refused, is_static, static_value

aten = torch.ops.aten
_TO_BATCH = (EXPAND, aten.expand_as.default)
_VIEWS = (aten.unsqueeze.default, aten.slice.Tensor, aten.view.default, aten.reshape.default)


def embedding(call: fx.Node, gm: fx.GraphModule) -> Op:
    """embedding(table, ids): what training needs is left out"""
    return Op(EMBEDDING, *call.args[:2])


def shared_embedding(value: fx.Node, gm: fx.GraphModule) -> Op | None:
    """embedding(table, ids) whose ids are the same for every sample, as a constant that broadcasts to it."""
    if not is_call(value, EMBEDDING) or not is_static(value.args[0]) or is_static(value.args[1]):
        return None
    ids = _shared_ids(value.args[1], gm)
    return None if ids is None else Op(EMBEDDING, value.args[0], ids)


def _shared_ids(ids: fx.Node, gm: fx.GraphModule) -> Tensor | None:
    """Constant ids that broadcast to ``ids``: expanded ones, and what is gathered from equal ones."""
    if is_call(ids, *_TO_BATCH) and rank(ids.args[0]) == rank(ids):
        return static_value(gm, ids.args[0]) if is_static(ids.args[0]) else _shared_ids(ids.args[0], gm)
    if is_call(ids, aten.gather.default):
        source = ids.args[0]
        table = static_value(gm, source) if is_static(source) else _shared_ids(source, gm)
        if table is not None and bool((table == table.flatten()[0]).all()):
            return table.flatten()[:1].reshape([1] * rank(ids))
    return None


def shared_tokens(call: fx.Node, gm: fx.GraphModule) -> Expression | None:
    """cat of constants, expanded to the batch, before and behind tensors -> constant_pad_nd + constant; None otherwise."""
    tensors, dim = list(call.args[0]), argument(call, "dim") % rank(call)
    if not is_float(call) or dim == 0:
        return None
    shared = [_shared_token(t, gm) for t in tensors]
    own = [i for i, token in enumerate(shared) if token is None]
    if not own or len(own) == len(tensors) or own != list(range(own[0], own[-1] + 1)) or not static(shape(call)[dim]):
        return None
    inner = tensors[own[0]] if len(own) == 1 else Op(CAT, [tensors[i] for i in own], dim)
    counts = [int(shape(t)[dim]) for t in tensors]
    before, behind = sum(counts[: own[0]]), sum(counts[own[-1] + 1 :])
    sizes = [1, *map(int, shape(call)[1:])]
    constant = torch.zeros(sizes)
    for token, count, start in zip(shared, counts, [sum(counts[:i]) for i in range(len(counts))]):
        if token is not None:
            constant.narrow(dim, start, count).copy_(token)
    padded = Op(PAD, inner, [0, 0] * (rank(call) - 1 - dim) + [before, behind], 0.0)
    return Op(ADD, padded, constant)


def _shared_token(node: fx.Node, gm: fx.GraphModule) -> Tensor | None:
    """The constant (1, ...) that ``node`` repeats along the batch."""
    if not is_call(node, *_TO_BATCH) or not is_static(node.args[0]) or static(shape(node)[0]):
        return None
    if any(not static(n) for n in shape(node)[1:]):
        return None
    return static_value(gm, node.args[0]).float()


# ------------------------------------------------------------------------------------------------------------ integers


def converted(call: fx.Node, gm: fx.GraphModule) -> Expression | None:
    """x.to(own dtype) -> x;  integers to bool -> ne(x, 0);  between integers -> to(x, dtype)"""
    x, target = call.args[0], dtype(call)
    if target == dtype(x):
        return x
    if is_float(x) or is_float(call):
        return None
    return Op(aten.ne.Scalar, x, 0) if target == torch.bool else Op(aten.to.dtype, x, target)


def indexed(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused | None:
    """x[b, i] with b the numbers of the samples and a constant i -> index_select(x, 1, i), reshaped; None otherwise"""
    x, indices = call.args
    if len(indices) != 2 or any(i is None for i in indices) or rank(x) != 2 or not static(shape(x)[1]):
        return None
    samples, columns = indices
    if not _counts_samples(samples, shape(x)[0]) or not is_static(columns):
        return None
    ids = static_value(gm, columns)
    if not same_size(shape(call)[0], shape(x)[0]) or shape(samples)[1:].count(1) != rank(samples) - 1:
        return None
    picked = gathered(x, {1: ids.flatten()}, shape(x))
    return picked if isinstance(picked, Refused) else reshaped(picked, shape(call))


def _counts_samples(node: fx.Node, batch: object) -> bool:
    """``node`` is arange(batch), with dimensions of 1 behind."""
    while is_call(node, *_VIEWS):
        node = node.args[0]
    return is_call(node, aten.arange.default) and same_size(shape(node)[0], batch)
