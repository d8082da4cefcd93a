"""What is removed as a whole: channels, kernels, or single weights; and which options make sense for each.

channels        what goes together (``analysis/channel_groups``): layers get smaller
kernels         those between blocks of channels: a convolution becomes a grouped one
unstructured    single weights, anywhere
N:M             all but N of every M weights along the input channels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import OptionError, nearest
from .budgets import BUDGETS, MEASURES
from .criteria import CRITERIA, Criterion
from .weights import WEIGHT_CRITERIA, pattern

#: Options of some granularities only.
PARTIAL = ("pruning_measure", "pruning_budget", "latency_table", "round_to")


@dataclass(frozen=True)
class Granularity:
    """Values that options may have, the default criterion, and which of ``PARTIAL`` have an effect."""

    criteria: Mapping[str, Criterion]
    criterion: str
    options: tuple[str, ...]
    budgets: tuple[str, ...] = tuple(BUDGETS)
    measures: tuple[str, ...] = MEASURES


GRANULARITIES = {
    "channels": Granularity(CRITERIA, "outgoing", PARTIAL),
    "kernels": Granularity(
        WEIGHT_CRITERIA, "magnitude", ("pruning_measure", "round_to"), measures=("macs", "parameters")
    ),
    "unstructured": Granularity(WEIGHT_CRITERIA, "magnitude", ("pruning_budget",), budgets=("global", "uniform")),
}
_PATTERN = Granularity(WEIGHT_CRITERIA, "magnitude", ())


def granularity(name: object) -> Granularity:
    """That of an option's value. Raises ``OptionError`` for an unknown one and for patterns that keep everything."""
    if isinstance(name, str) and name in GRANULARITIES:
        return GRANULARITIES[name]
    found = pattern(name) if isinstance(name, str) else None
    if found is None:
        raise OptionError(f"unknown pruning_granularity {name!r}", stage="compile", expected='"channels", "kernels", "unstructured" or "N:M"',
                          remedy='"2:4" keeps two of every four weights.')  # fmt: skip
    if found[0] >= found[1]:
        raise OptionError(f'pruning_granularity="{name}" keeps {found[0]} of every {found[1]} weights', stage="compile",
                          expected='"N:M" with N < M', remedy='"2:4" keeps two of every four.')  # fmt: skip
    return _PATTERN


def ratio_of(name: str, given: float) -> float:
    """The share of weights that a pattern removes; for other granularities what was ``given``.

    Raises ``OptionError`` for a ratio that is another one than the pattern's.
    """
    if (found := pattern(name)) is None:
        return given
    share = 1 - found[0] / found[1]
    if given not in (0, share):
        raise OptionError(f'pruning_ratio is {given}, but pruning_granularity="{name}" removes {share:g}', stage="compile",
                          remedy="Drop pruning_ratio.")  # fmt: skip
    return share


def check_choice(name: str, option: str, value: object, legal: Mapping | tuple) -> None:
    """Raise ``OptionError`` for a value that exists, but not for this granularity, or that does not exist."""
    if not isinstance(value, str) or value not in legal:
        known = {
            "pruning_criterion": {**CRITERIA, **WEIGHT_CRITERIA},
            "pruning_budget": BUDGETS,
            "pruning_measure": MEASURES,
        }[option]
        found = f"unknown {option} {value!r}"
        if str(value) in known:
            found = f'{option}="{value}" does not go with pruning_granularity="{name}"'
        raise OptionError(found, stage="compile", remedy=nearest(str(value), list(legal)))
