from itertools import combinations

import pytest
import torch
from torch.nn.functional import interpolate

from fxcompress.bilinear import STRASSEN, WINOGRAD
from fxcompress.product_gates import close_gates, gram, learn_gates, missing
from fxcompress.reference_bilinear import layer_products, weight_sums


def layer_gram(algorithm, smooth, seed=0):
    """Of a layer of 8 to 8 channels on 8 x 8 pixels, and its products."""
    generator = torch.Generator().manual_seed(seed)
    codes = interpolate(torch.rand(4, 8, 2, 2, generator=generator), (8, 8), mode="bilinear") if smooth else torch.rand(
        4, 8, 8, 8, generator=generator)  # fmt: skip
    weight = torch.randint(-127, 128, (8, 8), generator=generator)
    sums = weight_sums(weight, algorithm.schedules[0], algorithm.size).to(torch.int16)
    x = (255 * codes).to(torch.uint8)
    products = layer_products(
        x, torch.tensor(100, dtype=torch.int32), sums, algorithm.schedules[1].tensor, algorithm.size, 1
    )
    return gram(products, algorithm.c.flatten(0, 1)), products


def closed(gates, count):
    return set(gates.argsort(stable=True)[:count].tolist())


def loss(matrix, gone):
    return missing(matrix, torch.tensor([1.0 if r in gone else 0.0 for r in range(len(matrix))], dtype=torch.float64))


def test_the_gram_matrix_says_what_a_result_misses():
    matrix, products = layer_gram(WINOGRAD, smooth=True)
    decode = WINOGRAD.c.flatten(0, 1)
    for gone in ([], [3], [0, 4, 6]):
        rest = [0 if r in gone else 1 for r in range(7)]
        lost = torch.einsum("yr,rgo->ygo", decode * (1 - torch.tensor(rest)), products.long())
        assert loss(matrix, gone) == pytest.approx(float(lost.double().square().sum()), rel=1e-9, abs=1e-3)


def test_products_that_cancel_are_closed_together():
    """Each is the largest on its own; ranked one by one they would stay."""
    matrix = torch.tensor([[9.0, -9, 0, 0], [-9, 9, 0, 0], [0, 0, 1, 0], [0, 0, 0, 2]])
    assert closed(learn_gates(matrix, 2), 2) == {0, 1} and close_gates(matrix, 2) == [0, 1]
    assert closed(matrix.diag(), 2) == {2, 3}


def test_independent_products_close_in_the_order_of_their_size():
    matrix = torch.diag(torch.tensor([5.0, 1, 4, 2, 3]))
    assert [closed(learn_gates(matrix, n), n) for n in range(1, 4)] == [{1}, {1, 3}, {1, 3, 4}]


@pytest.mark.parametrize("algorithm", [STRASSEN, WINOGRAD], ids=lambda a: a.name)
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_closed_gates_miss_no_more_than_ranked_ones_and_hardly_more_than_the_best(algorithm, smooth, count):
    """Exchanges of pairs may end beside the best of all choices."""
    matrix, _ = layer_gram(algorithm, smooth)
    best = min(loss(matrix, gone) for gone in combinations(range(7), count))
    gone = close_gates(matrix, count)
    assert len(gone) == count and loss(matrix, gone) <= loss(matrix, closed(matrix.diag(), count)) * (1 + 1e-9)
    assert loss(matrix, gone) <= 1.01 * best


def test_gates_do_not_depend_on_the_scale_of_the_layer():
    matrix, _ = layer_gram(WINOGRAD, smooth=True)
    assert torch.allclose(learn_gates(matrix, 2), learn_gates(1e6 * matrix, 2), atol=1e-6)
    assert bool((learn_gates(torch.zeros(3, 3), 1) < 0.5).all())  # a layer that computes nothing needs no product
