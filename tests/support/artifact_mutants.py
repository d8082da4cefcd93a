"""Mutants of saved models, and what loading one may do.

data = mutant(original, seed)             # bytes flipped, cut or moved; or other contents under a right checksum
outcome(data, original)                   # "refused", "same" or "other network"; raises AssertionError for anything else
"""

from __future__ import annotations

import copy
import random
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import fxcompress
from fxcompress import artifact
from fxcompress.backends.reference import ReferenceBackend
from fxcompress.errors import ArtifactError, BackendError, InputError

_INTEGERS = (
    -(1 << 63),
    -(1 << 31),
    -129,
    -1,
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    255,
    256,
    4096,
    (1 << 31) - 1,
    1 << 31,
    1 << 40,
    1 << 70,
)
_TEXTS = (
    "",
    "x",
    "aten.relu.default",
    "fxcompress.conv.default",
    "aten.from_file.default",
    "class",
    "a b",
    "__class__",
    "é" * 9,
)


def mutant(original: bytes, seed: int) -> bytes:
    """Deterministic in ``seed``. Every second one is damaged, the others are rewritten and sealed with a right checksum."""
    rng = random.Random(seed)
    return _damaged(original, rng) if seed % 2 else _rewritten(original, rng)


def _damaged(original: bytes, rng: random.Random) -> bytes:
    data = bytearray(original)
    for _ in range(rng.randint(1, 3)):
        kind, at = rng.randrange(5), rng.choice([rng.randrange(len(data)), rng.randrange(min(len(data), 4096))])
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            length = rng.randint(1, 64)
            data[at : at + length] = rng.randbytes(rng.randint(0, 64))
        else:
            to = rng.randrange(len(data))
            data[to : to + 32] = data[at : at + 32]
        if not data:
            break
    return bytes(data)


def _rewritten(original: bytes, rng: random.Random) -> bytes:
    document, tensors = artifact.loads(original)
    document, tensors = copy.deepcopy(document), dict(tensors)
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.35:
            _mutate_tensor(tensors, rng)
        else:
            part = rng.choice(["nodes"] * 6 + ["interface", "report", "input_scales", "output_scales"])
            document[part] = _mutate(document[part], rng)
    return artifact.dumps(document, tensors)


def _mutate(value: object, rng: random.Random) -> object:
    """One leaf or container somewhere inside ``value``, changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.06:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.06:
            return {(rng.choice(_TEXTS) if k == key else k): v for k, v in value.items()}
        return value | {key: _mutate(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        i, kind = rng.randrange(len(value)), rng.random()
        if kind < 0.06:
            return value[:i] + value[i + 1 :]
        if kind < 0.12:
            return [*value[:i], value[i], *value[i:]]
        if kind < 0.18:
            j = rng.randrange(len(value))
            return [value[j] if k == i else value[i] if k == j else v for k, v in enumerate(value)]
        return [*value[:i], _mutate(value[i], rng), *value[i + 1 :]]
    return _leaf(value, rng)


def _leaf(value: object, rng: random.Random) -> object:
    if isinstance(value, int) and rng.random() < 0.7:
        return rng.choice([value + 1, value - 1, -value, 2 * value, *_INTEGERS])
    if isinstance(value, str) and rng.random() < 0.7:
        return rng.choice([value + "_", value[:-1], value[::-1], *_TEXTS])
    return rng.choice([None, True, 0, 1, -1, [], {}, [0], [[]], {"node": "x"}, {"float": "inf"}, 1.5, *_TEXTS])


def _mutate_tensor(tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    value, kind = tensors[name], rng.randrange(7)
    if kind == 0 and value.numel():
        flat = value.clone().reshape(-1)
        limits = torch.iinfo(flat.dtype) if not flat.is_floating_point() else torch.finfo(flat.dtype)
        flat[rng.randrange(len(flat))] = rng.choice([limits.min, limits.max, 0, 1])
        tensors[name] = flat.reshape(value.shape)
    elif kind == 1:
        tensors[name] = value.reshape(-1)[: rng.randint(0, value.numel())].clone()
    elif kind == 2:
        tensors[name] = torch.cat([value.reshape(-1)] * 2)
    elif kind == 3:
        tensors[name] = value.reshape(-1).reshape(rng.choice([(1, -1), (-1, 1), (-1,)]) if value.numel() else (0,))
    elif kind == 4:
        tensors[name] = value.to(
            rng.choice([torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.float64])
        )
    elif kind == 5:
        tensors[rng.choice(["", "a b", "__class__", "forward", "class", "x.y", "new"])] = tensors.pop(name)
    else:
        tensors[name] = tensors[rng.choice(sorted(tensors))]


def outcome(data: bytes, original: bytes, rng_seed: int = 0) -> str:
    """Load and run ``data``.

    "refused": an ``ArtifactError`` (or the native backend cannot plan it); "same": the original network; "other network": a sealed file that
    holds a legal network, whose native outputs are bit for bit the reference's. Any other exception or difference is an AssertionError.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.fxc"
        path.write_bytes(data)
        try:
            network = fxcompress.load(path)
        except (ArtifactError, BackendError):
            return "refused"
    generator = torch.Generator().manual_seed(rng_seed)
    inputs = []
    for node in network.graph_module.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        shape = [d if isinstance(d, int) else 3 for d in value.shape]
        inputs.append(
            torch.randn(shape, generator=generator)
            if value.is_floating_point()
            else torch.randint(0, 4, shape, generator=generator).to(value.dtype)
        )
    program = network._first.program
    try:
        expected = ReferenceBackend().lower(network.graph_module).run(*inputs)
    except (RuntimeError, IndexError, InputError) as error:
        expected = error
    try:
        found = program.run(*inputs)
    except (InputError, BackendError, MemoryError, IndexError) as error:
        found = error
    if isinstance(expected, Exception) or isinstance(found, Exception):
        assert isinstance(expected, Exception) and isinstance(found, Exception), (expected, found)
    else:
        for a, b in zip(expected, found, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b), "native and reference differ"
    whole, kept = artifact.loads(data), artifact.loads(original)
    same = (
        whole[0] == kept[0]
        and whole[1].keys() == kept[1].keys()
        and all(torch.equal(whole[1][k], kept[1][k]) for k in kept[1])
    )
    return "same" if same else "other network"
