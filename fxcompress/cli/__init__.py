"""The command line: ``fxcompress compile | inspect | bench | diff | passes | bisect``, each with ``--help``.

Exit status: 0 done; 1 the answer is no (``diff``: the models differ; ``bisect``: something breaks the metric); 2 a wrong command line;
3 a mistake in model, data or options (the message says what to do); 4 a contract broken inside fxcompress.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from ..errors import FxcompressError, InternalError
from .output import show
from .parser import build_parser

DONE, NO, WRONG_COMMAND_LINE, USER_ERROR, INTERNAL_ERROR = range(5)
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. ``arguments``: those of the process by default.

    >>> main(["passes"])                                                                              # doctest: +SKIP
    """
    args = build_parser().parse_args(arguments)
    try:
        return args.run(args)
    except FxcompressError as error:
        fields = {name: getattr(error, name) for name in ("stage", "where", "found", "expected", "remedy")}
        return _failed(error, fields, args.json)
    except KeyboardInterrupt:
        print("fxcompress: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return DONE
    except Exception as error:  # ours, or of a library below us: not an answer of "no"
        traceback.print_exc()
        return _failed(error, {}, args.json)


def _failed(error: Exception, fields: dict, as_json: bool) -> int:
    if as_json:
        show({"error": type(error).__name__, "message": str(error), **fields}, "", as_json)
    print(f"fxcompress: {type(error).__name__}: {error}", file=sys.stderr)
    ours = isinstance(error, InternalError) or not isinstance(error, FxcompressError)
    return INTERNAL_ERROR if ours else USER_ERROR
