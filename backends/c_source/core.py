"""The part of an integer graph that a device runs: codes in, codes or accumulators out, no boundary to float.

x f32 -> quantize -> ... -> dequantize -> y f32          becomes          x u8 -> ... -> y i32
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress import numerics
from fxcompress.errors import UnsupportedOperatorError
from fxcompress.graph import add_constant, constant, copy_graph_module, erase_dead, is_call, output_node, placeholders
from fxcompress.meta import place

from ..native.planner import logical_shapes

aten, ops = torch.ops.aten, torch.ops.fxcompress


@dataclass(frozen=True, eq=False)
class Port:
    """One input or output tensor of the exported network: ``real = scale * (value - zero_point)``.

    Attributes:
        name: of the argument in C.
        shape: batch included, in the order of the memory.
        dtype: uint8 codes, int32 accumulators, int64 indices, bool masks.
        scale, zero_point: float64 and int32, broadcasting in PyTorch's order of dimensions; None for indices and masks.
        bounds: (qmin, qmax) of an input's codes, else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    bounds: tuple[int, int] | None = None
    moved: bool = False  # channels last: (N, *S, C) of PyTorch's (N, C, *S)

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def codes(self, x: Tensor) -> Tensor:
        """What the device is fed for the real (or uint8) tensor ``x``, in PyTorch's order of dimensions."""
        if x.is_floating_point() and self.bounds is not None:
            x = numerics.quantize(x, self.scale, self.zero_point, *self.bounds)
        x = x.to(self.dtype)
        return (x.movedim(1, -1) if self.moved else x).contiguous()


