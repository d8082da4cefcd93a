"""Which channels of which tensors share one scale: the question behind cross-layer equalization.

Dividing channel c of a tensor by s_c is undone by multiplying the columns that read it, if everything in between commutes
with a positive factor per channel. ``LayerGroups`` gives every channel of every tensor a *label*; channels of equal label
must be scaled alike, and label 0 cannot be scaled at all.

    conv, linear, transposed conv      new labels: rows and columns of the weight absorb the factors
    clamp, leaky ReLU, abs             the labels of the input; bounds other than 0 are divided by the factors
    pools, resizes, mean               the labels of the input, alike for all positions of a channel
    reshape, permute, cat, pad, ...    follow the elements
    add, sub                           ties the operands: one scale for all writers and readers of a residual stream
    anything else, inputs, outputs     label 0

Tensors connected by a label form a ``Group`` with its writers (layers whose rows are divided) and readers (layers whose
columns are multiplied).   Source: Nagel et al. 2019, section 4.1; ties through additions are derived here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor, fx

from .. import dialects as d
from ..graph import argument, constant, is_call, is_constant, rank, shape, twins
from ..meta import module_names, place, tensor_meta
from ..rewrite import Reject
from .affine_rules import (
    CHANNELWISE,
    MOVEMENT,
    PAD,
    Blocked,
    is_homogeneous,
    mean_dimensions,
    padded_dimensions,
    push_movement,
)
from .labels import FIXED, Labels, spread
from .layer_weights import channel_dimension, layer_channels, sharing_layers
from .quantization import activations, is_activation, keeps_float

MEAN = torch.ops.aten.mean.dim
CHANNEL_PAD = torch.ops.fxcompress.pad.default
CLAMPS = (d.CLAMP, d.CHANNEL_CLAMP)
OUTPUT = "it is a graph output"


@dataclass(eq=False)
class Group:
    """Tensors tied by common labels, in topological order, with the layers that write and read them.

    ``blocked`` says why none of their channels can be scaled, None when some can.
    """

    tensors: list[fx.Node]
    writers: list[fx.Node]
    readers: list[fx.Node]
    blocked: Reject | None

    def __str__(self) -> str:
        return f"{module_names(self.writers)} -> {module_names(self.readers)}"


class LayerGroups:
    """Labels and groups of a float graph whose shapes are known.

    Attributes:
        labels: int64 per activation, of its rank, each dimension 1 or the tensor's: (1, C, 1, 1) for an image.
        inputs, outputs: per layer the labels (I,) of its columns and (O,) of its rows.
        count: number of labels; 0 is ``FIXED``.
        groups: those that some layer writes and some layer reads, or an operator that stands in the way.

    >>> print(*LayerGroups(gm).groups, sep="\\n")                               # doctest: +SKIP
    conv1 -> conv2
    stem, layer1.0.conv2, layer1.1.conv2 -> layer1.0.conv1, layer1.1.conv1, fc
    """

    def __init__(self, gm: fx.GraphModule):
        self.gm, self._made = gm, Labels()
        self._twins = twins(gm.graph)
        self.labels: dict[fx.Node, Tensor] = {}
        self.inputs: dict[fx.Node, Tensor] = {}
        self.outputs: dict[fx.Node, Tensor] = {}
        self._reasons: list[Reject] = []
        for node in gm.graph.nodes:
            if is_activation(node):
                self.labels[node] = self._label(node)
            elif node.op == "output":
                for tensor in node.all_input_nodes:
                    self._fix(tensor, OUTPUT, node)
        self._settle()
        self.groups = self._find_groups()

    def scaled_tensors(self) -> Iterable[fx.Node]:
        """Activations with a channel that can be scaled."""
        return (node for node, labels in self.labels.items() if bool((labels != FIXED).any()))

    # -- labels, node by node

    def _label(self, node: fx.Node) -> Tensor:
        try:
            if node.op == "placeholder":
                raise Blocked("it is a graph input", node)
            if keeps_float(node):
                raise Blocked("keep_float names its module", node)
            return self._rule(node)
        except Blocked as blocked:
            for source in activations(node):
                self._fix(source, blocked.reject.reason, node)
            self._reasons.append(blocked.reject)
            return torch.full([1] * rank(node), FIXED)

    def _rule(self, node: fx.Node) -> Tensor:
        if is_call(node, *d.WEIGHTED):
            return self._layer(node)
        if is_call(node, d.ADD, d.SUB):
            return self._sum(node)
        if is_call(node, d.CAT):
            return self._cat(node)
        if is_call(node, *CLAMPS):
            return self._clamp(node)
        if is_call(node, MEAN):
            return self._mean(node)
        if is_homogeneous(node):
            return self.labels[node.args[0]]
        if is_call(node, *CHANNELWISE, CHANNEL_PAD):
            return self._made.along(self.labels[node.args[0]], 1)
        if is_call(node, PAD):
            return self._pad(node)
        if is_call(node, *MOVEMENT):
            return push_movement(node, self.labels[node.args[0]].double()).long()
        raise Blocked(f"{node.target} does not commute with a scale", node)

    def _layer(self, node: fx.Node) -> Tensor:
        if any(not is_constant(operand) for operand in node.args[1:3] if operand is not None):
            raise Blocked("its weight is computed at run time", node)
        if shared := sharing_layers(node, self._twins):
            raise Blocked(f"weight shared with {place(shared[0])}", node)
        axis = channel_dimension(node)
        inputs, outputs = layer_channels(node, constant(self.gm, node.args[1]))
        self.inputs[node] = self._made.along(self.labels[node.args[0]], axis).flatten().expand(inputs)
        self.outputs[node] = self._made.new([outputs])
        return spread(self.outputs[node], axis, rank(node))

    def _sum(self, node: fx.Node) -> Tensor:
        """Operands of one shape are tied; a constant is a further writer."""
        tensors = activations(node)
        if not all(_same_sizes(t, node) for t in tensors):
            raise Blocked("it broadcasts an operand", node)
        if not all(isinstance(a, fx.Node) for a in node.args[:2]):
            raise Blocked("it adds a number", node)
        labels = [self.labels[t] for t in tensors]
        if any(is_constant(a) for a in node.args[:2]):
            labels.append(self._made.along(labels[0], _axis(node)))
        return self._made.tied(labels)

    def _cat(self, node: fx.Node) -> Tensor:
        dim = argument(node, "dim") % rank(node)
        parts = [self.labels[operand] for operand in node.args[0]]
        lengths = [shape(operand)[dim] for operand in node.args[0]]
        if not all(isinstance(n, int) for n in lengths):
            raise Blocked("it concatenates along the batch", node)
        sizes = list(torch.broadcast_shapes(*(p.narrow(dim, 0, 1).shape for p in parts)))
        return torch.cat([p.expand(*sizes[:dim], n, *sizes[dim + 1 :]) for p, n in zip(parts, lengths)], dim)

    def _clamp(self, node: fx.Node) -> Tensor:
        if is_homogeneous(node):
            return self.labels[node.args[0]]
        return self._made.along(self.labels[node.args[0]], _axis(node))  # the bounds will vary along the channels

    def _mean(self, node: fx.Node) -> Tensor:
        labels, (dims, keepdim) = self.labels[node.args[0]], mean_dimensions(node)
        for dim in dims:
            labels = self._made.tied([part.unsqueeze(dim) for part in labels.unbind(dim)])
        return labels if keepdim else labels.squeeze(dims)

    def _pad(self, node: fx.Node) -> Tensor:
        labels = self.labels[node.args[0]]
        if argument(node, "value"):
            raise Blocked(f"it pads with {argument(node, 'value'):g}", node)
        for dim, before, after in padded_dimensions(node):
            if labels.shape[dim] > 1:  # new channels of zeros: any scale fits them
                around = [[*labels.shape[:dim], n, *labels.shape[dim + 1 :]] for n in (before, after)]
                labels = torch.cat([self._made.new(around[0]), labels, self._made.new(around[1])], dim)
        return labels

    # -- obstacles

    def _fix(self, tensor: fx.Node, reason: str, node: fx.Node) -> None:
        labels = self.labels.get(tensor)
        if labels is not None:
            self._made.fix(labels)
            self._reasons.append(Reject(reason, node))

    def _settle(self) -> None:
        """Number the labels without gaps, equal where they are tied."""
        numbers = self._made.settle()
        self.count = int(numbers.max()) + 1
        for table in (self.labels, self.inputs, self.outputs):
            for key, labels in table.items():
                table[key] = numbers[labels]

    # -- groups

    def _find_groups(self) -> list[Group]:
        """Tensors are tied when one is computed from the other by an operator that passes scales on."""
        opaque = {reject.node for reject in self._reasons}
        ties = nx.Graph()
        for node in self.labels:
            ties.add_node(node)
            if not is_call(node, *d.WEIGHTED) and node not in opaque:
                ties.add_edges_from((a, node) for a in activations(node))
        groups = []
        for component in nx.connected_components(ties):
            writers = [n for n in component if is_call(n, *d.WEIGHTED)]
            readers = {n for t in component for n in t.users if is_call(n, *d.WEIGHTED) and n.args[0] is t}
            blocked = self._blocked(component, writers) if writers else None
            if writers and (readers or (blocked is not None and OUTPUT not in blocked.reason)):
                groups.append(Group(*map(sorted, (component, writers, readers)), blocked))
        return sorted(groups, key=lambda group: group.tensors[0])

    def _blocked(self, tensors: set[fx.Node], writers: list[fx.Node]) -> Reject | None:
        """Why a group is fixed, told at its first writer: the first obstacle that touches it."""
        if any(bool((self.labels[n] != FIXED).any()) for n in writers):
            return None
        touching = (r for r in self._reasons if r.node in tensors or tensors & set(r.node.all_input_nodes))
        obstacle = next(touching, None)
        reason = "its channels are tied to others" if obstacle is None else f"{place(obstacle.node)}: {obstacle.reason}"
        return Reject(reason, min(writers))


def _axis(node: fx.Node) -> int:
    axis = tensor_meta(node).channel_axis
    if axis is None:
        raise Blocked("its channels are not known", node)
    return axis


def _same_sizes(one: fx.Node, other: fx.Node) -> bool:
    """Equal as far as known: a symbolic size may be any."""
    pairs = zip(shape(one), shape(other), strict=False)
    return rank(one) == rank(other) and not any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
