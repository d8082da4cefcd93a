"""One pass over the data gives what the whole data would; calibration failures name the node."""

import gc
import itertools
import weakref
from types import SimpleNamespace as Nodes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxcompress import observers
from fxcompress.errors import CalibrationError
from fxcompress.meta import Origin, describe
from fxcompress.observers import BINS, Histogram, observe
from tests.support.float_graphs import FloatGraph


def observed(*batches, axis=None):
    h = Histogram(axis)
    for batch in batches:
        h.update(batch)
    return h


def scaled_batches(seed, scales):
    """Batches (n, 3, 4) of multiples of 1/64: every bin edge is a power of two, so counts can be compared exactly."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(-64, 65, (n, 3, 4), generator=random) / 64 * 2.0**k for n, k in scales]


scales = st.lists(st.tuples(st.integers(1, 5), st.integers(-6, 8)), min_size=1, max_size=5)


@given(st.integers(0, 99), scales)
def test_streaming_counts_equal_the_counts_of_all_data_at_once(seed, scales):
    batches = scaled_batches(seed, scales)
    everything = torch.cat(batches).flatten()
    h = observed(*batches)
    nonzero = everything[everything != 0]
    assert h.zeros == len(everything) - len(nonzero)
    assert float(h.counts.sum()) == len(nonzero)
    ends = h.edges[::256]
    expected = [float(((nonzero >= lo) & (nonzero < hi)).sum()) for lo, hi in itertools.pairwise(ends)]
    expected[-1] += float((nonzero == h.limit).sum())  # the last bin is closed
    assert h.counts.reshape(-1, 256).sum(1).tolist() == expected


@given(st.integers(0, 99), scales)
def test_moments_and_extremes_are_exact_per_channel(seed, scales):
    batches = scaled_batches(seed, scales)
    rows = torch.cat(batches).movedim(1, 0).flatten(1).double()
    s = observed(*batches, axis=1).statistics()
    torch.testing.assert_close(s.mean, rows.mean(1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(s.std, rows.std(1, correction=0), rtol=1e-5, atol=1e-9)
    assert s.lo.tolist() == rows.amin(1).tolist() and s.hi.tolist() == rows.amax(1).tolist()
    assert s.provenance == "calibrated"


@given(st.integers(0, 99), scales)
def test_the_limit_wastes_less_than_half_of_the_bins(seed, scales):
    h = observed(*scaled_batches(seed, scales))
    largest = max(abs(h.min), abs(h.max))
    assert largest <= h.limit < 2 * largest


def test_a_tensor_of_zeros_and_a_constant():
    zeros = observed(torch.zeros(2, 3))
    assert (zeros.min, zeros.max, zeros.zeros, float(zeros.counts.sum())) == (0, 0, 6, 0)
    seven = observed(torch.full((4,), 7.0), torch.zeros(2))
    assert (seven.min, seven.max, seven.limit, seven.zeros) == (0, 7, 8, 2)
    assert float(seven.counts[BINS * 15 // 16]) == 4  # the bin that begins at 7


def test_large_batches_are_counted_in_chunks(monkeypatch):
    x = torch.randn(1000)
    whole = observed(x)
    monkeypatch.setattr(observers, "_CHUNK", 7)
    assert torch.equal(observed(x).counts, whole.counts)


def test_a_tensor_without_channel_axis_has_scalar_statistics():
    s = observed(torch.tensor([[1.0, 3.0]])).statistics()
    assert s.mean.shape == () and (float(s.mean), float(s.std)) == (2, 1)


# -------------------------------------------------------------------------------------------------------------- observe


def network():
    g = FloatGraph(dtype=torch.float32)
    x = g.input(2, 3, 4, 4)
    conv = g.conv(x, 5)
    relu = g.relu(conv)
    gm, inputs = g.finish(relu)
    return gm, inputs, Nodes(x=x, conv=conv, relu=relu)


def test_observe_records_the_nodes_it_was_asked_for():
    gm, (x,), n = network()
    h = observe(gm, [n.x, n.relu], lambda model: [model(part) for part in x.split(1)])
    assert list(h) == [n.x, n.relu]
    (value,) = gm(x)
    assert (h[n.relu].min, h[n.relu].max) == (float(value.min()), pytest.approx(float(value.max())))
    assert h[n.relu].statistics().channels == 5 and h[n.x].number == 2 * 4 * 4


def test_the_module_returns_what_the_graph_returns():
    gm, (x,), n = network()
    results = []
    observe(gm, [n.x], lambda model: results.append(model(x)))
    torch.testing.assert_close(results[0][0], gm(x)[0])
    assert not results[0][0].requires_grad


def test_tensors_are_dropped_after_their_last_reader(monkeypatch):
    gm, (x,), n = network()
    alive = {}
    run_node = observers._RecordingInterpreter.run_node

    def watching(self, node):
        if node.op == "output":
            gc.collect()
            alive["conv"] = alive["ref"]() is not None
        value = run_node(self, node)
        if node is n.conv:
            alive["ref"] = weakref.ref(value)
        return value

    monkeypatch.setattr(observers._RecordingInterpreter, "run_node", watching)
    observe(gm, [n.conv, n.relu], lambda model: model(x))
    assert alive["conv"] is False


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_names_the_node(bad):
    gm, (x,), n = network()
    describe(n.conv, origin=Origin("features.0", "net.py:7"))
    x = x.clone()
    x[1, 0, 0, 0] = bad
    with pytest.raises(CalibrationError, match=r"conv2d_default \[features.0 \(net.py:7\)\].*NaN or infinity"):
        observe(gm, [n.conv], lambda model: model(x))


def test_a_run_that_calls_nothing_is_refused():
    gm, _, n = network()
    with pytest.raises(CalibrationError, match="no example"):
        observe(gm, [n.x], lambda model: None)


def test_an_operator_that_fails_keeps_its_own_error():
    gm, (x,), n = network()
    with pytest.raises(RuntimeError, match="channels"):
        observe(gm, [n.x], lambda model: model(x[:, :2]))
    assert observe(gm, [n.x], lambda model: model(x))[n.x].number == 2 * 4 * 4  # the next run is not affected
