"""One spelling for convolution and normalization: every stride, padding and dilation a full list, every argument written out.

convolution, conv2d(padding="same"), ...      ->  conv{1,2,3}d, conv_transpose{1,2,3}d
native_batch_norm(...)[0], ...                ->  batch_norm
"""

from __future__ import annotations

import torch
from torch import fx

from fxcompress.dialects import BATCH_NORM
from fxcompress.graph import argument, per_dimension, rank, shape

from ._constructors import PAD
from ._expression import Expression, Op, Refused
from ._spell_normalization import sample_instance_norm

aten = torch.ops.aten

CONVOLUTION = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


# -------------------------------------------------------------------------------------------------------- convolution


def conv(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """conv(x, w, b, stride, padding, dilation, groups); padding="same" -> explicit, uneven as constant_pad_nd"""
    x, weight, bias = call.args[0], call.args[1], argument(call, "bias")
    n = rank(weight) - 2
    if rank(x) != n + 2:
        return Refused(f"its input has {rank(x)} dimensions: it lacks the batch")
    stride, dilation = per_dimension(argument(call, "stride"), n), per_dimension(argument(call, "dilation"), n)
    padding = argument(call, "padding")
    if isinstance(padding, str):
        x, padding = _padding_by_name(x, padding, [d * (k - 1) for d, k in zip(dilation, shape(weight)[2:])])
    return Op(CONVOLUTION[n], x, weight, bias, stride, per_dimension(padding, n), dilation, argument(call, "groups"))


def _padding_by_name(x: fx.Node, name: str, totals: list[int]) -> tuple[Expression, list[int]]:
    """(input, symmetric padding): "valid" pads nothing; an odd total of "same" pads one more behind."""
    if name == "valid":
        return x, [0] * len(totals)
    odd = [t % 2 for t in totals]
    if any(odd):
        widths = [w for extra in reversed(odd) for w in (0, extra)]
        x = Op(PAD, x, widths, 0.0)
    return x, [t // 2 for t in totals]


def conv_transpose(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """conv_transpose(x, w, b, stride, padding, output_padding, groups, dilation)"""
    n = rank(call.args[1]) - 2
    if rank(call) != n + 2:
        return Refused(f"its input has {rank(call)} dimensions: it lacks the batch")
    lists = [per_dimension(argument(call, name), n) for name in ("stride", "padding", "output_padding")]
    return Op(TRANSPOSED[n], *call.args[:2], argument(call, "bias"), *lists, argument(call, "groups"),
              per_dimension(argument(call, "dilation"), n))  # fmt: skip


def convolution(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups) -> conv or conv_transpose"""
    return (conv_transpose if argument(call, "transposed") else conv)(call, gm)


_STATISTICS = ("input", "weight", "bias", "running_mean", "running_var")


def _batch_norm(call: fx.Node) -> Op:
    statistics = [argument(call, name) for name in _STATISTICS]
    return Op(BATCH_NORM, *statistics, False, argument(call, "momentum"), argument(call, "eps"), False)


def batch_norm(call: fx.Node, gm: fx.GraphModule) -> Expression | Refused:
    """batch_norm(x, w, b, mean, var, False, momentum, eps, False)"""
    return Refused("it is in training mode") if argument(call, "training") else _batch_norm(call)


def native_batch_norm(call: fx.Node, gm: fx.GraphModule) -> Expression | None:
    """native_batch_norm(...)[0] in eval mode -> batch_norm"""
    source, index = call.args
    trains = source.target is aten.native_batch_norm.default and argument(source, "training")
    return None if index != 0 or trains else _batch_norm(source)


def instance_norm(call: fx.Node, gm: fx.GraphModule) -> Expression:
    """instance_norm -> batch_norm if it uses running statistics, else group_norm"""
    return sample_instance_norm(call) if argument(call, "use_input_stats") else _batch_norm(call)


#: overload -> rule(call, gm)
LAYERS = {
    **dict.fromkeys(
        [
            aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
            aten.conv3d.padding,
        ],
        conv,
    ),
    **dict.fromkeys(TRANSPOSED.values(), conv_transpose),
    aten.convolution.default: convolution,
    aten._convolution.default: convolution,
    aten.batch_norm.default: batch_norm,
    aten.instance_norm.default: instance_norm,
}  # fmt: skip

#: producer -> rule(getitem call, gm)
LAYER_PARTS = {
    aten.native_batch_norm.default: native_batch_norm,
    aten._native_batch_norm_legit_no_training.default: native_batch_norm,
}
