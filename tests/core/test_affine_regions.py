"""The map itself, and where the two searches go: edits, the tensors on the way, and the reason for every refusal."""

import pytest
import torch

from fxcompress.analysis.affine import Affine, batch_norm_affine, constant_affine
from fxcompress.analysis.affine_regions import Region, backward_region, forward_region
from fxcompress.analysis.affine_rules import pull_movement, push_movement
from fxcompress.errors import ModelError
from fxcompress.meta import Statistics
from fxcompress.rewrite import Reject
from tests.support.float_graphs import FloatGraph, aten


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def channel_map(scale, shift, ndim=4):
    return Affine.per_channel(vector(*scale), vector(*shift), ndim)


def normal_statistics(mean, std, lo=None, hi=None):
    mean = vector(*mean)
    infinity = torch.full_like(mean, torch.inf)
    return Statistics(
        mean, vector(*std), -infinity if lo is None else vector(*lo), infinity if hi is None else vector(*hi), "test"
    )


# ---------------------------------------------------------------------------------------------------------- the map


def test_a_map_shrinks_where_it_is_constant_and_free_entries_become_the_identity():
    free = torch.nan
    settled = Affine(vector(2, 2, free).reshape(1, 3), vector(1, free, 3).reshape(1, 3)).settled()
    assert settled.scale.tolist() == [[2.0]]
    assert settled.shift.tolist() == [[1.0, 0.0, 3.0]]


def test_the_inverse_undoes_the_map():
    affine, x = channel_map([2, -0.5], [1, 3]), torch.randn(2, 2, 3, 3, dtype=torch.float64)
    inverse = affine.inverse()
    restored = inverse.scale * (affine.scale * x + affine.shift) + inverse.shift
    torch.testing.assert_close(restored, x)


def test_statistics_follow_the_map_and_a_negative_scale_swaps_the_bounds():
    before = normal_statistics([1, 1], [2, 2], lo=[0, 0], hi=[torch.inf, 5])
    after = channel_map([2, -3], [1, 0]).statistics(before, axis=1)
    assert after.mean.tolist() == [3, -3] and after.std.tolist() == [4, 6]
    assert after.lo.tolist() == [1, -15] and after.hi.tolist() == [torch.inf, 0]


def test_statistics_of_a_channel_that_becomes_constant_are_that_constant():
    after = channel_map([0], [7]).statistics(normal_statistics([1], [2]), axis=1)
    assert (after.mean, after.std, after.lo, after.hi) == (7, 0, 7, 7)


def test_statistics_of_the_whole_tensor_become_per_channel():
    whole = Statistics(*(torch.tensor(v, dtype=torch.float64) for v in (1.0, 2.0, -9.0, 9.0)), "test")
    assert channel_map([1, 2], [0, 0]).statistics(whole, axis=1).mean.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("affine", "axis"),
    [
        (channel_map([1, 2], [0, 0]), None),
        (channel_map([1, 2], [0, 0]), 2),
        (channel_map([1, 2, 3], [0, 0, 0]), 1),
        (channel_map([1, 0], [0, 0]).inverse(), 1),
    ],
    ids=["no channel axis", "another axis", "another channel count", "not finite"],
)
def test_statistics_that_do_not_follow_are_dropped(affine, axis):
    assert affine.statistics(normal_statistics([0, 0], [1, 1]), axis) is None


# ----------------------------------------------------------------------------------------- operators that are a map


def test_batch_norm_as_a_map():
    g = FloatGraph()
    node = g.batch_norm(
        g.input(2, 1, 2, 2), gamma=vector(2), beta=vector(0.1), mean=vector(0.3), var=vector(0.25), eps=0.0
    )
    gm, _ = g.finish(node)
    scale, shift = batch_norm_affine(gm, node)
    assert scale.item() == 4.0
    assert shift.item() == pytest.approx(0.1 - 4 * 0.3, abs=1e-15)


def test_batch_norm_without_affine_parameters_has_gamma_1_and_beta_0():
    g = FloatGraph()
    node = g.batch_norm(g.input(2, 1, 2, 2), mean=vector(2), var=vector(0.25), eps=0.0, affine=False)
    gm, _ = g.finish(node)
    assert [t.item() for t in batch_norm_affine(gm, node)] == [2.0, -4.0]


