"""Fine-tuning and gradual pruning of small networks: what is learned, what is kept, what an interrupt and a mistake cost."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fxcompress
from fxcompress.errors import InputError, ModelError, OptionError
from fxcompress.pruning import fine_tuning, training
from fxcompress.pruning.examples import Examples
from fxcompress.pruning.training import distillation
from tests.support.graphs import Classifier, ConvBnRelu, images, randomize

X = images(96, 3, 8, 8, seed=3)
PRUNING = {"pruning_ratio": 0.4, "round_to": 1}
TRAINING = {"batch_size": 16, "learning_rate": 0.02}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(ConvBnRelu(3, 12), ConvBnRelu(12, 12))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.layers(x).mean((2, 3)))


@pytest.fixture
def model():
    return randomize(Net(), seed=1)


@pytest.fixture
def small(model):
    return fxcompress.prune(model, X[:4], calibration_data=X, **PRUNING)


@torch.no_grad()
def labels(model):
    return model(X).argmax(1)


@torch.no_grad()
def loss(network, model):
    return float(distillation(network(X), model(X)))


def same(one, other):
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_distillation_brings_the_outputs_back_without_labels(model, small):
    tuned = fxcompress.fine_tune(small, X, teacher=model, steps=40, **TRAINING)
    assert loss(tuned, model) < 0.5 * loss(small, model)


def test_labels_are_learned(model, small):
    data = (X, labels(model))
    tuned = fxcompress.fine_tune(small, data, steps=40, **TRAINING)
    with torch.no_grad():
        before, after = (float(nn.functional.cross_entropy(net(X), data[1])) for net in (small, tuned))
    assert after < 0.7 * before


def test_training_inside_autocast_sees_its_own_steps():
    losses, x = [], torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    def recorded(outputs, wanted):
        losses.append(nn.functional.mse_loss(outputs.float(), wanted))
        return losses[-1]

    with torch.autocast("cpu", torch.bfloat16):  # which keeps casts of the weights until it is left
        fxcompress.fine_tune(nn.Linear(4, 4).eval(), (x, x), steps=20, batch_size=32, learning_rate=0.1, loss=recorded)
    assert losses[-1] < 0.5 * losses[0]


def test_with_a_teacher_labels_are_not_looked_at(model, small):
    tuned = [fxcompress.fine_tune(small, data, teacher=model, steps=4, **TRAINING) for data in (X, (X, labels(model)))]
    assert same(*tuned)


def test_neither_student_nor_teacher_is_modified(model, small):
    before = copy.deepcopy(small.state_dict()), copy.deepcopy(model.state_dict())
    code = small.code
    tuned = fxcompress.fine_tune(small, X, teacher=model, steps=3, **TRAINING)
    for state, network in zip(before, (small, model), strict=True):
        assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert small.code == code == tuned.code
    assert not tuned.training
    assert tuned.meta["pruning"] is not None
    assert all(p.grad is None for p in tuned.parameters())


def test_a_module_of_the_users_is_trained_as_well(model):
    student = randomize(Net(), seed=2)
    tuned = fxcompress.fine_tune(student, X, teacher=model, steps=60, **TRAINING)
    assert type(tuned) is Net
    assert loss(tuned, model) < 0.5 * loss(student, model)


@pytest.mark.parametrize("update", [True, False])
def test_statistics_of_batch_norm_follow_or_stay(model, small, update):
    tuned = fxcompress.fine_tune(small, X, teacher=model, steps=3, update_batch_norm=update, **TRAINING)
    for network, trained in (
        (small, tuned),
        (model, fxcompress.fine_tune(model, X, teacher=model, steps=3, update_batch_norm=update)),
    ):
        means = [
            (value, trained.state_dict()[name])
            for name, value in network.state_dict().items()
            if "running_mean" in name
        ]
        assert len(means) == 2
        assert all(torch.equal(*pair) is not update for pair in means)


def test_a_graph_is_trained_as_the_module_it_came_from(model):
    """Nothing pruned: the flat graph and the module take the same steps."""
    graph = fxcompress.prune(model, X[:4], pruning_ratio=0)
    data = (X, (labels(model) + 1) % 4)
    module, flat = (fxcompress.fine_tune(net, data, steps=5, **TRAINING) for net in (model, graph))
    for name, value in flat.state_dict().items():
        assert torch.allclose(value, module.state_dict()[name], atol=1e-4), name


def test_seeds(model, small):
    tuned = [fxcompress.fine_tune(small, X, teacher=model, steps=3, seed=s, **TRAINING) for s in (0, 0, 1)]
    assert same(tuned[0], tuned[1])
    assert not same(tuned[0], tuned[2])


def test_the_users_random_numbers_stay_where_they_are(model, small):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fxcompress.fine_tune(small, X, teacher=model, steps=2, **TRAINING)
    assert torch.equal(torch.rand(3), expected)


class Noisy(Dataset):
    """Random augmentation; the run is interrupted when it has given out ``limit`` samples."""

    def __init__(self, wanted, limit=None):
        self.wanted, self.limit, self.given = wanted, limit, 0

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        self.given += 1
        if self.limit is not None and self.given > self.limit:
            raise KeyboardInterrupt
        return X[i] + 0.1 * torch.randn(X[i].shape), self.wanted[i]


class Named(Dataset):
    """Samples are keyword arguments."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return {"x": X[i]}


