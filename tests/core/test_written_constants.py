import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import FxcompressError, UnsupportedOperatorError


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.randn(16, 2))
        self.eval()

    def forward(self, x):
        return self.function(self, x)


def relative_positions():
    """Window position differences as BEiT numbers them: views are written, then the whole is copied into a part."""
    grid = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
    distance = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0).contiguous()
    distance[:, :, 0] += 1
    distance[:, :, 1] += 1
    distance[:, :, 0] *= 3
    index = torch.zeros(5, 5, dtype=torch.int64)
    index[1:, 1:] = distance.sum(-1)
    index[0, 0:] = 9
    index[0:, 0] = 10
    return index


def captured(function):
    model, x = Model(function), torch.randn(3, 25, 2)
    gm = capture(model, (x,)).graph_module
    assert torch.equal(gm(x)[0], model(x))
    return gm


def mutable(gm):
    return [n for n in gm.graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]


def test_numbers_written_in_place_are_one_constant():
    gm = captured(lambda m, x: x + m.table[relative_positions().view(-1)])
    assert [n.target._opname for n in gm.graph.nodes if n.op == "call_function"] == ["index", "add"]


def test_without_writes_nothing_is_folded():
    gm = captured(lambda m, x: x + torch.arange(2.0) * 3)
    assert [n.target._opname for n in gm.graph.nodes if n.op == "call_function"] == ["arange", "mul", "add"]


def test_what_depends_on_the_input_is_left_alone():
    gm = captured(lambda m, x: (x + 1).relu_())
    assert len(mutable(gm)) == 1


def test_a_write_of_the_input_among_constants_is_left_alone():
    def mixed(m, x):
        ramp = torch.zeros(3, 25, 2)
        ramp[:, 0] = 1.0
        ramp[:, 1:] = x[:3, 1:]
        return x + ramp

    try:
        gm = captured(mixed)
    except Exception as error:  # the exporter, or the aliasing check, may refuse it; it must not be folded wrongly
        assert isinstance(error, FxcompressError)
    else:
        assert mutable(gm)


def test_a_value_read_before_the_last_write_is_not_folded():
    def early(m, x):
        ramp = torch.zeros(2)
        first = ramp[:1]
        y = x + first
        ramp += 1
        return y + first

    try:
        gm = captured(early)
    except UnsupportedOperatorError as error:
        assert "through another view" in str(error)
    else:
        assert mutable(gm)
