"""What the shift costs is paired, and "as good" means within a point of the best."""

from __future__ import annotations

from typing import Any

import criterion
import pytest
import qualities
from grid import Cell

from tests.bench.test_criterion import budget_result


def run(clean: float, coded: float) -> dict[str, Any]:
    return {"matrix": [[0.9], [clean, clean]], "on_coded": [coded, coded], "exemplars": 100}


def test_a_quality_is_as_good_if_it_is_within_a_point_of_the_best() -> None:
    assert qualities.as_good({10: 40.0, 25: 49.0, 50: 50.0, 75: 49.5, 90: 48.9}) == [25, 50, 75]


def test_shift_and_augmentation_are_paired_over_the_seeds_that_both_have() -> None:
    cell = qualities.SHIFTED[0]
    cells = {
        cell: {50: {10: run(0.5, 0.52), 11: run(0.4, 0.44)}},
        qualities.unaugmented(cell): {50: {11: run(0.3, 0.5)}},
    }
    flat = qualities.shifts(cells)
    assert flat["shift_cifar10_q50"] == pytest.approx(3.0)
    assert flat["shift_cifar10_unaugmented_q50"] == pytest.approx(20.0)
    assert flat["augmentation_gain_cifar10_q50"] == pytest.approx(10.0)
    assert flat["augmentation_gain_cifar10_q50_low"] is None


def test_sizes_have_the_bytes_of_half_a_raw_image() -> None:
    assert [cell.budget_bytes for cell in qualities.SIZES] == [1_536, 6_144, 13_824]
    assert Cell("squares64", "lucir", 5, 6_144) in criterion.CELLS


def test_runs_of_full_size_are_listed_by_memory_and_those_that_diverged_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(kind: str, quality: int | None, **more: Any) -> dict[str, Any]:
        result = budget_result(quality, 10, 40.0, coded_quality=quality or 50, **more)
        result["config"]["arm"]["kind"] = kind
        return result

    results = [full("strips", 25, on_coded=[0.45]), full("raw", None, on_coded=[0.3]), full("strips", 75)]
    qualities.full_shifts([*results, full("strips", None, on_coded=[0.9])])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    told = [row[2:] for row in rows if row and row[0] == "cifar10"]
    assert told == [
        ["raw", "50", "True", "1", "40", "30", "-10.0"],
        ["strips", "25", "True", "1", "40", "45", "5.0"],
    ]
