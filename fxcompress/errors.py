"""Every exception fxcompress raises on purpose.

A message has five fields, in this order:  ``stage: where: found; expected ... . remedy``

* stage: the pass or the step of ``compile`` that noticed,
* where: node, module path and source line in the user's model,
* found: what is wrong, with the numbers,
* expected: what would have been right (may be empty),
* remedy: what the reader should do.

``UserError`` subclasses are the caller's to fix. ``InternalError`` subclasses are ours: a pass or a backend
broke a contract, and the message asks for a reproducer. docs/errors.md is generated from the docstrings below, which
say what an error means, its cause and its fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxcompressError(Exception):
    """Base of all fxcompress errors.

    Args:
        found: what is wrong, in one clause.
        stage: name of the pass or step ("fold_batch_norm", "capture").
        where: place in the user's model ("layer2.0.bn1 (model.py:31)").
        expected: what would have been accepted.
        remedy: what to do about it, one sentence.
    """

    def __init__(self, found: str, *, stage: str = "", where: str = "", expected: str = "", remedy: str = ""):
        self.found, self.stage, self.where, self.expected, self.remedy = found, stage, where, expected, remedy
        super().__init__(self._message())

    def _message(self) -> str:
        head = ": ".join(part for part in (self.stage, self.where, self.found) if part)
        if self.expected:
            head += f"; expected {self.expected}"
        head = head.rstrip(".") + "."
        return f"{head} {self.remedy}".rstrip()

    def __reduce__(self):
        return _rebuild_error, (type(self), self.found, self.stage, self.where, self.expected, self.remedy)


def _rebuild_error(cls, found, stage, where, expected, remedy):
    return cls(found, stage=stage, where=where, expected=expected, remedy=remedy)


class UserError(FxcompressError):
    """Something the caller can fix. The message says how."""


class OptionError(UserError, ValueError):
    """An option of ``compile`` is unknown, out of range, or contradicts another one.

    Cause: A misspelled name, a target outside 2 to 8 bits, an impossible ``input_range``, an option that would have no effect.
    Fix: Use the value the message names; unknown names come with the nearest known one.
    """


class ModelError(UserError, ValueError):
    """The model cannot be compiled as it is.

    Cause: Training mode, NaN or Inf weights, batch norm without running statistics, a wrapper or a file name instead of the model.
    Fix: Prepare the model as for inference: ``model.eval()``, trained float weights, the plain module.
    """


class CaptureError(UserError, RuntimeError):
    """``torch.export`` could not turn the forward into a graph, though the model runs. The cause is chained.

    Cause: Branches, loops or sizes that depend on the values of a tensor, a fixed batch size, state that the forward writes.
    Fix: Change the line the message names; of a branch, keep the side that inference takes.
    """


class UnsupportedOperatorError(UserError, NotImplementedError):
    """Operators of the model have no integer form; all of them are listed at once.

    Cause: The network computes something outside the float dialect (``fxcompress/dialects.py``).
    Fix: ``keep_float=[...]`` with the modules named, or another spelling of the same function.
    """


class InputError(UserError, ValueError):
    """A tensor passed to ``compile`` or to the compiled model does not fit.

    Cause: Wrong count, rank, shape, dtype or device; NaN; an example on which the model itself fails.
    Fix: Pass what the original model takes.
    """


class CalibrationError(UserError, ValueError):
    """Calibration data are missing, empty, or do not fit the model.

    Cause: A generator that is used up, another preprocessing, a dataset instead of a loader, or a network whose ranges need data.
    Fix: Pass about 100 typical inputs, preprocessed like the inputs of the model.
    """


class ArtifactError(UserError, ValueError):
    """A saved model cannot be read, or a compiled one cannot be saved.

    Cause: The file is truncated, changed, from another version or another program; the path is wrong.
    Fix: Copy the file again, or compile and save the model again with this release.
    """


class PipelineError(UserError, ValueError):
    """The list of passes is not legal.

    Cause: An unknown or duplicate name, an object that is no pass, an order that the declared facts forbid.
    Fix: Edit the list that ``default_passes(target)`` returns, by name.
    """


class BackendError(UserError, RuntimeError):
    """A backend cannot run here.

    Cause: Its library was not built or does not load.
    Fix: Build it, or name another backend.
    """


class InternalError(FxcompressError, RuntimeError):
    """fxcompress broke one of its own contracts."""

    def _message(self) -> str:
        return (
            super()._message() + " This is a bug in the pass or in fxcompress: please report it with the debug folder."
        )


class PassContractError(InternalError):
    """A pass broke its promise.

    Cause: An EXACT pass changed the function, a rewrite left stale statistics, a parameter was written into, a pass never finishes.
    Fix: In a pass of your own, correct it at the node named; otherwise report it.
    """


class LevelError(InternalError):
    """A graph holds what its level's dialect does not allow.

    Cause: A pass inserted an operator or a dtype that later passes do not know, or changed the inputs of the graph.
    Fix: In a pass of your own, rewrite with operators of ``dialects.py``; otherwise report it.
    """


class VerificationError(InternalError):
    """A graph claimed to be integer-only is not.

    Cause: A float tensor, constant, argument or Python callable remains.
    Fix: In a pass of your own, remove it at the node named; otherwise report it.
    """


class AccumulatorError(UserError, OverflowError):
    """A layer's int32 accumulator could overflow for some input.

    Cause: Very long sums of large weights.
    Fix: Fewer bits, or ``keep_float`` for the layer.
    """


def nearest(name: str, candidates: Iterable[str]) -> str:
    """'did you mean ...?' clause for an unknown ``name``; lists the candidates when nothing is close."""
    candidates = sorted(candidates)
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return "Known: " + ", ".join(repr(c) for c in candidates) + "."