@pytest.mark.parametrize("var", [-0.1, torch.nan])
def test_a_broken_variance_is_the_users_error(var):
    g = FloatGraph()
    node = g.batch_norm(g.conv(g.input(2, 2, 2, 2), 2), var=vector(1.0, var))
    gm, _ = g.finish(node)
    with pytest.raises(ModelError, match=r"bn0.*in 1 channels"):
        batch_norm_affine(gm, node)


def test_nan_gamma_is_the_users_error():
    g = FloatGraph()
    node = g.batch_norm(g.conv(g.input(2, 2, 2, 2), 2), gamma=vector(1.0, torch.nan))
    gm, _ = g.finish(node)
    with pytest.raises(ModelError, match="NaN or Inf"):
        batch_norm_affine(gm, node)


@pytest.mark.parametrize(
    ("target", "left", "right", "scale", "shift"),
    [
        (aten.mul.Tensor, "x", 3.0, 3, 0),
        (aten.add.Tensor, 3.0, "x", 1, 3),
        (aten.sub.Tensor, "x", 3.0, 1, -3),
        (aten.sub.Tensor, 3.0, "x", -1, 3),
        (aten.mul.Tensor, "x", torch.full((2, 1, 1), 3.0), 3, 0),
    ],
)
def test_operators_with_a_constant_as_a_map(target, left, right, scale, shift):
    g = FloatGraph()
    x = g.input(2, 2, 2, 2)
    operands = [x if isinstance(v, str) else v if isinstance(v, float) else g.constant(v) for v in (left, right)]
    gm, _ = g.finish(node := g.call(target, *operands))
    found, affine = constant_affine(gm, node)
    assert found is x and affine.scale.shape == (1, 1, 1, 1)
    assert (affine.scale.item(), affine.shift.item()) == (scale, shift)


@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (5, 1, 2, 1, 1)], ids=["repeats x", "adds a dimension"])
def test_a_constant_that_enlarges_the_tensor_is_no_map(shape):
    g = FloatGraph()
    x = g.input(1, 2, 4, 4)
    gm, _ = g.finish(node := g.call(aten.mul.Tensor, x, g.constant(torch.ones(shape))))
    assert constant_affine(gm, node) is None


# --------------------------------------------------------------------------------------------------------- backward


def search_backward(g, tensor, affine):
    """The region behind ``tensor`` for a batch norm that reads it."""
    reader = g.batch_norm(tensor)
    g.finish(reader)
    return backward_region(tensor, reader, affine)


def test_the_shift_goes_to_one_operand_of_a_sum():
    g = FloatGraph()
    x = g.input(2, 3, 4, 4)
    left, right = g.conv(x, 2), g.conv(x, 2)
    region = search_backward(g, g.add(left, right), channel_map([2, 3], [4, 5]))
    assert {e.node: e.affine.shift.flatten().tolist() for e in region.edits} == {left: [4, 5], right: [0]}
    assert all(e.affine.scale.flatten().tolist() == [2, 3] for e in region.edits)


def test_the_shift_of_a_difference_changes_sign_on_the_right():
    g = FloatGraph()
    x = g.input(2, 3, 4, 4)
    left, right = g.relu(g.conv(x, 2)), g.conv(x, 2)
    region = search_backward(g, g.call(aten.sub.Tensor, left, right), channel_map([2, 3], [4, 5]))
    assert {e.node: e.affine.shift.flatten().tolist() for e in region.edits}[right] == [-4, -5]


def test_every_tensor_on_the_way_is_listed_with_its_map():
    g = FloatGraph()
    x = g.input(2, 3, 4, 4)
    a, b = g.conv(x, 1), g.conv(x, 2)
    cat = g.cat(a, b)
    pool = g.call(aten.avg_pool2d.default, cat, [2, 2], [2, 2], [0, 0], False, True, None)
    region = search_backward(g, pool, channel_map([2, 3, 4], [5, 6, 7]))
    found = {n: (m.scale.flatten().tolist(), m.shift.flatten().tolist()) for n, m in region.tensors.items()}
    assert found == {
        pool: ([2, 3, 4], [5, 6, 7]), cat: ([2, 3, 4], [5, 6, 7]), a: ([2], [5]), b: ([3, 4], [6, 7])
    }  # fmt: skip
    assert region.layers == [b, a]


