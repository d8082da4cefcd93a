"""Shapes, dtypes and channel axes of every node, kept current after each pass.

    propagate(gm)        node.meta["val"] = FakeTensor (symbolic batch), TensorMeta.channel_axis = rule of the operator

A node is recomputed only when its operator, its arguments or the shape or dtype of one of its inputs changed since the
last call, so propagating an unchanged graph costs one comparison per node. What the same operator gave on the same shapes
elsewhere in the graph is not computed again either: networks repeat themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from . import dialects as d
from .errors import InternalError
from .graph import constant, placeholders
from .integer_ops import QDQ_LEVEL
from .meta import describe, place, tensor_meta

_KEY = "shape_key"  # node.meta: what "val" was computed from
_VALUES = "shape_values"  # gm.meta: values computed so far, by that key


def propagate(gm: fx.GraphModule) -> None:
    """Bring ``node.meta["val"]`` and ``TensorMeta.channel_axis`` of every node up to date.

    The placeholders keep the FakeTensors they have (``capture`` and ``trace_shapes`` make them); everything behind
    them is computed in their fake mode. Raises ``InternalError`` naming the first node that cannot be computed.
    """
    mode = _fake_mode(gm)
    for node in gm.graph.nodes:
        if node.op != "output":
            compute(gm, node, mode)


def compute(gm: fx.GraphModule, node: fx.Node, mode: FakeTensorMode | None = None, *, known: bool = False) -> None:
    """``propagate`` for one node whose inputs are up to date, for a pass that needs the shape of what it just made.

    ``known``: the node's "val" is right as it is (the tensor is one that was there before), so only take note of it.
    """
    key = _key(gm, node)
    if node.meta.get(_KEY) != key or "val" not in node.meta:
        if not known and node.op != "placeholder":
            node.meta["val"] = _value(gm, node, key, mode or _fake_mode(gm))
        node.meta[_KEY] = key
    axis = channel_axis(node)
    if tensor_meta(node).channel_axis != axis:
        describe(node, channel_axis=axis)


def trace_shapes(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> None:
    """Give a hand-made graph its shapes: placeholders become FakeTensors like the examples, then ``propagate``.

    The first dimension of every input is symbolic; inputs whose first dimension has equal length share the symbol.
    Examples of batch 0 or 1 keep that batch as a constant (the exporter's convention: 0 and 1 specialize).

    >>> trace_shapes(gm, (torch.randn(2, 3, 8, 8),))
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs = placeholders(gm)
    if len(inputs) != len(example_inputs):
        raise InternalError(
            f"{len(example_inputs)} example inputs for {len(inputs)} placeholders", stage="trace_shapes"
        )
    for node, example in zip(inputs, example_inputs, strict=True):
        dynamic = [DimDynamic.DUCK if i == 0 else DimDynamic.STATIC for i in range(example.ndim)]
        node.meta["val"] = mode.from_tensor(
            example.detach(), symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic)
        )
        node.meta.pop(_KEY, None)
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            node.meta.pop(_KEY, None)
    propagate(gm)


def _fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    for node in placeholders(gm):
        value = node.meta.get("val")
        if not isinstance(value, FakeTensor):
            raise InternalError(
                f"placeholder {node.name} has no shape", stage="propagate", expected='a FakeTensor in node.meta["val"]'
            )
        return value.fake_mode
    return FakeTensorMode(shape_env=ShapeEnv())


# --------------------------------------------------------------------------------------------- what a node depends on


def _signature(value: object) -> object:
    """Hashable summary of a node's value: dtype and dimensions, symbolic ones as their expression."""
    if isinstance(value, Tensor):
        return (value.dtype, *[_dimension(s) for s in value.shape])
    if isinstance(value, (tuple, list)):
        return tuple(_signature(v) for v in value)
    return _dimension(value)


def _dimension(size: object) -> object:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _key(gm: fx.GraphModule, node: fx.Node) -> tuple:
    if node.op == "placeholder":
        return ("placeholder",)
    if node.op == "get_attr":
        value = constant(gm, node)
        return value.dtype, tuple(value.shape)
    return node.target, _freeze(node.args), _freeze(node.kwargs) if node.kwargs else None


def _freeze(argument: object) -> object:
    """An argument with nodes replaced by their signatures; numbers keep their type (1, 1.0 and True are equal)."""
    if isinstance(argument, fx.Node):
        return _signature(argument.meta["val"])
    if isinstance(argument, (tuple, list)):
        return tuple([_freeze(a) for a in argument])
    if isinstance(argument, dict):
        return tuple([(k, _freeze(a)) for k, a in argument.items()])
    if isinstance(argument, (bool, float)):
        return type(argument).__name__, repr(argument)
    if isinstance(argument, slice):
        return "slice", _freeze((argument.start, argument.stop, argument.step))
    return argument


class _Values(dict):
    """Values in one fake mode, by (key, strides of a constant)."""

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self.mode = mode

    def __deepcopy__(self, memo) -> _Values:
        return _Values(self.mode)  # a cache: a copy may start empty


def _value(gm: fx.GraphModule, node: fx.Node, key: tuple, mode: FakeTensorMode) -> object:
    """``_evaluate``, once per key; sizes that depend on the data are new at each call."""
    if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
        return _evaluate(gm, node, mode)
    values = gm.meta.get(_VALUES)
    if values is None or values.mode is not mode:
        values = gm.meta[_VALUES] = _Values(mode)
    key = key, constant(gm, node).stride() if node.op == "get_attr" else None
    if key not in values:
        values[key] = _evaluate(gm, node, mode)
    return values[key]


