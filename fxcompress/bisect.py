"""``bisect``: which pass, and within it which rewrite, broke the metric?

Every intermediate graph is an executable module, so the metric can be asked anywhere: the passes run once, each graph is
kept (weights are shared), and a binary search over them finds the pass. That pass alone is then applied again to the graph
it had, cut short after k rewrites, and a binary search over k finds the rewrite. Capture happens once, and so does
calibration unless the pass at fault measures on the data itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from .api import prepare
from .calibration import few
from .calibration_data import blame_calibration
from .errors import InputError, OptionError
from .meta import Origin, tensor_meta
from .options import Target
from .pipeline import build_passes
from .stages import Cuts, Network, NotExecutable, Stages, Values
from .torch_modes import exact

Metric = Callable[[nn.Module], float | bool]


@dataclass(frozen=True)
class Bisection:
    """What ``bisect`` found. ``print`` it: one sentence.

    Attributes:
        pass_name: the pass that breaks the metric; "capture"; "model" when the model itself misses the limit; "" for none.
        pass_index: its position in the list of passes, None unless it is one.
        rewrite, rewrites: the number of the first rewrite that breaks it, of how many; None when the pass is not cut.
        node, module, source: where that rewrite is, "conv2d_3", "layer1.0.conv1", "model.py:31".
        change: what it did, in the words of the pass.
        before, after: the metric right before and right after.
        reference, limit: the metric of the model, and the value below which the metric counts as broken.
        evaluations: how often the metric was asked.
        reason: why no single rewrite is named.
    """

    pass_name: str = ""
    pass_index: int | None = None
    rewrite: int | None = None
    rewrites: int | None = None
    node: str = ""
    module: str = ""
    source: str = ""
    change: str = ""
    before: float | None = None
    after: float | None = None
    reference: float | None = None
    limit: float = 0.0
    evaluations: int = 0
    reason: str = ""

    @property
    def broken(self) -> bool:
        """Whether anything breaks the metric."""
        return self.pass_name != ""

    def __str__(self) -> str:
        asked = f"limit {self.limit:.4g}, {self.evaluations} evaluations"
        if not self.broken:
            return f"Nothing breaks the metric: it is {self.before:.4g} for the float network and {self.after:.4g} after the last pass ({asked})."
        if self.pass_name == "model":
            return f"The metric is broken before compilation: the model itself gives {self.after:.4g} ({asked})."
        moves = f"it takes the metric from {self.before:.4g} to {self.after:.4g} ({asked})"
        if self.rewrite is None:
            return f"{self.pass_name} breaks it: {moves}; {self.reason}."
        place = Origin(self.module, self.source)
        where = self.node if place == Origin() else f"{self.node} [{place}]"
        what = f" ({self.change})" if self.change else ""
        return f"{self.pass_name} breaks it with rewrite {self.rewrite} of {self.rewrites}, at {where}{what}: {moves}."


@exact
def bisect(
    model: nn.Module,
    metric: Metric,
    target: str | Target = "int8",
    *,
    tolerance: float = 0.01,
    threshold: float | None = None,
    **options: Any,
) -> Bisection:
    """Find the first pass, and within it the first rewrite, after which a metric breaks.

    The search is binary, about ``log2(passes) + log2(rewrites)`` evaluations. Where the metric does not fall monotonically,
    the rewrite named is one that takes it from good to broken, though perhaps not the first.

    Args:
        model: as for ``compile``.
        metric: takes a module that is called like ``model`` and returns a number, higher is better, or a bool.
        target: as for ``compile``.
        tolerance: how much the metric may fall below that of the model, as a share of it.
        threshold: the metric is broken below this value, instead of ``tolerance``.
        options: everything ``compile`` takes, ``passes=`` and ``calibration_data=`` among them, but ``integer_io`` and
            ``max_rewrites``. Without ``example_inputs`` and calibration data the first call of the metric is the example.

    Raises the errors of ``compile``; ``OptionError`` for a metric that returns no number.

    >>> print(fxcompress.bisect(model, accuracy, "w4a8", calibration_data=images))               # doctest: +SKIP
    quantize breaks it with rewrite 7 of 31, at conv2d_3 [layer1.0.conv1 (model.py:31)] ...
    """
    for name in ("integer_io", "max_rewrites"):
        if options.pop(name, None):
            raise OptionError(f"bisect cannot be combined with {name}", stage="bisect",
                              remedy="It asks the metric about float outputs, after as many rewrites as it chooses itself.")  # fmt: skip
    compiler, call = prepare(model, target, **options)
    judge = _Judge(metric)
    raw = compiler.options.input_normalization is not None  # the model itself takes other values than the network
    if call is None or not raw:
        probe = _Probe(compiler.model)
        reference = judge(probe)
        call = call or probe.first_call()
    with blame_calibration(when=options.get("example_inputs") is None and compiler.calibration_data is not None):
        captured = compiler.capture(*call)
    stages = Stages(captured.graph_module, build_passes(compiler.passes, compiler.options.target))
    start = judge(Network(stages.graphs[0], captured.interface))
    reference = start if raw else reference
    limit = _limit(reference, judge.is_bool, tolerance, threshold)
    if not reference >= limit:
        found = Bisection("model", after=reference)
    elif not start >= limit:
        found = Bisection("capture", before=reference, after=start, reason="no pass has run yet")
    else:
        found = _search(stages, lambda graph: judge(Network(graph, captured.interface)), start, limit)
    return replace(found, reference=reference, limit=limit, evaluations=judge.evaluations)


def _limit(reference: float, is_bool: bool, tolerance: float, threshold: float | None) -> float:
    """The value below which the metric is broken."""
    if threshold is not None:
        return float(threshold)
    if is_bool:
        return 1.0
    if not tolerance >= 0:
        raise OptionError(f"tolerance is {tolerance!r}", stage="bisect", expected="a number >= 0",
                          remedy="0.01 allows the metric to fall by one per cent.")  # fmt: skip
    if not math.isfinite(reference):
        raise OptionError(f"the metric of the model is {reference}, of which no share can be taken", stage="bisect",
                          remedy="Pass threshold=, the lowest value that is good.")  # fmt: skip
    return reference - tolerance * abs(reference)


def _search(stages: Stages, value: Callable[[fx.GraphModule], float], start: float, limit: float) -> Bisection:
    """The pass between the last good and the first bad graph, then the rewrite within it."""
    points = stages.changes
    values = Values(lambda i: value(stages.graphs[points[i]]), {0: start})
    last = len(points) - 1
    if values[last] >= limit:
        return Bisection(before=start, after=values[last])
    bad = _first_bad(0, last, lambda i: values[i] >= limit)
    index = points[bad] - 1
    p, total = stages.passes[index], stages.rewrites[index]
    found = Bisection(p.name, index, before=values[bad - 1], after=values[bad])
    if p.atomic:
        return replace(found, reason=f"it is atomic, its {total} rewrites are applied together")
    cuts = Cuts(p, stages.graphs[index])
    values = Values(lambda k: value(cuts[k][0]), {0: found.before, total: found.after})
    try:
        k = _first_bad(0, total, lambda k: values[k] >= limit)
        before = values[k - 1]
    except NotExecutable as error:
        cause = str(error.__cause__).splitlines()[0]
        return replace(found, reason=f"{error} of {total}, the graph does not run ({cause})")
    match = cuts[k][1]
    origin = tensor_meta(match.node).origin
    return replace(
        found, rewrite=k, rewrites=total, node=match.node.name, module=origin.module, source=origin.source,
        change=match.summary, before=before, after=values[k],
    )  # fmt: skip


def _first_bad(good: int, bad: int, is_good: Callable[[int], bool]) -> int:
    """A position that is bad and has a good one right before it, given a good and a later bad one."""
    while bad - good > 1:
        middle = (good + bad) // 2
        if is_good(middle):
            good = middle
        else:
            bad = middle
    return bad


class _Probe(nn.Module):
    """The user's model; remembers its first call, of which a few samples serve as example."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.call = model, None
        self.eval()

    def forward(self, *args, **kwargs):
        if self.call is None:
            self.call = few((args, kwargs))
        return self.model(*args, **kwargs)

    def first_call(self) -> tuple[tuple, dict]:
        if self.call is None:
            raise InputError("the metric never called the module it was given", stage="bisect",
                             remedy="Call it on inputs: lambda net: accuracy(net(images), labels).")  # fmt: skip
        return self.call


class _Judge:
    """Asks the metric and counts."""

    def __init__(self, metric: Metric):
        if not callable(metric):
            raise OptionError(f"the metric is a {type(metric).__name__}", stage="bisect", expected="a function of a module",
                              remedy="For example: lambda net: float((net(images).argmax(1) == labels).float().mean()).")  # fmt: skip
        self.metric, self.evaluations, self.is_bool = metric, 0, False

    def __call__(self, module: nn.Module) -> float:
        self.evaluations += 1
        with torch.no_grad():
            result = self.metric(module)
        self.is_bool = isinstance(result, bool) or (isinstance(result, torch.Tensor) and result.dtype == torch.bool)
        try:
            return float(result)
        except (TypeError, ValueError, RuntimeError):
            raise OptionError(f"the metric returned a {type(result).__name__}", stage="bisect", expected="a number or a bool",
                              remedy="Higher is better: return accuracy, or minus the loss.") from None  # fmt: skip
