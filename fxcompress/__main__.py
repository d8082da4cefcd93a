"""``python -m fxcompress``: the command line."""

from .cli import main

raise SystemExit(main())
