"""One spelling for matrix products: ``linear`` with a constant matrix, ``matmul`` of two activations.

addmm(b, x, W), mm(x, W), x @ W                  ->  linear(x, W^T, b)
bmm, einsum("nij,njk->nik"), ...                 ->  matmul
scaled_dot_product_attention(q, k, v)            ->  matmul, mul, softmax, matmul
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxcompress.dialects import ADD, LINEAR, MATMUL, MUL
from fxcompress.graph import argument, is_float, rank, shape

from ._constructors import GATHER, PERMUTE, RESHAPE, reshaped, static
from ._expression import Expression, Op, Refused, is_static
from ._spell_masks import kept, masked_softmax

aten = torch.ops.aten


def linear(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """linear(x, w, b); a computed weight -> matmul(x, w^T) + b"""
    x, weight, bias = call.args[0], call.args[1], argument(call, "bias")
    if is_static(weight) and (bias is None or is_static(bias)):
        return Op(LINEAR, x, weight, bias)
    product = Op(MATMUL, x, _transposed(weight))
    return product if bias is None else Op(ADD, product, bias)


def _transposed(node: Expression, n: int = 2) -> Op:
    return Op(PERMUTE, node, [*range(n - 2), n - 1, n - 2])


def matmul(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused | None:
    """x @ W -> linear(x, W^T);  A @ x -> linear(x^T, A)^T;  with W, A constant matrices; mm, bmm -> matmul"""
    x, y = call.args
    if is_static(y) and rank(y) == 2 and not is_static(x):
        return Op(LINEAR, x, _transposed(y), None)
    if is_static(y) and rank(y) == 1 and not is_static(x):
        return reshaped(Op(LINEAR, x, Op(RESHAPE, y, [1, -1]), None), shape(call))
    if is_static(x) and rank(x) == 2 and rank(y) >= 2 and not is_static(y):
        return _transposed(Op(LINEAR, _transposed(y, rank(y)), x, None), rank(y))
    if rank(x) < 2 or rank(y) < 2:
        return Refused("it multiplies by a computed vector")
    return Op(MATMUL, x, y)


def addmm(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """addmm(b, x, W) = beta b + alpha x W -> linear(x, W^T, b), or matmul and add; baddbmm likewise"""
    bias, x, y = call.args
    beta, alpha = argument(call, "beta"), argument(call, "alpha")
    if beta == alpha == 1 and is_static(y) and is_static(bias) and rank(y) == 2 and rank(bias) == 1:
        return Op(LINEAR, x, _transposed(y), bias)
    product = Op(MATMUL, x, y)
    product = product if alpha == 1 else Op(MUL, product, alpha)
    return product if beta == 0 else Op(ADD, product, bias if beta == 1 else Op(MUL, bias, beta))


def einsum(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """einsum(x, y) -> permute, reshape, matmul or linear, reshape, permute

    A letter is batch (in x, y and the result), contracted (in x and y) or free (in the result and one of them):
    (batch, free x, contracted) @ (batch, contracted, free y), or linear when y is constant.
    """
    equation, tensors = call.args[0].replace(" ", ""), list(call.args[1])
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if "." in equation or not arrow or len(tensors) != 2 or any(len(set(t)) != len(t) for t in (*terms, out)):
        return Refused(f"einsum {equation!r} is not a product of two tensors")
    if is_static(tensors[0]) and not is_static(tensors[1]):
        tensors, terms = tensors[::-1], terms[::-1]
    (x, y), (a, b) = tensors, terms
    size = {letter: n for t, s in ((x, a), (y, b)) for letter, n in zip(s, shape(t))}
    batch, inner = ([c for c in a if c in b and (c in out) is kept] for kept in (True, False))
    free_x, free_y = [c for c in a if c not in b], [c for c in b if c not in a]
    if not inner or not set(free_x + free_y) <= set(out) or any(not static(size[c]) for c in inner):
        return Refused(f"einsum {equation!r} is not a matrix product")
    rows, columns, depth, lead = _merged(free_x, size), _merged(free_y, size), _merged(inner, size), _each(batch, size)
    if is_static(y) and not batch:
        product = Op(LINEAR, _arranged(x, a, [*free_x, *inner], [*_each(free_x, size), *depth]),
                     _arranged(y, b, [*free_y, *inner], [*columns, *depth]), None)  # fmt: skip
    else:
        product = Op(MATMUL, _arranged(x, a, [*batch, *free_x, *inner], [*lead, *rows, *depth]),
                     _arranged(y, b, [*batch, *inner, *free_y], [*lead, *depth, *columns]))  # fmt: skip
    letters = [*batch, *free_x, *free_y]
    if len(free_x) != 1 or len(free_y) != 1:
        product = Op(RESHAPE, product, _each(letters, size))
    order = [letters.index(c) for c in out]
    return product if order == sorted(order) else Op(PERMUTE, product, order)


def _each(letters: list[str], size: dict) -> list[int]:
    return [size[c] if static(size[c]) else -1 for c in letters]


def _merged(letters: list[str], size: dict) -> list[int]:
    """The one dimension these letters become."""
    return [math.prod(size[c] for c in letters) if all(static(size[c]) for c in letters) else -1]


def _arranged(x: fx.Node, letters: str, order: list[str], sizes: list[int]) -> Expression:
    """x permuted to ``order`` and reshaped to ``sizes``."""
    axes = [letters.index(c) for c in order]
    value = x if axes == sorted(axes) else Op(PERMUTE, x, axes)
    return value if len(order) == len(sizes) else Op(RESHAPE, value, sizes)


def attention(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """scaled_dot_product_attention(q, k, v, mask) -> softmax(q k^T / sqrt(d) + mask) v;  a bool mask: masked_softmax"""
    q, k, v = call.args[:3]
    mask, scale = argument(call, "attn_mask"), argument(call, "scale")
    if argument(call, "dropout_p"):
        return Refused("dropout is active")
    if argument(call, "enable_gqa"):
        k, v = (_repeated_heads(x, shape(q)[-3]) for x in (k, v))
    scores = Op(MATMUL, q, _transposed(k, rank(call)))
    scores = Op(MUL, scores, shape(q)[-1] ** -0.5 if scale is None else scale)
    if mask is not None and is_float(mask):
        return Op(MATMUL, Op(aten.softmax.int, Op(ADD, scores, mask), -1), v)
    if mask is not None:
        mask = kept(mask, gm)
    elif argument(call, "is_causal"):
        mask = torch.ones(*(int(shape(x)[-2]) for x in call.args[:2]), dtype=torch.bool).tril()
    return Op(MATMUL, masked_softmax(scores, mask), v)


def _repeated_heads(x: fx.Node, heads: int) -> Expression:
    """Grouped queries: each head of keys and values serves several of the queries'."""
    own = int(shape(x)[-3])
    return x if own == heads else Op(GATHER, x, rank(x) - 3, torch.arange(own).repeat_interleave(int(heads) // own))


#: overload -> rule(call, gm)
PRODUCTS = {
    aten.linear.default: linear,
    **dict.fromkeys([aten.matmul.default, aten.mm.default, aten.bmm.default], matmul),
    **dict.fromkeys([aten.addmm.default, aten.baddbmm.default], addmm),
    aten.einsum.default: einsum,
}
