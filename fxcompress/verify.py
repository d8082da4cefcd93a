"""The certificate: no float anywhere between input and output, and every accumulator proven to fit.

    certificate = verify(gm)        # VerificationError or AccumulatorError names the node
    print(certificate)

Four examinations. The graph: every node is an operator of the integer dialect, every constant and argument an integer.
The contracts: operands are what kernels are written for (``contracts.py``).
The proof: interval analysis over the actual integer weights (``proof.py``) shows that no int32 accumulator and no
shifted accumulator inside a requantization can overflow, for any input. The run: the graph executes node by node,
kernels included, under a dispatch mode that refuses any float tensor.

``quantize`` on a graph input and ``dequantize`` in front of a graph output are the boundary. Nodes marked
``node.meta["keep_float"]`` stay in float on purpose; the certificate lists their modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .analysis.intervals import Interval
from .contracts import check_contracts
from .errors import InputError, VerificationError
from .graph import argument, constant, is_call, is_constant, placeholders
from .integer_ops import BOUNDARY, INDEX_OPS, INTEGER_LEVEL, INTEGER_OPS, integer_op, is_index
from .meta import lies_in, module_name, place
from .options import context
from .proof import prove_accumulators
from .shapes import propagate, trace_shapes

QUANTIZE, DEQUANTIZE = INTEGER_OPS["quantize"].overload, INTEGER_OPS["dequantize"].overload


@dataclass(frozen=True)
class Certificate:
    """What ``verify`` found.

    Attributes:
        integer_only: nothing between input and output is floating point, without exception.
        exceptions: modules (or nodes) left in float on purpose.
        nodes: operators in the graph.
        operators: how many of each, by name.
        accumulators: bits that each int32 node needs for its worst case, by node name; at most 32.
        constants: bytes of weights, biases, tables and multipliers.
    """

    integer_only: bool
    exceptions: tuple[str, ...]
    nodes: int
    operators: dict[str, int]
    accumulators: dict[str, int]
    constants: int

    def __str__(self) -> str:
        head = "Integer-only" + ("" if self.integer_only else f" except {', '.join(self.exceptions)}")
        operators = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        text = f"{head}: {self.nodes} operators ({operators}), {self.constants:,} bytes of constants. "
        text += "No floating-point value exists between quantize and dequantize" if self.integer_only else ""
        text += (
            "" if self.integer_only else "Outside these no floating-point value exists between quantize and dequantize"
        )
        if not self.accumulators:
            return text + "."
        widest = max(self.accumulators, key=self.accumulators.get)
        return (
            f"{text}, and none of the {len(self.accumulators)} int32 tensors can overflow for any input: "
            f"the widest, {widest}, needs {self.accumulators[widest]} bits."
        )

    def to_dict(self) -> dict:
        """JSON-able form."""
        return asdict(self) | {"exceptions": list(self.exceptions)}


def _operator_name(node: fx.Node) -> str:
    """Its short name; Python's own where a module left in float takes one of several results (getitem)."""
    return getattr(node.target, "_opname", node.target.__name__)


def verify(
    gm: fx.GraphModule, example_inputs: Sequence[Tensor] | None = None, allow_float: Iterable[str] = ()
) -> Certificate:
    """Prove that an integer-level graph computes with integers only and cannot overflow.

    Args:
        gm: flat integer-level graph.
        example_inputs: one tensor per placeholder for the run; by default those of the compilation, else random ones.
        allow_float: names of nodes, or of modules of the original model, that may stay in float (besides the nodes
            marked ``keep_float``).

    Raises:
        VerificationError: names the first node with a float constant, value, argument or operator, with a Python
            callable, with a kernel that computes in float, or with constants outside the kernels' ranges.
        AccumulatorError: names the node that could overflow, the bits it needs and the remedy.
        InputError: the example inputs do not fit the placeholders.
    """
    float_nodes = _float_nodes(gm, tuple(allow_float))
    accumulators = _prove(gm, example_inputs, float_nodes)
    with torch.no_grad():
        _run(gm, _inputs(gm, example_inputs), float_nodes)
    return Certificate(
        integer_only=not float_nodes,
        exceptions=tuple(dict.fromkeys(module_name(n) for n in float_nodes)),
        nodes=sum(n.op == "call_function" for n in gm.graph.nodes),
        operators=dict(Counter(_operator_name(n) for n in gm.graph.nodes if n.op == "call_function").most_common()),
        accumulators={n.name: i.bits for n, i in accumulators.items()},
        constants=sum(t.nbytes for t in {n.target: constant(gm, n) for n in gm.graph.nodes if is_constant(n)}.values()),
    )


