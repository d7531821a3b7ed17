"""Runs of the loop: what they leave behind, and that a killed one goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from engram.client import Client
from engram.errors import BudgetExceeded, Conflict, NotFound, Unavailable
from engram_trainer import loop, methods
from engram_trainer.configuration import MemoryConfig, RunConfig, RuntimeConfig
from engram_trainer.report import Report
from engram_trainer.stream import StreamConfig
from tests.servers import ServiceProcess

ROOT = Path(__file__).parents[2]
SMALL = RunConfig(
    data="digits",
    stream=StreamConfig(tasks=5, train_per_class=20, test_per_class=10),
    method="lucir",
    options={"epochs": 4, "balance_epochs": 2, "padding": 1, "flip": False},
    network="mlp",
    memory=MemoryConfig(kind="raw", budget_bytes=6_000),
)


run = partial(loop.run, pictures=False)
"""A run without its pictures, which would take half of the time of these."""


def results(report: Report | dict[str, Any]) -> dict[str, Any]:
    """A report without what differs between two equal runs: its id, its buffer's name and its seconds."""
    found = json.loads(json.dumps(report.to_json() if isinstance(report, Report) else report))
    for memory in found["memory"]:
        memory.pop("buffer", None)
        for decision in memory.get("decisions", {}).values():
            decision.pop("seconds")
    return {name: value for name, value in found.items() if name not in ("run", "seconds", "environment")}


def test_a_run_leaves_its_configuration_its_results_and_two_pictures(tmp_path: Path) -> None:
    report = loop.run(SMALL, tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_json()))
    assert saved["config"]["stream"]["tasks"] == 5
    assert saved["config"]["seed"] == 0
    assert saved["environment"]["versions"]["torch"] == torch.__version__
    assert {"python", "platform", "git_commit", "threads"} <= set(saved["environment"])
    assert [len(row) for row in saved["matrix"]] == [2, 3, 4, 5, 5]
    assert saved["metrics"]["last"] == report.metrics.last  # type: ignore[union-attr]
    assert saved["memory"][-1]["used_bytes"] <= 6_000
    assert all("learn" in seconds for seconds in saved["seconds"])
    for name in ("accuracy.png", "matrix.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert picture.width > 300


@pytest.mark.slow
def test_replay_beats_chance_and_no_replay(tmp_path: Path) -> None:
    longer = replace(SMALL, options={**SMALL.options, "epochs": 25, "eta": 8.0, "batch_size": 16})
    with_replay = run(longer, tmp_path / "replay")
    without = run(replace(longer, memory=MemoryConfig(kind="none")), tmp_path / "none")
    assert with_replay.metrics is not None
    assert without.metrics is not None
    assert with_replay.metrics.last > max(0.3, without.metrics.last)


@pytest.mark.parametrize(
    "method", ["finetune", "lucir", *(pytest.param(name, marks=pytest.mark.slow) for name in ("joint", "gem"))]
)
@pytest.mark.parametrize("scenario", ["class-incremental", pytest.param("task-incremental", marks=pytest.mark.slow)])
def test_every_method_runs_and_two_runs_with_one_seed_are_equal(tmp_path: Path, method: str, scenario: Any) -> None:
    config = replace(
        SMALL,
        method=method,
        options={"epochs": 2},
        stream=replace(SMALL.stream, scenario=scenario, tasks=2),
        network="conv" if method == "lucir" else "mlp",
    )
    first, second = (run(config, tmp_path / name) for name in ("first", "second"))
    assert results(first) == results(second)
    weights = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["learner"] for name in ("first", "second")
    ]
    assert identical(*weights)
    assert results(run(replace(config, seed=1), tmp_path / "third")) != results(first)


def test_joint_training_tells_the_classes_of_every_task_apart_where_the_task_is_given(tmp_path: Path) -> None:
    stream = replace(SMALL.stream, scenario="task-incremental")
    report = run(replace(SMALL, method="joint", options={}, stream=stream), tmp_path / "run")
    assert report.metrics is not None
    assert report.metrics.acc > 0.8  # 0.53 where all images compete over the columns of the last task


