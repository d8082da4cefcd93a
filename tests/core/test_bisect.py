"""``bisect`` names the pass and the rewrite that broke a metric, and says so when nothing did."""

import math
import re

import pytest
import torch
from torch import nn
from torch.fx.passes.infra.pass_base import PassResult

import fxcompress
from fxcompress import Effect, Level, Match, Pass, Plan, RewriteRule, default_passes
from fxcompress.errors import InputError, OptionError
from fxcompress.graph import calls, is_call
from fxcompress.meta import tensor_meta
from fxcompress.report import sqnr_db
from tests.support.graphs import ConvBnRelu, ResidualBlock, images, randomize

aten = torch.ops.aten
LAYERS = 6


class Chain(nn.Module):
    """Six convolutions in a row, (N, 3, 6, 6) to (N, 4)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(ConvBnRelu(3, 4), *(ConvBnRelu(4, 4) for _ in range(LAYERS - 1)))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.layers(x).mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    """Without biases, so that every layer matters: scaling one scales the output."""
    model = randomize(Chain())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.bias.zero_()
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.zero_()
    return model


@pytest.fixture(scope="module")
def x():
    return images(8, 3, 6, 6)


@pytest.fixture(scope="module")
def fidelity(model, x):
    """Signal to noise against the float model in dB, at most 60: the float network itself is not infinitely good."""
    with torch.no_grad():
        expected = model(x)
    return lambda net: min(60.0, sqnr_db(expected, net(x)))


class ScaleClamps(RewriteRule):
    """Puts a multiplication behind every clamp: by 1, but by 0.01 in the modules of ``bad``."""

    name = "scale_clamps"
    level = Level.FLOAT
    effect = Effect.LOSSY
    bad = ("layers.3.2",)

    def match(self, node):
        if is_call(node, aten.clamp.default) and not any(is_call(u, aten.mul.Tensor) for u in node.users):
            return Match(node, f"scale by {self.factor(node)}")

    def factor(self, node):
        return 0.01 if tensor_meta(node).origin.module in self.bad else 1.0

    def rewrite(self, match, gm):
        with gm.graph.inserting_after(match.node):
            scaled = gm.graph.call_function(aten.mul.Tensor, (match.node, self.factor(match.node)))
        match.node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def planted(*passes):
    """The passes behind everything that happens at the float level but the ranges."""
    result = default_passes("int8")
    for p in passes:
        result.insert_before("assign_ranges", p)
    return result


# ------------------------------------------------------------------------------------------------------------ found


def test_one_bad_rewrite_among_many_is_found(model, x, fidelity):
    found = fxcompress.bisect(model, fidelity, example_inputs=x, passes=planted(ScaleClamps()), threshold=20)
    assert (found.pass_name, found.rewrite, found.rewrites) == ("scale_clamps", 4, LAYERS)
    assert found.pass_index == planted(ScaleClamps()).index_of("scale_clamps")
    assert (
        found.module == "layers.3.2"
        and re.fullmatch(r"test_bisect.py:\d+", found.source)
        and found.change == "scale by 0.01"
    )
    assert found.after < 20 <= found.before and found.limit == 20
    assert str(found) == (
        f"scale_clamps breaks it with rewrite 4 of 6, at {found.node} [layers.3.2 ({found.source})] (scale by 0.01): "
        f"it takes the metric from 60 to {found.after:.4g} (limit 20, {found.evaluations} evaluations)."
    )


@pytest.mark.parametrize("first", [0, 1, 2, 5])
def test_of_several_bad_rewrites_the_first_is_named(model, x, fidelity, first):
    bad = tuple(f"layers.{i}.2" for i in range(first, LAYERS))
    p = type("Bad", (ScaleClamps,), {"name": "bad", "bad": bad})()
    found = fxcompress.bisect(model, fidelity, example_inputs=x, passes=planted(p), threshold=20)
    assert (found.pass_name, found.rewrite, found.module) == ("bad", first + 1, f"layers.{first}.2")


def test_the_search_is_logarithmic(model, x, fidelity):
    passes = planted(ScaleClamps())
    found = fxcompress.bisect(model, fidelity, example_inputs=x, passes=passes, threshold=20)
    assert found.evaluations <= 3 + math.ceil(math.log2(len(passes))) + math.ceil(math.log2(LAYERS))


def test_a_lossy_pass_is_blamed_at_the_rewrite_that_costs_too_much(model, x, fidelity):
    found = fxcompress.bisect(model, fidelity, "w2a8", calibration_data=[x], threshold=15, weight_quantizer="nearest")
    assert found.pass_name == "quantize" and "codes" in found.change
    assert found.before >= 15 > found.after


def test_an_atomic_pass_is_named_alone_and_why(model, x, fidelity):
    class Negate(Pass):
        name = "negate"
        level = Level.FLOAT
        effect = Effect.LOSSY
        atomic = True

        def plan(self, gm):
            heads = [
                n for n in calls(gm, aten.linear.default) if not any(is_call(u, aten.neg.default) for u in n.users)
            ]
            return Plan(self.name, gm, [Match(n) for n in heads])

        def apply(self, plan):
            for match in plan.matches:
                with match.node.graph.inserting_after(match.node):
                    negated = match.node.graph.call_function(aten.neg.default, (match.node,))
                match.node.replace_all_uses_with(negated, delete_user_cb=lambda user, new=negated: user is not new)
                plan.applied += 1
            return PassResult(plan.graph_module, True)

    found = fxcompress.bisect(model, fidelity, example_inputs=x, passes=planted(Negate()), threshold=20)
    assert (found.pass_name, found.rewrite) == ("negate", None)
    assert str(found).startswith("negate breaks it: it takes the metric from 60 to -6.0")
    assert str(found).endswith("; it is atomic, its 1 rewrites are applied together.")


class Detour(RewriteRule):
    """Swaps two axes behind the first clamp, and swaps them back, negated, in front of the next convolution."""

    name = "detour"
    level = Level.FLOAT
    effect = Effect.LOSSY

    def match(self, node):
        module = tensor_meta(node).origin.module
        done = any(is_call(n, aten.permute.default) for n in (*node.users, *node.all_input_nodes[:1]))
        if is_call(node, aten.clamp.default) and module == "layers.0.2" and not done:
            return Match(node, "swap")
        if (
            is_call(node, aten.conv2d.default)
            and module == "layers.1.0"
            and not is_call(node.args[0], aten.neg.default)
        ):
            return Match(node, "swap back")

    def rewrite(self, match, gm):
        if match.summary == "swap":
            with gm.graph.inserting_after(match.node):
                swapped = gm.graph.call_function(aten.permute.default, (match.node, [0, 2, 1, 3]))
            match.node.replace_all_uses_with(swapped, delete_user_cb=lambda user: user is not swapped)
            return
        with gm.graph.inserting_before(match.node):
            back = gm.graph.call_function(aten.permute.default, (match.node.args[0], [0, 2, 1, 3]))
            match.node.update_arg(0, gm.graph.call_function(aten.neg.default, (back,)))


def test_a_pass_that_cannot_be_cut_is_named_alone_and_why(model, x, fidelity):
    found = fxcompress.bisect(model, fidelity, calibration_data=[x], passes=planted(Detour()), threshold=20)
    assert (found.pass_name, found.rewrite) == ("detour", None)
    assert "; cut short after 1 rewrites of 2, the graph does not run (" in str(found)


def test_a_real_metric_on_a_residual_network():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = ConvBnRelu(3, 8), ResidualBlock(8), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.block(self.stem(x)).mean((2, 3)))

    model, data = randomize(Classifier()), images(64, 3, 8, 8)
    with torch.no_grad():
        labels = model(data).argmax(1)

    def accuracy(net):
        return (net(data).argmax(1) == labels).float().mean()  # a tensor is a number too

    fine = fxcompress.bisect(model, accuracy, calibration_data=[(data, labels)], tolerance=0.1)
    assert not fine.broken and fine.reference == 1.0 and fine.after >= 0.9
    coarse = fxcompress.bisect(model, accuracy, "w2a2", calibration_data=[(data, labels)], tolerance=0.1)
    assert coarse.pass_name == "quantize" and coarse.before >= coarse.limit > coarse.after


# --------------------------------------------------------------------------------------------------------- not found


def test_nothing_is_broken(model, x, fidelity):
    found = fxcompress.bisect(model, fidelity, example_inputs=x, threshold=10)
    assert not found.broken and found.pass_index is None and found.rewrite is None
    assert found.reference == found.before == 60 and found.after >= 10
    assert str(found) == (
        f"Nothing breaks the metric: it is 60 for the float network and {found.after:.4g} after the last pass "
        "(limit 10, 3 evaluations)."
    )


def test_the_model_itself_misses_the_limit(model, x, fidelity):
    found = fxcompress.bisect(model, fidelity, example_inputs=x, threshold=70)
    assert found.broken and found.pass_name == "model"
    assert str(found) == "The metric is broken before compilation: the model itself gives 60 (limit 70, 2 evaluations)."


class OtherWhenExported(nn.Module):
    def forward(self, x):
        return x * 0 if torch.compiler.is_exporting() else x * 2


def test_capture_is_named_when_the_captured_graph_is_broken(x):
    found = fxcompress.bisect(OtherWhenExported().eval(), lambda net: float(net(x).abs().mean()), example_inputs=x)
    assert found.pass_name == "capture" and found.after == 0 and found.before == found.reference > 1
    assert str(found).startswith("capture breaks it: it takes the metric from 1.") and "no pass has run yet" in str(
        found
    )


# ------------------------------------------------------------------------------------------------------- the arguments


def test_a_bool_metric(model, x, fidelity):
    passes = planted(ScaleClamps())
    found = fxcompress.bisect(model, lambda net: fidelity(net) > 20, example_inputs=x, passes=passes)
    assert (found.pass_name, found.rewrite, found.before, found.after) == ("scale_clamps", 4, 1, 0)


def test_nan_is_broken(model, x, fidelity):
    def metric(net):
        return fidelity(net) if fidelity(net) > 20 else math.nan

    found = fxcompress.bisect(model, metric, example_inputs=x, passes=planted(ScaleClamps()), tolerance=0.9)
    assert (found.pass_name, found.rewrite) == ("scale_clamps", 4) and math.isnan(found.after)


def test_the_tolerance_is_a_share_of_the_model_s_metric(model, x, fidelity):
    found = fxcompress.bisect(model, lambda net: -fidelity(net), example_inputs=x, tolerance=0.25)
    assert found.reference == -60 and found.limit == -75 and not found.broken


def test_without_examples_the_metric_s_first_call_is_the_example(model, x, fidelity):
    assert not fxcompress.bisect(model, fidelity, threshold=10).broken


def test_the_metric_of_raw_pixels_is_compared_with_the_captured_network(model, x):
    pixels = (x * 20 + 128).clamp(0, 255)
    with torch.no_grad():
        expected = model((pixels - 128) / 20)
    found = fxcompress.bisect(
        model, lambda net: min(60.0, sqnr_db(expected, net(pixels))), example_inputs=pixels, input_range=(0, 255),
        input_normalization=(128.0, 20.0), threshold=10,
    )  # fmt: skip
    assert not found.broken and found.reference == 60


def test_capture_and_calibration_happen_once(model, x, fidelity, monkeypatch):
    runs, exports = [], []
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: exports.append(1) or export(*args, **kwargs))

    def data(net):
        runs.append(1)
        net(x)

    fxcompress.compile(model, "w2a8", example_inputs=x, calibration_data=data)
    once = len(runs), len(exports)
    fxcompress.bisect(model, fidelity, "w2a8", example_inputs=x, calibration_data=data, threshold=15)
    assert (len(runs), len(exports)) == (2 * once[0], 2 * once[1])


def test_the_model_is_not_modified(model, x, fidelity):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fxcompress.bisect(model, fidelity, "w2a8", example_inputs=x, threshold=15)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "metric, options, error, message",
    [
        (3, {}, OptionError, "bisect: the metric is a int; expected a function of a module. For example: lambda net: "
         "float((net(images).argmax(1) == labels).float().mean())."),
        (lambda net: "good", {}, OptionError, "bisect: the metric returned a str; expected a number or a bool. Higher is better: "
         "return accuracy, or minus the loss."),
        (lambda net: 1.0, {}, InputError, "bisect: the metric never called the module it was given. Call it on inputs: "
         "lambda net: accuracy(net(images), labels)."),
        (lambda net: math.inf, {"example_inputs": images(2, 3, 6, 6)}, OptionError,
         "bisect: the metric of the model is inf, of which no share can be taken. Pass threshold=, the lowest value that is good."),
        (lambda net: 1.0, {"tolerance": -1, "example_inputs": images(2, 3, 6, 6)}, OptionError,
         "bisect: tolerance is -1; expected a number >= 0. 0.01 allows the metric to fall by one per cent."),
        (lambda net: 1.0, {"integer_io": True}, OptionError, "bisect: bisect cannot be combined with integer_io. It asks the metric "
         "about float outputs, after as many rewrites as it chooses itself."),
        (lambda net: 1.0, {"taget": "int8"}, OptionError, "compile: unknown option 'taget'. Did you mean 'target'?"),
    ],
)  # fmt: skip
def test_mistakes(model, metric, options, error, message):
    with pytest.raises(error) as caught:
        fxcompress.bisect(model, metric, **options)
    assert str(caught.value) == message
