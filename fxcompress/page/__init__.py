"""The report page: one self-contained ``index.html`` in the debug folder, readable without a network.

    story = GraphStory()                     the graphs as they were behind every pass
    write_page(folder, report, story)        report.to_dict() and the graphs, as JSON in the page

Every number on the page is read from the report. The layout of the graphs is dagre's (MIT), which runs in the browser, in a
thread of its own and only for the graphs somebody looks at.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..report import Report
from ..strict_json import dumps
from .story import GraphStory

__all__ = ["GraphStory", "page_data", "write_page"]

#: In this order: each file uses what those before it define.
_SCRIPTS = ("format.js", "model.js", "overview.js", "pipeline.js", "graph.js", "layers.js", "main.js")


def write_page(folder: Path, report: Report, story: GraphStory) -> None:
    """Write ``index.html`` into ``folder``."""
    (folder / "index.html").write_text(render(page_data(report, story)), encoding="utf-8")


def page_data(report: Report, story: GraphStory) -> dict:
    """What the page shows: the report, and the graphs behind it."""
    return {"report": report.to_dict(), "graphs": story.to_dict()}


def render(data: dict) -> str:
    text = dumps(data, separators=(",", ":")).replace("</", "<\\/")  # no tag can end inside a text
    parts = {
        "style": _asset("style.css"),
        "layout": _asset("dagre.min.js").replace("//# sourceMappingURL=dagre.min.js.map", ""),
        "licence": _asset("dagre.LICENSE.txt"),
        "script": "\n".join(_asset(name) for name in _SCRIPTS),
        "data": text,
    }
    page = _asset("index.html")
    for name, part in parts.items():
        before, after = page.split(f"{{{{{name}}}}}")  # each place is there once
        page = before + part + after
    return page


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")
