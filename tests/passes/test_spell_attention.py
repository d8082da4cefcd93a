"""Spellings of attention: softmax, masks, normalizations written out, tokens that all samples share."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress
from fxcompress.capture import capture
from fxcompress.dialects import check_level
from fxcompress.graph import constant, placeholders
from fxcompress.passes.fold_constants import FoldConstants
from fxcompress.passes.normalize import Normalize
from fxcompress.rewrite import Level

ops = torch.ops.fxcompress


class Model(nn.Module):
    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, *args):
        return self.function(self, *args)


def normalized(function, *inputs, **tensors):
    """The normalized graph, folded, after comparing it with the module on batches of 1, 3 and 5."""
    model = Model(function, **tensors).eval()
    captured = capture(model, inputs)
    gm = captured.graph_module
    for p in (Normalize(), FoldConstants()):
        while (plan := p.plan(gm)).matches:
            p.apply(plan)
    gm.recompile()
    check_level(gm, Level.FLOAT)
    assert not Normalize().plan(gm).matches
    for batch in (1, 3, 5):
        xs = [torch.cat([x] * 3)[:batch] for x in inputs]
        expected, (found,) = model(*xs), gm(*xs)
        assert torch.allclose(expected, found, rtol=1e-5, atol=1e-6)
    return gm


def called(gm):
    return [n.target._schema.name.split("::")[1] for n in gm.graph.nodes if n.op == "call_function"]


def masks(gm):
    """The constant masks of the masked softmaxes."""
    return [constant(gm, n.args[1]) for n in gm.graph.nodes if n.target is ops.masked_softmax.default]


X = torch.randn(2, 3, 6)
SCORES = torch.randn(2, 2, 4, 4)
CAUSAL = torch.full((4, 4), -math.inf).triu(1)

# ------------------------------------------------------------------------------------------- softmax and normalization


@pytest.mark.parametrize("dim, expected", [(-1, ["softmax"]), (1, ["permute", "softmax", "permute"])])
def test_softmax_runs_over_the_last_dimension(dim, expected):
    assert called(normalized(lambda m, x: torch.softmax(x, dim), X)) == expected


def test_softmax_over_the_batch_is_refused():
    gm = capture(Model(lambda m, x: torch.softmax(x, 0)).eval(), (X,)).graph_module
    assert [str(r.reason) for r in Normalize().plan(gm).rejects] == ["it runs over the batch"]


WRITTEN_OUT = {
    "rms": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), "rms_norm"),
    "rms of products": (lambda x: x / (torch.mean(x * x, -1, keepdim=True) + 1e-5) ** 0.5, "rms_norm"),
    "layer norm": (lambda x: (x - x.mean(-1, True)) / torch.sqrt((x - x.mean(-1, True)).pow(2).mean(-1, True) + 1e-5),
                   "layer_norm"),
    "layer norm by var": (lambda x: (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5), "layer_norm"),
    "unbiased variance": (lambda x: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-3), "layer_norm"),
    "unit length": (lambda x: F.normalize(x, dim=-1), "rms_norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_normalizations_written_out_are_recognized(name):
    function, expected = WRITTEN_OUT[name]
    found = called(normalized(lambda m, x: function(x), X))
    assert found in ([expected], [expected, "mul"])


@pytest.mark.parametrize("keepdim", [True, False])
def test_a_length_is_the_root_of_a_mean(keepdim):
    found = called(normalized(lambda m, x: torch.linalg.vector_norm(x, dim=(1, 2), keepdim=keepdim), X))
    assert found == ["mul", "mean", "mul", "sqrt"] + ["reshape"] * (not keepdim)


def test_a_norm_along_another_dimension_is_permuted():
    found = called(normalized(lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5), X))
    assert found == ["permute", "rms_norm", "permute"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-5),
        lambda x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-5),
        lambda x: (x - x.mean(1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5),
    ],
)
def test_what_only_looks_like_a_norm_is_left_alone(function):
    model = Model(lambda m, x: function(x)).eval()
    gm = capture(model, (X,)).graph_module
    while (plan := Normalize().plan(gm)).matches:
        Normalize().apply(plan)
    assert not {"rms_norm", "layer_norm"} & set(called(gm))


# --------------------------------------------------------------------------------------------------------------- masks

MASKED = {
    "added": lambda m, x: torch.softmax(x + m.mask, -1),
    "added first": lambda m, x: torch.softmax(m.mask + x, -1),
    "added to a bias": lambda m, x: torch.softmax(x * 2 + (m.bias + m.mask), -1),
    "filled": lambda m, x: torch.softmax(x.masked_fill(m.mask < 0, -math.inf), -1),
    "filled with a large number": lambda m, x: torch.softmax(x.masked_fill(m.mask < 0, -1e9), -1),
    "chosen": lambda m, x: torch.softmax(torch.where(m.mask < 0, -1e9, x), -1),
    "chosen the other way": lambda m, x: torch.softmax(torch.where(m.mask >= 0, x, -1e9), -1),
    "large number": lambda m, x: torch.softmax(x + m.mask.clamp(min=-1e4), -1),
    "finfo.min": lambda m, x: torch.softmax(x + m.mask.clamp(min=torch.finfo(torch.float32).min), -1),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_constant_mask_excludes(name):
    gm = normalized(MASKED[name], SCORES, mask=CAUSAL.clone(), bias=torch.randn(4, 4))
    (mask,) = masks(gm)
    assert mask.dtype == torch.bool and torch.equal(mask.expand(4, 4), CAUSAL == 0)


def test_a_bias_is_no_mask():
    gm = normalized(lambda m, x: torch.softmax(x + m.bias, -1), SCORES, bias=torch.randn(4, 4) * 20)
    assert called(gm) == ["add", "softmax"]


def test_windows_have_a_mask_each():
    """Swin: dimension 0 is (batch * windows), the mask (windows, L, L) is repeated for every sample."""

    def attend(m, x):
        windows = x.reshape(-1, 1, 4, 4)
        scores = windows.view(-1, 2, 1, 4, 4) + m.mask.unsqueeze(1).unsqueeze(0)
        return torch.softmax(scores.view(-1, 1, 4, 4), -1)

    def repeated(m, x):
        mask = m.mask[None, :, None].expand(x.shape[0], -1, -1, -1, -1)
        return F.scaled_dot_product_attention(
            *[x.reshape(-1, 1, 4, 4)] * 3, attn_mask=mask.reshape(-1, 1, 4, 4) + m.bias
        )

    mask = torch.zeros(2, 4, 4)
    mask[1, :2, 2:] = mask[1, 2:, :2] = -100.0
    for function in (attend, repeated):
        (found,) = masks(normalized(function, SCORES, mask=mask, bias=torch.randn(4, 4)))
        assert torch.equal(found.reshape(2, 4, 4), mask == 0)


PADDING = {
    "bert": lambda m: (1.0 - m[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min,
    "inverted": lambda m: (inverted := 1.0 - m[:, None, None, :].float()).masked_fill(inverted.bool(), -1e9),
    "chosen": lambda m: torch.where(m[:, None, None, :].bool(), 0.0, -1e4),
    "scaled": lambda m: (m[:, None, None, :].float() - 1) * 1e5,
}
LENGTHS = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("name", PADDING)
def test_a_padding_mask_of_the_input_excludes(name):
    gm = normalized(lambda m, x, mask: torch.softmax(x + PADDING[name](mask), -1), SCORES, LENGTHS)
    found = called(gm)
    assert found[-1] == "masked_softmax" and set(found) <= {"reshape", "ne", "logical_not", "masked_softmax"}


def test_attention_takes_bool_masks_of_the_input():
    q = torch.randn(2, 2, 4, 3)
    gm = normalized(
        lambda m, q, mask: F.scaled_dot_product_attention(q, q, q, mask.bool()[:, None, None, :]), q, LENGTHS
    )
    assert called(gm).count("masked_softmax") == 1


def test_causal_attention_and_grouped_queries():
    q = torch.randn(2, 4, 5, 3)
    (mask,) = masks(normalized(lambda m, q: F.scaled_dot_product_attention(q, q, q, is_causal=True), q))
    assert torch.equal(mask, torch.ones(5, 5, dtype=torch.bool).tril())
    gm = normalized(lambda m, q: F.scaled_dot_product_attention(q, q[:, :2], q[:, 2:], enable_gqa=True), q)
    assert called(gm).count("index_select") == 2


# -------------------------------------------------------------------------------------------------------------- tokens


def test_a_class_token_becomes_padding_and_a_constant():
    gm = normalized(
        lambda m, x: torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position,
        X,
        token=torch.randn(1, 1, 6),
        position=torch.randn(1, 4, 6),
    )
    assert called(gm) == ["constant_pad_nd", "add", "add"]


def test_tokens_behind_and_on_both_sides():
    def both(m, x):
        token = m.token.expand(x.shape[0], -1, -1)
        return torch.cat([token, x, x * 2, token], 1)

    gm = normalized(both, X, token=torch.randn(1, 2, 6))
    assert called(gm)[-3:] == ["cat", "constant_pad_nd", "add"]


def test_embeddings_of_shared_ids_are_constants():
    def embed(m, ids):
        types = m.types.expand(ids.shape[0], -1)
        return F.embedding(ids, m.table) + F.embedding(types, m.other) + F.embedding(m.types, m.other)

    gm = normalized(embed, torch.tensor([[0, 1, 4], [2, 2, 0]]), table=torch.randn(5, 6), other=torch.randn(2, 6),
                    types=torch.tensor([[0, 1, 0]]))  # fmt: skip
    assert called(gm) == ["embedding", "add", "add"]


def test_position_ids_computed_from_the_input_stay_integers():
    def embed(m, ids):
        mask = ids.ne(1).int()
        return F.embedding((torch.cumsum(mask, 1).type_as(mask) * mask).long() + 1, m.table)

    gm = normalized(embed, torch.tensor([[0, 4, 1], [2, 2, 0]]), table=torch.randn(5, 6))
    assert called(gm)[-1] == "embedding" and placeholders(gm)[0].meta["val"].dtype == torch.int64
    compiled = fxcompress.compile(
        Model(embed, table=torch.randn(5, 6)).eval(), example_inputs=torch.tensor([[0, 4, 1], [2, 2, 0]])
    )
    assert compiled.verify_integer_only().integer_only
