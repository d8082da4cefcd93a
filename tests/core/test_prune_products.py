"""fxcompress.prune_products: layers in blocks without some of their products."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.bilinear import ALGORITHMS, WINOGRAD
from fxcompress.dialects import ADD, CONVOLUTIONS, LINEAR, SUB
from fxcompress.errors import CalibrationError, OptionError
from fxcompress.graph import calls, constant, copy_graph_module, one_sample_shape
from fxcompress.products.exchange import exchange_products
from fxcompress.products.gates import GatedLayer, Gates, decode_terms, encode_terms
from fxcompress.products.layers import BlockLayer, refusal
from fxcompress.products.mean_correction import layer_means
from fxcompress.products.network import BlockNetwork
from fxcompress.pruning.training import distillation, settings_of
from fxcompress.shapes import propagate
from tests.support.graphs import randomize
from tests.support.pruning import float_graph

LAYERS = {
    "linear on rows": (lambda: nn.Linear(12, 8), (3, 4, 12)),
    "linear on rows of rows": (lambda: nn.Linear(12, 8), (3, 2, 6, 12)),
    "conv 3x3": (lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 5, 8)),
    "conv 3x3, stride 2": (lambda: nn.Conv2d(4, 8, 3, 2, 1), (2, 4, 8, 16)),
    "conv 3x5, unpadded, no bias": (lambda: nn.Conv2d(8, 4, (3, 5), bias=False), (2, 8, 6, 12)),
    "conv 1x1, stride (1, 2)": (lambda: nn.Conv2d(4, 4, 1, (1, 2)), (1, 4, 3, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1), (2, 4, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 4, 3, padding=1), (1, 4, 3, 4, 8)),
}  # fmt: skip


class Small(nn.Module):
    """Convolutions with batch norm, one of them strided, and a head on vectors."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                                  nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.body(self.first(x)))


def small(seed=0):
    torch.manual_seed(seed)
    return randomize(Small()).eval()


