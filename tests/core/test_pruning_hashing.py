"""Weights hashed to the modes of their density."""

import pytest
import torch

from fxcompress.pruning.hashing import hash_values


def samples(name: str, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64) - 0.5
    laplace = -uniform.sign() * (1 - 2 * uniform.abs()).log()
    return {"gaussian": torch.randn(count, generator=generator, dtype=torch.float64), "laplace": laplace}[name]


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
@pytest.mark.parametrize("count", [1000, 20000])
def test_few_values_are_left_and_their_order(name, count):
    values = samples(name, count)
    hashed = hash_values(values)
    assert 0.005 < len(hashed.unique()) / count < 0.1
    order = values.argsort()
    assert bool((hashed[order].diff() >= 0).all())


def test_a_larger_bandwidth_leaves_fewer():
    values = samples("gaussian", 5000)
    counts = [len(hash_values(values, kappa).unique()) for kappa in (1, 4, 16, 64)]
    assert counts == sorted(counts, reverse=True) and counts[0] > 5 * counts[2]


def test_clusters_become_their_centers():
    centers = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
    noise = 1e-3 * samples("gaussian", 300).reshape(100, 3)
    hashed = hash_values(centers + noise)
    assert len(hashed.unique()) == 3 and (hashed - centers).abs().max() < 1e-2


def test_zeros_stay_zero_and_a_constant_what_it_is():
    values = samples("gaussian", 1000)
    values[::3] = 0
    assert bool((hash_values(values)[::3] == 0).all())
    assert torch.equal(hash_values(torch.full((3, 2), 0.7)), torch.full((3, 2), 0.7).double())


def test_identical_rows_stay_identical():
    rows = samples("gaussian", 160).reshape(8, 20)
    rows[3] = rows[6]
    assert torch.equal(hash_values(rows)[3], hash_values(rows)[6])