@dataclass(frozen=True, eq=False)
class Core:
    """``graph_module`` takes one tensor per input and returns one per output; both have fixed shapes.

    ``positions``: of the inputs among those of the whole graph; what nobody reads is no input.
    """

    graph_module: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    positions: tuple[int, ...]

    def codes(self, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the device is fed for the graph inputs of a call, one tensor per placeholder of the graph that was exported."""
        return tuple(port.codes(flat[i]) for i, port in zip(self.positions, self.inputs, strict=True))

    def meta_inputs(self) -> list[Tensor]:
        return [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in self.inputs]


@dataclass(frozen=True)
class CoreOptions:
    """``batch``: samples per call; ``channels_last``: images lie (N, *S, C); ``common_scale``: one scale per int32 output."""

    batch: int = 1
    channels_last: bool = False
    common_scale: bool = True


def integer_core(gm: fx.GraphModule, input_scales: list, output_scales: list, options: CoreOptions) -> Core:
    """The core of a verified integer graph.

    Args:
        input_scales: (scale, zero_point, qmin, qmax) per input that is codes already; empty or None where the graph quantizes.
        output_scales: (scale, zero_point) per output that stays integer, None where the graph dequantizes.

    Raises:
        UnsupportedOperatorError: parts of the graph are in float on purpose; all of them are listed.
    """
    _refuse_float(gm)
    gm = copy_graph_module(gm)
    gm.meta = {}
    inputs, positions, every = [], [], placeholders(gm)
    for i, (node, given) in enumerate(zip(every, input_scales or [None] * len(every), strict=True)):
        if not node.users:
            gm.graph.erase_node(node)
            continue
        if node.meta["val"].is_floating_point():
            given = _strip_quantize(gm, node)
        inputs.append(_input_port(gm, node, given, options))
        positions.append(i)
    outputs = _strip_outputs(gm, output_scales, inputs, options)
    erase_dead(gm)
    gm.graph.lint()
    gm.recompile()
    return Core(gm, tuple(inputs), outputs, tuple(positions))


def _refuse_float(gm: fx.GraphModule) -> None:
    kept = [n for n in gm.graph.nodes if n.op == "call_function" and n.meta.get("keep_float")]
    if kept:
        found = "; ".join(f"{n.target} at {place(n)}" for n in kept)
        raise UnsupportedOperatorError(f"{len(kept)} operators are in float on purpose: {found}", stage="C export",
                                       expected="integers only", remedy="Compile without keep_float.")  # fmt: skip


def _strip_quantize(gm: fx.GraphModule, node: fx.Node) -> tuple:
    """Feed ``node`` codes; returns (scale, zero_point, qmin, qmax). A verified graph only ever quantizes its float inputs."""
    first, *others = node.users
    rows = {_quantization(gm, user) for user in (first, *others)}
    if len(rows) > 1:
        raise UnsupportedOperatorError(f"the input {node.name} is quantized in {len(rows)} ways", stage="C export",
                                       where=place(node), remedy="Compile with spiq=False.")  # fmt: skip
    scale, zero_point = (constant(gm, a) for a in first.args[1:3])
    for user in (first, *others):
        user.replace_all_uses_with(node)
        gm.graph.erase_node(user)
    node.meta = {**node.meta, "val": node.meta["val"].to(torch.uint8)}
    return scale, zero_point, *first.args[3:5]


def _quantization(gm: fx.GraphModule, node: fx.Node) -> tuple:
    scale, zero_point = (constant(gm, a) for a in node.args[1:3])
    return (*scale.flatten().tolist(), *zero_point.flatten().tolist(), *node.args[3:5])


def _input_port(gm: fx.GraphModule, node: fx.Node, scales: tuple | None, options: CoreOptions) -> Port:
    value = node.meta["val"]
    shape = tuple(d if isinstance(d, int) else options.batch for d in value.shape)
    moved = options.channels_last and len(shape) > 3
    if moved:  # a view: the plan takes images channels last
        inside = [0, len(shape) - 1, *range(1, len(shape) - 1)]
        with gm.graph.inserting_after(node):
            image = gm.graph.call_function(aten.permute.default, (node, inside))
        node.replace_all_uses_with(image, delete_user_cb=lambda user: user is not image)
        shape = (shape[0], *shape[2:], shape[1])
    scale, zero_point, *bounds = scales or (None, None)
    return Port(f"in_{node.name}", shape, value.dtype, scale, zero_point, tuple(bounds) or None, moved)  # fmt: skip


def _strip_outputs(
    gm: fx.GraphModule, output_scales: list, inputs: list[Port], options: CoreOptions
) -> tuple[Port, ...]:
    """Return what is in front of ``dequantize``, at one scale and channels last where the options say so."""
    output, results = output_node(gm), []
    for node, given in zip(output.args[0], output_scales, strict=True):
        scale, zero_point = given or (None, None)
        if is_call(node, ops.dequantize.default):
            scale, zero_point = (constant(gm, a) for a in node.args[1:3])
            node = node.args[0]
        results.append((node, scale, zero_point))
    values = logical_shapes(gm, [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in inputs])
    ports, nodes = [], []
    for i, (node, scale, zero_point) in enumerate(results):
        shape, dtype = tuple(values[node].shape), values[node].dtype
        with gm.graph.inserting_before(output):
            if options.common_scale and dtype == torch.int32 and scale is not None and scale.numel() > 1:
                node, scale = _at_one_scale(gm, node, scale)
            moved = options.channels_last and len(shape) > 3
            if moved:
                node = gm.graph.call_function(aten.permute.default, (node, [0, *range(2, len(shape)), 1]))
                shape = (shape[0], *shape[2:], shape[1])
        nodes.append(node)
        ports.append(Port(f"out{i}", shape, dtype, scale, zero_point, None, moved))
    output.args = (tuple(nodes),)
    return tuple(ports)


def _at_one_scale(gm: fx.GraphModule, node: fx.Node, scale: Tensor) -> tuple[fx.Node, Tensor]:
    """Accumulators with a scale per channel at the largest of them: no value grows, so int32 holds them all."""
    largest = scale.max()
    multiplier, shift = numerics.dyadic31(scale / largest)
    arguments = [
        add_constant(gm, f"{node.name}_{what}", t, node) for what, t in (("gain", multiplier), ("shift", shift))
    ]
    rescaled = gm.graph.call_function(ops.rescale.default, ([node], arguments[:1], arguments[1:]))
    rescaled.meta = dict(node.meta)
    return rescaled, largest
