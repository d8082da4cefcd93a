"""Integer weights on disk: every row takes as many bits per code as its largest code needs, and none for zeros where that is less.

    data, kinds = pack(weight)              # int8 (O, ...): 4-bit rows 4 bits, 4 + 4-bit rows 7, rows of zeros nothing
    unpack(data, kinds, weight.shape)       # the same int8 tensor

Rows of one kind lie together, kinds in the order of ``KINDS``, codes little-endian in two's complement, each kind padded to
a byte. Rows whose codes are all signed squares q|q| (``weight_quantizer="power"``) store q. Sparse rows store a bit per code, 1 if it
is not zero, all rows of the kind together and padded to a byte, and then the codes that are not zero.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Kind(NamedTuple):
    """How a row is stored: ``bits`` of a code, ``square``: roots of the codes, ``sparse``: zeros left out."""

    bits: int
    square: bool = False
    sparse: bool = False


#: A row's kind is one of these, 4 bits of ``kinds``. -128 occurs in kinds of 8 bits only.
KINDS = (
    *(
        Kind(0),
        Kind(2),
        Kind(3),
        Kind(3, square=True),
        Kind(4),
        Kind(4, square=True),
        Kind(5),
        Kind(6),
        Kind(7),
        Kind(8),
    ),
    *(Kind(bits, sparse=True) for bits in range(3, 9)),
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
    data = [_pack_rows(rows[kinds == i], kind) for i, kind in enumerate(KINDS)]
    return torch.from_numpy(np.concatenate(data)), torch.from_numpy(_pack_codes(kinds.astype(np.int8), 4))


def _pack_rows(rows: np.ndarray, kind: Kind) -> np.ndarray:
    if kind.sparse:
        return np.concatenate([np.packbits(rows != 0, bitorder="little"), _pack_codes(rows[rows != 0], kind.bits)])
    return _pack_codes(_roots(rows) if kind.square else rows, kind.bits)


def unpack(data: Tensor, kinds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The int8 tensor of ``shape`` behind ``pack``'s result. Raises ``ValueError`` for data that cannot be one."""
    if not shape or any(n < 0 for n in shape) or math.prod(shape) > MOST:
        raise ValueError(f"packed shape {list(shape)}")
    rows, length = shape[0], math.prod(shape[1:])
    if kinds.dtype != torch.uint8 or kinds.numel() != -(-rows // 2):
        raise ValueError(f"{kinds.numel()} bytes of kinds for {rows} rows")
    of_row = _unpack_codes(kinds.numpy(), 4, rows) & 15
    if data.dtype != torch.uint8:
        raise ValueError(f"codes of {data.dtype}")
    source = _Bytes(data.numpy())
    result = np.zeros((rows, length), np.int8)
    for i, count in enumerate(np.bincount(of_row, minlength=len(KINDS)).tolist()):
        result[of_row == i] = _unpack_rows(source, KINDS[i], count * length).reshape(count, length)
    if source.left:
        raise ValueError(f"{source.left} bytes of codes too many")
    return torch.from_numpy(result.reshape(shape))


def _unpack_rows(source: _Bytes, kind: Kind, count: int) -> np.ndarray:
    """(count,) codes of all rows of a kind."""
    if not kind.sparse:
        codes = _unpack_codes(source.take(count * kind.bits), kind.bits, count)
        return codes * np.abs(codes) if kind.square else codes
    codes = np.zeros(count, np.int16)
    used = np.unpackbits(source.take(count), count=count, bitorder="little").astype(bool)
    codes[used] = _unpack_codes(source.take(int(used.sum()) * kind.bits), kind.bits, int(used.sum()))
    return codes


class _Bytes:
    """Bytes, read from the front."""

    def __init__(self, data: np.ndarray):
        self._data, self._offset = data.reshape(-1), 0

    @property
    def left(self) -> int:
        return len(self._data) - self._offset

    def take(self, bits: int) -> np.ndarray:
        """The next bytes that hold so many bits. Raises ``ValueError`` where there are fewer."""
        size = -(-bits // 8)
        if size > self.left:
            raise ValueError(f"{self.left} bytes of codes where {size} are expected")
        start, self._offset = self._offset, self._offset + size
        return self._data[start : self._offset]


def packs(tensor: Tensor) -> bool:
    """True if a saved model holds this constant packed: integer weights that get smaller by it."""
    return stored_bytes(tensor) < tensor.numel() * tensor.element_size()


def stored_bytes(tensor: Tensor) -> int:
    """What a constant takes in a saved model, headers aside."""
    plain = tensor.numel() * tensor.element_size()
    if tensor.dtype != torch.int8 or not tensor.ndim or not plain:
        return plain
    rows = tensor.reshape(tensor.shape[0], -1).numpy()
    kinds, used = _kinds(rows), (rows != 0).sum(1)
    codes = 0
    for i, kind in enumerate(KINDS):
        stored = int(used[kinds == i].sum()) if kind.sparse else int((kinds == i).sum()) * rows.shape[1]
        codes += -(-stored * kind.bits // 8)
        if kind.sparse:
            codes += -(-int((kinds == i).sum()) * rows.shape[1] // 8)
    packed = codes + -(-len(rows) // 2)
    return packed if packed + OVERHEAD < plain else plain


def _kinds(rows: np.ndarray) -> np.ndarray:
    """The kind of each row (O, K) that takes the fewest bits, the first of several: an index into ``KINDS``."""
    largest = np.maximum(rows.max(1).astype(np.int16), -rows.min(1).astype(np.int16))
    used = (rows != 0).sum(1)
    squares = np.isin(largest, _SQUARES)
    squares[squares] = np.isin(np.abs(rows[squares]), _SQUARES).all(1)
    size = np.stack([_size(kind, largest, squares, used, rows.shape[1]) for kind in KINDS])
    return size.argmin(0)


def _size(kind: Kind, largest: np.ndarray, squares: np.ndarray, used: np.ndarray, length: int) -> np.ndarray:
    """Bits of each row in a kind, infinite where its codes do not fit."""
    limit = max((1 << kind.bits >> 1) - 1, 0) if kind.bits < 8 else 128
    fits = largest <= (limit**2 if kind.square else limit)
    fits &= squares if kind.square else True
    return np.where(fits, length + used * kind.bits if kind.sparse else length * kind.bits, np.inf)


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
