"""Labels: new, tied, fixed, numbered."""

import torch

from fxcompress.analysis.labels import FIXED, Labels


def test_tied_labels_get_one_number_and_fixed_ones_zero():
    labels = Labels()
    a, b, c = labels.new([3]), labels.new([3]), labels.new([2])
    labels.tied([a, b])
    labels.fix(b[:1], "an output")
    numbers = labels.settle()
    assert numbers[torch.cat([a, b, c])].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert labels.why_fixed(int(a[0])) == "an output"
    assert labels.why_fixed(int(a[1])) is None


def test_what_is_tied_to_something_fixed_is_fixed():
    labels = Labels()
    a = labels.new([2])
    assert labels.tied([a, torch.tensor([FIXED])], "a graph input").tolist() == [FIXED, FIXED]
    assert labels.settle()[a].tolist() == [FIXED, FIXED]
    assert labels.why_fixed(int(a[0])) == "a graph input"


def test_along_ties_the_other_dimensions():
    labels = Labels()
    grid = labels.new([2, 3])
    labels.along(grid, 1)
    numbers = labels.settle()[grid]
    assert torch.equal(numbers[0], numbers[1]) and len(numbers.unique()) == 3


def test_labels_settle_again_after_further_ties():
    labels = Labels()
    a = labels.new([2])
    assert labels.settle()[a].tolist() == [1, 2]
    labels.tied([a[:1], a[1:]])
    assert labels.settle()[a].tolist() == [1, 1]
