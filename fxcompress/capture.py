"""From the user's model to a flat float graph with shapes, origins and a snapshot of the weights.

    model(x, mask=m)  ->  graph(x, m) -> (y, ...)         plus the Interface between the two

``torch.export`` does the tracing. A batch-1 example would specialise the batch, so the example is repeated to batch 2 and
the batch is declared dynamic; batch norm survives because no decomposition runs. The user's model is only read.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from . import shapes
from .errors import CaptureError, InputError, OptionError
from .graph import calls, constant, erase_dead, placeholders
from .interface import InputLeaf, Interface, call_leaves, is_plain_constant
from .meta import Origin, describe
from .model_checks import check_aliasing, check_graph, check_model
from .options import Context

aten = torch.ops.aten

_ASSERTS = frozenset(
    {
        aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default,
        aten.sym_constrain_range_for_size.default, aten.sym_constrain_range.default,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Captured:
    """Result of ``capture``: the flat graph, its example inputs (batch >= 2, raw values) and the calling interface."""

    graph_module: fx.GraphModule
    example_inputs: tuple[Tensor, ...]
    interface: Interface


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple,
    kwargs: dict | None = None,
    *,
    input_normalization: tuple | None = None,
) -> Captured:
    """Trace ``model`` on an example call.

    The result's graph is flat (placeholders are tensors, the output is a tuple of nodes), holds its own float32 copies
    of the constants, one get_attr target per storage, and its batch dimension is symbolic: the leaves of the example
    whose dimension 0 has the length of the first tensor's are batched.

    Args:
        model: a module in eval mode, an ``ExportedProgram``, or a ``GraphModule``.
        args, kwargs: an example call. Tensors in half, bfloat16 or float64 are taken as float32.
        input_normalization: (mean, std), numbers or one per channel; the graph then takes raw values and begins with
            ``(x - mean) / std`` on its first float input.

    Raises:
        ModelError: training mode, NaN weights, missing statistics (``model_checks``).
        InputError: the example is not usable (no tensor, empty batch).
        CaptureError: ``torch.export`` failed (its error is chained), or the graph depends on more than its inputs.

    >>> capture(nn.Linear(3, 4).eval(), (torch.randn(1, 3),)).graph_module(torch.randn(7, 3))[0].shape
    torch.Size([7, 4])
    """
    if isinstance(model, nn.Module):
        check_model(model)
    example = _Example.build(model, args, kwargs or {})
    traced = _trace(model, example)
    gm, outputs, out_spec = _flat(traced, example)
    check_graph(gm)
    if input_normalization is not None:
        _normalize_input(gm, *input_normalization)
    inputs = tuple(example.tensors)
    gm.meta["fxcompress"] = Context(example_inputs=inputs)
    return Captured(gm, inputs, Interface(example.parameters, example.leaves, outputs, out_spec))


# --------------------------------------------------------------------------------------------------------- the example


@dataclass
class _Example:
    """The example call with batch >= 2 and float32 tensors, and what its leaves are."""

    args: tuple
    kwargs: dict
    parameters: tuple[str, ...]
    leaves: tuple[InputLeaf, ...]
    tensors: list[Tensor] = field(default_factory=list)

    @classmethod
    def build(cls, model: object, args: tuple, kwargs: dict) -> _Example:
        first = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if first is None or first.ndim == 0:
            raise InputError("the example call holds no tensor with a batch dimension", stage="capture",
                             remedy="Pass at least one tensor whose dimension 0 is the batch.")  # fmt: skip
        batch = first.shape[0]
        if batch == 0:
            raise InputError("the example batch is empty", stage="capture", expected="at least one sample")
        parameters = _parameter_names(model)
        leaves, tensors = [], {}

        def prepared(leaf: object) -> object:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in tensors:
                tensors[id(leaf)] = (leaf, _prepared_tensor(leaf, batch))
            return tensors[id(leaf)][1].clone()  # a tensor passed twice is two inputs

        new_args, new_kwargs = pytree.tree_map(prepared, (tuple(args), dict(kwargs)))
        flat = []
        for name, leaf in call_leaves(parameters, new_args, new_kwargs):
            leaves.append(_leaf(name, leaf, batch))
            flat += [leaf] if isinstance(leaf, Tensor) else []
        return cls(new_args, new_kwargs, parameters, tuple(leaves), flat)

    def dynamic_shapes(self) -> ShapesCollection:
        batch = Dim("batch", min=1)
        collection = ShapesCollection()
        for leaf, tensor in zip([i for i in self.leaves if i.is_tensor], self.tensors, strict=True):
            if leaf.batched:
                collection[tensor] = {0: batch}
        return collection


def _parameter_names(model: object) -> tuple[str, ...]:
    if isinstance(model, ExportedProgram):
        return tuple(model.module_call_graph[0].signature.forward_arg_names or ()) if model.module_call_graph else ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds)


def _prepared_tensor(tensor: Tensor, batch: int) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()
    if batch == 1 and tensor.ndim and tensor.shape[0] == 1:
        tensor = torch.cat([tensor, tensor])
    return tensor


def _leaf(name: str, leaf: object, batch: int) -> InputLeaf:
    if isinstance(leaf, Tensor):
        batched = leaf.ndim > 0 and leaf.shape[0] == max(batch, 2)
        return InputLeaf(name, tuple(leaf.shape[batched:]), str(leaf.dtype).removeprefix("torch."), batched)
    if not is_plain_constant(leaf):
        raise InputError(f"argument {name} is a {type(leaf).__name__}", stage="capture",
                         expected="a tensor, number, string, bool or None",
                         remedy="Wrap the model in a module that takes tensors and builds the object itself.")  # fmt: skip
    return InputLeaf(name, value=leaf)


# ---------------------------------------------------------------------------------------------------------- the trace


def _trace(model: nn.Module | ExportedProgram, example: _Example) -> fx.GraphModule:
    """A GraphModule of ATen calls with a symbolic batch; what is one already is used as it is."""
    if isinstance(model, ExportedProgram):
        gm = model.module(check_guards=False)
        check_model(gm)
        return gm if _is_traced(gm, example) else _export(gm, example)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(f"the model is a {type(model).__name__}", stage="capture",
                           expected="an nn.Module, ExportedProgram or GraphModule",
                           remedy="Pass the Python module the scripted one was made from.")  # fmt: skip
    if isinstance(model, fx.GraphModule) and _is_traced(model, example):
        return model
    tensors = [*model.parameters(), *model.buffers()]
    if any((t.is_floating_point() and t.dtype != torch.float32) or t.device.type != "cpu" for t in tensors):
        model = _float32_copy(model)
    return _export(model, example)


def _is_traced(gm: fx.GraphModule, example: _Example) -> bool:
    """ATen operators throughout, shapes present, and every batched input's dimension 0 symbolic."""
    for node in gm.graph.nodes:
        if (node.op == "call_module" and node.target != "_guards_fn") or node.op == "call_method":
            return False
        if node.op == "call_function" and isinstance(node.target, type(torch.relu)):
            return False
    inputs = placeholders(gm)
    leaves = example.leaves if len(inputs) == len(example.leaves) else [i for i in example.leaves if i.is_tensor]
    if len(inputs) != len(leaves):
        return False
    for node, leaf in zip(inputs, leaves, strict=True):
        value = node.meta.get("val")
        if leaf.is_tensor and not isinstance(value, Tensor):
            return False
        if leaf.is_tensor and leaf.batched != (value.ndim > 0 and isinstance(value.shape[0], torch.SymInt)):
            return False
        if leaf.is_tensor and (
            tuple(value.shape[leaf.batched :]) != leaf.tail or value.dtype != getattr(torch, leaf.dtype)
        ):
            return False
    return True


