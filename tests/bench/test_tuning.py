"""Learning rates are tuned alike for all arms, and those in use are what the kept grid says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import budget
import kept
import pytest
import tuning
from learning import Place


def grid(**by_kind: Mapping[float, float]) -> dict[str, dict[float, list[float]]]:
    return {kind: {rate: [value, value] for rate, value in rates.items()} for kind, rates in by_kind.items()}


def test_a_grid_grows_where_the_best_lies_at_its_end_for_all_arms() -> None:
    assert tuning.missing_rates(grid(raw={}, strips={})) == [0.01, 0.03, 0.1]
    inside = grid(raw={0.01: 1, 0.03: 3, 0.1: 2}, strips={0.01: 1, 0.03: 3, 0.1: 2})
    assert tuning.missing_rates(inside) == []
    above = grid(raw={0.01: 1, 0.03: 3, 0.1: 2}, strips={0.01: 1, 0.03: 3, 0.1: 4})
    assert tuning.missing_rates(above) == [0.3]
    both = grid(raw={0.01: 4, 0.03: 3, 0.1: 2}, strips={0.01: 1, 0.03: 3, 0.1: 4})
    assert tuning.missing_rates(both) == [0.003, 0.3]
    grown = grid(raw={0.01: 1, 0.03: 3, 0.1: 2, 0.3: 1}, strips={0.01: 1, 0.03: 3, 0.1: 4, 0.3: 3})
    assert tuning.missing_rates(grown) == []


@pytest.mark.parametrize(
    ("name", "data", "bytes_per_class"),
    sorted({(table.learning, data, each) for table in budget.TABLES.values() for data, each in budget.grid_of(table)}),
)
def test_the_learning_rates_are_those_that_the_kept_grid_says(name: str, data: str, bytes_per_class: int) -> None:
    found = tuning.chosen(name, data, bytes_per_class, Place({}, kept.RESULTS, Path()))
    if found is None:
        pytest.skip("bench/budget.py --tune has not been run for it")
    assert tuning.TUNED.get((name, data, bytes_per_class)) == found
