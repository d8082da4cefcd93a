"""A network whose layers are computed in blocks, with gates: what it costs, what is closed, how it is trained and written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from ..analysis.channel_groups import ChannelGroups
from ..bilinear import BilinearAlgorithm
from ..dialects import ADD, CONVOLUTIONS, LINEAR, WEIGHTED
from ..errors import OptionError
from ..graph import calls, copy_graph_module, erase_dead, is_constant
from ..meta import lies_in
from ..options import CompileOptions, context
from ..pass_manager import PassManager
from ..passes.canonicalize_affine import CanonicalizeAffine
from ..passes.fold_batch_norm import FoldBatchNorm
from ..passes.harvest_statistics import HarvestStatistics
from ..promises import relative_change
from ..pruning.api import Prepared
from ..pruning.costs import Costs, nothing
from ..pruning.training import Settings, Trainer
from ..torch_modes import in_float32
from .gates import GatedLayer, Gates
from .layers import BlockLayer, Cost, refusal
from .mean_correction import correct_means, keep_means, layer_means
from .report import ProductReport

STAGE = "prune_products"
Closed = list[tuple[set[int], set[int]]]  # per layer: products, terms


class BlockNetwork:
    """The network in blocks, with gates, and what it costs."""

    @in_float32()
    def __init__(
        self, model: nn.Module, example_inputs, algorithm: BilinearAlgorithm, shared: bool, ignored: tuple[str, ...]
    ):
        self.prepared = Prepared(model, example_inputs, CompileOptions(ignored_layers=ignored))
        groups = ChannelGroups(self.prepared.graph_module)
        self.multiplications = Costs(groups).without(nothing(groups)).macs
        self.gm = PassManager([HarvestStatistics(), CanonicalizeAffine(), FoldBatchNorm()]).run(
            self.prepared.graph_module
        )
        with torch.no_grad():
            self.before = fx.Interpreter(self.gm).run(*context(self.gm).example_inputs)
        self.algorithm, self.refusals, self.blocks = algorithm, [], []
        for node in calls(self.gm, *WEIGHTED):
            if is_constant(node.args[1]):
                self._add(node, ignored)
        if not self.blocks:
            raise OptionError("no layer can be computed in blocks", stage=STAGE, remedy="; ".join(self.refusals[:3]))
        self.prepared.parameters = _weights(self.gm) | self.prepared.parameters
        one = Gates(algorithm)
        self.layers = [GatedLayer(block, one if shared else Gates(algorithm)) for block in self.blocks]
        self.gates = list(dict.fromkeys(layer.gates for layer in self.layers))
        self._costs: dict[tuple, Cost] = {}

    def _add(self, node: fx.Node, ignored: tuple[str, ...]) -> None:
        known = node.target in CONVOLUTIONS or node.target is LINEAR
        reason = refusal(self.gm, node, self.algorithm) if known else "it is a transposed convolution"
        if lies_in(node, ignored):
            reason = "it is ignored"
        if reason is None:
            self.blocks.append(BlockLayer(self.gm, node, self.algorithm))
        else:
            self.refusals.append(f"{node.name} stays because {reason}")

    # -- training

    def trainable(self, layers: Sequence[GatedLayer]) -> nn.Module:
        """The network with ``layers`` in blocks."""
        gm = copy_graph_module(self.gm)
        nodes = {node.name: node for node in gm.graph.nodes}
        for i, layer in enumerate(layers):
            gm.add_submodule(f"block_{i}", layer)
            node = nodes[layer.block.node.name]
            with gm.graph.inserting_before(node):
                node.replace_all_uses_with(gm.graph.call_module(f"block_{i}", (node.args[0],)))
            gm.graph.erase_node(node)
        return self.prepared.plain(gm)

    @torch.no_grad()
    def close_gates(self, closed: Closed, examples: Sequence) -> None:
        """For good: the closed are 0, the others 1, none is trained, and biases are corrected on the examples, calls of the network."""
        layers = self._with_closed(closed)
        network = self.trainable(layers)
        for gates in self.gates:
            for parameter in gates.parameters():
                parameter.requires_grad_(False).fill_(1.0)
        means = layer_means(network, layers, examples)
        for layer, (products, terms) in zip(self.layers, closed, strict=True):
            layer.gates.products[list(products)] = 0.0
            layer.gates.terms[list(terms)] = 0.0
        correct_means(network, layers, examples, means)

    def train(self, closed: Closed, data, settings: Settings, examples: Sequence) -> None:
        """The weights that are left, where gates are closed; the biases that keep the means come from the examples."""
        layers = self._with_closed(closed)
        network = self.trainable(layers)
        if settings.update_batch_norm:
            keep_means(network, layers, examples)
        Trainer(network, data, settings).run(settings.steps)
        if settings.update_batch_norm:
            correct_means(network, layers, examples, [layer.level.detach() for layer in layers])

    def _with_closed(self, closed: Closed) -> list[GatedLayer]:
        return [layer for layer, (products, _) in zip(self.layers, closed, strict=True) if products]

    # -- what is closed

    def open_share(self, removed: float) -> float:
        """The share of the products' multiplications that may stay if every layer in blocks loses one at least."""
        plain = sum(block.plain_cost.multiplications for block in self.blocks)
        whole = sum(block.cost(self.algorithm).multiplications for block in self.blocks)
        return max(0.0, (plain - removed * self.multiplications) / whole)

    @property
    def savings(self) -> list[float]:
        """Multiplications of one product, per ``gates``."""
        return [sum(self.blocks[i].plain_cost.multiplications for i in self.members(gates)) for gates in self.gates]

    def members(self, gates: Gates) -> list[int]:
        """Layers that have these gates."""
        return [i for i, layer in enumerate(self.layers) if layer.gates is gates]

    def cost(self, closed: Closed) -> Cost:
        """Of the layers in blocks."""
        return sum((self._layer_cost(i, *c) for i, c in enumerate(closed)), Cost(0))

    def _layer_cost(self, i: int, products: set[int], terms: set[int]) -> Cost:
        key = (i, frozenset(products), frozenset(terms))
        if key not in self._costs:  # closing one gate leaves the other layers as they were
            block, gates = self.blocks[i], self.layers[i].gates
            self._costs[key] = block.cost(gates.remaining(products, terms)[0]) if products else block.plain_cost
        return self._costs[key]

    def close_products(self, scores: Sequence[Tensor], removed: float, by_cost: bool) -> list[set[int]]:
        """The lowest scores first, until the share is reached; per multiplication that is saved if ``by_cost``."""
        closed: list[set[int]] = [set() for _ in self.layers]
        members = [self.members(gates) for gates in self.gates]
        values = {
            (g, r): float(sum(scores[i][r] for i in mine))
            for g, mine in enumerate(members)
            for r in range(len(scores[mine[0]]))
        }
        while self.saved(closed) < removed * self.multiplications:
            if not values:
                raise OptionError(f"removed is {removed}, and cannot be reached with {len(self.blocks)} layers in blocks", stage=STAGE,
                                  remedy="Lower it; " + "; ".join(self.refusals[:3]))  # fmt: skip
            cost = [
                sum(self._saving(i, len(closed[i]) + 1) - self._saving(i, len(closed[i])) for i in mine)
                for mine in members
            ]
            g, r = min(values, key=lambda unit: values[unit] / (cost[unit[0]] if by_cost else 1))
            del values[g, r]
            for i in members[g]:
                closed[i].add(r)
            if len(closed[members[g][0]]) == self.algorithm.products - 1:  # one stays
                values = {unit: value for unit, value in values.items() if unit[0] != g}
        return closed

    def close_terms(self, products: Sequence[set[int]], scores: Sequence[Tensor], additions: float) -> Closed:
        """Besides products, of terms the lowest scores first, until the share is reached."""
        closed: Closed = [(mine, set()) for mine in products]
        wanted = self.cost(closed).additions * (1 - additions)
        members = [self.members(gates) for gates in self.gates]
        order = sorted(
            (float(sum(scores[i][t] for i in mine)), g, t)
            for g, mine in enumerate(members)
            for t in range(len(scores[mine[0]]))
        )
        for _, g, t in order:
            if self.cost(closed).additions <= wanted:
                break
            for i in members[g]:
                if closed[i][0]:
                    closed[i][1].add(t)
        return closed

    def saved(self, products: Sequence[set[int]]) -> int:
        """Multiplications that layers save without these products."""
        return sum(self._saving(i, len(mine)) for i, mine in enumerate(products))

    def _saving(self, i: int, count: int) -> int:
        """Of layer i without ``count`` products; with all, it stays as it is defined."""
        plain = self.blocks[i].plain_cost.multiplications
        return plain - (self.algorithm.products - count) * (plain // math.prod(self.algorithm.size)) if count else 0

    def closed_in(self, report: ProductReport) -> Closed:
        """What was closed by an earlier call. Raises ``OptionError`` if it was of another network, algorithm or sharing."""
        mine = (
            [block.name for block in self.blocks],
            (self.algorithm.name, tuple(self.algorithm.size)),
            len(self.gates) < len(self.layers),
        )
        if mine != ([row["name"] for row in report.layers], (report.algorithm, tuple(report.size)), report.shared):
            raise OptionError(
                "the report is of another network, algorithm or sharing",
                stage=STAGE,
                remedy="Call it with what that call had.",
            )
        return [({r - 1 for r in row["closed"]}, {t - 1 for t in row["terms"]}) for row in report.layers]

    # -- the result

    @in_float32()
    def written(self, closed: Closed, criterion: str) -> fx.GraphModule:
        gm = copy_graph_module(self.gm)
        nodes = {node.name: node for node in gm.graph.nodes}
        rows = []
        for i, (layer, (products, terms)) in enumerate(zip(self.layers, closed, strict=True)):
            block, after = layer.block, self._layer_cost(i, products, terms)
            if products:
                algorithm, kept = layer.gates.remaining(products, terms)
                block.write(nodes[block.node.name], algorithm, layer.sums.detach()[kept], layer.bias.detach())
            rows.append({"name": block.name, "closed": sorted(r + 1 for r in products), "terms": sorted(t + 1 for t in terms),
                         "multiplications": (block.plain_cost.multiplications, after.multiplications), "additions": after.additions})  # fmt: skip
        before = sum(block.plain_cost.multiplications for block in self.blocks)
        cost = self.cost(closed)
        erase_dead(gm)
        self.prepared.parameters = _weights(gm) | self.prepared.parameters
        gm.meta["products"] = ProductReport(
            self.algorithm.name, self.algorithm.size, criterion, len(self.gates) < len(self.layers),
            (self.multiplications, self.multiplications - before + cost.multiplications),
            (self.cost([(p, set()) for p, _ in closed]).additions, cost.additions), rows, self.refusals, self._difference(gm),
        )  # fmt: skip
        return self.prepared.result(gm)

    def _difference(self, gm: fx.GraphModule) -> float:
        """Relative change of the outputs on the example inputs."""
        inputs = context(self.gm).example_inputs
        with torch.no_grad():
            return relative_change(self.before, fx.Interpreter(gm).run(*inputs))


def _weights(gm: fx.GraphModule) -> dict[str, bool]:
    """The constants that layers multiply by and add, all of them trained; joined from the left, so that frozen ones stay frozen."""
    operands = [a for node in calls(gm, *WEIGHTED) for a in node.args[1:3]] + [
        a for node in calls(gm, ADD) for a in node.args
    ]
    return {a.target: True for a in operands if is_constant(a)}
