"""GEM's tables: what a run keeps, which learning rate it has, and which runs a table is made of."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gem
import numpy as np
import numpy.typing as npt
import onepass
import pytest
import rates
from kept import Job, Result
from onepass import Case, Experiment, Run, Runs, Setting, execute

from engram_trainer.configuration import RuntimeConfig
from engram_trainer.memory import Learned
from engram_trainer.methods.gem import Config as GemConfig
from engram_trainer.runtime import Runtime

SETTING = Setting("classes", "digits", "mlp", "class-incremental", tasks=5, train_per_class=12)
ARMS = {arm.label: arm for arm in gem.MLP_ARMS}
SOURCES = {"digits": "digits"}


def run(label: str, exemplars: int, rate: float = 0.1, *, setting: Setting = SETTING, **options: Any) -> Result:
    job = Job("test", label, 3, Run(Case(setting, ARMS[label], exemplars), rate, **options))
    return execute(job, sources=SOURCES)


def test_a_result_is_plain_and_the_same_when_it_is_made_again() -> None:
    result = run("gem 1/k", 16)
    assert json.loads(json.dumps(result)) == result
    assert result == run("gem 1/k", 16)
    assert result["failure"] is None
    assert [len(row) for row in result["matrix"]] == [2, 3, 4, 5, 5]
    assert result["acc"] == pytest.approx(np.mean(result["matrix"][-1]), abs=1e-4)
    assert len(result["on_memory"]) == 5
    assert 0 < result["corrected_ratio"] < 1
    assert 0 < result["bytes_per_task"] < 16 * (64 + 2)


def test_a_run_that_diverges_says_so_and_counts_as_chance() -> None:
    result = run("er", 16, rate=1e30)
    assert result["failure"]["task"] == 0
    assert "not finite" in result["failure"]["why"]
    assert (result["acc"], result["bwt"], result["over_fitting"]) == (0.1, None, None)
    given = replace(SETTING, scenario="task-incremental")
    assert run("er", 16, rate=1e30, setting=given)["acc"] == 0.5


def test_joint_is_learned_once_with_the_images_of_all_tasks() -> None:
    result = run("joint", 0)
    assert len(result["matrix"]) == 1
    assert result["acc"] == pytest.approx(np.mean(result["matrix"][0]), abs=1e-4)
    assert result["acc"] > run("plain", 0)["acc"]
    assert (result["on_memory"], result["over_fitting"], result["bytes_per_task"]) == ([], None, 0)


def test_tuning_scores_training_images_that_are_not_learned() -> None:
    assert {"matrix", "on_memory"}.isdisjoint(run("er", 16, is_tuning=True))
    whole = SETTING.stream("digits", 3, is_tuning=False)
    held_out = SETTING.stream("digits", 3, is_tuning=True)

    def pixels(tasks: Any, part: str) -> set[bytes]:
        return {image.tobytes() for task in tasks.tasks for image in getattr(task, part).read()}

    assert not pixels(held_out, "test") & pixels(held_out, "train")
    assert not pixels(held_out, "test") & pixels(whole, "test")


def test_no_stream_is_both_tuned_on_and_in_a_table() -> None:
    tuned = {seed for experiment in gem.EXPERIMENTS for seed in experiment.tuning_seeds}
    assert tuned.isdisjoint(gem.SEEDS)
    assert min({*tuned, *gem.SEEDS}) >= 10  # earlier seeds have been looked at


def test_fewer_exemplars_are_some_of_the_more() -> None:
    task = SETTING.stream("digits", 3, is_tuning=False).tasks[0]
    few, many = ({image.tobytes() for image in onepass.chosen_images(task, count, seed=3).read()} for count in (4, 16))
    assert len(few) == 4
    assert few < many


class Rote:
    """Knows the images of some tasks by heart and no others."""

    def __init__(self, learner: Any, tasks: tuple[int, ...]) -> None:
        self.runtime = learner.runtime
        stream = self.runtime.stream
        self.known = {
            image.tobytes(): label
            for index in tasks
            for image, label in zip(
                stream.tasks[index].train.read(), stream.labels(stream.tasks[index].train.class_ids), strict=True
            )
        }

    def scores(self, images_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        found = np.zeros((len(images_NHWC), 10), np.float32)
        for row, image in zip(found, images_NHWC, strict=True):
            # The first label that arrives is in no task but the first.
            row[self.known.get(image.tobytes(), 0)] = 1
        return found


def test_accuracy_on_the_memory_is_that_on_the_exemplars_of_each_task() -> None:
    tasks = SETTING.stream("digits", 3, is_tuning=False)
    memory = onepass.memory_of(replace(ARMS["er"], memory="raw"))
    for task in tasks.tasks:
        memory.add(Learned(task.index, onepass.chosen_images(task, 8, seed=0)))
    learner: Any = Rote(type("Learner", (), {"runtime": Runtime(RuntimeConfig(), tasks, seed=0)}), (1, 3))
    assert onepass.accuracies_on_memory(learner, memory, tasks)[1:] == [1, 0, 1, 0]


def test_over_fitting_is_of_the_tasks_that_were_replayed() -> None:
    assert onepass.over_fitting([0.9, 0.7, 1.0], [0.5, 0.7, 0.1]) == pytest.approx(0.2)


def test_the_walk_ends_where_both_neighbours_are_worse() -> None:
    for top in rates.RATES[1:-1]:
        scores: dict[float, float] = {}
        while rest := rates.wanted(scores, 0.03):
            scores |= {rate: -abs(np.log(rate / top)) for rate in rest}
        assert rates.best(scores) == top
        assert not rates.is_on_edge(top)


def test_a_walk_that_never_comes_down_ends_on_the_edge_and_that_is_said() -> None:
    scores: dict[float, float] = {}
    while rest := rates.wanted(scores, 0.03):
        scores |= dict.fromkeys(rest, 0.1)  # chance everywhere: the lowest rate
    assert rates.best(scores) == rates.RATES[0]
    assert rates.is_on_edge(rates.best(scores))


def test_an_interrupted_walk_goes_on_as_if_it_had_not_been() -> None:
    """Two humps: which one is found must not depend on what was scored first."""
    assert rates.wanted({0.01: 0.9}, 0.03) == (0.03, 0.1)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path, SOURCES, "cpu", 1, deadline=time.monotonic() - 1)


EXPERIMENT = Experiment(
    SETTING, (ARMS["er"], ARMS["gem 1/k"], ARMS["gem 1/k, raw"]), (64, 16), tuning_seeds=(1000, 1001), raw_at=64
)


def keep(runs: Runs, job: Job, acc: float, **more: Any) -> None:
    path = job.path(runs.folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"acc": acc, "bwt": -0.1, "over_fitting": 0.05, "failure": None, "corrected_ratio": 0.0}
    path.write_text(json.dumps({**result, "bytes_per_task": 100, "seconds": 1.0, "code": "a", **more}))


def tuned(runs: Runs, top: float) -> None:
    for case in EXPERIMENT.tuned:
        for rate in rates.RATES:
            for job in rates.tuning_jobs(case, rate, EXPERIMENT.tuning_seeds):
                keep(runs, job, 1 - abs(float(np.log(rate / top))) / 10)


def test_learning_rates_are_read_from_what_tuning_kept(runs: Runs) -> None:
    assert rates.tune(EXPERIMENT, 16, runs) == {}
    tuned(runs, top=0.3)
    choices = rates.tune(EXPERIMENT, 16, runs)
    assert set(choices) == {Case(SETTING, ARMS[label], count) for label in ("er", "gem 1/k") for count in (64, 16)}
    assert set(choices.values()) == {0.3}
    raw = Case(SETTING, ARMS["gem 1/k, raw"], 64)
    job = gem.table_job(raw, 10, choices)
    assert job is not None
    assert job.config.learning_rate == 0.3


def test_a_table_is_of_the_seeds_that_all_its_lines_have(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(runs, top=0.1)
    choices = rates.tune(EXPERIMENT, 64, runs)
    jobs = gem.part_jobs((EXPERIMENT, 64), (10, 11, 12), choices)
    assert [job.seed for job in jobs] == [10] * 3 + [11] * 3 + [12] * 3
    accs: dict[str, dict[int, float]] = {
        "er": {10: 0.5, 11: 0.6, 12: 0.9},
        "gem 1/k": {10: 0.6, 11: 0.8, 12: 0.9},
        "gem 1/k, raw": {10: 1, 11: 1},
    }
    for job in jobs:
        label = job.config.case.arm.label
        if job.seed in accs[label]:
            keep(runs, job, accs[label][job.seed], failure={"task": 1} if (label, job.seed) == ("er", 10) else None)
    found = gem.show((EXPERIMENT, 64), (10, 11, 12), choices, runs)
    assert found["seeds_classes_64"] == 2
    assert found["acc_er_classes_64"] == pytest.approx(55)
    assert found["gain_over_er_gem_1_k_classes_64_points"] == pytest.approx(15)
    assert found["gain_over_er_gem_1_k_classes_64_low"] == pytest.approx(15 - 12.706 * 7.0711 / 2**0.5, abs=0.01)
    assert found["over_fitting_er_classes_64"] == pytest.approx(5)
    assert found["acc_er_classes_64_interval"] == pytest.approx(12.706 * 7.0711 / 2**0.5, abs=0.01)
    assert found["over_fitting_er_classes_64_interval"] == pytest.approx(0)
    printed = capsys.readouterr().out
    assert "seeds 10, 11; 1 runs of 3 seeds are missing" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("|           er |")]
    assert [cell.strip() for cell in line.split("|")][8] == "1"  # failed


def test_runs_on_more_images_of_cifar_10_are_runs_of_their_own() -> None:
    larger = gem.sized(gem.CIFAR10, 5000)
    assert larger.setting.train_per_class == 5000
    assert gem.sized(gem.CIFAR10, gem.CIFAR10_PER_CLASS) == gem.CIFAR10
    assert gem.sized(gem.PERMUTED, 5000) == gem.PERMUTED
    small, large = (
        gem.part_jobs((experiment, 64), (10,), dict.fromkeys(experiment.tuned, 0.1))
        for experiment in (gem.CIFAR10, larger)
    )
    assert {job.path() for job in small}.isdisjoint(job.path() for job in large)


def test_the_headline_is_of_the_default_margin_at_the_papers_number_of_exemplars() -> None:
    line = gem.key_of(gem.DEFAULT_GEM)
    flat = {
        f"acc_{line}_class_incremental_256": 80.0,
        f"acc_{line}_class_incremental_64": 70.0,
        "acc_er_class_incremental_256": 75.0,
        f"gain_over_er_{line}_class_incremental_256_low": 3.0,
        "seeds_class_incremental_256": 5,
        "seeds_permuted_256": 4,
    }
    found = gem.summary(flat, 256)
    assert (found["acc_gem_class_incremental"], found["acc_er_class_incremental"]) == (80, 75)
    assert (found["acc_gem_permuted"], found["seeds"]) == (None, 4)
    assert found["gem_gain_over_er_class_incremental_low"] == 3


def test_the_margin_that_the_trainer_has_by_default_is_a_line_of_every_table() -> None:
    for experiment in gem.EXPERIMENTS:
        options = [dict(arm.options) for arm in experiment.arms if arm.name == gem.DEFAULT_GEM]
        assert options
        assert all(each["gamma"] == GemConfig().gamma for each in options)


def test_every_table_is_made_once_and_every_number_of_exemplars_has_one() -> None:
    parts = [part for stage in gem.STAGES for part in stage]
    assert len(set(parts)) == len(parts)
    assert set(parts) == {(experiment, count) for experiment in gem.EXPERIMENTS for count in experiment.exemplars}
    choices = {case: 0.1 for experiment in gem.EXPERIMENTS for case in experiment.tuned}
    jobs = {job for stage in gem.STAGES for job in gem.stage_jobs(stage, gem.SEEDS, choices)}
    assert len({job.path() for job in jobs}) == len(jobs)
    assert {job.seed for job in jobs} == {*gem.SEEDS}