def test_samples_may_be_keyword_arguments(model):
    student = randomize(Net(), seed=2)
    tuned = [fxcompress.fine_tune(student, data, teacher=model, steps=2, **TRAINING) for data in (Named(), X)]
    assert same(*tuned)


def fine_tuned(model, data, **settings):
    return fxcompress.fine_tune(fxcompress.prune(model, X[:4], **PRUNING), data, steps=12, **TRAINING, **settings)


def pruned_gradually(model, data, **settings):
    return fxcompress.prune_gradually(model, X[:4], data, steps=12, removals=4, **PRUNING, **TRAINING, **settings)


@pytest.mark.parametrize("run, optimizer", [(fine_tuned, torch.optim.AdamW), (pruned_gradually, training.momentum_sgd)])
def test_an_interrupted_run_goes_on_bit_for_bit(model, tmp_path, monkeypatch, run, optimizer):
    monkeypatch.setattr(training, "SAVE_EVERY", 4)
    wanted, path = labels(model), tmp_path / "run.pt"
    uninterrupted = Noisy(wanted)
    whole = run(model, uninterrupted, optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        run(model, Noisy(wanted, limit=16 * 6 + 70), optimizer=optimizer, checkpoint=path)
    rest = Noisy(wanted)
    assert same(whole, run(model, rest, optimizer=optimizer, checkpoint=path))
    assert rest.given < uninterrupted.given  # the first steps were not repeated
    rest.given = 0
    assert same(whole, run(model, rest, optimizer=optimizer, checkpoint=path))  # done: nothing left to train
    assert rest.given <= 64


def test_gradual_pruning_removes_what_was_asked_for_and_keeps_it_removed(model, monkeypatch):
    seen = []
    enforced = fine_tuning.mask_in_place
    monkeypatch.setattr(
        fine_tuning, "mask_in_place", lambda groups, removed: (seen.append(removed), enforced(groups, removed))
    )
    small = fxcompress.prune_gradually(model, X[:4], X, teacher=model, steps=10, removals=5, **PRUNING, **TRAINING)
    report = small.meta["pruning"]
    assert 0.4 * 0.99 <= 1 - report.macs[1] / report.macs[0] < 0.5
    assert report.difference <= 1e-6
    assert all(bool((later | ~earlier).all()) for earlier, later in pairwise(seen))  # nested
    assert len({int(removed.sum()) for removed in seen}) >= 4
    assert small(X[:1]).shape == (1, 4)
    assert not small.training


def test_one_removal_without_training_is_prune(model):
    gradual = fxcompress.prune_gradually(model, X[:4], X, teacher=model, steps=0, removals=1, **PRUNING)
    assert same(gradual, fxcompress.prune(model, X[:4], pruning_correction=None, **PRUNING))


def test_gradual_pruning_of_skip_connections_with_a_criterion_of_data():
    model = randomize(Classifier(), seed=0)
    before = copy.deepcopy(model.state_dict())
    small = fxcompress.prune_gradually(
        model, X[:4], X, teacher=model, steps=4, removals=2, pruning_criterion="taylor", pruning_ratio=0.2
    )
    assert small.meta["pruning"].criterion == "taylor"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    fxcompress.compile(small, example_inputs=X[:4], calibration_data=X)(X[:4])


def test_every_epoch_has_every_example_in_another_order():
    examples = Examples(torch.arange(12.0)[:, None], 4, seed=0)
    epochs = [torch.cat([examples.batch(3 * epoch + i)[0] for i in range(3)]).flatten() for epoch in range(2)]
    assert not torch.equal(*epochs)
    assert all(torch.equal(epoch.sort().values, torch.arange(12.0)) for epoch in epochs)


def test_distillation_is_zero_at_the_target_only():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert float(distillation(logits, logits + 1)) == pytest.approx(0, abs=1e-6)
    assert float(distillation(logits, -logits)) > 0.1


def test_training_in_bfloat16_keeps_weights_and_loss_in_float32(model, small):
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert distillation(logits, logits / 2) == distillation(logits.float(), (logits / 2).float())
    with torch.autocast("cpu", torch.bfloat16):
        tuned = fxcompress.fine_tune(small, X, teacher=model, steps=40, **TRAINING)
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    assert loss(tuned, model) < 0.5 * loss(small, model)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": -1}, "steps is -1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"loss": "mse"}, "loss is str"),
        ({"teacher": "model"}, "teacher is str"),
        ({"optimizer": lambda parameters: None}, "the optimizer cannot be made"),
        ({"momentum": 0.9}, "momentum"),
    ],
)
def test_settings_that_make_no_sense(small, settings, message):
    with pytest.raises(OptionError, match=message):
        fxcompress.fine_tune(small, (X, X[:, 0, 0, 0].long()), **{"steps": 1, **settings})


