"""Criteria are judged by what training found, chosen on one half of the cells and reported on the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import criterion
import pytest
import trials
from criterion import CELLS, CONSTANTS, FAMILIES, TODAY, Criterion
from gaps import EXTRACTOR, PIXELS, Gaps
from trials import Trial

QUALITIES = (10, 25, 50, 75, 90)
ACCURATE = {10: 40.0, 25: 50.0, 50: 49.5, 75: 45.0, 90: 44.0}


def task(pixels: Mapping[int, float], extractor: Mapping[int, float] | None = None) -> Gaps:
    """A task of one class whose log-volume gaps are these."""

    def volumes(gap: Mapping[int, float]) -> dict[str, Any]:
        return {"block": 16, "original": {"3": -20.0}, "coded": {"3": [-20.0 + gap[q] for q in QUALITIES]}}

    return {
        "qualities": list(QUALITIES),
        "exemplars": {"3": [50, 40, 30, 20, 10]},
        "volumes": {PIXELS: volumes(pixels), EXTRACTOR: volumes(extractor or pixels)},
        "cpu_seconds": 1.0,
    }


# R of 0.37, 0.61, 0.82, 0.95 and 1.
BLUR = task({10: -1.0, 25: -0.5, 50: -0.2, 75: -0.05, 90: 0.0})
NOISE = task({10: 2.0, 25: 0.45, 50: 0.1, 75: 0.0, 90: 0.0})


def trial(*tasks: Gaps, last: Mapping[int, float] = ACCURATE, seed: int = 10) -> Trial:
    return Trial("cell", seed, last, tasks)


def test_the_lowest_quality_near_one_is_taken_and_the_highest_if_none_is() -> None:
    assert TODAY.choice([BLUR]) == 50
    assert Criterion("pixels", "raw", 0.4).choice([BLUR]) == 25
    assert Criterion("pixels", "raw", 0.1).choice([BLUR]) == 75
    assert Criterion("pixels", "raw", 1e-9).choice([BLUR]) == 90
    assert Criterion("pixels", "raw", 0.3).choice([NOISE]) == 50
    assert Criterion("pixels", "per_sample", 0.05).choice([BLUR]) == 25
    assert Criterion("pixels", "log_ratio", 0.06).choice([BLUR]) == 10


def test_both_embeddings_must_be_near_one_where_both_are_asked() -> None:
    unequal = task({10: 0.0, 25: 0.0, 50: 0.0, 75: 0.0, 90: 0.0}, {10: 2.0, 25: 1.0, 50: 0.5, 75: 0.1, 90: 0.0})
    chosen = [Criterion(embedding, "raw", 0.3).choice([unequal]) for embedding in ("pixels", "extractor", "both")]
    assert chosen == [10, 75, 75]


def test_without_anything_to_compare_the_middle_is_taken() -> None:
    nothing = task(dict.fromkeys(QUALITIES, 0.0))
    for volumes in nothing["volumes"].values():
        volumes |= {"original": {}, "coded": {}}
    assert TODAY.choice([nothing]) == 50


def test_behind_is_counted_from_the_best_of_the_other_seeds_and_at_most_from_the_best_of_all() -> None:
    worse = {**ACCURATE, 25: 47.0, 50: 48.5}
    both = [trial(BLUR, NOISE), trial(NOISE, seed=11, last=worse)]
    # 50 is the best of the means, 49 against 48.5; alone, the first seed says 25 and the second 50.
    assert trials.best_quality(both) == 50
    assert criterion.at_most_behind(TODAY, both) == [0.0, 0.0]
    assert criterion.behind(TODAY, both) == [0.0, -1.5]
    assert criterion.at_most_behind(Criterion("pixels", "raw", 0.4), both) == [-0.5, 0.0]
    assert criterion.behind(CONSTANTS[0], both) == [9.5, 7.0]
    assert criterion.behind(CONSTANTS[0], both[:1]) == [10.0]


def test_a_criterion_is_asked_after_the_first_task_only() -> None:
    assert criterion.behind(TODAY, [trial(BLUR)]) == criterion.behind(TODAY, [trial(BLUR, NOISE, NOISE)])


def test_the_halves_do_not_change_with_what_is_done_and_are_of_one_size() -> None:
    one, other = criterion.halves(cell.name for cell in CELLS)
    assert sorted(one + other) == sorted(cell.name for cell in CELLS)
    assert abs(len(one) - len(other)) <= 1
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    some = {one[0]: [trial(BLUR)], other[0]: [trial(BLUR)]}
    assert criterion.split(len(CELLS), some) == (one, other)
    # Fixed before anything was trained: whoever changes the cells or the hash looks at other halves.
    assert one[:2] == ["squares64 er 10 6144", "fashion er 5 6000"]
    assert other[:2] == ["squares64 er 5 6144", "fashion er 5 2000"]


def test_the_simplest_family_that_is_no_more_than_a_point_behind_is_chosen() -> None:
    every = {"a": [trial(BLUR)], "b": [trial(NOISE)]}
    assert criterion.chosen(every) == Criterion("pixels", "raw", 0.5)
    # Where pixels mislead and features do not, features are asked.
    misled = task(dict.fromkeys(QUALITIES, 0.0), {10: -2.0, 25: -0.1, 50: 0.0, 75: 0.0, 90: 0.0})
    found = criterion.chosen({"a": [trial(misled)]})
    assert (found.embedding, found.definition) == ("extractor", "raw")
    assert found.choice([misled]) == 25


def test_of_epsilons_that_are_equal_the_largest_is_taken() -> None:
    flat = {"a": [trial(BLUR, last=dict.fromkeys(QUALITIES, 50.0))]}
    assert [criterion.fitted(family, flat).epsilon for family in FAMILIES[:2]] == [0.5, 0.05]


def test_own_choices_that_change_are_counted() -> None:
    every = {"a": [trial(BLUR, BLUR, task({**dict.fromkeys(QUALITIES, 0.0), 10: -9.0}))]}
    assert criterion.own_choices(TODAY, every["a"][0]) == [50, 50, 25]
    assert criterion.changes(TODAY, every) == 0.5
    assert criterion.drift(PIXELS, {"a": [trial(BLUR, NOISE)]}, 10) == pytest.approx(2.718281828**3)


def test_the_grid_costs_its_trainings_and_counts_the_shared_task_once() -> None:
    result: dict[str, Any] = {
        "base_cpu_seconds": 10.0,
        "runs": {"25": {"cpu_seconds": 20.0}, "50": {"cpu_seconds": 30.0}},
        "gaps": [BLUR],
    }
    assert trials.cost_ratios([result]) == [60.0]
    assert trials.cost_ratios([{**result, "runs": {**result["runs"], "75": None}}]) == []


def budget_result(quality: int | None, seed: int, last: float, **more: Any) -> dict[str, Any]:
    config = {
        "data": "cifar10",
        "arm": {"kind": "strips", "quality": quality},
        "budget_bytes": 16_000,
        "per": "class",
        "method": "lucir",
        "settings": [["codec_ratio", 0.5], ["epochs", 8]],
    }
    return {"config": config, "seed": seed, "last": last, "matrix": [[last / 100]], "learning_seconds": 101.0, **more}


def test_runs_of_the_budget_benchmark_are_cells_with_the_qualities_that_were_trained(tmp_path: Path) -> None:
    selecting = {"gaps": [BLUR], "selection_seconds": 1.0}
    kept = [budget_result(None, 10, 49.0, **selecting), *(budget_result(q, 10, ACCURATE[q]) for q in (25, 50, 75))]
    kept += [budget_result(q, 11, ACCURATE[q]) for q in (25, 50, 75)]  # a seed without its selecting run
    kept += [budget_result(25, 10, 0.0)]  # tuning
    for number, result in enumerate(kept):
        table = "budget-tuning" if not result["last"] else "budget"
        path = tmp_path / table / "cifar10" / f"seed-{result['seed']}" / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    [(name, [found])] = trials.trials_of_budget(tmp_path).items()
    assert name == "budget cifar10 lucir 5 16000"
    assert dict(found.last) == {25: 50.0, 50: 49.5, 75: 45.0}
    assert TODAY.choice(found.tasks) == 50
    assert Criterion("pixels", "raw", 0.9).choice(found.tasks) == 25
    assert trials.full_cost_ratios(trials.budget_results(tmp_path)) == [500.0]
