"""Prune products: leave products of blocks out of the algorithm, instead of weights out of the layer.

    C_ij = sum_r c[i, j, r] S_r T_r        without the products r whose loss changes C the least

A product that is left out takes its sum of weight blocks, its operand and its additions with it. Only layers in blocks
(``multiply_in_blocks``) are pruned. The sums are taken of the codes minus their zero point: what is lost is lost of real numbers.

Which products go is ranked by what they contribute, relative to the layer's result:

    "random"       seeded
    "magnitude"    |c[:, :, r]| |S_r|: weights only
    "output"       |c[:, :, r]| |S_r T_r| on the example inputs
    "learned"      gates learned on the example inputs (``product_gates.py``): those that the result misses least together

and decided for all layers of one algorithm together (``shared``), or layer by layer.

Level: integer. Effect: LOSSY (the report has the change of the outputs, and the multiplications and additions that are left).
Not in the default list: ``default_passes("int8").insert_after("multiply_in_blocks", PruneProducts(1))``.
Source: Yvinec 2023 (thesis), equation 4.6 and appendix C.4, the variant that drops products.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.errors import OptionError, nearest
from fxcompress.graph import add_constant, argument, calls, constant, one_sample_shape, placeholders
from fxcompress.meta import tensor_meta
from fxcompress.options import context
from fxcompress.product_gates import close_gates, gram
from fxcompress.reference_bilinear import bilinear_linear, layer_products
from fxcompress.rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan, Reject
from fxcompress.sum_schedule import SumSchedule, sums_without, terms_without

ops = torch.ops.fxcompress
CRITERIA = ("learned", "output", "magnitude", "random")
PRUNED = "products_pruned"  # node.meta key of a layer that has lost products


class PruneProducts(Pass):
    """See the module.

    Args:
        count: products left out of every layer.
        criterion: "output", "learned", "magnitude" or "random".
        shared: the same products in all layers of one algorithm.
        seed: of "random".

    Raises ``OptionError`` for an unknown criterion or a count below 0.
    """

    name = "prune_products"
    level = Level.INTEGER
    effect = Effect.LOSSY
    source = "Yvinec 2023, equation 4.6, appendix C.4"
    needs = frozenset({Fact.LOWERED})

    def __init__(self, count: int, criterion: str = "output", shared: bool = True, seed: int = 0):
        if criterion not in CRITERIA:
            raise OptionError(
                f"unknown criterion {criterion!r}", stage=self.name, remedy=nearest(str(criterion), CRITERIA)
            )
        if not isinstance(count, int) or count < 0:
            raise OptionError(f"count is {count!r}", stage=self.name, expected="a whole number >= 0")
        self.count, self.criterion, self.shared, self.seed = count, criterion, shared, seed

    def plan(self, gm: fx.GraphModule) -> Plan:
        plan, layers = Plan(self.name, gm), []
        for node in calls(gm, ops.bilinear_linear.default):
            if self.count == 0 or PRUNED in node.meta:
                continue
            if (reason := self._refusal(node)) is not None:
                plan.rejects.append(Reject(reason, node))
            else:
                layers.append(node)
        for node, evidence in self._evidence(gm, layers).items():
            gone, scores = self._choose(evidence)
            names = ", ".join(str(r + 1) for r in gone)
            plan.matches.append(
                Match(node, f"leaves out products {names} of {len(scores)}, scores {scores[gone].tolist()}", gone)
            )
        return plan

    def apply(self, plan: Plan) -> PassResult:
        for match in plan.matches:
            _leave_out(plan.graph_module, match.node, match.data)
            plan.applied += 1
        return PassResult(plan.graph_module, plan.applied > 0)

    def _refusal(self, node: fx.Node) -> str | None:
        x = argument(node, "x")
        rows = one_sample_shape(x)
        del rows[argument(node, "axis")]
        blocks = argument(node, "blocks")[2]
        if torch.Size(rows).numel() % blocks:
            return f"a sample has {torch.Size(rows).numel()} rows, and blocks of every {blocks} would mix samples"
        if tensor_meta(x).qparams is None:
            return "the zero point of its input is unknown"
        if self.count >= one_sample_shape(argument(node, "weight"))[0]:
            return f"it has {one_sample_shape(argument(node, 'weight'))[0]} products only"
        return None

    def _choose(self, evidence: Tensor) -> tuple[list[int], Tensor]:
        """The products to leave out, and the score of each."""
        if self.criterion == "learned":
            return close_gates(evidence, self.count), evidence.diag()
        return sorted(evidence.argsort(stable=True)[: self.count].tolist()), evidence

    def _evidence(self, gm: fx.GraphModule, layers: list[fx.Node]) -> dict[fx.Node, Tensor]:
        """Scores (R,) of sum 1 per layer, or its Gram matrix (R, R) over |C|^2; those of one algorithm added up if they are shared."""
        inputs = _layer_inputs(gm, layers, self.criterion) if self.criterion in ("learned", "output") else {}
        generator = torch.Generator().manual_seed(self.seed)
        scores = {}
        for node in layers:
            if self.criterion == "random":
                score = torch.rand(constant(gm, argument(node, "weight")).shape[0], generator=generator)
            elif self.criterion == "learned":
                score = gram(*_products(gm, node, inputs[node]))
            else:
                score = _contribution(gm, node, inputs.get(node))
            scores[node] = score.double() / score.sum().clamp(min=1e-30)
        if not self.shared:
            return scores
        alike = {node: (argument(node, "encode").target, argument(node, "decode").target) for node in layers}
        return {node: sum(scores[other] for other in layers if alike[other] == alike[node]) for node in layers}


def _layer_inputs(gm: fx.GraphModule, layers: list[fx.Node], criterion: str) -> dict[fx.Node, Tensor]:
    """What each layer reads on the example inputs."""
    found, wanted = {}, {argument(node, "x") for node in layers}

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if node in wanted:
                found[node] = value
            return value

    examples = context(gm).example_inputs
    if len(examples) != len(placeholders(gm)):
        raise OptionError(
            f'criterion="{criterion}" needs example inputs',
            stage=PruneProducts.name,
            remedy='Choose criterion="magnitude".',
        )
    with torch.no_grad():
        Recorder(gm).run(*examples)
    return {node: found[argument(node, "x")] for node in layers}


def _contribution(gm: fx.GraphModule, node: fx.Node, x: Tensor | None) -> Tensor:
    """(R,): the norm of what each product adds to the result; of its weights alone without x."""
    values, decode = _products(gm, node, x)
    return decode.double().norm(dim=0) * values.double().flatten(1).norm(dim=1)


def _products(gm: fx.GraphModule, node: fx.Node, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """The products (R, ...), or the sums of weight blocks without x; what the blocks of the result take from them, (n p, R)."""
    weight, encode, decode = (constant(gm, argument(node, name)) for name in ("weight", "encode", "decode"))
    blocks = argument(node, "blocks")
    taken = SumSchedule.from_tensor(decode, len(weight), blocks[0] * blocks[2]).coefficients
    if x is None:
        return weight, taken
    return layer_products(x, _zero_point(node), weight, encode, blocks, argument(node, "axis")), taken


def _zero_point(node: fx.Node) -> Tensor:
    return tensor_meta(argument(node, "x")).qparams.zero_point.to(torch.int32)


def _leave_out(gm: fx.GraphModule, node: fx.Node, gone: list[int]) -> None:
    """In place. The zero point moves from the bias into the sums."""
    x, _, weight, bias, encode, decode, blocks, axis = node.args
    sums, programs = constant(gm, weight), [constant(gm, encode), constant(gm, decode)]
    n, m, p = blocks
    zero_point = _zero_point(node)
    zeros = zero_point.expand(p, one_sample_shape(x)[axis]).contiguous()
    of_zero = bilinear_linear(zeros, torch.zeros_like(zero_point), sums, constant(gm, bias), *programs, blocks, -1)[0]
    keep = [r for r in range(len(sums)) if r not in gone]
    encoded = sums_without(SumSchedule.from_tensor(programs[0], m * p, len(sums)), gone)
    decoded = terms_without(SumSchedule.from_tensor(programs[1], len(sums), n * p), gone)
    with gm.graph.inserting_before(node):
        new = [
            add_constant(gm, hint, value, node)
            for hint, value in (
                (f"{node.name}_zero_point", zero_point), (weight.target, sums[keep]), (bias.target, of_zero),
                (encode.target, encoded.tensor), (decode.target, decoded.tensor),
            )
        ]  # fmt: skip
    node.args = (x, *new, blocks, axis)
    node.meta[PRUNED] = gone
