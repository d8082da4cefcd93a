"""The native backend computes the bits of the reference: every operator, every kernel row, random shapes."""

import threading

import pytest
import torch
from hypothesis import given, settings

from fxcompress import compile as compile_model
from fxcompress import reference_normalization as normalization
from fxcompress.backends import get_backend
from fxcompress.backends.native import NativeBackend
from fxcompress.backends.native.kernels import kernel_library, kernel_table, select
from fxcompress.backends.reference import ReferenceBackend
from fxcompress.errors import BackendError, InputError, UnsupportedOperatorError
from fxcompress.graph import calls
from tests.support import native_cases as cases
from tests.support.graphs import MODELS, build
from tests.support.integer_graphs import codes, int32, integer_graph, ops, weights

#: Instruction sets of this processor; each is tried wherever one of its rows accepts.
ISAS = sorted({row.isa for row in kernel_table() if row.available} - {"float"})


def assert_same_bits(gm, *inputs, isas=ISAS, threads=2):
    expected = ReferenceBackend().lower(gm).run(*inputs)
    for isa in isas:
        found = NativeBackend(prefer=isa, num_threads=threads).lower(gm).run(*inputs)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert torch.equal(a, b), f"{isa}: output {i} differs at {(a != b).nonzero()[:4].tolist()}"


# ------------------------------------------------------------------------------------------------ operators


@settings(max_examples=4 * settings().max_examples)
@given(cases.conv_cases())
def test_convolution(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.conv_cases(depthwise=True))
def test_depthwise_convolution(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.depthwise_image_cases())
def test_depthwise_convolution_of_images(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.conv_cases(transposed=True))
def test_transposed_convolution(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.linear_cases())
def test_linear(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.matmul_cases())
def test_matmul(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.bilinear_linear_cases())
def test_linear_in_blocks(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.bilinear_matmul_cases())
def test_matmul_in_blocks(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.softmax_cases())
def test_softmax(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.layer_norm_cases())
def test_layer_norm(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.elementwise_cases())
def test_elementwise(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.gate_cases())
def test_images_times_a_gate(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.pooling_cases())
def test_pools_and_sums(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.resize_cases())
def test_resize(case):
    assert_same_bits(case.graph, *case.inputs)


@given(cases.selection_cases())
def test_selection_and_movement(case):
    assert_same_bits(case.graph, *case.inputs)


@pytest.mark.parametrize("value", [-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 2, 2**31 - 1])
def test_extreme_accumulators_through_rescale_and_clamp(value):
    constants = {"b": torch.tensor(2**31 - 1), "c": torch.tensor(31), "lo": int32(-(2**31)), "hi": int32(2**31 - 1)}

    def forward(m, x):
        clamped = ops.clamp.default(x, m.lo, m.hi)
        return ops.rescale.default([clamped, clamped, x], [m.b, m.b, m.b], [m.c, m.c, m.c]), clamped

    gm = integer_graph(forward, constants, torch.full((2, 5), value, dtype=torch.int32))
    assert_same_bits(gm, torch.full((2, 5), value, dtype=torch.int32))


def test_parameters_that_vary_over_the_image():
    """An average pool that leaves its padding out has a multiplier per pixel."""
    multiplier = (2**14 + torch.arange(12)).to(torch.int32).reshape(1, 1, 3, 4)
    constants = {"m": multiplier, "p": torch.full_like(multiplier, 3), "z": int32(7), "hi": int32(250)}
    constants |= {"scale": torch.rand(3, 4, dtype=torch.float64) + 1}

    def forward(m, x):
        acc = ops.sum_pool.default(x, m.z, [2, 2], [1, 1], [0, 0, 0, 0])
        codes = ops.requantize.default([acc], [m.m], [m.p], [0], m.z, 2, m.z, m.hi)
        return codes, ops.dequantize.default(acc, m.scale, m.z)

    assert_same_bits(integer_graph(forward, constants, codes(2, 20, 4, 5)), codes(3, 20, 4, 5))


def test_parameters_that_vary_over_channels_and_the_image():
    """Such a pool rounded to codes per channel, as a part of a concatenation that lies channels last."""
    multiplier = (2**14 + torch.arange(12)).to(torch.int32).reshape(1, 1, 3, 4)
    constants = {"m": multiplier, "p": torch.full_like(multiplier, 3), "z": int32(7), "one": int32(2**14)}
    constants |= {"zeros": torch.arange(20, dtype=torch.int32).reshape(20, 1, 1), "hi": int32(250), "two": int32(2)}

    def forward(m, x):
        acc = ops.sum_pool.default(x, m.z, [2, 2], [1, 1], [0, 0, 0, 0])
        mixed = ops.requantize.default([acc, acc], [m.m, m.one], [m.p, m.two], [0, 0], m.zeros, 2, m.zeros, m.hi)
        plain = ops.requantize.default([acc], [m.one], [m.two], [0], m.z, 2, m.z, m.hi)
        both = torch.ops.aten.cat.default([plain, mixed, plain], 1)
        return ops.max_pool.default(both, [2, 2], [1, 1], [0, 0, 0, 0], [1, 1]), mixed

    assert_same_bits(integer_graph(forward, constants, codes(2, 20, 4, 5)), codes(3, 20, 4, 5))


