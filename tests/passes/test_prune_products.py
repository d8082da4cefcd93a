import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import Level
from fxcompress.bilinear import WINOGRAD
from fxcompress.errors import OptionError
from fxcompress.graph import argument, calls, constant
from fxcompress.passes import MultiplyInBlocks, PruneProducts
from fxcompress.shapes import propagate
from tests.support.graphs import images, randomize
from tests.support.integer_graphs import int32
from tests.support.levels import compile_levels

ops = torch.ops.fxcompress
LAYER = ops.bilinear_linear.default


class Pointwise(nn.Module):
    """1x1 convolutions, the second strided, with batch norm and a ReLU in between."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(6, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 1, 2))

    def forward(self, x):
        return self.body(x)


def smooth_images(batch=2, size=16):
    """Neighboring pixels alike."""
    x = nn.functional.interpolate(
        torch.randn(batch, 6, 4, 4, generator=torch.Generator().manual_seed(0)), (size, size), mode="bilinear"
    )
    return x.contiguous()


def compiled(x, pruning=None, backend="reference", **options):
    passes = fxcompress.default_passes("int8").replace("multiply_in_blocks", MultiplyInBlocks(2))
    if pruning is not None:
        passes.insert_after("multiply_in_blocks", pruning)
    return fxcompress.compile(randomize(Pointwise()), example_inputs=x, input_range=(-3, 3), passes=passes, backend=backend,
                              **{"matmul_algorithm": "winograd"} | options)  # fmt: skip


def test_products_leave_the_graph_and_the_report_counts_what_is_left():
    x = smooth_images()
    net, exact = compiled(x, PruneProducts(2)), compiled(x)
    for pruned, whole in zip(net.report().block_products, exact.report().block_products, strict=True):
        assert pruned.products == 5 and pruned.multiplications * 7 == whole.multiplications * 5
        assert pruned.additions < whole.additions and pruned.weight_bytes * 7 == whole.weight_bytes * 5
    entry = next(p for p in net.report().passes if p["name"] == "prune_products")
    assert entry["rewrites"] == 2 and entry["output_change"] > 0
    assert net.verify_integer_only().integer_only


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("criterion", ["learned", "output", "magnitude", "random"])
def test_no_product_left_out_changes_nothing_and_all_backends_agree(criterion, shared):
    x = smooth_images()
    assert torch.equal(compiled(x, PruneProducts(0, criterion, shared))(x), compiled(x)(x))
    net = compiled(x, PruneProducts(1, criterion, shared))
    native = compiled(x, PruneProducts(1, criterion, shared), backend="native")
    assert torch.equal(net(x), native(x)) and torch.equal(net(x[:1]), net(x)[:1])
    first, second = calls(net.graph_module, LAYER)
    same = [torch.equal(constant(net.graph_module, argument(first, n)), constant(net.graph_module, argument(second, n)))
            for n in ("encode", "decode")]  # fmt: skip
    assert all(same) or not shared


def test_what_contributes_least_is_left_out():
    """The product that is chosen is the one without which the layer's accumulators change the least."""
    x = smooth_images()
    gm = compile_levels(randomize(nn.Sequential(nn.Conv2d(6, 16, 1))), (x,), matmul_algorithm="winograd")[Level.INTEGER]
    gm = MultiplyInBlocks(2).apply(MultiplyInBlocks(2).plan(gm)).graph_module
    propagate(gm)
    (match,) = PruneProducts(1, "output").plan(gm).matches
    codes = next(calls(gm, ops.quantize.default))
    scale, zero_point = (constant(gm, node) for node in codes.args[1:3])
    centered = ops.quantize(x, scale, zero_point, 0, 255).movedim(1, -1).reshape(-1, 6).int() - zero_point
    weight = constant(gm, argument(match.node, "weight"))
    errors = []
    for r in range(7):
        programs = [s.tensor for s in WINOGRAD.without([r]).schedules]
        sums = weight[[i for i in range(7) if i != r]]
        found = ops.bilinear_linear(
            centered, int32(0), sums, torch.zeros(16, dtype=torch.int32), *programs[1:], [2, 2, 2], -1
        )
        whole = ops.bilinear_linear(centered, int32(0), weight, torch.zeros(16, dtype=torch.int32),
                                    *(s.tensor for s in WINOGRAD.schedules[1:]), [2, 2, 2], -1)  # fmt: skip
        errors.append(float((found - whole).double().norm()))
    assert match.data == [errors.index(min(errors))]


def test_refusals_name_the_reason():
    assert "a sample has 225 rows, and blocks of every 2 would mix samples" in refusals(images(2, 6, 15, 15), 1)
    assert "it has 7 products only" in refusals(images(2, 6, 16, 16), 7)


def refusals(x, count):
    net = compiled(x, PruneProducts(count))
    return str(next(p for p in net.report().passes if p["name"] == "prune_products")["refusals"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1, "outputs"), "unknown criterion 'outputs'. Did you mean 'output'"),
        ((-1,), "count is -1; expected a whole number >= 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(OptionError, match=message):
        PruneProducts(*arguments)
