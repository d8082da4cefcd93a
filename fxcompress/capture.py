"""From the user's model to a flat float graph with shapes, origins and a snapshot of the weights.

    model(x, mask=m)  ->  graph(x, m) -> (y, ...)         plus the Interface between the two

``torch.export`` does the tracing. A batch-1 example would specialize the batch, so the example is repeated to batch 2 and
the batch is declared dynamic; batch norm survives because no decomposition runs. The user's model is only read.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from .diagnosis import check_runs, diagnose
from .errors import CaptureError, InputError
from .example_call import ExampleCall, example_call, positional_parameters
from .flat_graph import flatten_graph, input_leaves, normalize_input
from .graph import placeholders
from .interface import Interface
from .model_checks import check_graph, check_model
from .model_kinds import check_kind
from .options import Context
from .traced import Traced


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
    check: Callable[[ExampleCall], None] | None = None,
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
        check: called with the prepared example before anything is traced.

    Raises:
        ModelError: training mode, NaN weights, missing statistics (``model_checks``).
        InputError: the example is not usable (no tensor, empty batch, NaN), or the model does not run on it.
        CaptureError: ``torch.export`` failed (its error is chained), or the graph depends on more than its inputs.
        UnsupportedOperatorError: memory changed in place is read through another view.

    >>> capture(nn.Linear(3, 4).eval(), (torch.randn(1, 3),)).graph_module(torch.randn(7, 3))[0].shape
    torch.Size([7, 4])
    """
    module = _module(model)
    check_model(module)
    _check_signature(module, args, kwargs or {})
    example = example_call(_parameters(model), args, kwargs or {})
    if check is not None:
        check(example)
    gm, outputs, out_spec = flatten_graph(_trace(module, example), example)
    check_graph(gm)
    if input_normalization is not None:
        normalize_input(gm, *input_normalization)
    gm.meta["fxcompress"] = Context(example_inputs=example.tensors)
    return Captured(gm, example.tensors, Interface(example.parameters, example.leaves, outputs, out_spec))


def _module(model: object) -> nn.Module:
    check_kind(model)
    return model.module(check_guards=False) if isinstance(model, ExportedProgram) else model


def _check_signature(module: nn.Module, args: tuple, kwargs: dict) -> None:
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join(n if p.default is p.empty else f"{n}=..." for n, p in signature.parameters.items())
        raise InputError(f"the example call does not fit forward({names}): {error}", stage="capture",
                         remedy="A tuple holds positional arguments, a dict keyword arguments; one tensor is one argument.") from None  # fmt: skip


def _parameters(model: nn.Module | ExportedProgram) -> tuple[str, ...]:
    """Names of the positional parameters of the model's forward."""
    if not isinstance(model, ExportedProgram):
        return positional_parameters(model.forward)
    signature = model.module_call_graph[0].signature
    return tuple(signature.forward_arg_names or ()) if signature is not None else ()


def _trace(model: nn.Module, example: ExampleCall) -> Traced:
    """ATen calls with a symbolic batch; a ``GraphModule`` that consists of them is used as it is."""
    if isinstance(model, fx.GraphModule) and _is_traced(model, example):
        return Traced.of_module(model)
    tensors = [*model.parameters(), *model.buffers()]
    if not all(_is_float32(t) and t.device.type == "cpu" for t in tensors):
        model = _float32_copy(model)
        check_runs(model, example)  # torch.export lets a linear layer of two dtypes pass
    return Traced.of_program(_export(model, example))


def _is_float32(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 or not tensor.is_floating_point()


def _is_traced(gm: fx.GraphModule, example: ExampleCall) -> bool:
    """ATen operators and float32 constants throughout, and inputs as in the example with a symbolic batch."""
    for node in gm.graph.nodes:
        if node.op == "call_method" or (node.op == "call_module" and node.target != "_guards_fn"):
            return False
        if node.op == "call_function" and not _is_operator(node.target):
            return False
    leaves = input_leaves(placeholders(gm), example)
    if not leaves or not all(_is_float32(t) for t in (*gm.parameters(), *gm.buffers())):
        return False
    return all(_fits(node.meta.get("val"), leaf) for node, leaf in zip(placeholders(gm), leaves) if leaf.is_tensor)


def _is_operator(target: object) -> bool:
    """An ATen overload, or Python arithmetic on sizes and lists (operator.getitem, operator.mul)."""
    return isinstance(target, torch._ops.OpOverload) or getattr(target, "__module__", "") == "_operator"


def _fits(value: object, leaf) -> bool:
    if not isinstance(value, Tensor) or value.dtype != getattr(torch, leaf.dtype):
        return False
    symbolic = value.ndim > 0 and isinstance(value.shape[0], torch.SymInt)
    return leaf.batched == symbolic and tuple(value.shape[leaf.batched :]) == leaf.tail


def _float32_copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).cpu().float()
    except Exception as error:
        raise CaptureError("the model is not float32 on the CPU and cannot be copied", stage="capture",
                           remedy="Convert it with model.cpu().float() first.") from error  # fmt: skip


@contextlib.contextmanager
def _without_partial_graph() -> Iterator[None]:
    """torch prints the graph of a failed export to stderr, where it would bury our message. Other output passes."""
    written, graph = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(written):
            yield
    except Exception as error:
        graph = getattr(error, "partial_fx_graph", None)
        raise
    finally:
        text = written.getvalue()
        sys.stderr.write(text if graph is None else text.replace(f"{graph}\n", ""))


def _export(model: nn.Module, example: ExampleCall) -> ExportedProgram:
    # Under no_grad, a forward decorated with no_grad adds no higher-order operator to the graph.
    try:
        with torch.no_grad(), _without_partial_graph():
            return torch.export.export(
                model, example.args, example.kwargs, dynamic_shapes=example.dynamic_shapes(), strict=False
            )
    except Exception as error:
        raise diagnose(error, model, example) from error
