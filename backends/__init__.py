"""Backends: what runs an integer graph. ``get_backend("reference")``; the table below is the list."""

from fxcompress.errors import OptionError, nearest

from .base import Backend, Program
from .native import NativeBackend
from .reference import ReferenceBackend

__all__ = ["BACKENDS", "Backend", "Program", "get_backend"]

#: name -> backend.
BACKENDS: dict[str, Backend] = {"native": NativeBackend(), "reference": ReferenceBackend()}


def get_backend(name: str) -> Backend:
    """The backend of that name. Raises ``OptionError`` naming the nearest one."""
    if name not in BACKENDS:
        raise OptionError(f"unknown backend {name!r}", stage="backend", remedy=nearest(str(name), BACKENDS))
    return BACKENDS[name]
