"""Means over seeds with 95 % t-intervals, alone and as differences that are paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds; `half` is half of its interval, None of a single seed."""

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float | None:
        """The lower end of the interval."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """The upper end of the interval."""
        return None if self.half is None else self.mean + self.half

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.half is None else f"{self.mean:.1f} ± {self.half:.1f}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values that are one per seed, and its interval.

    Raises:
        statistics.StatisticsError: there are none.
    """
    return Estimate(fmean(values), half_width(values), len(values))


def paired(these: Mapping[int, float], others: Mapping[int, float]) -> Estimate | None:
    """How much these are above the others, over the seeds that both have; None where they share none."""
    seeds = sorted(these.keys() & others.keys())
    return estimate([these[seed] - others[seed] for seed in seeds]) if seeds else None


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % t-interval of a mean; None of a single value."""
    if len(values) < 2:
        return None
    return float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / sqrt(len(values))
