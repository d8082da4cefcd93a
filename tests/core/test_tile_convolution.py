import pytest
import sympy
import torch

from fxcompress.errors import OptionError
from fxcompress.numerics import shift_right_half_up
from fxcompress.tile_convolution import (
    CONV_ALGORITHMS,
    F2,
    F4,
    ConvolutionAlgorithm,
    cook_toom,
    exact_division,
    register_conv_algorithm,
)

F6 = cook_toom("six", 6, (0, 1, -1, 2, -2, 3, -3))
OTHERS = (cook_toom("three", 3, (0, 1, -1, 2)), cook_toom("five taps", 2, (0, 1, -1, 2, -2), taps=5), F6)


@pytest.mark.parametrize("algorithm", [F2, F4, *OTHERS], ids=lambda a: a.name)
def test_the_transforms_convolve_symbols(algorithm):
    """In one dimension and in two, whose products, additions and order are those of the programs."""
    g, d = sympy.symbols(f"g:{algorithm.taps}"), sympy.symbols(f"d:{algorithm.tile}")
    sides = [sympy.Matrix(m.tolist()) * sympy.Matrix(v) for m, v in ((algorithm.weight, g), (algorithm.data, d))]
    found = sympy.Matrix(algorithm.result.tolist()) * sides[0].multiply_elementwise(sides[1])
    for i, value in enumerate(found):
        assert sympy.expand(value - algorithm.scale * sum(g[k] * d[i + k] for k in range(algorithm.taps))) == 0
    assert algorithm.is_exact


@pytest.mark.parametrize("algorithm", [F2, F4], ids=lambda a: a.name)
def test_the_programs_convolve_tiles_of_symbols(algorithm):
    t, m, r = algorithm.tile, algorithm.outputs, algorithm.taps
    d = sympy.symbols(f"d:{t * t}")
    weight = torch.randint(-127, 128, (1, 1, r, r), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    operands = algorithm.weight_operands(weight).flatten().tolist()
    found = algorithm.decode.run([w * s for w, s in zip(operands, algorithm.encode.run(list(d)), strict=True)])
    taps = weight[0, 0].tolist()
    for at, value in enumerate(found):
        y, x = divmod(at, m)
        wanted = sum(taps[i][j] * d[(y + i) * t + x + j] for i in range(r) for j in range(r))
        assert sympy.expand(value - algorithm.scale**2 * wanted) == 0


def test_the_two_usual_algorithms():
    """Products of Lavin and Gray's F(2x2, 3x3) and F(4x4, 3x3), the latter's data transform as they print it."""
    assert (F2.products, F4.products, F2.multiplications_saved, F4.multiplications_saved) == (16, 36, 2.25, 4)
    assert (F2.scale, F4.scale) == (2, 24)
    assert F2.encode.additions == 2 * 4 * 4  # 32, as printed
    printed = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
               [0, 4, 0, -5, 0, 1]]  # fmt: skip
    assert all(row in F4.data.tolist() or [-v for v in row] in F4.data.tolist() for row in printed)


def test_a_lone_wrong_sign_is_found():
    wrong = F4.data.clone()
    wrong[3, 1] *= -1
    broken = ConvolutionAlgorithm("broken", F4.weight, wrong, F4.result, F4.scale)
    assert not broken.is_exact
    with pytest.raises(OptionError, match=r"'broken' has .* g0 d1 in y0; expected 0\. Derive it with cook_toom"):
        register_conv_algorithm(broken)
    with pytest.raises(OptionError, match="an algorithm named 'winograd2' exists"):
        register_conv_algorithm(F2)
    assert set(CONV_ALGORITHMS) == {"winograd2", "winograd4"}


@pytest.mark.parametrize("points", [(0, 1, 1), (0, 1), (0, 1, 0.5)])
def test_points_that_do_not_fit_are_refused(points):
    with pytest.raises(OptionError, match="expected 3 different whole numbers"):
        cook_toom("mine", 2, points)


def test_matrices_that_do_not_fit_each_other_are_refused():
    with pytest.raises(OptionError, match="has matrices of shapes"):
        ConvolutionAlgorithm("mine", F2.weight, F4.data, F2.result, 2)


@pytest.mark.parametrize("scale", [*range(1, 40), 144, 576, 3600, 32400, (1 << 20) - 1, 1 << 20])
def test_division_is_exact_for_every_multiple(scale):
    """At the ends of int32, where the error is largest, and between."""
    multiplier, shift = exact_division(scale)
    assert multiplier < 1 << 31 and 1 <= shift <= 62
    most = ((1 << 31) - 1) // scale
    quotients = torch.cat([torch.arange(most - 50, most + 1), torch.arange(-most, 50 - most), torch.arange(-50, 50)])
    quotients = torch.cat(
        [quotients, torch.randint(-most, most + 1, (1000,), generator=torch.Generator().manual_seed(0))]
    )
    assert torch.equal(shift_right_half_up(quotients * scale * multiplier, torch.tensor(shift)), quotients)
