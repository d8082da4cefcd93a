import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import Level
from fxcompress.bilinear import ALGORITHMS, NAIVE, BilinearAlgorithm, register_algorithm
from fxcompress.block_products import Dimensions
from fxcompress.errors import OptionError
from fxcompress.graph import argument, calls, constant
from fxcompress.passes import MultiplyInBlocks
from tests.support.graphs import images, randomize
from tests.support.levels import compile_levels

ops = torch.ops.fxcompress
BLOCKED = (ops.bilinear_linear.default, ops.bilinear_matmul.default)


class Tokens(nn.Module):
    """A linear layer over 9 x 9 pixels, their scores, and a strided 1x1 convolution in front; sizes are odd."""

    def __init__(self, inputs=25, channels=27, features=29, stride=2):
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 1, stride)
        self.linear = nn.Linear(channels, features)

    def forward(self, x):
        y = self.linear(self.conv(x).relu().flatten(2).transpose(1, 2)).relu()
        return y @ y.transpose(1, 2)


def in_blocks(model, x, least=2, **options):
    """The integer graph with products cut down to ``least``, and the same with products by definition."""
    passes = fxcompress.default_passes("int8")
    passes.replace("multiply_in_blocks", MultiplyInBlocks(least))
    options = {"backend": "reference", "input_range": (-3, 3)} | options
    naive = fxcompress.compile(model, example_inputs=x, **options)
    return fxcompress.compile(
        model, example_inputs=x, passes=passes, **{"matmul_algorithm": "winograd"} | options
    ), naive


@pytest.mark.parametrize("algorithm", ["strassen", "winograd", "auto"])
@pytest.mark.parametrize("levels", [1, 2])
def test_products_in_blocks_compute_the_same_bits(algorithm, levels):
    x = images(3, 25, 17, 17)
    net, naive = in_blocks(randomize(Tokens()), x, matmul_algorithm=algorithm, matmul_levels=levels)
    assert [n.target for n in calls(net.graph_module, *BLOCKED)] == [BLOCKED[0], BLOCKED[0], BLOCKED[1]]
    for batch in (x, x[:1], 9 * x[:2]):
        assert torch.equal(net(batch), naive(batch))
    assert net.verify_integer_only().accumulators.keys() >= naive.verify_integer_only().accumulators.keys()


def test_the_report_says_what_it_costs():
    net, naive = in_blocks(randomize(Tokens(6, 12, 16)), images(2, 6, 16, 16))
    conv, linear, scores = net.report().block_products
    assert (linear.products, linear.multiplications, linear.plain_multiplications) == (7, 7 * 8 * 6 * 32, 16 * 12 * 64)
    assert linear.additions == 4 * 6 * 32 + 7 * 8 * 32 and scores.additions == 4 * 32 * 8 + 4 * 8 * 32 + 7 * 32 * 32
    assert linear.weight_bytes == 7 * 8 * 6 * 2 and linear.plain_weight_bytes == 16 * 12
    assert linear.algorithm == "winograd 2 x 2 x 2" and max(linear.operand_bits) <= 11 and conv.node == "conv2d"
    assert net.report().macs == sum(b.multiplications for b in net.report().block_products) < naive.report().macs
    assert "products in blocks" in str(net.report()) and "products in blocks" not in str(naive.report())
    assert fxcompress.Report.from_dict(net.report().to_dict()) == net.report()


def test_a_compiled_network_is_saved_and_loaded(tmp_path):
    x = images(2, 25, 17, 17)
    net, naive = in_blocks(randomize(Tokens()), x)
    net.save(tmp_path / "net.fxc")
    assert torch.equal(fxcompress.load(tmp_path / "net.fxc", backend="reference")(x), naive(x))


class Unsuitable(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.padded, self.grouped = (
            nn.Conv2d(8, 8, 3),
            nn.Conv2d(8, 8, 1, padding=1),
            nn.Conv2d(8, 8, 1, groups=2),
        )
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.grouped(self.padded(self.wide(x).relu()).relu()).relu().mean((2, 3)))


def refusals(model, x, least, **options):
    gm = compile_levels(randomize(model), (x,), **{"matmul_algorithm": "winograd"} | options)[Level.INTEGER]
    plan = MultiplyInBlocks(least).plan(gm)
    assert len(plan) == 0
    return [r.reason for r in plan.rejects]


