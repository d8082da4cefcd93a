"""Saved models: one safetensors file, data only. Loading executes no code: operators are looked up in the dialects, names are identifiers
(``torch.fx`` writes Python from them), and operators of ``keep_float`` parts are functions of tensors. A checksum tells damage; against a file
made on purpose the graph is proven again before it runs (``CompiledModule.load``).

Layout: the tensors of the integer graph, int8 weights of fewer bits packed (``packing.py``); the tensor ``document`` (uint8): zlib-compressed
JSON with the graph, the calling interface, the scales of integer outputs, the shapes of packed tensors and the report; and in the header's metadata one entry ``fxcompress``: JSON with
the format's version and a SHA-256 over every tensor's name, dtype, shape and bytes. (One entry, because the order of
several is not deterministic.)
"""

from __future__ import annotations

import hashlib
import json
import keyword
import zlib
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx

from . import packing
from .dialects import INDEXING, level_targets
from .errors import ArtifactError
from .graph import constant
from .meta import META_KEY, Origin, TensorMeta, place, tensor_meta
from .rewrite import Level

FORMAT, VERSION = "fxcompress", 3
DOCUMENT = "document"
PACKED, KINDS = ".packed", ".kinds"  # suffixes of the two tensors that stand for a packed one
MAX_DOCUMENT = 1 << 28  # bytes of JSON: a damaged file must not fill the memory
#: Operators without a tensor among their arguments that float parts may call; others read files or random numbers.
_FACTORIES = frozenset({"arange", "full", "linspace", "ones", "scalar_tensor", "zeros"})
#: What malformed data raise on the way into tensors and graphs.
_MALFORMED = (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, RecursionError)
_OPERATORS = {str(t): t for t in level_targets(Level.INTEGER) | level_targets(Level.FLOAT) | INDEXING}
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float64, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool)
}


