"""Every mistake gives the error that teaches, word for word, and before any work where it can be known before."""

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import errors
from tests.errors.mistakes import MISTAKES, raised
from tests.errors.models import X, net


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.title)
def test_the_whole_message(mistake):
    error = raised(mistake)
    assert type(error) in (mistake.error, *mistake.error.__subclasses__()), error
    assert mistake.pattern().fullmatch(str(error)), str(error)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.title)
def test_the_five_fields(mistake):
    """Who noticed, what was found, and for a user's mistake what to do about it."""
    error = raised(mistake)
    assert error.stage and error.found and str(error).startswith(error.stage)
    assert error.remedy or isinstance(error, errors.InternalError)


def test_titles_are_unique():
    assert len({mistake.title for mistake in MISTAKES}) == len(MISTAKES)


@pytest.fixture
def no_export(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the model was exported before the mistake was found")

    monkeypatch.setattr(torch.export, "export", refuse)


@pytest.mark.parametrize(
    "options",
    [
        {"example_inputs": X * float("nan")},
        {"example_inputs": torch.zeros(2, 3, 8, 8)},
        {"example_inputs": X + 50, "input_range": (0, 1)},
        {"example_inputs": (X, X)},
        {"example_inputs": X, "calibration_data": [X, X / 0]},
        {"example_inputs": X, "calibration_data": []},
        {"example_inputs": X, "keep_float": ["haed"]},
        {"example_inputs": X, "debug": __file__},
        {"example_inputs": X, "target": "w9a9"},
        {"example_inputs": X, "passes": []},
        {"example_inputs": X, "backend": "none"},
        {"example_inputs": X, "input_range": [(0, 1), (0, 1)]},
        {"example_inputs": X, "input_normalization": (0.5, 0.0)},
    ],
    ids=lambda options: list(options)[-1],
)
def test_mistakes_in_the_arguments_are_found_before_the_export(no_export, options):
    with pytest.raises(errors.UserError):
        fxcompress.compile(net(), **options)


def test_a_wrong_model_is_refused_without_an_example(no_export):
    for model in (net().train(), nn.DataParallel(net()).eval(), net().to("meta"), None):
        with pytest.raises(errors.ModelError):
            fxcompress.compile(model)


# --------------------------------------------------------------------------------------------------- what is no mistake


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_taken_as_float32(dtype):
    model = net().to(dtype)
    x = X.to(dtype)
    same = fxcompress.compile(model.float(), example_inputs=x.float())
    assert torch.equal(fxcompress.compile(net().to(dtype), example_inputs=x)(x), same(x.float()))


def test_hooks_of_a_module_are_part_of_the_model():
    model = net()
    model.head.register_forward_hook(lambda module, inputs, output: output * 2)
    compiled = fxcompress.compile(model, example_inputs=X, calibration_data=[X])
    with torch.no_grad():
        expected = model(X)
    assert float((compiled(X) - expected).norm() / expected.norm()) < 0.05


def test_a_computed_weight_is_copied_as_a_value():
    """``torch.nn.utils.weight_norm`` leaves a tensor with a history on the module, which deepcopy refuses."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    model.eval()(X)
    compiled = fxcompress.compile(model, example_inputs=X, calibration_data=[X])
    expected = model(X).detach()
    assert float((compiled(X) - expected).norm() / expected.norm()) < 0.05


def test_a_shared_module_may_be_kept_in_float_by_any_of_its_names():
    model = nn.ModuleDict({"first": nn.Linear(4, 4)})
    model["second"] = model["first"]
    fxcompress.model_checks.check_names(model, ["first", "second"])


def test_labels_may_be_anything():
    labels = torch.full((4,), float("nan"))
    fxcompress.compile(net(), calibration_data=[(X, labels), (X, labels)])