def test_parts_of_one_tensor_join_their_maps():
    g = FloatGraph()
    conv = g.conv(g.input(2, 3, 4, 4), 4)
    halves = [g.call(aten.slice.Tensor, conv, 1, start, start + 2, 1) for start in (0, 2)]
    region = search_backward(g, g.cat(*reversed(halves)), channel_map([1, 1, 3, 4], [5, 6, 7, 7]))
    (edit,) = region.edits
    assert edit.node is conv
    assert edit.affine.scale.flatten().tolist() == [3, 4, 1, 1] and edit.affine.shift.flatten().tolist() == [7, 7, 5, 6]


@pytest.mark.parametrize(
    ("before", "after", "scale", "expected"),
    [
        ((2, 6, 2, 2), (-1, 24), [1, 2, 3, 4, 5, 6], (1, 24)),
        ((2, 6, 2, 2), (-1, 2, 3, 4), [1, 2, 3, 4, 5, 6], (1, 2, 3, 1)),
        ((2, 6, 1, 1), (-1, 6), [1, 2, 3, 4, 5, 6], (1, 6)),
        ((2, 6, 2, 2), (-1, 1, 6, 1, 4), [1, 2, 3, 4, 5, 6], (1, 1, 6, 1, 1)),
        ((2, 6, 2, 2), (-1, 4), [7], (1, 1)),
    ],
)
def test_a_reshape_keeps_the_map_as_small_as_it_can(before, after, scale, expected):
    g = FloatGraph()
    start = g.batch_norm(g.input(*before))
    node = g.call(aten.reshape.default, start, list(after))
    g.finish(g.call(aten.leaky_relu.default, node, 0.1))
    pushed = push_movement(node, vector(*scale).reshape(1, -1, 1, 1))
    assert pushed.shape == expected
    positions = g.values[start].new_ones(before) * vector(*scale).reshape(1, -1, 1, 1)
    assert torch.equal(pushed.expand(g.shape(node)), positions.reshape(after))
    assert torch.equal(pull_movement(node, pushed).expand(before), positions)


def test_a_map_that_varies_does_not_merge_with_the_batch():
    g = FloatGraph()
    start = g.batch_norm(g.input(2, 6, 4))
    node = g.call(aten.reshape.default, start, [-1, 4])
    g.finish(g.linear(node, 3))
    assert "reshapes the batch" in forward_region(start, channel_map(range(1, 7), [0] * 6, ndim=3)).reason
    region = forward_region(start, Affine.per_channel(vector(1, 2, 3, 4), vector(0), 3, axis=2))
    assert region.edits[0].affine.scale.shape == (1, 4)


def test_channels_that_go_nowhere_keep_the_identity():
    g = FloatGraph()
    conv = g.conv(g.input(2, 3, 4, 4), 4)
    region = search_backward(g, g.call(aten.slice.Tensor, conv, 1, 1, 3, 1), channel_map([2, 3], [4, 5]))
    assert region.edits[0].affine.scale.flatten().tolist() == [1, 2, 3, 1]
    assert region.edits[0].affine.shift.flatten().tolist() == [0, 4, 5, 0]


