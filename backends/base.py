"""What a backend is: it says which nodes it can run, and turns an integer graph into a program.

    backend = get_backend("reference")
    program = backend.lower(gm)             # UnsupportedOperatorError names the node it cannot run
    (y,) = program.run(x)

Every backend computes the same bits as the reference for any batch size, 0 included.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, fx

from fxcompress.errors import UnsupportedOperatorError
from fxcompress.meta import place


@runtime_checkable
class Program(Protocol):
    """A graph ready to run: later edits of the graph do not reach it (weights are shared, and never written)."""

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the order of the graph's output tuple, from one tensor per placeholder."""
        ...

    def resources(self) -> dict:
        """What running takes, as plain data for the report; empty where there is nothing to say."""
        ...

    def time_steps(self, *inputs: Tensor) -> list[int]:
        """Nanoseconds of every step of ``resources()["steps"]`` on these inputs; empty where there are no steps."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Runs integer-level graphs."""

    name: str

    def supports(self, node: fx.Node) -> str | None:
        """None if the backend can run ``node``, else the reason why not."""
        ...

    def lower(self, gm: fx.GraphModule) -> Program:
        """Compile an integer-level graph. Raises ``UnsupportedOperatorError`` for a node it does not support."""
        ...


def check_supported(backend: Backend, gm: fx.GraphModule) -> None:
    """Raise ``UnsupportedOperatorError`` naming the first node that ``backend`` cannot run, and why."""
    for node in gm.graph.nodes:
        reason = backend.supports(node)
        if reason is not None:
            raise UnsupportedOperatorError(
                reason,
                stage=f"{backend.name} backend",
                where=place(node),
                remedy='The "reference" backend runs every graph.',
            )
