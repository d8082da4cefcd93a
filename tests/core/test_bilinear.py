import pytest
import sympy
import torch

from fxcompress.bilinear import (
    ALGORITHMS,
    NAIVE,
    STRASSEN,
    WINOGRAD,
    BilinearAlgorithm,
    operand_range,
    register_algorithm,
)
from fxcompress.errors import OptionError
from fxcompress.sum_schedule import SumSchedule, record, schedule

#: Laderman 1976, A noncommutative algorithm for multiplying 3 x 3 matrices using 23 multiplications.
LADERMAN = BilinearAlgorithm.parse(
    "laderman", (3, 3, 3),
    ["(a11+a12+a13-a21-a22-a32-a33) b22", "(a11-a21)(b22-b12)", "a22 (b12-b11+b21-b22-b23-b31+b33)",
     "(a21-a11+a22)(b11-b12+b22)", "(a21+a22)(b12-b11)", "a11 b11", "(a31-a11+a32)(b11-b13+b23)", "(a31-a11)(b13-b23)",
     "(a31+a32)(b13-b11)", "(a11+a12+a13-a22-a23-a31-a32) b23", "a32 (b13-b11+b21-b22-b23-b31+b32)",
     "(a32-a13+a33)(b22+b31-b32)", "(a13-a33)(b22-b32)", "a13 b31", "(a32+a33)(b32-b31)", "(a22-a13+a23)(b23+b31-b33)",
     "(a13-a23)(b23-b33)", "(a22+a23)(b33-b31)", "a12 b21", "a23 b32", "a21 b13", "a31 b12", "a33 b33"],
    ["m6+m14+m19", "m1+m4+m5+m6+m12+m14+m15", "m6+m7+m9+m10+m14+m16+m18",
     "m2+m3+m4+m6+m14+m16+m17", "m2+m4+m5+m6+m20", "m14+m16+m17+m18+m21",
     "m6+m7+m8+m11+m12+m13+m14", "m12+m13+m14+m15+m22", "m6+m7+m8+m9+m23"],
)  # fmt: skip


def blocks(letter: str, rows: int, columns: int) -> list:
    """Symbols that do not commute, like blocks."""
    return [sympy.Symbol(f"{letter}{i}{j}", commutative=False) for i in range(rows) for j in range(columns)]


def multiply(algorithm: BilinearAlgorithm, a: list, b: list) -> list:
    """C by the programs that kernels run."""
    sums_a, sums_b, results = algorithm.schedules
    return results.run([s * t for s, t in zip(sums_a.run(a), sums_b.run(b), strict=True)])


@pytest.mark.parametrize(
    "algorithm",
    [NAIVE, STRASSEN, WINOGRAD, LADERMAN, WINOGRAD.levels(2), STRASSEN.compose(WINOGRAD)],
    ids=lambda a: f"{a.name}{a.size}",
)
def test_algorithms_multiply_matrices_whose_blocks_do_not_commute(algorithm):
    n, m, p = algorithm.size
    a, b = blocks("a", n, m), blocks("b", m, p)
    found = multiply(algorithm, a, b)
    for i in range(n):
        for j in range(p):
            expected = sum(a[i * m + k] * b[k * p + j] for k in range(m))
            assert sympy.expand(found[i * p + j] - expected) == 0
    assert algorithm.is_exact


@pytest.mark.parametrize(
    "algorithm, products, additions",
    [(NAIVE, 1, (0, 0, 0)), (STRASSEN, 7, (5, 5, 8)), (WINOGRAD, 7, (4, 4, 7)), (WINOGRAD.levels(2), 49, (44, 44, 77)),
     (STRASSEN.levels(2), 49, (55, 55, 88)), (WINOGRAD.levels(3), 343, (372, 372, 651))],
)  # fmt: skip
def test_products_and_additions_are_those_of_the_literature(algorithm, products, additions):
    assert algorithm.products == products and algorithm.additions == additions
    assert algorithm.additions.total == sum(additions)


