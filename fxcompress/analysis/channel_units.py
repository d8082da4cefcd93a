"""From labels to units: the channels of a network that are removed together, and the constants cut with them.

labels of every tensor (channel_rules)  ->  ties for what is shared or has to stay a box of numbers  ->  units 1, 2, ...
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from operator import attrgetter

import networkx as nx
import torch
from torch import Tensor, fx

from ..graph import constant
from ..meta import lies_in
from ..rewrite import Reject
from .channel_layer_rules import goes_by_groups, takes_up
from .channel_rules import RULES
from .channel_tracer import Claim, Tracer
from .labels import FIXED
from .quantization import activations, is_activation


class Units:
    """The units of a normalized float graph whose shapes are known.

    Attributes:
        tracer: labels, claims on constants, and what layers read, before anything was numbered.
        numbers: (labels made,) the unit of each label, 0 for what stays.
        tensors: per activation the units of its elements, of its rank for one sample. They vary along one dimension at
            most: a cut leaves every tensor a box of numbers.
        cuts: {constant: {axis: units (size,)}}, axes without a unit left out.
    """

    def __init__(self, gm: fx.GraphModule, ignored_layers: Sequence[str] = ()):
        self.gm, self.tracer = gm, Tracer(gm, RULES)
        for node in gm.graph.nodes:
            if is_activation(node):
                self.tracer.visit(node)
            elif node.op in ("call_function", "output"):
                why = "it is a graph output" if node.op == "output" else f"nothing is known about {node.target}"
                for source in activations(node):
                    self.tracer.fix(self.tracer.of(source).labels, Reject(why, node))
        self._ignore(ignored_layers)
        self._keep_boundaries()
        self._tie_shared()
        self._settle()

    def why_fixed(self, label: int) -> Reject | None:
        return self.tracer.labels.why_fixed(label)

    # -- obstacles

    def _ignore(self, names: Sequence[str]) -> None:
        for claim in self.tracer.claims:
            if claim.writes and claim.labels is not None and lies_in(claim.user, names):
                self.tracer.fix(claim.labels, Reject("ignored_layers names it", claim.user))

    def _keep_boundaries(self) -> None:
        """A layer whose bias cannot take up what a masked channel leaves keeps that channel."""
        for node, read in self.tracer.inputs.items():
            if goes_by_groups(node, constant(self.gm, node.args[1])):
                continue  # its outputs go with the inputs
            varies = read.rest.isnan()
            pads = (read.rest != 0) & ~varies & torch.tensor(not takes_up(node))
            self.tracer.fix(read.labels[varies], Reject("a masked channel is no constant there", node))
            self.tracer.fix(
                read.labels[pads], Reject("a masked channel is a constant there, and it pads with zeros", node)
            )

    def _tie_shared(self) -> None:
        """Layers that share a weight cut it alike."""
        shared: dict[tuple, list[Claim]] = defaultdict(list)
        for claim in self.tracer.claims:
            if claim.axis is not None:
                shared[claim.target, claim.axis].append(claim)
        for claims in shared.values():
            vectors = [claim.labels for claim in claims]
            if len({len(vector) for vector in vectors}) == 1:
                self.tracer.labels.tied(vectors, Reject("it is shared with channels that stay", claims[-1].user))

    # -- settling

    def _settle(self) -> None:
        """Tie and fix until every tensor is regular and all readers of a constant cut it alike."""
        self.numbers = self.tracer.labels.settle()
        while self._irregular() or self._disagreeing():
            self.numbers = self.tracer.labels.settle()
        self.tensors = {n: collapsed(self.numbers[c.labels]) for n, c in self.tracer.channels.items()}
        self.cuts = {target: cuts[0] for target, cuts in self._cuts().items() if cuts[0]}

    def _irregular(self) -> bool:
        """Treat one tensor that no cut leaves a box, or all that would vanish. False when there is none."""
        vanishing = False
        for node, channels in self.tracer.channels.items():
            units = collapsed(self.numbers[channels.labels])
            varying = [dim for dim, size in enumerate(units.shape) if size > 1]
            if len(varying) > 1:
                best = max(varying, key=lambda dim: _independent(units, dim))
                self.tracer.labels.along(
                    channels.labels, best, Reject("its channels are tied to others that stay", node)
                )
                return True
            if not varying and int(units.flatten()[0]) != FIXED:
                self.tracer.fix(channels.labels, Reject("its channels can only go all together", node))
                vanishing = True
        return vanishing

    def _disagreeing(self) -> bool:
        """Fix what readers of one constant would cut differently. False when all agree."""
        disagree = False
        for target, cuts in self._cuts().items():
            if any(not _same(cuts[0], other) for other in cuts[1:]):
                disagree = True
                for claim in self.tracer.claims:
                    if claim.target == target:
                        labels = self.tracer.of(claim.user).labels if claim.labels is None else claim.labels
                        self.tracer.fix(labels, Reject(f"{target} is shared with another use", claim.user))
        return disagree

    def _cuts(self) -> dict[str, list[dict[int, Tensor]]]:
        """{constant: what each of its readers would cut of it, {axis: units}}."""
        claims: dict[tuple, list[Claim]] = defaultdict(list)
        for claim in self.tracer.claims:
            claims[claim.target, claim.user].append(claim)
        claimed = {target for target, _ in claims}
        cuts = defaultdict(list)
        for node in self.gm.graph.find_nodes(op="get_attr"):
            if node.target in claimed:
                for user in node.users:
                    axes = (cut for claim in claims[node.target, user] for cut in self.resolved(claim))
                    cuts[node.target].append({axis: units for axis, units in axes if bool((units != FIXED).any())})
        return cuts

    def resolved(self, claim: Claim) -> Iterator[tuple[int, Tensor]]:
        """(axis, units along it) of a claim; an operand of an elementwise operator is cut where the result is."""
        if claim.axis is not None:
            yield claim.axis, self.numbers[claim.labels]
            return
        units, value = collapsed(self.numbers[self.tracer.of(claim.user).labels]), attrgetter(claim.target)(self.gm)
        for dim, size in enumerate(units.shape):
            axis = dim - units.ndim + value.ndim
            if size > 1 and axis >= 0 and value.shape[axis] == size:
                yield axis, units.flatten()


def collapsed(units: Tensor) -> Tensor:
    """Dimensions along which nothing varies made 1."""
    for dim in range(units.ndim):
        if units.shape[dim] > 1 and bool((units == units.narrow(dim, 0, 1)).all()):
            units = units.narrow(dim, 0, 1)
    return units


def _independent(units: Tensor, dim: int) -> int:
    """How many units are left when they are tied to vary along ``dim`` only."""
    ties = nx.utils.UnionFind([FIXED])
    for part in units.unbind(dim):
        ties.union(*part.unique().tolist())
    return len({ties[unit] for unit in units.unique().tolist()} - {ties[FIXED]})


def _same(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[axis], other[axis]) for axis in one)
