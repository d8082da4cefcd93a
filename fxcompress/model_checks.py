"""Is the model fit to be compiled? Asked before any work; every answer names the module and what to do.

check_model(model)            another kind, training mode, broken weights, no statistics   ModelError
check_names(model, names)     keep_float names modules of the model                  OptionError
check_graph(gm)               behavior that only the traced graph shows             ModelError
check_aliasing(gm)            memory changed in place, seen through another view     UnsupportedOperatorError
mark_keep_float(gm, names)    node.meta["keep_float"] on the named submodules        OptionError
check_supported(gm)           operators without a lowering, all of them at once      UnsupportedOperatorError
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .dialects import EMBEDDING, INDEXING, MASKED_SOFTMAX, WEIGHTED, level_targets
from .errors import ModelError, OptionError, UnsupportedOperatorError, nearest
from .graph import argument, calls, is_constant, is_float
from .meta import lies_in, place, tensor_meta
from .model_kinds import check_kind, check_tensors, model_error
from .rewrite import Level

aten = torch.ops.aten


def check_model(model: nn.Module) -> None:
    """Raise ``ModelError`` for what is no plain module with weights (``model_kinds``), and for a module in training mode,
    NaN or Inf weights, missing or negative batch-norm statistics.
    """
    check_kind(model)
    check_tensors(model)
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            _check_statistics(path, module)
    if not isinstance(model, fx.GraphModule):
        _check_eval(model)
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            _check_finite(kind, name, tensor)


def _check_statistics(path: str, module: _BatchNorm) -> None:
    if module.running_mean is None or module.running_var is None:
        raise model_error(
            path, "batch norm without running statistics", "Create it with track_running_stats=True and train it."
        )
    if bool((module.running_var < 0).any()):
        raise model_error(path, f"running_var is negative in {int((module.running_var < 0).sum())} channels",
                          "A variance cannot be: check the checkpoint.")  # fmt: skip


def _check_eval(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module.training and (module is model or isinstance(module, (_BatchNorm, _DropoutNd))):
            raise model_error(path, f"{type(module).__name__} is in training mode", "Call model.eval() first.")


def _check_finite(kind: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    broken = ~torch.isfinite(tensor)
    if kind == "buffer":
        broken &= tensor != -math.inf  # an attention mask
    if bool(broken.any()):
        where, _, leaf = name.rpartition(".")
        count = int(broken.sum())
        raise model_error(where, f"{kind} {leaf} has {count} NaN or Inf of {tensor.numel()} values",
                          "Training diverged or the checkpoint is damaged: repair the weights.")  # fmt: skip


def check_names(model: nn.Module, names: Iterable[str], option: str = "keep_float") -> None:
    """Raise ``OptionError`` for a name in ``option`` that no submodule has; a traced graph shows its names later."""
    if isinstance(model, nn.Module) and not isinstance(model, fx.GraphModule):
        known = {path for path, _ in model.named_modules(remove_duplicate=False) if path}
        for name in names:
            if name not in known:
                raise OptionError(f"no submodule {name!r}", stage=option, remedy=nearest(name, known))


def check_graph(gm: fx.GraphModule) -> None:
    """Raise ``ModelError`` for what a module scan cannot see: functional dropout or batch norm left in training mode."""
    for node in calls(
        gm, aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.alpha_dropout.default
    ):
        if node.args[2]:
            raise ModelError("dropout is active", stage="model check", where=place(node),
                             remedy="Pass training=self.training to F.dropout and call model.eval().")  # fmt: skip
    for node in calls(gm, aten.batch_norm.default):
        if argument(node, "training"):
            raise ModelError("batch norm computes batch statistics", stage="model check", where=place(node),
                             remedy="Use running statistics: track_running_stats=True and model.eval().")  # fmt: skip


def check_aliasing(gm: fx.GraphModule) -> None:
    """Raise ``UnsupportedOperatorError`` if memory changed in place is read later through an older view.

    Then the in-place call cannot be replaced by its out-of-place twin: ``y = x[:, 0]; x.relu_(); return y``, or
    ``x[:, 0] = 0; return x``. Aliases are taken from the operator schemas; a reshape counts as a view.
    """
    memory: dict[fx.Node, fx.Node] = {}  # node -> the node that allocated what it is a view of
    version: dict[fx.Node, int] = {}  # node -> how often its memory had been changed when it was made
    writes: dict[fx.Node, list[fx.Node]] = {}  # allocating node -> in-place calls so far
    for node in gm.graph.nodes:
        for read in node.all_input_nodes:
            later = writes.get(memory[read], [])[version[read] :]
            if later:
                raise UnsupportedOperatorError(
                    f"{later[0].target} changes memory that {place(node)} reads through another view",
                    stage="model check",
                    where=place(later[0]),
                    remedy="Write the change out of place: torch.cat of the parts for an assignment to a part.",
                )
        source = _aliased_input(node)
        memory[node] = node if source is None else memory[source]
        if source is not None and hasattr(node.target, "_schema") and node.target._schema.is_mutable:
            writes.setdefault(memory[node], []).append(node)
        version[node] = len(writes.get(memory[node], ()))


_RETURN_THEIR_INPUT = frozenset({"aten::dropout", "aten::feature_dropout", "aten::alpha_dropout"})  # in eval mode


def _aliased_input(node: fx.Node) -> fx.Node | None:
    """The input whose memory the node's result may share."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # getitem of the list a split returned
        return node.all_input_nodes[0]
    if schema.name in _RETURN_THEIR_INPUT:
        return node.args[0]
    for value, parameter in zip(node.args, schema.arguments):
        if parameter.alias_info is not None and isinstance(value, fx.Node):
            return value
    return None


