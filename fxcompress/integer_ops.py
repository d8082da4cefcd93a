"""The integer dialect: one table. Each row gives schema, meaning, reference kernel and fake kernel (shapes).

Layouts: activations (N, C, *spatial) uint8 codes (or (..., C) for ``linear``), weights int8, accumulators int32 with
zero meaning real 0. ``padding`` always lists (before, after) per spatial dimension, first dimension first. Everything
that is constant but an attribute of shape (stride, bounds of loops) is a tensor, so that it becomes a buffer. Operators
are registered as ``torch.ops.fxcompress.<name>``; none returns an alias of an input.

    >>> acc = torch.ops.fxcompress.conv(codes, weight, bias, [1, 1], [1, 1, 1, 1], [1, 1], 1, zero_point)  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, library

from . import float_ops, numerics
from . import reference_bilinear as bilinear_kernels
from . import reference_conv as conv_kernels
from . import reference_kernels as kernels
from . import reference_normalization as normalization
from .graph import constant, dtype, is_constant
from .reference_conv import windows

# ---------------------------------------------------------------------------------------------- fake kernels


def _new(like: Tensor, shape, dtype: torch.dtype = torch.int32) -> Tensor:
    return like.new_empty(tuple(shape), dtype=dtype)


def _broadcast(*tensors: Tensor) -> torch.Size:
    return torch.broadcast_shapes(*(t.shape for t in tensors))


def _sides(pad) -> list[tuple[int, int]]:
    return list(zip(pad[0::2], pad[1::2], strict=True))


def _trailing(x: Tensor, count: int) -> list:
    return list(x.shape[x.ndim - count :])


def _fake_quantize(x, scale, zero_point, qmin, qmax):
    return _new(x, _broadcast(x, scale), torch.uint8 if qmin >= 0 else torch.int8)


def _fake_dequantize(q, scale, zero_point):
    return _new(q, _broadcast(q, scale), torch.float32)


def _fake_conv(x, weight, bias, stride, padding, dilation, groups, pad_value):
    steps = zip(x.shape[2:], weight.shape[2:], stride, _sides(padding), dilation, strict=True)
    return _new(x, (x.shape[0], weight.shape[0], *(windows(*step) for step in steps)))


def _fake_conv_transpose(x, zero_point, weight, bias, stride, padding, output_padding, dilation, groups):
    steps = zip(x.shape[2:], weight.shape[2:], stride, _sides(padding), output_padding, dilation, strict=True)
    spatial = [(n - 1) * s - before - after + d * (k - 1) + 1 + o for n, k, s, (before, after), o, d in steps]
    return _new(x, (x.shape[0], weight.shape[1] * groups, *spatial))


def _fake_linear(x, weight, bias):
    return _new(x, (*x.shape[:-1], weight.shape[0]))


def _fake_bilinear_linear(x, zero_point, weight, bias, encode, decode, blocks, axis):
    shape = list(x.shape)
    shape[axis] = bias.shape[0]
    return _new(x, shape)


def _fake_bilinear_matmul(a, a_zero_point, b, b_zero_point, encode_a, encode_b, decode, blocks, products):
    return torch.matmul(a.to(torch.int32), b.to(torch.int32))


def _fake_elementwise(x, *others):
    return _new(x, _broadcast(x, *others))


def _fake_mul(a, a_zero_point, b, b_zero_point):
    return _new(a, _broadcast(a, b))


def _fake_sum_pool(x, zero_point, kernel, stride, padding):
    steps = zip(_trailing(x, len(kernel)), kernel, stride, _sides(padding), strict=True)
    return _new(x, (*x.shape[: x.ndim - len(kernel)], *(windows(*step) for step in steps)))


def _fake_adaptive(x, output_size, dtype):
    return _new(x, (*x.shape[: x.ndim - len(output_size)], *output_size), dtype)


def _fake_sum(x, zero_point, dim, keepdim):
    summed = {d % x.ndim for d in dim}
    return _new(x, [1 if i in summed else n for i, n in enumerate(x.shape) if keepdim or i not in summed])


def _fake_max_pool(x, kernel, stride, padding, dilation):
    steps = zip(_trailing(x, len(kernel)), kernel, stride, _sides(padding), dilation, strict=True)
    return _new(x, (*x.shape[: x.ndim - len(kernel)], *(windows(*step) for step in steps)), x.dtype)


def _fake_pad(x, pad, value):
    count = len(pad) // 2
    grown = [n + before + after for n, (before, after) in zip(_trailing(x, count), _sides(pad), strict=True)]
    return _new(x, (*x.shape[: x.ndim - count], *grown), x.dtype)


def _fake_resize(x, zero_point, index0, index1, weight1, fraction_bits):
    return _new(x, (*x.shape[: x.ndim - len(index0)], *(i.shape[0] for i in index0)))


def _fake_requantize(acc, multiplier, right_shift, left_shift, zero_point, guard_bits, lo, hi):
    return _new(acc[0], _broadcast(*acc, *multiplier, lo, hi), torch.uint8)


def _fake_rescale(acc, multiplier, shift):
    return _new(acc[0], _broadcast(*acc, *multiplier))


# -------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class IntegerOp:
    """One operator of the dialect.

    Attributes:
        name: ``torch.ops.fxcompress.<name>``.
        schema: arguments and result in torch's schema language.
        reference: the meaning, on integer tensors.
        fake: shape and dtype of the result from shapes and dtypes (the batch may be symbolic).
        meaning: one line, with the tensor shapes that matter.
    """

    name: str
    schema: str
    reference: Callable
    fake: Callable
    meaning: str

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.fxcompress, self.name).default


_ROWS = (
    IntegerOp("quantize", "(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax) -> Tensor",
              numerics.quantize, _fake_quantize,
              "float to codes: clamp(round_half_even(x * float32(1/scale)) + zero_point, qmin, qmax)"),
    IntegerOp("dequantize", "(Tensor q, Tensor scale, Tensor zero_point) -> Tensor",
              numerics.dequantize, _fake_dequantize,
              "codes or accumulators to float32: scale * (q - zero_point)"),
    IntegerOp("conv", "(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
              "Tensor pad_value) -> Tensor",
              conv_kernels.conv, _fake_conv,
              "1d/2d/3d convolution of codes, weight int8 (O, C/G, *K), bias int32 (O,); borders hold pad_value () or (C,)"),
    IntegerOp("conv_transpose", "(Tensor x, Tensor zero_point, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
              "int[] output_padding, int[] dilation, int groups) -> Tensor",
              conv_kernels.conv_transpose, _fake_conv_transpose,
              "transposed convolution of q - zero_point, weight int8 (C, O/G, *K), zero_point () or (C, 1, ...)"),
    IntegerOp("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
              conv_kernels.linear, _fake_linear,
              "x (..., I) codes, weight int8 (O, I), bias int32 (O,) with the zero point folded in"),
    IntegerOp("matmul", "(Tensor a, Tensor a_zero_point, Tensor b, Tensor b_zero_point) -> Tensor",
              conv_kernels.matmul, lambda a, az, b, bz: torch.matmul(a.to(torch.int32), b.to(torch.int32)),
              "(a - a_zero_point) @ (b - b_zero_point), batched"),
    IntegerOp("bilinear_linear", "(Tensor x, Tensor zero_point, Tensor weight, Tensor bias, Tensor encode, Tensor decode, "
              "int[] blocks, int axis) -> Tensor",
              bilinear_kernels.bilinear_linear, _fake_bilinear_linear,
              "a linear layer over dimension axis in blocks (n, m, p): weight (R, O/n, K/m) int16 holds the sums of its blocks, "
              "encode and decode are programs for the sums of x - zero_point and of the products"),
    IntegerOp("bilinear_matmul", "(Tensor a, Tensor a_zero_point, Tensor b, Tensor b_zero_point, Tensor encode_a, Tensor encode_b, "
              "Tensor decode, int[] blocks, int products) -> Tensor",
              bilinear_kernels.bilinear_matmul, _fake_bilinear_matmul,
              "(a - a_zero_point) @ (b - b_zero_point), batched, in blocks by a bilinear algorithm"),
    IntegerOp("mul", "(Tensor a, Tensor a_zero_point, Tensor b, Tensor b_zero_point) -> Tensor",
              kernels.mul, _fake_mul,
              "(a - a_zero_point) * (b - b_zero_point), broadcast"),
    IntegerOp("widen", "(Tensor x, Tensor zero_point) -> Tensor",
              conv_kernels.widen, _fake_elementwise,
              "q - zero_point"),
    IntegerOp("sum_pool", "(Tensor x, Tensor zero_point, int[] kernel, int[] stride, int[] padding) -> Tensor",
              kernels.sum_pool, _fake_sum_pool,
              "sum of q - zero_point over each window; padding contributes 0"),
    IntegerOp("adaptive_sum_pool", "(Tensor x, Tensor zero_point, int[] output_size) -> Tensor",
              kernels.adaptive_sum_pool, lambda x, zp, output_size: _fake_adaptive(x, output_size, torch.int32),
              "sum of q - zero_point over PyTorch's adaptive windows"),
    IntegerOp("sum", "(Tensor x, Tensor zero_point, int[] dim, bool keepdim) -> Tensor",
              kernels.sum_dims, _fake_sum,
              "sum of q - zero_point over the dimensions dim"),
    IntegerOp("max_pool", "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
              kernels.max_pool, _fake_max_pool,
              "largest code of each window; padding is the smallest code"),
    IntegerOp("adaptive_max_pool", "(Tensor x, int[] output_size) -> Tensor",
              kernels.adaptive_max_pool, lambda x, output_size: _fake_adaptive(x, output_size, x.dtype),
              "largest code of each of PyTorch's adaptive windows"),
    IntegerOp("pad", "(Tensor x, int[] pad, Tensor value) -> Tensor",
              conv_kernels.pad, _fake_pad,
              "surround the trailing dimensions with value () or (C,) along dimension 1; same dtype, float allowed"),
    IntegerOp("resize", "(Tensor x, Tensor zero_point, Tensor[] index0, Tensor[] index1, Tensor[] weight1, "
              "int fraction_bits) -> Tensor",
              kernels.resize, _fake_resize,
              "separable linear interpolation of q - zero_point over the trailing dimensions, gain 2^(fraction_bits * dims)"),
    IntegerOp("requantize", "(Tensor[] acc, Tensor[] multiplier, Tensor[] right_shift, int[] left_shift, Tensor zero_point, "
              "int guard_bits, Tensor lo, Tensor hi) -> Tensor",
              kernels.requantize, _fake_requantize,
              "16-bit dyadic requantization of the sum of all branches to uint8 codes in lo..hi"),
    IntegerOp("rescale", "(Tensor[] acc, Tensor[] multiplier, Tensor[] shift) -> Tensor",
              kernels.rescale, _fake_rescale,
              "31-bit dyadic rescaling of the sum of all branches to int32; multiplier and shift int64"),
    IntegerOp("clamp", "(Tensor acc, Tensor lo, Tensor hi) -> Tensor",
              kernels.clamp, _fake_elementwise,
              "min(max(acc, lo), hi) on int32 accumulators"),
    IntegerOp("table", "(Tensor x, Tensor lut, int axis=1) -> Tensor",
              kernels.table, lambda x, lut, axis=1: _new(x, x.shape, lut.dtype),
              "lut[x] for uint8 codes, lut (256,) or (C, 256) with channels along axis; uint8 or int32"),
    IntegerOp("softmax", "(Tensor x, Tensor table, int table_bits, Tensor? mask=None) -> Tensor",
              normalization.softmax, lambda x, table, table_bits, mask=None: _new(x, x.shape),
              "softmax over the last dimension of codes in units of 2^-24, table int32 (256,) of 2^table_bits exp(-s d); "
              "mask: nonzero where an element takes part"),
    IntegerOp("layer_norm", "(Tensor x, Tensor? zero_point, int epsilon, int fraction_bits) -> Tensor",
              normalization.layer_norm, lambda x, zero_point, epsilon, fraction_bits: _new(x, x.shape),
              "(q - mean) / sqrt(variance) over the last dimension of codes in units of 2^-fraction_bits; with a zero_point, "
              "(q - zero_point) / sqrt(mean square)"),
    IntegerOp("embedding", "(Tensor weight, Tensor index) -> Tensor",
              kernels.embedding, lambda weight, index: _new(weight, (*index.shape, *weight.shape[1:]), weight.dtype),
              "weight[index] for codes weight (rows, ...), integer index; dtype of weight"),
)  # fmt: skip

#: The dialect by name.
INTEGER_OPS: dict[str, IntegerOp] = {row.name: row for row in _ROWS}

_LIBRARY = library.Library("fxcompress", "DEF")
for _row in _ROWS:
    _LIBRARY.define(_row.name + _row.schema)
    _LIBRARY.impl(_row.name, _row.reference, "CompositeExplicitAutograd")
    library.register_fake(f"fxcompress::{_row.name}", _row.fake, lib=_LIBRARY)

#: Float in, codes out, and back: the only operators of an integer graph that touch floating point.
BOUNDARY = frozenset({INTEGER_OPS["quantize"].overload, INTEGER_OPS["dequantize"].overload})
QDQ_LEVEL = BOUNDARY
FLOAT_LEVEL = frozenset({INTEGER_OPS["pad"].overload, float_ops.MASKED_SOFTMAX})

_aten = torch.ops.aten
#: ATen data movement that is legal on codes and accumulators.
INTEGER_MOVEMENT = frozenset(
    {
        _aten.reshape.default, _aten.permute.default, _aten.slice.Tensor, _aten.select.int, _aten.index_select.default,
        _aten.expand.default, _aten.cat.default, _aten.clone.default,
    }
)  # fmt: skip
INTEGER_LEVEL = frozenset(row.overload for row in _ROWS) | INTEGER_MOVEMENT
#: Logic and arithmetic on token ids and masks: integers and booleans that are neither codes nor accumulators (``is_index``).
INDEX_OPS = frozenset(
    {
        _aten.ne.Scalar, _aten.eq.Scalar, _aten.logical_not.default, _aten.logical_and.default, _aten.logical_or.default,
        _aten.to.dtype, _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.cumsum.default,
    }
)  # fmt: skip
_INDEX_DTYPES = (torch.bool, torch.int16, torch.int32, torch.int64)


def is_index(gm: fx.GraphModule, node: fx.Node) -> bool:
    """A token id, a mask or the like: computed by movement, logic and arithmetic from integer graph inputs and constants.

    Graph inputs of 8 bits are codes.
    """
    if is_constant(node):
        return not constant(gm, node).is_floating_point()
    if node.op == "placeholder":
        return "val" in node.meta and dtype(node) in _INDEX_DTYPES
    return node.target in INDEX_OPS | INTEGER_MOVEMENT and all(is_index(gm, n) for n in node.all_input_nodes)


def integer_op(target: object) -> IntegerOp | None:
    """The row behind an operator overload, None for anything else."""
    row = INTEGER_OPS.get(target._opname) if isinstance(target, torch._ops.OpOverload) else None
    return row if row is not None and row.overload is target else None
