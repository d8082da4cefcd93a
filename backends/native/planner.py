"""``Planner``: one walk over an integer graph at concrete shapes. Rules (``emit_*.py``) turn nodes into steps.

    planner = Planner(gm, inputs, packed, prefer)       # inputs: one meta tensor per placeholder
    planner.steps, planner.outputs

Views make most data movement free; a ``cat`` along the innermost dimension is free too, because its inputs are computed
where they belong in the result (*placement*).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.errors import BackendError
from fxcompress.graph import argument, constant, is_call, is_constant, output_node, placeholders
from fxcompress.integer_ops import INTEGER_OPS
from fxcompress.meta import place

from . import structs
from .constants import Constants
from .fusion import Fusion, Group, find_groups
from .kernels import KernelRow, select
from .packing import PackedWeights
from .views import CHANNELS_LAST, ROW_MAJOR, Buffer, View, dense_strides, merge_dims, new_view

aten, ops = torch.ops.aten, torch.ops.fxcompress

#: Operators whose kernels want channels innermost.
SPATIAL = frozenset(
    INTEGER_OPS[name].overload
    for name in ("conv", "conv_transpose", "sum_pool", "adaptive_sum_pool", "max_pool", "adaptive_max_pool", "resize")
)
#: Operators that keep the memory order of their first tensor input.
ELEMENTWISE = frozenset(
    INTEGER_OPS[n].overload for n in ("requantize", "rescale", "mul", "widen", "clamp", "table", "pad")
)


@dataclass(frozen=True, eq=False)
class PlannedStep:
    """One kernel call: parameters, operands, and the node whose value it computes."""

    kernel: KernelRow
    params: ctypes.Structure
    inputs: tuple[View, ...]
    out: View
    node: fx.Node


class Planner:
    """Steps and buffers of one graph at one set of input shapes.

    Attributes:
        steps: in execution order.
        outputs: a view per graph output; its buffer is external.

    ``over_reads``: kernels may read past the end of an activation; the scalar ones, which ``prefer="scalar"`` takes, do not.
    """

    def __init__(
        self, gm: fx.GraphModule, inputs: list[Tensor], packed: PackedWeights, prefer: str | None = None,
        over_reads: bool = True,
    ):  # fmt: skip
        self.gm, self.packed, self.prefer, self.over_reads = gm, packed, prefer, over_reads
        self.constants = Constants()
        self.steps: list[PlannedStep] = []
        self.outputs: list[View] = []
        self.counters = {"nan": Buffer(4, offset=0), "index": Buffer(4, offset=4)}  # of bad values, read after each run
        self._views: dict[fx.Node, View] = {}
        self._fixed: dict[str, View] = {}
        self.shapes = logical_shapes(gm, inputs)
        _check_sizes(self.shapes)
        self.fusion: Fusion = find_groups(gm, self.shapes)
        self._orders = _memory_orders(gm)
        self._results = [a for a in output_node(gm).args[0] if isinstance(a, fx.Node)]
        self._placements = self._find_placements()
        self._walk(inputs)

    # -- what rules ask

    def view(self, node: fx.Node) -> View:
        """The tensor of a node, computed by an earlier step; constants are placed on first use."""
        if is_constant(node):
            if node.target not in self._fixed:
                self._fixed[node.target] = self._constant_view(constant(self.gm, node))
            return self._fixed[node.target]
        return self._views[node]

    def constant(self, node: fx.Node) -> Tensor:
        return constant(self.gm, node)

    def rank(self, node: fx.Node) -> int:
        return self.shapes[node].ndim

    def counter(self, name: str) -> View:
        """The number of bad values ("nan", "index") that kernels find, as an operand."""
        return View(self.counters[name], torch.empty(1, dtype=torch.int32, device="meta"))

    def branch_inputs(self, group: Group) -> list[View]:
        """The tensors behind the branches of a group, host excluded; codes instead of their widened form."""
        rest = group.branches[1:] if group.host is not None else group.branches
        return [self.view(branch_source(group.requantize.args[0][i])) for i in rest]

    def output(self, node: fx.Node, order: str | None = None) -> View:
        """Where the value of ``node`` goes: its place in a concatenation, an output of the call, or a buffer of its own."""
        meta = self.shapes[node]
        order = order or self._orders[node]
        if node in self._placements and self._orders[node] == order:
            cat, start = self._placements[node]
            dim = cat.args[1] % meta.ndim if len(cat.args) > 1 else 0
            whole = self.whole(cat)
            view = whole.moved(whole.tensor.narrow(dim, start, meta.shape[dim]))
        else:
            view = new_view(meta.shape, meta.dtype, order)
            if node in self._results and (order == ROW_MAJOR or meta.ndim < 3):
                view.buffer.external = len(placeholders(self.gm)) + self._results.index(node)
        self._views[node] = view
        return view

    def alias(self, node: fx.Node, view: View) -> None:
        """The value of ``node`` is this view of a tensor that exists."""
        self._views[node] = view

    def whole(self, cat: fx.Node) -> View:
        """The result of a concatenation, parts of which may have been computed in place already."""
        return self._views[cat] if cat in self._views else self.output(cat)

    def is_placed(self, node: fx.Node, cat: fx.Node) -> bool:
        """``node`` is computed inside the result of ``cat``."""
        return self._placements.get(node, (None, 0))[0] is cat

    def dense(self, view: View, order: str, node: fx.Node) -> View:
        """``view`` if it is dense in this memory order, else a copy that is."""
        if view.strides == dense_strides(view.shape, order):
            return view
        return self.copy(view, new_view(view.shape, view.dtype, order), node)

    def copy(self, source: View, target: View, node: fx.Node) -> View:
        """Add a step that copies ``source`` into ``target`` (same shape, any strides)."""
        loops, _ = self.loops(target, [source])
        params = structs.Copy(loops, None, 0, source.tensor.element_size())
        self.step("copy", params, [source], target, node)
        return target

    def loops(
        self, out: View, inputs: list[View], channel_dims: tuple[int, ...] = (), rows: bool = False
    ) -> tuple[structs.Loops, tuple[int, ...]]:
        """The loop nest of an elementwise kernel, and the shape of its per-channel arrays (``Constants.per_channel``).

        ``inputs`` broadcast to the shape of ``out``. ``channel_dims``, along which per-channel arrays vary, become one loop of
        their own; without any, the arrays have one entry per index of the outermost loop. ``rows``: the kernel works on whole
        rows along the channel dimension, which becomes the innermost loop.
        """
        tensors = [out.tensor, *(i.tensor.expand(out.shape) for i in inputs)]
        order = sorted(range(out.tensor.ndim), key=lambda d: -out.strides[d] if out.shape[d] > 1 else -(1 << 62))
        if rows:
            order.append(order.pop(order.index(*channel_dims)))
        dims = [(out.shape[d], tuple(t.stride(d) for t in tensors)) for d in order]
        first, last = _channel_loops(dims, order, channel_dims)
        before, after = merge_dims(dims[:first]), merge_dims(dims[last:])
        dims = [*before, *_one_loop(dims[first:last]), *after]
        missing = structs.MAX_DIMS - len(dims)
        if missing < 0:
            raise ValueError(
                f"a tensor of shape {out.shape} with strides {out.strides} needs more than {structs.MAX_DIMS} loops"
            )
        dims = [(1, (0,) * len(tensors))] * missing + dims
        loops = structs.Loops(inputs=len(inputs), channel_dim=missing + len(before) if channel_dims else 0)
        for d, (size, strides) in enumerate(dims):
            loops.size[d], loops.out_stride[d] = size, strides[0]
            for i, stride in enumerate(strides[1:]):
                loops.in_stride[i][d] = stride
        varying = tuple(n if d in channel_dims else 1 for d, n in enumerate(out.shape))
        return loops, varying if channel_dims else (dims[0][0],)

    def step(
        self, op: str, params: ctypes.Structure, inputs: list[View], out: View, node: fx.Node, part: int = 0
    ) -> None:
        """Pick a kernel, pack its weights, and add the call to the program. Steps with weights of one node differ in ``part``."""
        self.constants.keep(params)
        row = select(op, params, self.prefer)
        self.packed.pack(row, params, node, self.constants, part)
        self.steps.append(PlannedStep(row, params, tuple(inputs), out, node))

    # -- the walk

    def _walk(self, inputs: list[Tensor]) -> None:
        from .emit import RULES  # the rules are written in terms of this class

        for i, (node, tensor) in enumerate(zip(placeholders(self.gm), inputs, strict=True)):
            view = new_view(tensor.shape, tensor.dtype, ROW_MAJOR)
            view.buffer.external = i
            # SIMD kernels read past the end of activations: codes fed from outside move into the arena first.
            copied = self.over_reads and not tensor.is_floating_point()
            self._views[node] = self.copy(view, self.output(node), node) if copied else view
        for node in self.gm.graph.nodes:
            if node.op != "call_function" or node in self.fusion.absorbed:
                continue
            try:
                RULES[node.target](self, node)
            except (ValueError, BackendError) as error:
                raise BackendError(str(error).rstrip("."), stage="native backend", where=place(node)) from error
        for i, result in enumerate(output_node(self.gm).args[0]):
            self.outputs.append(self._external(result, len(inputs) + i))

    def _external(self, node: fx.Node, index: int) -> View:
        view = self.view(node)
        if view.buffer.external == index:
            return view
        target = new_view(view.shape, view.dtype, ROW_MAJOR)
        target.buffer.external = index
        return self.copy(view, target, node)

    def _constant_view(self, value: Tensor) -> View:
        view = new_view(value.shape, value.dtype, ROW_MAJOR)
        view.buffer.fixed = ctypes.cast(self.constants.array(value), ctypes.c_void_p).value
        return view

    # -- concatenations in place

    def _find_placements(self) -> dict[fx.Node, tuple[fx.Node, int]]:
        """Which nodes can be computed inside the result of a concatenation along its innermost dimension, and where."""
        placements: dict[fx.Node, tuple[fx.Node, int]] = {}
        for cat in self.gm.graph.nodes:
            if not is_call(cat, aten.cat.default):
                continue
            rank, start = self.shapes[cat].ndim, 0
            dim = argument(cat, "dim") % rank
            innermost = 1 if self._orders[cat] == CHANNELS_LAST else rank - 1
            for node in cat.args[0]:
                if (dim == innermost and node not in placements and node not in self._results and self._owns_memory(node)
                        and self._orders[node] == self._orders[cat] and cat.args[0].count(node) == 1):  # fmt: skip
                    placements[node] = (cat, start)
                start += self.shapes[node].shape[dim]
        return placements

    def _owns_memory(self, node: fx.Node) -> bool:
        return node.op == "call_function" and (
            node.target in ELEMENTWISE | SPATIAL | {aten.cat.default, ops.linear.default, ops.bilinear_linear.default}
        )


def has_channels_second(node: fx.Node) -> bool:
    """A layer in blocks over (N, C, ...), as of a 1x1 convolution."""
    return is_call(node, ops.bilinear_linear.default) and argument(node, "axis") == 1


def branch_source(branch: fx.Node) -> fx.Node:
    """What a branch of a requantization is read from: the codes under a ``widen``, else the accumulator."""
    return branch.args[0] if is_call(branch, ops.widen.default) else branch


def _channel_loops(dims: list, order: list[int], channel_dims: tuple[int, ...]) -> tuple[int, int]:
    """Positions first..last-1 of the loops that must not merge with others: those of ``channel_dims``, else a long innermost
    one, because the outer ones are what threads share."""
    if not channel_dims:
        return (len(dims) - 1, len(dims)) if dims and dims[-1][0] >= 16 else (0, 0)
    positions = [order.index(d) for d in channel_dims]
    if positions != list(range(positions[0], positions[0] + len(positions))):
        raise ValueError(f"parameters vary along the dimensions {channel_dims}, which do not lie side by side")
    return positions[0], positions[-1] + 1


def _one_loop(dims: list[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """Dimensions that have to be one loop, as one."""
    if len(dims) < 2:
        return dims
    merged = merge_dims(dims)
    if len(merged) > 1:
        raise ValueError("parameters vary along several dimensions of a tensor that is not dense there")
    return merged or [dims[0]]


def _check_sizes(shapes: dict[fx.Node, Tensor]) -> None:
    """Kernels count elements in int32."""
    for node, value in shapes.items():
        if value.numel() >= 1 << 31:
            raise BackendError(f"a tensor of shape {tuple(value.shape)}", stage="native backend", where=place(node),
                               expected="fewer than 2^31 elements", remedy="Run smaller batches.")  # fmt: skip


def logical_shapes(gm: fx.GraphModule, inputs: list[Tensor]) -> dict[fx.Node, Tensor]:
    """Every node's shape and dtype at these input shapes, by its fake kernel."""
    values: dict[fx.Node, Tensor] = dict(zip(placeholders(gm), inputs, strict=True))

    def value_of(node: fx.Node) -> Tensor:
        return values[node]

    for node in gm.graph.nodes:
        if is_constant(node):
            value = constant(gm, node)
            values[node] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        elif node.op == "call_function":
            values[node] = node.target(*fx.map_arg(node.args, value_of), **fx.map_arg(node.kwargs, value_of))
    return values


