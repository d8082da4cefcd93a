import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import Level
from fxcompress.errors import AccumulatorError, OptionError
from fxcompress.graph import argument, calls, constant
from fxcompress.passes import ConvolveInTiles, PruneProducts
from fxcompress.tile_convolution import CONV_ALGORITHMS, cook_toom, register_conv_algorithm
from tests.support.graphs import images, randomize
from tests.support.levels import compile_levels

ops = torch.ops.fxcompress
TILES = ops.bilinear_linear.default


class Residual(nn.Module):
    """Padded, unpadded and unevenly padded convolutions; one has no bias, one is added to another."""

    def __init__(self, channels=5):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.third = nn.Conv2d(channels, 7, 3, padding=(0, 2))

    def forward(self, x):
        x = self.first(x).relu()
        return self.third((self.second(x) + x).relu())


def tiled(model, x, **options):
    options = {"backend": "reference", "input_range": (-3, 3)} | options
    direct = fxcompress.compile(
        model, example_inputs=x, **{k: v for k, v in options.items() if k not in ("conv_algorithm", "passes")}
    )
    return fxcompress.compile(model, example_inputs=x, **{"conv_algorithm": "winograd2"} | options), direct


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("algorithm", ["winograd2", "winograd4", "auto"])
@pytest.mark.parametrize("size", [(12, 12), (13, 11)], ids=str)
def test_convolutions_in_tiles_compute_the_same_bits(algorithm, size, backend):
    x = images(3, 3, *size)
    net, direct = tiled(randomize(Residual()), x, conv_algorithm=algorithm, backend=backend)
    assert len(list(calls(net.graph_module, TILES))) == 3 and not list(calls(net.graph_module, ops.conv.default))
    for batch in (x, x[:1], 9 * x[:2]):
        assert torch.equal(net(batch), direct(batch))


@pytest.mark.parametrize("algorithm", ["winograd2", "winograd4"])
@pytest.mark.parametrize("code", [-127, 127])
def test_extreme_weights_and_codes(algorithm, code):
    """All weights of one sign and all codes at the end of their range: the largest accumulators there are."""
    model = nn.Sequential(nn.Conv2d(9, 4, 3, padding=1)).eval()
    nn.init.constant_(model[0].weight, code / 127)
    x = torch.cat([torch.full((1, 9, 8, 8), 3.0), torch.full((1, 9, 8, 8), -3.0), images(1, 9, 8, 8)])
    net, direct = tiled(model, x, conv_algorithm=algorithm)
    assert torch.equal(net(x), direct(x))


def test_the_proof_finds_the_accumulators_of_the_convolution():
    net, direct = tiled(randomize(Residual()), images(2, 3, 13, 11), conv_algorithm="winograd4")
    found, wanted = net.verify_integer_only().accumulators, direct.verify_integer_only().accumulators
    convolutions = [n.name for n in calls(direct.graph_module, ops.conv.default)]
    assert len(convolutions) == 3 and all(found[name] == wanted[name] for name in convolutions)


def test_the_report_says_what_it_costs():
    net, _ = tiled(randomize(Residual(6)), images(2, 3, 12, 12), conv_algorithm="winograd4")
    first, second, _ = net.report().block_products
    assert (second.products, second.algorithm) == (36, "winograd4 6 x 6")
    assert (second.multiplications, second.plain_multiplications) == (36 * 9 * 6 * 6, 9 * 144 * 6 * 6)
    assert (second.weight_bytes, second.plain_weight_bytes) == (36 * 36 * 2, 36 * 9)
    f4 = CONV_ALGORITHMS["winograd4"]
    assert second.additions == 9 * 6 * (f4.encode.additions + f4.decode.additions)
    assert max(second.operand_bits) <= 16 and first.plain_multiplications == 9 * 144 * 3 * 6
    assert net.report().macs == sum(b.multiplications for b in net.report().block_products)


