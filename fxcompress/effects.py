"""What every pass did to every layer, and what that won.

Always known (``EffectWatch``): which layers' weights and biases a pass replaced, and the SQNR of the weight before and after,
rounded to nearest at the target's width and granularity until ``quantize`` has rounded it for good.

Measured on request (``leave_one_out``, ``compile(measure_passes=True)``): the pipeline runs once more without the pass, from the
graph as it stood before it to the last qdq graph, and both networks are compared with the float one they were rounded from.
The definitions and what they do not say are in docs/passes.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from . import numerics
from .analysis.encoded_weights import decode, is_encoded, layer_quantizer, rows, summands
from .dialects import WEIGHTED, check_level
from .errors import FxcompressError
from .graph import argument, calls, constant, copy_graph_module, is_constant, owners
from .meta import tensor_meta
from .noise import ChannelNoise, channel_noise, ratio_db, sqnr_db
from .options import CompileOptions, context
from .pass_manager import PassRecord, check_order, rounds
from .promises import Snapshot
from .rewrite import Level, Pass
from .weight_quantizers import QUANTIZERS

QUANTIZE_PASS, NEAREST = "quantize", "nearest"


@dataclass
class LayerEffect:
    """One pass at one layer. SQNR in dB; None where the pass does not touch it or nothing was measured.

    Attributes:
        pass_name, node, origin: which pass, which layer.
        done: what the pass says it did there, or which of the layer's constants it replaced; empty where it only has an effect.
        weight_before, weight_after: SQNR of the layer's rounded weight around the pass.
        sqnr_without, sqnr: of the layer's output, compiled without the pass and with it.
        shift_without, shift: share 0..1 of that noise which is a constant per channel.
    """

    pass_name: str
    node: str
    origin: str
    done: list[str] = field(default_factory=list)
    weight_before: float | None = None
    weight_after: float | None = None
    sqnr_without: float | None = None
    sqnr: float | None = None
    shift_without: float | None = None
    shift: float | None = None


class EffectWatch:
    """Observer of a ``PassManager``: collects ``effects`` in the order of the passes.

    ``keep``: also keep the graph before every pass (``before``, beside ``records``), for ``leave_one_out``.
    """

    def __init__(self, keep: bool = False):
        self.keep = keep
        self.effects: list[LayerEffect] = []
        self.before: list[Snapshot] = []
        self.records: list[PassRecord] = []
        self._known: dict[str, tuple[tuple, float | None]] = {}  # layer -> (its weight, dB)
        self._originals: dict[str, fx.Node] = {}  # layers of the float graph that was quantized

    def __call__(self, record: PassRecord, before: Snapshot, gm: fx.GraphModule) -> None:
        if self.keep:
            self.before.append(before)
            self.records.append(record)
        if not record.rewrites:
            return
        if not self._originals and (exact := context(gm).float_graph) is not None:
            self._originals = {node.name: node for node in calls(exact, *WEIGHTED)}
        old = {node.name: node for node in calls(before.graph_module, *WEIGHTED)}
        done = done_at_layers(record, before.graph_module, gm)
        for node in calls(gm, *WEIGHTED):
            if node.name not in old or not (is_encoded(node.args[1]) or is_constant(node.args[1])):
                continue
            effect = self._effect(record.name, before.graph_module, old[node.name], gm, node)
            if effect is not None:
                effect.done = done.get(node.name) or effect.done
                self.effects.append(effect)

    def _effect(
        self, name: str, before: fx.GraphModule, old: fx.Node, gm: fx.GraphModule, new: fx.Node
    ) -> LayerEffect | None:
        replaced = [part for part in ("weight", "bias") if _identity(before, old, part) != _identity(gm, new, part)]
        if not replaced:
            return None
        effect = LayerEffect(name, new.name, tensor_meta(new).origin.module, [f"new {' and '.join(replaced)}"])
        if "weight" in replaced:
            effect.weight_before, effect.weight_after = self._sqnr(before, old), self._sqnr(gm, new)
        return effect

    def _sqnr(self, gm: fx.GraphModule, node: fx.Node) -> float | None:
        version = _identity(gm, node, "weight")
        if self._known.get(node.name, ((), None))[0] != version:
            self._known[node.name] = version, weight_sqnr(gm, node, self._originals)
        return self._known[node.name][1]


def weight_sqnr(gm: fx.GraphModule, node: fx.Node, originals: dict[str, fx.Node]) -> float | None:
    """dB of a layer's integer weight; of a float one as if it were rounded to nearest now. None where neither is known.

    ``originals``: the layers of the float graph that was quantized, by name.
    """
    if is_encoded(node.args[1]):
        if node.name not in originals:
            return None
        weight = constant(context(gm).float_graph, originals[node.name].args[1]).detach()
        return sqnr_db(weight, decode(gm, node.args[1]))
    if not is_constant(node.args[1]):
        return None
    return nearest_sqnr(rows(node, constant(gm, node.args[1]).detach()).float(), context(gm).options)


def nearest_sqnr(weight: Tensor, options: CompileOptions) -> float:
    """dB of rows (O, K) rounded to nearest with the target's bits, one scale per row or for all of them."""
    bits = options.target.weight_bits
    largest = weight.abs().amax(1) if weight.numel() else torch.zeros(len(weight))
    if options.weight_granularity == "tensor":
        largest = largest.max().expand_as(largest)
    scale = numerics.symmetric_scale(largest, numerics.weight_limit(bits)).float()[:, None]
    rest = weight - QUANTIZERS[NEAREST].encode(weight / scale, 1, bits) * scale
    return ratio_db(*(float(t.square().sum(dtype=torch.float64)) for t in (weight, rest)))