def identical(first: Any, second: Any) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(identical(first[key], second[key]) for key in first)
    return bool(first == second)


@pytest.mark.parametrize("scenario", ["permuted", "rotated", "task-incremental"])
def test_forward_transfer_is_measured_where_the_next_task_can_be_scored(tmp_path: Path, scenario: Any) -> None:
    stream = replace(SMALL.stream, scenario=scenario, tasks=2)
    report = run(replace(SMALL, method="gem", options={}, stream=stream), tmp_path / "run")
    assert report.metrics is not None
    assert report.metrics.fwt is not None
    assert len(report.at_random) == 2


class Stopped(BaseException):
    """What a test raises out of the middle of a run; a BaseException, as a kill would not be caught either."""


class StopAt(loop.Silent):
    """Raises when a phase of a task begins."""

    def __init__(self, task: int, phase: str) -> None:
        self.target, self.current = (task, phase), -1

    def task(self, task: Any, stream: Any) -> None:
        self.current = task.index

    def phase(self, name: str, done: int, total: int, *, note: str = "") -> None:
        if (self.current, name) == self.target:
            raise Stopped


def with_kind(kind: Any) -> RunConfig:
    """With a memory of a kind at quality 60; `selected` are strips that choose theirs."""
    is_selected = kind == "selected"
    memory = MemoryConfig(
        kind="strips" if is_selected else kind, budget_bytes=6_000, quality=None if is_selected else 60, block=4
    )
    return replace(SMALL, memory=memory)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an uninterrupted run with each kind of memory, made when first asked for."""
    folder = tmp_path_factory.mktemp("whole")

    def of(kind: str) -> Path:
        if not (folder / kind).exists():
            run(with_kind(kind), folder / kind)
        return folder / kind

    return of


@pytest.mark.parametrize(
    ("kind", "task", "phase"),
    [
        pytest.param("raw", 0, "learn", marks=pytest.mark.slow),
        pytest.param("raw", 1, "learn", marks=pytest.mark.slow),
        pytest.param("raw", 2, "evaluate", marks=pytest.mark.slow),
        pytest.param("raw", 4, "evaluate", marks=pytest.mark.slow),
        pytest.param("files", 1, "balance", marks=pytest.mark.slow),
        pytest.param("strips", 1, "balance", marks=pytest.mark.slow),
        ("selected", 1, "learn"),
        pytest.param("selected", 3, "balance", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_anywhere_ends_as_if_it_had_not_been(
    tmp_path: Path, whole: Callable[[str], Path], kind: str, task: int, phase: str
) -> None:
    folder = tmp_path / "stopped"
    with pytest.raises(Stopped):
        run(with_kind(kind), folder, watch=StopAt(task, phase))
    resumed = run(with_kind(kind), folder, resume=True)
    assert results(resumed) == results(json.loads((whole(kind) / "report.json").read_text()))
    states = [torch.load(path / "checkpoint.pt", weights_only=True) for path in (whole(kind), folder)]
    assert identical(states[0]["learner"], states[1]["learner"])
    assert identical(states[0]["memory"], states[1]["memory"])


class StopAfter(loop.Silent):
    """Raises once so many steps of a task's phase are done; notes which step it was told of first."""

    def __init__(self, task: int, phase: str, steps: int | None) -> None:
        self.target, self.steps, self.current = (task, phase), steps, -1
        self.first: int | None = None

    def task(self, task: Any, stream: Any) -> None:
        self.current = task.visit

    def phase(self, name: str, done: int, total: int, *, note: str = "") -> None:
        if (self.current, name) == self.target:
            self.first = self.first or done
            if done == self.steps:
                raise Stopped


