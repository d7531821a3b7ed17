"""`engram-train compare`: runs side by side, each of them once, and one report with intervals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from engram_trainer import compare
from engram_trainer.cli import app
from engram_trainer.compare import Cell, cells, markdown, summarize, write
from engram_trainer.configuration import MemoryConfig, RunConfig
from tests.servers import ServiceProcess, eventually

TINY = [
    *("--data", "digits", "--tasks", "2", "--train-per-class", "10", "--test-per-class", "5"),
    *("--network", "mlp", "--epochs", "1", "--threads", "1"),
]


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments], env={"COLUMNS": "160", "TERM": "dumb"})


def fake_run(folder: Path, cell: Cell, seed: int, last: float) -> compare.Run:
    """A finished run of two tasks with these results."""
    folder = folder / f"{cell.name}-{seed}"
    folder.mkdir(parents=True)
    metrics = {"average_incremental": last + 0.1, "last": last, "bwt": -0.1, "forgetting": None}
    report = {
        "tasks": [{}, {}],
        "matrix": [[0.9], [0.8, 0.7]],
        "metrics": {**metrics, "incremental": [last + 0.2, last]},
        "memory": [{"exemplars": 10, "used_bytes": 100}, {"exemplars": 20 + seed, "used_bytes": 200}],
        "seconds": [{"learn": 1.0, "replay_wait": 0.5}, {"learn": 2.0}],
    }
    (folder / "report.json").write_text(json.dumps(report))
    return compare.Run(cell, seed, RunConfig(memory=MemoryConfig(kind=cell.memory)), folder)


def results(folder: Path) -> Any:
    return json.loads((folder / "compare.json").read_text())


def test_every_method_is_run_with_every_memory_and_budget_and_those_without_memory_once() -> None:
    assert [cell.name for cell in cells(["gem", "finetune"], ["raw", "strips"], [1000, 2000])] == [
        "gem-raw-1000",
        "gem-raw-2000",
        "gem-strips-1000",
        "gem-strips-2000",
        "finetune",
    ]
    assert [cell.name for cell in cells(["gem"], ["none", "raw"], [1000, 2000])] == [
        "gem",
        "gem-raw-1000",
        "gem-raw-2000",
    ]


def test_intervals_and_paired_differences_are_those_done_by_hand(tmp_path: Path) -> None:
    from scipy import stats  # a second of a core

    first, second = Cell("lucir", "raw", 1000), Cell("gem", "raw", 1000)
    ours, theirs = [0.5, 0.6, 0.7], [0.4, 0.55, 0.7]
    runs = [fake_run(tmp_path, first, seed, last) for seed, last in enumerate(ours)]
    runs += [fake_run(tmp_path, second, seed, last) for seed, last in enumerate(theirs)]
    one, other = summarize(runs)["rows"]
    # t of 97.5 % with two degrees of freedom is 4.3027; the deviation of 0.5, 0.6, 0.7 is 0.1.
    assert one["measures"]["last"]["mean"] == pytest.approx(0.6)
    assert one["measures"]["last"]["half_width"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    differences = np.subtract(theirs, ours)
    interval = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert other["difference"]["last"]["mean"] == pytest.approx(-0.05)
    assert other["difference"]["last"]["half_width"] == pytest.approx((interval[1] - interval[0]) / 2)
    assert one["difference"]["last"]["half_width"] == pytest.approx(0, abs=1e-12)
    assert one["measures"]["forgetting"] is None
    assert [point["mean"] for point in one["curve"]] == pytest.approx([0.8, 0.6])
    assert (one["exemplars"], one["used_bytes"], one["seconds"]) == (21, 200, 3)


def test_one_seed_has_no_interval_and_a_row_without_shared_seeds_no_difference(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path, Cell("lucir", "raw", 9), 0, 0.5), fake_run(tmp_path, Cell("gem", "raw", 9), 1, 0.4)]
    one, other = summarize(runs)["rows"]
    assert one["measures"]["last"] == {"mean": 0.5, "half_width": None, "count": 1}
    assert other["difference"] == {"average_incremental": None, "last": None}


def test_the_report_is_a_table_and_a_picture(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path, Cell("lucir", "raw", 9), seed, 0.5 + 0.1 * seed) for seed in (0, 1)]
    runs.append(fake_run(tmp_path, Cell("gem", "raw", 9), 0, 0.4))
    write(summarize(runs), tmp_path, title="digits", failed={"gem-raw-9-1": "it ran out of luck"})
    text = (tmp_path / "compare.md").read_text()
    assert "# digits" in text
    assert "| lucir-raw-9 | 2 | 65.0 ± 63.5 | 55.0 ± 63.5 | -10.0 ± 0.0 | - |  |  | 20 | 200 | 3.0 |" in text
    assert "| gem-raw-9 | 1 | 50.0 | 40.0 | -10.0 | - | -10.0 | -10.0 | 20 | 200 | 3.0 |" in text
    assert "- gem-raw-9-1: it ran out of luck" in text
    assert results(tmp_path)["failed"] == {"gem-raw-9-1": "it ran out of luck"}
    with Image.open(tmp_path / "compare.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24) or []) > 10


def test_a_comparison_without_a_finished_run_says_only_what_failed(tmp_path: Path) -> None:
    write(summarize([]), tmp_path, title="none", failed={"a": "no"})
    assert markdown(results(tmp_path)).split() == ["#", "none", "Failed:", "-", "a:", "no"]
    assert not (tmp_path / "compare.png").exists()


@pytest.mark.slow
def test_runs_are_compared_and_are_not_run_again(tmp_path: Path) -> None:
    arguments = ["--methods", "gem,finetune", "--memories", "raw", "--budgets", "2000", "--seeds", "0,1", "--jobs", "2"]
    arguments += ["--out", str(tmp_path / "out"), *TINY]
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    assert "4/4" in result.output
    rows = {row["row"]: row for row in results(tmp_path / "out")["rows"]}
    assert list(rows) == ["gem-raw-2000", "finetune"]
    assert rows["gem-raw-2000"]["seeds"] == [0, 1]
    report = tmp_path / "out" / "gem-raw-2000-1" / "report.json"
    found = json.loads(report.read_text())
    assert (found["config"]["seed"], found["config"]["memory"]["budget_bytes"]) == (1, 2000)
    assert rows["gem-raw-2000"]["runs"]["1"] == found["metrics"]
    before = report.stat().st_mtime_ns
    more = command(*arguments, "--seeds", "0,1,2")  # the last one counts
    assert more.exit_code == 0, more.output
    assert report.stat().st_mtime_ns == before
    assert results(tmp_path / "out")["rows"][0]["seeds"] == [0, 1, 2]


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others_and_its_sentence(tmp_path: Path) -> None:
    arguments = ["--methods", "gem", "--memories", "raw", "--budgets", "20,2000", "--seeds", "0"]
    result = command(*arguments, "--out", str(tmp_path / "out"), *TINY)
    assert result.exit_code == 1
    assert "1 of 2 runs failed" in result.output
    assert "bytes of a budget of 20" in result.output
    assert [row["row"] for row in results(tmp_path / "out")["rows"]] == ["gem-raw-2000"]
    assert "bytes of a budget of 20" in (tmp_path / "out" / "compare.md").read_text()
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "method 'magic' is not one of finetune"),
        (["--methods", "gem", "--memories", "paper"], "memory kind 'paper' is not one of service"),
        (["--methods", "gem", "--seeds", "0,one"], "a seed is a whole number, not 'one'"),
        (["--methods", "gem", "--seeds", "1,1"], "a seed is given twice: 1, 1"),
        (["--methods", "gem", "--budgets", "much"], "'much' is not an amount of bytes"),
        (["--methods", "gem", "--tasks", "many"], "Invalid value for '--tasks'"),
        (["--methods", "gem", "--magic", "1"], "No such option: --magic"),
        (["--methods", "gem", "--resume"], "--resume is not for a comparison"),
        (["--methods", "gem", "--recipe", "x"], "--recipe is not for a comparison"),
        (["--methods", "gem", "--buffer", "x"], "--buffer is not for a comparison"),
        (["--methods", "gem", "--method", "er"], "--method is not for a comparison: give --methods"),
        (["--methods", "gem", "--memory=raw"], "--memory is not for a comparison: give --memories"),
        (["--methods", "gem", "--budget", "4000"], "--budget is not for a comparison: give --budgets"),
        (["--methods", "gem", "--seed", "3"], "--seed is not for a comparison: give --seeds"),
        (["--methods", "gem,lucir", "--set", "gamma=1"], "method lucir has no setting 'gamma'"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = command("--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_with_another_run_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    arguments = ["--methods", "finetune", "--seeds", "0", "--out", str(tmp_path / "out")]
    assert command(*arguments, *TINY).exit_code == 0
    other = command(*arguments, *TINY, "--epochs", "2")
    assert other.exit_code == 1
    assert "holds a run with another configuration (options.epochs: 1 before, 2 now)" in other.output


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    arguments = ["--methods", "gem,lucir", "--memories", "raw", "--budgets", "3000", "--seeds", "0", *TINY]
    program = [sys.executable, "-m", "engram_trainer", "compare", *arguments, "--epochs", "8"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*program, "--out", str(whole)], check=True, capture_output=True)
    process = subprocess.Popen([*program, "--out", str(cut)], start_new_session=True, stdout=subprocess.DEVNULL)
    eventually((cut / "gem-raw-3000-0" / "checkpoint.pt").is_file)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (cut / "compare.json").exists()
    subprocess.run([*program, "--out", str(cut)], check=True, capture_output=True)
    for name in ("gem-raw-3000-0", "lucir-raw-3000-0"):
        one, other = (json.loads((folder / name / "report.json").read_text())["matrix"] for folder in (whole, cut))
        assert one == other


@pytest.mark.slow
def test_an_interrupted_comparison_ends_its_runs(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "engram_trainer", "compare", "--methods", "lucir", "--memories", "none"]
    program += ["--seeds", "0,1,2", "--out", str(tmp_path / "out"), *TINY, "--epochs", "3000"]
    process = subprocess.Popen(
        program,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have it ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert eventually((tmp_path / "out" / "lucir-0" / "run.json").is_file)
    process.send_signal(signal.SIGINT)  # to it alone: its runs hear of it from it
    started = time.monotonic()
    _, said = process.communicate()
    assert process.returncode == 130
    assert "interrupted; the same command goes on" in said
    assert time.monotonic() - started < 60
    assert not (tmp_path / "out" / "lucir-1").exists()


@pytest.mark.slow
def test_runs_with_a_service_have_a_buffer_each(tmp_path: Path, service: ServiceProcess) -> None:
    arguments = ["--methods", "gem", "--memories", "service,raw", "--budgets", "3000", "--seeds", "0,1"]
    result = command(*arguments, "--out", str(tmp_path / "out"), *TINY, "--url", service.url)
    assert result.exit_code == 0, result.output
    rows = {row["row"]: row for row in results(tmp_path / "out")["rows"]}
    assert rows["gem-service-3000"]["exemplars"] > rows["gem-raw-3000"]["exemplars"]
