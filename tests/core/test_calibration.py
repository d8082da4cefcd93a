"""Calibration data in every form users have them in, and what the messages say about the others."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxcompress.calibration import CHUNK, EXAMPLES, first_batch, make_calibration
from fxcompress.capture import capture
from fxcompress.errors import CalibrationError, InputError
from tests.support.graphs import TwoInputs, randomize


class Scale(nn.Module):
    """(N, 3) to (N, 3), with an optional second argument."""

    def forward(self, x, gain=None):
        return x * 2 if gain is None else x * gain


class TakesPair(nn.Module):
    def forward(self, pair):
        return pair[0] + pair[1]


class Recorder(nn.Module):
    """Stands for the observing graph: takes flat inputs."""

    def __init__(self, result=None):
        super().__init__()
        self.seen, self.result = [], result

    def forward(self, *inputs):
        self.seen.append(inputs)
        return (self.result,)


def interface(model, *args, **kwargs):
    return capture(model.eval(), args, kwargs).interface


@pytest.fixture(scope="module")
def one():
    return interface(Scale(), torch.zeros(2, 3))


@pytest.fixture(scope="module")
def two():
    return interface(randomize(TwoInputs(4)), torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, 8, 8))


@pytest.fixture(scope="module")
def pair():
    return interface(TakesPair(), (torch.zeros(2, 3), torch.zeros(2, 3)))


def batches(data, interface):
    recorder = Recorder()
    make_calibration(data, interface)(recorder)
    return recorder.seen


def x(n=4, seed=0):
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed))


def left_right(n=2):
    return torch.rand(n, 3, 8, 8), torch.rand(n, 2, 8, 8)


# --------------------------------------------------------------------------------------------------------- what works


def test_a_tensor_is_split_in_chunks(one):
    data = x(2 * CHUNK + 5)
    seen = batches(data, one)
    assert [len(b[0]) for b in seen] == [CHUNK, CHUNK, 5]
    assert torch.equal(torch.cat([b[0] for b in seen]), data)


@pytest.mark.parametrize(
    "form",
    [
        lambda a, b: [a, b],
        lambda a, b: (a, b),
        lambda a, b: [(a,), (b,)],
        lambda a, b: [(a, torch.zeros(4)), [b, torch.ones(4)]],
        lambda a, b: [(a, [0, 1, 2, 3]), (b, {"box": torch.zeros(4, 4)})],
        lambda a, b: [{"x": a}, {"x": b}],
        lambda a, b: [({"x": a}, torch.zeros(4)), ({"x": b}, 7)],
        lambda a, b: (batch for batch in (a, b)),
        lambda a, b: iter([(a, 0), (b, 0)]),
        lambda a, b: DataLoader(TensorDataset(torch.cat([a, b]), torch.zeros(8)), batch_size=4),
        lambda a, b: lambda model: (model(a), model(x=b)),
    ],
)
def test_forms_of_a_one_input_model(one, form):
    a, b = x(), x(seed=1)
    seen = batches(form(a, b), one)
    assert len(seen) == 2 and torch.equal(seen[0][0], a) and torch.equal(seen[1][0], b)
    assert all(len(inputs) == 1 for inputs in seen)


@pytest.mark.parametrize(
    "form",
    [
        lambda a, b: [(a, b)],
        lambda a, b: [[a, b]],
        lambda a, b: [(a, b, torch.zeros(2))],
        lambda a, b: [((a, b), torch.zeros(2))],
        lambda a, b: [{"right": b, "left": a}],
        lambda a, b: {"left": a, "right": b},
        lambda a, b: [({"left": a, "right": b}, torch.zeros(2))],
        lambda a, b: lambda model: model(a, right=b),
    ],
)
def test_forms_of_a_two_input_model(two, form):
    a, b = left_right()
    ((left, right),) = batches(form(a, b), two)
    assert torch.equal(left, a) and torch.equal(right, b)


def test_a_model_that_takes_one_nested_argument(pair):
    a, b = x(), x(seed=1)
    for data in ([(a, b)], [((a, b),)], [((a, b), torch.zeros(4))]):
        ((first, second),) = batches(data, pair)
        assert torch.equal(first, a) and torch.equal(second, b)


def test_a_generator_is_read_once_and_serves_every_pass(one):
    reads = []

    def data():
        for i in range(3):
            reads.append(i)
            yield x(seed=i)

    calibrate = make_calibration(data(), one)
    assert reads == []
    for _ in range(2):
        recorder = Recorder()
        calibrate(recorder)
        assert len(recorder.seen) == 3
    assert reads == [0, 1, 2]


def test_a_callable_sees_the_users_call_and_result(one):
    results = []
    recorder = Recorder(result=torch.ones(4, 3))
    make_calibration(lambda model: results.append(model(x())), one)(recorder)
    assert torch.equal(results[0], torch.ones(4, 3)) and len(recorder.seen) == 1


def test_half_precision_becomes_float32(one):
    assert batches([x().half()], one)[0][0].dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ what does not


@pytest.mark.parametrize("data", [[], (), iter(()), torch.zeros(0, 3), DataLoader(TensorDataset(torch.zeros(0, 3)))])
def test_empty_data(one, data):
    with pytest.raises(CalibrationError, match="calibration_data is empty"):
        batches(data, one)


def test_an_empty_batch(one):
    with pytest.raises(CalibrationError, match="batch 1 holds no values"):
        batches([x(), torch.zeros(0, 3)], one)


@pytest.mark.parametrize("data", [7, "images", b"images", 1.5])
def test_data_of_another_kind(one, data):
    with pytest.raises(
        CalibrationError, match=r"calibration_data is (int|str|bytes|float); expected a tensor, an iterable"
    ):
        make_calibration(data, one)


def test_a_wrong_shape_names_batch_argument_and_shape(one):
    with pytest.raises(CalibrationError) as error:
        batches([x(), (torch.zeros(4, 5), torch.zeros(4))], one)
    message = str(error.value)
    assert "batch 1 (a tuple of (4, 5), (4,))" in message and "argument x has shape (4, 5)" in message
    assert "expected x (batch, 3)" in message and isinstance(error.value.__cause__, InputError)


def test_one_tensor_for_a_two_input_model(two):
    with pytest.raises(CalibrationError, match=r"inputs left, right.*\[\(left, right\), ...\]"):
        make_calibration(torch.zeros(4, 3, 8, 8), two)


def test_examples_without_batch_dimension(one):
    with pytest.raises(CalibrationError, match="has 1 dimensions"):
        batches([torch.zeros(3)], one)


@pytest.mark.parametrize("batch", [(), {}, [[]], "image"])
def test_a_batch_without_tensors(one, batch):
    with pytest.raises(CalibrationError, match="batch 0"):
        batches([batch], one)


def test_integers_for_a_float_input(one):
    with pytest.raises(CalibrationError, match=r"uint8.*x\.float\(\)"):
        batches([torch.zeros(4, 3, dtype=torch.uint8)], one)


def test_a_callable_that_never_calls(one):
    with pytest.raises(CalibrationError, match="never called the model"):
        batches(lambda model: None, one)


def test_a_callable_with_a_wrong_call(one):
    with pytest.raises(CalibrationError, match="call 1 of the model by calibration_data: argument x has shape"):
        batches(lambda model: model(torch.zeros(2, 9)), one)


def test_a_failing_model_names_the_batch(one):
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no kernel\ndetails")

    with pytest.raises(CalibrationError, match=r"failed on calibration batch 0 of shape \(4, 3\): no kernel\. "):
        make_calibration([x()], one)(Broken())


def test_errors_of_ours_pass_unchanged(one):
    class Refusing(nn.Module):
        def forward(self, x):
            raise CalibrationError("not finite")

    with pytest.raises(CalibrationError, match=r"^not finite"):
        make_calibration([x()], one)(Refusing())


# ---------------------------------------------------------------------------------------------------------- first batch


@pytest.mark.parametrize(
    "data",
    [x(9), [x(9)], [(x(9),)], [(x(9), torch.zeros(9))], [(x(9), torch.zeros(9, dtype=torch.long)), 0], [[x(9), 5]]],
)
def test_a_few_examples_serve_as_example_call(data):
    example, again = first_batch(data, Scale())
    assert len(example) == 1 and torch.equal(example[0], x(9)[:EXAMPLES])
    assert again is data


def test_first_batch_of_a_generator_is_not_lost(one):
    example, data = first_batch((batch for batch in (x(), x(seed=1))), Scale())
    assert torch.equal(example[0], x())
    assert len(batches(data, one)) == 2


def test_first_batch_of_two_inputs_and_of_keywords():
    model, (a, b) = TwoInputs(), left_right(9)
    for data in ([(a, b)], [(a, b, torch.zeros(9))], [((a, b), torch.zeros(9))]):
        left, right = first_batch(data, model)[0]
        assert torch.equal(left, a[:EXAMPLES]) and torch.equal(right, b[:EXAMPLES])
    for data in ([{"left": a, "right": b}], {"left": a, "right": b}, [({"left": a, "right": b}, torch.zeros(9))]):
        assert set(first_batch(data, model)[0]) == {"left", "right"}


def test_a_model_that_takes_one_dict():
    class TakesDict(nn.Module):
        def forward(self, features):
            return features["a"] + features["b"]

    example, _ = first_batch([({"a": x(), "b": x()}, torch.zeros(4))], TakesDict())
    assert set(example[0]) == {"a", "b"}
    kept = interface(TakesDict(), *example)
    assert len(batches([{"a": x(), "b": x()}], kept)[0]) == 2


def test_first_batch_of_an_exported_program_counts_its_inputs():
    program = torch.export.export(TwoInputs().eval(), left_right())
    assert len(first_batch([left_right()], program)[0]) == 2


def test_tensors_that_are_not_batched_stay_whole():
    other = torch.zeros(EXAMPLES, 7)
    images, kept = first_batch([(torch.zeros(9, 3), other)], TwoInputs())[0]
    assert len(images) == EXAMPLES + 1  # else both would look batched
    assert kept.shape == other.shape


def test_a_callable_has_no_first_batch():
    function = print
    assert first_batch(function, Scale()) == (None, function)


@pytest.mark.parametrize("data, message", [([], "empty"), (iter(()), "empty"), (3, "calibration_data is int")])
def test_first_batch_of_nothing(data, message):
    with pytest.raises(CalibrationError, match=message):
        first_batch(data, Scale())