IN_EPOCHS: dict[str, dict[str, Any]] = {
    "finetune": {"epochs": 4, "padding": 1},
    "gem": {"epochs": 4, "replay_batch": 8},
    "lucir": SMALL.options,  # type: ignore[dict-item]
    "er": {"epochs": 4, "fill": "online", "slots": 40, "flush": 8},
    "derpp": {"epochs": 4, "fill": "online", "slots": 40, "flush": 8},
    "icarl": {"epochs": 4},
    "lwf": {"epochs": 4},
    "wa": {"epochs": 4},
}


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=() if name == "derpp" else pytest.mark.slow) for name in IN_EPOCHS],
)
def test_a_run_that_is_stopped_between_two_epochs_goes_on_with_the_next(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SHOW_EVERY_S", 0.0)
    config = replace(
        SMALL,
        method=method,
        options=IN_EPOCHS[method],
        stream=replace(SMALL.stream, tasks=2),
        memory=MemoryConfig(kind="strips", budget_bytes=12_000, quality=60),
        runtime=RuntimeConfig(checkpoint_s=0),
    )
    stop = StopAfter(1, "learn", None)
    whole = run(config, tmp_path / "whole", watch=stop)
    steps = -(-100 // config.options.get("batch_size", methods.config_class(method)().batch_size)) * 2 + 1
    with pytest.raises(Stopped):
        run(config, tmp_path / "stopped", watch=StopAfter(1, "learn", steps))
    resumed = StopAfter(1, "learn", None)
    assert results(run(config, tmp_path / "stopped", resume=True, watch=resumed)) == results(whole)
    assert stop.first == 1
    assert resumed.first is not None
    assert 1 < resumed.first <= steps
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "stopped")]
    assert identical(states[0]["learner"], states[1]["learner"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lucir", "er"])
def test_two_processes_go_on_as_if_nothing_had_been(tmp_path: Path, method: str) -> None:
    config = replace(
        SMALL,
        method=method,
        options={**IN_EPOCHS[method], "batch_size": 16},
        stream=replace(SMALL.stream, tasks=2),
        runtime=RuntimeConfig(processes=2, checkpoint_s=0),
        memory=MemoryConfig(kind="strips", budget_bytes=12_000, quality=60),
    )
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(config, tmp_path / "stopped", watch=StopAt(1, "learn"))
    assert results(run(config, tmp_path / "stopped", resume=True)) == results(whole)
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "stopped")]
    assert identical(states[0]["learner"], states[1]["learner"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"epochs": 2}, {"epochs": 2, "fill": "online", "slots": 30, "flush": 10}])
def test_two_processes_share_a_buffer_of_a_service(
    service: ServiceProcess, tmp_path: Path, options: dict[str, Any]
) -> None:
    """What one process ends with, up to the order of sums; written and drawn alike."""
    config = replace(
        SMALL,
        method="er",
        options=options,
        stream=replace(SMALL.stream, tasks=2),
        memory=MemoryConfig(kind="service", url=service.url, quality=60, budget_bytes=12_000, ranking="random"),
    )
    one = run(config, tmp_path / "one")
    two = run(replace(config, runtime=RuntimeConfig(processes=2)), tmp_path / "two")
    for mine, theirs in zip(one.memory, two.memory, strict=True):
        assert (mine["tasks"], mine["used_bytes"]) == (theirs["tasks"], theirs["used_bytes"])
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two")]
    for name, value in states[0]["learner"]["model"].items():
        torch.testing.assert_close(states[1]["learner"]["model"][name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_what_one_of_several_processes_cannot_do_is_said_once(tmp_path: Path) -> None:
    config = replace(SMALL, options={"epochs": 1, "batch_size": 3, "replay_ratio": 0.9})
    config = replace(config, runtime=RuntimeConfig(processes=2), data="no-such-folder/")
    with pytest.raises(NotFound, match="no-such-folder"):
        run(replace(config, data=str(tmp_path / "no-such-folder")), tmp_path / "run")


def start(url: str, folder: Path) -> subprocess.Popen[bytes]:
    """The command line that makes the configuration `remote`."""
    options = "--data digits --tasks 5 --train-per-class 30 --network mlp --epochs 6 --budget 5000 --quality 60"
    command = [sys.executable, "-m", "engram_trainer", *options.split(), "--threads", "1"]
    command += ["--url", url, "--out", str(folder), *(["--resume"] if folder.exists() else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "client", ROOT / "trainer")))}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def remote(url: str) -> RunConfig:
    return RunConfig(
        data="digits",
        stream=StreamConfig(tasks=5, train_per_class=30),
        options={"epochs": 6},
        network="mlp",
        memory=MemoryConfig(budget_bytes=5_000, quality=60, url=url),
    )


