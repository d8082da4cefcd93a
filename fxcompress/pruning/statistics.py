"""What a cut does to the statistics of a network, made good: measured on unlabeled data, or computed from batch norm.

measured    every batch norm gets the statistics of the data again. Each batch is normalized by its own, as in training, so that
            a layer's are taken behind corrected layers; mean and variance are averaged over the batches.
            Source: Li et al. 2020, EagleEye (adaptive batch norm)
analytic    what a removed channel gave on average goes into the biases of its readers, b_o += sum_i W_oi E[x_i], with the
            means that the batch norms before it know (``moments``). Source: Nagel et al. 2019, bias correction, of a cut
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from ..analysis.channel_groups import ChannelGroups
from ..dialects import BATCH_NORM
from ..errors import CalibrationError, InputError
from ..graph import calls, constant, copy_graph_module, set_constant
from ..meta import tensor_meta
from ..moments import propagate
from ..options import context
from ..passes.harvest_statistics import HarvestStatistics

Calibrate = Callable[[nn.Module], None]


class Forward(nn.Module):
    """A function of flat inputs as the module that calibration runs."""

    def __init__(self, run: Callable):
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> None:
        self.run(*inputs)


def collect(calibrate: Calibrate, examples: int) -> list[tuple[Tensor, ...]]:
    """The first batches of the calibration data, of at least ``examples`` examples together where there are as many."""
    batches: list[tuple[Tensor, ...]] = []

    def keep(*inputs: Tensor) -> None:
        if sum(len(batch[0]) for batch in batches) < examples:
            batches.append(tuple(x.detach().clone() for x in inputs))

    calibrate(Forward(keep))
    return batches


def measure_statistics(gm: fx.GraphModule, calibrate: Calibrate) -> int:
    """Replace the statistics of every batch norm by those of the data. Returns how many were replaced.

    The batch norm behind a graph input is the user's normalization and stays, as does one that sees one value per channel.
    """
    recorder = _Statistics(gm, {n for n in calls(gm, BATCH_NORM) if n.args[0].op != "placeholder"})
    calibrate(Forward(recorder.run))
    for node, (mean, var, count) in recorder.sums.items():
        for operand, value in ((node.args[3], mean / count), (node.args[4], var / count)):
            set_constant(gm, operand.target, value)
    return len(recorder.sums)


def expected_inputs(groups: ChannelGroups) -> dict[fx.Node, Tensor]:
    """Per layer the means (I,) of the channels it reads, where batch norm tells; the graph is not changed."""
    gm = copy_graph_module(groups.gm)
    names = {n.name: n for n in groups.gm.graph.nodes}
    harvest = HarvestStatistics()
    harvest.apply(harvest.plan(gm))
    try:
        estimates = {names[n.name]: (n, e.statistics.mean) for n, e in propagate(gm).items()}
    except InputError:  # nothing is known about an input
        return {}
    expected = {}
    for layer in groups.layers:
        if layer.columns is not None and layer.node.args[0] in estimates:
            node, mean = estimates[layer.node.args[0]]
            if mean.ndim and tensor_meta(node).channel_axis is not None and len(mean) == len(layer.columns):
                expected[layer.node] = mean
    return expected


def chosen_correction(gm: fx.GraphModule, stage: str) -> str | None:
    """How the statistics are corrected, as the options or an earlier compilation say. Raises ``CalibrationError`` without its data."""
    earlier, calibrate = context(gm).choices.pruning, context(gm).calibrate
    correction = context(gm).options.pruning_correction if earlier is None else earlier.correction
    if correction == "auto":
        correction = "analytic" if calibrate is None else "measured"
    if correction == "measured" and earlier is None and calibrate is None:
        raise CalibrationError('pruning_correction="measured" needs data, and there are none', stage=stage,
                               remedy='Pass calibration_data, or pruning_correction="analytic".')  # fmt: skip
    return correction


def correct_statistics(gm: fx.GraphModule, correction: str | None) -> None:
    """After the cut: the constants of an earlier compilation again, or statistics measured if ``correction`` says so.

    The "analytic" correction is made with the cut (``expected_inputs``).
    """
    earlier = context(gm).choices.pruning
    if earlier is not None:
        restore(gm, earlier.constants)
    elif correction == "measured":
        measure_statistics(gm, context(gm).calibrate)


def correctable(gm: fx.GraphModule) -> dict[str, Tensor]:
    """The constants that a correction may change: statistics and biases."""
    values = {node.target: constant(gm, node) for node in gm.graph.find_nodes(op="get_attr")}
    return {target: value for target, value in values.items() if value.ndim == 1 and value.is_floating_point()}


def restore(gm: fx.GraphModule, constants: dict) -> None:
    """The corrected ones among the constants of an earlier compilation (``Pruned``) again, where the graph has them."""
    for target, value in correctable(gm).items():
        if isinstance(kept := constants.get(target), Tensor) and kept.shape == value.shape:
            set_constant(gm, target, kept)


class _Statistics(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, norms: set[fx.Node]):
        super().__init__(gm)
        self.norms, self.sums = norms, {}

    def run_node(self, node: fx.Node):
        if node not in self.norms:
            return super().run_node(node)
        x, weight, bias = (self.env[a] if isinstance(a, fx.Node) else a for a in node.args[:3])
        if x.numel() // x.shape[1] < 2:
            return super().run_node(node)
        var, mean = torch.var_mean(x, [dim for dim in range(x.ndim) if dim != 1], correction=1)
        old = self.sums.get(node, (0, 0, 0))
        self.sums[node] = old[0] + mean, old[1] + var, old[2] + 1
        return node.target(x, weight, bias, mean, var, *node.args[5:])
