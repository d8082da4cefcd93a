"""The C structs of ``src/*.h`` as ctypes structures. ``kernels.kernel_library`` checks that both sides agree on every size."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int8, c_int16, c_int32, c_int64, c_uint8, c_void_p

MAX_DIMS = 6
MAX_BRANCHES = 16
MAX_OPERANDS = MAX_BRANCHES + 2

_Triple = c_int32 * 3
_Dims = c_int32 * MAX_DIMS
_Branches = c_int32 * MAX_BRANCHES


class Branch(Structure):
    _fields_ = [
        ("offset", POINTER(c_int32)), ("right_shift", POINTER(c_int32)), ("multiplier", POINTER(c_int16)),
        ("left_shift", c_int32), ("wide", c_int32),
    ]  # fmt: skip


class Requantize(Structure):
    _fields_ = [
        ("branches", c_int32), ("channels", c_int32), ("guard_bits", c_int32), ("reserved", c_int32),
        ("branch", POINTER(Branch)), ("zero", POINTER(c_int16)), ("lo", POINTER(c_uint8)), ("hi", POINTER(c_uint8)),
        ("table", POINTER(c_uint8)),
    ]  # fmt: skip


class Conv(Structure):
    _fields_ = [
        ("batch", c_int32), ("in_channels", c_int32), ("out_channels", c_int32), ("groups", c_int32),
        ("in_size", _Triple), ("out_size", _Triple), ("kernel", _Triple), ("stride", _Triple), ("dilation", _Triple),
        ("pad_before", _Triple),
        ("in_image_stride", c_int32), ("in_plane_stride", c_int32), ("in_row_stride", c_int32), ("in_pixel_stride", c_int32),
        ("out_pixel_stride", c_int32), ("branch_pixel_stride", _Branches), ("reserved", c_int32),
        ("weight", POINTER(c_int8)), ("bias", POINTER(c_int32)), ("pad_value", POINTER(c_uint8)),
        ("requantize", POINTER(Requantize)),
    ]  # fmt: skip


class Matmul(Structure):
    _fields_ = [
        ("size", _Triple), ("rows", c_int32), ("columns", c_int32), ("depth", c_int32),
        ("a_stride", _Triple), ("a_row_stride", c_int32), ("a_depth_stride", c_int32),
        ("b_stride", _Triple), ("b_depth_stride", c_int32), ("b_column_stride", c_int32),
        ("out_stride", _Triple), ("out_row_stride", c_int32),
        ("a_zero_point", c_int32), ("b_zero_point", c_int32),
        ("requantize", POINTER(Requantize)),
    ]  # fmt: skip


class Sums(Structure):
    _fields_ = [("steps", c_int32), ("results", c_int32), ("step", POINTER(c_int32)), ("result", POINTER(c_int32))]  # fmt: skip


class BilinearLinear(Structure):
    _fields_ = [
        ("rows", c_int32), ("depth", c_int32), ("outputs", c_int32), ("n", c_int32), ("m", c_int32), ("p", c_int32),
        ("products", c_int32), ("in_pixel_stride", c_int32), ("out_pixel_stride", c_int32),
        ("branch_pixel_stride", _Branches), ("reserved", c_int32), ("encode", Sums), ("decode", Sums),
        ("zero_point", POINTER(c_int32)), ("weight", POINTER(c_int16)), ("bias", POINTER(c_int32)),
        ("requantize", POINTER(Requantize)),
    ]  # fmt: skip


class BilinearMatmul(Structure):
    _fields_ = [
        ("product", Matmul), ("n", c_int32), ("m", c_int32), ("p", c_int32), ("products", c_int32),
        ("encode_a", Sums), ("encode_b", Sums), ("decode", Sums),
    ]  # fmt: skip


class Pool(Structure):
    _fields_ = [
        ("batch", c_int32), ("channels", c_int32), ("out_size", _Triple), ("dilation", _Triple),
        ("in_image_stride", c_int32), ("in_stride", _Triple), ("out_pixel_stride", c_int32), ("maximum", c_int32),
        ("branch_pixel_stride", _Branches), ("start", POINTER(c_int32) * 3), ("end", POINTER(c_int32) * 3),
        ("zero_point", POINTER(c_int32)), ("requantize", POINTER(Requantize)),
    ]  # fmt: skip


class Resize(Structure):
    _fields_ = [
        ("batch", c_int32), ("channels", c_int32), ("dims", c_int32), ("fraction_bits", c_int32), ("out_size", _Triple),
        ("in_image_stride", c_int32), ("in_stride", _Triple), ("out_pixel_stride", c_int32), ("reserved", c_int32),
        ("branch_pixel_stride", _Branches),
        ("index0", POINTER(c_int32) * 3), ("index1", POINTER(c_int32) * 3), ("weight1", POINTER(c_int32) * 3),
        ("zero_point", POINTER(c_int32)), ("requantize", POINTER(Requantize)),
    ]  # fmt: skip


class Loops(Structure):
    _fields_ = [
        ("size", _Dims), ("out_stride", _Dims), ("in_stride", _Dims * MAX_BRANCHES), ("inputs", c_int32),
        ("channel_dim", c_int32),
    ]  # fmt: skip


class RequantizeMap(Structure):
    _fields_ = [("loops", Loops), ("requantize", POINTER(Requantize))]


class Mul(Structure):
    _fields_ = [("loops", Loops), ("zero_point", POINTER(c_int32) * 2), ("requantize", POINTER(Requantize))]


class Widen(Structure):
    _fields_ = [("loops", Loops), ("zero_point", POINTER(c_int32))]


class Clamp(Structure):
    _fields_ = [("loops", Loops), ("lo", POINTER(c_int32)), ("hi", POINTER(c_int32))]


class Rescale(Structure):
    _fields_ = [
        ("loops", Loops), ("multiplier", POINTER(c_int64) * MAX_BRANCHES), ("shift", POINTER(c_int64) * MAX_BRANCHES),
    ]  # fmt: skip


class Table(Structure):
    _fields_ = [("loops", Loops), ("table", c_void_p), ("per_channel", c_int32), ("wide", c_int32)]


class Copy(Structure):
    _fields_ = [("loops", Loops), ("index", POINTER(c_int32)), ("index_dim", c_int32), ("element_bytes", c_int32)]


class Fill(Structure):
    _fields_ = [("loops", Loops), ("value", POINTER(c_int32)), ("element_bytes", c_int32), ("reserved", c_int32)]


class Sum(Structure):
    _fields_ = [
        ("loops", Loops), ("reduced_size", _Triple), ("reduced_stride", _Triple), ("zero_point", POINTER(c_int32)),
        ("requantize", POINTER(Requantize)),
    ]  # fmt: skip


class Softmax(Structure):
    _fields_ = [
        ("loops", Loops), ("table", POINTER(c_int32)), ("table_bits", c_int32), ("mask_bytes", c_int32),
        ("requantize", POINTER(Requantize)),
    ]  # fmt: skip


class LayerNorm(Structure):
    _fields_ = [
        ("loops", Loops), ("epsilon", c_int64), ("fraction_bits", c_int32), ("use_zero_point", c_int32),
        ("zero_point", c_int32), ("reserved", c_int32), ("requantize", POINTER(Requantize)),
    ]  # fmt: skip


class Embedding(Structure):
    _fields_ = [
        ("loops", Loops), ("rows", c_int32), ("row_stride", c_int32), ("element_bytes", c_int32), ("reserved", c_int32),
    ]  # fmt: skip


class Logic(Structure):
    _fields_ = [
        ("loops", Loops), ("scalar", c_int64), ("operation", c_int32), ("out_bytes", c_int32), ("in_bytes", c_int32 * 2),
    ]  # fmt: skip


class Quantize(Structure):
    _fields_ = [
        ("loops", Loops), ("inverse_scale", POINTER(c_float)), ("zero_point", POINTER(c_int32)), ("lo", c_int32),
        ("hi", c_int32),
    ]  # fmt: skip


class Dequantize(Structure):
    _fields_ = [
        ("loops", Loops), ("scale", POINTER(c_double)), ("zero_point", POINTER(c_int32)), ("wide", c_int32),
        ("reserved", c_int32),
    ]  # fmt: skip


class Kernel(Structure):
    """One row of the kernel table (``src/kernel_row.h``)."""

    _fields_ = [
        ("name", c_char_p), ("op", c_char_p), ("isa", c_char_p),
        ("accepts", ctypes.CFUNCTYPE(c_int32, c_void_p)),
        ("packed_bytes", ctypes.CFUNCTYPE(ctypes.c_size_t, c_void_p)),
        ("pack", ctypes.CFUNCTYPE(None, c_void_p, c_void_p)),
        ("units", ctypes.CFUNCTYPE(c_int32, c_void_p)),
        ("scratch_bytes", ctypes.CFUNCTYPE(ctypes.c_size_t, c_void_p)),
        ("run", c_void_p),
    ]  # fmt: skip


class Operand(Structure):
    _fields_ = [("offset", c_int64), ("base", c_int64), ("bytes", c_int64), ("space", c_int32), ("reserved", c_int32)]


class Step(Structure):
    _fields_ = [
        ("run", c_void_p), ("params", c_void_p), ("units", c_int32), ("inputs", c_int32), ("out", Operand),
        ("inp", Operand * MAX_OPERANDS),
    ]  # fmt: skip


class Task(Structure):
    _fields_ = [("steps", POINTER(Step)), ("count", c_int32), ("reserved", c_int32)]


class Program(Structure):
    _fields_ = [
        ("steps", POINTER(Step)), ("count", c_int32), ("reserved", c_int32), ("scratch_offset", c_int64),
        ("scratch_bytes", c_int64), ("arena_bytes", c_int64),
    ]  # fmt: skip


#: C name -> mirror: what ``kernels.kernel_library`` compares.
STRUCTS: dict[str, type[Structure]] = {
    "fxc_branch": Branch, "fxc_requantize": Requantize, "fxc_conv": Conv, "fxc_matmul": Matmul, "fxc_sums": Sums,
    "fxc_bilinear_linear": BilinearLinear, "fxc_bilinear_matmul": BilinearMatmul, "fxc_pool": Pool,
    "fxc_resize": Resize, "fxc_loops": Loops, "fxc_requantize_map": RequantizeMap, "fxc_mul": Mul, "fxc_widen": Widen,
    "fxc_clamp": Clamp, "fxc_rescale": Rescale, "fxc_table": Table, "fxc_copy": Copy, "fxc_fill": Fill, "fxc_sum": Sum,
    "fxc_softmax": Softmax, "fxc_layer_norm": LayerNorm, "fxc_embedding": Embedding, "fxc_logic": Logic,
    "fxc_quantize": Quantize, "fxc_dequantize": Dequantize, "fxc_kernel": Kernel, "fxc_operand": Operand,
    "fxc_step": Step, "fxc_task": Task, "fxc_program": Program,
}  # fmt: skip