def _float32_copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).cpu().float()
    except Exception as error:
        raise CaptureError("the model is not float32 on the CPU and cannot be copied", stage="capture",
                           remedy="Convert it with model.cpu().float() first.") from error  # fmt: skip


def _export(model: nn.Module, example: _Example) -> fx.GraphModule:
    # Under no_grad, a forward decorated with no_grad adds no higher-order operator to the graph.
    try:
        with torch.no_grad():
            program = torch.export.export(
                model, example.args, example.kwargs, dynamic_shapes=example.dynamic_shapes(), strict=False
            )
            return program.module(check_guards=False)
    except Exception as error:
        found, remedy = _diagnose(error)
        raise CaptureError(f"torch.export failed: {found}", stage="capture", remedy=remedy) from error


#: (pattern in the exporter's message, what it means, what to do)
_DIAGNOSES = (
    (r"data-dependent|GuardOnDataDependent|unbacked|Could not (guard|extract)", "control flow depends on the values of a tensor",
     "Replace the branch, loop or .item() by tensor operations, or compile the submodules before it."),
    (r"Constraints violated|specialized|marked.* as dynamic|not all values of batch", "the model fixes the batch size",
     "Write the batch as x.shape[0] or -1 instead of a number; arguments shared by all samples must not have the batch's length."),
    (r"takes \d+ positional|missing \d+ required|unexpected keyword", "the example call does not fit the model's forward",
     "Pass the arguments the model's forward takes."),
    (r"size mismatch|shapes? cannot be multiplied|expected input|invalid for input|must match the size|Given groups",
     "the model does not accept the shapes of the example", "Check the shapes of the example inputs."),
)  # fmt: skip


