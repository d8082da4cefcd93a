"""Exported C source: compiles without a warning as C99, needs no floating point, and computes the bits of the reference."""

import platform
import re
import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings

import fxcompress
from fxcompress.backends.c_source import CoreOptions, export_c, integer_core
from fxcompress.backends.reference import ReferenceBackend
from fxcompress.errors import ArtifactError, OptionError, UnsupportedOperatorError
from tests.support import native_cases as cases
from tests.support.c_build import STRICT, compiler, run_test
from tests.support.graphs import MODELS, build
from tests.support.integer_graphs import codes, int32, integer_graph, ops
from tests.support.strategies import networks

X86 = platform.machine() in ("x86_64", "AMD64")


def compiled(name: str, **options) -> fxcompress.CompiledModule:
    model, inputs = build(name)
    return fxcompress.compile(model, example_inputs=inputs, **options)


def assert_right(gm, folder, *inputs, batch=1) -> None:
    """The C code of a graph by hand gives the reference's results for ``inputs``."""
    (outputs,) = [n for n in gm.graph.nodes if n.op == "output"]
    core = integer_core(gm, [], [None] * len(outputs.args[0]), CoreOptions(batch=batch))
    assert run_test(export_c(core, folder, samples=core.codes(inputs))) == f"{len(inputs[0]) // batch} calls, 0 wrong\n"


# ---------------------------------------------------------------------------------------------------- right results


@pytest.mark.parametrize("name", MODELS)
def test_every_structure(name, tmp_path):
    net = compiled(name)
    _, inputs = build(name)
    source = net.export_c(tmp_path, samples=inputs, channels_last=name in ("classifier", "two_inputs"))
    assert run_test(source) == "2 calls, 0 wrong\n"