@pytest.mark.parametrize(
    "data, message",
    [
        (X, "without labels"),
        ((X, torch.zeros(3).long()), "tensors of 96, 3 examples"),
        (DataLoader(X), r"loader\.dataset"),
        ("images/", "data is str"),
        (X[:1], "1 examples"),
        ((X, torch.full((96,), 7)), "Target 7 is out of bounds"),
        ((X[:, :2], torch.zeros(96).long()), "channels"),
    ],
)
def test_data_that_do_not_fit(small, data, message):
    with pytest.raises(InputError, match=message):
        fxcompress.fine_tune(small, data, steps=1)


def test_models_that_cannot_be_trained(model, small):
    with pytest.raises(ModelError, match="no parameter"):
        fxcompress.fine_tune(small.requires_grad_(False), X, teacher=model, steps=1)
    with pytest.raises(ModelError, match="the teacher is in training mode"):
        fxcompress.fine_tune(small, X, teacher=copy.deepcopy(model).train(), steps=1)
    with pytest.raises(ModelError, match="ExportedProgram"):
        fxcompress.fine_tune(torch.export.export(model, (X[:2],)), X, teacher=model, steps=1)


def test_a_loss_that_is_nan_ends_the_run(model, small):
    with pytest.raises(OptionError, match=r"the loss is nan at step 0.*Lower learning_rate"):
        fxcompress.fine_tune(small, X, teacher=model, steps=1, loss=lambda outputs, wanted: outputs.sum() * torch.nan)


def test_checkpoints_of_another_run_or_of_none(model, small, tmp_path):
    path = tmp_path / "run.pt"
    fxcompress.fine_tune(small, X, teacher=model, steps=2, checkpoint=path, **TRAINING)
    with pytest.raises(OptionError, match="of another run: seed differ"):
        fxcompress.fine_tune(small, X, teacher=model, steps=2, checkpoint=path, seed=1, **TRAINING)
    with pytest.raises(OptionError, match=r"of another run: .*weights"):
        fxcompress.fine_tune(model, X, teacher=model, steps=2, checkpoint=path, **TRAINING)
    path.write_text("no checkpoint")
    with pytest.raises(OptionError, match="cannot be read"):
        fxcompress.fine_tune(small, X, teacher=model, steps=2, checkpoint=path, **TRAINING)
    with pytest.raises(OptionError, match="cannot be written"):
        fxcompress.fine_tune(small, X, teacher=model, steps=1, checkpoint=tmp_path / "none" / "run.pt", **TRAINING)


def test_gradual_pruning_refuses_before_it_trains(model):
    never = Noisy(torch.zeros(96).long(), limit=64)  # enough for the criterion
    with pytest.raises(OptionError, match="can be removed"):
        fxcompress.prune_gradually(model, X[:4], never, steps=10, pruning_ratio=0.99)
    with pytest.raises(OptionError, match="removals is 0"):
        fxcompress.prune_gradually(model, X[:4], X, steps=10, pruning_ratio=0.2, removals=0)
    with pytest.raises(OptionError, match="pruning_correction has no effect"):
        fxcompress.prune_gradually(model, X[:4], X, steps=10, pruning_ratio=0.2, pruning_correction=None)
