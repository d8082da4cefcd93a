"""Passes that other packages publish, under the entry point group ``fxcompress.passes``.

    [project.entry-points."fxcompress.passes"]          # in the package's pyproject.toml
    fold_scale = "my_package.fold_scale:FoldScale"      # the name of the pass = where it is

Installing a package changes nothing: a published pass runs where somebody puts it, by name, into the list.

>>> default_passes("int8").insert_after("check_dialect", "fold_scale")                         # doctest: +SKIP
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from .errors import PipelineError, nearest
from .rewrite import Pass

GROUP = "fxcompress.passes"


def published_passes() -> dict[str, str]:
    """What installed packages publish: the name of each pass, and the package and version it comes from. Loads nothing."""
    return {entry.name: _package(entry) for entry in entry_points(group=GROUP)}


def published_pass(name: str) -> Pass:
    """The pass called ``name`` that an installed package publishes.

    Raises ``PipelineError`` when there is none, when two packages claim the name, when it cannot be imported and when what is
    there is not a ``Pass`` of that name.
    """
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        known = sorted(published_passes())
        remedy = (
            nearest(name, known) if known else f"Install the package that publishes it (entry point group {GROUP})."
        )
        raise PipelineError(f"no installed package publishes a pass named {name!r}", stage="passes", remedy=remedy)
    if len(found) > 1:
        owners = " and ".join(_package(entry) for entry in found)
        raise PipelineError(
            f"{owners} both publish a pass named {name!r}", stage="passes", remedy="Uninstall one of them."
        )
    return _checked(found[0], _load(found[0]))


def _load(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except Exception as error:  # the package's own code runs here
        raise PipelineError(f"the pass {entry.name!r} of {_package(entry)} cannot be imported: {type(error).__name__}: {error}",
                            stage="passes", where=entry.value, remedy="Repair or uninstall that package.") from error  # fmt: skip


def _checked(entry: EntryPoint, loaded: object) -> Pass:
    made = loaded() if isinstance(loaded, type) and issubclass(loaded, Pass) else loaded
    if not isinstance(made, Pass) or made.name != entry.name:
        found = f"a pass named {made.name!r}" if isinstance(made, Pass) else f"a {type(made).__name__}"
        raise PipelineError(f"{_package(entry)} publishes {found} as {entry.name!r}", stage="passes", where=entry.value,
                            expected="a Pass class whose name is that of its entry point",
                            remedy="Correct the entry point in that package's pyproject.toml.")  # fmt: skip
    return made


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
