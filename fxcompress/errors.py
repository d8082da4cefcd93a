"""Every exception fxcompress raises on purpose.

A message has five fields, in this order:  ``stage: where: found; expected ... . remedy``

* stage: the pass or the step of ``compile`` that noticed,
* where: node, module path and source line in the user's model,
* found: what is wrong, with the numbers,
* expected: what would have been right (may be empty),
* remedy: what the reader should do.

``UserError`` subclasses are the caller's to fix. ``InternalError`` subclasses are ours: a pass or a backend
broke a contract, and the message asks for a reproducer.
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
    """An option of ``compile`` is unknown or out of range. Fix: use the value the message names."""


class ModelError(UserError, ValueError):
    """The model cannot be compiled as it is (training mode, NaN weights, no running statistics)."""


class CaptureError(UserError, RuntimeError):
    """``torch.export`` could not turn the model into a graph. The cause is chained."""


class UnsupportedOperatorError(UserError, NotImplementedError):
    """An operator of the model has no integer lowering. Fix: ``keep_float=[...]`` or another spelling."""


class InputError(UserError, ValueError):
    """A tensor passed to ``compile`` or to the compiled model has the wrong count, rank, shape or values."""


class CalibrationError(UserError, ValueError):
    """Calibration data are missing, empty, or do not fit the model."""


class ArtifactError(UserError, ValueError):
    """A saved model is truncated, corrupted, of another version, or not ours."""


class PipelineError(UserError, ValueError):
    """The list of passes is not legal: unknown or duplicate name, or an order the declared facts forbid."""


class BackendError(UserError, RuntimeError):
    """A backend cannot run here: its library was not built or does not load. Fix: build it, or name another backend."""


class InternalError(FxcompressError, RuntimeError):
    """fxcompress broke one of its own contracts."""

    def _message(self) -> str:
        return (
            super()._message() + " This is a bug in the pass or in fxcompress: please report it with the debug folder."
        )


class PassContractError(InternalError):
    """A pass broke its promise: an EXACT pass changed the function, or a rewrite left stale statistics."""


class LevelError(InternalError):
    """A graph holds an operator or a dtype that its level's dialect does not allow."""


class VerificationError(InternalError):
    """A graph claimed to be integer-only is not: a float tensor, constant, argument or Python callable remains."""


class AccumulatorError(UserError, OverflowError):
    """A layer's int32 accumulator could overflow for some input. Fix: fewer bits, or keep the layer in float."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """'did you mean ...?' clause for an unknown ``name``; lists the candidates when nothing is close."""
    candidates = sorted(candidates)
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return "Known: " + ", ".join(repr(c) for c in candidates) + "."
