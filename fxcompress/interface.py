"""How a user's call maps to the flat graph and back.

The graph takes one float32 (or integer) tensor per tensor leaf of the example call and returns a flat tuple. An
``Interface`` turns any call of the same structure into those tensors, and the flat results into what the model returned.
It is data: names, shapes, dtypes and a nesting of tuples, lists and dicts, saved as JSON and loaded without running code.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import ArtifactError, InputError

_CONSTANTS = (type(None), bool, int, float, str)
_CAST_TO_FLOAT32 = (torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class TailShapeError(InputError):
    """An input differs from the example in its shape behind the batch only: another compilation could take it."""


@dataclass(frozen=True)
class InputLeaf:
    """One leaf of the example call.

    Attributes:
        name: its path, "x", "images[0]", "batch['mask']".
        tail: shape without the batch dimension (the full shape when not batched); None for a constant.
        dtype: "float32", "int64", ...; "" for a constant.
        batched: dimension 0 is the batch, free to change.
        value: the constant the model was captured with (None, bool, int, float, str).
    """

    name: str
    tail: tuple[int, ...] | None = None
    dtype: str = ""
    batched: bool = False
    value: object = None

    @property
    def is_tensor(self) -> bool:
        return self.tail is not None

    @property
    def shape_text(self) -> str:
        return f"({', '.join(['batch'] * self.batched + [str(n) for n in self.tail])})"


@dataclass(frozen=True)
class Interface:
    """Maps calls to flat graph inputs and flat graph outputs back.

    Attributes:
        parameters: names of the model's positional parameters, in order.
        inputs: leaves of the example call, in the order of the graph's placeholders (constants in between).
        outputs: per leaf of the result: an index into the graph's output tuple, or ``("constant", value)``.
        out_spec: nesting of the result.
    """

    parameters: tuple[str, ...]
    inputs: tuple[InputLeaf, ...]
    outputs: tuple[int | tuple[str, object], ...]
    out_spec: pytree.TreeSpec

    @functools.cached_property
    def tensor_inputs(self) -> tuple[InputLeaf, ...]:
        """The leaves that are tensors: one per placeholder of the graph."""
        return tuple(leaf for leaf in self.inputs if leaf.is_tensor)

    def flatten(self, args: tuple, kwargs: dict | None = None) -> tuple[Tensor, ...]:
        """The graph inputs of a call: CPU tensors, float ones as float32 (uint8 is passed through).

        The call may mix positional and keyword arguments differently from the example and use any batch size, 0 too.
        Raises ``TailShapeError`` when only shapes behind the batch differ, else ``InputError`` naming the argument.
        """
        if not kwargs and self._is_positional and len(args) == len(self.inputs):
            leaves = args  # the common call, without looking into containers
        else:
            leaves = self._by_name(args, kwargs or {})
        tensors = tuple([t for leaf, value in zip(self.inputs, leaves) if (t := _checked(leaf, value)) is not None])
        self._check_shapes(tensors)
        return tensors

    @functools.cached_property
    def _is_positional(self) -> bool:
        """Every leaf is a whole positional argument."""
        return tuple(leaf.name for leaf in self.inputs) == self.parameters[: len(self.inputs)]

    def _by_name(self, args: tuple, kwargs: dict) -> list[object]:
        """The leaves of a call in the order of the example's."""
        found = dict(call_leaves(self.parameters, args, kwargs))
        expected = {leaf.name for leaf in self.inputs}
        if missing := [leaf.name for leaf in self.inputs if leaf.name not in found]:
            raise _input_error(missing[0], "is missing", "the arguments of the example call: " + self._names())
        if extra := [name for name in found if name not in expected]:
            raise _input_error(extra[0], "is not an argument of the example call", self._names())
        return [found[leaf.name] for leaf in self.inputs]

    def unflatten(self, outputs: tuple) -> object:
        """The graph's flat results in the nesting the model returned them in."""
        leaves = [outputs[o] if isinstance(o, int) else o[1] for o in self.outputs]
        return pytree.tree_unflatten(leaves, self.out_spec)

    def to_dict(self) -> dict:
        """JSON-able form. Raises ``ArtifactError`` if the result holds a container other than tuple, list or dict."""
        return {
            "parameters": list(self.parameters),
            "inputs": [
                {"name": i.name, "tail": None if i.tail is None else list(i.tail), "dtype": i.dtype,
                 "batched": i.batched, "value": i.value}
                for i in self.inputs
            ],
            "outputs": [o if isinstance(o, int) else list(o) for o in self.outputs],
            "structure": _encode(pytree.tree_unflatten(list(range(len(self.outputs))), self.out_spec)),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict) -> Interface:
        """Inverse of ``to_dict``; malformed data raise ``ArtifactError``."""
        try:
            inputs = tuple(
                InputLeaf(str(i["name"]), None if i["tail"] is None else tuple(int(n) for n in i["tail"]), _known_dtype(i["dtype"]),
                          bool(i["batched"]), i["value"])
                for i in data["inputs"]
            )  # fmt: skip
            outputs = tuple(o if isinstance(o, int) else ("constant", o[1]) for o in data["outputs"])
            leaves, spec = pytree.tree_flatten(_decode(data["structure"]))
            if leaves != list(range(len(outputs))):
                raise ValueError(f"structure holds {len(leaves)} leaves for {len(outputs)} outputs")
            indices = {o for o in outputs if isinstance(o, int)}
            if indices != set(range(len(indices))):
                raise ValueError(f"outputs are numbered {sorted(indices)}")
            return cls(tuple(str(p) for p in data["parameters"]), inputs, outputs, spec)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"the interface record is malformed ({error})", stage="load") from error

    def _names(self) -> str:
        return ", ".join(leaf.name for leaf in self.inputs)

    def _check_shapes(self, tensors: tuple[Tensor, ...]) -> None:
        batch = None  # (length, the argument it was seen on)
        for leaf, tensor in zip(self.tensor_inputs, tensors):
            if tensor.ndim != len(leaf.tail) + leaf.batched:
                raise _input_error(leaf.name, f"has {tensor.ndim} dimensions", f"shape {leaf.shape_text}")
            if leaf.batched:
                batch = batch or (tensor.shape[0], leaf.name)
                if tensor.shape[0] != batch[0]:
                    raise _input_error(leaf.name, f"has batch {tensor.shape[0]}", f"batch {batch[0]} as {batch[1]} has")
        for leaf, tensor in zip(self.tensor_inputs, tensors):
            if tensor.shape[leaf.batched :] != leaf.tail:
                raise TailShapeError(f"argument {leaf.name} has shape {tuple(tensor.shape)}", stage="input",
                                     expected=f"shape {leaf.shape_text}", remedy="Pass the shape the model was compiled for.")  # fmt: skip


