"""What the tables of the published protocol rest on: arms that are alike, all bytes counted, runs that resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import kept
import numpy as np
import published
import pytest
import report
import torch
from kept import Job, Result, Unfinished
from published import ARMS, FULL, Arm, Clock, Scale, Setting

from engram.selection.quality import choose
from engram_trainer import datasets, recipes, stream
from engram_trainer.configuration import differences
from tests.contents import pictures

TINY = Scale("mlp", epochs=2)
PER_CLASS = 30


def arm(name: str) -> Arm:
    return next(each for each in ARMS if each.name == name)


SMALL = {
    "strips": Arm("er_strips", "er", budget_bytes=12_000),
    "derpp": Arm("derpp_strips", "derpp", budget_bytes=12_000),
    "raw": dataclasses.replace(arm("er_raw_200")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few pictures in the form of CIFAR-10."""
    folder = tmp_path_factory.mktemp("cifar10")
    (folder / "batches.meta.txt").write_text("".join(f"class {number}\n" for number in range(10)))
    each = PER_CLASS // 5
    for number, name in enumerate([*(f"data_batch_{place}.bin" for place in range(1, 6)), "test_batch.bin"]):
        class_ids = np.repeat(np.arange(10), each)
        planes = pictures(number, 10 * each, (32, 32, 3)).transpose(0, 3, 1, 2).reshape(10 * each, -1)
        (folder / name).write_bytes(np.column_stack([class_ids.astype(np.uint8), planes]).tobytes())
    return str(folder)


def job_of(arm: Arm, scale: Scale = TINY, seed: int = 5) -> Job:
    return Job("published-tiny", arm.name, seed, Setting(arm, scale, lr=0.05))