@settings(max_examples=settings().max_examples // 2)
@given(networks())
def test_random_networks(tmp_path_factory, network):
    model, x = network.build()
    net = fxcompress.compile(model, example_inputs=x)
    assert run_test(net.export_c(tmp_path_factory.mktemp("c"), batch=2, samples=x)) == "2 calls, 0 wrong\n"


OPERATORS = {
    "conv": cases.conv_cases(), "depthwise": cases.conv_cases(depthwise=True), "transposed": cases.conv_cases(transposed=True),
    "linear": cases.linear_cases(), "matmul": cases.matmul_cases(), "softmax": cases.softmax_cases(),
    "layer_norm": cases.layer_norm_cases(), "elementwise": cases.elementwise_cases(), "gate": cases.gate_cases(),
    "pool": cases.pooling_cases(), "resize": cases.resize_cases(), "selection": cases.selection_cases(),
}  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator(operator, tmp_path_factory):
    @settings(max_examples=max(settings().max_examples // 5, 2))
    @given(OPERATORS[operator])
    def check(case):
        inputs = [x for x in case.inputs if len(x)]
        if len(inputs) == len(case.inputs):
            assert_right(case.graph, tmp_path_factory.mktemp("c"), *inputs, batch=len(inputs[0]))

    check()


def test_extreme_values_have_literals(tmp_path):
    constants = {"b": torch.tensor(2**31 - 1), "c": torch.tensor(31), "lo": int32(-(2**31)), "hi": int32(2**31 - 1)}
    x = torch.tensor([[-(2**31), -1, 0, 1, 2**31 - 1]], dtype=torch.int32)

    def forward(m, x):
        return ops.rescale.default([ops.clamp.default(x, m.lo, m.hi), x], [m.b, m.b], [m.c, m.c])

    assert_right(integer_graph(forward, constants, x.repeat(2, 1)), tmp_path, x)


def test_recorded_values_that_differ_fail_the_test(tmp_path):
    source = compiled("mlp").export_c(tmp_path)
    text = (tmp_path / "model_test.c").read_text()
    head, values = text.split("expected_out0[CALLS]", 1)
    changed = re.sub(r"(-?\d+), (-?\d+), ", lambda m: f"{int(m[1]) + 1}, {m[2]}, ", values, count=1)
    (tmp_path / "model_test.c").write_text(f"{head}expected_out0[CALLS]{changed}")
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_test(source)
    assert error.value.stdout == "2 calls, 1 wrong\n"


@pytest.mark.parametrize("batch", [1, 2])
def test_quantized_outputs_are_those_of_the_compiled_network(batch, tmp_path):
    """The C code's inputs are ``integer_io`` codes; without a common scale its outputs are the ``QuantizedTensor``'s values."""
    model, (x,) = build("classifier")
    net = fxcompress.compile(model, example_inputs=x, integer_io=True)
    source = net.export_c(tmp_path, batch=batch, common_scale=False, samples=x)
    (fed,) = source.core.codes(net._first.interface.flatten((x,)))
    (values,) = ReferenceBackend().lower(source.core.graph_module).run(fed)
    expected = net(x)
    assert torch.equal(values, expected.values)
    assert torch.equal(source.core.outputs[0].scale, expected.scale)
    assert run_test(source) == f"{2 // batch} calls, 0 wrong\n"


def test_a_common_scale_keeps_the_order_of_the_outputs(tmp_path):
    model, (x,) = build("classifier")
    net = fxcompress.compile(model, example_inputs=x)
    core = net.export_c(tmp_path, samples=x).core
    (values,) = ReferenceBackend().lower(core.graph_module).run(*core.codes((x,)))
    (port,) = core.outputs
    assert values.dtype == torch.int32 and port.scale.numel() == 1
    assert (values * port.scale - net(x)).abs().max() <= float(
        port.scale
    )  # half a step of the common scale, and float32
    assert torch.equal(values.argmax(1), net(x).argmax(1))


def test_a_loaded_network_exports_the_same_source(tmp_path):
    net = compiled("residual_block")
    net.save(tmp_path / "m.fxc")
    net.export_c(tmp_path / "a")
    fxcompress.load(tmp_path / "m.fxc").export_c(tmp_path / "b")
    for file in ("model.h", "model.c", "model_test.c"):
        assert (tmp_path / "a" / file).read_text() == (tmp_path / "b" / file).read_text()


def test_indices_outside_the_table_are_counted(tmp_path):
    gm = integer_graph(
        lambda m, i: torch.ops.fxcompress.embedding.default(m.w, i), {"w": codes(5, 3)}, torch.tensor([[1, 4]] * 2)
    )
    core = integer_core(gm, [], [None], CoreOptions())
    source = export_c(core, tmp_path, samples=(torch.tensor([[1, 4], [0, 2]]),))
    assert run_test(source) == "2 calls, 0 wrong\n"
    text = (tmp_path / "model_test.c").read_text().replace("  0, 2,", "  0, 5,").replace("  1, 4,", "  1, -1,")
    (tmp_path / "model_test.c").write_text(text)
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_test(source)
    assert error.value.stdout == "2 calls, 4 wrong\n"


# ------------------------------------------------------------------------------------------------- what it is made of


@pytest.mark.skipif(not X86, reason="-mgeneral-regs-only is tried with gcc on x86")
def test_general_registers_are_enough(tmp_path):
    source = compiled("squeeze_excite").export_c(tmp_path)
    assert run_test(source, "-mgeneral-regs-only") == "2 calls, 0 wrong\n"


def test_no_heap_no_float_no_mathematical_library(tmp_path):
    """Nothing but memcpy and memset is left to the linker, and the source names no floating-point type."""
    source = compiled("squeeze_excite").export_c(tmp_path)
    for file in ("model.c", "fxc_kernels.c", "fxc_kernels.h"):
        code = re.sub(r"/\*.*?\*/", "", (tmp_path / file).read_text(), flags=re.DOTALL)
        assert not re.search(r"\b(float|double|malloc|free|calloc|alloca)\b|math\.h|stdlib\.h", code)
    objects = []
    for file in ("model.c", "fxc_kernels.c"):
        objects.append(tmp_path / f"{file}.o")
        subprocess.run(
            [compiler(), *STRICT, "-fno-stack-protector", "-c", tmp_path / file, "-o", objects[-1]], check=True
        )
    if not shutil.which("nm"):
        pytest.skip("no nm to look at the objects")
    listed = subprocess.run(["nm", *objects], check=True, capture_output=True, text=True).stdout
    undefined = set(re.findall(r" U (\w+)", listed)) - set(re.findall(r" T (\w+)", listed))
    assert undefined <= {"memcpy", "memset", "_GLOBAL_OFFSET_TABLE_"}
    assert source.files == ("model.h", "model.c", "model_test.c", "fxc_kernels.h", "fxc_kernels.c")


@pytest.mark.skipif(not X86, reason="AddressSanitizer is tried with gcc on x86")
def test_nothing_is_read_or_written_out_of_bounds(tmp_path):
    source = compiled("inverted_residual").export_c(tmp_path, channels_last=True)
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert run_test(source, *flags) == "2 calls, 0 wrong\n"


def test_bytes_are_those_of_the_source(tmp_path):
    net = compiled("classifier")
    source = net.export_c(tmp_path, name="net")
    arrays = re.findall(r"static const (u?)int(\d+)_t \w+\[(\d+)\]", (tmp_path / "net.c").read_text())
    assert sum(int(bits) // 8 * int(n) for _, bits, n in arrays) == source.weight_bytes + source.constant_bytes
    assert source.weight_bytes == sum(p.weight_bytes for p in net.report().products)
    header = (tmp_path / "net.h").read_text()
    assert f"#define NET_ARENA_BYTES {source.arena_bytes} " in header
    assert f"#define NET_FLASH_BYTES {source.flash_bytes} " in header
    assert "#define NET_INPUT0_SHAPE {1, 3, 12, 12}" in header and "#define NET_OUTPUT0_SIZE 10" in header
    assert net.report().resources["c_source"] == source.to_dict()
    assert f"{source.flash_bytes:,} bytes of flash" in str(net.report())
    assert source.ram_bytes == source.arena_bytes + 3 * 12 * 12 + 4 * 10


def test_equal_constants_are_stored_once(tmp_path):
    """The lower bounds of all layers are zeros: one array, as long as the widest layer needs."""
    compiled("residual_block").export_c(tmp_path)
    text = (tmp_path / "model.c").read_text()
    assert len(re.findall(r"static const uint8_t \w+_lo\[", text)) == 1


# ---------------------------------------------------------------------------------------------------------- refusals


def test_float_parts_are_refused_by_name(tmp_path):
    net = compiled("classifier", keep_float=["fc"])
    with pytest.raises(
        UnsupportedOperatorError, match=r"C export: \d+ operators are in float on purpose: aten\.\w+.* at "
    ):
        net.export_c(tmp_path)


def test_an_input_that_is_returned_is_copied(tmp_path):
    class Echo(torch.nn.Module):
        def forward(self, x):
            return x, torch.relu(x)

    net = fxcompress.compile(Echo().eval(), example_inputs=torch.rand(2, 3), input_range=(-1, 1))
    assert run_test(net.export_c(tmp_path)) == "2 calls, 0 wrong\n"


@pytest.mark.parametrize("name", ["a-b", "", "1st", 3])
def test_a_name_that_is_no_identifier_is_refused(name, tmp_path):
    with pytest.raises(OptionError, match="expected a C identifier"):
        compiled("mlp").export_c(tmp_path, name=name)


def test_half_a_batch_is_refused(tmp_path):
    net, (_, inputs) = compiled("mlp"), build("mlp")
    with pytest.raises(OptionError, match=r"a multiple of the batch, \[3\]"):
        net.export_c(tmp_path, batch=3, samples=inputs)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write into"):
        compiled("mlp").export_c(tmp_path / "file")
