"""The promises a float-level pass is held to, on the example inputs.

``Snapshot`` keeps a graph as it was (its parameters are shared: passes never write into them) with its outputs and one
fingerprint per tensor that carries statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from .errors import LevelError, PassContractError
from .graph import copy_graph_module, output_node, placeholders
from .meta import place, tensor_meta
from .shapes import propagate

RELATIVE_FLOAT32 = 1e-4
RELATIVE_FLOAT64 = 1e-9
FINGERPRINT_TOLERANCE = 1e-3


class Snapshot:
    """A graph module frozen at one moment; it is run only when somebody asks for its values.

    Args:
        gm: the graph; parameters are shared, the graph is copied.
        example_inputs: flat inputs; without them ``values`` is None.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Tensor] = ()):
        self.graph_module = copy_graph_module(gm)
        self.inputs = tuple(example_inputs)
        self.versions = {name: (id(t), t._version) for name, t in _tensors(gm)}

    @functools.cached_property
    def _run(self) -> tuple[object, dict]:
        if not self.inputs:
            return None, {}
        if len(self.inputs) != (count := len(placeholders(self.graph_module))):
            raise LevelError(f"{count} graph inputs for {len(self.inputs)} example inputs", stage="pass manager",
                             remedy="A pass must keep the placeholders.")  # fmt: skip
        recorder = _Recorder(self.graph_module)
        with torch.no_grad():
            return recorder.run(*self.inputs), recorder.fingerprints

    @property
    def values(self):
        """Flat outputs on the example inputs, None without examples."""
        return self._run[0]

    @property
    def fingerprints(self) -> dict:
        """{id(statistics): (statistics, per-channel mean of the tensor, node)}."""
        return self._run[1]

    def same_graph(self, other: Snapshot) -> bool:
        """Both compute the same by construction: node for node the same operators, arguments and constants."""
        return self._structure == other._structure

    @functools.cached_property
    def _structure(self) -> list[tuple]:
        constants = dict(_tensors(self.graph_module))
        return [
            (
                n.name,
                n.op,
                n.target,
                str(n.args),
                str(n.kwargs),
                id(constants.get(n.target)) if n.op == "get_attr" else 0,
            )
            for n in self.graph_module.graph.nodes
        ]

    def relative_change(self, other: Snapshot) -> float:
        """max |a - b| / max |a| over the outputs."""
        return relative_change(self.values, other.values)


class _Recorder(fx.Interpreter):
    """Runs a graph and fingerprints every tensor that carries statistics."""

    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm)
        self.fingerprints: dict[int, tuple] = {}

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        meta = tensor_meta(node)
        if meta.statistics is not None and isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            self.fingerprints[id(meta.statistics)] = (meta.statistics, _channel_means(value, meta), node)
        return value


def _channel_means(value: Tensor, meta) -> Tensor:
    if meta.statistics.channels is None or meta.channel_axis is None:
        return value.mean().reshape(1).double()
    return value.mean([d for d in range(value.ndim) if d != meta.channel_axis]).double()


def _tensors(gm: fx.GraphModule):
    yield from gm.named_parameters()
    yield from gm.named_buffers()


def relative_change(before: Sequence, after: Sequence) -> float:
    """Largest |a - b| / max|a| over pairs of tensors; inf when shapes differ or a value stops being finite."""
    worst = 0.0
    for a, b in zip(_flat(before), _flat(after), strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() == 0:
            continue
        difference = (a.double() - b.double()).abs().max()
        change = float(difference / a.double().abs().max().clamp(min=1e-30))
        worst = max(worst, change if change == change else float("inf"))
    return worst


def _flat(values) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)]


def check_untouched(name: str, before: Snapshot, after: Snapshot) -> None:
    """Raise ``PassContractError`` if a parameter that both graphs share was written into."""
    current = dict(_tensors(after.graph_module))
    for key, (identity, version) in before.versions.items():
        tensor = current.get(key)
        if tensor is not None and id(tensor) == identity and tensor._version != version:
            raise PassContractError(
                f"wrote into the parameter {key}", stage=name, expected="a new constant (add_constant)"
            )


