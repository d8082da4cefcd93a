"""Why ``torch.export`` failed, in the user's terms: the module, the line of their forward, and what to change there.

If the model does not even run on the example, the example is at fault (``InputError``); else the way the forward is
written is (``CaptureError``). The place is read from the traceback: the innermost frame that is neither torch nor us.
"""

from __future__ import annotations

import linecache
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import TracebackType

import torch
from torch import nn

from .errors import CaptureError, InputError, UserError
from .example_call import ExampleCall
from .meta import Origin

_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parent)


def diagnose(error: Exception, model: nn.Module, example: ExampleCall) -> UserError:
    """The error to raise for ``error``, which ``torch.export`` raised for ``model`` on ``example``."""
    try:
        check_runs(model, example)
    except InputError as own:
        return own
    place = _place(error, model)
    found, remedy = _explain(error, place)
    return CaptureError(f"torch.export failed: {found}", stage="capture", where=place.text, remedy=remedy)


def check_runs(model: nn.Module, example: ExampleCall) -> None:
    """Raise ``InputError`` if ``model`` does not run on ``example``."""
    try:
        with torch.no_grad():
            model(*example.args, **example.kwargs)
    except Exception as error:
        raise _unfit(error, model, example) from error


# ------------------------------------------------------------------------------------ the model itself does not run


#: (pattern in PyTorch's message, what to do)
_MISFITS = (
    (r"(?i)can't be greater than actual input size|output size is too small|is too small", "Pass a larger example: the network shrinks this one to nothing."),
    (r"to have \d+ channels, but got|expected input to have", "Pass the channels the model takes, channels first: (N, C, H, W)."),
    (r"\dD|dimension", "Pass one batch, as the model takes it: x[None] adds the batch dimension to a single sample."),
    (r"BFloat16|Half", "Models of half precision are computed in float32: in the forward, cast to the dtype of the weights, x.to(self.conv.weight.dtype), not to a fixed one."),
    (r"(?i)dtype|\b(long|byte|int|bool|char)\b", "Pass the dtype the model takes, usually float32; raw uint8 pixels together with input_normalization=(mean, std)."),
    (r"size mismatch|cannot be multiplied|must match the size|reduction dim", "Pass the shapes the model takes."),
    (r"^AssertionError", "The model is traced with a batch of 2 or more: allow any batch size."),
)  # fmt: skip


def _unfit(error: Exception, model: nn.Module, example: ExampleCall) -> InputError:
    shapes = ", ".join(
        f"{leaf.name} {leaf.dtype} {tuple(tensor.shape)}"
        for leaf, tensor in zip(example.tensor_leaves, example.tensors)
    )
    summary = _summary(error)
    remedy = next((r for pattern, r in _MISFITS if re.search(pattern, summary)), "Check that the model runs on it.")
    return InputError(f"the model fails on {shapes}: {summary}", stage="capture",
                      where=_place(error, model).text, remedy=remedy)  # fmt: skip


# ------------------------------------------------------------------------------- it runs, but cannot become a graph


_VALUES = r"data-dependent|GuardOnDataDependent|Could not (guard|extract)"
#: (pattern in the exporter's message, what it means, what to do)
_DIAGNOSES = (
    (r"Constraints violated|specialized|not all values of batch", "the model fixes the batch size",
     "Write the batch as x.shape[0] or -1, not as a number, and do not loop over it. If an argument is shared by all "
     "samples, pass an example whose batch differs from that argument's first dimension."),
    (r"Must provide a tree_name", "the forward takes **kwargs, whose batch torch.export cannot make dynamic",
     "Wrap the model in a module that names its keyword arguments."),
    (r"not a known type|register a pytree", "the model returns an object that is no tensor, tuple, list or dict",
     "Wrap the model in a module that returns tensors."),
    (r"\.numpy\(\)|ndarray", "the forward leaves PyTorch for NumPy", "Write it with torch operations."),
)  # fmt: skip
#: First word of a line that depends on values -> what it is, and what to write instead.
_STATEMENTS = {
    "if": (
        "branch",
        "Keep only the side that inference takes, or choose with torch.where in a submodule that keep_float names.",
    ),
    "while": ("loop", "Write a fixed number of steps."),
    "for": ("loop", "Write a fixed number of steps."),
    "assert": ("assertion", "Remove it, or check the values before the model is called."),
}
_STATEMENTS["elif"] = _STATEMENTS["if"]
_EXPRESSION = ("expression", "Replace .item(), int(), float() and bool() by tensor operations.")


def _explain(error: Exception, place: _Place) -> tuple[str, str]:
    """(what is wrong, what to do)"""
    text = f"{type(error).__name__}: {error}"
    if re.search(_VALUES, text):
        word = "if" if re.search(r"\bif\b.*\belse\b", place.line) else place.line.partition(" ")[0]
        kind, remedy = _STATEMENTS.get(word, _EXPRESSION)
        return f"the {kind} {place.line!r} depends on the values of a tensor", remedy
    for pattern, meaning, remedy in _DIAGNOSES:
        if re.search(pattern, text, re.IGNORECASE):
            return meaning, remedy
    return _summary(error), "The model itself runs: see the chained error for the operation that cannot be traced."


def _summary(error: Exception) -> str:
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first_line[:300]}".rstrip(": .")


# ------------------------------------------------------------------------------------------- the place in the model


@dataclass(frozen=True)
class _Place:
    """Module path and source line: ``text`` is "head.gate (model.py:31)", ``line`` the source text there."""

    text: str = ""
    line: str = "<unknown line>"


def _place(error: Exception, model: nn.Module) -> _Place:
    """Where in the user's program ``error`` arose: the innermost module, and the innermost line that is the user's."""
    paths = {id(module): path for path, module in model.named_modules()}
    path, source, line = "", "", "<unknown line>"
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name == "forward":
            path = paths.get(id(frame.f_locals.get("self")), path)
        file = PurePath(frame.f_code.co_filename)
        if not any(file.is_relative_to(library) for library in _LIBRARIES) and not str(file).startswith("<"):
            source = f"{file.name}:{trace.tb_lineno}"
            line = linecache.getline(str(file), trace.tb_lineno).strip() or line
        trace = trace.tb_next
    origin = Origin(path, source)
    return _Place("" if origin == Origin() else str(origin), line)