class Unsuitable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(8, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, dilation=2), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, (1, 3)), nn.ReLU(), nn.Conv2d(8, 8, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def refusals(model, x, **options):
    gm = compile_levels(model, (x,), **{"conv_algorithm": "winograd2"} | options)[Level.INTEGER]
    plan = ConvolveInTiles().plan(gm)
    return [r.reason for r in plan.rejects]


def test_refusals_name_the_reason():
    model = randomize(Unsuitable())
    assert refusals(model, images(2, 8, 17, 17), conv_algorithm="winograd4") == [
        "its kernel is 5 x 5", "it has groups", "its dilation is 2 x 2", "its stride is 2 x 2", "its kernel is 1 x 3",
        "tiles of 4 x 4 on 3 x 1 pixels would take more multiplications"]  # fmt: skip
    small = randomize(nn.Sequential(nn.Conv2d(8, 8, 3)))
    reason = "tiles of 4 x 4 on 1 x 3 pixels would take more multiplications"
    assert refusals(small, images(2, 8, 3, 5), conv_algorithm="winograd4") == [reason]
    assert refusals(small, images(2, 8, 3, 5), conv_algorithm="direct") == []


def wide(channels):
    """All weights equal: the largest sum of a layer of so many channels."""
    model = nn.Sequential(nn.Conv2d(channels, 2, 3, padding=1)).eval()
    nn.init.constant_(model[0].weight, 1.0)
    return model


def test_accumulators_that_outgrow_int32_are_refused_and_auto_takes_the_smaller_tiles():
    """576 times 9 * 64 * 127 * 128 does not fit 32 bits (the zero point halves the codes); 4 times does."""
    x = images(1, 64, 8, 8)
    assert refusals(wide(64), x, conv_algorithm="winograd4") == [
        "winograd4: 576 times its accumulator needs 34 bits of 32"
    ]
    net, direct = tiled(wide(64), x, conv_algorithm="auto")
    assert [b.algorithm for b in net.report().block_products] == ["winograd2 4 x 4"] and torch.equal(net(x), direct(x))


def test_operands_that_outgrow_int16_are_refused():
    register_conv_algorithm(cook_toom("winograd6", 6, (0, 1, -1, 2, -2, 3, -3)))
    try:
        (reason,) = refusals(wide(2), images(1, 2, 12, 12), conv_algorithm="winograd6")
        assert reason.startswith("winograd6: the operands of its ") and reason.endswith("bits of 16")
    finally:
        del CONV_ALGORITHMS["winograd6"]


def test_a_wrong_operand_is_found_by_the_proof():
    """verify multiplies the algorithm out again: large weights behind the rewrite reach further than int32."""
    net, _ = tiled(randomize(Residual()), images(1, 3, 12, 12), conv_algorithm="winograd4")
    layer = next(calls(net.graph_module, TILES))
    constant(net.graph_module, argument(layer, "weight")).fill_(32767)
    with pytest.raises(AccumulatorError, match=r"needs \d+ bits"):
        net.verify_integer_only()


def test_a_network_in_tiles_is_saved_and_loaded(tmp_path):
    x = images(2, 3, 13, 11)
    net, direct = tiled(randomize(Residual()), x, conv_algorithm="auto")
    net.save(tmp_path / "net.fxc")
    assert torch.equal(fxcompress.load(tmp_path / "net.fxc", backend="reference")(x), direct(x))


def test_products_of_tiles_can_be_left_out():
    """What a product of the tiles adds is missing, of real numbers: where they are 0 the result is the bias."""
    passes = fxcompress.default_passes("int8").insert_after("multiply_in_blocks", PruneProducts(1))
    x = images(2, 3, 12, 12)
    net, direct = tiled(randomize(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1))), x, passes=passes)
    assert [b.products for b in net.report().block_products] == [15]
    assert torch.equal(net(0 * x), direct(0 * x)) and not torch.equal(net(x), direct(x))


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(OptionError, match=r"unknown conv_algorithm 'winograd3'\. Did you mean 'winograd"):
        fxcompress.compile(Residual(), conv_algorithm="winograd3")
