"""Saved models: what is written is read back; what is damaged or foreign is refused."""

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxcompress
from fxcompress import artifact
from fxcompress.errors import ArtifactError, FxcompressError
from tests.support.graphs import build


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, inputs = build("residual_block")
    net = fxcompress.compile(model, example_inputs=inputs)
    path = tmp_path_factory.mktemp("saved") / "model.fxc"
    net.save(path)
    return path, net, inputs


def test_the_file_is_plain_safetensors(saved):
    path, net, _ = saved
    tensors = safetensors.torch.load_file(path)
    assert set(tensors) - {"document"} == {n.target for n in net.graph_module.graph.nodes if n.op == "get_attr"}


def test_saving_is_deterministic(saved, tmp_path):
    path, net, _ = saved
    net.save(tmp_path / "again.fxc")
    assert (tmp_path / "again.fxc").read_bytes() == path.read_bytes()


def test_saving_a_loaded_model_gives_the_same_bits(saved, tmp_path):
    path, _, inputs = saved
    loaded = fxcompress.load(path)
    loaded.save(tmp_path / "again.fxc")
    assert torch.equal(fxcompress.load(tmp_path / "again.fxc")(*inputs), loaded(*inputs))


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"cannot read .*No such file"):
        fxcompress.load(tmp_path / "nothing.fxc")
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(ArtifactError, match="was not written by fxcompress"):
        fxcompress.load(other)
    (tmp_path / "text").write_text("not a model")
    with pytest.raises(ArtifactError, match="not a readable model file"):
        fxcompress.load(tmp_path / "text")


def rewrite(path, target, edit_meta=None, edit_document=None):
    """A copy of a saved model with changed metadata or document; the checksum is made right again."""
    document, tensors = artifact.read(path)
    if edit_document:
        edit_document(document)
    data = artifact.dumps(document, tensors)
    if edit_meta:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        stamp = json.loads(header["__metadata__"]["fxcompress"])
        edit_meta(stamp)
        header["__metadata__"]["fxcompress"] = json.dumps(stamp)
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + data[8 + size :]
    target.write_bytes(data)


def test_another_version_is_refused(saved, tmp_path):
    rewrite(saved[0], tmp_path / "m", edit_meta=lambda stamp: stamp.update(version=99))
    with pytest.raises(ArtifactError, match="version 99; expected version 2"):
        fxcompress.load(tmp_path / "m")


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["nodes"][3].update(target="os.system"),
        lambda d: d["nodes"].insert(
            3, {"name": "x9", "op": "call_function", "target": "aten.system.default", "args": []}
        ),
        lambda d: d["nodes"].insert(3, {"name": "x9", "op": "call_method", "target": "numpy", "args": []}),
        lambda d: d["nodes"].insert(3, {"name": "x9", "op": "get_attr", "target": "nothing"}),
        lambda d: d["nodes"][-1].update(args=[[{"node": "nobody"}]]),
        lambda d: d["nodes"][-1].update(args=[[{"import": "os"}]]),
        lambda d: d.pop("interface"),
        lambda d: d.update(nodes=7),
        lambda d: d["report"].pop("layers"),
        lambda d: d["interface"].update(outputs=[0, 1, 2]),
    ],
)
def test_a_document_that_names_anything_unknown_is_refused(saved, tmp_path, edit):
    """Even with a right checksum: only operators of the dialects are looked up, nothing is imported or called."""
    rewrite(saved[0], tmp_path / "m", edit_document=edit)
    with pytest.raises(ArtifactError):
        fxcompress.load(tmp_path / "m")


@given(st.data())
def test_damaged_bytes_are_refused_or_harmless(saved, data):
    """Any flipped byte: an ArtifactError, never another exception and never another answer."""
    path, _, _ = saved
    original = path.read_bytes()
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        damaged[position] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    try:
        document, tensors = artifact.loads(bytes(damaged))
    except FxcompressError as error:
        assert isinstance(error, ArtifactError)
    else:
        expected, kept = artifact.loads(original)
        assert document == expected and all(torch.equal(tensors[k], kept[k]) for k in kept)
