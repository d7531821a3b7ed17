"""Images that are shown as JPEG gives them back: which ones, when, and that a memory never gets them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engram import strip
from engram.fields import KEY
from engram_trainer import datasets, stream
from engram_trainer.datasets import Dataset
from engram_trainer.examples import ArraySet, Mapped
from engram_trainer.local_memory import Kind, LocalConfig, LocalMemory
from engram_trainer.methods import codec
from engram_trainer.methods.codec import Coded, Coding
from engram_trainer.plain_memory import local_memory
from engram_trainer.stream import Stream, StreamConfig
from tests.trainer.runs import learner_of, quiet, same


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return datasets.load("digits")


@pytest.fixture(scope="module")
def tasks(digits: Dataset) -> Stream:
    return stream.build(digits, StreamConfig(tasks=5, train_per_class=20))


def memory_of(kind: Kind, **fields: str) -> LocalMemory:
    return local_memory(LocalConfig(kind, 10**6, share_by="none", ranking="random", quality=50, fields=fields))


def coded(images: np.ndarray, quality: int) -> np.ndarray:
    return strip.encode(images, np.zeros(len(images), np.int64), quality=quality).decode()


def test_coded_images_are_those_of_an_engram_pack_at_their_quality(digits: Dataset) -> None:
    images = digits.train.read()[:30]
    quality_N = np.resize([10, 90], 30)
    rows = np.random.default_rng(0).permutation(30)[:20]
    for row, image in zip(rows, Coded(ArraySet(images), quality_N).read(rows), strict=True):
        assert np.array_equal(image, coded(images[row : row + 1], int(quality_N[row]))[0])


def test_an_epoch_has_each_image_once_some_of_them_coded(tasks: Stream) -> None:
    task = tasks.tasks[0]
    examples, order = Coding(codec_ratio=0.25, codec_qualities=(30,)).shown(task, memory_of("strips"), seed=3)
    assert order is not None
    epochs = [order(np.random.default_rng([0, epoch])) for epoch in range(40)]
    for rows in epochs:
        assert sorted(rows % len(task.train)) == list(range(len(task.train)))
        assert np.array_equal(examples.class_ids[rows], task.train.class_ids[rows % len(task.train)])
    assert float(np.mean(np.concatenate(epochs) >= len(task.train))) == pytest.approx(0.25, abs=0.05)
    clean, behind = np.split(examples.read(), 2)
    assert np.array_equal(clean, task.train.read())
    assert np.array_equal(behind, coded(clean, 30))


def test_images_that_are_coded_once_and_in_every_epoch_are_the_same(
    tasks: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, coding = tasks.tasks[0], Coding(codec_ratio=0.5)
    once = coding.shown(task, memory_of("strips"), seed=3)[0]
    monkeypatch.setattr(codec, "AT_ONCE_BYTES", 0)
    assert np.array_equal(coding.shown(task, memory_of("strips"), seed=3)[0].read(), once.read())
    far = replace(task, train=task.train.mapped(np.copy))
    assert isinstance(far.train.images, Mapped)
    assert np.array_equal(coding.shown(far, memory_of("strips"), seed=3)[0].read(), once.read())


def test_nothing_is_coded_where_exemplars_are_raw_or_none_shall_be(tasks: Stream) -> None:
    task = tasks.tasks[0]
    assert Coding(codec_ratio=0.5).shown(task, memory_of("raw"), seed=0) == (task.train, None)
    assert Coding(codec_ratio=0.0).shown(task, memory_of("strips"), seed=0) == (task.train, None)
    with pytest.raises(ValueError, match=r"codec_ratio must be in 0..1, not 1.5"):
        Coding(codec_ratio=1.5)


@pytest.mark.parametrize("method", ["er", "derpp"])
def test_a_memory_that_is_filled_online_gets_the_images_as_they_are(tasks: Stream, method: str) -> None:
    """What was coded twice would be worse than what an exemplar is, and only some would be."""
    options: dict[str, Any] = {"epochs": 2, "fill": "online", "slots": 15, "flush": 4}
    learner = learner_of(method, tasks, codec_ratio=1.0, codec_qualities=(10,), **options)
    memory = memory_of("strips", **learner.fields, **{KEY: "utf8"})
    task = tasks.tasks[0]
    learner.learn(task, memory, quiet)
    kept = next(memory.walk())
    assert len(kept) == 15
    rows = [int(str(key).rpartition("-r")[2]) for key in kept.fields[KEY]]
    assert np.array_equal(kept.class_ids, task.train.class_ids[rows])
    assert np.array_equal(kept.images, coded(task.train.images.read(np.array(rows)), 50))


@pytest.mark.parametrize("method", ["er", "derpp"])
def test_replay_methods_show_their_own_images_as_jpeg_only_if_they_are_told_to(tasks: Stream, method: str) -> None:
    def learned(kind: Kind, **options: Any) -> object:
        learner = learner_of(method, tasks, epochs=1, **options)
        learner.learn(tasks.tasks[0], memory_of(kind, **learner.fields), quiet)
        return learner.state_dict()

    assert same(learned("raw", codec_ratio=0.5), learned("raw"))
    assert same(learned("strips"), learned("raw"))
    assert not same(learned("strips", codec_ratio=0.5), learned("strips"))
