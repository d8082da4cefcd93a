"""The manager holds passes to their word: planted lies are caught by name and node."""

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

import fxcompress
from fxcompress import Effect, Fact, Level, Match, Pass, PassManager, Plan, RewriteRule, as_pass, default_passes
from fxcompress.capture import capture
from fxcompress.errors import LevelError, PassContractError, PipelineError
from fxcompress.graph import add_constant, calls, constant, is_call
from fxcompress.meta import carry, describe, tensor_meta
from fxcompress.options import Context
from fxcompress.pass_manager import rounds
from fxcompress.promises import InFloat64, Snapshot, check_statistics
from tests.support.graphs import ConvBnRelu, images, randomize

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = ConvBnRelu(3, 8), ConvBnRelu(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


@pytest.fixture
def gm():
    captured = capture(randomize(Net()), (images(4, 3, 8, 8),))
    captured.graph_module.meta["fxcompress"] = Context(example_inputs=captured.example_inputs)
    return captured.graph_module


def upto(name: str, *extra) -> list:
    """The default passes up to ``name``, then ``extra``."""
    passes = default_passes("int8")
    return [*passes[: passes.index_of(name) + 1], *extra]


class ScaleClamp(RewriteRule):
    """Claims EXACT, multiplies the output of the second clamp."""

    name = "scale_clamp"
    level = Level.FLOAT
    effect = Effect.EXACT
    factor = 1.01

    def match(self, node):
        second = is_call(node, aten.clamp.default) and is_call(node.args[0], aten.conv2d.default)
        second = second and is_call(node.args[0].args[0], aten.clamp.default)
        return Match(node, "scale") if second and not any(is_call(u, aten.mul.Tensor) for u in node.users) else None

    def rewrite(self, match, gm):
        with gm.graph.inserting_after(match.node):
            scaled = gm.graph.call_function(aten.mul.Tensor, (match.node, self.factor))
        match.node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def test_an_exact_pass_that_lies_is_caught_by_name_and_node(gm):
    manager = PassManager(upto("fuse_activation", ScaleClamp()))
    with pytest.raises(PassContractError) as caught:
        manager.run(gm)
    message = str(caught.value)
    assert message.startswith("scale_clamp: mul_tensor: declared EXACT but changes an output by 0.009")
    assert "This is a bug in the pass" in message


def test_a_change_below_float_noise_passes(gm):
    tiny = type("Tiny", (ScaleClamp,), {"name": "tiny", "factor": 1.0 + 1e-6})()
    manager = PassManager(upto("fuse_activation", tiny))
    manager.run(gm)
    assert manager.records[-1].rewrites == 1 and manager.records[-1].output_change < 1e-4


class Cancelling(nn.Module):
    """(conv + 1e5) - 1e5: in float32 the original loses digits that the folded network keeps."""

    def __init__(self, shift=1e5):
        super().__init__()
        self.shift = shift
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) - self.shift)


@pytest.fixture
def ill_conditioned():
    model = randomize(Cancelling())
    with torch.no_grad():
        model.norm.bias += 1e5
    captured = capture(model, (images(4, 3, 8, 8),))
    captured.graph_module.meta["fxcompress"] = Context(example_inputs=captured.example_inputs)
    return captured.graph_module


def test_an_honest_pass_is_not_blamed_for_float32_noise(ill_conditioned):
    manager = PassManager(upto("fold_batch_norm"))
    manager.run(ill_conditioned)
    assert manager.records[-1].rewrites and manager.records[-1].output_change > 1e-4


