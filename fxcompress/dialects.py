"""Legal operators per level. What is not listed here is refused by name.

float     a closed set of ATen overloads, one spelling per operation (``normalize`` maps the others onto it)
qdq       the float set plus fxcompress::quantize / dequantize
integer   fxcompress:: operators on integer tensors plus ATen data movement (``integer_ops.py``)
"""

from __future__ import annotations

import torch

from . import integer_ops
from .errors import LevelError
from .float_ops import MASKED_SOFTMAX
from .graph import dtype, is_float
from .integer_ops import is_index
from .meta import place
from .rewrite import Level

aten = torch.ops.aten

CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
TRANSPOSED_CONVOLUTIONS = frozenset(
    {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
)
LINEAR = aten.linear.default
#: Operators with weights: (x, weight, bias) are the first three arguments of each.
WEIGHTED = CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | {LINEAR}

#: aten's adaptive max pooling returns indices too; ours does not, and takes float tensors and codes alike.
ADAPTIVE_MAX_POOL = integer_ops.INTEGER_OPS["adaptive_max_pool"].overload
MAX_POOLS = frozenset({aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, ADAPTIVE_MAX_POOL})
AVERAGE_POOLS = frozenset({aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default})
ADAPTIVE_AVERAGE_POOLS = frozenset(
    {aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default}
)
#: Everything that averages: an integer sum with 1/n in the multiplier.
AVERAGES = AVERAGE_POOLS | ADAPTIVE_AVERAGE_POOLS | {aten.mean.dim}

#: Elementwise functions of one tensor (further arguments are Python numbers): a table on 8-bit codes.
UNARY = frozenset(
    {
        aten.sigmoid.default, aten.tanh.default, aten.silu.default, aten.gelu.default, aten.hardswish.default,
        aten.hardsigmoid.default, aten.leaky_relu.default, aten.elu.default, aten.softplus.default, aten.mish.default,
        aten.exp.default, aten.sqrt.default, aten.rsqrt.default, aten.abs.default, aten.neg.default,
        aten.pow.Tensor_Scalar, aten.log.default, aten.erf.default, aten.sin.default, aten.cos.default,
        aten.reciprocal.default, aten.sign.default, aten.log_sigmoid.default, aten.selu.default, aten.celu.default,
        aten.hardshrink.default, aten.softshrink.default, aten.threshold.default, aten.atan.default, aten.erfc.default,
        aten.expm1.default, aten.exp2.default, aten.log1p.default, aten.log2.default, aten.log10.default,
        aten.floor.default, aten.ceil.default, aten.trunc.default, aten.round.default,
    }
)  # fmt: skip
#: clamp(x, min, max) with Python numbers or None: the one spelling of relu, relu6, hardtanh, clamp_min, clamp_max.
CLAMP = aten.clamp.default
#: clamp(x, min, max) with constants that vary along the channels, (C, 1, 1), or None: what becomes of a ReLU6 whose
#: channels are scaled. In integers it is the bounds of the rounding, like the other clamp.
CHANNEL_CLAMP = aten.clamp.Tensor

#: Data movement: the values are those of the input, elsewhere. Codes move unchanged.
MOVEMENT = frozenset(
    {
        aten.reshape.default, aten.permute.default, aten.slice.Tensor, aten.constant_pad_nd.default,
        aten.select.int, aten.index_select.default, aten.expand.default, aten.clone.default,
    }
)  # fmt: skip
CAT = aten.cat.default
RESIZES = frozenset({aten.upsample_bilinear2d.vec, aten.upsample_linear1d.vec})

#: What may compute integers and booleans from integer inputs (token ids, attention masks): movement and logic.
INDEXING = MOVEMENT | {CAT} | integer_ops.INDEX_OPS

#: x (op) y of two tensors of broadcastable shape, no alpha. ``sub`` is add with a negative branch.
ADD, SUB, MUL = aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor
MATMUL = aten.matmul.default
BATCH_NORM = aten.batch_norm.default
#: Over the last dimension; masked_softmax leaves elements out.
SOFTMAXES = frozenset({aten.softmax.int, MASKED_SOFTMAX})
LAYER_NORM, GROUP_NORM, RMS_NORM = aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default
#: Rows of each sample are normalized, then scaled and shifted by constants.
NORMALIZATIONS = frozenset({LAYER_NORM, GROUP_NORM, RMS_NORM})
#: Rows of a constant table, picked by integers.
EMBEDDING = aten.embedding.default
FLOAT = (
    WEIGHTED
    | MAX_POOLS
    | AVERAGES
    | UNARY
    | MOVEMENT
    | RESIZES
    | SOFTMAXES
    | NORMALIZATIONS
    | {CLAMP, CHANNEL_CLAMP, CAT, ADD, SUB, MUL, MATMUL, BATCH_NORM, EMBEDDING}
)


def level_targets(level: Level) -> frozenset:
    """The operator overloads a graph of this level may call."""
    if level is Level.FLOAT:
        return FLOAT | integer_ops.FLOAT_LEVEL
    if level is Level.QDQ:
        return FLOAT | integer_ops.FLOAT_LEVEL | integer_ops.QDQ_LEVEL
    return integer_ops.INTEGER_LEVEL


def check_level(gm: torch.fx.GraphModule, level: Level, *, stage: str = "") -> None:
    """Raise ``LevelError`` naming the first node whose operator or dtype ``level`` does not allow."""
    legal = level_targets(level)
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or node.meta.get("keep_float"):
            continue
        if node.op != "call_function":
            raise LevelError(
                f"{node.op} {node.target}", stage=stage, where=place(node), expected="call_function nodes only"
            )
        if node.target in INDEXING and "val" in node.meta and not is_float(node) and is_index(gm, node):
            continue  # token ids and masks
        if node.target not in legal:
            raise LevelError(f"{node.target} is not in the {level.value} dialect", stage=stage, where=place(node))
        if level is Level.FLOAT and "val" in node.meta and not is_float(node):
            raise LevelError(
                f"{node.target} computes {dtype(node)}", stage=stage, where=place(node), expected="a float tensor"
            )