def test_a_tensor_reached_twice_takes_one_map_or_none():
    g = FloatGraph()
    conv = g.conv(g.input(2, 3, 4, 4), 2)
    pools = [g.call(aten.max_pool2d.default, conv, [k, k], [1, 1], [k // 2, k // 2], [1, 1], False) for k in (1, 3)]
    affine = channel_map([2, 3], [4, 5])
    region = search_backward(g, g.add(*pools), affine.without_shift())
    assert [e.node for e in region.edits] == [conv]

    g = FloatGraph()
    conv = g.conv(g.input(2, 3, 4, 4), 2)
    pools = [g.call(aten.max_pool2d.default, conv, [k, k], [1, 1], [k // 2, k // 2], [1, 1], False) for k in (1, 3)]
    reject = search_backward(g, g.add(*pools), affine)
    assert isinstance(reject, Reject) and reject.node is conv and "two paths" in reject.reason


def test_a_consumer_outside_the_region_blocks():
    g = FloatGraph()
    conv = g.conv(g.input(2, 3, 4, 4), 2)
    relu, reader = g.relu(conv), g.batch_norm(conv)
    g.finish(relu, reader)
    reject = backward_region(conv, reader, channel_map([2, 3], [4, 5]))
    assert reject.node is conv and reject.reason == "it is also read by clamp_default"


def test_a_layer_of_the_region_still_reads_its_own_input_as_it_was():
    g = FloatGraph()
    first = g.conv(g.input(2, 2, 4, 4), 2)
    second = g.conv(first, 2)
    reject = search_backward(g, g.add(second, first), channel_map([2, 3], [4, 5]))
    assert reject.node is first and "also read by" in reject.reason and "conv1" in reject.reason


def test_a_graph_input_blocks():
    g = FloatGraph()
    x = g.input(2, 2, 4, 4)
    assert "graph input" in search_backward(g, x, channel_map([2, 3], [4, 5])).reason


# ---------------------------------------------------------------------------------------------------------- forward


def search_forward(build, affine, bounds=None):
    """The region below a batch norm on a graph input of 2 channels; ``build`` continues from it."""
    g = FloatGraph()
    start = g.batch_norm(g.input(2, 2, 4, 4))
    g.finish(*build(g, start))
    return forward_region(start, affine, bounds)


def test_all_readers_absorb():
    region = search_forward(lambda g, y: (g.conv(y, 3), g.conv(y, 2, 3)), channel_map([2, 3], [4, 5]))
    assert len(region.edits) == 2 and all(e.affine.shift.flatten().tolist() == [4, 5] for e in region.edits)


def test_flattening_repeats_the_map_for_every_position():
    def build(g, y):
        return (g.linear(g.call(aten.reshape.default, y, [-1, 32]), 3),)

    region = search_forward(build, channel_map([2, 3], [4, 5]))
    assert region.edits[0].affine.shift.flatten().tolist() == [4] * 16 + [5] * 16


def test_other_operands_of_a_concatenation_keep_the_identity():
    g = FloatGraph()
    x = g.input(2, 2, 4, 4)
    start = g.batch_norm(x)
    g.finish(g.conv(g.cat(x, start), 3))
    region = forward_region(start, channel_map([2, 3], [4, 5]))
    assert region.edits[0].affine.scale.flatten().tolist() == [1, 1, 2, 3]
    assert region.edits[0].affine.shift.flatten().tolist() == [0, 0, 4, 5]


def test_padding_takes_the_value_that_maps_to_zero_within_the_known_interval():
    def build(g, y):
        return (g.conv(y, 3, 3, padding=1),)

    affine = channel_map([2, 4], [-4, 4])
    region = search_forward(build, affine, bounds=(-1, 2))
    assert region.edits[0].padding.tolist() == [2, -1]
    assert "outside" in search_forward(build, affine, bounds=(-1, 1)).reason
    assert "does not shift" in search_forward(build, affine).reason


def test_a_channel_without_scale_has_no_padding_value():
    def build(g, y):
        return (g.conv(y, 3, 3, padding=1),)

    assert isinstance(search_forward(build, channel_map([2, 0], [-4, 4]), bounds=(-9, 9)), Reject)
    region = search_forward(build, channel_map([2, 0], [-4, 0]), bounds=(-9, 9))
    assert isinstance(region, Region) and region.edits[0].padding.tolist() == [2, 0]


def test_a_graph_output_blocks():
    reject = search_forward(lambda g, y: (g.conv(y, 3), y), channel_map([2, 3], [4, 5]))
    assert "graph output" in reject.reason


def test_searching_changes_nothing():
    g = FloatGraph()
    x = g.input(2, 3, 4, 4)
    tensor = g.add(g.conv(x, 2), g.conv(x, 2))
    reader = g.batch_norm(tensor)
    gm, _ = g.finish(g.conv(reader, 2))
    code, meta = str(gm.graph), [dict(n.meta) for n in gm.graph.nodes]
    backward_region(tensor, reader, channel_map([2, 3], [4, 5]))
    forward_region(reader, channel_map([2, 3], [4, 5]))
    assert str(gm.graph) == code and [dict(n.meta) for n in gm.graph.nodes] == meta
