"""What a run leaves for people: the report, its pictures, and where it came from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from engram_trainer import report as reports
from engram_trainer.report import Report, curves, environment, git_commit, plot, seconds_of


def example(matrix: list[list[float | None]]) -> Report:
    tasks = [{"task": task, "classes": [task], "train_images": 10, "test_images": 10 + task} for task in range(3)]
    config = {"method": "gem", "memory": {"kind": "raw"}, "stream": {"scenario": "permuted"}}
    return Report("abc", config, environment(), tasks, [0.1, 0.1, 0.1], matrix)


def test_a_report_is_plain_json_with_its_metrics(tmp_path: Path) -> None:
    report = example([[0.9, 0.2], [0.5, 0.8, 0.1]])
    report.save(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["matrix"] == [[0.9, 0.2], [0.5, 0.8, 0.1]]
    assert found["metrics"]["bwt"] == pytest.approx(-0.4)
    assert found["metrics"]["fwt"] == pytest.approx(0.1)


def test_a_report_of_a_recipe_has_the_papers_numbers_once_it_is_finished(tmp_path: Path) -> None:
    report = example([[0.9, 0.2], [0.5, 0.8, 0.1]])
    report.config["recipe"] = "gem-mnist-rotations"
    assert report.paper == []
    report.matrix.append([0.4, 0.7, 0.9])
    report.save(tmp_path)
    acc, bwt = json.loads((tmp_path / "report.json").read_text())["paper"]
    assert (acc["measure"], acc["value"], bwt["measure"], bwt["value"]) == ("acc", 0.86, "bwt", 0.05)
    assert acc["ours"] == pytest.approx(2 / 3)
    assert bwt["ours"] == pytest.approx((-0.5 - 0.1) / 2)
    assert "quoted" in acc["source"]


def test_waiting_for_exemplars_is_a_part_of_learning_and_not_counted_twice() -> None:
    assert seconds_of({"learn": 2.0, "replay_wait": 0.5, "evaluate": 1.0}) == 3.0


def test_a_report_without_a_finished_task_has_no_metrics_and_no_pictures(tmp_path: Path) -> None:
    report = example([])
    assert report.to_json()["metrics"] is None
    plot(report, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_pictures_of_an_unfinished_run_can_be_drawn(tmp_path: Path) -> None:
    plot(example([[0.9, None], [0.5, 0.8]]), tmp_path)
    for name in ("accuracy.png", "matrix.png"):
        with Image.open(tmp_path / name) as picture:
            # More than one colour: something was drawn.
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24) or []) > 10


def test_curves_of_different_lengths_share_one_picture(tmp_path: Path) -> None:
    curves({"a": [0.9, 0.5, 0.4], "b": [0.9]}, tmp_path / "curves.png", ylabel="accuracy", title="two")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (768, 480)


def test_a_band_is_drawn_around_a_curve(tmp_path: Path) -> None:
    for name, widths in (("plain", None), ("band", {"a": [0.1, 0.2]})):
        curves({"a": [0.9, 0.5]}, tmp_path / f"{name}.png", ylabel="accuracy", half_widths=widths)
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "band.png").read_bytes()


def test_the_environment_names_versions_and_platform() -> None:
    found = environment()
    assert {"numpy", "torch", "pillow"} <= set(found["versions"])
    assert found["threads"] >= 1
    json.dumps(found)


def test_the_commit_is_this_checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert (git_commit() or "").rstrip("+") == head.stdout.strip()
    # Installed outside of any checkout, there is none to name.
    copy = tmp_path / "report.py"
    copy.write_text("")
    monkeypatch.setattr(reports, "__file__", str(copy))
    assert git_commit() is None