def prove(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> None:
    """``verify`` without the run: for a graph that comes from a file. ``example_inputs`` say shapes and dtypes; no value is read."""
    _prove(gm, example_inputs, _float_nodes(gm, ()))


def _prove(gm: fx.GraphModule, example_inputs: Sequence[Tensor] | None, float_nodes: dict) -> dict[fx.Node, Interval]:
    for node in gm.graph.nodes:
        _check_structure(gm, node, float_nodes)
    _ensure_shapes(gm, example_inputs)
    for node in gm.graph.nodes:
        _check_value(gm, node, float_nodes)
    check_contracts(gm)
    return prove_accumulators(gm)


# ------------------------------------------------------------------------------------------------------- the graph


def _float_nodes(gm: fx.GraphModule, allowed: tuple[str, ...]) -> dict[fx.Node, None]:
    """Nodes left in float on purpose, in order."""

    marked = (n for n in gm.graph.nodes if n.op == "call_function" and n.target not in BOUNDARY)
    return dict.fromkeys(n for n in marked if n.meta.get("keep_float") or n.name in allowed or lies_in(n, allowed))


def _refuse(node: fx.Node, found: str, expected: str) -> VerificationError:
    return VerificationError(found, stage="verify", where=place(node), expected=expected)


def _check_structure(gm: fx.GraphModule, node: fx.Node, float_nodes: dict) -> None:
    """Operators, arguments and constants of one node."""
    if node.op == "placeholder" or node in float_nodes:
        return
    if any(isinstance(leaf, (float, complex)) for leaf in tree_leaves((node.args, node.kwargs))):
        raise _refuse(node, "a Python float among its arguments", "integers and tensors")
    if node.op == "output":
        return
    if is_constant(node):
        value = constant(gm, node)
        if not isinstance(value, Tensor):
            raise _refuse(node, f"{node.target} is a {type(value).__name__}", "a tensor")
        if _is_float(value) and not all(_holds_scale(user, node) or user in float_nodes for user in node.users):
            raise _refuse(node, f"{node.target} is a {value.dtype} constant", "an integer tensor")
        return
    if node.op != "call_function":
        raise _refuse(node, f"{node.op} {node.target}", "call_function nodes only")
    if not isinstance(node.target, torch._ops.OpOverload):
        raise _refuse(node, f"{node.target} is a Python callable", "an operator of the integer dialect")
    if node.target not in INTEGER_LEVEL | INDEX_OPS:
        raise _foreign(node)
    _check_boundary(node, float_nodes)


def _foreign(node: fx.Node) -> VerificationError:
    return _refuse(node, f"{node.target} is not an integer operator", "an operator of the integer dialect")


def _holds_scale(user: fx.Node, scale: fx.Node) -> bool:
    """The only float constants: the scales of the boundary."""
    if not is_call(user, *BOUNDARY):
        return False
    return [p.name for p in user.target._schema.arguments if argument(user, p.name) is scale] == ["scale"]


def _check_boundary(node: fx.Node, float_nodes: dict) -> None:
    if node.target is QUANTIZE and (x := argument(node, "x")).op != "placeholder" and x not in float_nodes:
        raise _refuse(node, f"quantize of {x.name} inside the graph", "quantize of a graph input")
    if node.target is DEQUANTIZE:
        for user in node.users:
            if user.target in INTEGER_LEVEL and user not in float_nodes:  # what is foreign is refused for itself
                raise _refuse(node, f"dequantize read by {user.name}", "dequantize in front of a graph output")


def _check_value(gm: fx.GraphModule, node: fx.Node, float_nodes: dict) -> None:
    """The recorded dtype of one node: float only where the boundary or a float region is; index operators on indices only."""
    foreign = node.op == "call_function" and node.target not in INTEGER_LEVEL and not is_index(gm, node)
    if foreign and node not in float_nodes:
        raise _foreign(node)
    value = node.meta.get("val")
    if node.op == "get_attr" or not isinstance(value, Tensor) or not _is_float(value):
        return
    if node in float_nodes or node.target is DEQUANTIZE:
        return
    readers = [u for u in node.users if u not in float_nodes and u.target is not QUANTIZE and u.op != "output"]
    if node.op != "placeholder":
        raise _refuse(node, f"{node.target} computes {value.dtype}", "an integer tensor")
    if readers:
        raise _refuse(readers[0], f"it reads the float graph input {node.name}", "quantize in between")


def _is_float(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _ensure_shapes(gm: fx.GraphModule, example_inputs: Sequence[Tensor] | None) -> None:
    if example_inputs is not None and any("val" not in n.meta for n in placeholders(gm)):
        trace_shapes(gm, example_inputs)
    else:
        propagate(gm)


# --------------------------------------------------------------------------------------------------------- the run


class IntegerOnly(TorchDispatchMode):
    """Raises ``VerificationError`` naming ``node`` when a float tensor enters or leaves any ATen operator."""

    def __init__(self, node: fx.Node):
        super().__init__()
        self.node = node

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs or {}, result)):
            if isinstance(leaf, (float, complex)) or (isinstance(leaf, Tensor) and _is_float(leaf)):
                kind = leaf.dtype if isinstance(leaf, Tensor) else f"the number {leaf}"
                raise _refuse(self.node, f"{func} in its kernel touches {kind}", "integers only")
        return result


