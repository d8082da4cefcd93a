"""ctypes structures and the arrays they point to, as C99 definitions of constants.

definitions = Definitions(constants)
name = definitions.struct(step.params, "conv2d")          # "conv2d_params": what it points to is defined before it
print(definitions.text())
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..native import structs
from ..native.constants import Constants

_TYPES = {mirror: name for name, mirror in structs.STRUCTS.items()}
_SCALARS = {"i1": "int8_t", "u1": "uint8_t", "i2": "int16_t", "i4": "int32_t", "i8": "int64_t"}
_POINTER_BYTES = 4  # of the 32-bit processors that flash is counted for
_WIDTH = 118


@dataclass(eq=False)
class _Array:
    """A constant array; one that another starts with is stored once (``host``)."""

    values: np.ndarray
    host: _Array | None = None
    name: str = ""
    is_weight: bool = False

    @property
    def owner(self) -> _Array:
        return self.host.owner if self.host else self

    @property
    def text(self) -> str:
        kind = _SCALARS[self.values.dtype.str[1:]]
        return f"static const {kind} {self.name}[{len(self.values)}] = {{\n{wrapped(self.values)}}};\n"


class Definitions:
    """Names and text of all constants of one plan."""

    def __init__(self, constants: Constants):
        self._arrays = {values.ctypes.data: _Array(values) for values in constants.arrays() if len(values)}
        self._names: set[str] = set()
        self._structs: dict[str, str] = {}  # text behind the name -> name
        self._texts: list[str] = []
        self.parameter_bytes = 0
        for arrays in _by_type(self._arrays.values()):
            _share(arrays)

    def address(self, address: int, hint: str, is_weight: bool = False) -> str:
        """A C expression for ``address`` inside a constant; an array without a name gets one like ``hint``."""
        start = max(a for a in self._arrays if a <= address)
        array = self._arrays[start].owner
        offset = (address - start) // array.values.itemsize
        if not array.name:
            array.name = self._unused(hint)
        array.is_weight |= is_weight
        return f"{array.name} + {offset}" if offset else array.name

    def struct(self, value: ctypes.Structure, hint: str) -> str:
        """The name of a constant with this value."""
        return self._define(type(value), self._fields(value, hint), f"{hint}_params")

    def text(self) -> str:
        """Arrays first, then the structures that point to them."""
        return "\n".join([a.text for a in self._used()] + self._texts)

    def bytes(self, weights: bool) -> int:
        """Of the arrays that are weights, or of the others (biases, multipliers, tables)."""
        return sum(a.values.nbytes for a in self._used() if a.is_weight == weights)

    def _used(self) -> Iterator[_Array]:
        return (a for a in self._arrays.values() if a.name)

    def _unused(self, hint: str) -> str:
        name, number = hint, 1
        while name in self._names:
            number += 1
            name = f"{hint}_{number}"
        self._names.add(name)
        return name

    def _define(self, kind: type, initializer: str, hint: str, count: int = 0) -> str:
        size = f"[{count}]" if count else ""
        key = f"{_TYPES[kind]}{size} {initializer}"
        if key not in self._structs:
            self._structs[key] = name = self._unused(hint)
            self._texts.append(f"static const {_TYPES[kind]} {name}{size} = {initializer};\n")
            self.parameter_bytes += _layout(kind)[0] * max(count, 1)
        return self._structs[key]

    def _fields(self, value: ctypes.Structure, hint: str) -> str:
        """Initializer without the fields that are 0."""
        parts = []
        for name, kind in value._fields_:
            text = self._value(kind, getattr(value, name), f"{hint}_{name}", value)
            if text is not None:
                parts.append(f".{name} = {text}")
        return "{" + ", ".join(parts) + "}"

    def _value(self, kind: type, value, hint: str, owner: ctypes.Structure) -> str | None:
        """None for zero."""
        if isinstance(value, ctypes.Array):
            items = [self._value(kind._type_, v, f"{hint}{i}", owner) for i, v in enumerate(value)]
            while items and items[-1] is None:
                items.pop()
            zero = "{0}" if issubclass(kind._type_, ctypes.Array) else "0"
            return "{" + ", ".join(i or zero for i in items) + "}" if items else None
        if isinstance(value, ctypes.Structure):
            return self._fields(value, hint)
        if not value:
            return None
        if isinstance(value, ctypes._Pointer):
            return self._pointer(kind._type_, value, hint, owner)
        return self.address(value, hint) if kind is ctypes.c_void_p else str(value)

    def _pointer(self, kind: type, pointer, hint: str, owner: ctypes.Structure) -> str:
        if kind is structs.Branch:
            branches = [self._fields(pointer[i], f"{hint}{i}") for i in range(owner.branches)]
            return self._define(kind, "{" + ", ".join(branches) + "}", hint, len(branches))
        if issubclass(kind, ctypes.Structure):
            return "&" + self._define(kind, self._fields(pointer.contents, hint), hint)
        return self.address(ctypes.cast(pointer, ctypes.c_void_p).value, hint, hint.endswith("_weight"))


def _by_type(arrays) -> list[list[_Array]]:
    groups: dict[str, list[_Array]] = {}
    for array in arrays:
        groups.setdefault(array.values.dtype.str, []).append(array)
    return list(groups.values())


def _share(arrays: list[_Array]) -> None:
    """An array that another one starts with is that one: zeros of 16 channels are zeros of 64."""
    ordered = sorted(((a.values.tobytes(), a) for a in arrays), key=lambda pair: pair[0])
    for (start, array), (whole, longer) in itertools.pairwise(ordered):
        if whole.startswith(start):
            array.host = longer


def wrapped(values: np.ndarray | Tensor) -> str:
    """The integers of an array as lines of C."""
    lines, line = [], ""
    for text in map(_literal, values.flatten().tolist()):
        if len(line) + len(text) + 2 > _WIDTH:
            lines.append(line)
            line = ""
        line += text + ", "
    return "".join(f"  {part.rstrip()}\n" for part in [*lines, line])


def _literal(value: int) -> str:
    """-2^31 and -2^63 have no literal of their own in C; beyond 32 bits the type has to be said."""
    if value in (-(2**31), -(2**63)):
        return "INT32_MIN" if value == -(2**31) else "INT64_MIN"
    return str(value) if abs(value) < 1 << 31 else f"INT64_C({value})"


def _layout(kind) -> tuple[int, int]:
    """(size, alignment) of a C type where pointers have 32 bits."""
    if issubclass(kind, ctypes.Array):
        size, alignment = _layout(kind._type_)
        return size * kind._length_, alignment
    if issubclass(kind, ctypes._Pointer) or kind is ctypes.c_void_p:
        return _POINTER_BYTES, _POINTER_BYTES
    if not issubclass(kind, ctypes.Structure):
        return ctypes.sizeof(kind), ctypes.sizeof(kind)
    size, widest = 0, 1
    for _, field in kind._fields_:
        length, alignment = _layout(field)
        size = -(-size // alignment) * alignment + length
        widest = max(widest, alignment)
    return -(-size // widest) * widest, widest
