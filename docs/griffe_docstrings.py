"""Griffe extension: our docstrings as the API pages show them.

Examples, paragraphs that begin with ``>>>``, become code. ``name, other: text`` in a list of attributes or arguments becomes a row for each name.
"""

from __future__ import annotations

import re

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
NAMES = re.compile(r"^    (?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n     .*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = NAMES.sub(_one_each, EXAMPLE.sub(_section, obj.docstring.value))


def _section(found: re.Match) -> str:
    """The section that Griffe's parser knows examples by."""
    return "Examples:\n" + "\n".join(f"    {line}" for line in found[0].splitlines())


def _one_each(found: re.Match) -> str:
    return "\n".join(f"    {name}: {found['text']}" for name in found["names"].split(", "))