def test_operands_grow_by_what_their_sums_can_reach():
    assert operand_range(WINOGRAD.a, -128, 127).bounds == (-510, 510)
    assert operand_range(WINOGRAD.a, -128, 127).bits == 10
    assert operand_range(STRASSEN.a, -128, 127).bits == 9
    assert operand_range(STRASSEN.b, 0, 255).bounds == (-255, 510)
    for level in (1, 2, 3):
        assert operand_range(WINOGRAD.levels(level).a, -127, 127).bounds[1] == 127 * 4**level
    assert operand_range(WINOGRAD.levels(3).b, 0, 255).bits <= 16 < operand_range(WINOGRAD.levels(4).b, 0, 255).bits + 1


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("algorithm", [STRASSEN, WINOGRAD], ids=lambda a: a.name)
def test_levels_multiply_integer_matrices(algorithm, level):
    algorithm = algorithm.levels(level)
    n, m, p = algorithm.size
    a, b = torch.randint(-128, 128, (3 * n, 2 * m)), torch.randint(0, 256, (2 * m, 5 * p))

    def cut(t, rows, columns):
        return [block for row in t.chunk(rows, 0) for block in row.chunk(columns, 1)]

    sums_a, sums_b, results = algorithm.schedules
    products = [s @ t for s, t in zip(sums_a.run(cut(a, n, m)), sums_b.run(cut(b, m, p)), strict=True)]
    found = results.run(products)
    assert torch.equal(torch.cat([torch.cat(found[i * p : (i + 1) * p], 1) for i in range(n)]), a @ b)


def test_a_product_left_out_changes_the_blocks_that_need_it():
    pruned = WINOGRAD.without([2])  # P3 feeds C12 only
    assert pruned.products == 6 and not pruned.is_exact
    assert {tuple(v[:2]) for v in pruned.defect.nonzero().tolist()} == {(0, 1)}
    assert all(torch.equal(s.coefficients, t.reshape(s.coefficients.shape))
               for s, t in zip(pruned.schedules, (pruned.a, pruned.b, pruned.c), strict=True))  # fmt: skip
    assert pruned.additions.total < WINOGRAD.additions.total


def test_registered_algorithms_are_proved_first():
    assert register_algorithm(LADERMAN) is ALGORITHMS.pop("laderman")
    wrong = BilinearAlgorithm("wrong", STRASSEN.a, STRASSEN.b, -STRASSEN.c)
    with pytest.raises(OptionError, match="'wrong' has -1 a11 b11 in c11; expected 1"):
        register_algorithm(wrong)
    with pytest.raises(OptionError, match="an algorithm named 'strassen' exists"):
        register_algorithm(STRASSEN)


@pytest.mark.parametrize(
    "products, results, message",
    [
        (["a11 + b11"], ["m1"], "'a11 \\+ b11' in the algorithm 'x'; expected two factors"),
        (["a12 b11"], ["m1"], "'a12' in the algorithm 'x'; expected indices up to a11"),
        (["a11 b11"], ["m1 m1"], "'m1 m1' in the algorithm 'x'; expected a sum of m"),
        (["a11 b11"], ["m1", "m1"], "coefficients of shapes"),
    ],
)
def test_formulas_that_cannot_be_read_are_named(products, results, message):
    with pytest.raises(OptionError, match=message):
        BilinearAlgorithm.parse("x", (1, 1, 1), products, results)


# -------------------------------------------------------------------------------------------------- sums of sums


def test_a_schedule_computes_its_sums():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        coefficients = torch.randint(-2, 3, (6, 5), generator=generator)
        program = schedule(coefficients.tolist())
        assert torch.equal(program.coefficients, coefficients)
        assert SumSchedule.from_tensor(program.tensor, 5, 6) == program


def test_sums_that_repeat_are_computed_once():
    assert schedule([[1, 1, 1, 0], [-1, -1, 0, 1], [2, 2, 0, 0]]).additions == 3
    assert record(3, lambda t: [t[0] + t[1], (t[1] + t[2]) and 0 * t[2]]).steps == ((0, 1, 1, 1),)


@pytest.mark.parametrize("row", [(0, 1, 3, 1), (0, 1, -1, 0)])
def test_programs_that_read_what_does_not_exist_are_refused(row):
    program = torch.tensor([row, (0, 1, -1, 0)], dtype=torch.int32)
    with pytest.raises(ValueError, match="no program for 1 sums of 2 terms"):
        SumSchedule.from_tensor(program, 2, 1)
