"""``torch.compile(model, backend="fxcompress")``: what TorchDynamo captures, compiled to integers.

    model = model.eval()
    fast = torch.compile(model, backend="fxcompress", fullgraph=True, options={"calibration_data": batches, "target": "int8"})
    with torch.no_grad():
        y = fast(x)                               # captured and compiled here

``options`` are the keyword arguments of ``fxcompress.compile``; the first call's inputs are its ``example_inputs``. Dynamo passes parameters
and buffers as inputs of the graph: they become constants, with the values they have at that call. A graph break makes several networks,
each compiled from the values it sees; calibration data are what the one graph of ``fullgraph=True`` takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from .api import compile
from .errors import CaptureError, OptionError
from .graph import placeholders


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence, *, mode: str | None = None, options: dict | None = None
) -> Callable:
    """The backend of the entry point group ``torch_dynamo_backends``: a function of all of the graph's inputs.

    Raises ``OptionError`` for a mode or an unknown option, and the errors of ``fxcompress.compile``.
    """
    if mode is not None:
        raise OptionError(f"torch.compile was given mode={mode!r}", stage="torch.compile",
                          remedy='Say it with options: options={"target": "w4a8"}.')  # fmt: skip
    if "example_inputs" in (options or {}):
        raise OptionError("options contain example_inputs", stage="torch.compile",
                          remedy="The first call is the example: drop it.")  # fmt: skip
    frozen, kept = freeze(gm, example_inputs)
    with torch._guards.tracing(None):  # the export inside would leave its own guards among those of this capture
        network = compile(frozen, example_inputs=tuple(example_inputs[i] for i in kept), **(options or {}))

    def run(*inputs):
        return network(*(inputs[i] for i in kept))

    return run


def freeze(gm: fx.GraphModule, example_inputs: Sequence) -> tuple[fx.GraphModule, list[int]]:
    """A copy of a Dynamo graph in which parameters, buffers and symbolic sizes are no inputs, and the positions of the remaining ones."""
    frozen, kept = fx.GraphModule(gm, copy.deepcopy(gm.graph)), []
    nodes = placeholders(frozen)
    for i, (node, value) in enumerate(zip(nodes, example_inputs, strict=True)):
        with frozen.graph.inserting_after(nodes[-1]):
            if not isinstance(value, Tensor):
                new = _size(frozen, node, nodes)
            elif _is_state(value):
                name = f"state{i}_{node.name}"
                _register(frozen, name, value)
                new = frozen.graph.get_attr(name)
            else:
                kept.append(i)
                continue
        node.replace_all_uses_with(new)
        frozen.graph.erase_node(node)
    frozen.graph.lint()
    frozen.recompile()
    return frozen.eval(), kept


def _is_state(value: Tensor) -> bool:
    """A parameter or buffer of a module: Dynamo marks those, their addresses do not change between calls."""
    return isinstance(value, nn.Parameter) or hasattr(value, "_dynamo_static_input_type")


def _register(gm: fx.GraphModule, name: str, value: Tensor) -> None:
    """A frozen copy; integer state is a buffer."""
    value = value.detach().clone()
    if value.is_floating_point():
        gm.register_parameter(name, nn.Parameter(value, requires_grad=False))
    else:
        gm.register_buffer(name, value)


def _size(gm: fx.GraphModule, node: fx.Node, nodes: list[fx.Node]) -> fx.Node:
    """The size of a tensor input that a symbolic integer stands for."""
    symbol = node.meta["example_value"]
    for tensor in nodes:
        shape = getattr(tensor.meta["example_value"], "shape", ())
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and str(size) == str(symbol):
                return gm.graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
    raise CaptureError(f"the graph takes a number, {node.name}", stage="torch.compile",
                       remedy="Pass tensors, or numbers as constants of the module.")  # fmt: skip
