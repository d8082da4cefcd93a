"""``prune``: a smaller float network from a float network."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ..api import take_snapshot
from ..calibration import make_calibration
from ..calibration_data import check_calibration
from ..capture import Captured, capture
from ..errors import OptionError
from ..graph import copy_graph_module, output_node, placeholders
from ..interface import as_call
from ..model_checks import check_names
from ..options import CompileOptions, Context
from ..pass_manager import PassManager
from ..passes.eliminate_dead_code import EliminateDeadCode
from ..passes.fold_constants import FoldConstants
from ..passes.group_kernels import GroupKernels
from ..passes.normalize import Normalize
from ..passes.prune_branches import PruneBranches
from ..passes.prune_channels import PruneChannels
from ..passes.prune_weights import PruneWeights
from ..torch_modes import exact
from .evidence import Objective, predicted_logits
from .weights import pattern


@exact
def prune(
    model: nn.Module,
    example_inputs,
    *,
    pruning_ratio: float | None = None,
    calibration_data=None,
    objective: Objective = predicted_logits,
    **options,
) -> fx.GraphModule:
    """Remove the channels, neurons and attention heads that matter least; layers become smaller, not sparse.

    Args:
        model: a module in eval mode, an ``ExportedProgram`` or a ``GraphModule``. It is not modified.
        example_inputs: one call's inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        pruning_ratio: share of ``pruning_measure`` to remove, 0 <= ratio < 1; default 0.3, or what a pattern "N:M" removes.
        calibration_data: unlabeled examples, as for ``compile``, for criteria that look at data, and for batch-norm statistics,
            which are then measured again after the cut.
        objective: ``f(flat outputs) -> scalar`` that gradient criteria differentiate; default: the predicted logits.
        options: ``pruning_granularity`` ("channels", "kernels", "unstructured", "2:4"), ``pruning_measure`` ("macs",
            "parameters", "latency"), ``pruning_criterion`` ("outgoing", ...), ``pruning_budget`` ("global", "uniform",
            "importance"), ``pruning_correction``, ``latency_table``, ``round_to``, ``ignored_layers``: see ``CompileOptions``.

    Returns:
        A ``torch.fx.GraphModule`` that is called like ``model``; its parameters keep their names, and frozen ones stay frozen;
        what the model computes from parameters alone (weight norm) is a parameter itself. It is computed in float32 and then has
        the one precision of the model's parameters, float32 where they have several. ``.meta["pruning"]`` is a
        ``PruningReport``: what was removed, what was not and why.

    Raises:
        UserError: options that make no sense, a ratio that cannot be reached, a criterion without its data.

    >>> small = fxcompress.prune(model, torch.rand(1, 3, 32, 32), pruning_ratio=0.3)          # doctest: +SKIP
    >>> print(small.meta["pruning"])                                                          # doctest: +SKIP
    """
    if pruning_ratio is None:
        pruning_ratio = 0.0 if pattern(str(options.get("pruning_granularity"))) else 0.3
    checked = CompileOptions.build(pruning_ratio=pruning_ratio, **options)
    network = Prepared(model, example_inputs, checked, calibration_data)
    passes = [Normalize(), PruneChannels(objective), GroupKernels(objective), PruneWeights(objective)]
    return network.result(PassManager(passes).run(network.graph_module))


@exact
def prune_branches(
    model: nn.Module, example_inputs, *, pruning_ratio: float = 0.3, calibration_data=None, **options
) -> fx.GraphModule:
    """Remove whole residual branches, those without which the outputs change least: x + f(x) becomes x.

    Saves time where layers are narrower than what the kernels compute at once, or so small that their number counts.

    Args:
        model, example_inputs: as for ``prune``.
        pruning_ratio: share of ``pruning_measure`` to remove, 0 <= ratio < 1; the last branch may take more.
        calibration_data: unlabeled examples; the first 64 are what branches are compared on, and all of them what batch-norm
            statistics are measured again with. Default: the example inputs, and statistics as they are.
        options: ``pruning_measure`` ("macs", "parameters" or "latency"), ``latency_table`` and ``ignored_layers`` as for ``prune``.

    Returns:
        A ``torch.fx.GraphModule`` like that of ``prune``, which ``prune``, ``fine_tune`` and ``compile`` take.

    Raises:
        UserError: a ratio that cannot be reached.

    >>> small = fxcompress.prune_branches(resnet, images[:1], pruning_ratio=0.3, calibration_data=images)   # doctest: +SKIP
    """
    if unknown := options.keys() - {"pruning_measure", "latency_table", "ignored_layers"}:
        raise OptionError(f"{min(unknown)} is no option of prune_branches", stage="prune_branches",
                          expected="pruning_measure, latency_table or ignored_layers", remedy="Drop it, or call fxcompress.prune.")  # fmt: skip
    checked = CompileOptions.build(pruning_ratio=pruning_ratio, **options)
    network = Prepared(model, example_inputs, checked, calibration_data)
    branches = PruneBranches(pruning_ratio, checked.pruning_measure, checked.latency_table)
    return network.result(PassManager([Normalize(), branches]).run(network.graph_module))


class Prepared:
    """A copy of the user's model as the flat graph that pruning works on, and the way back.

    Attributes:
        graph_module: normalized, with its ``Context``. interface: how a call maps to its inputs.
        parameters: names of constants that become parameters again, and whether they are trained: the model's, and what
            is computed from those that are trained.
    """

    def __init__(self, model: nn.Module, example_inputs, options: CompileOptions, calibration_data=None):
        snapshot = take_snapshot(model)
        check_names(snapshot, options.ignored_layers, "ignored_layers")
        check_calibration(calibration_data, model)
        self._call = as_call(example_inputs)
        self._captured = capture(snapshot, *self._call)
        self.interface = self._captured.interface
        calibrate = None if calibration_data is None else make_calibration(calibration_data, self.interface)
        gm = self._captured.graph_module
        gm.meta["fxcompress"] = Context(options, self._captured.example_inputs, calibrate)
        self.graph_module, self.parameters = _normalized(gm, dict(snapshot.named_parameters()))
        precisions = {p.dtype for p in snapshot.parameters() if p.is_floating_point()}
        self._precision = precisions.pop() if len(precisions) == 1 else torch.float32

    def result(self, gm: fx.GraphModule) -> fx.GraphModule:
        """``gm``, what became of the graph, as a module that is called like the model, in the model's precision."""
        return self.plain(gm).to(self._precision)

    def plain(self, gm: fx.GraphModule) -> fx.GraphModule:
        """The same in float32, on the tensors of ``gm``: for training."""
        copied = copy_graph_module(gm)
        _name_parameters(copied, self.parameters)
        _restore_call(copied, self._captured, *self._call)
        plain = fx.GraphModule(copied, copied.graph)
        plain.meta = {key: value for key, value in gm.meta.items() if key in ("pruning", "products")}
        return plain.eval()


