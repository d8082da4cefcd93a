"""Saved models: what is written is read back; what is damaged or foreign is refused."""

import builtins
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxcompress
from fxcompress import artifact
from fxcompress.errors import ArtifactError, FxcompressError
from tests.support.artifact_mutants import mutant, outcome
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
    with pytest.raises(ArtifactError, match="version 99; expected version 3"):
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


CODE = "x: __import__('builtins').__dict__.update(fxcompress_was_here=1) = None"


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["nodes"][0].update(target=CODE),
        lambda d: d["nodes"][0].update(name=CODE),
        lambda d: d["nodes"][0].update(target="class"),
        lambda d: next(n for n in d["nodes"] if n["op"] == "call_function").update(kwargs={CODE: 1}),
        lambda d: next(n for n in d["nodes"] if n["op"] == "call_function").update(kwargs={"__class__": 1}),
    ],
)
def test_names_cannot_smuggle_code_in(saved, tmp_path, edit):
    """torch.fx writes Python source from the names in a graph."""
    rewrite(saved[0], tmp_path / "m", edit_document=edit)
    with pytest.raises(ArtifactError, match=r"graph record is malformed .*is no name"):
        fxcompress.load(tmp_path / "m")
    assert not hasattr(builtins, "fxcompress_was_here")


def test_names_of_tensors_cannot_smuggle_code_in(saved, tmp_path):
    document, tensors = artifact.read(saved[0])
    name = next(iter(tensors))
    code = CODE.replace(".", "")
    tensors[code] = tensors.pop(name)
    for node in document["nodes"]:
        if node["op"] == "get_attr" and node["target"] == name:
            node["target"] = code
    (tmp_path / "m").write_bytes(artifact.dumps(document, tensors))
    with pytest.raises(ArtifactError, match="is no name"):
        fxcompress.load(tmp_path / "m")


@pytest.fixture(scope="module")
def partly_float(tmp_path_factory):
    model, inputs = build("classifier")
    net = fxcompress.compile(model, example_inputs=inputs, keep_float=["fc"])
    path = tmp_path_factory.mktemp("saved") / "partly_float.fxc"
    net.save(path)
    return path, net, inputs


def test_parts_left_in_float_are_saved_and_loaded(partly_float):
    path, net, inputs = partly_float
    assert torch.equal(fxcompress.load(path)(*inputs), net(*inputs))


@pytest.mark.parametrize(
    "operator",
    [
        "aten.from_file.default",
        "aten.fill_.Scalar",
        "aten.rand.default",
        "aten.set_.source_Tensor",
        "os.system.default",
        "aten.relu",
        "aten.__class__.default",
    ],
)
def test_float_parts_are_functions_of_tensors(partly_float, tmp_path, operator):
    """No operator that reads a file, writes into a tensor or is none."""

    def edit(document):
        node = next(n for n in document["nodes"] if n.get("keep_float"))
        node["target"] = operator

    rewrite(partly_float[0], tmp_path / "m", edit_document=edit)
    with pytest.raises(ArtifactError, match="graph record is malformed"):
        fxcompress.load(tmp_path / "m")


def test_a_weight_of_another_size_is_refused(saved, tmp_path):
    """The kernels would read beyond it: shapes of the file's tensors are checked against each other."""
    document, tensors = artifact.read(saved[0])
    name = next(k for k, t in tensors.items() if t.dtype == torch.int32 and t.ndim == 1 and t.numel() == 8)
    tensors[name] = tensors[name][:1].clone()
    (tmp_path / "m").write_bytes(artifact.dumps(document, tensors))
    with pytest.raises(ArtifactError, match=r"bias has shape \(1,\); expected \(8,\)"):
        fxcompress.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["interface"]["inputs"][0].update(tail=[1 << 40, 1 << 40]), "malformed"),
        (lambda d: d["output_scales"].append(None), "0 and 2 scales for 1 inputs and 1 outputs"),
        (lambda d: d["nodes"][-1].update(args=[None]), "does not end in a list of outputs"),
        (lambda d: d["nodes"][-1].update(args=[[3]]), "an output is no node"),
        (lambda d: d["report"].update(certificate={}, layers=[{"no": 1}]), "malformed"),
    ],
)
def test_other_lies_are_refused(saved, tmp_path, edit, message):
    rewrite(saved[0], tmp_path / "m", edit_document=edit)
    with pytest.raises(ArtifactError, match=message):
        fxcompress.load(tmp_path / "m")


def test_a_deeply_nested_document_is_refused(saved, tmp_path, monkeypatch):
    document, tensors = artifact.read(saved[0])
    monkeypatch.setattr(
        artifact.json,
        "dumps",
        lambda value, **_: "[" * 200_000 if "nodes" in value else json.JSONEncoder().encode(value),
    )
    data = artifact.dumps(document, tensors)
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="the document of the artifact is malformed"):
        artifact.loads(data)


@pytest.mark.parametrize("name", ["residual_block", "squeeze_excite"])
def test_mutants_are_refused_or_run_right(name, tmp_path):
    """``benchmarks/fuzz_artifacts.py`` runs 10,000; native kernels under AddressSanitizer among them."""
    model, inputs = build(name)
    fxcompress.compile(model, example_inputs=inputs).save(tmp_path / "m.fxc")
    original = (tmp_path / "m.fxc").read_bytes()
    for seed in range(200):
        found = outcome(mutant(original, seed), original)
        assert seed % 2 == 0 or found != "other network", seed  # damage is never another network