#: Shape and dtype are the input's: not worth tracing through a decomposition.
_LIKE_THE_INPUT = d.UNARY | {d.CLAMP, d.CHANNEL_CLAMP, d.BATCH_NORM}


def _evaluate(gm: fx.GraphModule, node: fx.Node, mode: FakeTensorMode) -> object:
    """The node's value on FakeTensors. Guards are not recorded: looking at shapes must not specialize the batch."""
    if node.op == "get_attr":
        value = constant(gm, node)
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if node.op != "call_function":
        raise InternalError(f"{node.op} {node.target}", stage="propagate", where=place(node), expected="call_function")
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    if node.target in _LIKE_THE_INPUT and args[0].is_floating_point():
        return args[0]
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    try:
        with torch.no_grad(), mode, mode.shape_env.suppress_guards():
            if node.target is torch.ops.aten.constant_pad_nd.default:
                return _padded(args[0], args[1])
            return node.target(*args, **kwargs)
    except Exception as error:
        shapes = {n.name: tuple(n.meta["val"].shape) for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)}
        raise InternalError(
            f"{node.target} does not accept {shapes}: {str(error).splitlines()[0]}",
            stage="propagate",
            where=place(node),
        ) from error


def _padded(x: Tensor, widths: Sequence[int]) -> Tensor:
    """The tensor of constant_pad_nd(x, widths), whose own trace takes the batch of a permuted x for a constant."""
    sizes = list(x.shape)
    for i, width in enumerate(widths):
        sizes[-1 - i // 2] += width
    return x.new_empty(sizes)


# -------------------------------------------------------------------------------------------------------- channel axes

_CHANNEL_1 = (d.WEIGHTED - {d.LINEAR}) | {d.BATCH_NORM, d.GROUP_NORM}
_CHANNEL_LAST = {d.LINEAR, d.LAYER_NORM, d.RMS_NORM, d.EMBEDDING}


def channel_axis(node: fx.Node) -> int | None:
    """The dimension that carries channels, None where there is none (or none is known).

    placeholder           1 if rank >= 3, the last one if rank 2, else None
    conv, conv_transpose, batch_norm, group_norm    1;  linear, layer_norm, rms_norm, embedding: the last one
    one-input operators   that of the input (pooling, unary, clamp, slice, pad, resize, quantize, dequantize, ...)
    add, sub, mul, cat    that of the first operand of the result's rank
    permute, mean, select, reshape      where the input's channel dimension went, None if it is gone

    A reshape keeps axis ``a`` when the dimensions before and at ``a`` are unchanged, and also when ``a`` merges with the
    dimensions after it, (N, C, *S) -> (N, C*prod(S)): channel c is then the block of prod(S) features from c*prod(S),
    and ``shape[axis] / C`` tells the block length.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or node.op in ("get_attr", "output"):
        return None
    if node.op == "placeholder":
        return {0: None, 1: None, 2: 1}.get(value.ndim, 1)
    if node.target in _CHANNEL_1:
        return 1
    if node.target in _CHANNEL_LAST:
        return value.ndim - 1
    source = _followed_input(node, value.ndim)
    if source is None or (axis := tensor_meta(source).channel_axis) is None:
        return None
    rule = _AXIS_RULES.get(node.target)
    if rule is not None:
        return rule(node, source, axis)
    return axis if value.ndim == source.meta["val"].ndim else None


def _followed_input(node: fx.Node, ndim: int) -> fx.Node | None:
    """The activation whose channel axis the node follows: one of the result's rank if there is one."""
    candidates = [
        n
        for n in node.all_input_nodes
        if n.op != "get_attr"
        and isinstance(n.meta.get("val"), Tensor)
        and (n.meta["val"].is_floating_point() or node.target in QDQ_LEVEL)
    ]
    known = [n for n in candidates if n.meta["val"].ndim == ndim and tensor_meta(n).channel_axis is not None]
    return next(iter(known or candidates), None)


def _permute_axis(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    ndim = source.meta["val"].ndim
    return [dim % ndim for dim in node.args[1]].index(axis)


def _reduced_axis(dims: Sequence[int], keepdim: bool, ndim: int, axis: int) -> int | None:
    dims = {dim % ndim for dim in dims} if dims else set(range(ndim))
    if axis in dims:
        return None
    return axis if keepdim else axis - sum(dim < axis for dim in dims)


def _mean_axis(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return _reduced_axis(node.args[1] or (), keepdim, source.meta["val"].ndim, axis)


def _select_axis(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    return _reduced_axis([node.args[1]], False, source.meta["val"].ndim, axis)


def _reshape_axis(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    before = [_dimension(s) for s in source.meta["val"].shape]
    after = [_dimension(s) for s in node.meta["val"].shape]
    if len(after) <= axis or before[:axis] != after[:axis]:
        return None
    if before[axis] == after[axis]:
        return axis
    merged = before[axis]
    for size in before[axis + 1 :]:
        merged = merged * size
        if merged == after[axis]:
            return axis
    return None


_AXIS_RULES: dict[object, Callable[[fx.Node, fx.Node, int], int | None]] = {
    torch.ops.aten.permute.default: _permute_axis,
    torch.ops.aten.mean.dim: _mean_axis,
    torch.ops.aten.select.int: _select_axis,
    torch.ops.aten.reshape.default: _reshape_axis,
    d.MATMUL: lambda node, source, axis: None,  # mixes the rows of one operand with the columns of the other
}
