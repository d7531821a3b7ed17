"""A buffer in this process: what it refuses, what it survives, and who may read it meanwhile."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram import (
    BadUpload,
    Batch,
    BudgetExceeded,
    Conflict,
    IngestOptions,
    InvalidRequest,
    LocalBuffer,
    Mirror,
    NotFound,
    ReplayLoader,
    StorageFull,
    StripCorrupt,
)
from engram.draw import STRATEGIES, Request
from tests.client.conftest import Filled
from tests.contents import pictures
from tests.servers import environment

ROOT = Path(__file__).parents[2]
RING = IngestOptions(ranking="ring")


def same(one: Batch, other: Batch) -> bool:
    pairs = ((getattr(one, name), getattr(other, name)) for name in ("images", "class_ids", "tasks", "rows"))
    return all(np.array_equal(a, b) for a, b in pairs)


def grow(buffer: LocalBuffer, task: int, *, images: int = 20) -> None:
    buffer.add(task, pictures(task, images), [2 * task, 2 * task + 1] * (images // 2), options=RING)


def digests(folder: Path) -> set[str]:
    return {path.name for path in (folder / "packs").iterdir() if path.suffix != ".index"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memory"


@pytest.fixture
def filled_folder(folder: Path) -> Path:
    buffer = LocalBuffer(folder, budget_bytes=5000)
    for task in range(3):
        grow(buffer, task)
    return folder


# Equal to a service


def test_its_draws_equal_those_of_a_service(filled: Filled, tmp_path: Path) -> None:
    buffer = LocalBuffer(tmp_path / filled.name, budget_bytes=10**6, quality=60)
    for task, images in filled.images.items():
        buffer.add(task, images, filled.class_ids[task], options=RING)
    born_together = {"created_at": buffer.manifest.created_at}
    assert buffer.manifest == filled.client.manifest(filled.name).model_copy(update=born_together)
    for strategy in STRATEGIES:
        asked: dict[str, Any] = {"seed": 3, "step": 5, "strategy": strategy, "exclude_tasks": (1,)}
        assert same(buffer.draw(9, **asked), filled.client.draw(filled.name, 9, **asked))


def test_fields_come_back_with_their_exemplars_and_a_key_finds_one(folder: Path) -> None:
    fields = {"key": "utf8", "logits": "float16 [2]"}
    buffer = LocalBuffer(folder, budget_bytes=10**6, fields=fields)
    assert LocalBuffer(folder, fields=fields).manifest.fields == fields
    with pytest.raises(Conflict, match="fields"):
        LocalBuffer(folder, fields={"key": "utf8"})
    logits = np.arange(12, dtype=np.float16).reshape(6, 2)
    keys = [f"image {number}" for number in range(6)]
    with pytest.raises(BadUpload, match="logits"):
        buffer.add(0, pictures(0, 6), [0, 1] * 3, fields={"key": keys})
    buffer.add(0, pictures(0, 6), [0, 1] * 3, fields={"key": keys, "logits": logits}, options=RING)
    drawn = buffer.draw(6, strategy="epoch")
    assert sorted(drawn.fields["key"]) == keys
    for key, found in zip(drawn.fields["key"], drawn.fields["logits"], strict=True):
        np.testing.assert_array_equal(found, logits[keys.index(str(key))])
    buffer.remove(key="image 3")
    buffer.relabel(7, class_id=0)
    drawn = buffer.draw(5, strategy="epoch")
    assert sorted(drawn.fields["key"]) == [key for key in keys if key != "image 3"]
    assert sorted(drawn.class_ids.tolist()) == [1, 1, 7, 7, 7]
    (entry,) = buffer.manifest.packs
    buffer.remove(exemplar=(entry.digest, 0))
    with pytest.raises(NotFound, match="no row 0"):
        buffer.remove(exemplar=(entry.digest, 0))
    with pytest.raises(InvalidRequest, match="by its pack and row"):
        buffer.remove(exemplar=(entry.digest, 0), class_id=7)
    left = sorted(buffer.draw(4, strategy="epoch").fields["key"])
    buffer.remove(keys=[*left[:2], "nobody"])
    assert sorted(buffer.draw(4, strategy="epoch").fields["key"]) == left[2:]
    with pytest.raises(NotFound, match="any of 2 keys"):
        buffer.remove(keys=left[:2])
    buffer.add(1, pictures(1, 1), ["new"], fields={"logits": logits[:1]})
    assert buffer.class_names == {8: "new"}, "above the class that was relabelled to"


def test_a_loader_takes_a_local_buffer(filled_folder: Path) -> None:
    buffer = LocalBuffer(filled_folder)
    with ReplayLoader(buffer, 8, seed=4, steps=3) as loader:
        assert all(same(batch, buffer.draw(8, seed=4, step=step)) for step, batch in enumerate(loader))
        assert loader.state_dict()["generation"] == 3
    with ReplayLoader(buffer, 8) as loader:
        first = next(loader)
        grow(buffer, 3)
        assert same(first, LocalBuffer(filled_folder).draw(8)) is False
        assert {3} & set(next(loader).tasks.tolist()) == set()


def test_it_is_read_where_a_mirror_is_but_no_mirror_replaces_it(
    filled: Filled, filled_folder: Path, tmp_path: Path
) -> None:
    before = LocalBuffer(filled_folder).draw(9)
    with pytest.raises(Conflict, match="holds a local buffer"):
        Mirror(filled.client, filled.name, filled_folder)
    (filled_folder / "manifest.json").write_text("{")
    with pytest.raises(Conflict, match="holds a local buffer"):
        Mirror(filled.client, filled.name, filled_folder)
    shutil.copy(filled_folder / "manifest.copy.json", filled_folder / "manifest.json")
    assert same(LocalBuffer(filled_folder).draw(9), before)

    mirror = Mirror(filled.client, filled.name, tmp_path / "mirror")
    offline = LocalBuffer(tmp_path / "mirror")
    assert same(offline.draw(9, seed=1), mirror.draw(9, seed=1))
    with pytest.raises(Conflict, match="mirrors buffer 'filled' of a service"):
        grow(offline, 7)
    with pytest.raises(Conflict, match="mirrors"):
        LocalBuffer(tmp_path / "mirror", budget_bytes=10**6)


def test_it_travels_to_another_process_by_its_folder(filled_folder: Path) -> None:
    buffer = LocalBuffer(filled_folder)
    assert same(pickle.loads(pickle.dumps(buffer)).draw(5), buffer.draw(5))


# What it refuses


def test_a_buffer_is_opened_with_the_settings_that_it_has(folder: Path) -> None:
    with pytest.raises(NotFound, match="give budget_bytes"):
        LocalBuffer(folder)
    with pytest.raises(InvalidRequest, match="budget_bytes"):
        LocalBuffer(folder, budget_bytes=0)
    assert not folder.exists()
    LocalBuffer(folder, budget_bytes=5000, share_by="task", quality=40)
    same_settings = LocalBuffer(folder, budget_bytes=5000, quality=40)
    assert same_settings.describe().share_by == "task"
    with pytest.raises(Conflict, match=r"budget_bytes 5000 \(asked: 6000\), quality 40 \(asked: 50\)"):
        LocalBuffer(folder, budget_bytes=6000, share_by="task", quality=50)
    same_settings.change_budget(6000)
    assert LocalBuffer(folder, budget_bytes=6000).describe().limit_bytes == 6000


def test_a_folder_with_packs_and_no_manifest_is_left_alone(filled_folder: Path) -> None:
    before = digests(filled_folder)
    (filled_folder / "manifest.json").unlink()
    (filled_folder / "manifest.copy.json").unlink()
    with pytest.raises(Conflict, match="has 3 files and there is no manifest"):
        LocalBuffer(filled_folder, budget_bytes=5000)
    assert digests(filled_folder) == before


REFUSED: dict[str, tuple[Callable[[LocalBuffer], object], type[Exception], str]] = {
    "no images": (lambda b: b.add(0, pictures(0, 0), []), ValueError, "no images"),
    "floats": (lambda b: b.add(0, np.zeros((1, 8, 8, 3)), [0]), ValueError, "uint8"),
    "no label": (lambda b: b.add(0, pictures(0, 2), [0]), ValueError, "2 images need as many"),
    "a number as a name": (lambda b: b.add(0, pictures(0, 1), ["7"]), ValueError, "'7' is a number"),
    "another shape": (lambda b: b.add(0, pictures(0, 1, (8, 8, 3)), [0]), Conflict, "8x8x3"),
    "a task below 0": (lambda b: b.add(-1, pictures(0, 1), [0]), InvalidRequest, "task"),
    "a service's extractor": (
        lambda b: b.add(0, pictures(0, 1), [0], options=IngestOptions(extractor="0" * 64)),
        InvalidRequest,
        "embed",
    ),
    "a nameless function": (lambda b: b.add(0, pictures(0, 1), [0], embed=lambda i: i), ValueError, "embed_name"),
    "too few features": (
        lambda b: b.add(0, pictures(0, 9), [0] * 9, embed=lambda i: np.ones((1, 4)), embed_name="f"),
        ValueError,
        r"features \[1, 4\] for \d+ images",
    ),
    "features that are no numbers": (
        lambda b: b.add(0, pictures(0, 9), [0] * 9, embed=lambda i: np.full((len(i), 4), np.nan), embed_name="f"),
        ValueError,
        "not finite",
    ),
    "a task that is not there": (lambda b: b.delete_task(7), NotFound, "7"),
    "no budget": (lambda b: b.change_budget(0), InvalidRequest, "budget_bytes"),
    "another generation": (lambda b: b.change_budget(9, generation=1), Conflict, "generation 3, 1 is expected"),
    "a task of another generation": (lambda b: b.delete_task(0, generation=1), Conflict, "generation 3, 1 is expected"),
    "a class with another's name": (
        lambda b: b.rename_classes({0: "cat", 1: "cat"}),
        Conflict,
        "class 1 cannot be named 'cat': that is the name of class 0",
    ),
    "a name that is none": (lambda b: b.rename_classes({0: ""}), InvalidRequest, "characters"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_changes_nothing(filled_folder: Path, what: str) -> None:
    act, error, message = REFUSED[what]
    buffer, before = LocalBuffer(filled_folder), (filled_folder / "manifest.json").read_bytes()
    with pytest.raises(error, match=message):
        act(buffer)
    assert (filled_folder / "manifest.json").read_bytes() == before
    assert buffer.draw(3).images.shape == (3, 16, 16, 3)


def test_not_one_exemplar_that_fits_is_an_error_with_both_numbers(folder: Path) -> None:
    with pytest.raises(BudgetExceeded) as caught:
        grow(LocalBuffer(folder, budget_bytes=100), 0)
    assert caught.value.details["budget_bytes"] == 100
    assert LocalBuffer(folder).generation == 0


def test_what_a_function_or_a_watcher_raises_leaves_the_buffer_as_it_was(filled_folder: Path) -> None:
    class Mine(Exception):
        pass

    def fail(_: object) -> Any:
        raise Mine

    buffer = LocalBuffer(filled_folder)
    with pytest.raises(Mine):
        buffer.add(5, pictures(0, 9), [0] * 9, embed=fail, embed_name="f")
    with pytest.raises(Mine):
        buffer.add(5, pictures(0, 9), [0] * 9, progress=fail)
    grow(buffer, 5)
    assert buffer.generation == 4


def test_a_full_disk_leaves_the_buffer_as_it_was(filled_folder: Path) -> None:
    buffer, before = LocalBuffer(filled_folder), (filled_folder / "manifest.json").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(StorageFull):
            grow(buffer, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (filled_folder / "manifest.json").read_bytes() == before
    grow(buffer, 3)
    assert digests(filled_folder) == {entry.digest for entry in buffer.manifest.packs}


# Names


def test_names_are_the_same_classes_in_every_upload(folder: Path) -> None:
    buffer = LocalBuffer(folder, budget_bytes=10**6)
    buffer.add(0, pictures(0, 2), ["cat", "dog"])
    buffer.add(1, pictures(1, 2), ["ship", "truck"])
    buffer.delete_task(0)
    task = buffer.add(2, pictures(2, 3), np.array(["dog", "ant", "cat"]))
    assert buffer.class_names == {0: "cat", 1: "dog", 2: "ship", 3: "truck", 4: "ant"}
    assert [(row.class_id, row.name) for row in task.classes] == [(0, "cat"), (1, "dog"), (4, "ant")]
    buffer.rename_classes({0: "dog", 1: "cat"})
    assert LocalBuffer(folder).class_names == {0: "dog", 1: "cat", 2: "ship", 3: "truck", 4: "ant"}


# One writer, many readers


def test_a_second_writer_is_refused_at_once_and_the_first_one_ends_well(filled_folder: Path) -> None:
    refused: list[str] = []
    buffer, other = LocalBuffer(filled_folder), LocalBuffer(filled_folder)

    def meanwhile(_: int) -> None:
        if not refused:
            with pytest.raises(Conflict, match=f"process {os.getpid()} is changing") as caught:
                other.delete_task(0)
            refused.append(caught.value.message)
            assert other.draw(4).images.shape == (4, 16, 16, 3), "readers need no lock"

    buffer.add(3, pictures(3, 8), [6] * 8, options=RING, progress=meanwhile)
    assert refused
    other.delete_task(0)
    assert (other.generation, other.tasks) == (5, [1, 2, 3])


HOLDER = """
import sys
from engram import LocalBuffer, IngestOptions
from tests.contents import pictures
told = []
def wait(count):
    if not told:
        told.append(print("busy", flush=True))
        sys.stdin.readline()
