"""`engram-train` and the demo as people run them."""

from __future__ import annotations

import io
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from engram_trainer import demo
from engram_trainer.arguments import parse_options, parse_quality
from engram_trainer.cli import app
from engram_trainer.datasets import load
from engram_trainer.methods import METHODS
from engram_trainer.progress import Bars
from engram_trainer.report import Report
from engram_trainer.scalars import Scalars
from engram_trainer.stream import StreamConfig, build

TINY = ["--data", "digits", "--tasks", "2", "--train-per-class", "10", "--test-per-class", "5", "--network", "mlp"]


def train(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "100", "TERM": "dumb"})


def test_the_help_groups_its_options_and_names_the_choices() -> None:
    result = train("--help")
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    for words in (
        "Recipe",
        "Stream",
        "Method",
        "Memory",
        "Selection (service and strips)",
        "Runtime",
        "Run",
        "Commands",
    ):
        assert f"─ {words} ─" in text
    assert "engram-service serve" in text
    assert all(command in text for command in ("compare", "recipes"))
    for option in ("--method", "--data", "--scenario", "--tasks", "--base-classes", "--epochs", "--seed", "--url"):
        assert option in text
    for option in ("--buffer", "--budget", "--per", "--quality", "--memory", "--device", "--out", "--resume"):
        assert option in text
    assert all(method in text for method in METHODS)