def test_means_that_differ_in_float32_only_are_no_stale_statistics():
    model = randomize(nn.Sequential(Cancelling(1e7), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    with torch.no_grad():
        model[0].norm.bias += 1e7
    captured = capture(model, (images(4, 3, 8, 8),))
    captured.graph_module.meta["fxcompress"] = Context(example_inputs=captured.example_inputs)
    harvested = PassManager(upto("harvest_statistics"))
    gm = harvested.run(captured.graph_module)
    before, fold = harvested.last, default_passes("int8")[default_passes("int8").index_of("fold_batch_norm")]
    exactly = InFloat64(before, lambda graph: list(rounds(fold, graph))[-1][0])
    after = Snapshot(list(rounds(fold, gm))[-1][0], before.inputs)
    with pytest.raises(PassContractError, match="kept its old statistics"):
        check_statistics("fold_batch_norm", before, after)
    check_statistics("fold_batch_norm", before, after, exactly)


def test_a_lie_is_caught_in_an_ill_conditioned_network_too(ill_conditioned):
    class Halve(RewriteRule):
        name = "halve"
        level = Level.FLOAT
        effect = Effect.EXACT

        def match(self, node):
            return Match(node) if is_call(node, aten.clamp.default) and node.args[2] is None else None

        def rewrite(self, match, gm):
            match.node.args = (*match.node.args[:2], 0.1)

    with pytest.raises(PassContractError, match=r"halve: relu.* in float64\)"):
        PassManager(upto("fuse_activation", Halve())).run(ill_conditioned)


def test_a_lossy_pass_may_change_values_and_the_record_says_how_much(gm):
    lossy = type("Lossy", (ScaleClamp,), {"name": "lossy", "effect": Effect.LOSSY})()
    manager = PassManager(upto("fuse_activation", lossy))
    manager.run(gm)
    assert 1e-3 < manager.records[-1].output_change < 2e-2


class RescaleWithoutStatistics(RewriteRule):
    """w1 / 2 and w2 * 2 across a ReLU: exact, but the tensor between keeps its old statistics."""

    name = "rescale_without_statistics"
    level = Level.FLOAT
    effect = Effect.EXACT
    honest = False

    def match(self, node):
        pair = is_call(node, aten.conv2d.default) and is_call(node.args[0], aten.clamp.default)
        return Match(node) if pair and "scaled" not in node.args[1].target else None

    def rewrite(self, match, gm):
        second = match.node
        first = second.args[0].args[0]
        for conv, factor, names in ((first, 0.5, ("weight", "bias")), (second, 2.0, ("weight",))):
            for index, name in enumerate(names, start=1):
                with gm.graph.inserting_before(conv):
                    new = add_constant(gm, f"scaled_{name}", constant(gm, conv.args[index]) * factor, conv)
                conv.update_arg(index, new)
        if self.honest:
            describe(first, statistics=None)


def test_stale_statistics_are_caught(gm):
    with pytest.raises(PassContractError, match=r"rescale_without_statistics: conv2d.*stem.*kept its old statistics"):
        PassManager(upto("fuse_activation", RescaleWithoutStatistics())).run(gm)


def test_statistics_that_moved_along_are_accepted(gm):
    honest = type("Honest", (RescaleWithoutStatistics,), {"name": "honest", "honest": True})()
    manager = PassManager(upto("fuse_activation", honest))
    manager.run(gm)
    assert manager.records[-1].rewrites == 1


class WriteInPlace(Pass):
    name = "write_in_place"
    level = Level.FLOAT
    effect = Effect.EXACT

    def plan(self, gm):
        done = gm.meta.get("written")
        return Plan(self.name, gm, [] if done else [Match(next(calls(gm, aten.linear.default)))])

    def apply(self, plan):
        gm = plan.graph_module
        constant(gm, plan.matches[0].node.args[1]).mul_(1.0)
        gm.meta["written"], plan.applied = True, 1
        return PassResult(gm, True)


def test_writing_into_a_parameter_is_caught(gm):
    with pytest.raises(PassContractError, match=r"write_in_place: wrote into the parameter head\.weight"):
        PassManager(upto("fuse_activation", WriteInPlace())).run(gm)


class AddInput(RewriteRule):
    name = "add_input"
    level = Level.FLOAT
    effect = Effect.EXACT

    def match(self, node):
        return Match(node) if node.op == "placeholder" and node.graph.find_nodes(op="placeholder") == [node] else None

    def rewrite(self, match, gm):
        with gm.graph.inserting_after(match.node):
            gm.graph.placeholder("extra").meta["val"] = match.node.meta["val"]


def test_a_pass_that_changes_the_graph_s_inputs_is_caught(gm):
    """Its function could not be compared any more: that must not count as equal."""
    with pytest.raises(LevelError, match="2 graph inputs for 1 example inputs"):
        PassManager(upto("fuse_activation", AddInput())).run(gm)


class NeverDone(RewriteRule):
    name = "never_done"
    level = Level.FLOAT
    effect = Effect.EXACT

    def match(self, node):
        return Match(node) if is_call(node, aten.linear.default) else None

    def rewrite(self, match, gm):
        pass


def test_a_pass_that_never_finishes_is_stopped(gm):
    with pytest.raises(PassContractError, match=r"never_done.*still finds work after 100 rounds"):
        PassManager(upto("fuse_activation", NeverDone())).run(gm)


class PlantOperator(RewriteRule):
    name = "plant_operator"
    level = Level.FLOAT
    effect = Effect.LOSSY

    def match(self, node):
        planted = any(is_call(user, aten.cumsum.default) for user in node.users)
        return Match(node) if is_call(node, aten.clamp.default) and not planted else None

    def rewrite(self, match, gm):
        with gm.graph.inserting_after(match.node):
            planted = gm.graph.call_function(aten.cumsum.default, (match.node, 1))
        match.node.replace_all_uses_with(planted, delete_user_cb=lambda user: not is_call(user, aten.cumsum.default))


def test_an_operator_outside_the_dialect_is_caught(gm):
    with pytest.raises(LevelError, match=r"plant_operator: cumsum.*aten\.cumsum\.default is not in the float dialect"):
        PassManager(upto("fuse_activation", PlantOperator())).run(gm)


# -------------------------------------------------------------------------------------------------------- the order


def test_the_default_order_is_legal():
    PassManager(default_passes("int8"))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda p: p.without("harvest_statistics"), "canonicalize_affine needs STATISTICS"),
        (lambda p: p.without("assign_ranges"), "spiq needs RANGES"),
        (lambda p: [*p, p[0]], "the name 'normalize' occurs twice"),
        (
            lambda p: [*p[:-8], p[-1], *p[-8:-1]],
            "multiply_in_blocks runs at the integer level but the graph is at the float",
        ),
    ],
)
def test_illegal_orders_are_refused_before_any_work(edit, message):
    with pytest.raises(PipelineError, match=message):
        PassManager(edit(default_passes("int8")))


