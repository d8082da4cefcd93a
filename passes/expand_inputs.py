"""Expand inputs: a layer also reads what rounding its input lost.

    y = W x^ + b    ->    y = W x^ + W r^ + b,      r^ = (x - x^) rounded to steps 2^min(b-1, 6) times finer

The sums ``k1 + k2 <= 3`` of the expansion ``(W1 + W2)(x1 + x2)``: the residual meets the first int8 weight only. Codes of 8
bits and their residual hold 14 bits of the activation, at the price of a second product per layer. More do not fit the 16-bit
lanes of the requantization that takes the codes off the accumulator: 255 * 2^6 steps are the most below 2^14. Narrower
activations have no use for it on a machine with int8: 4 + 4 bits are one 7-bit code, so choose a wider target.

Level: qdq. Effect: LOSSY (layers see finer inputs). Inputs that were never finer are refused: graph inputs, and codes that
only moved.
Source: Yvinec et al. 2023, REx, section 3.3; integer form: docs/passes.md.
"""

from __future__ import annotations

import torch
from torch import fx

from fxcompress.analysis.encoded_weights import is_encoded, summands
from fxcompress.analysis.quantization import TYING
from fxcompress.dialects import ADD, SUB, WEIGHTED
from fxcompress.graph import add_constant, calls, is_call
from fxcompress.meta import QParams, carry, describe, inherit_origin, tensor_meta
from fxcompress.options import context
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan, Reject

ops = torch.ops.fxcompress
MOST_SHIFT = 6  # 255 codes of 2^6 steps each stay below 2^14, where no multiplier saturates 16 bits
EXPANDED = "input_expanded"  # node.meta key of a layer that reads a residual, and of the layer that does it for it


class ExpandInputs(Pass):
    name = "expand_inputs"
    level = Level.QDQ
    effect = Effect.LOSSY
    source = "Yvinec et al. 2023, REx, section 3.3"
    needs = frozenset({Fact.QUANTIZED})

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan = Plan(self.name, gm)
        if not context(gm).options.residual_inputs:
            return plan
        for node in calls(gm, *WEIGHTED):
            if not is_encoded(node.args[1]) or EXPANDED in node.meta:
                continue
            if (reason := _refusal(node.args[0])) is not None:
                plan.rejects.append(Reject(reason, node))
            else:
                plan.matches.append(Match(node, "reads the residual of its input too"))
        return plan

    def apply(self, plan: Plan) -> PassResult:
        gm, residuals = plan.graph_module, {}
        for match in plan.matches:
            x = match.node.args[0]
            if x not in residuals:
                residuals[x] = _residual(gm, x)
            _read(gm, match.node, residuals[x])
            plan.applied += 1
        return PassResult(gm, plan.applied > 0)


def _refusal(x: fx.Node) -> str | None:
    if not (is_call(x, ops.dequantize.default) and is_call(x.args[0], ops.quantize.default)):
        return "its input is no rounded tensor"
    source = x.args[0].args[0]
    if source.op == "placeholder":
        return "its input is a graph input: it has no more than these codes"
    if source.target in TYING:
        return "its input only moves codes: it has no more than these"
    if tensor_meta(x).qparams.axis is not None:
        return "its input has a scale for every channel"
    return None


def _residual(gm: fx.GraphModule, x: fx.Node) -> fx.Node:
    """The dequantized residual of the dequantized tensor ``x``: codes around the middle, ``finer`` times finer."""
    q = tensor_meta(x).qparams
    middle = (q.qmax + 1) // 2
    finer = min(middle, 1 << MOST_SHIFT)
    fine = QParams(q.scale / finer, torch.tensor(middle, dtype=torch.int32), 0, q.qmax)
    source = x.args[0].args[0]
    with gm.graph.inserting_after(x):
        scale = add_constant(gm, f"{source.name}_residual_scale", fine.scale, source)
    with gm.graph.inserting_after(scale):
        zero_point = add_constant(gm, f"{source.name}_residual_zero_point", fine.zero_point, source)
    with gm.graph.inserting_after(zero_point):
        rest = gm.graph.create_node("call_function", SUB, (source, x), name=f"{source.name}_rest")
    with gm.graph.inserting_after(rest):
        codes = gm.graph.call_function(ops.quantize.default, (rest, scale, zero_point, fine.qmin, fine.qmax))
    with gm.graph.inserting_after(codes):
        real = gm.graph.call_function(ops.dequantize.default, (codes, scale, zero_point))
    inherit_origin(source, rest)
    for new in (codes, real):
        describe(inherit_origin(source, new), qparams=fine)
    return real


def _read(gm: fx.GraphModule, node: fx.Node, residual: fx.Node) -> None:
    readers = list(node.users)
    weight = summands(node.args[1])[0]
    with gm.graph.inserting_after(node):
        args = (residual, weight, None, *node.args[3:])
        second = inherit_origin(
            node, gm.graph.create_node("call_function", node.target, args, name=f"{node.name}_residual")
        )
    with gm.graph.inserting_after(second):
        total = carry(node, gm.graph.create_node("call_function", ADD, (node, second), name=f"{node.name}_sum"))
    for reader in readers:
        reader.replace_input_with(node, total)
    node.meta[EXPANDED] = second.meta[EXPANDED] = True
