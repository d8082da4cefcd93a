"""fxcompress: from a trained PyTorch model to a network with no floating-point operation in it.

>>> net = fxcompress.compile(model, target="int8", example_inputs=x)              # doctest: +SKIP
>>> net(x)                                                                        # doctest: +SKIP
"""

from pathlib import Path as _Path

# `passes/` and `backends/` install as fxcompress.passes and fxcompress.backends (package-dir in pyproject.toml).
# Python started in a source checkout finds ./fxcompress without them: look beside this package too.
_root = _Path(__file__).resolve().parent.parent
if (_root / "passes" / "__init__.py").exists():
    __path__.append(str(_root))

from . import errors, passes
from .api import compile
from .bisect import Bisection, bisect
from .compiled import CompiledModule, load
from .errors import FxcompressError
from .executable import QuantizedTensor
from .options import CompileOptions, Target
from .pass_manager import PassManager, as_pass
from .pipeline import default_passes
from .products.api import prune_products
from .products.report import ProductReport
from .pruning.api import prune, prune_branches
from .pruning.fine_tuning import fine_tune, prune_gradually
from .pruning.latency import LatencyTable
from .pruning.report import PruningReport
from .published import published_passes
from .report import Report
from .rewrite import Effect, Fact, Level, Match, Pass, PassResult, Plan, Reject, RewriteRule
from .verify import Certificate, verify

__version__ = "0.1.0"
__all__ = [
    "Bisection",
    "Certificate",
    "CompileOptions",
    "CompiledModule",
    "Effect",
    "Fact",
    "FxcompressError",
    "LatencyTable",
    "Level",
    "Match",
    "Pass",
    "PassManager",
    "PassResult",
    "Plan",
    "ProductReport",
    "PruningReport",
    "QuantizedTensor",
    "Reject",
    "Report",
    "RewriteRule",
    "Target",
    "as_pass",
    "bisect",
    "compile",
    "default_passes",
    "errors",
    "fine_tune",
    "load",
    "passes",
    "prune",
    "prune_branches",
    "prune_gradually",
    "prune_products",
    "published_passes",
    "verify",
]
