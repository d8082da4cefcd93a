"""From a traced graph to a flat one with its own constants.

placeholders are tensors, the output is a tuple of nodes, parameters and buffers are float32 snapshots,
every node carries the module path and the source line it came from
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from . import shapes
from .errors import CaptureError, OptionError
from .example_call import ExampleCall
from .graph import calls, erase_dead, make_graph_module, placeholders
from .interface import InputLeaf
from .meta import Origin, describe
from .model_checks import check_aliasing
from .traced import Traced
from .written_constants import fold_written_constants

aten = torch.ops.aten

_ASSERTS = frozenset(
    {
        aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default,
        aten.sym_constrain_range_for_size.default, aten.sym_constrain_range.default,
    }
)  # fmt: skip


def flatten_graph(traced: Traced, example: ExampleCall) -> tuple[fx.GraphModule, tuple, pytree.TreeSpec]:
    """Copy ``traced``; returns (flat graph module, output leaves, nesting of the output) as ``Interface`` wants them.

    ``traced`` is not changed and shares no tensor with the result. Raises ``CaptureError`` for graphs that depend on
    more than their inputs: symbolic arguments, subgraphs, state written by the forward.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    constants = _Constants()
    leaves = dict(zip(traced.inputs, input_leaves(traced.inputs, example), strict=True))
    for node in traced.graph.nodes:
        if node in traced.state:
            name, value = traced.state[node]
            copies[node] = _with_meta(node, graph.get_attr(constants.target(name, value)), name.rpartition(".")[0])
        elif node.op == "placeholder" and not leaves[node].is_tensor:
            _require_unused(node, leaves[node])
        elif node.op == "output":
            outputs, out_spec, nodes = _results(traced, node.args[0])
            graph.output(tuple(copies[n] for n in nodes))
        elif node.op != "call_module" and node.target not in _ASSERTS:  # the only module call is _guards_fn
            copies[node] = _with_meta(node, graph.node_copy(node, copies.__getitem__))
    gm = make_graph_module(constants.snapshots, graph)
    gm.eval()
    _check_state_unchanged(gm)
    fold_written_constants(gm)
    check_aliasing(gm)  # before dead code goes: an assignment to a part of a tensor has no reader
    erase_dead(gm)
    for node in gm.graph.nodes:
        if node.op != "output":
            shapes.compute(gm, node, known="val" in node.meta and not constants.converted)  # the exporter computed it
    return gm, outputs, out_spec


def input_leaves(inputs: Sequence[fx.Node], example: ExampleCall) -> Sequence[InputLeaf]:
    """The leaf behind each placeholder; a trace may have one for constants too. Empty when they do not match."""
    return next((ls for ls in (example.leaves, example.tensor_leaves) if len(ls) == len(inputs)), ())


class _Constants:
    """Snapshots of the tensors a graph reads, one per storage, offset and strides: tied weights stay tied."""

    def __init__(self):
        self.snapshots: dict[str, Tensor] = {}
        self.converted = False  # some constant was not float32
        self._targets: dict[tuple, str] = {}

    def target(self, name: str, value: object) -> str:
        """The name of the snapshot for a parameter, buffer or constant of the model."""
        if not isinstance(value, Tensor):
            raise CaptureError(f"the graph holds {name}, a {type(value).__name__}", stage="capture",
                               remedy="Write the model without control flow operators (torch.cond, map, scan).")  # fmt: skip
        key = (
            value.untyped_storage().data_ptr(),
            value.storage_offset(),
            tuple(value.shape),
            value.stride(),
            value.dtype,
        )
        if value.numel() == 0:
            key = (name,)
        if key not in self._targets:
            self._targets[key] = name
            self.converted |= value.is_floating_point() and value.dtype != torch.float32
            value = value.detach().float() if value.is_floating_point() else value.detach()
            self.snapshots[name] = value.clone(memory_format=torch.contiguous_format)
        return self._targets[key]


def _with_meta(old: fx.Node, new: fx.Node, module: str = "") -> fx.Node:
    """Shape, module path (``module`` if the trace has none) and source line; further notes would only go stale."""
    new.meta = {key: old.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in old.meta}
    describe(new, origin=origin(old, module))
    return new


