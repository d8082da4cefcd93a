"""fxcompress: from a trained PyTorch model to a network with no floating-point operation in it."""

from pathlib import Path as _Path

# `passes/` and `backends/` install as fxcompress.passes and fxcompress.backends (package-dir in pyproject.toml).
# Python started in a source checkout finds ./fxcompress without them: look beside this package too.
_root = _Path(__file__).resolve().parent.parent
if (_root / "passes" / "__init__.py").exists():
    __path__.append(str(_root))
