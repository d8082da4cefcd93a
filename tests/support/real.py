"""The real models of the data folder for tests: a workload, or a visible skip that says what is missing."""

from __future__ import annotations

import pytest
from real_models import Unavailable, Workload, load


def workload(name: str, limit: int | None = None) -> Workload:
    """The workload ``name`` of ``benchmarks/real_models.py``, calibration inputs left out, ``limit`` labels at most."""
    try:
        return load(name).reported(limit)
    except Unavailable as reason:
        pytest.skip(f"{name}: {reason}")
