"""JSON that every program reads: numbers that it cannot write (an infinite SQNR: no error at all) are texts, "inf"."""

from __future__ import annotations

import json
import math


def dumps(data: object, **layout) -> str:
    """``json.dumps`` without Infinity and NaN, which only Python reads.

    >>> dumps({"sqnr": float("inf")})
    '{"sqnr": "inf"}'
    """
    return json.dumps(_finite(data), allow_nan=False, **layout)


def _finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