def dumps(document: dict, tensors: dict[str, Tensor]) -> bytes:
    """The bytes of an artifact."""
    packed = {name: list(t.shape) for name, t in tensors.items() if packing.packs(t)}
    document = document | {"packed": packed}
    for name in packed:
        data, kinds = packing.pack(tensors[name])
        tensors = {k: t for k, t in tensors.items() if k != name} | {name + PACKED: data, name + KINDS: kinds}
    text = zlib.compress(json.dumps(document, sort_keys=True, separators=(",", ":")).encode(), 9)
    tensors = tensors | {DOCUMENT: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    tensors = {name: t.contiguous().clone() for name, t in sorted(tensors.items())}  # the format refuses shared memory
    stamp = json.dumps({"version": VERSION, "checksum": _checksum(tensors)})
    return safetensors.torch.save(tensors, metadata={FORMAT: stamp})


def loads(data: bytes, source: str = "the artifact") -> tuple[dict, dict[str, Tensor]]:
    """(document, tensors) of ``dumps``. Raises ``ArtifactError`` for anything truncated, changed or foreign."""
    try:
        tensors = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        stamps = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
        stamp = json.loads(stamps[FORMAT]) if FORMAT in stamps else None
    except (safetensors.SafetensorError, *_MALFORMED, OverflowError) as error:
        raise ArtifactError(f"{source} is not a readable model file ({error})", stage="load",
                            remedy="Save it again with CompiledModule.save.") from error  # fmt: skip
    if not isinstance(stamp, dict):
        raise ArtifactError(
            f"{source} was not written by fxcompress", stage="load", remedy="Load files made by CompiledModule.save."
        )
    if stamp.get("version") != VERSION:
        raise ArtifactError(f"{source} has version {stamp.get('version')}", stage="load", expected=f"version {VERSION}",
                            remedy="Compile the model again with this release.")  # fmt: skip
    if DOCUMENT not in tensors or stamp.get("checksum") != _checksum(tensors):
        raise ArtifactError(
            f"{source} is damaged: its checksum does not match", stage="load", remedy="Copy or save it again."
        )
    document = _document(tensors.pop(DOCUMENT), source)
    return document, _unpacked(tensors, document.pop("packed", None), source)


def _unpacked(tensors: dict[str, Tensor], packed: object, source: str) -> dict[str, Tensor]:
    """The tensors with those that ``packed`` lists, {name: shape}, in place of the packed ones."""
    try:
        for name, shape in packed.items():
            tensors[name] = packing.unpack(tensors.pop(name + PACKED), tensors.pop(name + KINDS), tuple(shape))
    except _MALFORMED as error:
        raise ArtifactError(
            f"a packed tensor of {source} is malformed ({error})", stage="load", remedy="Save the model again."
        ) from error
    return tensors


def _document(packed: Tensor, source: str) -> dict:
    try:
        document = json.loads(zlib.decompressobj().decompress(packed.numpy().tobytes(), MAX_DOCUMENT))
    except (zlib.error, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"the document of {source} is malformed ({error})", stage="load", remedy="Save the model again."
        ) from error
    if not isinstance(document, dict):
        raise ArtifactError(
            f"the document of {source} is a {type(document).__name__}", stage="load", remedy="Save the model again."
        )
    return document


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        data = Path(path).read_bytes()
    except (OSError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"it is a {type(path).__name__}"
        raise ArtifactError(f"cannot read {path}: {reason}", stage="load", expected="the path of a file that CompiledModule.save wrote",
                            remedy="Check the path.") from error  # fmt: skip
    return loads(data, str(path))


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy() if t.numel() else b"")
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ graph as data


def encode_graph(gm: fx.GraphModule) -> tuple[list[dict], dict[str, Tensor]]:
    """(nodes, constants) of a graph over the closed dialects."""
    nodes, tensors = [], {}
    for node in gm.graph.nodes:
        entry = {"name": node.name, "op": node.op}
        if node.op == "get_attr":
            tensors[node.target] = constant(gm, node)
            entry["target"] = node.target
        else:
            entry["target"] = str(node.target)
            entry["args"] = _encode(node.args)
            entry["kwargs"] = {k: _encode(v) for k, v in node.kwargs.items()}
        if node.op == "call_function" and node.meta.get("keep_float"):
            _check_saves(node)
        origin = tensor_meta(node).origin
        if origin.module or origin.source:
            entry["origin"] = [origin.module, origin.source]
        if node.meta.get("keep_float"):
            entry["keep_float"] = True
        nodes.append(entry)
    return nodes, tensors


def _check_saves(node: fx.Node) -> None:
    """A ``keep_float`` operator that would not be loaded again is not saved."""
    try:
        _known_operator(str(node.target), keep_float=True)
    except (KeyError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{node.target} cannot be saved: it is no function of tensors in ATen", stage="save", where=place(node),
                            remedy="Keep a smaller part of the model in float.") from error  # fmt: skip


def _known_operator(name: str, keep_float: bool):
    """The overload of that name, in the dialects, or in ATen for ``keep_float`` parts. Raises ``KeyError`` for any other."""
    return _OPERATORS[name] if name in _OPERATORS else _aten_operator(name) if keep_float else _OPERATORS[name]


def decode_graph(nodes: list[dict], tensors: dict[str, Tensor]) -> fx.GraphModule:
    """Inverse of ``encode_graph``; unknown operators or references raise ``ArtifactError``."""
    root, graph, known = torch.nn.Module(), fx.Graph(), {}
    try:
        for name, tensor in tensors.items():
            root.register_buffer(_identifier(name), tensor)
        for entry in nodes:
            target = entry["target"]
            if entry["op"] == "call_function":
                target = _known_operator(target, bool(entry.get("keep_float")))
            if entry["op"] == "get_attr" and target not in tensors:
                raise KeyError(target)
            if entry["op"] not in ("placeholder", "get_attr", "call_function", "output"):
                raise KeyError(entry["op"])
            if entry["op"] == "placeholder":
                target = _identifier(target)
            args = _decode(entry.get("args", []), known)
            kwargs = {_identifier(k): _decode(v, known) for k, v in entry.get("kwargs", {}).items()}
            node = graph.create_node(entry["op"], target, tuple(args), kwargs, name=_identifier(entry["name"]))
            node.meta[META_KEY] = TensorMeta(origin=Origin(*entry.get("origin", ("", ""))))
            if entry.get("keep_float"):
                node.meta["keep_float"] = True
            known[entry["name"]] = node
        _check_output(graph)
        gm = fx.GraphModule(root, graph)
        gm.graph.lint()
    except _MALFORMED as error:
        raise ArtifactError(
            f"the graph record is malformed ({error!r})", stage="load", remedy="Save the model again."
        ) from error
    return gm


def _check_output(graph: fx.Graph) -> None:
    """One output, the last node, a list of nodes."""
    *inner, last = graph.nodes
    if last.op != "output" or any(n.op == "output" for n in inner) or not isinstance(last.args[0], list | tuple):
        raise ValueError("the graph does not end in a list of outputs")
    if not all(isinstance(a, fx.Node) for a in last.args[0]):
        raise ValueError("an output is no node")


def _identifier(name: object) -> str:
    """A name that may stand in the Python code that ``torch.fx`` writes for a graph."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("__"):
        raise ValueError(f"{name!r} is no name")
    return name


def _aten_operator(name: str):
    """A ``keep_float`` operator: an ATen overload, "aten.softmax.int", that computes tensors from tensors and changes nothing."""
    namespace, packet, overload = name.split(".")
    if namespace != "aten" or not _identifier(packet) or not _identifier(overload):
        raise KeyError(name)
    found = getattr(getattr(torch.ops.aten, packet), overload)
    schema = found._schema
    if schema.is_mutable or (not any("Tensor" in str(a.type) for a in schema.arguments) and packet not in _FACTORIES):
        raise KeyError(name)
    return found


def _encode(value):
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise ArtifactError(f"a graph argument of type {type(value).__name__} cannot be saved", stage="save")


def _decode(value, known: dict[str, fx.Node]):
    if isinstance(value, list):
        return [_decode(v, known) for v in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "node":
            return known[content]
        return float.fromhex(content) if kind == "float" else _DTYPES[content]
    return value
