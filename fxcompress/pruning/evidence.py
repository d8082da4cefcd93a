"""What criteria look at: weights, activations and gradients of a float graph, per layer and per unit.

Weights are asked for by what they compute (``rows``) or by what they read (``columns``). Those of rows are as trained: weight decay
has shrunk the useless ones, though batch norm behind them takes any scale back. *Effective* ones, where that scale would be in the
way, are those that batch norm folds to: W' = W |gamma| / sqrt(var + eps).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx

from ..analysis.channel_groups import ChannelGroups, Layer, batch_norm_of
from ..analysis.layer_weights import groups_of
from ..dialects import ADAPTIVE_MAX_POOL, LINEAR, TRANSPOSED_CONVOLUTIONS
from ..errors import CalibrationError
from ..float_ops import MASKED_SOFTMAX
from ..graph import argument, constant, is_call

Batch = tuple[Tensor, ...]
Objective = Callable[[tuple[Tensor, ...]], Tensor]


def adaptive_max_pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """(N, C, H, W) -> (N, C, *size)."""
    return torch.nn.functional.adaptive_max_pool2d(x, size)


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Along the last dimension over the elements where the bool ``mask`` is True; rows of zeros where it never is."""
    return torch.softmax(x.masked_fill(~mask, -1e30), -1) * mask


#: Operators of ours that autograd does not know, as torch spells them.
DIFFERENTIABLE = {ADAPTIVE_MAX_POOL: adaptive_max_pool, MASKED_SOFTMAX: masked_softmax}


def predicted_logits(outputs: tuple[Tensor, ...]) -> Tensor:
    """The scalar that is differentiated unless the caller says otherwise: sum over the batch, and over positions of a map,
    of the largest value along the class dimension (1, else the last) of the first output."""
    first = outputs[0]
    return first.amax(1 if first.ndim != 3 else -1).sum() if first.ndim > 1 else first.sum()