class InFloat64:
    """A pass applied once more, to a float64 copy: whether a difference is float32 rounding in an ill-conditioned network.

    Args:
        before: the graph before the pass.
        reapply: runs the pass on a graph module and returns the result; called when ``snapshots`` is first asked for.
    """

    def __init__(self, before: Snapshot, reapply: Callable[[fx.GraphModule], fx.GraphModule]):
        self._before, self._reapply = before, reapply

    @functools.cached_property
    def snapshots(self) -> tuple[Snapshot, Snapshot]:
        """The graph before and after the pass."""
        original = in_float64(self._before.graph_module)
        inputs = tuple(x.double() if x.is_floating_point() else x for x in self._before.inputs)
        before = Snapshot(original, inputs)
        return before, Snapshot(self._reapply(original), inputs)


def check_exact(name: str, before: Snapshot, after: Snapshot, exactly: InFloat64 | None = None) -> float:
    """Hold an EXACT pass to its word; returns the relative change of the outputs in float32.

    Args:
        name: of the pass, for the message.
        before, after: the graph around the pass.
        exactly: a change above 1e-4 may be float32 rounding, here only 1e-9 is allowed.
            None (integer level): the outputs must be equal.

    Raises ``PassContractError`` naming the pass and the first node that differs.
    """
    exact = change = before.relative_change(after)
    if change <= (0 if exactly is None else RELATIVE_FLOAT32):
        return change
    if exactly is not None:
        before, after = exactly.snapshots
        exact = before.relative_change(after)
        if exact <= RELATIVE_FLOAT64:
            return change
    raise PassContractError(
        f"declared EXACT but changes an output by {change:.3g} relative ({exact:.3g} in float64)",
        stage=name,
        where=place(_first_difference(_node_values(before), _node_values(after), after.graph_module)),
    )


def in_float64(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with float64 constants and shapes."""
    copied = copy_graph_module(gm)
    copied.double()
    for node in placeholders(copied):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point():
            node.meta["val"] = value.double()
    propagate(copied)
    return copied


def _node_values(snapshot: Snapshot) -> dict[str, Tensor]:
    """Every node's value by name."""
    values: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            values[node.name] = value = super().run_node(node)
            return value

    with torch.no_grad():
        Recorder(snapshot.graph_module).run(*snapshot.inputs)
    return values


def _first_difference(before: dict, after: dict, gm: fx.GraphModule) -> fx.Node:
    """The earliest node whose value changed; a node the pass put in right before it is named instead."""
    for node in gm.graph.nodes:
        if node.op in ("output", "get_attr") or node.name not in before:
            continue
        if relative_change([before[node.name]], [after[node.name]]) > RELATIVE_FLOAT64:
            new = [n for n in node.all_input_nodes if n.op == "call_function" and n.name not in before]
            return new[0] if new else node
    new = [n for n in gm.graph.nodes if n.op == "call_function" and n.name not in before]
    return new[0] if new else output_node(gm)


def check_statistics(name: str, before: Snapshot, after: Snapshot, exactly: InFloat64 | None = None) -> None:
    """Statistics must move with the tensor they describe.

    A tensor whose per-channel means moved under an unchanged ``Statistics`` object, in float32 and, if given, in float64
    too, or whose channels no longer match it, raises ``PassContractError`` naming pass and node.
    """
    for node in after.graph_module.graph.nodes:
        meta = tensor_meta(node)
        if (
            meta.statistics is None
            or meta.statistics.channels is None
            or meta.channel_axis is None
            or "val" not in node.meta
        ):
            continue
        size = node.meta["val"].shape[meta.channel_axis]
        if size != meta.statistics.channels:
            raise PassContractError(f"{meta.statistics.channels} channel statistics on a tensor of {size} channels",
                                    stage=name, where=place(node), expected="statistics dropped or transformed")  # fmt: skip
    moved = _moved(before, after)
    if moved is not None and exactly is not None:
        moved = _moved(*exactly.snapshots)
    if moved is not None:
        raise PassContractError("the tensor changed but kept its old statistics", stage=name, where=place(moved),
                                expected="describe(node, statistics=...)")  # fmt: skip


def _moved(before: Snapshot, after: Snapshot) -> fx.Node | None:
    """The first node whose values changed while its ``Statistics`` object stayed."""
    for key, (statistics, means, node) in after.fingerprints.items():
        if key not in before.fingerprints:
            continue
        old = before.fingerprints[key][1]
        scale = float(torch.maximum(old.abs().max(), statistics.std.max().reshape(()))) or 1.0
        if old.shape != means.shape or float((old - means).abs().max()) > FINGERPRINT_TOLERANCE * scale:
            return node
    return None
