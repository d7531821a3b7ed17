"""What the claim's tables rest on: arms that differ in their memory alone, fair choices, pairing by seed."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import arms
import budget
import kept
import learning
import pytest
import settings
import torch
import tuning

from engram.schemas import Per
from engram_trainer import methods
from tests.bench.results import put

PLACE = learning.Place({"cifar10": "", "fashion": ""}, kept.RESULTS, Path())
# Options that methods were given after runs had been kept, whose defaults leave everything as it was: a setting more
# would be another configuration, and all that is kept would have to be run again.
LATER_OPTIONS: set[str] = set()
TUNED = {"raw": 0.1, "lossless": 0.1, "files": 0.03, "strips": 0.03, "none": 0.1, "joint": 0.1}


def run(arm: arms.Arm, **changes: Any) -> learning.Run:
    return replace(learning.run_of(settings.LEARNINGS["lucir"], "fashion", arm, 4_000, 0.03), **changes)


def job(arm: arms.Arm, seed: int = 10, **changes: Any) -> kept.Job:
    return learning.job_of("budget", run(arm, **changes), seed, "lucir")


@pytest.mark.parametrize("way", settings.LEARNINGS.values(), ids=list(settings.LEARNINGS))
def test_no_setting_is_left_to_a_default_of_the_trainer(way: settings.Learning) -> None:
    options = {field.name for field in fields(methods.config_class(way.method))}
    assert options - {"lr"} - LATER_OPTIONS == dict(way.settings).keys()


def test_the_arms_of_a_table_differ_in_memory_and_learning_rate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TUNED", {("lucir", "cifar10", 16_000): TUNED})
    jobs = budget.jobs_of(budget.TABLES["primary"], "cifar10", 10, 16_000, "class", PLACE)
    runs = [job.config for job in jobs]
    assert {each.arm for each in runs} == {*arms.PRIMARY}
    assert {dict(each.settings)["lr"] for each in runs if each.arm.kind == "strips"} == {0.03}
    assert dict(next(each.settings for each in runs if each.arm == arms.RAW))["lr"] == 0.1
    alike = {
        replace(each, arm=arms.RAW, selection=(), settings=tuple(s for s in each.settings if s[0] != "lr"))
        for each in runs
    }
    assert len(alike) == 1


@pytest.mark.parametrize("arm", [*arms.PRIMARY, arms.NONE, *budget.LOSSY], ids=lambda arm: arm.name)
def test_beside_every_memory_the_learner_shows_coded_images(arm: arms.Arm) -> None:
    assert arms.memory_of(arm, 4_000, "class", {}).is_lossy


def test_a_run_of_a_fixed_quality_is_that_of_selection_where_this_chose_it_at_every_task(tmp_path: Path) -> None:
    done = {"last": 61.0, "exemplars": 9, "gaps": [], "decisions": [], "selection_seconds": 1.0}
    put(job(arms.SELECTED, selection=settings.items(settings.SELECTION)), {**done, "qualities": [50] * 5}, tmp_path)
    found = learning.selected_twin(job(arms.Arm("strips", 50)), tmp_path)
    assert found is not None
    assert (found["same_as"], found["last"], found["qualities"]) == ("lucir strips-selected 4000", 61.0, [50] * 5)
    assert "decisions" not in found
    others = [
        job(arms.Arm("strips", 25)),
        job(arms.Arm("files", 50)),
        job(arms.SELECTED, selection=settings.items(settings.SELECTION)),
        job(arms.Arm("strips", 50), seed=11),
        job(arms.Arm("strips", 50), budget_bytes=4_001),
        job(arms.Arm("strips", 50), settings=(*run(arms.RAW).settings[:-1], ("lr", 0.1))),
        replace(job(arms.Arm("strips", 50)), table="budget-tuning/fashion"),
    ]
    assert [learning.selected_twin(each, tmp_path) for each in others] == [None] * len(others)


def test_where_selection_changed_its_mind_the_fixed_quality_is_run(tmp_path: Path) -> None:
    selecting = job(arms.SELECTED, selection=settings.items(settings.SELECTION))
    put(selecting, {"last": 61.0, "qualities": [50, 50, 75, 75, 75]}, tmp_path)
    assert learning.selected_twin(job(arms.Arm("strips", 50)), tmp_path) is None
    assert learning.selected_twin(job(arms.Arm("strips", 75)), tmp_path) is None


@pytest.mark.slow
def test_that_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    place = learning.Place({"fashion": "digits"}, tmp_path, tmp_path / "bases")
    told = settings.items({**settings.LUCIR, "epochs": 1, "balance_epochs": 1, "batch_size": 32, "lr": 0.03})
    small = settings.items({"tasks": 2, "train_per_class": 60})
    selecting = run(arms.SELECTED, stream=small, settings=told, budget_bytes=600)
    selected = learning.learn(selecting, 3, place)
    same, other = (
        learning.learn(replace(selecting, arm=arms.Arm("strips", quality), selection=()), 3, place)
        for quality in (selected["qualities"][0], 75)
    )
    assert len({*selected["qualities"]}) == 1
    for key in ("matrix", "on_coded", "used_bytes", "counts", "qualities"):
        assert same[key] == selected[key]
    assert other["counts"] != selected["counts"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "arm", "per"),
    [
        *(("lucir", arm, "class") for arm in (arms.RAW, arms.LOSSLESS, arms.FILES, arms.NONE, *budget.LOSSY[2:4])),
        ("lucir-uncoded", arms.STRIPS_50, "class"),
        ("er", arms.SELECTED, "class"),
        ("joint", arms.JOINTLY, "class"),
        *(("lucir", arm, "buffer") for arm in (arms.LOSSLESS, arms.SELECTED)),
    ],
    ids=str,
)
def test_every_arm_of_every_table_runs(way: str, arm: arms.Arm, per: Per, tmp_path: Path) -> None:
    place = learning.Place({"fashion": "digits"}, tmp_path, tmp_path / "bases")
    each = settings.LEARNINGS[way]
    told = dict(each.settings) | {"epochs": 1, "batch_size": 32}
    each = replace(each, settings=settings.items(told | ({"balance_epochs": 1} if "balance_epochs" in told else {})))
    small = {"tasks": 2, "train_per_class": 40}
    tiny = learning.run_of(each, "fashion", arm, 600 if per == "class" else 6_000, 0.03, per=per, stream=small)
    found = learning.learn(tiny, 3, place)
    assert len(found["matrix"]) == len(found["on_coded"]) == 2
    assert found["used_bytes"] <= tiny.limit_bytes
    assert (found["exemplars"] > 0) == arm.has_memory
    assert ("decisions" in found) == (arm == arms.SELECTED)
    # The first task is there already, and what comes of it is the same.
    assert learning.learn(tiny, 3, place)["matrix"] == found["matrix"]


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    place = learning.Place({"fashion": "digits"}, tmp_path, tmp_path / "bases", "cuda")
    tiny = run(arms.SELECTED, stream=settings.items({"tasks": 2, "train_per_class": 60}), device="cuda")
    assert learning.learn(tiny, 3, place)["last"] > 20


def result(last: float) -> kept.Result:
    own = {"last": last, "average_incremental": last, "exemplars": 100, "used_bytes": 40_000, "qualities": [50] * 5}
    return {**own, "code": "then"}


def test_gains_are_paired_by_seed_and_the_best_fixed_quality_has_the_best_mean() -> None:
    found = budget.headline(
        {
            arms.SELECTED: {10: 60.0, 11: 50.0},
            arms.RAW: {10: 50.0, 11: 42.0},
            arms.LOSSLESS: {10: 55.0, 11: 45.0},
            arms.Arm("strips", 25): {10: 63.0, 11: 48.0},
            arms.Arm("strips", 50): {10: 60.0, 11: 50.0},
        }
    )
    assert found["seeds"] == 2
    assert found["gain_over_raw_points"] == 9.0
    # t with one degree of freedom: 12.706 times the standard deviation sqrt(2) over sqrt(2).
    assert found["gain_over_raw_low"] == pytest.approx(9 - 12.706, abs=0.01)
    assert (found["gain_over_lossless_points"], found["gain_over_lossless_low"]) == (5.0, 5.0)
    assert (found["best_fixed_quality"], found["gap_to_best_fixed_quality_points"]) == (25, 0.5)


def test_a_table_is_over_complete_seeds_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kept, "code_version", lambda: "now")
    place = replace(PLACE, data={"fashion": ""}, results=tmp_path)
    assert budget.print_tables(["uncoded"], place) == {"uncoded_fashion_old_code_4000": 0}
    assert "0 of 21 runs are done; seeds (none is complete)" in capsys.readouterr().out
    monkeypatch.setattr(tuning, "TUNED", {(name, "fashion", 4_000): TUNED for name in ("lucir", "lucir-uncoded")})
    points = {"strips": 50.0, "raw": 40.0, "lossless": 45.0, "files": 47.0}
    for name in ("primary", "uncoded"):
        for seed in (10, 11, 12):
            for each in budget.jobs_of(budget.TABLES[name], "fashion", seed, 4_000, "class", place):
                last = (
                    points[each.config.arm.kind]
                    + seed
                    + (3 if (name, each.config.arm.kind) == ("uncoded", "raw") else 0)
                )
                if (name, seed, each.config.arm) != ("uncoded", 12, arms.FILES):
                    put(each, result(last), tmp_path)
    flat = budget.print_tables(["uncoded"], place)
    assert "20 of 21 runs are done; seeds 10 11" in capsys.readouterr().out
    assert flat["uncoded_fashion_seeds"] == 2
    assert flat["uncoded_fashion_old_code_4000"] == 20
    assert flat["uncoded_fashion_last_raw_4000"] == 43 + 10.5
    assert flat["uncoded_fashion_gain_over_raw_points"] == 7.0
    # Raw pixels are better off without the codec, lossless archives are as well with it.
    assert flat["uncoded_fashion_gain_over_raw_best_points"] == 7.0
    assert flat["uncoded_fashion_gain_over_lossless_best_points_4000"] == 5.0


def test_a_run_that_diverges_counts_as_chance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def diverging(*_: Any) -> Any:
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(learning, "learn", diverging)
    found = learning.execute(job(arms.RAW), replace(PLACE, results=tmp_path))
    assert (found["last"], found["diverged"]) == (10.0, "the loss is not finite")
