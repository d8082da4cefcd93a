"""Which activations are accumulators, which are codes, which codes are tied."""

import torch
from torch import nn
from torch.nn import functional as F

from fxcompress import Level
from fxcompress.analysis.quantization import QuantizationPoints, ranged_nodes
from tests.support.graphs import images, randomize
from tests.support.levels import compile_levels


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.function(self, x)


def points(function):
    gm = compile_levels(randomize(Net(function)), (images(2, 4, 6, 6),))[Level.FLOAT]
    return gm, QuantizationPoints(gm)


def kinds(function) -> tuple[list[str], list[str]]:
    """(operators that stay accumulators, operators that become codes), in graph order."""
    gm, found = points(function)
    name = {n: n.target._opname if n.op == "call_function" else "input" for n in gm.graph.nodes}
    ordered = [n for n in gm.graph.nodes if n.op in ("placeholder", "call_function")]
    return [name[n] for n in ordered if found.is_accumulator(n)], [name[n] for n in ordered if found.is_codes(n)]


def test_conv_clamp_fuses_and_the_output_stays_unrounded():
    assert kinds(lambda m, x: m.b(F.relu(m.a(x)))) == (["conv2d", "conv2d"], ["input", "clamp"])


def test_additions_join_their_branches():
    accumulators, codes = kinds(lambda m, x: m.b(F.relu(m.a(x) + m.b(x) + x)))
    assert accumulators == ["conv2d", "conv2d", "add", "add", "conv2d"] and codes == ["input", "clamp"]


def test_a_sum_with_two_readers_is_rounded():
    accumulators, codes = kinds(lambda m, x: (lambda y: m.b(y) + F.relu(y))(m.a(x)))
    assert "clamp" in codes and codes.count("conv2d") == 1 and accumulators == ["conv2d", "add"]


def test_a_function_rounds_its_input_and_its_output():
    assert kinds(lambda m, x: m.b(torch.sigmoid(m.a(x)))) == (["conv2d"], ["input", "conv2d", "sigmoid"])


def test_a_broadcast_operand_is_rounded_before_the_addition():
    accumulators, codes = kinds(lambda m, x: m.b(F.relu(m.a(x) + m.b(x).mean((2, 3), keepdim=True))))
    assert codes.count("mean") == 1 and codes.count("conv2d") == 1 and accumulators.count("conv2d") == 2


def test_movement_ties_and_sources_are_what_computes():
    gm, found = points(lambda m, x: m.b(torch.cat([F.max_pool2d(F.relu(m.a(x)), 3, 1, 1), x], 1)[:, 2:6]))
    tied = max(found.tied_sets(), key=len)
    assert {n.op if n.op == "placeholder" else n.target._opname for n in tied} == {
        "placeholder", "clamp", "max_pool2d", "cat", "slice",
    }  # fmt: skip
    assert {n.op if n.op == "placeholder" else n.target._opname for n in found.sources(tied)} == {
        "placeholder",
        "clamp",
    }
    assert set(found.sources(tied)) <= set(ranged_nodes(gm))


def test_outputs_of_movement_of_accumulators_stay_unrounded():
    accumulators, codes = kinds(lambda m, x: torch.cat([m.a(x), m.b(x)], 1).flatten(1))
    assert accumulators == ["conv2d", "conv2d", "cat", "reshape"] and codes == ["input"]


def test_a_concat_of_a_sum_and_codes_is_codes():
    accumulators, codes = kinds(lambda m, x: torch.cat([m.a(x), x], 1))
    assert accumulators == [] and codes == ["input", "conv2d", "cat"]
