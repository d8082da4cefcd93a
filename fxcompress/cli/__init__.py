"""The command line: ``fxcompress compile | inspect | bench | diff | passes | bisect``, each with ``--help``.

Exit status: 0 done; 1 the answer is no (``diff``: the models differ; ``bisect``: something breaks the metric); 2 a wrong command line;
3 a mistake in model, data or options (the message says what to do); 4 a contract broken inside fxcompress.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ..errors import FxcompressError, InternalError
from .parser import build_parser

DONE, NO, WRONG_COMMAND_LINE, USER_ERROR, INTERNAL_ERROR = range(5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. ``arguments``: those of the process by default.

    >>> main(["passes"])                                                                              # doctest: +SKIP
    """
    args = build_parser().parse_args(arguments)
    try:
        return args.run(args)
    except FxcompressError as error:
        if args.json:
            fields = {name: getattr(error, name) for name in ("stage", "where", "found", "expected", "remedy")}
            print(json.dumps({"error": type(error).__name__, "message": str(error), **fields}))
        print(f"fxcompress: {type(error).__name__}: {error}", file=sys.stderr)
        return INTERNAL_ERROR if isinstance(error, InternalError) else USER_ERROR
    except KeyboardInterrupt:
        print("fxcompress: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return DONE
