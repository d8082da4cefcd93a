"""Passes of other packages: a real package with real entry points, and the guide followed to the letter."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.errors import PipelineError
from fxcompress.testing import randomize

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "writing_a_pass.md"


def install(source: Path, site: Path) -> Path:
    """Build the wheel of the package in ``source`` and unpack it into ``site``, where Python finds its entry points."""
    pytest.importorskip("setuptools", minversion="77")
    wheels = site.parent / f"{site.name}_wheels"
    wheels.mkdir()
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(wheels)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True)
    for wheel in wheels.iterdir():
        zipfile.ZipFile(wheel).extractall(site)
    return site


@pytest.fixture(scope="module")
def extra(tmp_path_factory):
    """The package of tests/third_party, installed beside fxcompress."""
    work = tmp_path_factory.mktemp("extra")
    source = work / "source"
    folder = ROOT / "tests" / "third_party" / "fxcompress_extra"
    for file in folder.rglob("*"):
        if file.suffix in (".py", ".toml"):
            (source / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (source / file.relative_to(folder)).write_text(file.read_text())
    site = install(source, work / "site")
    sys.path.insert(0, str(site))
    yield site
    sys.path.remove(str(site))
    for name in [name for name in sys.modules if name.startswith("fxcompress_extra")]:
        del sys.modules[name]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        y = self.b(torch.relu(self.a(x) * 3.0))
        return self.head((y * 0.5 + y).mean((2, 3)))


X = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_installed_packages_are_listed_and_change_nothing(extra):
    published = fxcompress.published_passes()
    assert {name: published[name] for name in ("fold_scale", "zero_small_weights")} == dict.fromkeys(
        ("fold_scale", "zero_small_weights"), "fxcompress-extra 1.0"
    )
    assert "fold_scale" not in fxcompress.default_passes().names


def test_published_passes_run_by_name_and_are_reported(extra):
    passes = fxcompress.default_passes().insert_after("check_dialect", "fold_scale")
    passes.insert_after("fuse_activation", "zero_small_weights")
    report = fxcompress.compile(
        randomize(Net()), example_inputs=X, input_range=(0, 1), passes=passes, measure_passes=True
    ).report()
    records = {p["name"]: p for p in report.passes}
    assert records["fold_scale"]["rewrites"] == 1
    assert records["fold_scale"]["refusals"] == [
        r for r in records["fold_scale"]["refusals"] if "the convolution has other consumers" in r
    ] and len(records["fold_scale"]["refusals"]) == 1  # fmt: skip
    zeroed = records["zero_small_weights"]
    assert zeroed["rewrites"] >= 2 and zeroed["output_change"] > 0 and zeroed["without"] == "left out"
    assert any(e.pass_name == "zero_small_weights" and e.done[0].endswith("of the weights") for e in report.effects)


def test_a_pass_with_options_is_made_by_its_user(extra):
    from fxcompress_extra.zero_small_weights import Options, ZeroSmallWeights

    from fxcompress.testing import try_pass

    few, many = (
        try_pass(
            ZeroSmallWeights(Options(threshold)), randomize(Net()), X, after="fold_batch_norm", input_range=(0, 1)
        ).change
        for threshold in (0.001, 0.3)
    )
    assert 0 <= few < many


def test_an_unknown_name_names_the_nearest(extra):
    with pytest.raises(
        PipelineError, match=r"no installed package publishes a pass named 'fold_scales'. Did you mean 'fold_scale'\?"
    ):
        fxcompress.default_passes().insert_after("check_dialect", "fold_scales")


def publish(site: Path, package: str, entry: str, module: str = "") -> None:
    """An installed package by its metadata alone."""
    info = site / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fxcompress.passes]\n{entry}\n")
    if module:
        (site / f"{package}.py").write_text(module)


WRONG = {
    "cannot be imported": ("broken_a = broken_a:P", "import nowhere_to_be_found", "broken_a 1.0 cannot be imported: ModuleNotFoundError"),
    "is no pass": ("broken_b = broken_b:P", "P = 3", "broken_b 1.0 publishes a int as 'broken_b'"),
    "has another name": ("broken_c = broken_c:P", "from fxcompress.passes import FoldConstants as P",
                         "broken_c 1.0 publishes a pass named 'fold_constants' as 'broken_c'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_package_is_said_with_its_name(case, tmp_path, monkeypatch):
    entry, module, message = WRONG[case]
    name = entry.split(" ")[0]
    publish(tmp_path, name, entry, module)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PipelineError, match=re.escape(message)):
        fxcompress.as_pass(name)


def test_two_packages_with_one_name_are_refused(tmp_path, monkeypatch):
    for package in ("first_package", "second_package"):
        publish(tmp_path, package, "twice = nowhere:P")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        PipelineError, match=r"first_package 1.0 and second_package 1.0 both publish a pass named 'twice'"
    ):
        fxcompress.as_pass("twice")


# -------------------------------------------------------------------------------------------------------------- the guide


def blocks(kind: str) -> dict[str, str]:
    """The guide's code blocks that begin with the name of the file they are, by that name."""
    found = re.findall(rf"```{kind}\n# (\S+\.(?:py|toml))\n(.*?)```", GUIDE.read_text(), re.S)
    return dict(found)


def test_the_example_is_short():
    codes = [text for name, text in blocks("python").items() if name.startswith("fxcompress_mine")]
    assert len(codes) == 2 and all(len(code.splitlines()) < 40 for code in codes)


def test_the_guide_followed_to_the_letter(tmp_path):
    source = tmp_path / "source"
    files = blocks("python") | blocks("toml") | {"fxcompress_mine/__init__.py": ""}
    assert set(files) == {
        "fxcompress_mine/fold_scale.py",
        "fxcompress_mine/zero_small_weights.py",
        "fxcompress_mine/__init__.py",
        "try_it.py",
        "test_fold_scale.py",
        "pyproject.toml",
    }
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    site = install(source, tmp_path / "site")
    test, script = (tmp_path / "elsewhere" / name for name in ("test_fold_scale.py", "try_it.py"))
    test.parent.mkdir()
    for file in (test, script):
        file.write_text(files[file.name])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    ran = subprocess.run(arguments, cwd=test.parent, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and "2 passed" in ran.stdout, ran.stdout + ran.stderr
    code = """
exec(open("try_it.py").read())
passes = fxcompress.default_passes("int8").insert_after("check_dialect", "my_fold_scale")
from fxcompress_mine.zero_small_weights import ZeroSmallWeights
passes.insert_after("fuse_activation", ZeroSmallWeights())
net = fxcompress.compile(Scaled().eval(), example_inputs=torch.rand(2, 3, 8, 8), passes=passes)
print([p["name"] for p in net.report().passes if p["name"].startswith("my_")])
print(passes.names[passes.index_of("check_dialect") + 1], fxcompress.published_passes()["my_fold_scale"])
"""
    used = subprocess.run(
        [sys.executable, "-c", code], cwd=test.parent, env=environment, capture_output=True, text=True
    )
    *report, mine, published = used.stdout.splitlines()
    assert "my_fold_scale" in " ".join(report) and (test.parent / "dumps" / "index.html").exists(), used.stderr
    assert mine == "['my_fold_scale', 'my_zero_small_weights']" and published == "my_fold_scale fxcompress-mine 1.0"