def _identity(gm: fx.GraphModule, node: fx.Node, part: str) -> tuple:
    """Tells one version of a layer's weight or bias from another: passes replace constants, they never write into them."""
    stored = argument(node, part)
    if stored is None:
        return ()
    if is_encoded(stored):
        return tuple(id(constant(gm, a)) for summand in summands(stored) for a in summand.args[:2])
    return (id(constant(gm, stored)),) if is_constant(stored) else (stored.name,)


def done_at_layers(record: PassRecord, before: fx.GraphModule, after: fx.GraphModule) -> dict[str, list[str]]:
    """What a pass says it did, by the layer it did it to or behind."""
    owner = owners(before, WEIGHTED) | owners(after, WEIGHTED)
    found: dict[str, list[str]] = {}
    for name, text in zip(record.match_nodes, record.matches, strict=True):
        if name in owner:
            found.setdefault(owner[name], []).append(text.partition(": ")[2] or text)
    return {layer: list(dict.fromkeys(texts)) for layer, texts in found.items()}


# ---------------------------------------------------------------------------------------------------------- leave one out


@dataclass
class Reference:
    """What the alternatives are compared with: the network as it was compiled.

    Attributes:
        rounded: the last qdq graph; noise: of its layers; outputs: of the float model; sqnr: dB of the qdq graph's outputs.
    """

    rounded: fx.GraphModule
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    noise: dict[str, ChannelNoise]
    sqnr: list[float]

    @classmethod
    def of(cls, qdq_level: Snapshot, outputs: tuple[Tensor, ...]) -> Reference:
        rounded, inputs = qdq_level.graph_module, qdq_level.inputs
        sqnr = [sqnr_db(a, b) for a, b in zip(outputs, qdq_level.values, strict=True)]
        return cls(rounded, inputs, outputs, channel_noise(context(rounded).float_graph, rounded, [inputs]), sqnr)