def inputs(count=8, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- layers in blocks


def block_of(name, algorithm, levels=1):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    gm = float_graph(make(), x := torch.randn(shape))
    (node,) = calls(gm, *CONVOLUTIONS, LINEAR)
    exact = ALGORITHMS[algorithm].levels(levels)
    assert refusal(gm, node, exact) is None
    return gm, BlockLayer(gm, node, exact), x


def written(gm, block, algorithm, sums):
    gm = copy_graph_module(gm)
    block.write(next(n for n in gm.graph.nodes if n.name == block.node.name), algorithm, sums, block.bias)
    gm.graph.lint()
    return gm


CASES = [(name, algorithm, 1) for name in LAYERS for algorithm in ("winograd", "strassen")]
CASES += [("linear on rows", "winograd", 2), ("conv 3x3", "strassen", 2)]


@pytest.mark.parametrize("name, algorithm, levels", CASES)
def test_a_layer_in_blocks_is_the_layer_in_either_form(name, algorithm, levels):
    gm, block, x = block_of(name, algorithm, levels)
    exact = block.algorithm
    with torch.no_grad():
        expected = fx.Interpreter(gm).run(x)[0]
        explicit = fx.Interpreter(written(gm, block, exact, block.sums)).run(x)[0]
        wide = block.apply(x, block.sums, block.bias, exact.b.float(), exact.c.float())
    assert torch.allclose(explicit, expected, atol=1e-5) and torch.allclose(wide, expected, atol=1e-5)


@pytest.mark.parametrize("products, terms", [((3,), ()), ((0, 4), (0, 7)), ((1, 2, 3, 4, 5, 6), ()), ((), (1, 12, 20))])
@pytest.mark.parametrize("name", ["linear on rows", "conv 3x3, stride 2"])
def test_closed_gates_are_what_is_not_written(name, products, terms):
    gm, block, x = block_of(name, "winograd")
    layer = GatedLayer(block, gates := Gates(WINOGRAD))
    algorithm, kept = gates.remaining(products, terms)
    with torch.no_grad():
        gates.products[list(products)] = 0
        gates.terms[list(terms)] = 0
        pruned = written(gm, block, algorithm, block.sums[kept])
        assert torch.allclose(fx.Interpreter(pruned).run(x)[0], layer(x), atol=1e-5)
    layers = list(calls(pruned, *CONVOLUTIONS, LINEAR))
    assert len(layers) == algorithm.products <= 7 - len(products)
    cost = block.cost(algorithm)
    macs = sum(
        constant(pruned, n.args[1]).numel() * elements(n) // constant(pruned, n.args[1]).shape[0]
        for n in shaped(pruned, layers)
    )
    assert cost.multiplications == macs


def shaped(gm, nodes):
    propagate(gm)
    return nodes


def elements(node):
    return int(torch.tensor(one_sample_shape(node)).prod())


def test_additions_are_those_in_the_graph():
    gm, block, _ = block_of("conv 3x3", "winograd")
    for products, terms in (((), ()), ((4,), ()), ((), (0, 5, 13))):
        algorithm, kept = Gates(WINOGRAD).remaining(products, terms)
        pruned = written(gm, block, algorithm, block.sums[kept])
        assert block.cost(algorithm).additions == sum(
            elements(n) for n in shaped(pruned, list(calls(pruned, ADD, SUB)))
        )


def test_terms_with_gates_are_those_of_equation_4_7_that_cost_an_addition():
    """Operands of sums of X: 4 + 2 + 2 + 3; results: 32 - 22 = 10 as printed, where C12, C21 and C22 share P1 + P6."""
    assert len(encode_terms(WINOGRAD.b)) == 11
    assert len(decode_terms(WINOGRAD.c)) == 11
    assert (1, 0, 3) not in decode_terms(WINOGRAD.c)  # C21 alone reads P4


def test_a_term_without_its_partner_costs_no_addition():
    whole, _ = Gates(WINOGRAD).remaining(())
    assert (whole.products, whole.additions.b, whole.additions.c) == (7, 4, 7)
    first = Gates(WINOGRAD).encode
    of_p5 = [t for t, (r, _, _) in enumerate(first) if r == 4]
    assert Gates(WINOGRAD).remaining((), of_p5[:1])[0].products == 7
    assert Gates(WINOGRAD).remaining((), of_p5)[0].products == 6  # both closed: nothing is left to multiply


# ------------------------------------------------------------------------------------------------------- whole networks


@pytest.mark.parametrize("criterion", ["learned", "weight_gradient", "gradient", "output", "magnitude", "random"])
@pytest.mark.parametrize("shared", [False, True])
def test_multiplications_are_removed_by_every_criterion(criterion, shared):
    model, x = small(), inputs()
    pruned = fxcompress.prune_products(
        model, x, x, teacher=model, removed=0.3, criterion=criterion, shared=shared, gate_steps=6
    )
    report = pruned.meta["products"]
    assert 0.3 <= report.removed < 0.5 and report.shared == shared and len(report.layers) == 2
    before = 8 * 8 * 9 * 3 * 8 + 8 * 8 * 9 * 8 * 8 + 4 * 4 * 9 * 8 * 16 + 160
    assert report.multiplications[0] == before
    of_graph = sum(constant(gm, n.args[1]).numel() * elements(n) // constant(gm, n.args[1]).shape[0]
                   for gm in [float_graph(pruned, x)] for n in calls(gm, *CONVOLUTIONS, LINEAR))  # fmt: skip
    assert report.multiplications[1] == of_graph
    assert pruned(x).shape == (8, 10) and (not shared or report.layers[0]["closed"] == report.layers[1]["closed"])
    assert "first" in report.refusals[0] or "3 inputs" in report.refusals[0]
    assert "multiplications" in str(report) and report.to_dict()["criterion"] == criterion


def test_the_model_stays_as_it_was_and_the_same_call_gives_the_same_network():
    model, x = small(), inputs()
    before = copy.deepcopy(model.state_dict())
    first, second = (
        fxcompress.prune_products(model, x, x, teacher=model, steps=3, gate_steps=4, batch_size=4) for _ in range(2)
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(first(x), second(x)) and not torch.equal(first(x), model(x))


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("criterion", ["learned", "weight_gradient", "output"])
def test_what_cannot_matter_is_found(criterion):
    """Where neighboring rows are equal, products 4 and 5, of differences of neighbors, are 0."""
    torch.manual_seed(0)
    model, x = Rows().eval(), torch.randn(32, 3, 12).repeat_interleave(2, 1)
    pruned = fxcompress.prune_products(
        model, x[:2], x, teacher=model, loss=F.mse_loss, removed=0.37, criterion=criterion, gate_steps=60
    )
    assert [row["closed"] for row in pruned.meta["products"].layers] == [[4, 5], [4, 5]]
    assert pruned.meta["products"].difference < 1e-5


def test_training_the_rest_makes_up_for_it_with_teacher_and_with_labels():
    model, x = small(), inputs(64)
    labels = model(x).detach().argmax(1)

    def loss(network):
        with torch.no_grad():
            return float(F.mse_loss(network(x), model(x)))

    arguments = {"removed": 0.35, "batch_size": 32, "learning_rate": 3e-3, "optimizer": torch.optim.Adam}
    cut = fxcompress.prune_products(model, x[:2], x, criterion="output", **arguments)
    trained = fxcompress.prune_products(
        model, x[:2], x, criterion=cut.meta["products"], steps=40, teacher=model, **arguments
    )
    assert [r["closed"] for r in trained.meta["products"].layers] == [r["closed"] for r in cut.meta["products"].layers]
    assert loss(trained) < loss(cut) / 2
    with_labels = fxcompress.prune_products(
        model, x[:2], (x, labels), criterion="learned", gate_steps=10, steps=60, **arguments
    )
    with torch.no_grad():
        assert F.cross_entropy(with_labels(x), labels) < F.cross_entropy(cut(x), labels) / 2


@pytest.mark.parametrize("name", ["conv 3x3", "linear on rows"])
def test_means_of_layers_are_corrected_without_training(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()).eval(), torch.randn(64, *shape[1:]) + 0.5
    without, corrected = (
        fxcompress.prune_products(model, x[:2], data, criterion="magnitude", removed=0.3) for data in (None, x)
    )
    axis = -1 if name.startswith("linear") else 1
    wanted, missing, found = (network(x).movedim(axis, 0).flatten(1).mean(1) for network in (model, without, corrected))
    assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(missing, wanted, atol=1e-2)


def test_all_weights_are_trained_after_gates_were_learned():
    model, x = small(), inputs(16)
    arguments = {"teacher": model, "removed": 0.35, "gate_steps": 4, "batch_size": 8}
    cut, trained = (
        dict(fxcompress.prune_products(model, x[:2], x, steps=steps, **arguments).named_parameters())
        for steps in (0, 2)
    )
    assert cut.keys() == trained.keys() and not any(torch.equal(cut[name], trained[name]) for name in cut)


def test_a_layer_that_keeps_its_products_is_trained_as_it_is():
    model, x = small(), inputs(16)
    pruned = fxcompress.prune_products(model, x[:2], x, teacher=model, removed=0.05, criterion="output", steps=2)
    kept = [row["name"] for row in pruned.meta["products"].layers if not row["closed"]]
    assert kept and len(list(calls(pruned, *CONVOLUTIONS))) < 7 + 2


def test_additions_are_removed_too():
    model, x = small(), inputs()
    for criterion in ("learned", "weight_gradient", "magnitude"):
        whole, fewer = (fxcompress.prune_products(model, x, x, teacher=model, criterion=criterion, gate_steps=6, removed=0.3,
                                                  additions_removed=share).meta["products"] for share in (0.0, 0.5))  # fmt: skip
        assert whole.additions[0] == whole.additions[1]
        assert fewer.additions[1] <= fewer.additions[0] / 2 and any(row["terms"] for row in fewer.layers)


def test_the_result_can_be_fine_tuned_and_compiled():
    model, x = small(), inputs(32)
    pruned = fxcompress.prune_products(model, x[:2], criterion="magnitude", removed=0.3)
    tuned = fxcompress.fine_tune(pruned, x, teacher=model, steps=2, batch_size=16)
    net = fxcompress.compile(tuned, example_inputs=x[:2], calibration_data=x)
    assert net.verify_integer_only().integer_only
    error = (net(x) - tuned(x)).abs().max() / tuned(x).abs().max()
    assert error < 0.1
    native = fxcompress.compile(tuned, example_inputs=x[:2], calibration_data=x, backend="native")
    assert torch.equal(native(x), net(x)) and torch.equal(native(x[:1]), net(x)[:1])


def test_refused_layers_say_why():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2)
            self.c, self.d = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 4, 1)
            self.e, self.f = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.f(self.e(self.d(self.c(self.b(self.a(x))))))

    x = torch.randn(2, 4, 12, 13)
    report = fxcompress.prune_products(Odd().eval(), x, criterion="magnitude", removed=0.1).meta["products"]
    reasons = "; ".join(report.refusals)
    for reason in (
        "it has groups",
        "it is dilated",
        "7 pixels wide, no multiple of 2",
        "it is a transposed convolution",
    ):
        assert reason in reasons
    assert [row["name"] for row in report.layers] == ["f"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"removed": 1.5}, "removed is 1.5; expected a number with 0 <= share < 1"),
        ({"removed": 0.9}, "removed is 0.9, and cannot be reached with 2 layers in blocks"),
        ({"criterion": "magnitud"}, "unknown criterion 'magnitud'. Did you mean 'magnitude'"),
        ({"algorithm": "naive"}, "unknown algorithm 'naive'"),
        ({"gate_steps": 0}, "gate_steps is 0; expected a whole number >= 1"),
        ({"levels": 0}, "levels is 0; expected a whole number >= 1"),
        ({"additions_removed": "half"}, "additions_removed is 'half'"),
        ({"batch": 3}, "unexpected keyword argument 'batch'"),
        ({"ignored_layers": ["body", "first"]}, "no layer can be computed in blocks"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(OptionError, match=message):
        fxcompress.prune_products(small(), inputs(), **{"criterion": "magnitude"} | arguments)


def test_without_data_nothing_is_learned():
    with pytest.raises(CalibrationError, match='there are no examples for criterion="learned"'):
        fxcompress.prune_products(small(), inputs())


def test_a_report_of_another_network_is_refused():
    x = inputs()
    report = fxcompress.prune_products(small(), x, criterion="magnitude").meta["products"]
    with pytest.raises(OptionError, match="the report is of another network, algorithm or sharing"):
        fxcompress.prune_products(small(), x, criterion=report, algorithm="strassen")


def test_the_open_share_leaves_what_was_asked_for():
    network = BlockNetwork(small(), inputs(), WINOGRAD, False, ())
    whole = sum(block.cost(WINOGRAD).multiplications for block in network.blocks)
    plain = sum(block.plain_cost.multiplications for block in network.blocks)
    assert network.open_share(0.3) * whole == pytest.approx(plain - 0.3 * network.multiplications)


def test_a_layer_gives_its_first_product_more_easily():
    """Without it, it has 6 of 8 multiplications instead of 8; without the second, 5 instead of 6."""
    network = BlockNetwork(small(), inputs(), WINOGRAD, False, ())
    scores = [
        torch.tensor([1.0, 1.5, 9, 9, 9, 9, 9]),
        torch.tensor([0.8, 9, 9, 9, 9, 9, 9]),
    ]  # the second is half as large
    two = (network.saved([{0}, {0}]) - 1) / network.multiplications
    assert network.close_products(scores, two, by_cost=True) == [{0}, {0}]
    assert network.close_products(scores, two, by_cost=False) == [{0}, {0}]
    assert network.close_products([torch.arange(7.0), torch.arange(7.0) + 0.5], two, by_cost=False) == [{0}, {0}]
    with pytest.raises(OptionError, match=r"removed is 0\.99, and cannot be reached with 2 layers"):
        network.close_products(scores, 0.99, by_cost=True)


@pytest.mark.parametrize("shared", [False, True])
def test_exchanges_lower_the_loss_and_keep_what_is_removed(shared):
    model, x = small(), inputs(16)
    network = BlockNetwork(model, x[:2], WINOGRAD, shared, ())
    trainable = network.trainable(network.layers)
    settings = settings_of(steps=0, teacher=model, batch_size=8, update_batch_norm=False)
    ranking = [torch.arange(7.0)] * 2
    start = network.close_products(ranking, 0.3, by_cost=True)
    means = layer_means(trainable, network.layers, [(x,)])
    found = exchange_products(network, trainable, [start], ranking, means, 0.3, x, settings, 5)
    assert found != start and network.saved(found) >= 0.3 * network.multiplications
    assert not shared or found[0] == found[1]

    def loss(closed):
        for layer, products in zip(network.layers, closed, strict=True):
            with torch.no_grad():
                layer.gates.products.copy_(torch.tensor([float(r not in products) for r in range(7)]))
        return float(distillation(trainable(x).detach(), model(x).detach()))

    assert loss(found) < loss(start)
