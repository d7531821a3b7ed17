"""The replay memories: the budget holds to the byte, prefixes are kept, draws repeat, state survives."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engram import pack, shares
from engram.batch import Batch, empty
from engram.client import Client
from engram.errors import BadUpload, BudgetExceeded, Conflict, Unavailable
from engram.schemas import BufferCreate, IngestOptions, Strategy
from engram.selection.embedding import BuiltinEmbedder
from engram.selection.images import ArrayImages
from engram_service import buffers
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_trainer import datasets
from engram_trainer.examples import ClassIds, Examples, Images, Rows
from engram_trainer.local_memory import Kind, LocalConfig, LocalMemory, NetworkEmbedder, StripMemory
from engram_trainer.memory import Learned, NoMemory, by_task
from engram_trainer.plain_memory import CLASS_ID_BYTES, local_memory
from engram_trainer.service_memory import ServiceMemory, patient, whole_classes
from tests.photos import photos
from tests.servers import ServiceProcess
from tests.uploads import queue, tar_of_arrays, work_through

KINDS = get_args(Kind)
DIGITS = datasets.load("digits")


def flat(images_NHWC: Images) -> npt.NDArray[np.float32]:
    """Pixels as features."""
    return images_NHWC.reshape(len(images_NHWC), -1).astype(np.float32)


def task_of(classes: list[int], *, count: int, seed: int = 0) -> tuple[Images, npt.NDArray[np.int64]]:
    """Smooth 8x8 images of some classes, interleaved."""
    train = DIGITS.train
    rows = np.concatenate([np.flatnonzero(train.class_ids == class_id)[:count] for class_id in classes])
    rows = np.random.default_rng(seed).permutation(rows)
    return train.images.read(rows), train.class_ids[rows]


def learned(number: int, images: Images, class_ids: ClassIds, **more: Any) -> Learned:
    """A task of two arrays."""
    return Learned(number, Examples.of_arrays(images, class_ids), **more)


def everything(memory: Any, *, exclude_tasks: tuple[int, ...] = ()) -> Batch:
    """All exemplars of a memory in one batch."""
    found = list(memory.walk(7, exclude_tasks=exclude_tasks))
    if not found:
        return empty()
    return Batch(
        np.concatenate([batch.images for batch in found]),
        np.concatenate([batch.class_ids for batch in found]),
        np.concatenate([batch.tasks for batch in found]),
        np.concatenate([batch.rows for batch in found]),
        {name: np.concatenate([np.asarray(batch.fields[name]) for batch in found]) for name in found[0].fields},
    )


def filled(config: LocalConfig, tasks: list[list[int]], *, count: int = 40) -> LocalMemory:
    memory = local_memory(config)
    for number, classes in enumerate(tasks):
        images, class_ids = task_of(classes, count=count)
        memory.add(learned(number, images, class_ids, embed=flat, seed=number))
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
    memory = local_memory(LocalConfig(kind=kind, budget_bytes=budget, per=per, share_by=share_by))
    seen: set[int] = set()
    for number, classes in enumerate(tasks):
        images, class_ids = task_of(classes, count=30)
        memory.add(learned(number, images, class_ids, embed=flat, seed=number))
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
    before = everything(filled(config, [[0, 1]]))
    after = by_task(everything(filled(config, [[0, 1], [2, 3]])))[0]
    assert 0 < len(after) < len(before)
    for class_id in (0, 1):
        was, now = (batch.images[batch.class_ids == class_id] for batch in (before, after))
        np.testing.assert_array_equal(now, was[: len(now)])


def test_files_are_ordinary_jpegs_at_the_asked_quality() -> None:
    memory = filled(LocalConfig(kind="files", budget_bytes=20_000, quality=30), [[0, 1]])
    state = memory.state_dict()["tasks"][0]
    first = state["data"].numpy().tobytes()[: int(state["data_lengths"][0])]
    with Image.open(io.BytesIO(first)) as image:
        assert image.size == (8, 8)
        decoded = np.asarray(image)
        out = io.BytesIO()
        Image.new("L", (8, 8)).save(out, "JPEG", quality=30)
        with Image.open(out) as reference:
            assert image.quantization == reference.quantization  # type: ignore[attr-defined]
    np.testing.assert_array_equal(everything(memory).images[0, ..., 0], decoded)


def test_raw_pixels_come_back_as_they_were() -> None:
    images, class_ids = task_of([3, 4], count=20)
    memory = local_memory(LocalConfig(kind="raw", budget_bytes=10**6, ranking="random"))
    memory.add(learned(0, images, class_ids))
    kept = everything(memory)
    assert {image.tobytes() for image in kept.images} == {image.tobytes() for image in images}
    assert kept.class_ids.tolist() == [3] * 20 + [4] * 20


def test_coloured_images_are_kept_as_rgb() -> None:
    images = np.zeros((6, 16, 16, 3), np.uint8)
    images[..., 0] = 200
    for kind in KINDS:
        memory = local_memory(LocalConfig(kind=kind, budget_bytes=10**6, quality=90))
        memory.add(learned(0, images, np.zeros(6, np.int64)))
        assert np.abs(everything(memory).images[0, 8, 8].astype(int) - [200, 0, 0]).max() <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_a_function_of_its_arguments_and_survives_a_checkpoint(kind: Kind, tmp_path: Path) -> None:
    config = LocalConfig(kind=kind, budget_bytes=12_000)
    memory = filled(config, [[0, 1], [2, 3], [4, 5]])
    torch.save(memory.state_dict(), tmp_path / "state.pt")
    restored = local_memory(config)
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
    whole = everything(memory, exclude_tasks=(1,))
    for task, batch in by_task(drawn).items():
        np.testing.assert_array_equal(batch.images, by_task(whole)[task].images[batch.rows])


def test_a_task_that_is_added_again_changes_nothing() -> None:
    memory = filled(LocalConfig(kind="raw", budget_bytes=20_000), [[0, 1], [2, 3]])
    before = everything(memory)
    images, class_ids = task_of([0, 1], count=10, seed=9)
    memory.add(learned(1, images, class_ids, embed=flat, seed=9))
    np.testing.assert_array_equal(everything(memory).images, before.images)


@pytest.mark.parametrize("kind", ["raw", "files"])
def test_a_budget_below_one_exemplar_names_both_numbers_and_keeps_what_was_there(kind: Kind) -> None:
    memory = filled(LocalConfig(kind=kind, budget_bytes=1_500, quality=90), [[0]])
    before = everything(memory)
    images, class_ids = noise([1, 2, 3, 4, 5, 6, 7, 8, 9])
    with pytest.raises(BudgetExceeded, match=r"has at most 150 bytes of a budget of 1500, .* needs \d{3,}; raise"):
        memory.add(learned(1, images, class_ids))
    np.testing.assert_array_equal(everything(memory).images, before.images)


def test_strips_that_do_not_fit_say_how_many_bytes_would_do_and_keep_what_was_there() -> None:
    memory = local_memory(LocalConfig(kind="strips", budget_bytes=1_500, quality=90))
    memory.add(learned(0, np.zeros((3, 60, 60, 1), np.uint8), np.zeros(3, np.int64)))
    before = memory.state_dict()
    images, class_ids = noise([1, 2, 3, 4, 5, 6, 7, 8, 9])
    with pytest.raises(BudgetExceeded, match=r"have 1,350 bytes together, .* needs [234],\d\d\d at quality 90"):
        memory.add(learned(1, images, class_ids))
    assert same_states(memory.state_dict(), before)
    with pytest.raises(Conflict, match="8x8x1"):
        memory.add(learned(1, *task_of([1], count=3)))


def noise(classes: list[int]) -> tuple[Images, npt.NDArray[np.int64]]:
    """An image of 60x60 for each class that no coding makes small."""
    images = np.random.default_rng(0).integers(0, 256, (len(classes), 60, 60, 1), dtype=np.uint8)
    return images, np.array(classes)


def same_states(one: Any, other: Any) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same_states(one[key], other[key]) for key in one)
    return bool(one == other)


def test_a_checkpoint_of_another_kind_of_memory_is_refused() -> None:
    state = filled(LocalConfig(kind="raw"), [[0, 1]]).state_dict()
    with pytest.raises(Conflict, match="'raw'"):
        local_memory(LocalConfig(kind="files")).load_state_dict(state)


def test_no_memory_keeps_nothing_and_has_nothing_to_draw() -> None:
    memory = NoMemory()
    images, class_ids = task_of([0], count=3)
    memory.add(learned(0, images, class_ids, embed=flat))
    memory.exchange(0, images, class_ids, fields={}, keys=["a", "b", "c"], drop=[])
    assert len(everything(memory)) == memory.used_bytes == len(memory.counts()) == len(memory.keys()) == 0
    assert [len(batch) for batch in memory.loader(4, seed=0, steps=2)] == [0, 0]
    with pytest.raises(Conflict, match="keeps none"):
        memory.draw(4, seed=0, step=0)


def test_herding_keeps_more_typical_images_than_chance() -> None:
    images, class_ids = task_of([0], count=100)
    mean = flat(images).mean(axis=0)

    def distance(ranking: Any) -> float:
        memory = local_memory(LocalConfig(kind="raw", budget_bytes=66 * 10, ranking=ranking))
        memory.add(learned(0, images, class_ids, embed=flat))
        return float(np.linalg.norm(flat(everything(memory).images).mean(axis=0) - mean))

    assert distance("herding") < distance("random")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_loaders_of_two_processes_share_the_batches_of_one(kind: Kind, strategy: Strategy) -> None:
    memory = filled(LocalConfig(kind=kind, budget_bytes=12_000), [[0, 1], [2, 3]])
    given: dict[str, Any] = {"seed": 5, "strategy": strategy, "exclude_tasks": (7,), "start_step": 3, "steps": 3}
    alone = list(memory.loader(8, **given))
    both = [list(memory.loader(4, rank=rank, world_size=2, **given)) for rank in (0, 1)]
    assert len(alone) == 3
    for step, whole in enumerate(alone):
        parts = [each[step] for each in both]
        assert sorted(places(whole)) == sorted(places(parts[0]) + places(parts[1]))
        drawn = memory.draw(4, step=3 + step, seed=5, strategy=strategy, rank=1, world_size=2)
        np.testing.assert_array_equal(drawn.images, parts[1].images)


def places(batch: Batch) -> list[tuple[int, int]]:
    """Task and row of each exemplar."""
    return list(zip(batch.tasks.tolist(), batch.rows.tolist(), strict=True))


def test_a_loader_draws_from_what_the_memory_holds_when_it_is_asked() -> None:
    memory = local_memory(LocalConfig(kind="raw", budget_bytes=10**6))
    with memory.loader(6, seed=1) as loader:
        assert len(next(loader)) == 0
        memory.add(learned(0, *task_of([0, 1], count=9)))
        first = next(loader)
        np.testing.assert_array_equal(first.images, memory.draw(6, seed=1, step=1).images)
        memory.add(learned(1, *task_of([2, 3], count=9)))
        second = next(loader)
        np.testing.assert_array_equal(second.images, memory.draw(6, seed=1, step=2).images)
        np.testing.assert_array_equal(
            next(memory.loader(6, seed=1, start_step=1)).rows, memory.draw(6, seed=1, step=1).rows
        )
    with memory.loader(6, seed=1, exclude_tasks=(0, 1)) as loader:
        assert len(next(loader)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_meets_every_exemplar_once_in_order_and_holds_few(kind: Kind) -> None:
    memory = filled(LocalConfig(kind=kind, budget_bytes=12_000), [[0, 1], [2, 3]])
    walked = list(memory.walk(10))
    assert {len(batch) for batch in walked[:-1]} == {10}
    counts = memory.counts()
    assert counts.keys() == {0, 1}
    assert counts[1].keys() == {2, 3}
    total = {task: sum(classes.values()) for task, classes in counts.items()}
    assert [place for batch in walked for place in places(batch)] == [
        (task, row) for task in (0, 1) for row in range(total[task])
    ]
    assert [c for batch in walked for c in batch.class_ids.tolist()] == [
        c for classes in counts.values() for c, count in classes.items() for _ in range(count)
    ]
    assert len(list(memory.walk(exclude_tasks=(0, 1)))) == 0


LOGITS = {"logits": "float16 [3]"}


@pytest.mark.parametrize("kind", KINDS)
def test_fields_come_back_with_their_exemplars_and_are_counted(kind: Kind) -> None:
    images, class_ids = task_of([0, 1], count=20)
    logits = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float16)
    bare, rich = (local_memory(LocalConfig(kind=kind, budget_bytes=10**6, fields=f)) for f in ({}, LOGITS))
    bare.add(learned(0, images, class_ids, seed=3))
    rich.add(learned(0, images, class_ids, seed=3, fields={"logits": logits}))
    assert 40 * 6 <= rich.used_bytes - bare.used_bytes <= 40 * 6 + 40
    if kind != "strips":
        assert rich.used_bytes - bare.used_bytes == 40 * 6
    of_image = {image.tobytes(): row for image, row in zip(images, logits, strict=True)}
    kept, plain = everything(rich), everything(bare)
    np.testing.assert_array_equal(kept.images, plain.images)
    if kind == "raw":
        np.testing.assert_array_equal(kept.fields["logits"], [of_image[image.tobytes()] for image in kept.images])
    assert {row.tobytes() for row in np.asarray(kept.fields["logits"])} == {row.tobytes() for row in logits}
    restored = local_memory(LocalConfig(kind=kind, budget_bytes=10**6, fields=LOGITS))
    restored.load_state_dict(rich.state_dict())
    np.testing.assert_array_equal(everything(restored).fields["logits"], kept.fields["logits"])
    for memory, fields in ((rich, {}), (bare, {"logits": logits})):
        with pytest.raises(BadUpload, match="logits"):
            memory.add(learned(1, images, class_ids, fields=fields))


@dataclass(frozen=True, eq=False)
class Noise:
    """Images that are made when they are read, and how many were read at once at most."""

    count: int
    shape: tuple[int, int, int]
    most: list[int] = field(default_factory=lambda: [0])

    is_at_hand = True

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Rows) -> Images:
        self.most[0] = max(self.most[0], len(rows))
        return np.stack([np.full(self.shape, row % 256, np.uint8) for row in rows])


def lazily(count: int) -> tuple[Learned, list[int]]:
    """A task of large images, and the largest number of them that was ever read at once."""
    images = Noise(count, (128, 128, 3))
    return Learned(0, Examples(images, np.arange(count) % 2), embed=lambda x: x.mean((1, 2), np.float32)), images.most


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_read_in_pieces(kind: Kind) -> None:
    memory = local_memory(LocalConfig(kind=kind, budget_bytes=3 * 10**6))
    task, most = lazily(600)
    memory.add(task)
    assert sum(memory.counts()[0].values()) == (60 if kind == "raw" else 600)
    assert most[0] * 128 * 128 * 3 <= 13 * 2**20


@pytest.fixture(scope="session")
def service_memory(service: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceMemory]:
    """Two tasks in a real service."""
    with Client(service.url) as client:
        yield filled_service(client, tmp_path_factory.mktemp("mirror"))


def filled_service(client: Client, folder: Path) -> ServiceMemory:
    client.create_buffer("trainer-memory", budget_bytes=12_000, quality=50)
    memory = ServiceMemory(
        client,
        "trainer-memory",
        options=IngestOptions(ranking="random"),
        run="test",
        folder=folder,
    )
    for number, classes in enumerate([[0, 1], [2, 3]]):
        images, class_ids = task_of(classes, count=40)
        memory.add(learned(number, images, class_ids, embed=flat, seed=number))
    return memory


def test_the_services_memory_holds_what_it_says(service_memory: ServiceMemory) -> None:
    whole = everything(service_memory)
    found = service_memory.describe()
    assert found["exemplars"] == len(whole) == sum(found["tasks"].values())
    assert found["used_bytes"] == service_memory.used_bytes <= 12_000
    assert found["quality"] == 50
    assert sorted(set(whole.class_ids.tolist())) == [0, 1, 2, 3]
    assert set(everything(service_memory, exclude_tasks=(0,)).tasks.tolist()) == {1}
    assert len(everything(service_memory, exclude_tasks=(0, 1))) == 0


def test_the_services_memory_draws_what_the_service_draws(service_memory: ServiceMemory) -> None:
    ours = service_memory.draw(20, seed=3, step=4, strategy="class_balanced", exclude_tasks=(1,))
    theirs = service_memory.client.draw(
        "trainer-memory", 20, seed=3, step=4, strategy="class_balanced", exclude_tasks=(1,)
    )
    np.testing.assert_array_equal(ours.images, theirs.images)
    np.testing.assert_array_equal(ours.class_ids, theirs.class_ids)


def test_the_service_draws_for_a_run_without_a_mirror(service_memory: ServiceMemory, tmp_path: Path) -> None:
    remote = ServiceMemory(
        service_memory.client, "trainer-memory", options=IngestOptions(), run="test", folder=tmp_path, via="draw"
    )
    given: dict[str, Any] = {"seed": 3, "strategy": "class_balanced", "steps": 3, "rank": 1, "world_size": 2}
    for ours, theirs in zip(remote.loader(9, **given), service_memory.loader(9, **given), strict=True):
        np.testing.assert_array_equal(ours.images, theirs.images)
        assert places(ours) == places(theirs)
    np.testing.assert_array_equal(
        remote.draw(5, seed=1, step=2, exclude_tasks=(0,)).images,
        service_memory.draw(5, seed=1, step=2, exclude_tasks=(0,)).images,
    )
    assert (remote.counts(), remote.used_bytes) == (service_memory.counts(), service_memory.used_bytes)
    whole, other = everything(remote), everything(service_memory)
    np.testing.assert_array_equal(whole.images, other.images)
    assert places(whole) == places(other)
    assert [list(memory.walk(9, exclude_tasks=(1,)))[-1].rows.tolist() for memory in (remote, service_memory)]
    assert not list(tmp_path.iterdir())


def test_a_large_task_is_uploaded_some_classes_at_a_time_and_never_read_as_a_whole(
    service: ServiceProcess, tmp_path: Path
) -> None:
    whole, parts = f"whole-{uuid4().hex[:8]}", f"parts-{uuid4().hex[:8]}"
    with Client(service.url) as client:
        kept = []
        for name, upload_bytes in ((whole, 2**31), (parts, 128 * 128 * 3 * 40)):
            client.create_buffer(name, budget_bytes=10**6, quality=50)
            options = IngestOptions(ranking="ring")
            memory = ServiceMemory(
                client, name, options=options, run="r", folder=tmp_path / name, upload_bytes=upload_bytes
            )
            task, most = lazily(80)
            memory.add(task)
            memory.add(task)
            assert most[0] * 128 * 128 * 3 <= 2**20
            kept.append(everything(memory))
            assert memory.counts() == {0: {0: 40, 1: 40}}
            assert memory.generation == (1 if name == whole else 2)
        np.testing.assert_array_equal(kept[0].images, kept[1].images)


def test_whole_classes_go_together_as_far_as_they_fit() -> None:
    examples = Examples(Noise(9, (2, 2, 1)), np.array([5, 1, 1, 5, 8, 9, 8, 8, 8]))
    assert [part.tolist() for part in whole_classes(examples, 36)] == [list(range(9))]
    assert [part.tolist() for part in whole_classes(examples, 35)] == [[0, 1, 2, 3, 4, 6, 7, 8], [5]]
    assert [part.tolist() for part in whole_classes(examples, 16)] == [[0, 1, 2, 3], [4, 6, 7, 8], [5]]
    assert [part.tolist() for part in whole_classes(examples, 1)] == [[1, 2], [0, 3], [4, 6, 7, 8], [5]]


def test_a_buffer_that_does_not_fit_the_run_is_refused_in_one_sentence(
    service_memory: ServiceMemory, tmp_path: Path
) -> None:
    open_it = partial(
        ServiceMemory, service_memory.client, "trainer-memory", options=IngestOptions(), run="x", folder=tmp_path
    )
    with pytest.raises(Conflict, match=r"holds images of 8x8x1, this run has 32x32x3; name another buffer"):
        open_it(shape=(32, 32, 3))
    with pytest.raises(Conflict, match=r"declares no fields, the method needs \{'logits': 'float16 \[3\]'\}"):
        open_it(fields=LOGITS)
    open_it(shape=(8, 8, 1), fields={})


@pytest.mark.slow
def test_a_run_waits_for_its_service_and_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    told: list[str] = []
    is_away = threading.Event()

    def tell(message: str) -> None:
        told.append(message)
        is_away.set()

    def restart() -> None:
        is_away.wait(60)
        service.start()

    service = ServiceProcess(tmp_path, "--port", str(port))
    try:
        with Client(service.url, retries=0) as client:
            client.create_buffer("b", budget_bytes=12_000, quality=50)
            options = IngestOptions(ranking="random")
            memory = ServiceMemory(client, "b", options=options, run="r", folder=tmp_path, via="draw", tell=tell)
            memory.add(learned(0, *task_of([0, 1], count=40)))
            expected = list(memory.loader(8, seed=4, steps=12))
            with memory.loader(8, seed=4) as loader:
                found = [next(loader) for _ in range(3)]
                service.kill()
                again = threading.Thread(target=restart)
                again.start()
                found += [next(loader) for _ in range(9)]
                again.join()
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_array_equal(ours.images, theirs.images)
            assert len(told) == 1
            assert told[0].startswith(f"the service at {service.url} does not answer; waiting up to 600 s (")
    finally:
        service.kill()


def test_patience_ends() -> None:
    def call() -> None:
        raise Unavailable("away")

    told: list[Unavailable] = []
    with pytest.raises(Unavailable, match="away"):
        patient(call, patience_s=0.6, tell=told.append)
    assert list(map(str, told)) == ["away"]


def test_a_task_uploaded_again_after_a_crash_is_the_same_ingest(service_memory: ServiceMemory) -> None:
    before = service_memory.client.manifest("trainer-memory")
    images, class_ids = task_of([2, 3], count=40)
    service_memory.add(learned(1, images, class_ids, embed=flat, seed=1))
    assert service_memory.client.manifest("trainer-memory") == before


def test_a_buffer_that_was_set_back_is_noticed(service_memory: ServiceMemory) -> None:
    state = service_memory.state_dict()
    service_memory.load_state_dict(state)
    with pytest.raises(Conflict, match="generation 99"):
        service_memory.load_state_dict({**state, "generation": 99})
    with pytest.raises(Conflict, match="'other'"):
        service_memory.load_state_dict({**state, "buffer": "other"})


# Strips, as a service makes them


def strips(budget_bytes: int, **options: Any) -> StripMemory:
    """An empty memory that chooses its quality."""
    memory = local_memory(LocalConfig(kind="strips", budget_bytes=budget_bytes, quality=None), IngestOptions(**options))
    assert isinstance(memory, StripMemory)
    return memory


def packs_of(memory: StripMemory) -> dict[int, bytes]:
    """The pack of each task."""
    return {number: state["pack"].numpy().tobytes() for number, state in memory.state_dict()["tasks"].items()}


def uploads_of(count: int) -> list[tuple[int, Images, ClassIds]]:
    """(task, images, class ids): small uploads first, then tasks again, more images each time."""
    return [
        (number % 3, photos(12 + 45 * number, seed=number), np.resize([number % 3, 7], 12 + 45 * number))
        for number in range(count)
    ]


@pytest.mark.parametrize(
    "ranking", ["herding", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reservoir", "greedy_dpp"))]
)
def test_strips_in_the_trainer_are_byte_for_byte_those_of_a_service(
    ranking: Any, database: Database, settings: Settings, store: PackStore
) -> None:
    """The same uploads, with the built-in embedding, through a queue, tars, worker and database on the other side."""
    with database.session() as session:
        buffers.create(session, BufferCreate(name="b", budget_bytes=14_000))
    ours, found = strips(14_000, ranking=ranking), []
    for seed, (task, images, class_ids) in enumerate(uploads_of(6)):
        ours.put(task, ArrayImages(images, class_ids), BuiltinEmbedder((16, 16, 3)), seed=seed)
        body, options = tar_of_arrays(images, class_ids), IngestOptions(ranking=ranking, seed=seed)
        queue(database, settings, body, task=task, options=options)
        work_through(database, store, settings)
        with database.reading() as session:
            theirs = buffers.read(session, "b")
            live = {row.task: row.digest for row in buffers.live_packs(session, "b")}
        assert {task: pack.digest(data) for task, data in packs_of(ours).items()} == live
        assert (ours.quality, ours.used_bytes) == (theirs.quality, theirs.used_bytes)
        assert ours.content.is_provisional == (theirs.quality_is == "provisional")
        found.append((ours.quality, ours.content.is_provisional))
    assert found[0] == (90, True)
    assert found[-1] == (75, False)


def test_strips_choose_their_quality_without_a_service_and_record_what_the_learners_features_say() -> None:
    memory = strips(6_000, block=8)
    memory.add(learned(0, photos(20), np.resize([0, 1], 20), extractor=b"a model", embed=flat))
    assert memory.quality == memory.describe()["quality"] == 90
    memory.add(learned(1, photos(300, seed=1), np.resize([2, 3], 300), extractor=b"another", embed=flat, seed=1))
    assert memory.quality is not None
    assert memory.quality < 90
    names = [NetworkEmbedder(flat, extractor).name for extractor in (b"a model", b"another")]
    decision = memory.decisions[1]
    assert decision.embedder == names[1] != names[0]
    assert decision.block == 8
    assert all(candidate.pixel_ratio is not None for candidate in decision.candidates)
    assert decision.quality == memory.quality


@pytest.mark.parametrize(("uploads", "expected"), [(1, (90, True)), (2, (50, True)), (6, (75, False))])
def test_a_checkpoint_of_strips_goes_on_as_the_memory_would_have(
    uploads: int, expected: tuple[int, bool], tmp_path: Path
) -> None:
    """Whether everything still fits, the quality is provisional, or it is decided."""
    budget = 2_500 if uploads == 2 else 14_000
    memory = strips(budget)
    for seed, (task, images, class_ids) in enumerate(uploads_of(uploads)):
        memory.put(task, ArrayImages(images, class_ids), BuiltinEmbedder((16, 16, 3)), seed=seed)
    assert (memory.quality, memory.content.is_provisional) == expected
    torch.save(memory.state_dict(), tmp_path / "state.pt")
    restored = strips(budget)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same_states(restored.state_dict(), memory.state_dict())
    assert restored.content.is_roomy == memory.content.is_roomy
    for each in (memory, restored):
        each.put(1, ArrayImages(photos(150, seed=9), np.resize([1, 8], 150)), BuiltinEmbedder((16, 16, 3)), seed=9)
    assert same_states(restored.state_dict(), memory.state_dict())
    assert restored.describe() == memory.describe()


def test_a_fixed_quality_of_strips_is_kept_and_nothing_is_measured() -> None:
    memory = filled(LocalConfig(kind="strips", budget_bytes=9_000, quality=30), [[0, 1], [2, 3]])
    assert isinstance(memory, StripMemory)
    assert memory.quality == 30
    assert [decision.candidates for decision in memory.decisions.values()] == [[], []]
    assert {pack.parse(data).form.quality for data in packs_of(memory).values()} == {30}