def as_call(example_inputs: object) -> tuple[tuple, dict]:
    """A tensor, a tuple of arguments or a dict of keyword arguments as (args, kwargs)."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def call_leaves(parameters: tuple[str, ...], args: tuple, kwargs: dict) -> list[tuple[str, object]]:
    """(path, leaf) of every leaf of a call, positional arguments named by ``parameters``; extra ones are "args[i]"."""
    named = {parameters[i] if i < len(parameters) else f"args[{i}]": value for i, value in enumerate(args)}
    if doubled := named.keys() & kwargs.keys():
        raise _input_error(sorted(doubled)[0], "is passed twice", "one positional or keyword value")
    leaves = []
    for name, value in {**named, **kwargs}.items():
        if isinstance(value, Tensor):
            leaves.append((name, value))
        else:
            leaves += [(name + pytree.keystr(path), leaf) for path, leaf in pytree.tree_leaves_with_path(value)]
    return leaves


def is_plain_constant(value: object) -> bool:
    """True for what may stand in a call beside tensors: None, bool, int, float, str."""
    return isinstance(value, _CONSTANTS)


def _checked(leaf: InputLeaf, value: object) -> Tensor | None:
    """The tensor the graph takes for this leaf; None for a constant that equals the example's."""
    if not leaf.is_tensor:
        if type(value) is not type(leaf.value) or value != leaf.value:
            raise _input_error(leaf.name, f"is {value!r}" if is_plain_constant(value) else f"is a {type(value).__name__}",
                               f"{leaf.value!r}, the value the model was captured with")  # fmt: skip
        return None
    if not isinstance(value, Tensor):
        raise _input_error(leaf.name, f"is {type(value).__name__}", f"a tensor of shape {leaf.shape_text}")
    if value.device.type != "cpu":
        raise _input_error(leaf.name, f"is on {value.device}", "a tensor on the CPU")
    if value.layout is not torch.strided:
        raise _input_error(leaf.name, f"has layout {value.layout}", "a dense tensor")
    return _cast(leaf, value.detach())


def _cast(leaf: InputLeaf, value: Tensor) -> Tensor:
    """Float to float32; integers widen; uint8 passes for a float input (codes); anything else is a mistake."""
    dtype = getattr(torch, leaf.dtype)
    if value.dtype == dtype:
        return value
    if dtype == torch.float32:
        if value.dtype in _CAST_TO_FLOAT32:
            return value.float()
        if value.dtype == torch.uint8:
            return value
    elif value.dtype in _INTEGERS and torch.can_cast(value.dtype, dtype) and value.dtype.itemsize <= dtype.itemsize:
        return value.to(dtype)
    raise _input_error(leaf.name, f"has dtype {str(value.dtype).removeprefix('torch.')}", leaf.dtype)


def _input_error(name: str, found: str, expected: str) -> InputError:
    return InputError(f"argument {name} {found}", stage="input", expected=expected,
                      remedy="Call the compiled model as the original one was called at compilation.")  # fmt: skip


def _known_dtype(name: str) -> str:
    if name not in {"", "float32", *(str(t).removeprefix("torch.") for t in _INTEGERS)}:
        raise ValueError(f"unknown dtype {name!r}")
    return name


# ------------------------------------------------------------------------------------ nesting of the result as JSON


def _encode(tree: object) -> object:
    """Leaf indices in tuples, lists, dicts and namedtuples as JSON: ["tuple", ...], ["dict", [key, value], ...].

    Dicts of any class, the results of transformers models among them, are saved as plain ones.
    """
    if isinstance(tree, int):
        return tree
    if type(tree) in (tuple, list):
        return [type(tree).__name__, *(_encode(t) for t in tree)]
    if isinstance(tree, dict) and all(isinstance(k, (str, int)) for k in tree):
        return ["dict", *([k, _encode(v)] for k, v in tree.items())]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return ["namedtuple", type(tree).__name__, *([k, _encode(v)] for k, v in zip(tree._fields, tree, strict=True))]
    raise ArtifactError(f"the model returns a {type(tree).__name__}", stage="save", expected="tuples, lists, dicts and tensors",
                        remedy="Wrap the model in a module that returns one of these.")  # fmt: skip


def _decode(data: object) -> object:
    if isinstance(data, int):
        return data
    kind, *items = data
    if kind in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[kind](_decode(i) for i in items)
    if kind == "dict":
        return {key: _decode(value) for key, value in items}
    if kind == "namedtuple":
        name, *fields = items
        return namedtuple(name, [key for key, _ in fields])(*(_decode(value) for _, value in fields))
    raise ValueError(f"unknown container {kind!r}")
