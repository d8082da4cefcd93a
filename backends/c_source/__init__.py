"""C99 source of an integer network, for devices without an operating system. See ``export.py``."""

from .core import Core, CoreOptions, Port, integer_core
from .export import CSource, export_c

__all__ = ["CSource", "Core", "CoreOptions", "Port", "export_c", "integer_core"]