def test_editing_by_name():
    passes = default_passes("int8").insert_after("fold_batch_norm", ScaleClamp())
    assert passes.names[passes.index_of("fold_batch_norm") + 1] == "scale_clamp"
    assert "scale_clamp" not in passes.without("scale_clamp").names
    assert passes.replace("scale_clamp", NeverDone()).names.count("never_done") == 1
    with pytest.raises(PipelineError, match="Did you mean 'fold_batch_norm'"):
        passes.insert_before("fold_batchnorm", NeverDone())


def test_declarations_are_checked_when_the_class_is_made():
    with pytest.raises(TypeError, match="must declare effect: Effect"):
        type("Bad", (Pass,), {"name": "bad", "level": Level.FLOAT})
    with pytest.raises(TypeError, match="must be a set of Fact"):
        type("Bad", (Pass,), {"name": "bad", "level": Level.FLOAT, "effect": Effect.EXACT, "needs": {"ranges"}})
    assert type("Good", (Pass,), {"name": "good", "level": Level.FLOAT, "effect": Effect.EXACT, "needs": {Fact.RANGES}})


# ------------------------------------------------------------------------------------------- passes written for torch


def test_a_pass_written_for_torch_runs_in_the_pipeline():
    def double_relu(gm: fx.GraphModule) -> PassResult:
        for node in list(calls(gm, aten.clamp.default)):
            with gm.graph.inserting_after(node):
                again = carry(node, gm.graph.call_function(aten.clamp.default, (node, 0, None)))
            node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)
        return PassResult(gm, True)

    passes = default_passes("int8").insert_after("expand_batch_norm", double_relu)
    x = images(4, 3, 8, 8)
    net = fxcompress.compile(randomize(Net()), example_inputs=x, passes=passes)
    plain = fxcompress.compile(randomize(Net()), example_inputs=x)
    assert torch.equal(net(x), plain(x))  # fuse_activation merged the doubled clamps again
    assert any(p["name"] == "double_relu" and p["rewrites"] == 1 for p in net.report().passes)
    with pytest.raises(PipelineError, match="expected a Pass or a callable"):
        as_pass(3)


# ------------------------------------------------------------------------------------------------------- max_rewrites


def test_max_rewrites_stops_after_that_many(gm):
    total = PassManager(default_passes("int8"))
    total.run(capture_again())
    rewrites = sum(r.rewrites for r in total.records)
    for limit in (0, 1, rewrites // 2):
        manager = PassManager(default_passes("int8"), max_rewrites=limit)
        cut = manager.run(capture_again())
        assert sum(r.rewrites for r in manager.records) == limit
        cut(*capture_inputs())
    assert manager.levels.keys() <= {Level.FLOAT, Level.QDQ}


def capture_inputs():
    return (images(4, 3, 8, 8),)


def capture_again() -> fx.GraphModule:
    captured = capture(randomize(Net()), capture_inputs())
    captured.graph_module.meta["fxcompress"] = Context(example_inputs=captured.example_inputs)
    return captured.graph_module


def test_compile_with_max_rewrites_runs_without_a_certificate():
    x = images(4, 3, 8, 8)
    for limit in (0, 5, 40):
        net = fxcompress.compile(randomize(Net()), example_inputs=x, max_rewrites=limit)
        assert net(x).shape == (4, 4) and net.report().certificate is None


# ---------------------------------------------------------------------------------------------------------- the plan


def test_a_plan_prints_and_changes_nothing(gm):
    PassManager(upto("canonicalize_affine")).run(gm)
    before = str(gm.graph)
    plan = fxcompress.passes.FoldBatchNorm().plan(gm)
    assert str(gm.graph) == before and len(plan) == 2
    assert str(plan).splitlines()[0] == "fold_batch_norm: 2 rewrites, 0 refusals"
    assert all(tensor_meta(m.node).origin.module in str(m) for m in plan.matches)


@pytest.mark.parametrize("name", default_passes("int8").names)
def test_every_pass_is_idempotent(name):
    gm = PassManager(upto(name)).run(capture_again())
    again = next(p for p in default_passes("int8") if p.name == name)
    if again.level is again.result_level:
        assert len(again.plan(gm)) == 0