def origin(node: fx.Node, module: str = "") -> Origin:
    """Path of the innermost module, and the innermost line of user code: "models.py:52"."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        module = module if path.startswith("_empty_nn_module_stack") else path or module
    source = ""
    for file, line in re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or ""):
        if "torch" not in PurePath(file).parts and not file.startswith("<"):
            source = f"{PurePath(file).name}:{line}"
    return Origin(module, source)


def _require_unused(node: fx.Node, leaf: InputLeaf) -> None:
    if node.users:
        raise CaptureError(f"argument {leaf.name} = {leaf.value!r} stayed symbolic", stage="capture",
                           remedy="Fix it with functools.partial or a wrapper module.")  # fmt: skip


def _results(traced: Traced, result: object) -> tuple[tuple, pytree.TreeSpec, list[fx.Node]]:
    """(output leaves, nesting, distinct result nodes): a node returned twice is computed and returned once."""
    leaves, spec = pytree.tree_flatten(result)
    spec = spec if traced.out_spec is None else traced.out_spec
    nodes = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))
    for node in nodes:
        if not isinstance(node.meta.get("val"), Tensor):
            raise CaptureError(f"the model returns {node.name}, a number computed from the shapes", stage="capture",
                               remedy="Return tensors and constants only.")  # fmt: skip
    if not nodes:
        raise CaptureError("the model returns no tensor", stage="capture", remedy="Return what the forward computes.")
    return tuple(nodes.index(leaf) if isinstance(leaf, fx.Node) else ("constant", leaf) for leaf in leaves), spec, nodes


def _check_state_unchanged(gm: fx.GraphModule) -> None:
    """Refuse writes to parameters and buffers: the compiled model has no state."""
    for node in gm.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            written = node.args[0]
            if isinstance(written, fx.Node) and written.op == "get_attr" and aten.detach_.default is not node.target:
                raise CaptureError(f"the forward writes to {written.target}", stage="capture", where=str(origin(node)),
                                   remedy="Keep state out of the forward: pass it in and return it.")  # fmt: skip
    for node in calls(gm, aten.copy_.default):
        if node.args[0].op == "placeholder" and not node.users:
            raise CaptureError(f"the forward writes to its argument {node.args[0].target}", stage="capture",
                               remedy="Return the new value instead.")  # fmt: skip


# -------------------------------------------------------------------------------------------------- input normalization


def normalize_input(gm: fx.GraphModule, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
    """Put ``(x - mean) / std`` behind the first float input, as the batch norm it is."""
    inputs = placeholders(gm)
    node = next((n for n in inputs if n.meta["val"].is_floating_point() and n.meta["val"].ndim >= 2), None)
    if node is None:
        raise OptionError("no input is floating point with a channel dimension", stage="input_normalization",
                          remedy="Normalization is for images: drop input_normalization.")  # fmt: skip
    channels = int(node.meta["val"].shape[1])
    mean, std = (_per_channel(name, value, channels) for name, value in (("mean", mean), ("std", std)))
    if not bool((std > 0).all()):
        raise OptionError(f"std is {std.tolist()}", stage="input_normalization", expected="positive numbers",
                          remedy="The network computes (x - mean) / std.")  # fmt: skip
    gm.register_buffer("input_mean", mean.float())
    gm.register_buffer("input_var", (std * std).float())
    with gm.graph.inserting_before(inputs[-1].next):
        statistics = [gm.graph.get_attr(name) for name in ("input_mean", "input_var")]
        normalized = gm.graph.call_function(
            aten.batch_norm.default, (node, None, None, *statistics, False, 0.0, 0.0, False)
        )
    for new in (*statistics, normalized):
        describe(new, origin=Origin("input_normalization"))
    node.replace_all_uses_with(normalized, delete_user_cb=lambda user: user is not normalized)
    shapes.propagate(gm)
    gm.graph.lint()
    gm.recompile()


def _per_channel(name: str, value: float | Sequence[float] | Tensor, channels: int) -> Tensor:
    vector = torch.as_tensor(value, dtype=torch.float64).flatten()
    if vector.numel() not in (1, channels) or not bool(torch.isfinite(vector).all()):
        raise OptionError(f"{name} has {vector.numel()} values", stage="input_normalization",
                          expected=f"one finite number, or one for each of {channels} channels",
                          remedy="The network computes (x - mean) / std.")  # fmt: skip
    return vector.expand(channels).clone()
