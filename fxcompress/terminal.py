"""What people read: tables as text, and a progress bar on a terminal, silence everywhere else."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

WIDTH = 120  # of tables, in characters


def printed(*parts: Table | str) -> str:
    """Tables, and sentences however long, below each other; as they are: "[layer1.0]" is a place, no markup of rich."""
    console = Console(file=io.StringIO(), width=WIDTH, force_terminal=False, markup=False, emoji=False, highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
    return console.file.getvalue().rstrip()


@contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Yields ``announce(text)``: shows the step that begins now, of ``steps`` in all, while stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps)

        def announce(text: str) -> None:
            bar.update(task, description=text, advance=1)

        yield announce
