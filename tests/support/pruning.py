"""What tests of pruning share: normalized graphs, random cuts, masked against shrunk."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxcompress import PassManager
from fxcompress.analysis.channel_groups import ChannelGroups
from fxcompress.capture import capture
from fxcompress.passes import EliminateDeadCode, FoldConstants, Normalize
from fxcompress.promises import in_float64, relative_change
from fxcompress.pruning.cut import mask, shrink


def float_graph(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The normalized float graph, with example inputs in its context."""
    manager = PassManager([Normalize(), FoldConstants(), EliminateDeadCode()])
    return manager.run(capture(model.eval(), inputs).graph_module)


def random_cut(groups: ChannelGroups, share: float = 0.4, seed: int = 0) -> Tensor:
    """(units,) bool: some of every group, never all of a tensor's units."""
    removed = torch.rand(groups.count, generator=torch.Generator().manual_seed(seed)) < share
    removed[0] = False
    for units in [axis.units for axis in groups.axes] + [units.flatten() for units in groups.tensors.values()]:
        if bool(removed[units].all()):
            removed[units[0]] = False
    return removed


def masked_and_shrunk(
    gm: fx.GraphModule, inputs: tuple[Tensor, ...], seed: int = 0
) -> tuple[float, float, fx.GraphModule]:
    """(difference of shrunk from masked, of masked from the original, the shrunk graph), in float64, of a random cut."""
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    gm = in_float64(gm)
    groups = ChannelGroups(gm)
    removed = random_cut(groups, seed=seed)
    with torch.no_grad():
        original, masked = gm(*inputs), mask(groups, removed)(*inputs)
        small = shrink(groups, removed)
        small.graph.lint()
        small.recompile()
        return relative_change(masked, small(*inputs)), relative_change(original, masked), small