class Evidence:
    """A network and unlabeled examples, asked by criteria.

    Args:
        groups: units and layers of the graph.
        batches: flat inputs of the graph; without them only the weights can be asked.
        objective: a scalar of the graph's outputs, for gradients.
        seed: of what is random.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        batches: Sequence[Batch] = (),
        objective: Objective = predicted_logits,
        seed: int = 0,
    ):
        self.groups, self.gm, self.batches = groups, groups.gm, list(batches)
        self.objective, self.random = objective, torch.Generator().manual_seed(seed)

    # -- weights

    def rows(self, layer: Layer, values: dict[str, Tensor] | None = None) -> Tensor:
        """(O, K) weights that compute each output, float64; of other ``values`` by constant, say gradients."""
        weight = constant(self.gm, _weight(layer)) if values is None else values[layer.rows.target]
        return weight.double().movedim(layer.rows.axis, 0).flatten(1)

    def effective_rows(self, layer: Layer) -> Tensor:
        """(O, K) weights that compute each output, with batch norm."""
        rows, scale = self.rows(layer), self.scale(layer)
        return rows if scale is None or len(scale) != len(rows) else rows * scale[:, None]

    def columns(self, layer: Layer) -> Tensor:
        """(I, K) effective weights that read each input."""
        weight, scale, node = constant(self.gm, _weight(layer)).double(), self.scale(layer), layer.node
        groups = groups_of(node)
        blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        if not is_call(node, *TRANSPOSED_CONVOLUTIONS):  # (O, I/G, *K)
            blocks = blocks.transpose(1, 2)
        if scale is not None:
            blocks = blocks * scale.reshape(groups, 1, -1, 1)
        return blocks.reshape(len(layer.columns), -1)

    def scale(self, layer: Layer) -> Tensor | None:
        """(O,) |gamma| / sqrt(var + eps) of the batch norm behind a layer, None without one."""
        norm = batch_norm_of(layer)
        if norm is None or norm.args[1] is None:
            return None
        var = constant(self.gm, norm.args[4]).double()
        return constant(self.gm, norm.args[1]).double().abs() / (var + argument(norm, "eps")).sqrt()

    def per_unit(self, score: Callable[[Layer], Tensor | None]) -> Tensor:
        """(units,) the sum of a score of rows (R,) over all rows of a unit, in all layers; NaN where no layer has one."""
        return self._summed((layer.rows.units, score(layer)) for layer in self.groups.layers)

    def per_unit_read(self, score: Callable[[Layer], Tensor]) -> Tensor:
        """(units,) the sum of a score of columns (I,) over all that read a unit, in all layers; NaN where no layer does."""
        return self._summed((layer.columns, score(layer)) for layer in self.groups.layers if layer.columns is not None)

    def _summed(self, scores: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
        total = torch.zeros(self.groups.count, dtype=torch.float64)
        scored = torch.zeros(self.groups.count, dtype=torch.bool)
        for units, score in scores:
            if score is not None:
                total.index_add_(0, units, score.double())
                scored[units] = True
        return torch.where(scored, total, torch.nan)

    # -- activations

    @functools.cached_property
    def input_norms(self) -> dict[fx.Node, Tensor]:
        """Per layer the root mean square (I,) of each channel it reads, over examples and positions."""
        recorder = _Inputs(self.gm, {layer.node for layer in self.groups.layers if layer.columns is not None})
        with torch.no_grad():
            for batch in self._data():
                recorder.run(*batch)
        return {node: (total / count).sqrt() for node, (total, count) in recorder.squares.items()}

    # -- gradients

    def gradients(
        self, factor: float = 1.0, layer: Layer | None = None, objective: Objective | None = None
    ) -> dict[str, Tensor]:
        """Gradient of the objective by the weight of every layer, averaged over the examples; of one layer only, whose weight
        is multiplied by ``factor``, if one is given."""
        layers = self.groups.layers if layer is None else [layer]
        weights = {chosen.rows.target: constant(self.gm, _weight(chosen)) for chosen in layers}
        leaves = {target: (value.detach() * factor).requires_grad_() for target, value in weights.items()}
        network, count = _Differentiable(self.gm, leaves), 0
        total = {target: torch.zeros_like(value) for target, value in weights.items()}
        for batch in self._data():
            with torch.enable_grad():
                value = (objective or self.objective)(network.run(*batch))
                found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            for target, gradient in zip(leaves, found, strict=True):
                total[target] += 0 if gradient is None else gradient
            count += len(batch[0])
        return {target: gradient / count for target, gradient in total.items()}

    def _data(self) -> list[Batch]:
        if not self.batches:
            raise CalibrationError("this pruning_criterion or pruning_budget looks at data, and there are none", stage="prune",
                                   remedy="Pass calibration_data (64 unlabeled examples), or choose one that looks at weights only.")  # fmt: skip
        return self.batches


def _weight(layer: Layer) -> fx.Node:
    return next(a for a in layer.node.all_input_nodes if a.op == "get_attr" and a.target == layer.rows.target)


class _Inputs(fx.Interpreter):
    """Sums the squares of what layers read, per channel."""

    def __init__(self, gm: fx.GraphModule, layers: set[fx.Node]):
        super().__init__(gm)
        self.layers, self.squares = layers, {}

    def run_node(self, node: fx.Node):
        if node in self.layers:
            x = self.env[node.args[0]].double()
            axis = x.ndim - 1 if node.target is LINEAR else 1
            x = x.movedim(axis, 0).flatten(1)
            total, count = self.squares.get(node, (0, 0))
            self.squares[node] = total + x.square().sum(1), count + x.shape[1]
        return super().run_node(node)


class _Differentiable(fx.Interpreter):
    """Runs the graph with other values for some constants."""

    def __init__(self, gm: fx.GraphModule, values: dict[str, Tensor]):
        super().__init__(gm)
        self.values = values

    def fetch_attr(self, target: str):
        return self.values[target] if target in self.values else super().fetch_attr(target)

    def call_function(self, target, args, kwargs):
        return super().call_function(DIFFERENTIABLE.get(target, target), args, kwargs)