@pytest.mark.slow
def test_a_process_killed_with_the_service_as_its_memory_goes_on_as_if_it_had_not_been(
    service: ServiceProcess, tmp_path: Path
) -> None:
    """kill -9 in the middle of the first tasks and again later; the report equals that of a run left in peace."""
    config, killed = remote(service.url), tmp_path / "killed"
    checkpoint = killed / "checkpoint.pt"
    for pause_s in (0.02, 0.15):
        process = start(service.url, killed)
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        # Wait until it has got further than the last time, so that the kill falls into the work and not the imports.
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.005)
        time.sleep(pause_s)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output.decode()
    assert not (killed / "matrix.png").exists()
    resumed, whole = results(run(config, killed, resume=True)), results(run(config, tmp_path / "whole"))
    assert resumed == whole
    assert all(memory["used_bytes"] <= 5000 for memory in resumed["memory"])
    # One generation for each task, however often it was uploaded.
    assert resumed["memory"][-1]["generation"] == 5


@pytest.mark.slow
def test_the_service_chooses_by_the_trainers_own_extractor(service: ServiceProcess, tmp_path: Path) -> None:
    config = replace(
        SMALL,
        data="sample",
        network="conv",
        stream=StreamConfig(tasks=5, train_per_class=40, test_per_class=10),
        options={"epochs": 1},
        memory=MemoryConfig(kind="service", budget_bytes=30_000, url=service.url, block=8),
    )
    tasks = replace(config.stream, tasks=2)
    report = run(replace(config, stream=tasks), tmp_path / "run")
    decisions = report.memory[-1]["decisions"]
    assert set(decisions) == {"0", "1"}
    with Client(service.url) as client:
        digests = {client.extractor(decision["embedder"]).sha256 for decision in decisions.values()}
    assert len(digests) == 2  # another extractor for every task
    for decision in decisions.values():
        assert [candidate["quality"] for candidate in decision["candidates"]] == [10, 25, 50, 75, 90]


def test_a_new_run_refuses_the_folder_of_another_and_a_resumed_one_another_configuration(tmp_path: Path) -> None:
    short = replace(SMALL, stream=replace(SMALL.stream, tasks=2), options={"epochs": 1})
    run(short, tmp_path / "run")
    with pytest.raises(Conflict, match="already holds run"):
        run(short, tmp_path / "run")
    with pytest.raises(Conflict, match=r"options\.epochs: 1 before, 2 now"):
        run(replace(short, options={"epochs": 2}), tmp_path / "run", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(Conflict, match="other files"):
        run(short, tmp_path / "mine")


def test_a_damaged_checkpoint_is_named_and_a_damaged_part_of_one_is_learned_again(tmp_path: Path) -> None:
    short = replace(SMALL, stream=replace(SMALL.stream, tasks=2), options={"epochs": 2})
    short = replace(short, runtime=RuntimeConfig(checkpoint_s=0))
    whole = run(short, tmp_path / "whole")
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        run(short, folder, watch=StopAt(1, "balance"))
    (folder / "partial.pt").write_bytes(b"PK cut off")
    assert results(run(short, folder, resume=True)) == results(whole)
    checkpoint = folder / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(Conflict, match=r"checkpoint\.pt is damaged"):
        run(short, folder, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": float("nan")}, "the loss is not finite"),
        ({"padding": -1}, "padding must be at least 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
    ],
)
def test_settings_that_cannot_be_learned_with_are_said_in_one_sentence(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FloatingPointError), match=message):
        run(replace(SMALL, method="finetune", options={"epochs": 2, **options}), tmp_path / "run")


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(tmp_path: Path) -> None:
    short = replace(SMALL, stream=replace(SMALL.stream, tasks=2), options={"epochs": 1})
    first = run(short, tmp_path / "run")
    again = run(short, tmp_path / "run", resume=True)
    assert again.to_json() == first.to_json()