def test_refusals_name_the_reason():
    assert refusals(Unsuitable(), images(2, 8, 9, 9), 2) == [
        "its kernel is 3 x 3", "it pads", "it has groups", "its dimensions 8 x 8 x 1 are below 2"]  # fmt: skip
    assert refusals(Tokens(5, 7, 7, 1), images(2, 5, 3, 3), 8)[0] == "its dimensions 7 x 5 x 9 are below 8"
    assert (
        refusals(Tokens(5, 3, 3, 1), images(2, 5, 1, 3), 2)[2] == "blocks of 3 x 3 x 3 would take more multiplications"
    )
    assert refusals(Tokens(), images(2, 25, 9, 9), 2, matmul_algorithm="naive") == []


def test_auto_minimizes_whatever_cost_it_is_given():
    gm = compile_levels(
        randomize(Tokens(6, 12, 16)), (images(2, 6, 16, 16),), matmul_algorithm="auto", matmul_levels=2
    )[Level.INTEGER]
    (first, *_) = MultiplyInBlocks(2).plan(gm).matches
    assert first.data.name == "winograd"
    assert (
        len(MultiplyInBlocks(2, cost=lambda whole, algorithm: algorithm.products).plan(gm)) == 0
    )  # the definition has one
    most_additions = MultiplyInBlocks(2, cost=lambda whole, algorithm: -algorithm.additions.total).plan(gm)
    assert (most_additions.matches[-1].data.name, most_additions.matches[-1].data.size) == ("strassen", (4, 4, 4))


def test_auto_minimizes_the_measured_time(monkeypatch):
    """What is faster here is not known to a test: the times are told, and those of the machine only have to be times."""
    from fxcompress.backends.native import block_times

    whole, winograd = Dimensions(32, 24, 40), ALGORITHMS["winograd"]
    for algorithm in (NAIVE, winograd, winograd.levels(2)):
        assert 0 < block_times.native_time(whole, algorithm) < 1e9
    assert block_times.native_time(whole._replace(count=3), winograd) == 3 * block_times.native_time(whole, winograd)
    gm = compile_levels(randomize(Tokens(6, 12, 16)), (images(2, 6, 16, 16),), matmul_algorithm="auto")[Level.INTEGER]
    for best in ("strassen", "winograd", "naive"):
        monkeypatch.setattr(block_times, "native_time", lambda whole, algorithm, best=best: algorithm.name != best)
        plan = MultiplyInBlocks(2, cost="time").plan(gm)
        assert [m.data.name for m in plan.matches] == ([] if best == "naive" else [best] * 3)
        assert best != "naive" or "no algorithm is better than the definition" in str(plan)


def test_an_unknown_cost_is_refused():
    with pytest.raises(OptionError, match=r"unknown cost 'times'. Did you mean 'time'"):
        MultiplyInBlocks(cost="times")


def test_algorithms_of_ones_own_are_applied():
    """Two products of halves of the sum: no fewer multiplications; Strassen's below one that only cuts the rows is."""
    rows = BilinearAlgorithm.parse("rows", (2, 1, 1), ["a11 b11", "a21 b11"], ["m1", "m2"])
    register_algorithm(rows.compose(ALGORITHMS["strassen"], "rows of strassen"))
    try:
        x = images(2, 6, 16, 16)
        net, naive = in_blocks(randomize(Tokens(6, 12, 16)), x, matmul_algorithm="rows of strassen")
        assert [p.products for p in net.report().block_products] == [14] * 3 and torch.equal(net(x), naive(x))
        with pytest.raises(OptionError, match="Did you mean 'rows of strassen'"):
            fxcompress.compile(Tokens(), matmul_algorithm="rows of strasen")
    finally:
        del ALGORITHMS["rows of strassen"]


def test_programs_are_stored_once_and_weights_as_sums():
    net, _ = in_blocks(randomize(Tokens()), images(2, 25, 17, 17))
    conv, linear, _ = calls(net.graph_module, *BLOCKED)
    assert argument(conv, "encode").target == argument(linear, "encode").target
    weight = constant(net.graph_module, argument(linear, "weight"))
    assert weight.dtype == torch.int16 and weight.shape == (7, 15, 14)
    assert MultiplyInBlocks(2).plan(net.graph_module).matches == []