@pytest.fixture(scope="module")
def whole(data: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run of ER with strips that nothing has stopped."""
    return executed(job_of(SMALL["strips"]), data, tmp_path_factory.mktemp("whole"))


def executed(job: Job, data: str, runs: Path) -> Result:
    return published.execute(job, data=data, runs=runs, deadline=float("inf"))


def comparable(result: Result) -> Result:
    return {key: value for key, value in result.items() if key != "task_seconds"}


class Stopping(Clock):
    """A clock that says of each step that it was made, and whose time is up after some of them."""

    made: ClassVar[list[int]] = []
    stop_after: ClassVar[int | None] = None

    def phase(self, name: str, done: int, total: int, *, note: str = "") -> None:
        if name == "learn":
            self.made.append(done)
            if len(self.made) == self.stop_after:
                self.deadline = 0.0
        super().phase(name, done, total, note=note)


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> type[Stopping]:
    """Every epoch is checkpointed, and every step told."""
    monkeypatch.setattr(published, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr("engram_trainer.loop.SHOW_EVERY_S", 0.0)
    monkeypatch.setattr(published, "Clock", Stopping)
    monkeypatch.setattr(Stopping, "made", [])
    monkeypatch.setattr(Stopping, "stop_after", None)
    return Stopping


def test_a_run_that_is_stopped_in_the_middle_of_a_task_goes_on_and_ends_the_same(
    data: str, whole: Result, tmp_path: Path, stopping: type[Stopping]
) -> None:
    job = job_of(SMALL["strips"])
    stopping.stop_after = 2 * 4 + 3  # the first step of the second epoch of the third task
    with pytest.raises(Unfinished, match="stopped in learn, 3 of 4"):
        executed(job, data, tmp_path)
    stopping.made.clear()
    stopping.stop_after = None
    assert comparable(executed(job, data, tmp_path)) == comparable(whole)
    assert stopping.made == [3, 4, *[1, 2, 3, 4] * 2], "what was done is not done again"


def test_strips_pay_for_everything_and_selection_has_chosen_by_the_first_task(data: str, whole: Result) -> None:
    budget = SMALL["strips"].budget_bytes
    assert budget is not None
    assert all(used <= budget for _, used, _ in whole["memory"])
    assert whole["used_bytes"] > 0.85 * budget
    assert whole["exemplars"] <= whole["slots"]
    tasks = stream.build(datasets.load(data), published.stream_of(TINY, 5))
    strips = published.strips_of(SMALL["strips"], tasks, epochs=2, seed=5)
    assert (strips.quality, strips.slots) == (whole["quality"], whole["slots"])
    assert strips.quality == choose([strips.decisions[0]])[0]
    assert len(whole["decisions"]) == 5


@pytest.mark.slow
def test_der_plus_plus_pays_for_its_logits(data: str, whole: Result, tmp_path: Path) -> None:
    result = executed(job_of(SMALL["derpp"]), data, tmp_path)
    assert result["used_bytes"] <= 12_000
    assert result["exemplars"] < whole["exemplars"]


def test_logits_take_room_from_exemplars(data: str) -> None:
    tasks = stream.build(datasets.load(data), published.stream_of(TINY, 5))
    er, derpp = (published.strips_of(SMALL[kind], tasks, epochs=2, seed=5) for kind in ("strips", "derpp"))
    assert 12_000 / derpp.slots - 12_000 / er.slots == pytest.approx(20, abs=6)


def test_raw_arms_in_full_are_the_published_recipes() -> None:
    for name, recipe in (("er_raw_200", "er-cifar10-200"), ("derpp_raw_500", "derpp-cifar10-500")):
        method = arm(name).method
        setting = Setting(arm(name), dataclasses.replace(FULL, precision="32"), published.PUBLISHED_RATES[method])
        ours = published.config_of(setting, "", None, seed=0).to_json()
        changed = differences(recipes.find(recipe).config.to_json(), ours)
        names = {each.partition(":")[0] for each in changed}
        assert names == {
            "recipe",
            "memory.ranking",
            "options.slots",
            "options.flush",
            "options.codec_ratio",
            "runtime.device",
        }, changed


def test_arms_of_a_method_differ_in_their_memory_alone(data: str) -> None:
    tasks = stream.build(datasets.load(data), published.stream_of(TINY, 5))
    strips = published.strips_of(SMALL["strips"], tasks, epochs=2, seed=5)
    one = published.config_of(Setting(SMALL["strips"], TINY, 0.05), data, strips, seed=5).to_json()
    other = published.config_of(Setting(SMALL["raw"], TINY, 0.05), data, None, seed=5).to_json()
    found = {each.partition(":")[0] for each in differences(one, other)}
    assert found == {"memory.kind", "memory.budget_bytes", "memory.quality", "options.slots", "options.flush"}


def test_raw_exemplars_are_as_many_as_published_and_their_pixels_take_the_bytes_that_strips_have() -> None:
    for one, other in published.CLAIMS:
        assert arm(one).budget_bytes, other
    for raw, strips in (("er_raw_200", "er_614400"), ("er_raw_500", "er_1536000")):
        slots, budget = arm(raw).slots, arm(strips).budget_bytes
        assert slots is not None
        assert slots * 32 * 32 * 3 == budget
    assert [arm(name).published for name in ("er_raw_200", "er_raw_500", "er_raw_5120", "derpp_raw_500")] == [
        pytest.approx(value, abs=0.06) for value in (44.8, 57.7, 82.5, 72.7)
    ]
    assert arm("er_raw_500").said == "57.7 (Mammoth's own: 63.4)"
    assert arm("er_614400").said is None


def test_a_run_that_diverges_is_a_result(data: str, tmp_path: Path) -> None:
    job = dataclasses.replace(job_of(SMALL["raw"]), config=Setting(SMALL["raw"], TINY, lr=1e30))
    result = executed(job, data, tmp_path)
    assert "not finite" in result["diverged"]


def test_the_grid_grows_where_its_best_is_at_an_end() -> None:
    assert published.wider_rates({0.03: 1.0, 0.1: 2.0, 0.3: 1.0}) == [0.03, 0.1, 0.3]
    assert published.wider_rates({0.03: 3.0, 0.1: 2.0, 0.3: 1.0}) == [0.01, 0.03, 0.1, 0.3]
    assert published.wider_rates({0.03: 1.0, 0.1: 2.0, 0.3: 3.0}) == [0.03, 0.1, 0.3, 1.0]
    assert published.wider_rates({0.03: 1.0, 0.1: 2.0, 0.3: 3.0, 1.0: 4.0}) == [0.03, 0.1, 0.3, 1.0]
    assert published.wider_rates({0.03: 1.0, 0.1: None, 0.3: 3.0}) == [0.03, 0.1, 0.3]


def test_a_rate_is_scored_by_all_arms_and_a_run_that_diverged_counts_nothing() -> None:
    jobs = [published.tuning_job(each, rate, 1000) for rate in (0.1, 0.3) for each in published.tuned_on("er")]
    assert [each.name for each in published.tuned_on("er")] == ["er_614400", "er_raw_500"]
    results: dict[Job, Result] = {jobs[0]: {"last": 60.0}, jobs[1]: {"last": 40.0}, jobs[2]: {"diverged": "nan"}}
    assert published.tuning_scores(jobs, results) == {0.1: 50.0, 0.3: None}
    results[jobs[3]] = {"last": 40.0}
    assert published.tuning_scores(jobs, results) == {0.1: 50.0, 0.3: 20.0}
    assert published.best_rate({0.1: 50.0, 0.3: 20.0}) == 0.1
    assert published.best_rate({0.1: 50.0, 0.3: None}) is None


def test_no_table_uses_a_seed_of_the_tuning_or_one_that_was_looked_at_before() -> None:
    jobs = published.table_jobs("table", ARMS, TINY, published.PUBLISHED_RATES, seeds=5)
    assert [job.seed for job in jobs[:: len(ARMS)]] == [10, 11, 12, 13, 14]
    assert [job.name for job in jobs[:2]] == ["er_614400", "derpp_raw_500"]


def test_tables_are_over_complete_seeds_and_differences_are_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_silent", True)
    monkeypatch.setattr(kept, "code_version", str)
    arms = [arm("er_614400"), arm("er_raw_200")]
    jobs = published.table_jobs("table", arms, TINY, published.PUBLISHED_RATES, seeds=3)

    def result(last: float | None) -> dict[str, Any]:
        about = {"quality": 50, "exemplars": 10, "used_bytes": 9, "average_incremental": 1.0, "forgetting": 1.0}
        diverged = "not finite" if last is None else None
        return {"diverged": diverged, "code": "another", **({"last": last, **about} if last is not None else {})}

    values: list[float | None] = [70.0, 50.0, 72.0, 50.0, 99.0]
    results = {job: result(value) for job, value in zip(jobs, values, strict=False)}
    flat = published.print_results(jobs, results, "title")
    assert (flat["seeds"], flat["runs_missing"], flat["old_code"]) == (2, 1, 5)
    assert (flat["er_614400_last"], flat["er_raw_200_last"]) == (71.0, 50.0)
    assert flat["er_614400_over_er_raw_200_points"] == 21.0
    assert flat["er_614400_over_er_raw_200_low"] == pytest.approx(21 - 12.71, abs=0.01)
    flat = published.print_results(jobs, {**results, jobs[5]: result(None)}, "title")
    assert (flat["seeds"], flat["er_raw_200_last"]) == (3, None), "a mean over those that did not diverge would flatter"
    assert "er_614400_over_er_raw_200_points" not in flat


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run on a machine that has one")
@pytest.mark.parametrize("kind", list(SMALL))
def test_a_run_in_full_width_learns_on_a_gpu_and_goes_on_there(
    data: str, tmp_path: Path, stopping: type[Stopping], kind: str
) -> None:
    job = job_of(SMALL[kind], dataclasses.replace(FULL, epochs=2))
    stopping.stop_after = 2 * 4 + 3
    with pytest.raises(Unfinished):
        executed(job, data, tmp_path)
    stopping.made.clear()
    stopping.stop_after = None
    result = executed(job, data, tmp_path)
    assert stopping.made == [3, 4, *[1, 2, 3, 4] * 2]
    assert result["diverged"] is None
    assert len(result["matrix"]) == 5