def test_a_run_killed_after_its_last_checkpoint_has_its_report_once_it_is_resumed(tmp_path: Path) -> None:
    short = replace(SMALL, stream=replace(SMALL.stream, tasks=2), options={"epochs": 1})
    run(short, tmp_path / "run")
    written = (tmp_path / "run" / "report.json").read_text()
    (tmp_path / "run" / "report.json").unlink()
    run(short, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "report.json").read_text() == written


def of_service(url: str) -> MemoryConfig:
    """Ranked at random: what is ranked by features takes an extractor and a process that runs it."""
    return MemoryConfig(kind="service", url=url, quality=50, budget_bytes=20_000, ranking="random")


def test_a_new_run_refuses_a_buffer_that_holds_another_ones_exemplars(service: ServiceProcess, tmp_path: Path) -> None:
    memory = replace(of_service(service.url), buffer="taken")
    short = replace(SMALL, stream=replace(SMALL.stream, tasks=1), options={"epochs": 1}, memory=memory)
    run(short, tmp_path / "first")
    with pytest.raises(Conflict, match="already holds 1 tasks"):
        run(short, tmp_path / "second")


def test_without_a_service_the_run_says_so_before_it_trains_and_can_be_started_again(
    service: ServiceProcess, tmp_path: Path
) -> None:
    config = replace(SMALL, stream=replace(SMALL.stream, tasks=1), options={"epochs": 1})
    memory = of_service("http://127.0.0.1:9")
    with pytest.raises(Unavailable):
        run(replace(config, memory=memory), tmp_path / "run")
    # The service is there now, under an address of its own: nothing was learned, so there is nothing to resume.
    report = run(replace(config, memory=replace(memory, url=service.url)), tmp_path / "run")
    assert len(report.matrix) == 1
    with pytest.raises(Conflict, match="already holds run"):
        run(replace(config, memory=replace(memory, url=service.url)), tmp_path / "run")
    moved = replace(memory, url=service.url.replace("127.0.0.1", "localhost"))
    assert run(replace(config, memory=moved), tmp_path / "run", resume=True).run == report.run


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"there is no run to resume in .*leave out --resume"):
        run(SMALL, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("buffer", [None, pytest.param("of-a-run-that-failed", marks=pytest.mark.slow)])
def test_a_run_that_failed_leaves_no_buffer_and_its_folder_takes_the_corrected_command(
    service: ServiceProcess, tmp_path: Path, buffer: str | None
) -> None:
    memory = replace(of_service(service.url), buffer=buffer, budget_bytes=20)
    small = replace(SMALL, stream=replace(SMALL.stream, tasks=1), options={"epochs": 1}, memory=memory)
    right = replace(small, memory=replace(memory, budget_bytes=20_000))
    with Client(service.url) as client:
        before = client.buffers()
        with pytest.raises(BudgetExceeded):
            run(small, tmp_path / "run")
        assert client.buffers() == before
        with pytest.raises(Conflict, match="without --resume it is started anew"):
            run(right, tmp_path / "run", resume=True)
        report = run(right, tmp_path / "run")
        assert len(report.matrix) == 1
        assert client.buffer(buffer or f"run-{report.run}").exemplars > 0
    with pytest.raises(Conflict, match="already holds run"):
        run(small, tmp_path / "run")


@pytest.mark.slow
def test_a_buffer_that_was_there_before_a_run_stays_when_it_fails(service: ServiceProcess, tmp_path: Path) -> None:
    memory = replace(of_service(service.url), buffer="made-by-hand", budget_bytes=20)
    with Client(service.url) as client:
        made = client.create_buffer("made-by-hand", budget_bytes=20, quality=50)
        with pytest.raises(BudgetExceeded):
            run(replace(SMALL, options={"epochs": 1}, memory=memory), tmp_path / "run")
        assert client.buffer("made-by-hand") == made


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device 'warp:0' cannot be used"):
        run(replace(SMALL, runtime=RuntimeConfig("warp:0")), tmp_path / "run")
