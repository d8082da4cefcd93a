"""``fine_tune``: train a pruned network again. ``prune_gradually``: pruning entwined with it.

    one cut, then training          fine_tune(prune(model, x, pruning_ratio=0.75), data, steps=1000)
    a bit of each in turn           prune_gradually(model, x, data, pruning_ratio=0.75, steps=1000, removals=20)

Both end in the same cut of the same units' rows and columns (``cut``); entwined, units are masked first and cut out at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..analysis.channel_groups import ChannelGroups
from ..api import take_snapshot
from ..calibration import make_calibration
from ..errors import ModelError, OptionError
from ..options import OF_PRUNING, Choices, CompileOptions, context
from ..pass_manager import PassManager
from ..passes._pruning import EXAMPLES
from ..passes.normalize import Normalize
from ..passes.prune_channels import PruneChannels
from ..torch_modes import in_float32, normal_tensors
from .api import Prepared
from .costs import nothing
from .cut import mask_in_place
from .evidence import Objective, predicted_logits
from .examples import STAGE
from .latency import cost_function
from .report import Pruned
from .training import Trainer, settings_of


@normal_tensors()
def fine_tune(model: nn.Module, data, *, steps: int, **settings) -> nn.Module:
    """Train a network for some steps, towards labels, or without any towards the outputs of another network.

    Args:
        model: a module in eval mode, or what ``prune`` returned. It is not modified.
        data: examples that can be asked for by number: a tensor of inputs (N, ...), a tuple of tensors (inputs, labels), or a
            ``torch.utils.data.Dataset`` with a length, of single samples; its augmentation may draw from torch's random numbers. In
            tuples that are longer than what ``forward`` requires, the last is the label.
        steps: how many batches are trained on.
        teacher: the float model before pruning, in eval mode: the student learns its outputs, labels in ``data`` are not looked at.
        loss: ``f(outputs, target) -> scalar``; target: the label, or the teacher's outputs. Default: cross entropy, or
            ``distillation`` at temperature 2.
        batch_size: default 128; at least 2.
        learning_rate: of the first step, default 0.01; it falls to 0 along a cosine.
        optimizer: ``f(parameters, lr=...)``, such as ``torch.optim.AdamW``; default: SGD with Nesterov's momentum 0.9 and a weight
            decay of 1e-4.
        update_batch_norm: True (default): batch norm normalizes by the batch and its statistics follow; False: they stay as
            they are and are used, which suits small batches.
        seed: of the order of the examples, of dropout and of augmentation. The same call gives the same weights, bit for bit, on
            one machine with one number of threads.
        checkpoint: a file that is written every 50 steps. If it is there already, and of the same call, training goes on from
            it, with the same result as without the interrupt.

    Returns:
        A trained copy of ``model``, in eval mode.

    Raises:
        OptionError: settings that make no sense, a loss that is NaN or Inf, a checkpoint of another call.
        InputError: data that do not fit the model or the loss.
        ModelError: a model without parameters to train, a model or a teacher in training mode.

    >>> small = fxcompress.prune(model, x, pruning_ratio=0.5)                                 # doctest: +SKIP
    >>> tuned = fxcompress.fine_tune(small, images, teacher=model, steps=500)                 # doctest: +SKIP
    """
    checked = settings_of(steps=steps, **settings)
    if isinstance(model, ExportedProgram):
        raise ModelError("an ExportedProgram cannot be trained", stage=STAGE, expected="a module",
                         remedy="Fine-tune what fxcompress.prune(program, ...) returns.")  # fmt: skip
    network = take_snapshot(model)
    Trainer(network, data, checked, after_step=_zeros_kept(network)).run(checked.steps)
    return network


def _zeros_kept(network: nn.Module) -> Callable[[], None]:
    """What makes weights zero again that pruning of single weights set to zero."""
    report = getattr(network, "meta", {}).get("pruning")
    sparse = report is not None and report.sparse
    zeros = {p: p == 0 for p in network.parameters() if p.ndim > 1} if sparse else {}

    @torch.no_grad()
    def zero() -> None:
        for weight, masked in zeros.items():
            weight.masked_fill_(masked, 0)

    return zero


@normal_tensors()
def prune_gradually(
    model: nn.Module,
    example_inputs,
    data,
    *,
    pruning_ratio: float,
    steps: int,
    removals: int = 20,
    objective: Objective = predicted_logits,
    **options,
) -> fx.GraphModule:
    """Prune in small parts with training in between: score what is left, remove the least of it, train, and again.

    Removed units are masked, and zero again after every step, until the last; then they are cut out, which changes nothing.
    Scores are taken anew before every removal; what is removed stays so. Every removal has an equal share of the steps; after p of n of
    them, 1 - (1 - p / n)^3 of the ratio is gone: much at first, little at the end, when the learning rate has fallen and less can recover.
    Source: Yvinec et al. 2022 (SInGE), algorithm 1, which removes one neuron at a time; Zhu and Gupta 2017, equation 1 (the schedule).

    Args:
        model, example_inputs, pruning_ratio, objective: as for ``prune``.
        data, steps: as for ``fine_tune``; ``steps`` is the sum over all removals. Criteria that look at data see the first 64 examples.
        removals: in how many parts the ratio is removed; 1 is ``prune`` followed by ``fine_tune``.
        options: further ones of ``prune`` (all but ``pruning_correction``: training corrects) and of ``fine_tune``. A checkpoint
            holds what has been removed, too.

    Returns:
        The smaller network, as ``prune`` returns it.

    Raises:
        UserError: as ``prune`` and ``fine_tune``; a ratio that cannot be reached before anything is trained.

    >>> small = fxcompress.prune_gradually(model, x, (images, labels), pruning_ratio=0.75, steps=1000)   # doctest: +SKIP
    """
    _check_gradual(removals, options)
    of_pruning = {name: options.pop(name) for name in OF_PRUNING if name in options}
    settings = settings_of(steps=steps, **options)
    checked = CompileOptions.build(pruning_ratio=pruning_ratio, **of_pruning)
    with in_float32():
        prepared = Prepared(model, example_inputs, checked)
    gm, choosing = prepared.graph_module, PruneChannels(objective)
    groups = ChannelGroups(gm, checked.ignored_layers)

    def enforce() -> None:
        mask_in_place(groups, trainer.extra["removed"])

    run = {"pruning_ratio": pruning_ratio, "removals": removals} | of_pruning
    trainer = Trainer(prepared.plain(gm), data, settings, after_step=enforce, run=run)  # trains the tensors of gm
    context(gm).calibrate = make_calibration([trainer.examples.first(EXAMPLES)], prepared.interface)
    with in_float32():
        choosing.plan(gm)  # cannot be reached: an error now
    for part in range(removals):
        start, end = (settings.steps * p // removals for p in (part, part + 1))
        if start >= trainer.step:  # else the checkpoint is of later
            ratio = pruning_ratio * (1 - (1 - (part + 1) / removals) ** 3)
            with in_float32():
                trainer.extra["removed"] = choosing.choose(groups, checked, ratio, trainer.extra.get("removed")).removed
            enforce()
        trainer.run(end)
    removed, cost = trainer.extra["removed"], cost_function(groups, checked.pruning_measure, checked.latency_table)
    context(gm).choices = Choices(pruning=Pruned(removed, (cost(nothing(groups)), cost(removed)), {}, None))
    with in_float32():
        return prepared.result(PassManager([Normalize(), choosing]).run(gm))


def _check_gradual(removals: object, options: dict) -> None:
    """Raise ``OptionError`` for what only makes sense where a network is pruned at once."""
    if not isinstance(removals, int) or isinstance(removals, bool) or removals < 1:
        raise OptionError(f"removals is {removals!r}", stage=STAGE, expected="a whole number >= 1",
                          remedy="20 is the default.")  # fmt: skip
    if "pruning_correction" in options:
        raise OptionError(
            "pruning_correction has no effect: training corrects the statistics", stage=STAGE, remedy="Drop it."
        )
    if options.get("pruning_granularity", "channels") != "channels":
        raise OptionError(f"pruning_granularity is {options['pruning_granularity']!r}", stage=STAGE, expected='"channels"',
                          remedy="Prune at once with fxcompress.prune, then fine_tune: zeros stay zero.")  # fmt: skip