def _memory_orders(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """The memory order in which each node is computed: channels innermost from the first to the last spatial operator."""
    orders: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or is_call(node, ops.quantize.default):
            orders[node] = CHANNELS_LAST if _feeds_spatial(node) else ROW_MAJOR
        elif node.op != "call_function":
            orders[node] = ROW_MAJOR
        elif node.target in SPATIAL or has_channels_second(node):
            orders[node] = CHANNELS_LAST
        elif is_call(node, aten.slice.Tensor):
            orders[node] = orders[node.args[0]]
        elif is_call(node, aten.permute.default):
            orders[node] = _moved_order(orders[node.args[0]], node.args[1])
        elif node.target in ELEMENTWISE or is_call(
            node, aten.cat.default, aten.clone.default, aten.index_select.default
        ):
            sources = [n for n in node.all_input_nodes if not is_constant(n)]
            orders[node] = CHANNELS_LAST if any(orders[n] == CHANNELS_LAST for n in sources) else ROW_MAJOR
        else:
            orders[node] = ROW_MAJOR
    return orders


def _moved_order(order: str, dims: list[int]) -> str:
    """The memory order of a permuted tensor: (N, H, W, C) that becomes (N, C, H, W) lies channels last. Three dimensions are taken for
    tokens, which have no image order."""
    rank = len(dims)
    to_inside = [0, rank - 1, *range(1, rank - 1)] if order == ROW_MAJOR else list(range(rank))
    return CHANNELS_LAST if rank > 3 and [d % rank for d in dims] == to_inside else ROW_MAJOR


def _feeds_spatial(node: fx.Node) -> bool:
    """A spatial operator reads this tensor, directly or through elementwise operators."""
    pending, seen = list(node.users), set()
    while pending:
        user = pending.pop()
        if is_call(user, *SPATIAL) or has_channels_second(user):
            return True
        if user not in seen and (is_call(user, *ELEMENTWISE) or is_call(user, ops.quantize.default, aten.cat.default)):
            pending += user.users
        seen.add(user)
    return False
