"""Products in blocks against products: the same integers for every size, level and extreme."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.bilinear import STRASSEN, WINOGRAD
from fxcompress.reference_bilinear import weight_sums
from tests.support.integer_graphs import codes, int32, ops, weights

ALGORITHMS = {"strassen": STRASSEN, "winograd": WINOGRAD, "mixed": STRASSEN.compose(WINOGRAD)}


def layer(algorithm, x, zero_point, weight, bias, axis=-1):
    sums_a, encode, decode = algorithm.schedules
    sums = weight_sums(weight, sums_a, algorithm.size).to(torch.int16)
    return ops.bilinear_linear(x, zero_point, sums, bias, encode.tensor, decode.tensor, algorithm.size, axis)


@given(
    st.sampled_from(sorted(ALGORITHMS)),
    st.integers(1, 3),
    st.lists(st.integers(1, 21), min_size=3, max_size=3),
    st.booleans(),
)
def test_a_layer_in_blocks_is_the_layer(name, levels, sizes, extreme):
    rows, depth, outputs = sizes
    algorithm = ALGORITHMS[name].levels(levels) if name != "mixed" else ALGORITHMS[name]
    x, weight = codes(rows, depth, lo=255 if extreme else 0), weights(outputs, depth)
    weight = weight.sign() * 127 if extreme else weight
    bias = codes(outputs, lo=-(2**20), hi=2**20, dtype=torch.int32)
    found = layer(algorithm, x, int32(0), weight, bias)
    assert found.dtype == torch.int32 and torch.equal(found, ops.linear(x, weight, bias))


@pytest.mark.parametrize("shape, axis", [((2, 6, 5, 3), 1), ((3, 7, 6), -1), ((6, 3, 2), 0)])
def test_channels_may_lie_along_any_dimension_and_have_zero_points(shape, axis):
    weight, bias, zero_point = weights(5, 6), codes(5, dtype=torch.int32), codes(6, dtype=torch.int32)
    x = codes(*shape)
    centered = (x.movedim(axis, -1).int() - zero_point) @ weight.int().T + bias
    assert torch.equal(layer(WINOGRAD, x, zero_point, weight, bias, axis), centered.movedim(-1, axis))


@given(
    st.sampled_from(["strassen", "winograd"]),
    st.integers(1, 3),
    st.lists(st.integers(1, 13), min_size=3, max_size=3),
    st.booleans(),
)
def test_a_product_of_activations_in_blocks_is_the_product(name, levels, sizes, extreme):
    rows, depth, columns = sizes
    a, b = codes(2, 3, rows, depth, lo=255 if extreme else 0), codes(2, 3, depth, columns, lo=255 if extreme else 0)
    algorithm = ALGORITHMS[name].levels(levels)
    programs = [s.tensor for s in algorithm.schedules]
    found = ops.bilinear_matmul(a, int32(3), b, int32(200), *programs, algorithm.size, algorithm.products)
    assert torch.equal(found, ops.matmul(a, int32(3), b, int32(200)))


def test_a_block_of_results_depends_on_neighboring_rows_only():
    """What is left of a pruned layer does not depend on the batch where a sample has a multiple of p rows."""
    pruned, weight, bias = WINOGRAD.without([4, 6]), weights(4, 6), codes(4, dtype=torch.int32)
    x = codes(3, 6, 2, 2)
    whole = layer(pruned, x, int32(9), weight, bias, 1)
    assert torch.equal(layer(pruned, x[1:2], int32(9), weight, bias, 1), whole[1:2])
    assert not torch.equal(whole, layer(WINOGRAD, x, int32(9), weight, bias, 1))