LocalBuffer(sys.argv[1]).add(3, pictures(3, 8), [6] * 8, options=IngestOptions(ranking="ring"), progress=wait)
"""


@pytest.mark.parametrize("is_killed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_on_one_folder_take_turns(filled_folder: Path, is_killed: bool) -> None:
    env = environment() | {"PYTHONPATH": f"{environment()['PYTHONPATH']}:{ROOT}"}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(filled_folder)],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "busy\n"
        buffer = LocalBuffer(filled_folder)
        with pytest.raises(Conflict, match=f"process {holder.pid} is changing"):
            buffer.delete_task(0)
        if is_killed:
            holder.kill()
        else:
            holder.stdin.write("\n")
            holder.stdin.flush()
        holder.wait()
    buffer.delete_task(0)
    assert buffer.tasks == ([1, 2] if is_killed else [1, 2, 3])


def test_readers_see_complete_generations_while_a_writer_goes_on(folder: Path) -> None:
    writer = LocalBuffer(folder, budget_bytes=7000, quality=50)
    grow(writer, 0)
    failed: list[BaseException] = []
    seen: set[int] = set()
    done = threading.Event()

    def read() -> None:
        reader = LocalBuffer(folder)
        try:
            while not done.is_set():
                reader.refresh()
                snapshot = reader.snapshot()
                manifest = snapshot.manifest
                assert [entry.task for entry in manifest.packs] == list(range(manifest.generation))
                assert [len(held) for held in snapshot.packs] == [entry.exemplars for entry in manifest.packs]
                assert len(reader.draw(40)) == 40
                seen.add(manifest.generation)
        except BaseException as error:
            failed.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    try:
        for task in range(1, 7):
            grow(writer, task)
    finally:
        done.set()
        for thread in readers:
            thread.join()
    assert not failed
    assert len(seen) > 1


def test_a_snapshot_outlives_its_generation_even_where_nothing_is_kept_in_memory(filled_folder: Path) -> None:
    buffer, other = LocalBuffer(filled_folder, cache_bytes=0), LocalBuffer(filled_folder, cache_bytes=0)
    snapshot, request = buffer.snapshot(), Request(30, seed=2)
    before, packs = snapshot.draw(request), digests(filled_folder)
    buffer.change_budget(2000)
    assert not packs & {entry.digest for entry in buffer.manifest.packs}
    assert same(snapshot.draw(request), before)
    del snapshot
    buffer.change_budget(1900)
    assert digests(filled_folder) == {entry.digest for entry in buffer.manifest.packs}
    assert same(other.draw(30, seed=2), buffer.draw(30, seed=2)), "a reader goes on with what is there"


# Damage


def deaths(tmp_path: Path, *points: str) -> str:
    env = environment() | {"PYTHONPATH": f"{environment()['PYTHONPATH']}:{ROOT}", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "tests.client.local_deaths", str(tmp_path), *points]
    done = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_writer_killed_at_any_step_leaves_a_complete_generation(tmp_path: Path) -> None:
    assert deaths(tmp_path, "4").startswith("4 deaths")


@pytest.mark.slow
def test_a_writer_killed_at_every_step_leaves_a_complete_generation(tmp_path: Path) -> None:
    assert "generations [0, 1, 2, 3, 4]" in deaths(tmp_path)


@pytest.mark.parametrize("left", [0, 1, 500, -2])
def test_a_truncated_manifest_says_what_is_left_and_what_to_do(filled_folder: Path, left: int) -> None:
    before, packs = LocalBuffer(filled_folder).draw(9), digests(filled_folder)
    path = filled_folder / "manifest.json"
    os.truncate(path, left % path.stat().st_size)
    for attempt in (LocalBuffer, lambda folder: LocalBuffer(folder, budget_bytes=5000)):
        with pytest.raises(StripCorrupt, match="at generation 3, and 3 of its 3 packs are there") as caught:
            attempt(filled_folder)
    assert digests(filled_folder) == packs
    subprocess.run(caught.value.message.partition("in its place: ")[2].split(), check=True)
    assert same(LocalBuffer(filled_folder).draw(9), before)


def test_a_buffer_that_is_open_notices_a_truncated_manifest_before_it_changes_anything(filled_folder: Path) -> None:
    buffer, packs = LocalBuffer(filled_folder), digests(filled_folder)
    before = buffer.draw(9)
    os.truncate(filled_folder / "manifest.json", 700)
    with pytest.raises(StripCorrupt, match="700 bytes"):
        grow(buffer, 3)
    with pytest.raises(StripCorrupt):
        buffer.refresh()
    assert same(buffer.draw(9), before)
    assert digests(filled_folder) == packs


def test_a_manifest_and_a_copy_that_are_both_damaged_are_said_to_be(filled_folder: Path) -> None:
    packs = digests(filled_folder)
    for name in ("manifest.json", "manifest.copy.json"):
        os.truncate(filled_folder / name, 10)
    with pytest.raises(StripCorrupt, match=r"so is its copy.*3 packs are in"):
        LocalBuffer(filled_folder)
    assert digests(filled_folder) == packs


def test_a_later_version_is_not_changed(filled_folder: Path) -> None:
    path = filled_folder / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(Conflict, match="version 2, this one knows 1"):
        LocalBuffer(filled_folder)


def test_a_damaged_pack_is_named_and_a_change_keeps_what_is_intact(filled_folder: Path) -> None:
    buffer = LocalBuffer(filled_folder)
    (entry,) = [entry for entry in buffer.manifest.packs if entry.task == 1]
    assert len(buffer.draw(9)) == 9
    buffer = LocalBuffer(filled_folder)
    path = filled_folder / "packs" / entry.digest
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StripCorrupt, match="the pack of task 1") as caught:
        buffer.draw(9)
    assert caught.value.details == {"digest": entry.digest, "task": 1}
    task = buffer.add(1, pictures(9, 1), [2], options=RING)
    assert 0 < task.exemplars <= entry.exemplars + 1
    buffer.draw(9)


@pytest.mark.parametrize("left", [None, 0, 60])
def test_an_index_that_is_cut_short_or_gone_is_made_anew(filled_folder: Path, left: int | None) -> None:
    before = LocalBuffer(filled_folder).draw(9)
    indexes = sorted((filled_folder / "packs").glob("*.index"))
    assert len(indexes) == 3
    whole = [path.read_bytes() for path in indexes]
    for path in indexes:
        path.unlink() if left is None else os.truncate(path, left)
    assert same(LocalBuffer(filled_folder).draw(9), before)
    assert [path.read_bytes() for path in indexes] == whole


def test_a_pack_that_is_gone_is_named(filled_folder: Path) -> None:
    buffer = LocalBuffer(filled_folder)
    (filled_folder / "packs" / buffer.manifest.packs[0].digest).unlink()
    with pytest.raises(StripCorrupt, match="1 of them have no file \\(task 0\\)"):
        buffer.draw(9)
    with pytest.raises(StripCorrupt, match="no file"):
        buffer.fork(filled_folder.with_name("fork"))
    buffer.delete_task(0)
    assert set(buffer.draw(9).tasks.tolist()) == {1, 2}


# Forks


def test_a_fork_shares_packs_and_goes_its_own_way(filled_folder: Path, tmp_path: Path) -> None:
    source = LocalBuffer(filled_folder)
    fork = source.fork(tmp_path / "fork")
    assert (fork.generation, fork.manifest.packs) == (3, source.manifest.packs)
    for digest in digests(filled_folder):
        assert (filled_folder / "packs" / digest).stat().st_ino == (tmp_path / "fork" / "packs" / digest).stat().st_ino
    grow(fork, 3)
    assert source.draw(9).tasks.max() <= 2
    grow(source, 3)
    assert fork.manifest.packs == source.manifest.packs
    shutil.rmtree(filled_folder)
    assert len(LocalBuffer(tmp_path / "fork").draw(9)) == 9


def test_a_fork_with_a_smaller_budget_is_within_it(filled_folder: Path, tmp_path: Path) -> None:
    fork = LocalBuffer(filled_folder).fork(tmp_path / "fork", budget_bytes=2000)
    stored = sum((tmp_path / "fork" / "packs" / digest).stat().st_size for digest in digests(tmp_path / "fork"))
    assert stored == fork.manifest.used_bytes <= fork.manifest.limit_bytes == 2000
    assert LocalBuffer(filled_folder).describe().budget_bytes == 5000


def test_a_snapshot_takes_no_change_but_can_be_forked(filled_folder: Path, tmp_path: Path) -> None:
    source = LocalBuffer(filled_folder)
    snapshot = source.fork(tmp_path / "snapshot", frozen=True, generation=3)
    changes: list[Callable[[LocalBuffer], object]] = [
        lambda buffer: grow(buffer, 3),
        lambda buffer: buffer.delete_task(0),
        lambda buffer: buffer.change_budget(100),
        lambda buffer: buffer.rename_classes({0: "cat"}),
    ]
    for change in changes:
        with pytest.raises(Conflict, match="frozen at generation 3"):
            change(snapshot)
    source.delete_task(0)
    assert snapshot.is_frozen
    assert len(snapshot.draw(60, strategy="epoch", tasks=[0])) > 0
    thawed = snapshot.fork(tmp_path / "thawed")
    thawed.delete_task(0)
    assert thawed.manifest.packs == source.manifest.packs


def test_a_fork_does_not_overwrite_anything(filled_folder: Path, tmp_path: Path) -> None:
    source = LocalBuffer(filled_folder)
    for target in (filled_folder, source.fork(tmp_path / "fork").folder):
        before = (target / "manifest.json").read_bytes()
        with pytest.raises(Conflict, match="already"):
            source.fork(target)
        assert (target / "manifest.json").read_bytes() == before
    with pytest.raises(Conflict, match="generation 3, 2 is expected"):
        source.fork(tmp_path / "other", generation=2)
    assert source.fork(tmp_path / "other", generation=3).generation == 3, "what failed is in nobody's way"
    with pytest.raises(InvalidRequest):
        source.fork(tmp_path / "other", budget_bytes=0)


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == Path("/tmp").stat().st_dev,
    reason="needs a second file system at /dev/shm",
)
def test_a_fork_on_another_file_system_is_a_copy(filled_folder: Path) -> None:
    target = Path("/dev/shm") / f"engram-{os.getpid()}"
    try:
        fork = LocalBuffer(filled_folder).fork(target)
        assert digests(target) == digests(filled_folder)
        assert len(fork.draw(9)) == 9
    finally:
        shutil.rmtree(target, ignore_errors=True)


@pytest.mark.parametrize("budget_bytes", [None, pytest.param(2000, marks=pytest.mark.slow)])
def test_forks_made_while_uploads_go_on_are_complete_generations(
    folder: Path, tmp_path: Path, budget_bytes: int | None
) -> None:
    LocalBuffer(folder, budget_bytes=3000, quality=50)
    manifests = {0: LocalBuffer(folder).manifest}

    def write() -> None:
        writer = LocalBuffer(folder)
        for task in range(10):
            grow(writer, task)
            manifests[writer.generation] = writer.manifest

    writer = threading.Thread(target=write)
    writer.start()
    forks: list[LocalBuffer] = []
    while writer.is_alive() or not forks:
        source = LocalBuffer(folder)
        forks.append(source.fork(tmp_path / f"fork-{len(forks)}", budget_bytes=budget_bytes))
    writer.join()
    for fork in forks:
        assert fork.manifest.used_bytes <= fork.manifest.limit_bytes
        assert fork.tasks == list(range(fork.generation))
        assert digests(fork.folder) == {entry.digest for entry in fork.manifest.packs}
        fork.snapshot()
        if budget_bytes is None:
            assert fork.manifest.packs == manifests[fork.generation].packs
