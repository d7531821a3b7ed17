"""The replay memories: the budget holds to the byte, prefixes are kept, draws repeat, state survives."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
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
from engram.batch import Batch, empty
from engram.client import Client
from engram.errors import BudgetExceeded, Conflict
from engram.schemas import BufferCreate, IngestOptions
from engram.selection.embedding import BuiltinEmbedder
from engram.selection.images import ArrayImages
from engram_service import buffers
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_trainer import datasets
from engram_trainer.examples import ClassIds, Examples, Images
from engram_trainer.local_memory import Kind, LocalConfig, LocalMemory, NetworkEmbedder, StripMemory
from engram_trainer.memory import Learned, NoMemory, by_task
from engram_trainer.plain_memory import CLASS_ID_BYTES, local_memory
from engram_trainer.service_memory import ServiceMemory
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
    with pytest.raises(BudgetExceeded, match="its 9 classes have 1350 bytes of a budget of 1500"):
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
    assert len(everything(memory)) == memory.used_bytes == 0
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


@pytest.mark.parametrize("ranking", ["herding", "reservoir", "greedy_dpp"])
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