# ---------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", MODELS)
def test_compiled_models(name):
    model, inputs = build(name)
    compiled = compile_model(model, example_inputs=inputs, backend="reference")
    assert_same_bits(compiled.graph_module, *inputs)


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.middle, self.after = (torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x):
        y = torch.relu(self.before(x))
        return self.after(torch.relu(self.middle(y)) + y), y


def test_float_regions_run_in_pytorch_between_native_parts():
    x = torch.randn(2, 4, 6, 6)
    compiled = compile_model(Head().eval(), example_inputs=(x,), keep_float=["middle"], backend="reference")
    assert_same_bits(compiled.graph_module, x)


class ChannelNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.norm, self.after = (
            torch.nn.Conv2d(4, 16, 3),
            torch.nn.LayerNorm(16),
            torch.nn.Conv2d(16, 4, 1),
        )

    def forward(self, x):
        y = self.before(x)
        return self.after(y + self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_channels_stay_innermost_through_a_permutation_and_back():
    x = torch.randn(2, 4, 8, 8)
    compiled = compile_model(ChannelNorm().eval(), example_inputs=(x,), backend="reference")
    steps = NativeBackend().lower(compiled.graph_module).plan(x).steps
    assert [s.kernel.op for s in steps] == ["quantize", "conv", "layer_norm", "requantize", "conv", "dequantize"]
    assert_same_bits(compiled.graph_module, x)


class Patches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = torch.nn.Conv2d(3, 24, 4, 4), torch.nn.LayerNorm(24), torch.nn.Linear(24, 5)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(tokens + torch.sigmoid(tokens)))


def test_the_features_of_tokens_lie_side_by_side():
    x = torch.randn(2, 3, 16, 16)
    compiled = compile_model(Patches().eval(), example_inputs=(x,), backend="reference")
    steps = NativeBackend().lower(compiled.graph_module).plan(x).steps
    assert all(s.out.strides[-1] == 1 for s in steps if s.out.shape[-1] == 24)
    assert_same_bits(compiled.graph_module, x)


# --------------------------------------------------------------------------------------------------- program


@pytest.fixture
def small():
    w = weights(20, 12, 3, 3)

    def forward(m, x):
        return ops.conv.default(x, m.w, None, [1, 1], [1, 1, 1, 1], [1, 1], 1, m.z)

    return integer_graph(forward, {"w": w, "z": int32(3)}, codes(2, 12, 6, 6))


def residual_block():
    model, (x,) = build("residual_block")
    return NativeBackend().lower(compile_model(model, example_inputs=(x,), backend="reference").graph_module), x


@pytest.mark.parametrize("batch", [0, 1, 2, 7])
def test_any_batch_without_packing_again(small, batch):
    program = NativeBackend().lower(small)
    program.run(codes(3, 12, 6, 6))
    packed = program.packed_bytes
    x = codes(batch, 12, 6, 6)
    assert torch.equal(program.run(x)[0], ReferenceBackend().lower(small).run(x)[0])
    assert program.packed_bytes == packed


def test_one_library_call_per_inference(small, monkeypatch):
    program, x = NativeBackend().lower(small), codes(1, 12, 6, 6)
    program.run(x)
    calls_seen = []

    class Counting:
        def __getattr__(self, name):
            calls_seen.append(name)
            return getattr(kernel_library(), name)

    monkeypatch.setattr("fxcompress.backends.native.program.kernel_library", Counting)
    program.run(x)
    assert calls_seen == ["fxc_run_program"]


def test_steady_state_reuses_the_arena(small):
    program, x = NativeBackend().lower(small), codes(1, 12, 6, 6)
    program.run(x)
    plan = program.plan(x)
    (arena,) = plan.idle_arenas
    program.run(x)
    assert plan.idle_arenas == [arena] and program.plan(x) is plan