def _normalized(gm: fx.GraphModule, given: dict[str, nn.Parameter]) -> tuple[fx.GraphModule, dict[str, bool]]:
    """The normalized graph, and which of its constants are parameters: name -> whether it is trained.

    Autograd tells what is computed from the ``given`` parameters (the weight of weight norm, a slope of another shape).
    """
    for name, buffer in gm.named_buffers():
        buffer.requires_grad_(name in given and given[name].requires_grad)
    with torch.enable_grad():
        gm = PassManager([Normalize(), FoldConstants(), EliminateDeadCode()]).run(gm)
    parameters = {name: b.requires_grad for name, b in gm.named_buffers() if name in given or b.requires_grad}
    for buffer in gm.buffers():
        buffer.requires_grad_(False)
    return gm, parameters


def _name_parameters(gm: fx.GraphModule, parameters: dict[str, bool]) -> None:
    """What was a parameter of the model, or comes from some, is one again."""
    for name, buffer in list(gm.named_buffers()):
        if name in parameters and buffer.is_floating_point():
            path, _, leaf = name.rpartition(".")
            module = gm.get_submodule(path)
            delattr(module, leaf)
            module.register_parameter(leaf, nn.Parameter(buffer, requires_grad=parameters[name]))


def _restore_call(gm: fx.GraphModule, captured: Captured, args: tuple, kwargs: dict) -> None:
    """Make the flat graph take and return what the model did: constants of the call become inputs nobody reads."""
    interface, inputs = captured.interface, iter(placeholders(gm))
    kwargs = {name: kwargs[name] for name in sorted(kwargs, key=lambda k: _position(interface.parameters, k))}
    _, in_spec = pytree.tree_flatten((args, kwargs))
    last = gm.graph._root
    for position, leaf in enumerate(interface.inputs):
        with gm.graph.inserting_after(last):
            last = next(inputs) if leaf.is_tensor else gm.graph.placeholder(f"constant_{position}")
    result = output_node(gm)
    result.args = ([result.args[0][o] if isinstance(o, int) else o[1] for o in interface.outputs],)
    unnamed = (f"arg_{i}" for i in range(len(interface.parameters), len(args)))
    positional = [*interface.parameters, *unnamed][: len(args)]
    gm.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo([*positional, *kwargs], in_spec, interface.out_spec)))
    gm.graph.lint()
    gm.recompile()


def _position(names: tuple[str, ...], name: str) -> int:
    """Where the exporter puts a keyword argument: as in the signature, others behind."""
    return names.index(name) if name in names else len(names)
