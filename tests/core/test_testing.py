"""``try_pass`` lets honest passes through and catches the others; ``randomize`` hides nothing behind identities."""

import pytest
import torch
from torch import nn

from fxcompress import Effect, Level, Match, PassResult, RewriteRule
from fxcompress.errors import PassContractError
from fxcompress.passes import FoldBatchNorm
from fxcompress.testing import randomize, try_pass

aten = torch.ops.aten
X = torch.rand(2, 3, 8, 8)


def model() -> nn.Module:
    return randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))


class Rule(RewriteRule):
    name, level, effect = "a_rule", Level.FLOAT, Effect.EXACT

    def match(self, node):
        return Match(node, "a relu") if node.target is aten.clamp.default else None


def test_a_trial_tells_what_a_pass_did():
    trial = try_pass(FoldBatchNorm, model(), X, after="canonicalize_affine")
    assert trial.rewrites == 1 == len(trial.matches) and trial.refusals == [] and trial.change < 1e-5
    assert trial.operators == [aten.conv2d.default, aten.clamp.default]
    torch.testing.assert_close(trial.after(X), trial.before(X))


def test_a_trial_runs_with_options_at_any_place():
    class Looks(Rule):
        name, level = "looks", Level.QDQ

        def match(self, node):
            return None

    trial = try_pass(Looks(), model(), X, after="quantize", target="w4a8", input_range=(0, 1))
    assert torch.ops.fxcompress.quantize.default in trial.operators and trial.rewrites == 0 and trial.change is None


def test_a_plan_that_changes_the_graph_is_caught():
    class Impatient(Rule):
        name = "impatient"

        def match(self, node):
            if node.target is aten.clamp.default and node.args[2] is None:
                node.update_arg(2, 100.0)

    with pytest.raises(PassContractError, match=r"impatient: plan\(\) changed the graph"):
        try_pass(Impatient(), model(), X)


def test_a_pass_that_is_never_done_is_caught():
    class Restless(Rule):
        name = "restless"

        def match(self, node):
            last = node.target is aten.clamp.default and not any(u.target is aten.clamp.default for u in node.users)
            return Match(node, "one more") if last else None

        def rewrite(self, match, gm):
            with gm.graph.inserting_after(match.node):
                same = gm.graph.call_function(aten.clamp.default, (match.node, 0.0, None))
            match.node.replace_all_uses_with(same, delete_user_cb=lambda user: user is not same)

    with pytest.raises(PassContractError, match=r"restless: .*still finds work after 100 rounds"):
        try_pass(Restless(), model(), X)


def test_a_plan_that_is_not_carried_out_is_caught():
    """The pipeline stops when nothing was applied; that something was planned all the same is a mistake."""

    class Idle(Rule):
        name = "idle"

        def apply(self, plan):
            return PassResult(plan.graph_module, False)

    with pytest.raises(PassContractError, match=r"idle: .*finds work in its own result"):
        try_pass(Idle(), model(), X)


def test_a_lie_is_caught_as_in_the_pipeline():
    class Liar(Rule):
        name = "liar"

        def match(self, node):
            return super().match(node) if len(node.args) > 2 and node.args[2] is None else None

        def rewrite(self, match, gm):
            match.node.update_arg(2, 0.1)

    with pytest.raises(PassContractError, match=r"liar: .*declared EXACT but changes an output"):
        try_pass(Liar(), model(), X)


def test_randomized_networks_hide_nothing():
    net = model()
    assert not net.training
    norm = net[1]
    assert not torch.allclose(norm.running_var, torch.ones(4)) and norm.running_mean.abs().min() > 0
    assert norm.weight.min() >= 0.5 and (norm.bias != 0).all()
    same = model()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), same.state_dict().values(), strict=True))
