"""Spooled uploads: checked once from end to end, cancelled in the middle, read again and again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engram import tar
from engram_service.settings import Settings
from engram_service.spooled import SpooledImages
from tests.contents import pictures
from tests.uploads import encoded, pairs, tar_of


class Cancelled(Exception):
    """What a report raises once the ingest is cancelled."""


def spooled(folder: Path, body: bytes, report: Callable[[int], None] = lambda images: None) -> SpooledImages:
    path = folder / "upload.tar"
    path.write_bytes(body)
    return SpooledImages(path, Settings(data_dir=folder), report)


def test_an_upload_without_images_is_cancelled_in_the_middle(tmp_path: Path) -> None:
    body = b"".join(tar.entry(f"{number}.py", b"") for number in range(5000)) + tar.END
    reports: list[int] = []

    def report(images: int) -> None:
        reports.append(images)
        raise Cancelled

    with pytest.raises(Cancelled):
        spooled(tmp_path, body, report)
    assert reports == [0]


def test_images_that_are_read_again_are_not_decoded_again(tmp_path: Path) -> None:
    sent = pictures(0, 5)
    body = tar_of(pairs(("png", encoded(image), 0) for image in sent))
    with spooled(tmp_path, body) as images:
        assert np.array_equal(images.read([3, 1]), sent[[3, 1]])
        # Whoever decoded again would find these zeros.
        (tmp_path / "upload.tar").write_bytes(bytes(len(body)))
        assert np.array_equal(images.read([1, 3, 1]), sent[[1, 3, 1]])


def test_decoded_images_are_kept_up_to_a_bound_the_last_used_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = pictures(0, 4)
    monkeypatch.setattr("engram_service.spooled.DECODED_BYTES", 2 * sent[0].nbytes)
    body = tar_of(pairs(("png", encoded(image), 0) for image in sent))
    with spooled(tmp_path, body) as images:
        for numbers in ([0, 1], [0], [2, 0, 3], [2], [1]):
            assert np.array_equal(images.read(numbers), sent[numbers])
        os.truncate(tmp_path / "upload.tar", 0)
        assert np.array_equal(images.read([2, 1]), sent[[2, 1]])
        with pytest.raises(Exception, match="not a readable"):
            images.read([0])
