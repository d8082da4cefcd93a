"""Packed weights: what is stored is read back, in the bytes that were counted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxcompress
from fxcompress import artifact
from fxcompress.errors import ArtifactError
from fxcompress.packing import CHUNK, OVERHEAD, pack, packs, stored_bytes, unpack
from tests.support.graphs import build


def codes(limit, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).to(torch.int8)


@given(
    st.lists(st.sampled_from([0, 1, 3, 7, 15, 31, 63, 127]), min_size=1, max_size=9),
    st.sampled_from([(), (1,), (5,), (3, 3), (2, 1, 7)]),
    st.integers(0, 99),
)
def test_any_mixture_of_rows_comes_back(limits, shape, seed):
    weight = torch.stack([codes(limit, *shape, seed=seed + i) for i, limit in enumerate(limits)])
    data, kinds = pack(weight)
    assert torch.equal(unpack(data, kinds, tuple(weight.shape)), weight)
    assert kinds.numel() == (len(limits) + 1) // 2


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_row_takes_the_bits_of_its_largest_code(bits):
    limit = (1 << (bits - 1)) - 1
    weight = codes(limit, 64, 32)
    weight[:, 0] = limit  # every row needs all bits; 3-bit codes 2 and 3 are no squares
    weight[:, 1] = max(limit - 1, 0)
    data, _ = pack(weight)
    assert data.numel() == 64 * 32 * bits // 8


def test_squares_take_the_bits_of_their_roots():
    q = codes(7, 64, 32)
    weight = (q.int() * q.int().abs()).to(torch.int8)
    weight[:, 0] = 49
    data, kinds = pack(weight)
    assert data.numel() == 64 * 32 // 2
    assert torch.equal(unpack(data, kinds, (64, 32)), weight)


def test_zero_rows_take_nothing_and_the_lowest_code_is_kept():
    weight = torch.zeros(4, 100, dtype=torch.int8)
    assert pack(weight)[0].numel() == 0
    weight[2, 5] = -128
    assert torch.equal(unpack(*pack(weight), (4, 100)), weight)


def test_long_rows_are_packed_in_pieces():
    weight = codes(3, 2, CHUNK + 3)
    weight[:, 0] = 2
    assert torch.equal(unpack(*pack(weight), tuple(weight.shape)), weight)


@pytest.mark.parametrize("bits, share", [(8, 0.5), (8, 0.9), (4, 0.7), (3, 0.9)])
def test_rows_with_many_zeros_store_a_bit_for_each_and_the_others(bits, share):
    limit = (1 << (bits - 1)) - 1
    weight = codes(limit, 64, 100)
    weight[weight == 0] = 1
    weight[torch.rand(64, 100, generator=torch.Generator().manual_seed(1)) < share] = 0
    weight[:, 0], weight[:, 1] = limit, limit - 1
    data, kinds = pack(weight)
    assert data.numel() == -(-64 * 100 // 8) + -(-int((weight != 0).sum()) * bits // 8) == stored_bytes(weight) - 32
    assert torch.equal(unpack(data, kinds, tuple(weight.shape)), weight)


def test_sparse_rows_beside_dense_ones_and_the_lowest_code():
    weight = codes(127, 9, 50)
    weight[::2, 5:] = 0
    weight[4, 2] = weight[5, 2] = -128
    data, kinds = pack(weight)
    assert data.numel() < 4 * 50 + 5 * 20 and torch.equal(unpack(data, kinds, (9, 50)), weight)


def test_data_of_sparse_rows_that_do_not_fit_are_refused():
    weight = codes(127, 8, 64)
    weight[:, 4:] = 0
    data, kinds = pack(weight)
    for wrong in (data[:-1], torch.cat([data, data[:1]]), data | 255):
        with pytest.raises(ValueError):
            unpack(wrong, kinds, (8, 64))


def test_the_counted_bytes_are_the_stored_ones():
    for limit in (0, 1, 7, 63):
        weight = codes(limit, 48, 30)
        assert stored_bytes(weight) == sum(t.numel() for t in pack(weight)) and packs(weight)
    assert stored_bytes(codes(127, 48, 30)) == 48 * 30
    assert stored_bytes(torch.zeros(10, dtype=torch.int32)) == 40
    assert not packs(codes(3, 2, OVERHEAD // 4))  # a second tensor's header would cost more


@pytest.mark.parametrize(
    "shape",
    [(), (-1, 4), (3, 8), (5, 8), (4, 9), (4, 1 << 40)],
)
def test_a_shape_that_does_not_fit_is_refused(shape):
    data, kinds = pack(codes(7, 4, 8))
    with pytest.raises(ValueError):
        unpack(data, kinds, shape)


def test_kinds_that_the_data_do_not_fit_are_refused():
    data, kinds = pack(codes(7, 4, 8))
    with pytest.raises(ValueError, match="bytes of codes"):
        unpack(data, kinds | 15, (4, 8))


# ------------------------------------------------------------------------------------------------------------ artifacts


@pytest.fixture(scope="module", params=["nearest", "power"])
def saved(request, tmp_path_factory):
    model, inputs = build("residual_block")
    net = fxcompress.compile(model, "w4a8", example_inputs=inputs, weight_quantizer=request.param)
    path = tmp_path_factory.mktemp("packed") / "model.fxc"
    net.save(path)
    return path, net, inputs


def test_a_saved_network_holds_half_bytes_and_runs_the_same(saved):
    path, net, inputs = saved
    (packed,) = [t for name, t in artifact.safetensors.torch.load_file(path).items() if name.endswith(".packed")][:1]
    assert packed.dtype == torch.uint8
    products = net.report().products
    large = [p for p in products if p.weight_bytes > 400]
    assert large and all(p.stored_bytes <= 0.52 * p.weight_bytes for p in large)
    assert net.report().stored_bytes < net.report().integer_bytes
    assert torch.equal(fxcompress.load(path)(*inputs), net(*inputs))


@pytest.mark.parametrize(
    "packed",
    [None, 7, {"nothing": [1, 2]}, "the shape", "a text"],
)
def test_a_document_that_misnames_a_packed_tensor_is_refused(saved, packed, monkeypatch):
    path, _, _ = saved
    document, tensors = artifact.read(path)
    plain = artifact.dumps(document, tensors)
    stored = artifact.safetensors.torch.load(plain)
    inside = artifact._document(stored["document"], "it")
    if packed == "the shape":
        packed = {name: [1] for name in inside["packed"]}
    monkeypatch.setattr(artifact.packing, "packs", lambda t: False)  # store these tensors as they are
    tensors = {k: t for k, t in stored.items() if k != "document"}
    data = artifact.dumps(inside | {"packed": {}}, tensors)
    assert artifact.loads(data)  # what the file holds is legal, only the list is not
    monkeypatch.setattr(artifact, "_document", lambda stored, source: inside | {"packed": packed})
    with pytest.raises(ArtifactError, match="packed tensor"):
        artifact.loads(data)
