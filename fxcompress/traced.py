"""A traced graph with the tensors it reads, straight from where it comes.

``ExportedProgram.module()`` would turn a program into a ``GraphModule``, but it compares every parameter's name with those
of all its siblings: on a thousand blocks in one container that takes longer than the export. A program is read as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .graph import constant

_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ)


@dataclass(frozen=True)
class Traced:
    """What ``flatten_graph`` flattens.

    Attributes:
        graph: calls, placeholders and get_attr nodes; its output is what the model returns.
        state: (name, value) of every node that stands for a parameter, buffer or constant.
        out_spec: nesting of the outputs; None: that of the output node itself.
    """

    graph: fx.Graph
    state: Mapping[fx.Node, tuple[str, object]]
    out_spec: pytree.TreeSpec | None

    @property
    def inputs(self) -> list[fx.Node]:
        """Placeholders that are arguments of the model."""
        return [n for n in self.graph.find_nodes(op="placeholder") if n not in self.state]

    @classmethod
    def of_module(cls, gm: fx.GraphModule) -> Traced:
        """A ``GraphModule``: its constants are get_attr nodes."""
        info = getattr(gm.graph._codegen, "pytree_info", None)
        return cls(gm.graph, _attributes(gm), info and info.out_spec)

    @classmethod
    def of_program(cls, program: ExportedProgram) -> Traced:
        """An ``ExportedProgram``: its constants are placeholders, told apart by the signature.

        Raises ``CaptureError`` when outputs of the program are new values of state or arguments.
        """
        signature = program.graph_signature
        for spec in signature.output_specs:
            if spec.kind not in (OutputKind.USER_OUTPUT, OutputKind.TOKEN):
                raise CaptureError(f"the forward writes to {spec.target}", stage="capture",
                                   remedy="Keep state out of the forward: pass it in and return it.")  # fmt: skip
        values = {**program.constants, **program.state_dict}
        nodes = program.graph.find_nodes(op="placeholder")
        specs = zip(nodes, signature.input_specs, strict=True)
        lifted = {n: (spec.target, values[spec.target]) for n, spec in specs if spec.kind in _STATE}
        return cls(program.graph, lifted | _attributes(program.graph_module), program.call_spec.out_spec)


def _attributes(gm: fx.GraphModule) -> dict[fx.Node, tuple[str, object]]:
    return {n: (n.target, constant(gm, n)) for n in gm.graph.find_nodes(op="get_attr")}
