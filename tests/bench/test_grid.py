"""One job is a grid search: alike at every quality but for the quality, and what is tuned is tuned on other images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grid
import numpy as np
import pytest
from grid import Cell, Size, Sources, Training
from kept import Job
from PIL import Image

SIZE = Size(train_per_class=20, test_per_class=10, epochs=1, batch_size=16)
CELL = Cell("digits", "er", 5, 600)


@pytest.fixture(scope="module")
def result() -> Any:
    job = Job("grid", CELL.name, 3, Training(CELL, 0.1, (10, 50), SIZE))
    return json.loads(json.dumps(grid.train(job, sources=Sources())))


@pytest.mark.slow
def test_every_quality_is_trained_from_the_same_first_task_within_the_same_bytes(result: Any) -> None:
    low, high = result["runs"]["10"], result["runs"]["50"]
    assert low["matrix"][0] == high["matrix"][0]
    assert [len(row) for row in low["matrix"]] == [1, 2, 3, 4, 5]
    assert len(low["on_coded"]) == 5
    assert low["exemplars"] > high["exemplars"] > 0
    assert max(low["used_bytes"], high["used_bytes"]) <= 600 * 10


@pytest.mark.slow
def test_what_a_criterion_needs_is_kept_of_every_task_in_few_bytes(result: Any) -> None:
    assert [sorted(map(len, task["volumes"])) for task in result["gaps"]] == [[6, 9]] * 5
    assert {len(task["exemplars"]) for task in result["gaps"]} == {2}
    assert len(json.dumps(result)) < 10_000


@pytest.mark.slow
def test_a_job_repeated_is_the_same(result: Any) -> None:
    again = grid.train(Job("grid", CELL.name, 3, Training(CELL, 0.1, (50,), SIZE)), sources=Sources())
    assert again["runs"]["50"]["matrix"] == result["runs"]["50"]["matrix"]


@pytest.mark.slow
def test_a_run_that_diverges_is_said_to_and_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    memory_of = grid.memory_of

    def failing(cell: Cell, quality: int) -> Any:
        if quality == 10:
            raise FloatingPointError("the loss is not finite")
        return memory_of(cell, quality)

    monkeypatch.setattr(grid, "memory_of", failing)
    found = grid.train(Job("grid", CELL.name, 3, Training(CELL, 0.1, (10, 50), SIZE)), sources=Sources())
    assert found["runs"]["10"] is None
    assert grid.last_accuracy(found, 10) is None
    assert found["runs"]["50"] is not None


def tuning(accuracies: dict[float, float | None]) -> dict[Job, Any]:
    found = {}
    for job in grid.tuning_jobs([Cell("squares64", "er", 5, 1)]):
        last = accuracies.get(job.config.lr)
        found[job] = {"runs": {"50": None if last is None else {"matrix": [[last]]}}}
    return found


def test_the_best_rate_is_that_of_the_held_out_images_and_one_that_diverged_is_not() -> None:
    slow, middle, fast, wild = grid.RATES["er"]
    jobs = tuning({slow: 0.2, middle: 0.4, fast: 0.3, wild: None})
    assert all(job.config.validation_ratio and job.seed >= 1000 for job in jobs)
    # All sizes of the squares share a rate.
    assert grid.tuned(jobs) == {(f"squares{side}", "er"): middle for side in (32, 64, 96)}


def test_before_all_rates_are_tried_none_is_the_best_and_nothing_is_trained() -> None:
    jobs = tuning(dict.fromkeys(grid.RATES["er"], 0.5))
    some = dict(list(jobs.items())[:-1])
    assert grid.tuned(some) == {}
    assert grid.jobs([Cell("squares64", "er", 5, 1)], grid.tuned(some)) == []


def test_no_seed_of_a_table_is_one_that_was_tuned_on() -> None:
    assert not {*grid.SEEDS} & {*grid.TUNING_SEEDS}
    assert min(grid.SEEDS) >= 10


def test_data_that_is_not_at_hand_is_left_out(tmp_path: Path) -> None:
    assert not Sources().has("cifar10")
    assert not Sources().has("squares64")
    assert Sources(cifar10=tmp_path, photos=tmp_path).has("squares96")


@pytest.fixture
def photographed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    monkeypatch.setattr(grid, "PHOTOGRAPHS", 2)

    def write(count: int) -> None:
        for number in range(count):
            coarse = np.random.default_rng(number).integers(0, 256, (60, 100, 3), np.uint8)
            Image.fromarray(coarse).resize((2500, 1500)).save(tmp_path / f"{number}.jpg")
        Image.fromarray(coarse).resize((2500, 1500)).save(tmp_path / "again.jpg", quality=60)
        Image.new("RGB", (2500, 1500), (9, 9, 200)).save(tmp_path / "drawing.jpg")

    return write


@pytest.mark.slow
def test_training_and_test_squares_are_of_other_fields_and_pictures_count_once(
    photographed: Callable[[int], None], tmp_path: Path
) -> None:
    photographed(2)
    data = grid.squares(tmp_path, 32)
    assert data.train.shape == (32, 32, 3)
    assert (len(data.train), len(data.test)) == (2 * 10 * 8, 2 * 10 * 4)
    assert not {image.tobytes() for image in data.train.read()} & {image.tobytes() for image in data.test.read()}
    # The same places at another size.
    larger = grid.squares(tmp_path, 64).train.read()[::9].astype(np.float64)
    small = data.train.read()[::9].astype(np.float64)
    assert np.abs(larger.reshape(-1, 32, 2, 32, 2, 3).mean(axis=(2, 4)) - small).mean() < 10


def test_too_few_photographs_are_refused(photographed: Callable[[int], None], tmp_path: Path) -> None:
    photographed(1)
    with pytest.raises(ValueError, match="photographs"):
        grid.photographs(tmp_path / "nothing")


@pytest.mark.slow
def test_rates_are_tuned_first_and_what_is_kept_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "size_of", lambda data: SIZE)

    def gathered(minutes: float) -> dict[Job, Any]:
        parser = argparse.ArgumentParser()
        grid.add_arguments(parser)
        args = parser.parse_args(["--out", str(tmp_path), "--jobs", "1", "--minutes", str(minutes)])
        return grid.gather([CELL], args, seeds=(10,))

    [(job, result)] = gathered(5).items()
    assert job.config.lr in grid.RATES["er"]
    assert sorted(result["runs"]) == sorted(map(str, job.config.qualities))
    assert len(list(tmp_path.rglob("*.json"))) == len(grid.RATES["er"]) + 1
    assert gathered(0) == {job: result}
    assert grid.known([CELL], tmp_path, (10,)) == {job: result}
