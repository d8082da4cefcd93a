"""The rows of ``bench_accuracy.py --methods --json`` as tables: methods down, widths across.

    python benchmarks/accuracy_tables.py results/resnet20.json results/lite0.json > docs/accuracy_methods.md

A cell is metric / SQNR of the outputs in dB / predictions that changed.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path

from bench_accuracy import METHODS, WIDTHS

TITLES = {
    "resnet20": "ResNet-20",
    "resnet56": "ResNet-56",
    "vww": "VWW MobileNetV1-0.25",
    "lite0": "EfficientNet-Lite0",
}


def cell(row: dict | None) -> str:
    if row is None:
        return "-"
    digits = 4 if row["unit"] == "AUC" else 2
    flips = "" if row["flipped"] is None else f" / {row['flipped']}"
    return f"{row['integer_metric']:.{digits}f} / {row['sqnr_db']:.1f}{flips}"


def table(rows: list[dict]) -> list[str]:
    """Markdown lines for the rows of one model and one way of choosing ranges."""
    cells = {(row["method"], row["bits"]): row for row in rows}
    widths = [w for w in WIDTHS if any(bits == w for _, bits in cells)]
    lines = ["| | " + " | ".join(w.upper() for w in widths) + " |", "|---" * (len(widths) + 1) + "|"]
    for method in METHODS:
        if any(name == method for name, _ in cells):
            lines.append(f"| {method} | " + " | ".join(cell(cells.get((method, w))) for w in widths) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    rows = [row for path in parser.parse_args().files for row in json.loads(path.read_text())["rows"]]

    def key(row: dict) -> tuple[str, str]:
        return row["model"], row["ranges"]

    for (model, ranges), group in groupby(sorted(rows, key=key), key=key):
        found = list(group)
        print(
            f"## {TITLES.get(model, model)}, {ranges}: {found[0]['labels']} examples, float {found[0]['float_metric']:.2f}\n"
        )
        print(*table(found), "", sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
