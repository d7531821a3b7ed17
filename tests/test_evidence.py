"""The page of evidence says what the kept results say, and so do its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kept
import pytest
from PIL import Image

from docs import evidence
from tests.bench.test_criterion import ACCURATE, BLUR, budget_result


def test_the_numbers_of_the_page_are_those_of_the_kept_results() -> None:
    text = evidence.PAGE.read_text(encoding="utf-8")
    assert evidence.render(text) == text, "run: make evidence"


@pytest.mark.parametrize("name", evidence.PICTURES)
def test_a_picture_is_of_the_kept_results(name: str) -> None:
    with Image.open(evidence.IMAGES / name) as picture:
        shown = picture.info.get("Description")
    assert shown == evidence.PICTURES[name].digest, "run: make evidence"
    assert f"images/{name}" in evidence.PAGE.read_text(encoding="utf-8")


def test_every_table_and_no_other_is_on_the_page() -> None:
    text = evidence.PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- table: {name} -->" in text for name in evidence.TABLES)
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(evidence.TABLES)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two seeds of which one is complete, and nothing else."""
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    number = 0
    for seed in (10, 11):
        arms: list[tuple[str, int | None, float]] = [("strips", quality, ACCURATE[quality]) for quality in (25, 50, 75)]
        arms += [("strips", None, 49.5), ("raw", None, 30.0), ("files", None, 41.0)]
        arms += [("lossless", None, 34.0)] if seed == 10 else []
        for kind, quality, last in arms:
            result = budget_result(quality, seed, last, exemplars=800, gaps=[BLUR], selection_seconds=1.0)
            result["config"]["arm"]["kind"] = kind
            path = tmp_path / "budget" / "cifar10" / f"seed-{seed}" / f"{number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result))
            number += 1
    for cached in (evidence.tried, evidence._budget):
        cached.cache_clear()
    yield
    for cached in (evidence.tried, evidence._budget):
        cached.cache_clear()


def test_only_complete_seeds_count_and_the_others_are_said_to_be_missing(results: None) -> None:
    assert "| CIFAR-10, 16,000 | 1 | 49.5 | 19.5 | 15.5 | 0.5 |" in evidence.gains()
    assert "| Fashion-MNIST, 4,000 | none yet |" in evidence.gains()
    assert "CIFAR-10 at 16,000 bytes: seeds 11, 12, 13, 14" in evidence.missing()
    # Of one seed there is no interval, so nothing is shown.
    assert "19.5 points gained: not shown to be worth it" in evidence.worth()


@pytest.mark.slow
def test_pictures_are_drawn_of_what_there_is(results: None, tmp_path: Path) -> None:
    assert evidence.PICTURES["evidence-gain.png"].data()[0][0] == "CIFAR-10\n16,000 bytes"
    for name, picture in evidence.PICTURES.items():
        assert picture.data()
        picture.save(tmp_path / name)
