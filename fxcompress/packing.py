"""Narrow weights on disk: every row takes as many bits per code as its largest code needs.

    data, kinds = pack(weight)              # int8 (O, ...): 4-bit rows 4 bits, 4 + 4-bit rows 7, rows of zeros nothing
    unpack(data, kinds, weight.shape)       # the same int8 tensor

Rows of one kind lie together, kinds in the order of ``KINDS``, codes little-endian in two's complement, each kind padded to
a byte. Rows whose codes are all signed squares q|q| (``weight_quantizer="power"``) store q.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

#: (bits of a code, squares?); a row's kind is one of these, 4 bits of ``kinds``. -128 occurs in the last one only.
KINDS = (
    (0, False),
    (2, False),
    (3, False),
    (3, True),
    (4, False),
    (4, True),
    (5, False),
    (6, False),
    (7, False),
    (8, False),
)
CHUNK = 1 << 20  # codes expanded to bits at a time: a multiple of 8, so chunks of any width end at a byte
#: Bytes that a second tensor costs in the file's header: smaller savings are none.
OVERHEAD = 128
MOST = 1 << 31  # elements: a damaged shape must not fill the memory with rows of zeros
_SQUARES = np.arange(8, dtype=np.int16) ** 2


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(data, kinds) uint8 of an int8 tensor that is not empty and has at least one dimension."""
    rows = weight.reshape(weight.shape[0], -1).numpy()
    kinds = _kinds(rows)
    data = [_pack_codes(_roots(rows[kinds == i]) if square else rows[kinds == i], bits)
            for i, (bits, square) in enumerate(KINDS)]  # fmt: skip
    return torch.from_numpy(np.concatenate(data)), torch.from_numpy(_pack_codes(kinds.astype(np.int8), 4))


def unpack(data: Tensor, kinds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The int8 tensor of ``shape`` behind ``pack``'s result. Raises ``ValueError`` for data that cannot be one."""
    if not shape or any(n < 0 for n in shape) or math.prod(shape) > MOST:
        raise ValueError(f"packed shape {list(shape)}")
    rows, length = shape[0], math.prod(shape[1:])
    if kinds.dtype != torch.uint8 or kinds.numel() != -(-rows // 2):
        raise ValueError(f"{kinds.numel()} bytes of kinds for {rows} rows")
    of_row = _unpack_codes(kinds.numpy(), 4, rows) & 15
    if rows and of_row.max() >= len(KINDS):
        raise ValueError("an unknown kind of row")
    counts = np.bincount(of_row, minlength=len(KINDS)).tolist()
    sizes = [-(-count * length * bits // 8) for count, (bits, _) in zip(counts, KINDS, strict=True)]
    if data.dtype != torch.uint8 or data.numel() != sum(sizes):
        raise ValueError(f"{data.numel()} bytes of codes, expected {sum(sizes)}")
    result, offset = np.zeros((rows, length), np.int8), 0
    for i, (bits, square) in enumerate(KINDS):
        codes = _unpack_codes(data.numpy()[offset : offset + sizes[i]], bits, counts[i] * length)
        result[of_row == i] = (codes * np.abs(codes) if square else codes).reshape(counts[i], length)
        offset += sizes[i]
    return torch.from_numpy(result.reshape(shape))


def packs(tensor: Tensor) -> bool:
    """True if a saved model holds this constant packed: integer weights that get smaller by it."""
    return stored_bytes(tensor) < tensor.numel() * tensor.element_size()


def stored_bytes(tensor: Tensor) -> int:
    """What a constant takes in a saved model, headers aside."""
    plain = tensor.numel() * tensor.element_size()
    if tensor.dtype != torch.int8 or not tensor.ndim or not plain:
        return plain
    rows = tensor.reshape(tensor.shape[0], -1).numpy()
    counts = np.bincount(_kinds(rows), minlength=len(KINDS)).tolist()
    codes = sum(-(-count * rows.shape[1] * bits // 8) for count, (bits, _) in zip(counts, KINDS, strict=True))
    packed = codes + -(-len(rows) // 2)
    return packed if packed + OVERHEAD < plain else plain


def _kinds(rows: np.ndarray) -> np.ndarray:
    """The narrowest kind of each row (O, K): an index into ``KINDS``."""
    largest = np.maximum(rows.max(1).astype(np.int16), -rows.min(1).astype(np.int16))
    squares = np.isin(largest, _SQUARES)
    squares[squares] = np.isin(np.abs(rows[squares]), _SQUARES).all(1)
    kinds = np.full(len(rows), len(KINDS) - 1)
    for i, (bits, square) in reversed(list(enumerate(KINDS[:-1]))):
        limit = max((1 << bits >> 1) - 1, 0)
        kinds[(largest <= (limit**2 if square else limit)) & (squares if square else True)] = i
    return kinds


def _roots(rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(_SQUARES, np.abs(rows)).astype(np.int8) * np.sign(rows)


def _pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    codes = codes.reshape(-1)
    place = np.arange(bits, dtype=np.int8)
    chunks = [((codes[i : i + CHUNK, None] >> place) & 1).astype(np.uint8) for i in range(0, len(codes), CHUNK)]
    return np.concatenate([np.packbits(c, bitorder="little") for c in chunks] or [np.zeros(0, np.uint8)])


def _unpack_codes(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """(count,) int16 in two's complement of ``bits``."""
    result = np.zeros(count, np.int16)
    weights = np.array([1 << i for i in range(bits)], np.int16)
    if bits:
        weights[-1] *= -1
    for i in range(0, count if bits else 0, CHUNK):
        n = min(CHUNK, count - i)
        part = data[i * bits // 8 : -(-(i + n) * bits // 8)]
        result[i : i + n] = np.unpackbits(part, count=n * bits, bitorder="little").reshape(n, bits) @ weights
    return result
