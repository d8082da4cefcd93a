"""The report: what every pass did, what every layer costs and loses, and the proof. Data; ``report_tables.py`` is a view of them.

Every number shown anywhere (terminal, dumps, report page) is read from ``Report.to_dict()``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, fx

from . import report_tables
from .block_products import BLOCK_PRODUCTS, BlockProduct, multiplications
from .effects import LayerEffect
from .graph import constant, is_call, shape
from .histograms import ValueHistogram
from .meta import tensor_meta
from .noise import LayerNoise, sqnr_db
from .packing import stored_bytes
from .power_exponent import ExponentChoice
from .promises import Snapshot
from .pruning.report import PruningReport
from .weight_errors import NetworkBound, WeightError

ops = torch.ops.fxcompress
#: Operators counted as multiply-accumulates, with the position of the operand that gives the length of the sum.
MULTIPLYING = (ops.conv.default, ops.conv_transpose.default, ops.linear.default, ops.matmul.default, *BLOCK_PRODUCTS)


@dataclass
class Layer:
    """One tensor of codes. ``sqnr`` in dB against the float model on the example inputs (qdq level), None without."""

    node: str
    origin: str
    shape: list[int]
    lo: float
    hi: float
    scale: float
    zero_point: int
    chosen_by: str
    sqnr: float | None = None


@dataclass
class Product:
    """One operator that multiplies. MACs per sample; ``stored_bytes`` of its weight in a saved model;
    ``accumulator_bits`` needed in the worst case (proven). ``nanoseconds`` of one sample on this machine, if measured:
    of all layers of ``timed_with`` together, where the backend computes several in one step."""

    node: str
    origin: str
    operator: str
    macs: int
    weight_bytes: int
    stored_bytes: int
    accumulator_bits: int
    nanoseconds: int | None = None
    timed_with: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What ``CompiledModule.report()`` returns.

    Attributes:
        target: bit widths, "w8a8".
        backend: name of the backend that runs the graph.
        inputs: one entry per graph input: name, shape, range and where the range came from.
        passes: one entry per pass (``PassRecord``): name, seconds, rewrites, refusals, output_change, output_sqnr, ...
        effects: what every pass did to every layer, and the SQNR before and after (``LayerEffect``).
        noise: of every layer's output, accumulated and its own (``LayerNoise``); empty unless measured (``measure_passes``).
        layers: codes (``Layer``); products: multiplications (``Product``).
        weights: integer weights against the float ones (``WeightError``); weight_bound: for the network (``NetworkBound``);
            exponents: with ``weight_quantizer="power"``, what its exponent 1/2 costs against the best (``ExponentChoice``).
        parameters, float_bytes: of the user's model; integer_bytes: of all constants of the integer graph; stored_bytes:
            of the same in a saved model, where narrow weights are packed.
        block_products: products computed in blocks by another algorithm (``BlockProduct``).
        macs: multiply-accumulates per sample.
        output_sqnr: dB of each graph output on the example inputs.
        certificate: the proof, ``None`` before verification.
        seconds: wall time of capture, passes, verification and in total.
        pruning: what was removed (``PruningReport``), None if nothing was.
        resources: what one inference takes on this machine, from the backend: "arena_bytes", "activation_bytes" and its
            lower bound, "packed_weight_bytes", "threads", "steps" with their kernels and, if measured, "nanoseconds" of one
            sample; empty for the reference backend. After ``export_c``, "c_source": its bytes of flash and RAM.
        histograms: of weights and activations beside their ranges (``ValueHistogram``); empty unless measured.
    """

    target: str
    backend: str = ""
    inputs: list[dict] = field(default_factory=list)
    passes: list[dict] = field(default_factory=list)
    effects: list[LayerEffect] = field(default_factory=list)
    noise: list[LayerNoise] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    block_products: list[BlockProduct] = field(default_factory=list)
    weights: list[WeightError] = field(default_factory=list)
    weight_bound: NetworkBound | None = None
    exponents: ExponentChoice | None = None
    parameters: int = 0
    float_bytes: int = 0
    integer_bytes: int = 0
    stored_bytes: int = 0
    macs: int = 0
    output_sqnr: list[float] = field(default_factory=list)
    certificate: dict | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    pruning: PruningReport | None = None
    resources: dict = field(default_factory=dict)
    histograms: list[ValueHistogram] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Report:
        """What ``to_dict`` gave."""
        rows = {"layers": Layer, "products": Product, "block_products": BlockProduct, "weights": WeightError,
                "effects": LayerEffect, "noise": LayerNoise, "histograms": ValueHistogram}  # fmt: skip
        parts = {name: [kind(**row) for row in data[name]] for name, kind in rows.items()}
        bound = data["weight_bound"] and NetworkBound(**data["weight_bound"])
        choice = data["exponents"] and ExponentChoice(**data["exponents"])
        pruning = data["pruning"] and PruningReport(**data["pruning"])
        return cls(**data | parts | {"weight_bound": bound, "exponents": choice, "pruning": pruning})

    def __str__(self) -> str:
        return report_tables.text(self)

    def summary(self) -> str:
        """The totals alone: target, input ranges, bytes, MACs, quality."""
        return report_tables.summary(self)


