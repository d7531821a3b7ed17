"""This file is the replay memories: the budget holds to the byte, prefixes are kept, draws repeat, state survives."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engram import pack, shares
from engram.client import Client
from engram.errors import BudgetExceeded, Conflict
from engram.schemas import IngestOptions
from engram_trainer import datasets
from engram_trainer.datasets import Images
from engram_trainer.local_memory import CLASS_ID_BYTES, Kind, LocalConfig, LocalMemory, herd
from engram_trainer.memory import NoMemory, ServiceMemory, by_task
from tests.servers import ServiceProcess

KINDS = get_args(Kind)


def flat(images_NHWC: Images) -> npt.NDArray[np.float32]:
    """Pixels as features."""
    return images_NHWC.reshape(len(images_NHWC), -1).astype(np.float32)


def task_of(classes: list[int], *, count: int, seed: int = 0) -> tuple[Images, npt.NDArray[np.int64]]:
    """Smooth 8x8 images of some classes, interleaved."""
    digits = datasets.load("digits")
    rows = np.concatenate([np.flatnonzero(digits.train_class_ids == class_id)[:count] for class_id in classes])
    rows = np.random.default_rng(seed).permutation(rows)
    return digits.train_images[rows], digits.train_class_ids[rows]


def filled(config: LocalConfig, tasks: list[list[int]], *, count: int = 40) -> LocalMemory:
    memory = LocalMemory(config)
    for number, classes in enumerate(tasks):
        images, class_ids = task_of(classes, count=count)
        memory.add(number, images, class_ids, extractor=None, embed=flat, seed=number)
    return memory


@given(
    st.sampled_from(KINDS),
    st.sampled_from(["buffer", "class"]),
    st.sampled_from(["class", "task"]),
    st.sampled_from([[[0, 1], [2, 3]], [[4], [5, 6, 7]], [[0, 1, 2], [1, 2, 3], [0, 9]]]),
    st.integers(3_000, 20_000),
)
@settings(deadline=None, max_examples=25)
def test_the_budget_holds_after_every_task(kind: Kind, per: Any, share_by: Any, tasks: Any, budget: int) -> None:
    memory = LocalMemory(LocalConfig(kind=kind, budget_bytes=budget, per=per, share_by=share_by))
    seen: set[int] = set()
    for number, classes in enumerate(tasks):
        images, class_ids = task_of(classes, count=30)
        memory.add(number, images, class_ids, extractor=None, embed=flat, seed=number)
        seen |= set(classes)
        assert 0 < memory.used_bytes <= shares.limit(budget, per=per, classes=len(seen))


@pytest.mark.parametrize("kind", KINDS)
def test_used_bytes_are_the_bytes_of_what_is_kept(kind: Kind) -> None:
    memory = filled(LocalConfig(kind=kind, budget_bytes=9_000), [[0, 1], [2, 3]])
    state = memory.state_dict()["tasks"]
    if kind == "raw":
        expected = sum(len(kept["class_ids"]) * (8 * 8 + CLASS_ID_BYTES) for kept in state.values())
    elif kind == "files":
        expected = sum(len(kept["data"]) + CLASS_ID_BYTES * len(kept["class_ids"]) for kept in state.values())
    else:
        expected = sum(len(kept["pack"]) for kept in state.values())
    assert memory.used_bytes == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_task_leaves_a_prefix_of_every_earlier_class(kind: Kind) -> None:
    config = LocalConfig(kind=kind, budget_bytes=2_500)
    before = filled(config, [[0, 1]]).everything()
    after = by_task(filled(config, [[0, 1], [2, 3]]).everything())[0]
    assert 0 < len(after) < len(before)
    for class_id in (0, 1):
        was, now = (batch.images[batch.class_ids == class_id] for batch in (before, after))
        np.testing.assert_array_equal(now, was[: len(now)])


def test_files_are_ordinary_jpegs_at_the_asked_quality() -> None:
    memory = filled(LocalConfig(kind="files", budget_bytes=20_000, quality=30), [[0, 1]])
    state = memory.state_dict()["tasks"][0]
    first = state["data"].numpy().tobytes()[: int(state["lengths"][0])]
    with Image.open(io.BytesIO(first)) as image:
        assert image.size == (8, 8)
        decoded = np.asarray(image)
        out = io.BytesIO()
        Image.new("L", (8, 8)).save(out, "JPEG", quality=30)
        with Image.open(out) as reference:
            assert image.quantization == reference.quantization  # type: ignore[attr-defined]
    np.testing.assert_array_equal(memory.everything().images[0, ..., 0], decoded)


def test_raw_pixels_come_back_as_they_were() -> None:
    images, class_ids = task_of([3, 4], count=20)
    memory = LocalMemory(LocalConfig(kind="raw", budget_bytes=10**6, ranking="random"))
    memory.add(0, images, class_ids, extractor=None, embed=None, seed=0)
    kept = memory.everything()
    assert {image.tobytes() for image in kept.images} == {image.tobytes() for image in images}
    assert kept.class_ids.tolist() == [3] * 20 + [4] * 20


def test_coloured_images_are_kept_as_rgb() -> None:
    images = np.zeros((6, 16, 16, 3), np.uint8)
    images[..., 0] = 200
    for kind in KINDS:
        memory = LocalMemory(LocalConfig(kind=kind, budget_bytes=10**6, quality=90))
        memory.add(0, images, np.zeros(6, np.int64), extractor=None, embed=None, seed=0)
        assert np.abs(memory.everything().images[0, 8, 8].astype(int) - [200, 0, 0]).max() <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_a_function_of_its_arguments_and_survives_a_checkpoint(kind: Kind, tmp_path: Path) -> None:
    config = LocalConfig(kind=kind, budget_bytes=12_000)
    memory = filled(config, [[0, 1], [2, 3], [4, 5]])
    torch.save(memory.state_dict(), tmp_path / "state.pt")
    restored = LocalMemory(config)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.describe() == memory.describe()
    for step in range(3):
        first, again = (each.draw(17, seed=5, step=step, strategy="class_balanced") for each in (memory, restored))
        np.testing.assert_array_equal(first.images, again.images)
        np.testing.assert_array_equal(first.class_ids, again.class_ids)
    assert memory.draw(9, seed=5, step=0).rows.tolist() != memory.draw(9, seed=5, step=1).rows.tolist()


def test_a_draw_per_task_has_as_many_of_each_task_and_none_of_the_excluded_ones() -> None:
    memory = filled(LocalConfig(kind="raw", budget_bytes=20_000), [[0, 1], [2, 3], [4, 5]])
    drawn = memory.draw(6, seed=1, step=2, strategy="per_task", exclude_tasks=(1,))
    assert {task: len(batch) for task, batch in by_task(drawn).items()} == {0: 6, 2: 6}
    whole = memory.everything(exclude_tasks=(1,))
    for task, batch in by_task(drawn).items():
        np.testing.assert_array_equal(batch.images, by_task(whole)[task].images[batch.rows])


def test_a_task_that_is_added_again_changes_nothing() -> None:
    memory = filled(LocalConfig(kind="raw", budget_bytes=20_000), [[0, 1], [2, 3]])
    before = memory.everything()
    images, class_ids = task_of([0, 1], count=10, seed=9)
    memory.add(1, images, class_ids, extractor=None, embed=flat, seed=9)
    np.testing.assert_array_equal(memory.everything().images, before.images)


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_below_one_exemplar_names_both_numbers_and_keeps_what_was_there(kind: Kind) -> None:
    memory = filled(LocalConfig(kind=kind, budget_bytes=1_500, quality=90), [[0]])
    before = memory.everything()
    images, class_ids = task_of([1, 2, 3, 4, 5, 6, 7, 8, 9], count=3)
    big = np.random.default_rng(0).integers(0, 256, (len(images), 60, 60, 1), dtype=np.uint8)
    with pytest.raises(BudgetExceeded, match="its 9 classes have 1350 bytes of a budget of 1500"):
        memory.add(1, big, class_ids, extractor=None, embed=None, seed=0)
    np.testing.assert_array_equal(memory.everything().images, before.images)


def test_a_checkpoint_of_another_kind_of_memory_is_refused() -> None:
    state = filled(LocalConfig(kind="raw"), [[0, 1]]).state_dict()
    with pytest.raises(Conflict, match="'raw'"):
        LocalMemory(LocalConfig(kind="files")).load_state_dict(state)


def test_no_memory_keeps_nothing_and_has_nothing_to_draw() -> None:
    memory = NoMemory()
    images, class_ids = task_of([0], count=3)
    memory.add(0, images, class_ids, extractor=None, embed=flat, seed=0)
    assert len(memory.everything()) == memory.used_bytes == 0
    with pytest.raises(Conflict, match="keeps none"):
        memory.draw(4, seed=0, step=0)


def unit(seed: int, count: int, dimensions: int) -> npt.NDArray[np.float64]:
    features = np.random.default_rng(seed).normal(size=(count, dimensions)) + 0.5
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 8))
@settings(deadline=None)
def test_herding_takes_at_every_step_the_image_that_brings_the_mean_closest(seed: int, count: int, width: int) -> None:
    features = unit(seed, count, width)
    mean = features.mean(axis=0)
    chosen = herd(features, count)
    assert sorted(chosen) == list(range(count))
    for k in range(count):
        left = [row for row in range(count) if row not in chosen[:k]]
        distance = {row: np.linalg.norm(mean - features[[*chosen[:k], row]].mean(axis=0)) for row in left}
        assert distance[chosen[k]] <= min(distance.values()) + 1e-9


def test_a_shorter_ranking_is_a_prefix_of_a_longer_one_and_ties_go_to_the_first() -> None:
    features = unit(3, 30, 4)
    assert herd(features, 7) == herd(features, 30)[:7]
    assert herd(np.ones((3, 2)) / np.sqrt(2), 3) == [0, 1, 2]
    assert herd(features, 0) == []
    with pytest.raises(ValueError, match="31 of 30"):
        herd(features, 31)


def test_herding_keeps_more_typical_images_than_chance() -> None:
    images, class_ids = task_of([0], count=100)
    mean = flat(images).mean(axis=0)

    def distance(ranking: Any) -> float:
        memory = LocalMemory(LocalConfig(kind="raw", budget_bytes=66 * 10, ranking=ranking))
        memory.add(0, images, class_ids, extractor=None, embed=flat, seed=0)
        return float(np.linalg.norm(flat(memory.everything().images).mean(axis=0) - mean))

    assert distance("herding") < distance("random")


@pytest.fixture(scope="module")
def service_memory(service: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceMemory]:
    """Two tasks in a real service."""
    with Client(service.url) as client:
        yield filled_service(client, tmp_path_factory.mktemp("mirror"))


def filled_service(client: Client, folder: Path) -> ServiceMemory:
    client.create_buffer("trainer-memory", budget_bytes=12_000)
    memory = ServiceMemory(
        client,
        "trainer-memory",
        options=IngestOptions(quality=50, ranking="random"),
        run="test",
        folder=folder,
    )
    for number, classes in enumerate([[0, 1], [2, 3]]):
        images, class_ids = task_of(classes, count=40)
        memory.add(number, images, class_ids, extractor=None, embed=flat, seed=number)
    return memory


def test_the_services_memory_holds_what_it_says(service_memory: ServiceMemory) -> None:
    whole = service_memory.everything()
    found = service_memory.describe()
    assert found["exemplars"] == len(whole) == sum(found["tasks"].values())
    assert found["used_bytes"] == service_memory.used_bytes <= 12_000
    assert found["qualities"] == {"0": 50, "1": 50}
    assert sorted(set(whole.class_ids.tolist())) == [0, 1, 2, 3]
    assert set(service_memory.everything(exclude_tasks=(0,)).tasks.tolist()) == {1}
    assert len(service_memory.everything(exclude_tasks=(0, 1))) == 0


def test_the_services_memory_draws_what_the_service_draws(service_memory: ServiceMemory) -> None:
    ours = service_memory.draw(20, seed=3, step=4, strategy="class_balanced", exclude_tasks=(1,))
    theirs = service_memory.client.draw(
        "trainer-memory", 20, seed=3, step=4, strategy="class_balanced", exclude_tasks=(1,)
    )
    np.testing.assert_array_equal(ours.images, theirs.images)
    np.testing.assert_array_equal(ours.class_ids, theirs.class_ids)


def test_a_task_uploaded_again_after_a_crash_is_the_same_ingest(service_memory: ServiceMemory) -> None:
    before = service_memory.client.manifest("trainer-memory")
    images, class_ids = task_of([2, 3], count=40)
    service_memory.add(1, images, class_ids, extractor=None, embed=flat, seed=1)
    assert service_memory.client.manifest("trainer-memory") == before


def test_a_buffer_that_was_set_back_is_noticed(service_memory: ServiceMemory) -> None:
    state = service_memory.state_dict()
    service_memory.load_state_dict(state)
    with pytest.raises(Conflict, match="generation 99"):
        service_memory.load_state_dict({**state, "generation": 99})
    with pytest.raises(Conflict, match="'other'"):
        service_memory.load_state_dict({**state, "buffer": "other"})


def test_strips_in_the_trainer_are_the_services_format() -> None:
    memory = filled(LocalConfig(kind="strips", budget_bytes=9_000), [[0, 1]])
    content = memory.state_dict()["tasks"][0]["pack"].numpy().tobytes()
    assert len(pack.parse(content)) == len(memory.everything())
