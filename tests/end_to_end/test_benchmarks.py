"""Every benchmark says how it is used. What they measure is not asserted here."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(
    path.name for pattern in ("bench_*.py", "fuzz_*.py", "*_tables.py") for path in BENCHMARKS.glob(pattern)
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_neither_data_nor_peers(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out