def layers(float_level: Snapshot, qdq_level: Snapshot) -> list[Layer]:
    """One entry per activation codes tensor; SQNR of its dequantized value against the same tensor of the float graph."""
    pairs, known = {}, {node.name for node in float_level.graph_module.graph.nodes}
    for node in qdq_level.graph_module.graph.nodes:
        if is_call(node, ops.dequantize.default) and is_call(node.args[0], ops.quantize.default):
            source = node.args[0].args[0]
            pairs |= {node.name: source} if source.name in known else {}  # a residual has no counterpart
    errors = {}
    if float_level.inputs:
        exact = _values(float_level, {source.name for source in pairs.values()})
        rounded = _values(qdq_level, set(pairs))
        errors = {name: sqnr_db(exact[pairs[name].name], rounded[name]) for name in pairs}
    return [_layer(name, source, errors.get(name)) for name, source in pairs.items()]


def _layer(name: str, source: fx.Node, sqnr: float | None) -> Layer:
    dequantize = next(u for u in source.users if is_call(u, ops.quantize.default))
    q = tensor_meta(dequantize).qparams
    lo, hi = ((q.scale * (code - q.zero_point)) for code in (q.qmin, q.qmax))
    meta = tensor_meta(source)
    return Layer(
        source.name, meta.origin.module, [int(n) for n in shape(source)[1:]], float(lo.min()), float(hi.max()),
        float(q.scale.max()), int(q.zero_point.max()), meta.range.provenance if meta.range else "tied", sqnr,
    )  # fmt: skip


def _values(snapshot: Snapshot, names: set[str]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if node.name in names:
                kept[node.name] = value
            return value

    with torch.no_grad():
        Recorder(snapshot.graph_module).run(*snapshot.inputs)
    return kept


def products(gm: fx.GraphModule, accumulators: dict[str, int]) -> list[Product]:
    """Multiplying operators of an integer graph: MACs per sample, and the accumulator bits the certificate proved."""
    result = []
    for node in gm.graph.nodes:
        if is_call(node, *MULTIPLYING):
            weight = _weight(node)
            size, stored = _weight_bytes(gm, weight) if weight.op == "get_attr" else (0, 0)
            result.append(Product(node.name, tensor_meta(node).origin.module, node.target._opname, macs(node), size, stored,
                                  accumulators[node.name]))  # fmt: skip
    return result


def _weight_bytes(gm: fx.GraphModule, weight: fx.Node) -> tuple[int, int]:
    value = constant(gm, weight)
    return value.numel() * value.element_size(), stored_bytes(value)


def _weight(node: fx.Node) -> fx.Node:
    plain = is_call(node, ops.conv.default, ops.linear.default)
    return node.args[1] if plain else node.args[2]


def macs(node: fx.Node) -> int:
    """Multiply-accumulates per sample of a multiplying integer operator."""
    if is_call(node, *BLOCK_PRODUCTS):
        return multiplications(node)
    batch = _hint(shape(node.args[0])[0])
    if is_call(node, ops.conv_transpose.default):  # every input element meets every weight of its channel
        weight = shape(node.args[2])
        return _numel(node.args[0]) // batch * int(torch.tensor(weight[1:]).prod())
    terms = shape(_weight(node))[1:] if not is_call(node, ops.matmul.default) else shape(node.args[0])[-1:]
    return _numel(node) // batch * int(torch.tensor([_hint(t) for t in terms]).prod())


def _numel(node: fx.Node) -> int:
    return int(torch.tensor([_hint(n) for n in shape(node)]).prod())


def _hint(size) -> int:
    """A symbolic size at the batch of the example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
