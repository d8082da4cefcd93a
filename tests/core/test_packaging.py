"""The package-dir map: ``passes/`` and ``backends/`` are fxcompress.passes and fxcompress.backends, however installed."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"fxcompress": "fxcompress", "passes": "fxcompress.passes", "backends": "fxcompress.backends"}

IMPORTS = """
import sys, fxcompress, fxcompress.passes, fxcompress.backends, fxcompress.analysis
import fxcompress.rewrite
first = fxcompress.passes
import importlib
assert importlib.import_module("fxcompress.passes") is first is sys.modules["fxcompress.passes"]
assert "passes" not in sys.modules and "backends" not in sys.modules
print(fxcompress.__file__, first.__file__, fxcompress.backends.__file__, sep="\\n")
"""


def run_python(code: str, cwd: Path, *, path: Path | None = None) -> list[str]:
    """Lines printed by ``code`` in a fresh interpreter started in ``cwd``; ``path`` comes first on its search path."""
    setup = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    done = subprocess.run([sys.executable, "-c", setup + code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def declared_packages() -> set[str]:
    """The packages list of pyproject.toml (Python 3.10 has no tomllib)."""
    text = (ROOT / "pyproject.toml").read_text()
    return set(ast.literal_eval(re.search(r"^packages = (\[.*?\])", text, re.M | re.S)[1]))


def source_packages() -> set[str]:
    """Every directory of the source trees that holds Python files, as the package it installs as."""
    found = set()
    for folder, package in SOURCES.items():
        for file in (ROOT / folder).rglob("*.py"):
            inner = file.parent.relative_to(ROOT / folder).parts
            found.add(".".join([package, *inner]))
    return found


def test_every_package_directory_is_declared():
    assert source_packages() == declared_packages()


def test_every_package_directory_has_an_init():
    for folder in SOURCES:
        for file in (ROOT / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file.parent


def test_imports_from_the_repository_root():
    """Python started in the checkout finds ./fxcompress first; its passes must come along."""
    package, passes, backends = run_python(IMPORTS, ROOT)
    assert Path(package).resolve() == ROOT / "fxcompress" / "__init__.py"
    assert Path(passes).resolve() == ROOT / "passes" / "__init__.py"
    assert Path(backends).resolve() == ROOT / "backends" / "__init__.py"


def test_a_pass_class_exists_once():
    """A pass is an instance of the one ``Pass`` class, whichever module imported it."""
    code = """
import fxcompress.passes, inspect, sys
from fxcompress.rewrite import Pass
names = [m for m in sys.modules if m.endswith("rewrite") and "fxcompress" in m]
assert names == ["fxcompress.rewrite"], names
classes = [c for _, c in inspect.getmembers(fxcompress.passes, inspect.isclass)]
assert classes and all(issubclass(c, Pass) for c in classes), classes
assert all(c.__module__.startswith("fxcompress.passes.") for c in classes), [c.__module__ for c in classes]
"""
    run_python(code, ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the sources, unpacked: what a non-editable install puts into site-packages."""
    pytest.importorskip("setuptools", minversion="77")
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, source / file)
    built = run_python("from setuptools.build_meta import build_wheel; print(build_wheel('..'))", source)[-1]
    site = work / "site"
    zipfile.ZipFile(work / built).extractall(site)
    return site


def test_wheel_holds_every_module(wheel):
    expected = {
        Path(*package.split("."), *file.relative_to(ROOT / folder).parts)
        for folder, package in SOURCES.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    found = {file.relative_to(wheel) for file in wheel.rglob("*.py")}
    assert found == expected
    assert list(wheel.glob("*.dist-info/licenses/LICENSE"))


def test_imports_from_a_wheel(wheel, tmp_path):
    """Away from the checkout everything comes from the installed package alone."""
    assert all(Path(line).is_relative_to(wheel) for line in run_python(IMPORTS, tmp_path, path=wheel))


def test_imports_from_the_root_with_a_wheel_installed(wheel):
    """The trap: a non-editable install plus an interpreter started in the checkout must not mix the two."""
    files = run_python(f"import sys; sys.path.append({str(wheel)!r})\n" + IMPORTS, ROOT)
    assert all(Path(line).resolve().is_relative_to(ROOT) for line in files)
