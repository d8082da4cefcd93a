"""What the API pages promise: every public name and every pass has its entry. (``make docs`` builds them, strictly.)"""

import inspect
import re
from pathlib import Path

import pytest

import fxcompress
from fxcompress import passes, testing

DOCS = Path(__file__).resolve().parents[2] / "docs"


def entries() -> set[str]:
    """The full name of everything that the pages ask mkdocstrings for."""
    found = set()
    for page in DOCS.glob("*.md"):
        for path, members in re.findall(
            r"^::: (\S+)(?:\n    options:\n      members: \[(.*)\])?", page.read_text(), re.MULTILINE
        ):
            found |= {f"{path}.{name}" for name in members.split(", ")} if members else {path}
    return found


ENTRIES = entries()
PUBLIC = {f"fxcompress.{name}": getattr(fxcompress, name) for name in fxcompress.__all__}
PUBLIC |= {f"fxcompress.testing.{name}": getattr(testing, name) for name in testing.__all__}


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if not inspect.ismodule(value)])
def test_public_names_are_on_the_api_pages(name):
    value = PUBLIC[name]
    if not value.__module__.startswith("fxcompress."):  # torch's own PassResult: the page says where it is from
        assert value.__module__ in (DOCS / "api_passes.md").read_text()
        return
    assert f"{value.__module__}.{value.__qualname__}" in ENTRIES


@pytest.mark.parametrize("name", passes.__all__)
def test_every_pass_is_in_the_reference_and_in_the_table(name):
    kind = getattr(passes, name)
    assert kind.__module__.removeprefix("fxcompress.") in ENTRIES
    assert f"| `{kind.name}` |" in (DOCS / "passes.md").read_text()
    assert kind.source


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f": {page.name}\n" not in navigation] == []


def test_the_table_of_files_names_every_module():
    table = (DOCS / "architecture.md").read_text()
    package = Path(fxcompress.__file__).parent
    folders = [package, *(package / name for name in ("analysis", "pruning", "products"))]
    modules = {path.name for folder in folders for path in folder.glob("*.py") if not path.name.startswith("__")}
    named = [name.replace("*", ".*") for name in re.findall(r"[\w*]+\.py", table)]
    assert not [name for name in modules if not any(re.fullmatch(pattern, name) for pattern in named)]
