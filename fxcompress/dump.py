"""Text dumps: a readable listing per pass, what changed, and its checks.

``DumpFolder`` writes, for pass number NN: ``NN_name.txt`` (what it did, what it refused, its checks, the graph afterwards)
and ``NN_name.diff`` (the listing before against after). ``00_captured.txt`` is the graph as it came from the exporter,
``report.txt`` and ``report.json`` the report, ``index.html`` all of it to look at (``page``).
"""

from __future__ import annotations

import difflib
from pathlib import Path

from torch import fx

from .listing import listing
from .page import GraphStory, write_page
from .strict_json import dumps


class DumpFolder:
    """Observer of a ``PassManager`` that writes the dumps into ``path`` (created; files of an older run are overwritten)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        for old in (*self.path.glob("[0-9][0-9]_*.txt"), *self.path.glob("[0-9][0-9]_*.diff")):
            old.unlink()
        self._number, self._previous = 0, ""
        self._story = GraphStory()

    def captured(self, gm: fx.GraphModule) -> None:
        self._story.add("captured", "float", gm)
        self._previous = listing(gm)
        (self.path / "00_captured.txt").write_text(self._previous + "\n")

    def __call__(self, record, before, gm: fx.GraphModule) -> None:
        self._number += 1
        stem = f"{self._number:02d}_{record.name}"
        text = listing(gm)
        changed = text != self._previous
        (self.path / f"{stem}.txt").write_text("\n\n".join([_header(record, changed), text]) + "\n")
        if changed:
            lines = difflib.unified_diff(
                self._previous.splitlines(), text.splitlines(), "before", "after", lineterm="", n=2
            )
            (self.path / f"{stem}.diff").write_text("\n".join(lines) + "\n")
            self._story.add(record.name, record.level, gm)
        self._previous = text

    def report(self, report) -> None:
        (self.path / "report.txt").write_text(str(report) + "\n")
        (self.path / "report.json").write_text(dumps(report.to_dict(), indent=1) + "\n")
        write_page(self.path, report, self._story)


def _header(record, changed: bool) -> str:
    head = [
        f"pass {record.name}: {record.level} level, {record.effect}{', ' + record.source if record.source else ''}",
        f"{record.rewrites} rewrites, {len(record.refusals)} refusals, {record.seconds:.3f} s"
        f" + {record.check_seconds:.3f} s of checks{'' if changed else ' (unchanged)'}",
    ]
    if record.output_change is not None:
        head.append(f"largest change of an output: {record.output_change:.3g} relative")
    if record.checks:
        head.append("checked: " + ", ".join(record.checks))
    return "\n".join(head + [f"  {m}" for m in record.matches] + [f"  {r}" for r in record.refusals])