def mark_keep_float(gm: fx.GraphModule, names: Iterable[str]) -> int:
    """Set ``node.meta["keep_float"]`` on every node that comes from a named submodule or one below it.

    Returns the number of nodes marked. A name that no node comes from raises ``OptionError`` with the nearest one.
    """
    known = {path for node in gm.graph.nodes for path in _prefixes(tensor_meta(node).origin.module)}
    marked = 0
    for name in names:
        if name not in known:
            raise OptionError(f"no submodule {name!r}", stage="keep_float", remedy=nearest(name, known))
        for node in gm.graph.nodes:
            if node.op == "call_function" and lies_in(node, [name]):
                node.meta["keep_float"] = True
                marked += 1
    return marked


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def check_supported(
    gm: fx.GraphModule, keep_float: Iterable[str] = (), reasons: Mapping[fx.Node, str] | None = None
) -> None:
    """Raise ``UnsupportedOperatorError`` listing every operator outside the float dialect, and the way out.

    Nodes marked ``keep_float``, and those under a module of ``keep_float``, may be anything. ``reasons``: why an operator
    that is supported in general is not here.
    """
    legal = level_targets(Level.FLOAT)
    names = tuple(keep_float)
    lines, modules = [], set()
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.meta.get("keep_float") or lies_in(node, names):
            continue
        reason = _unsupported(node, legal)
        if reason:
            why = (reasons or {}).get(node)
            lines.append(f"  {reason} at {place(node)}" + (f": {why}" if why else ""))
            modules.add(tensor_meta(node).origin.module)
    if lines:
        plural = "operators have" if len(lines) > 1 else "operator has"
        ways = ", ".join(repr(m) for m in sorted(modules) if m)
        way = "Write them with supported operators, or move them into a submodule and leave that in float with keep_float."
        if ways:
            way = f"Keep them in float with keep_float=[{ways}], or write them with supported operators."
        if ways and "" in modules:
            way += " What is in no submodule must move into one to be kept."
        raise UnsupportedOperatorError(
            f"{len(lines)} {plural} no integer lowering:\n" + "\n".join(lines),
            stage="normalize",
            remedy=f"\n{way}",
        )


def _unsupported(node: fx.Node, legal: frozenset) -> str:
    """Why a call is outside the float dialect; "" if it is inside, or if its producer is named already."""
    if node.target is operator.getitem and node.args[0].target not in legal:
        return ""
    if node.target is aten.item.default:
        return f"{node.target} (a number read from a tensor)"
    if node.target is aten.sym_size.int and any(user.target not in legal for user in node.users):
        return ""
    if node.target in INDEXING and isinstance(node.meta.get("val"), Tensor) and not is_float(node):
        return ""  # token ids and masks
    if node.target not in legal:
        return str(node.target)
    if "val" in node.meta and not is_float(node):
        return f"{node.target} on {getattr(node.meta['val'], 'dtype', 'a list')}"
    if node.target in WEIGHTED and not all(n is None or is_constant(n) for n in (node.args[1], *node.args[2:3])):
        return f"{node.target} with computed weights"
    if node.target is aten.index_select.default and not is_constant(node.args[2]):
        return f"{node.target} with a computed index"
    if node.target is EMBEDDING and not is_constant(node.args[0]):
        return f"{node.target} of a computed table"
    if is_float(node) and node.target not in (aten.index_select.default, EMBEDDING, MASKED_SOFTMAX):
        for source in node.all_input_nodes:
            if isinstance(source.meta.get("val"), Tensor) and not is_float(source):
                return f"{node.target} of a {source.meta['val'].dtype} tensor"
    return ""
