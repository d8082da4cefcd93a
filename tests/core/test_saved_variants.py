"""Every way of compiling can be saved and loaded again, which proves it once more, and computes the same bits."""

import pytest
import torch

import fxcompress
from tests.support.graphs import build, images

VARIANTS = [
    {},
    {"spiq": True},
    {"target": "w4a8", "residual": 0.5},
    {"target": "w4a8", "weight_quantizer": "power"},
    {"residual_inputs": True},
    {"equalize": True, "absorb_bias": True, "weight_granularity": "tensor"},
    {"pruning_ratio": 0.2, "round_to": 1},
    {"matmul_algorithm": "strassen"},
    {"conv_algorithm": "auto"},
    {"integer_io": True},
]


class PaddedShortcut(torch.nn.Module):
    """A residual block whose shortcut has zero channels added: its padding has an entry per channel with SPIQ."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.second = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, 2, 1), torch.nn.BatchNorm2d(16))
        self.last = torch.nn.Linear(16, 12)

    def forward(self, x):
        x = self.first(x)
        shortcut = torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.last(torch.relu(self.second(x) + shortcut).mean((2, 3)))


def model_of(name):
    torch.manual_seed(0)
    if name == "padded_shortcut":
        return PaddedShortcut().eval(), (images(2, 3, 8, 8),)
    if name == "wide_mlp":  # large enough for products in blocks
        layers = torch.nn.Linear(128, 130), torch.nn.ReLU(), torch.nn.Linear(130, 96)
        return torch.nn.Sequential(*layers).eval(), (images(2, 65, 128),)
    return build(name)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ["padded_shortcut", "wide_mlp", "residual_block"])
def test_a_loaded_network_is_the_saved_one(name, options, tmp_path):
    model, inputs = model_of(name)
    net = fxcompress.compile(model, example_inputs=inputs, input_range=(-4.0, 4.0), **options)
    net.save(tmp_path / "net.fxc")
    for backend in ("native", "reference"):
        loaded = fxcompress.load(tmp_path / "net.fxc", backend=backend)
        for expected, found in zip(
            torch.utils._pytree.tree_leaves(net(*inputs)), torch.utils._pytree.tree_leaves(loaded(*inputs)), strict=True
        ):
            assert torch.equal(expected, found)


class PaddedSentences(torch.nn.Module):
    """Attention over token ids that does not see the padding: integers that are no codes, compared and moved."""

    def __init__(self):
        super().__init__()
        self.words, self.qkv, self.out = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 24), torch.nn.Linear(8, 3)

    def forward(self, ids):
        q, k, v = self.qkv(self.words(ids)).unsqueeze(1).chunk(3, -1)
        seen = ids.ne(0)[:, None, None, :]
        return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).squeeze(1).mean(1))


def test_a_loaded_network_reads_token_ids_and_masks(tmp_path):
    torch.manual_seed(0)
    ids = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]])
    net = fxcompress.compile(PaddedSentences().eval(), calibration_data=[ids])
    net.save(tmp_path / "net.fxc")
    assert torch.equal(fxcompress.load(tmp_path / "net.fxc")(ids), net(ids))
