"""``prune_products``: leave products, and additions, out of the algorithm that multiplies, instead of weights out of the layers.

    every layer in blocks (``layers``)  ->  a gate on each product and term (``gates``)
    ->  ranked (``criteria``), or learned through the whole network  ->  the lowest are closed  ->  the weights trained again
    ->  written as a graph of ordinary operators without what was closed

Source: Yvinec 2023, section 4.2, equations 4.6 and 4.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from ..bilinear import ALGORITHMS, NAIVE
from ..calibration_data import example_of
from ..errors import CalibrationError, OptionError, nearest
from ..pruning.examples import Examples
from ..pruning.training import Settings, settings_of
from ..torch_modes import in_float32, normal_tensors
from .criteria import CRITERIA, Scores
from .exchange import exchange_products
from .gate_training import learn_gates
from .mean_correction import layer_means
from .network import STAGE, BlockNetwork, Closed
from .report import ProductReport

EXAMPLES, BATCH, MEANS = 64, 4, 256  # examples that criteria look at, and at a time; that means are taken of
STEPS_PER_EXCHANGE = 10  # of training gates: about as long as trying one


@normal_tensors()
def prune_products(
    model: nn.Module,
    example_inputs,
    data=None,
    *,
    removed: float = 0.25,
    additions_removed: float = 0.0,
    algorithm: str = "winograd",
    levels: int = 1,
    criterion: str | ProductReport = "learned",
    shared: bool = False,
    gate_steps: int = 200,
    steps: int = 0,
    ignored_layers: Sequence[str] = (),
    **settings,
) -> fx.GraphModule:
    """Compute layers by a bilinear algorithm from which products of blocks are left out.

    Args:
        model: a module in eval mode. It is not modified.
        example_inputs: one call's inputs.
        data: examples as for ``fine_tune``; only ``criterion="random"`` and "magnitude" do without. With examples, the means of what layers
            give are corrected: their biases take what the closed products gave on average.
        removed: share of the network's multiplications to remove, 0..1. Winograd's algorithm removes 1/8 of a layer's itself; a layer none
            of whose products is left out stays as it is.
        additions_removed: share of the additions in sums of blocks to remove from the layers in blocks, 0..1.
        algorithm, levels: as ``matmul_algorithm`` and ``matmul_levels`` of ``compile``.
        criterion: "learned": gates are trained by gradient through the network, under a penalty that grows until enough of them close;
            then, from these or from the ranking by "weight_gradient", whichever loses less, open and closed ones are exchanged while
            the loss falls; or "gradient", "weight_gradient", "output", "magnitude", "random" (``criteria``), per multiplication. The ``ProductReport``
            of an earlier call closes the same gates again.
        shared: the same products in all layers.
        gate_steps: of training the gates, for "learned"; as many exchanges as a tenth of it.
        steps: of training the weights that are left, afterwards; 0: they stay.
        ignored_layers: names of modules that stay as they are.
        settings: of both trainings, as for ``fine_tune``: ``teacher=model`` to do without labels, ``loss``, ``batch_size``, ... Batch norm is
            folded; ``update_batch_norm`` is about the means of the layers in blocks.

    Returns:
        A ``GraphModule`` that is called like ``model``, with batch norm folded; its parameters can be trained. ``.meta["products"]`` is a
        ``ProductReport``.

    Raises:
        OptionError: settings that make no sense, a share that cannot be reached. CalibrationError: no data.
        InputError, ModelError: as ``fine_tune``.

    >>> small = fxcompress.prune_products(model, x, images, teacher=model, removed=0.3, steps=300)            # doctest: +SKIP
    >>> print(small.meta["products"])                                                                         # doctest: +SKIP
    """
    _check(removed, additions_removed, criterion, algorithm, levels, gate_steps)
    checked = settings_of(steps=steps, **settings)
    if data is None and (steps or not (isinstance(criterion, ProductReport) or criterion in ("random", "magnitude"))):
        raise CalibrationError(f'there are no examples for criterion="{criterion}" and {steps} steps of training', stage=STAGE,
                               remedy='Pass data, or criterion="magnitude" and steps=0.')  # fmt: skip
    network = BlockNetwork(model, example_inputs, ALGORITHMS[algorithm].levels(levels), shared, tuple(ignored_layers))
    if isinstance(criterion, ProductReport):
        closed = network.closed_in(criterion)
    elif criterion == "learned":
        closed = _learned(network, data, removed, additions_removed, gate_steps, checked)
    else:
        scores = _ranked(network, data, criterion, checked, network.trainable(network.layers))
        products = network.close_products([p for p, _ in scores], removed, by_cost=criterion != "random")
        closed = network.close_terms(products, [terms for _, terms in scores], additions_removed)
    examples = [] if data is None else _examples(data, checked, network, MEANS, checked.batch_size)
    network.close_gates(closed, examples)
    if steps:
        network.train(closed, data, checked, examples)
    return network.written(closed, criterion.criterion if isinstance(criterion, ProductReport) else criterion)


@in_float32()
def _ranked(network: BlockNetwork, data, criterion: str, settings: Settings, trainable: nn.Module) -> Scores:
    examples = [] if data is None else _examples(data, settings, network, EXAMPLES, BATCH)
    return CRITERIA[criterion](network.layers, trainable, examples, torch.Generator().manual_seed(settings.seed))


def _learned(
    network: BlockNetwork, data, removed: float, additions: float, gate_steps: int, settings: Settings
) -> Closed:
    """Learned or ranked, whichever gives the smaller loss, after exchanges of products."""
    trainable, settings = network.trainable(network.layers), replace(settings, checkpoint=None)
    ranking = _ranked(network, data, "weight_gradient", settings, trainable)
    whole = layer_means(trainable, network.layers, _examples(data, settings, network, MEANS, settings.batch_size))
    learn_gates(trainable, network.gates, network.savings, data, replace(settings, steps=gate_steps), network.open_share(removed),
                1 - additions)  # fmt: skip
    learned = [
        tuple(g.detach().double() for g in (layer.gates.products, layer.gates.terms)) for layer in network.layers
    ]
    starts = [
        network.close_products([products for products, _ in learned], removed, by_cost=False),
        network.close_products([products for products, _ in ranking], removed, by_cost=True),
    ]
    closed = exchange_products(network, trainable, starts, [p for p, _ in ranking], whole, removed, data, settings,
                               max(1, gate_steps // STEPS_PER_EXCHANGE))  # fmt: skip
    return network.close_terms(closed, [terms for _, terms in learned], additions)


def _examples(data, settings: Settings, network: BlockNetwork, count: int, at_a_time: int) -> list:
    """Calls of the network on the first examples."""
    examples, model = Examples(data, settings.batch_size, settings.seed), network.prepared.plain(network.gm)
    parts = torch.arange(min(count, examples.count)).split(at_a_time)
    return [example_of(batch if len(batch) > 1 else batch[0], model) for batch in map(examples.at, parts)]


def _check(removed, additions_removed, criterion: str, algorithm: str, levels: int, gate_steps: int) -> None:
    for name, value in (("removed", removed), ("additions_removed", additions_removed)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
            raise OptionError(
                f"{name} is {value!r}", stage=STAGE, expected="a number with 0 <= share < 1", remedy="0.3 removes 30 %."
            )
    for name, value, known in (("criterion", criterion, ("learned", *CRITERIA)),
                               ("algorithm", algorithm, [a for a in ALGORITHMS if a != NAIVE.name])):  # fmt: skip
        if not isinstance(value, ProductReport) and value not in known:
            raise OptionError(f"unknown {name} {value!r}", stage=STAGE, remedy=nearest(str(value), known))
    for name, value in (("levels", levels), ("gate_steps", gate_steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"{name} is {value!r}", stage=STAGE, expected="a whole number >= 1")
    if any(abs(int(v)) > 1 for t in (ALGORITHMS[algorithm].b, ALGORITHMS[algorithm].c) for v in t.flatten()):
        raise OptionError(
            f"the algorithm {algorithm!r} has coefficients beyond 1 and -1", stage=STAGE, remedy='Choose "winograd".'
        )
