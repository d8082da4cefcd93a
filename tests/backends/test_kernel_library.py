"""The compiled library itself: no float instruction outside the boundary, clean under sanitizers."""

import platform
import re
import shutil
import subprocess

import pytest

from fxcompress.backends.native.kernels import kernel_library_path
from tests.support.kernel_build import build_sanitized, run_sanitized

#: Scalar and packed float arithmetic, comparisons and conversions of x86 (moves and integer operations are not among them).
FLOAT_X86 = re.compile(
    r"^v?(add|sub|mul|div|sqrt|min|max|rcp\w*|rsqrt\w*|u?comi|cmp\w*|round|rndscale|f?n?m(add|sub)\w*|hadd|dp)[sp][sdh]$"
    r"|^v?cvt\w*[sp][sd]\w*$|^f(add|mul|div|sub|sqrt|ild|ist)\w*$"
)


def functions(listing: str):
    """(name, mnemonics) of each function of an objdump listing."""
    for block in re.split(r"\n(?=[0-9a-f]+ <)", listing):
        if name := re.match(r"[0-9a-f]+ <(.+)>:", block):
            yield name[1], re.findall(r"^\s+[0-9a-f]+:\s+(?:rep\w* |lock |bnd |notrack )?(\w+)", block, re.MULTILINE)


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs objdump on x86-64")
def test_kernels_have_no_floating_point_instruction():
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(kernel_library_path())], capture_output=True, text=True, check=True
    ).stdout
    seen = {name: {m for m in mnemonics if FLOAT_X86.match(m)} for name, mnemonics in functions(listing)}
    assert len(seen) > 50
    assert any(found for name, found in seen.items() if "boundary" in name), "the pattern finds the float boundary"
    assert not {name: found for name, found in seen.items() if found and "boundary" not in name}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs a compiler")
    return build_sanitized(tmp_path_factory.mktemp("sanitized"))


def test_random_plans_are_clean_under_sanitizers(sanitized):
    done = run_sanitized(sanitized, "tests/backends/test_native.py", "-k", "not compiled_models and not float_regions")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert re.search(r"\d+ passed", done.stdout)


def test_the_sanitized_build_notices_a_kernel_that_leaves_its_buffer(sanitized):
    done = run_sanitized(sanitized, "tests/backends/overrun.py")
    assert done.returncode != 0 and "use-after-poison" in done.stdout + done.stderr