def test_several_python_threads(small):
    program = NativeBackend(num_threads=1).lower(small)
    inputs = [codes(2, 12, 6, 6) for _ in range(8)]
    expected = [ReferenceBackend().lower(small).run(x)[0] for x in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(program.run(inputs[i])[0], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_the_arena_is_close_to_the_lower_bound():
    program, x = residual_block()
    memory = program.plan(x).memory
    assert memory.lower_bound <= memory.bytes <= 1.2 * memory.lower_bound


def test_nan_is_refused():
    program, x = residual_block()
    bad = x.clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"1 of .* values are NaN"):
        program.run(bad)
    assert torch.isfinite(program.run(x)[0]).all()


def test_inputs_of_other_float_types_and_layouts():
    program, x = residual_block()
    (expected,) = program.run(x)
    assert torch.equal(program.run(x.double())[0], expected)
    assert torch.equal(program.run(x.contiguous(memory_format=torch.channels_last))[0], expected)


# --------------------------------------------------------------------------------------------------- refusals


def test_an_operator_without_a_kernel_is_refused_by_name(small):
    next(calls(small, ops.conv.default)).target = torch.ops.aten.sigmoid.default
    with pytest.raises(
        UnsupportedOperatorError, match=r"native backend: .*aten\.sigmoid\.default has no native kernel"
    ):
        get_backend("native").lower(small)


def test_a_missing_library_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr("fxcompress.backends.native.kernels.kernel_library_path", lambda: None)
    kernel_library.cache_clear()
    try:
        with pytest.raises(
            BackendError, match=r'native backend: the kernel library was not built.*backend="reference"'
        ):
            kernel_library()
    finally:
        monkeypatch.undo()
        kernel_library.cache_clear()


def test_every_operator_has_a_portable_kernel():
    portable = {row.op for row in kernel_table() if row.isa in ("scalar", "float")}
    assert {row.op for row in kernel_table()} == portable


def test_an_override_picks_any_row(small):
    x = codes(1, 12, 6, 6)
    for row in kernel_table():
        if row.op == "conv" and row.available:
            (step,) = (s for s in NativeBackend(prefer=row.name).lower(small).plan(x).steps if s.kernel.op == "conv")
            assert step.kernel == row or not row.accepts(step.params)
            assert select("conv", step.params, row.name) == step.kernel


# ---------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("row", [1, 2, 7, 64, 197])
def test_softmax_and_normalization_of_rows(row):
    bits = normalization.exp_table_bits(row)
    mask = torch.rand(1, 1, 5, row) > 0.4
    constants = {"table": normalization.exp_table(torch.tensor(0.05).double(), bits), "mask": mask, "z": int32(100)}
    epsilons = [(e, normalization.fraction_bits(row, e)) for e in (0, 5, 10**6, 10**12)]

    def forward(m, x):
        normalized = [ops.layer_norm.default(x, z, e, f) for e, f in epsilons for z in (None, m.z)]
        return (ops.softmax.default(x, m.table, bits), ops.softmax.default(x, m.table, bits, m.mask), *normalized)

    gm = integer_graph(forward, constants, codes(2, 3, 5, row))
    assert_same_bits(gm, codes(2, 3, 5, row))
    assert_same_bits(gm, torch.full((2, 3, 5, row), 9, dtype=torch.uint8))


def embedding_graph():
    aten = torch.ops.aten

    def forward(m, x):
        mask = aten.logical_or.default(aten.ne.Scalar(x, 3), aten.eq.Scalar(x, 1))
        positions = aten.mul.Tensor(aten.cumsum.default(x, 1), aten.to.dtype(mask, torch.int64))
        return ops.embedding.default(m.w, x), positions, aten.logical_not.default(mask), aten.sub.Tensor(x, positions)

    return integer_graph(forward, {"w": codes(10, 33)}, torch.randint(0, 10, (2, 6)))


def test_embeddings_and_the_arithmetic_of_indices():
    assert_same_bits(embedding_graph(), torch.randint(0, 10, (5, 6)))


def test_an_index_outside_the_table_is_refused():
    program, x = NativeBackend().lower(embedding_graph()), torch.tensor([[1, -1, 2, 10, 0, 9]])
    with pytest.raises(InputError, match=r"2 of 6 indices are outside the embedding table"):
        program.run(x)


def test_tensors_too_large_for_the_kernels_are_refused():
    """Kernels count elements in int32: a plan for such a batch would wrap around."""
    gm = integer_graph(lambda m, x: ops.widen.default(x, m.z), {"z": int32(3)}, codes(2, 64, 64, 64))
    program = NativeBackend().lower(gm)
    with pytest.raises(BackendError, match=r"fewer than 2\^31 elements. Run smaller batches"):
        program.plan(torch.empty(1 << 13, 64, 64, 64, dtype=torch.uint8, device="meta"))