def leave_one_out(
    passes: list[Pass], watch: EffectWatch, reference: Reference, announce: Callable[[str], None] = lambda text: None
) -> None:
    """Measure every pass that rewrote something and can be left out; completes ``watch.effects`` and ``watch.records``.

    A pass that later ones need, or without which no legal qdq graph comes out, gets the reason in ``record.without``. ``quantize``
    cannot be left out, its choice of how weights are rounded can: it is compared with rounding to nearest.
    """
    for i, name, run in _alternatives(passes, watch, reference.rounded):
        announce(f"without {name}")
        record = watch.records[i]
        try:
            rounded = run()
            check_level(rounded, Level.QDQ, stage=name)
            noise = channel_noise(context(rounded).float_graph, rounded, [reference.inputs])
            outputs = Snapshot(rounded, reference.inputs).values
        except Exception as error:  # whatever a pipeline with a hole in it trips over
            found = error.found if isinstance(error, FxcompressError) else f"{type(error).__name__}: {error}"
            record.without = f"cannot be left out: {found}"
            continue
        record.without = name
        record.output_sqnr_without = [sqnr_db(a, b) for a, b in zip(reference.outputs, outputs, strict=True)]
        record.output_sqnr_with = reference.sqnr
        _add(watch.effects, record, watch.before[i].graph_module, reference, noise)


def _alternatives(
    passes: list[Pass], watch: EffectWatch, rounded: fx.GraphModule
) -> Iterator[tuple[int, str, Callable[[], fx.GraphModule]]]:
    """(position, what is different, a function that compiles it) for everything worth trying."""
    stages = [i for i, p in enumerate(passes) if p.level is not Level.INTEGER and p.result_level is not Level.INTEGER]
    for i in stages:
        if not watch.records[i].rewrites:
            continue
        rest = [passes[j] for j in stages if j > i]
        if passes[i].name != QUANTIZE_PASS:
            earlier = [passes[j] for j in stages if j < i]
            yield i, "left out", functools.partial(_without, watch.before[i], rest, earlier)
        elif _chosen_quantizers(rounded) - {NEAREST}:
            yield i, 'weight_quantizer="nearest"', functools.partial(_to_nearest, watch.before[i], [passes[i], *rest])


def _chosen_quantizers(rounded: fx.GraphModule) -> set[str]:
    return {layer_quantizer(rounded, n).name for n in calls(rounded, *WEIGHTED) if is_encoded(n.args[1])}


def _without(before: Snapshot, rest: list[Pass], earlier: list[Pass]) -> fx.GraphModule:
    check_order([*earlier, *rest])
    return _run(copy_graph_module(before.graph_module), rest)


def _to_nearest(before: Snapshot, passes: list[Pass]) -> fx.GraphModule:
    gm = copy_graph_module(before.graph_module)
    options = replace(context(gm).options, weight_quantizer=NEAREST)
    gm.meta["fxcompress"] = replace(context(gm), options=options)
    return _run(gm, passes)


def _run(gm: fx.GraphModule, passes: list[Pass]) -> fx.GraphModule:
    """The passes once more; the promises they kept the first time are not checked again."""
    for p in passes:
        *_, (gm, _) = rounds(p, gm)
    return gm


def _add(
    effects: list[LayerEffect], record: PassRecord, before: fx.GraphModule, reference: Reference, noise: dict
) -> None:
    """Write the measured numbers into the rows of this pass; layers it only has an effect on get rows of their own."""
    known = {e.node: e for e in effects if e.pass_name == record.name}
    origins = {n.name: tensor_meta(n).origin.module for n in reference.rounded.graph.nodes}
    done = done_at_layers(record, before, reference.rounded)
    for node, ours in reference.noise.items():
        if node not in noise:
            continue
        without = noise[node].in_units_of(ours)
        if node not in known:
            if math.isclose(without.sqnr, ours.sqnr, rel_tol=1e-9) and node not in done:
                continue
            known[node] = LayerEffect(record.name, node, origins[node], done.get(node, []))
            effects.append(known[node])
        effect = known[node]
        effect.sqnr_without, effect.sqnr = without.sqnr, ours.sqnr
        effect.shift_without, effect.shift = without.shift_share, ours.shift_share