def test_a_run_prints_a_line_for_each_task_and_its_measures(tmp_path: Path) -> None:
    result = train(*TINY, "--memory", "raw", "--budget", "2000", "--epochs", "2", "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert "task 1/2: accuracy so far" in result.output
    assert "task 2/2: accuracy so far" in result.output
    assert "average incremental accuracy" in result.output
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    assert found["config"]["options"] == {"epochs": 2}


def test_strips_choose_their_quality_without_a_service(tmp_path: Path) -> None:
    """The budget holds the first task at 90, but not both: then the quality is chosen."""
    run = [*TINY, "--train-per-class", "40", "--epochs", "1", "--out", str(tmp_path / "run")]
    result = train(*run, "--memory", "strips", "--quality", "auto", "--budget", "16000", "--block", "8")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    first, second = found["memory"]
    assert first["quality"] == 90
    assert first["exemplars"] == 200
    assert second["quality"] in (10, 25, 50, 75, 90)
    assert 200 < second["exemplars"] <= 400
    assert second["used_bytes"] <= 16000
    assert "Traceback" not in result.output


def test_tasks_return_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    run = [*TINY, "--memory", "none", "--method", "finetune", "--epochs", "1", "--visits", "0,1,0"]
    result = train(*run, "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(found["matrix"]) == 3
    assert found["config"]["stream"]["visits"] == [0, 1, 0]


def test_train_is_what_the_command_does_without_a_name(tmp_path: Path) -> None:
    run = [*TINY, "--memory", "none", "--method", "finetune", "--epochs", "1"]
    assert train(*run, "--out", str(tmp_path / "one")).exit_code == 0
    assert train("train", *run, "--out", str(tmp_path / "other")).exit_code == 0
    one, other = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "other"))
    assert one["matrix"] == other["matrix"]
    assert one["config"] == other["config"]
    assert one["paper"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "5", "compare", "--methods", "gem"], "--tasks comes after 'compare', not before it"),
        (["--seed", "1", "recipes"], "--seed comes after 'recipes', not before it"),
        (["compaer"], "No such command 'compaer'"),
        (["compare"], "Missing option '--methods'"),
        (["--log", "paper"], "'paper' is not one of 'tensorboard', 'wandb'"),
        (["--precision", "8"], "'8' is not one of '32', 'bf16'"),
        (["--threads", "0"], "Invalid value for '--threads'"),
    ],
)
def test_a_slip_in_the_command_line_is_said_with_status_2(arguments: list[str], message: str) -> None:
    result = train(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("log", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_log_whose_package_is_missing_is_refused_before_the_run(tmp_path: Path, log: str, package: str) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    result = train(*TINY, "--memory", "none", "--method", "finetune", "--log", log, "--out", str(tmp_path / "run"))
    assert result.exit_code == 1
    assert f"--log {log} needs a package: pip install 'engram[log]'" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="pip install tensorboard to run this")
def test_tensorboard_gets_the_course_of_a_run(tmp_path: Path) -> None:
    run = [*TINY, "--memory", "none", "--method", "finetune", "--epochs", "1", "--out", str(tmp_path / "run")]
    result = train(*run, "--log", "tensorboard")
    assert result.exit_code == 0, result.output
    events = next((tmp_path / "run" / "tensorboard").iterdir()).read_bytes()
    assert all(name in events for name in (b"accuracy/so_far", b"accuracy/task_2", b"seconds/learn"))


def test_a_log_has_the_values_of_each_task() -> None:
    """Written to a list in place of a file."""
    points: list[tuple[str, float, int]] = []

    class Kept:
        def add(self, name: str, value: float, step: int) -> None:
            points.append((name, value, step))

        def close(self) -> None:
            points.append(("closed", 0, 0))

    tasks = [{"task": task, "classes": [task], "train_images": 1, "test_images": 1} for task in range(2)]
    report = Report("abc", {"stream": {}}, {}, tasks, [None, None], [[0.75, None], [0.5, 1.0]])
    report.memory, report.seconds = [{}, {"exemplars": 7, "used_bytes": 70}], [{}, {"learn": 2.0}]
    with Scalars(Kept()) as scalars:
        scalars.finished(report)
    assert points == [
        ("accuracy/so_far", 0.75, 2),
        ("accuracy/average_incremental", 0.75, 2),
        ("accuracy/task_1", 0.5, 2),
        ("accuracy/task_2", 1.0, 2),
        ("memory/exemplars", 7, 2),
        ("memory/used_bytes", 70, 2),
        ("seconds/learn", 2.0, 2),
        ("closed", 0, 0),
    ]


@pytest.mark.slow
def test_a_second_run_needs_another_folder_or_resume(tmp_path: Path) -> None:
    run = [*TINY, "--memory", "none", "--method", "finetune", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert train(*run).exit_code == 0
    again = train(*run)
    assert again.exit_code == 1
    assert "already holds run" in again.output
    assert train(*run, "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], "method 'magic' is not one of finetune, joint, gem"),
        (["--set", "gamma=1"], "method lucir has no setting 'gamma'; it has"),
        (["--set", "lr"], "--set takes NAME=VALUE, not 'lr'"),
        (["--set", "lr=fast"], "lr must be of type float, got 'fast'"),
        (["--set", "flip=maybe"], "flip is true or false, not 'maybe'"),
        (["--network", "transformer"], "network 'transformer' is not one of"),
        (["--memory", "files"], "memory kind 'files' needs a quality from 1 to 100"),
        (["--memory", "strips", "--quality", "101"], "quality must lie in 1..100, got 101"),
        (["--quality", "best"], "quality is 'auto' or a number from 1 to 100, not 'best'"),
        (["--memory", "raw", "--ranking", "ring"], "ranks by herding or random, not by 'ring'"),
        (["--budget", "0"], "the budget must be at least 1 byte, got 0"),
        (["--memory", "raw", "--budget", "50"], "bytes of a budget of 50"),
        (["--tasks", "3"], "10 classes do not split evenly into 3 tasks"),
        (["--tasks", "11"], "10 classes do not split evenly into 11 tasks"),
        (["--visits", "0,first"], "visits are numbers of tasks, as in 0,1,0, not '0,first'"),
        (["--visits", "0,2"], "there are 2 tasks"),
        (["--patience", "-1"], "patience_s must be at least 0, got -1"),
        (["--crop", "9"], "images of 8x8 pixels have no crop of 9x9"),
        (["--normalise", "cifar10"], "normalisation is for 3 channels, images have 1"),
        (["--workers", "-1"], "workers must be 0 or more, got -1"),
        (["--processes", "0"], "a run needs at least 1 process, got 0"),
        (["--data", "/nowhere"], "/nowhere is not there"),
        (["--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = train(*TINY, "--epochs", "1", "--out", str(tmp_path / "run"), *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("lucir", ["lr=0.5", "flip=false", "milestones=0.3,0.6"], {"lr": 0.5, "flip": False, "milestones": (0.3, 0.6)}),
        ("gem", ["gamma=none", "average=true"], {"gamma": None, "average": True}),
        ("gem", ["gamma=0.5", "replay_batch=64"], {"gamma": 0.5, "replay_batch": 64}),
    ],
)
def test_settings_take_the_types_of_the_methods_fields(
    method: str, settings: list[str], expected: dict[str, Any]
) -> None:
    found = parse_options(method, settings, epochs=3)
    assert found == {"epochs": 3, **expected}
    assert [type(value) for value in found.values()] == [int, *(type(value) for value in expected.values())]


def test_quality_is_a_number_or_left_to_selection() -> None:
    assert parse_quality("auto") is None
    assert parse_quality("75") == 75


@pytest.mark.slow
def test_the_demo_compares_three_memories_and_stops_its_service(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "demo"), "--epochs", "1", "--train-per-class", "30"]
    result = CliRunner().invoke(demo.app, arguments, env={"COLUMNS": "80", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    table = result.output.split("the same bytes, three memories")[1]
    assert all(name in table for name in demo.NAMES.values())
    assert max(len(line) for line in result.output.splitlines() if "quality" not in line) <= 81
    with Image.open(tmp_path / "demo" / "accuracy.png") as picture:
        assert picture.width > 500
    for kind in demo.NAMES:
        assert (tmp_path / "demo" / kind / "report.json").is_file()
    log = (tmp_path / "demo" / "server" / "service.log").read_text()
    assert "Traceback" not in log


def test_a_second_demo_goes_into_a_folder_of_its_own(tmp_path: Path) -> None:
    assert demo._free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert demo._free_folder(tmp_path / "demo") == tmp_path / "demo-3"


def test_on_a_terminal_a_bar_shows_the_phase_at_hand() -> None:
    stream = build(load("digits").first(train=4, test=2), StreamConfig(tasks=2))
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None, _environ={})
    with Bars(console, label="raw ") as bars:
        bars.task(stream.tasks[1], stream)
        bars.phase("learn", 1, 8, note="loss 0.500")
        bars.phase("learn", 8, 8, note="loss 0.250")
        bars.phase("remember", 3, 40, note="encoding")
        bars._progress.refresh()
    assert "raw task 2/2 storing" in screen.getvalue()
    assert "3/40" in screen.getvalue()
    assert "encoding" in screen.getvalue()
