"""What a command prints: a text for people, or JSON for programs."""

from __future__ import annotations

from ..strict_json import dumps


def show(data: dict | list, text: str, as_json: bool) -> None:
    print(dumps(data) if as_json else text)