def _diagnose(error: Exception) -> tuple[str, str]:
    text = str(error)
    first_line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    summary = f"{type(error).__name__}: {first_line[:300]}"
    for pattern, meaning, remedy in _DIAGNOSES:
        if re.search(pattern, text, re.IGNORECASE):
            return f"{meaning} ({summary})", remedy
    return (
        summary,
        "Call the model on the example first; if that works, see the chained error for the operation at fault.",
    )


# ------------------------------------------------------------------------------------------------------ the flat graph


def _flat(traced: fx.GraphModule, example: _Example) -> tuple[fx.GraphModule, tuple, pytree.TreeSpec]:
    """Copy ``traced`` into a graph of tensors only; returns it with the output leaves and their nesting."""
    graph = fx.Graph()
    renamed: dict[fx.Node, fx.Node] = {}
    inputs = placeholders(traced)
    leaves = example.leaves if len(inputs) == len(example.leaves) else [i for i in example.leaves if i.is_tensor]
    constants, targets = {}, {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            leaf = leaves[inputs.index(node)]
            if not leaf.is_tensor:
                _require_unused(node, leaf)
                continue
        elif node.op == "get_attr":
            target = _shared_target(traced, node, constants, targets)
            renamed[node] = graph.get_attr(target)
            _take_meta(node, renamed[node])
            continue
        elif node.op == "call_module" or node.target in _ASSERTS:
            continue
        elif node.op == "output":
            result = node.args[0]
            break
        renamed[node] = graph.node_copy(node, lambda n: renamed[n])
        _take_meta(node, renamed[node])
    outputs, out_spec, nodes = _results(traced, result)
    graph.output(tuple(renamed[n] for n in nodes))
    gm = fx.GraphModule(constants, graph, "GraphModule")
    gm.eval()
    _check_state_unchanged(gm)
    check_aliasing(gm)  # before dead code goes: an assignment to a part of a tensor has no reader
    erase_dead(gm)
    for node in gm.graph.nodes:
        if node.op != "output":
            shapes.compute(gm, node, known=True)  # the exporter computed it
    gm.recompile()
    return gm, outputs, out_spec


def _take_meta(old: fx.Node, new: fx.Node) -> None:
    """Shape, module path and source line; the exporter's further notes would only go stale."""
    new.meta = {key: old.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in old.meta}
    describe(new, origin=_origin(old))


def _shared_target(traced: fx.GraphModule, node: fx.Node, constants: dict, targets: dict) -> str:
    """The name of the node's constant: tensors that share storage, offset and strides share one snapshot."""
    value = constant(traced, node)
    if not isinstance(value, Tensor):
        raise CaptureError(f"the graph holds {node.target}, a {type(value).__name__}", stage="capture",
                           remedy="Control flow operators and subgraphs are not supported: write the model without torch.cond.")  # fmt: skip
    key = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride(), value.dtype)
    if value.numel() == 0 or key not in targets:
        targets[key] = node.target
        snapshot = value.detach().to(torch.float32) if value.is_floating_point() else value.detach()
        constants[node.target] = snapshot.clone(memory_format=torch.contiguous_format)
    return targets[key]


