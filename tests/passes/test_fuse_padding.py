import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxcompress
from fxcompress import Level
from fxcompress.graph import argument, calls
from tests.support.graphs import images, randomize
from tests.support.levels import compile_levels

ops = torch.ops.fxcompress


class Padded(nn.Module):
    def __init__(self, sides, padding=0, value=0.0, shared=False):
        super().__init__()
        self.conv, self.sides, self.value, self.shared = nn.Conv2d(3, 4, 3, 2, padding), sides, value, shared

    def forward(self, x):
        x = F.pad(x, self.sides, value=self.value)
        y = self.conv(x)
        return (y, F.max_pool2d(x, 2)) if self.shared else y


def compile_padded(*args, **kwargs):
    return compile_levels(randomize(Padded(*args, **kwargs)), (images(2, 3, 9, 9),))[Level.INTEGER]


@pytest.mark.parametrize(
    "sides, padding, expected",
    [((0, 1, 0, 1), 0, [0, 1, 0, 1]), ((1, 2, 0, 3), 0, [0, 3, 1, 2]), ((0, 1, 0, 1), 1, [1, 2, 1, 2])],
)
def test_pad_becomes_the_convolution_s_padding(sides, padding, expected):
    gm = compile_padded(sides, padding)
    (conv,) = calls(gm, ops.conv.default)
    assert argument(conv, "padding") == expected and not list(calls(gm, ops.pad.default))


def test_a_pad_with_another_value_is_fused_only_without_the_convolution_s_own():
    assert not list(calls(compile_padded((1, 1, 1, 1), 0, value=0.7), ops.pad.default))
    assert len(list(calls(compile_padded((1, 1, 1, 1), 1, value=0.7), ops.pad.default))) == 1


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"sides": (1, 1, 1, 1), "padding": 1, "value": 0.7}, "the two pads have different values"),
        ({"sides": (1, 1, 1, 1), "shared": True}, "the padded tensor has other consumers"),
    ],
)
def test_refusals_name_the_reason(arguments, reason):
    plan = fxcompress.passes.FusePadding().plan(compile_padded(**arguments))
    assert len(plan) == 0 and reason in str(plan)


class ChannelPadded(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(5, 4, 3)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 0, 0, 0, 1, 1)))


def test_a_channel_pad_is_not_a_convolution_s_padding():
    gm = compile_levels(randomize(ChannelPadded()), (images(2, 3, 9, 9),))[Level.INTEGER]
    plan = fxcompress.passes.FusePadding().plan(gm)
    assert len(plan) == 0 and "it pads channels" in str(plan)
