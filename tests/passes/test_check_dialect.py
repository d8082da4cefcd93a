import pytest
import torch
from torch import nn

from fxcompress import PassManager, default_passes
from fxcompress.capture import capture
from fxcompress.errors import UnsupportedOperatorError
from tests.support.graphs import images


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LogSoftmax(1)

    def forward(self, x):
        return torch.cumsum(self.inner(x), 1)


def run(gm):
    passes = default_passes("int8")
    return PassManager(passes[: passes.index_of("check_dialect") + 1]).run(gm)


def test_everything_unsupported_is_named_at_once_with_the_way_out():
    with pytest.raises(UnsupportedOperatorError) as caught:
        run(capture(Two().eval(), (images(2, 4),)).graph_module)
    message = str(caught.value)
    assert "2 operators have no integer lowering" in message
    assert "softmax" in message and "inner" in message and "cumsum" in message and "test_check_dialect.py" in message
    assert "keep_float=['inner']" in message


def test_a_supported_graph_passes_unchanged():
    gm = capture(nn.Linear(4, 3).eval(), (images(2, 4),)).graph_module
    before = str(gm.graph)
    assert str(run(gm).graph) == before
