"""Criteria on a network of known numbers: each is compared with its formula."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fxcompress.analysis.channel_groups import ChannelGroups
from fxcompress.pruning.budgets import choose, default_round_to
from fxcompress.pruning.criteria import CRITERIA
from fxcompress.pruning.evidence import Evidence
from fxcompress.pruning.latency import cost_function
from tests.support.graphs import images, randomize
from tests.support.pruning import float_graph

X = images(8, 6)


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture
def model():
    return randomize(Net(), seed=2)


def scored(model, name, x=X):
    evidence = Evidence(ChannelGroups(float_graph(model, x)), [(x[:4],), (x[4:],)], seed=0)
    scores = CRITERIA[name].score(evidence)
    return scores[list(evidence.groups.groups[0].units)]


def relative(scores):
    return scores.double() / scores.double().mean()


def gradient(model):
    weight = model[0].weight
    (g,) = torch.autograd.grad(model(X).amax(1).sum() / len(X), weight)
    return g


def test_magnitude(model):
    weight = model[0].weight.detach()
    assert torch.allclose(scored(model, "l1"), relative(weight.abs().sum(1)))
    assert torch.allclose(scored(model, "l2"), relative(weight.norm(dim=1)))


def test_random_scores_depend_on_the_seed_alone(model):
    first, again = scored(model, "random"), scored(model, "random")
    assert torch.equal(first, again) and len(first.unique()) == len(first)


def test_the_documentation_lists_the_criteria_there_are():
    text = (Path(__file__).parents[2] / "docs" / "pruning.md").read_text()
    section = text[text.index("## Which go: criteria") : text.index("No criterion needs labels")]
    names = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert names == set(CRITERIA)


def test_outgoing_weights_are_those_that_read(model):
    read = model[2].weight.detach()
    rms = torch.relu(model[0](X)).detach().square().mean(0).sqrt()
    assert torch.allclose(scored(model, "outgoing"), relative(read.norm(dim=0)))
    assert torch.allclose(scored(model, "contribution"), relative(read.norm(dim=0) * rms), atol=1e-6)


def test_outgoing_weights_include_what_batch_norm_makes_of_them():
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)]
    model, x = randomize(nn.Sequential(*layers), seed=1), images(4, 3, 6, 6)
    norm = model[3]
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    taps = (model[2].weight.detach() * scale[:, None, None, None]).reshape(2, 2, 4, 9)
    each = relative(taps.square().sum((1, 3)).sqrt().flatten())
    assert torch.allclose(scored(model, "outgoing", x), each[:4] + each[4:])  # the same position of both groups
    assert torch.allclose(scored(model, "batch_norm", x).nan_to_num(7), torch.full((4,), 7.0, dtype=torch.float64))


def test_gradients(model):
    weight, g = model[0].weight.detach(), gradient(model)
    assert torch.allclose(scored(model, "gradient"), g.norm(dim=1).double(), atol=1e-6)
    assert torch.allclose(scored(model, "weight_gradient"), (g.norm(dim=1) * weight.norm(dim=1)).double(), atol=1e-6)
    assert torch.allclose(scored(model, "taylor"), (g * weight).sum(1).abs().double(), atol=1e-6)


def test_integrated_gradient_begins_with_weight_times_gradient(model):
    """Its first step is mu = 1; the objective is positive, so that the path adds to it."""
    assert bool((scored(model, "integrated") >= scored(model, "weight_gradient") - 1e-9).all())


def test_activation_is_what_the_reader_sees(model):
    hidden = torch.relu(model[0](X)).detach()
    assert torch.allclose(scored(model, "activation"), relative(hidden.square().mean(0).sqrt()), atol=1e-6)


def test_hessian_of_a_linear_network_is_its_jacobian():
    """y = B A x: d(v.y)/dA = B^T v x^T, and E[(B^T v)_n^2] = |B_n|^2 for v = +-1."""
    model = randomize(nn.Sequential(nn.Linear(6, 16, bias=False), nn.Linear(16, 3, bias=False)), seed=2)
    a, b = (layer.weight.detach().double() for layer in model)
    expected = b.square().sum(0) * a.square().sum(1)
    assert torch.corrcoef(torch.stack([scored(model, "hessian"), expected]))[0, 1] > 0.6


@pytest.mark.parametrize("name, factor", [("redundancy", 1.0), ("angular", 3.0)])
def test_of_two_similar_neurons_one_goes_first(model, name, factor):
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[3] = factor * parameter[7] + 1e-4
    first = int(scored(model, name).argmin())
    assert first in (3, 7)
    assert int((scored(model, name) < 1e-2).sum()) == 1  # the other one has to stay


def test_units_of_several_layers_add_up():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x)
            return self.c(x + self.b(torch.relu(x)))

    model = randomize(Stream(), seed=0)
    rows = [relative(layer.weight.detach().norm(dim=1)) for layer in (model.a, model.b)]
    assert torch.allclose(scored(model, "l2"), rows[0] + rows[1])


def test_round_to_defaults_to_full_registers_of_wide_layers():
    assert [default_round_to(n) for n in (3, 16, 32, 64, 128, 1000)] == [1, 2, 4, 8, 16, 16]


def test_importance_takes_less_of_what_matters_more():
    model = randomize(
        nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)), seed=0
    )
    with torch.no_grad():  # outputs depend on the second layer's weights through large hidden values
        model[0].weight *= 50
    groups = ChannelGroups(float_graph(model, X))
    evidence = Evidence(groups, [(X,)])
    scores = CRITERIA["l2"].score(evidence)
    choice = choose(
        evidence, scores, ratio=0.3, budget="importance", cost=cost_function(groups, "macs", None), round_to=1
    )
    removed = [int(choice.removed[list(group.units)].sum()) for group in groups.groups]
    assert removed[0] > 2 * removed[1]