def _run(gm: fx.GraphModule, inputs: Sequence[Tensor], float_nodes: dict) -> None:
    """Execute the graph; kernels of the dialect run as the Python they are made of, so that the mode sees inside."""
    values: dict[fx.Node, object] = dict(zip(placeholders(gm), inputs, strict=True))
    last_use = {n: user for user in gm.graph.nodes for n in user.all_input_nodes}
    for node in gm.graph.nodes:
        if is_constant(node):
            values[node] = constant(gm, node)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            row = integer_op(node.target)
            if node in float_nodes or node.target in BOUNDARY:
                values[node] = node.target(*args, **kwargs)
            else:
                with IntegerOnly(node):
                    values[node] = (row.reference if row else node.target)(*args, **kwargs)
        for source in node.all_input_nodes:
            if last_use[source] is node:
                del values[source]


def _inputs(gm: fx.GraphModule, example_inputs: Sequence[Tensor] | None) -> list[Tensor]:
    """The given inputs, else the compilation's where dtypes agree, else random ones of the recorded shapes."""
    expected = [n.meta["val"] for n in placeholders(gm)]
    if example_inputs is not None:
        found = [t.dtype for t in example_inputs]
        if found != [t.dtype for t in expected]:
            raise InputError(f"the example inputs are {found}", stage="verify", expected=str([t.dtype for t in expected]),
                             remedy="Pass one tensor per graph input, or none.")  # fmt: skip
        return list(example_inputs)
    known = context(gm).example_inputs
    if [t.dtype for t in known] == [t.dtype for t in expected]:
        return list(known)
    return [_random(value) for value in expected]


def _random(like: Tensor) -> Tensor:
    size = [2 if isinstance(n, torch.SymInt) else n for n in like.shape]
    generator = torch.Generator().manual_seed(0)
    if like.is_floating_point():
        return torch.randn(size, generator=generator, dtype=like.dtype)
    limit = 128 if like.dtype in (torch.uint8, torch.int8) else 2  # codes; 0 and 1 are ids of any table
    return torch.randint(0, limit, size, generator=generator).to(like.dtype)