def _require_unused(node: fx.Node, leaf: InputLeaf) -> None:
    if node.users:
        raise CaptureError(f"argument {leaf.name} = {leaf.value!r} stayed symbolic", stage="capture",
                           remedy="Fix it with functools.partial or a wrapper module.")  # fmt: skip


def _results(traced: fx.GraphModule, result: object) -> tuple[tuple, pytree.TreeSpec, list[fx.Node]]:
    """(output leaves, nesting, distinct result nodes): a node returned twice is computed and returned once."""
    leaves, spec = pytree.tree_flatten(result)
    info = getattr(traced.graph._codegen, "pytree_info", None)
    if info is not None and info.out_spec is not None:
        spec = info.out_spec
    nodes, outputs = [], []
    for leaf in leaves:
        if isinstance(leaf, fx.Node):
            if not isinstance(leaf.meta.get("val"), Tensor):
                raise CaptureError(f"the model returns {leaf.name}, a number computed from the shapes", stage="capture",
                                   remedy="Return tensors and constants only.")  # fmt: skip
            if leaf not in nodes:
                nodes.append(leaf)
            outputs.append(nodes.index(leaf))
        else:
            outputs.append(("constant", leaf))
    if not nodes:
        raise CaptureError("the model returns no tensor", stage="capture")
    return tuple(outputs), spec, nodes


def _check_state_unchanged(gm: fx.GraphModule) -> None:
    for node in calls(gm, aten.copy_.default):
        if node.args[0].op in ("get_attr", "placeholder"):
            raise CaptureError(f"the forward writes to {node.args[0].target}", stage="capture", where=str(_origin(node)),
                               remedy="Keep state out of the forward: pass it in and return it.")  # fmt: skip


def _origin(node: fx.Node) -> Origin:
    """Path of the innermost module, and the innermost line of user code: "models.py:52"."""
    module = ""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        module = path or module
    if node.op == "get_attr":
        module = node.target.rpartition(".")[0]
    source = ""
    for file, line in re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or ""):
        if "torch" not in PurePath(file).parts and not file.startswith("<"):
            source = f"{PurePath(file).name}:{line}"
    return Origin(module, source)


# -------------------------------------------------------------------------------------------------- input normalisation


def _normalize_input(gm: fx.GraphModule, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
    """Put ``(x - mean) / std`` behind the first float input, as the batch norm it is."""
    node = next((n for n in placeholders(gm) if n.meta["val"].is_floating_point() and n.meta["val"].ndim >= 2), None)
    if node is None:
        raise OptionError("input_normalization needs a float input with a channel dimension", stage="capture")
    channels = int(node.meta["val"].shape[1])
    mean, std = (_per_channel(name, v, channels) for name, v in (("mean", mean), ("std", std)))
    if not bool((std > 0).all()):
        raise OptionError(f"std is {std.tolist()}", stage="input_normalization", expected="positive numbers")
    gm.register_buffer("input_mean", mean.float())
    gm.register_buffer("input_var", (std * std).float())
    with gm.graph.inserting_after(next(reversed([n for n in gm.graph.nodes if n.op == "placeholder"]))):
        location = gm.graph.get_attr("input_mean")
    with gm.graph.inserting_after(location):
        variance = gm.graph.get_attr("input_var")
    with gm.graph.inserting_after(variance):
        normalized = gm.graph.call_function(
            aten.batch_norm.default, (node, None, None, location, variance, False, 0.0, 0.0, False)
        )
    for new in (location, variance, normalized):
        describe(new, origin=Origin("input_normalization"))
    node.replace_all_uses_with(normalized, delete_user_cb=lambda user: user is not normalized)
    shapes.propagate(gm)
    gm.graph.lint()
    gm.recompile()


def _per_channel(name: str, value: float | Sequence[float] | Tensor, channels: int) -> Tensor:
    vector = torch.as_tensor(value, dtype=torch.float64).flatten()
    if vector.numel() not in (1, channels) or not bool(torch.isfinite(vector).all()):
        raise OptionError(f"{name} has {vector.numel()} values", stage="input_normalization",
                          expected=f"one finite number, or one for each of {channels} channels")  # fmt: skip
    return vector.expand(channels).clone()
