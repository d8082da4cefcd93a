"""The arena: buffers alive together never share bytes, and the plan stays close to what no plan can undercut."""

from hypothesis import given
from hypothesis import strategies as st

from fxcompress.backends.native.memory_plan import ALIGNMENT, align, plan_memory
from fxcompress.backends.native.views import Buffer, Uses

lifetimes = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 30), st.integers(0, 6)), max_size=40)


def uses_of(spans) -> Uses:
    uses = Uses()
    for size, first, length in spans:
        buffer = Buffer(size)
        uses.touch(buffer, first)
        uses.touch(buffer, first + length)
    return uses


@given(lifetimes, st.sampled_from([0, 64]))
def test_buffers_alive_together_do_not_overlap(spans, reserved):
    uses = uses_of(spans)
    plan = plan_memory(uses, reserved)
    buffers = list(uses.first)
    for i, a in enumerate(buffers):
        assert a.offset % ALIGNMENT == 0 and reserved <= a.offset and a.offset + a.bytes <= plan.bytes
        for b in buffers[:i]:
            together = uses.first[a] <= uses.last[b] and uses.first[b] <= uses.last[a]
            assert not together or a.offset + align(a.bytes) <= b.offset or b.offset + align(b.bytes) <= a.offset
    assert plan.lower_bound <= plan.bytes


def test_a_chain_needs_two_neighbors_at_a_time():
    plan = plan_memory(uses_of([(640, i, 1) for i in range(10)]))
    assert plan.bytes == plan.lower_bound == 1280


def test_a_hole_is_filled_before_the_arena_grows():
    """Two long-lived buffers around a short one leave a hole that a later, smaller buffer takes."""
    plan = plan_memory(uses_of([(1024, 0, 10), (512, 0, 2), (256, 0, 10), (512, 4, 2)]))
    assert plan.bytes == plan.lower_bound == 1792
