"""Not collected: run on a sanitized library by test_kernel_library.py, which expects it to be stopped."""

from fxcompress.backends.native import NativeBackend
from tests.support.integer_graphs import codes, int32, integer_graph, ops


def test_a_plan_whose_kernel_writes_past_its_buffer():
    def forward(m, x):
        pooled = ops.max_pool.default(x, [1, 1], [1, 1], [0, 0, 0, 0], [1, 1])
        return ops.widen.default(pooled, m.z)

    program = NativeBackend(prefer="scalar", num_threads=1).lower(
        integer_graph(forward, {"z": int32(3)}, codes(2, 5, 4, 4))
    )
    x = codes(2, 5, 4, 4)
    plan = program.plan(x)
    next(step for step in plan.steps if step.kernel.op == "pool").params.out_pixel_stride += 64
    plan.run([x])
