"""Give every operation one spelling.

    relu_(x)                          ->  clamp(x, 0, None)              in-place, functional and operator forms
    view(x, [sym_size(x, 0), 64])     ->  reshape(x, [-1, 64])           no symbolic integer survives
    conv2d(x, w, b, padding="same")   ->  conv2d(x, w, b, [1, 1], [1, 1], [1, 1], 1)

The rules are tables {overload: rule}: RESHAPES, GATHERS, SELECTIONS, ARITHMETIC, ACTIVATIONS, LAYERS, POOLINGS, PRODUCTS and
NORMALIZATIONS, with the algebra in each rule's docstring. A rule returns the expression a call should be; a call that is that
expression already stays. Every later pattern is written for these spellings only. What no rule covers is refused by name later.

Level: float. Effect: EXACT. Precondition: memory changed in place is not read through another view afterwards, else
``UnsupportedOperatorError``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from fxcompress.graph import erase_dead, is_float
from fxcompress.model_checks import check_aliasing
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan, Reject
from fxcompress.shapes import propagate

from ._expression import Expression, Op, Refused, functional_overload, replace
from ._spell_activations import ACTIVATIONS
from ._spell_arithmetic import ARITHMETIC
from ._spell_gather import GATHERS
from ._spell_layers import LAYER_PARTS, LAYERS
from ._spell_normalization import NORMALIZATION_PARTS, NORMALIZATIONS, SOFTMAXES
from ._spell_pooling import POOLING_PARTS, POOLINGS, UNPOOLINGS
from ._spell_products import PRODUCTS, attention
from ._spell_reshape import RESHAPES
from ._spell_selection import PARTS, SELECTIONS
from ._spell_tokens import embedding

aten = torch.ops.aten

MOVEMENT_RULES = {**RESHAPES, **GATHERS, **SELECTIONS, **UNPOOLINGS}
FLOAT_RULES = {**ARITHMETIC, **ACTIVATIONS, **LAYERS, **POOLINGS, **PRODUCTS, **NORMALIZATIONS}
#: Of float tensors and integer ones: token ids, masks.
MIXED_RULES = {aten.scaled_dot_product_attention.default: attention, aten.embedding.default: embedding, **SOFTMAXES}
PART_RULES = {**PARTS, **LAYER_PARTS, **POOLING_PARTS, **NORMALIZATION_PARTS}


class Normalize(Pass):
    """One spelling per operation.

    >>> plan = Normalize().plan(gm); print(plan)                                          # doctest: +SKIP
    normalize: 2 rewrites, 0 refusals
      relu_ [layer1.0.relu (resnet.py:92)]: clamp(conv2d, 0.0, None)
      flatten [resnet.py:280]: reshape(mean, [-1, 512])
    """

    name = "normalize"
    level = Level.FLOAT
    effect = Effect.EXACT
    source = "docs/passes.md"
    establishes = {Fact.NORMALIZED}

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan = Plan(self.name, gm)
        check_aliasing(gm)
        for node in gm.graph.nodes:
            spelled = spelling(node, gm)
            if isinstance(spelled, Refused):
                plan.rejects.append(Reject(str(spelled), node))
            elif spelled is not None:
                plan.matches.append(Match(node, str(spelled)))
        # In-place calls first: with a limit on rewrites, no copy may go while something still writes into it.
        plan.matches.sort(key=lambda match: functional_overload(match.node.target) is match.node.target)
        return plan

    def apply(self, plan: Plan) -> PassResult:
        gm = plan.graph_module
        for match in plan.matches:
            # Spelled again: the arguments may have been respelled since.
            expression = spelling(match.node, gm)
            if expression is not None and not isinstance(expression, Refused):
                replace(gm, match.node, expression)
                plan.applied += 1
        erase_dead(gm)
        propagate(gm)
        return PassResult(gm, plan.applied > 0)


def spelling(node: fx.Node, gm: fx.GraphModule) -> Expression | Refused | None:
    """What ``node`` should be: an expression, the reason why it cannot be respelled, or None (it is spelled right)."""
    if node.op != "call_function" or not node.users:
        return None
    target = functional_overload(node.target)
    rule = _rule(node, target)
    if rule is not None:
        spelled = rule(node, gm)
    elif target is not None and target is not node.target:
        spelled = Op(target, *node.args, **node.kwargs)  # an in-place operator without a rule of its own
    else:
        return None
    return None if isinstance(spelled, Op) and spelled.is_same_call(node) else spelled


def _rule(node: fx.Node, target: Callable) -> Callable | None:
    """The rule for a call. Arithmetic on integers has none: its spellings would compute in floating point."""
    if target is operator.getitem:
        return PART_RULES.get(node.args[0].target)
    if target in MOVEMENT_RULES:
        return MOVEMENT_RULES[target]
    if target in MIXED_RULES:
        return MIXED_RULES[target]
    return FLOAT_RULES.get(target) if all(map(is_float, (node, *node.all_input_nodes))) else None
