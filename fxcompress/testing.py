"""Helpers for the tests of a pass: run it on a model where it will run in the pipeline, and hold it to what passes promise.

    trial = try_pass(FoldScale(), model, x, after="check_dialect")
    assert trial.rewrites == 1 and trial.refusals == []
    assert torch.ops.aten.mul.Tensor not in trial.operators

``try_pass`` raises where the pipeline would: a changed function of an ``EXACT`` pass, statistics that describe another tensor, a
parameter written into, an operator outside the dialect. It also checks what the pipeline cannot afford to: that planning changes
nothing, and that a second run finds nothing left to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .capture import capture
from .errors import PassContractError
from .graph import copy_graph_module
from .options import CompileOptions, Context
from .pass_manager import PassManager, as_pass
from .pipeline import default_passes
from .promises import Snapshot
from .rewrite import Pass

__all__ = ["Trial", "randomize", "try_pass"]


@dataclass(frozen=True)
class Trial:
    """What a pass did to a model.

    Attributes:
        before, after: the graph around it; both run.
        rewrites: how many; matches: what they were; refusals: where it declined, and why.
        change: largest relative change of an output, None when the pass left the graph alone.
    """

    before: fx.GraphModule
    after: fx.GraphModule
    rewrites: int
    matches: list[str]
    refusals: list[str]
    change: float | None

    @property
    def operators(self) -> list:
        """The operators that the graph now calls, in order."""
        return [node.target for node in self.after.graph.nodes if node.op == "call_function"]


def try_pass(
    p: Pass | type[Pass] | str | Callable,
    model: nn.Module,
    *inputs: Tensor,
    after: str = "check_dialect",
    **options: Any,
) -> Trial:
    """Run the default passes up to ``after``, then ``p``.

    Args:
        p: a ``Pass``, a pass class, a published pass's name or a callable written for torch.
        model: in eval mode.
        inputs: one call's tensors, any batch.
        after: the pass of the default list that ``p`` follows.
        options: fields of ``CompileOptions``: ``target="w4a8"``, ``input_range=(0, 1)``, ...

    Raises the error the pipeline would raise, ``PassContractError`` for a plan that changes the graph and for a pass that never
    finishes.

    >>> try_pass(FoldScale(), nn.Sequential(nn.Conv2d(3, 8, 3), Scale(2.0)).eval(), torch.rand(2, 3, 8, 8)).rewrites  # doctest: +SKIP
    1
    """
    p, checked = as_pass(p), CompileOptions.build(**options)
    passes = default_passes(checked.target)
    captured = capture(model, tuple(inputs), input_normalization=checked.input_normalization)
    gm = captured.graph_module
    gm.meta["fxcompress"] = Context(checked, captured.example_inputs)
    manager = PassManager([*passes[: passes.index_of(after) + 1], p])
    befores: list[Snapshot] = []
    manager.observer = lambda record, before, gm: befores.append(before)
    result = manager.run(gm)
    before, record = befores[-1].graph_module, manager.records[-1]
    _check_plan(p, before)
    _check_idempotent(p, result)
    return Trial(before, result, record.rewrites, record.matches, record.refusals, record.output_change)


def _check_plan(p, before: fx.GraphModule) -> None:
    """Planning looks only."""
    looked_at = copy_graph_module(before)
    texts, tensors = (
        str(looked_at.graph),
        {name: (id(t), t._version) for name, t in looked_at.state_dict(keep_vars=True).items()},
    )
    p.plan(looked_at)
    now = {name: (id(t), t._version) for name, t in looked_at.state_dict(keep_vars=True).items()}
    if str(looked_at.graph) != texts or now != tensors:
        raise PassContractError(
            "plan() changed the graph", stage=p.name, expected="changes in apply() or rewrite() only"
        )


def _check_idempotent(p, result: fx.GraphModule) -> None:
    """A second run on the result has nothing to do. A pass that moved the graph to another level does not run there."""
    if p.result_level is not p.level:
        return
    left = p.plan(copy_graph_module(result)).matches
    if left:
        raise PassContractError(
            "finds work in its own result", stage=p.name, where=str(left[0]), expected="an empty second plan"
        )


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights, biases and batch-norm statistics as a trained network might have them; returns ``model`` in eval mode.

    A fresh batch norm is the identity, which hides mistakes in folding. Weights keep the variance of ReLU networks (He et al. 2015).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            statistics = isinstance(module, nn.modules.batchnorm._BatchNorm)
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if not tensor.is_floating_point():
                    continue
                if tensor.ndim >= 2:
                    fan_in = tensor[0].numel()
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / max(fan_in, 1)) ** 0.5)
                elif name in ("weight", "running_var"):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                elif name == "bias" or statistics:
                    tensor.uniform_(-0.3, 0.3, generator=generator)
    return model.eval()
