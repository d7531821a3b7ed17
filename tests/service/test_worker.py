"""The worker: what it makes of an upload, and how it ends when it is disturbed."""

from __future__ import annotations

import hashlib
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select, update

from engram import pack
from engram.errors import EngramError, NotFound, TooLarge, from_problem
from engram.schemas import Ingest, IngestOptions, Ranking
from engram_service import buffers, extractors, ingest, worker
from engram_service.collect import collect
from engram_service.database import Database
from engram_service.heartbeat import Heartbeat, Stopped
from engram_service.ingest import LeaseLost
from engram_service.settings import Settings
from engram_service.spooled import SpooledImages
from engram_service.storage import PackStore
from engram_service.tables import IngestRow, PackRow
from engram_service.work import attempt
from tests.contents import create, pictures
from tests.models import model
from tests.photos import photos
from tests.servers import PATIENCE_S, eventually
from tests.uploads import encoded, final, pairs, queue, tar_of, tar_of_arrays, work_through

PICTURES = pictures(1, 12)
CLASS_IDS = np.arange(12) % 3


def generation(database: Database) -> int:
    with database.reading() as session:
        return buffers.read(session, "b").generation


def test_an_upload_becomes_a_pack_with_a_decision(database: Database, store: PackStore, settings: Settings) -> None:
    create(database, quality=None)
    queued = queue(database, settings, tar_of_arrays(PICTURES, CLASS_IDS), task=4)
    work_through(database, store, settings)
    ended = final(database, queued)
    assert (ended.state, ended.generation, ended.attempts, ended.problem) == ("committed", 1, 1, None)
    assert ended.images_done == ended.images_total == 12
    assert not ingest.spool_path(settings.spool_dir, queued.id).exists()
    with database.reading() as session:
        task = buffers.task(session, "b", 4)
        manifest = buffers.manifest(session, "b")
    assert [(c.class_id, c.seen, c.exemplars) for c in task.classes] == [(0, 4, 4), (1, 4, 4), (2, 4, 4)]
    assert task.decision is not None
    assert [candidate.quality for candidate in task.decision.candidates] == [10, 25, 50, 75, 90]
    assert task.decision.quality == task.quality
    assert manifest.image_shape == (16, 16, 3)
    stored = pack.parse(store.get(manifest.packs[0].digest)).decode()
    distances = np.abs(stored[:, None].astype(int) - PICTURES[None]).mean(axis=(2, 3, 4))
    assert sorted(distances.argmin(axis=1)) == list(range(12))
    assert CLASS_IDS[distances.argmin(axis=1)].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert distances.min(axis=1).max() < 12


@pytest.mark.slow
def test_a_first_upload_of_20_images_does_not_fix_the_quality(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database, budget_bytes=60_000, quality=None)
    seen: list[tuple[int | None, str]] = []
    for number in range(12):
        images = photos(20, (24, 24, 1), seed=number, noise=100)
        queue(database, settings, tar_of_arrays(images, np.arange(20) % 2))
        work_through(database, store, settings)
        with database.reading() as session:
            buffer = buffers.read(session, "b")
            packs = buffers.manifest(session, "b").packs
        assert {pack.quality for pack in packs} == {buffer.quality}
        seen.append((buffer.quality, buffer.quality_is))
    assert seen[0] == (90, "provisional")
    assert (seen[-1][0] != 90, seen[-1][1]) == (True, "decided")
    assert len({quality for quality, _ in seen}) == 2, seen
    assert seen.index(seen[-1]) > 2


@pytest.mark.slow
def test_two_noisy_images_of_2048_pixels_are_stored(database: Database, store: PackStore, settings: Settings) -> None:
    create(database, budget_bytes=10**8, quality=95)
    noise = np.random.default_rng(0).integers(0, 256, (2, 2048, 2048, 3), np.uint8)
    queued = queue(database, settings, tar_of_arrays(noise, [0, 1]))
    work_through(database, store, settings)
    assert final(database, queued).state == "committed", final(database, queued).problem
    with database.reading() as session:
        assert buffers.read(session, "b").exemplars == 2


@pytest.mark.parametrize("ranking", ["herding", "greedy_dpp", "reservoir", "ring", "random"])
def test_every_ranking_commits(ranking: Ranking, database: Database, store: PackStore, settings: Settings) -> None:
    create(database, budget_bytes=3000)
    for number in range(2):
        images = pictures(number, 60)
        options = IngestOptions(ranking=ranking, candidates=(10, 50))
        queued = queue(database, settings, tar_of_arrays(images, np.arange(60) % 2), options=options)
        work_through(database, store, settings)
        assert final(database, queued).state == "committed", final(database, queued).problem
    with database.reading() as session:
        found = buffers.read(session, "b")
        assert [c.seen for c in buffers.task(session, "b", 0).classes] == [60, 60]
    assert 2000 < found.used_bytes <= 3000


def test_images_of_every_format_are_read_back_as_they_were(settings: Settings) -> None:
    lossless = [("png", encoded(image), 3) for image in PICTURES[:4]]
    lossless += [("PPM", encoded(image, "PPM"), 1) for image in PICTURES[4:8]]
    lossy = [("jpg", encoded(PICTURES[8], "JPEG"), 2), ("webp", encoded(PICTURES[9], "WEBP"), 0)]
    path = settings.spool_dir / "x.tar"
    path.write_bytes(tar_of(pairs([*lossless, *lossy])))
    found: list[int] = []
    with SpooledImages(path, settings, found.append) as images:
        assert len(images) == 10
        assert images.shape == (16, 16, 3)
        assert images.class_ids.tolist() == [3] * 4 + [1] * 4 + [2, 0]
        order = [7, 0, 5, 0, 3]
        np.testing.assert_array_equal(images.read(order), PICTURES[order])
        assert images.read([8, 9]).shape == (2, 16, 16, 3)
        assert images.read([]).shape == (0, 16, 16, 3)
        with pytest.raises(IndexError):
            images.read([10])
    assert found == list(range(1, 11))


def test_an_upload_is_given_up_at_the_image_at_which_it_was_cancelled(settings: Settings) -> None:
    path = settings.spool_dir / "x.tar"
    path.write_bytes(tar_of_arrays(PICTURES, CLASS_IDS))

    def report(found: int) -> None:
        if found == 5:
            raise LeaseLost

    with pytest.raises(LeaseLost):
        SpooledImages(path, settings, report)


def test_the_pixels_of_one_upload_are_bounded(database: Database, store: PackStore, settings: Settings) -> None:
    create(database)
    bounded = settings.model_copy(update={"max_decoded_pixels": 10 * 16 * 16})
    for images, state in ((10, "committed"), (11, "failed")):
        queued = queue(database, settings, tar_of_arrays(PICTURES[:1].repeat(images, 0), [0] * images))
        work_through(database, store, bounded)
        ended = final(database, queued)
        assert ended.state == state
    assert ended.problem is not None
    assert type(from_problem(ended.problem)) is TooLarge
    assert "'0000000010.ppm' have 2816 pixels together, at most 2560" in ended.problem["detail"]


def test_grey_images_stay_grey(database: Database, store: PackStore, settings: Settings) -> None:
    create(database)
    queue(database, settings, tar_of_arrays(pictures(1, 6, (28, 28, 1)), [1] * 6))
    work_through(database, store, settings)
    with database.reading() as session:
        assert buffers.read(session, "b").image_shape == (28, 28, 1)


def test_a_registered_extractor_embeds_the_images(database: Database, store: PackStore, settings: Settings) -> None:
    data = model()
    digest = hashlib.sha256(data).hexdigest()
    extractors.path(settings, digest).write_bytes(data)
    create(database, quality=None)
    queued = queue(
        database, settings, tar_of_arrays(PICTURES, CLASS_IDS), options=IngestOptions(extractor=digest, block=4)
    )
    work_through(database, store, settings)
    assert final(database, queued).state == "committed", final(database, queued).problem
    with database.reading() as session:
        decision = buffers.task(session, "b", 0).decision
    assert decision is not None
    assert decision.embedder == digest


def test_an_unregistered_extractor_is_not_found(database: Database, store: PackStore, settings: Settings) -> None:
    create(database)
    queued = queue(database, settings, tar_of_arrays(PICTURES, CLASS_IDS), options=IngestOptions(extractor="0" * 64))
    work_through(database, store, settings)
    problem = final(database, queued).problem
    assert problem is not None
    assert type(from_problem(problem)) is NotFound


def lapse(database: Database) -> None:
    """Time has passed: what waits for another attempt may have it now, and no lease is held."""
    with database.session() as session:
        session.execute(update(IngestRow).values(lease_owner=None, pause_s=None, beat=IngestRow.beat + 1))


def test_an_unexpected_failure_is_tried_again_and_then_told(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database)
    queued = queue(database, settings, tar_of_arrays(PICTURES, CLASS_IDS))
    ingest.spool_path(settings.spool_dir, queued.id).unlink()
    ingest.spool_path(settings.spool_dir, queued.id).mkdir()
    for number in range(1, settings.max_attempts + 1):
        work_through(database, store, settings)
        now = final(database, queued)
        assert (now.attempts, now.state) == (number, "received" if number < settings.max_attempts else "failed")
        lapse(database)
    problem = final(database, queued).problem
    assert problem is not None
    assert type(from_problem(problem)) is EngramError
    assert "IsADirectoryError" in problem["detail"]


def test_a_full_disk_is_tried_again_until_there_is_room(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database, budget_bytes=10**7, quality=95)
    noise = np.random.default_rng(0).integers(0, 256, (60, 128, 128, 3), np.uint8)
    queued = queue(database, settings, tar_of_arrays(noise, [0] * 60))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        work_through(database, store, settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    now = final(database, queued)
    assert (now.state, now.attempts, now.problem) == ("received", 1, None)
    assert generation(database) == 0
    assert [path for path in settings.packs_dir.rglob("*") if path.is_file()] == []
    lapse(database)
    work_through(database, store, settings)
    assert final(database, queued).state == "committed"


def held_heartbeat(database: Database, settings: Settings, stop: threading.Event) -> tuple[ingest.Claim, Heartbeat]:
    create(database)
    queue(database, settings, tar_of_arrays(PICTURES, CLASS_IDS))
    held = ingest.claim(database, settings, owner="test")
    assert held is not None
    return held, Heartbeat(database, settings, held, stop)


def test_the_work_on_a_cancelled_ingest_ends(database: Database, settings: Settings) -> None:
    quick = settings.model_copy(update={"lease_s": 0.04})
    held, beat = held_heartbeat(database, quick, threading.Event())
    with beat:
        beat.advance(1)
        with database.session() as session:
            ingest.cancel(session, held.id)

        def is_told() -> bool:
            try:
                beat.advance(1)
            except LeaseLost:
                return True
            return False

        assert eventually(is_told)


def test_the_heartbeat_outruns_the_lease(database: Database, settings: Settings) -> None:
    quick = settings.model_copy(update={"lease_s": 3.0})
    _, beat = held_heartbeat(database, quick, threading.Event())
    watch, began = ingest.Watch(), time.monotonic()
    with beat:
        while time.monotonic() < began + 1.2 * quick.lease_s:
            assert ingest.claim(database, quick, owner="other", watch=watch) is None
            beat.check()
            time.sleep(0.1)


def test_a_worker_that_is_to_stop_gives_its_ingest_back(
    database: Database, store: PackStore, settings: Settings
) -> None:
    stop = threading.Event()
    held, beat = held_heartbeat(database, settings, stop)
    stop.set()
    with beat, pytest.raises(Stopped):
        beat.advance(1)
    attempt(database, store, settings, held, stop)
    assert final_state(database, held) == ("received", 0)
    assert held.spool.exists()
    again = ingest.claim(database, settings, owner="next")
    assert again is not None
    attempt(database, store, settings, again, threading.Event())
    assert final_state(database, held) == ("committed", 1)


def final_state(database: Database, held: ingest.Claim) -> tuple[str, int]:
    with database.reading() as session:
        found = ingest.read(session, held.id)
    return found.state, found.attempts


def test_a_worker_whose_lease_was_taken_over_commits_nothing(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database)
    queued = queue(database, settings, tar_of_arrays(PICTURES, CLASS_IDS))
    first = ingest.claim(database, settings, owner="first")
    assert first is not None
    lapse(database)
    second = ingest.claim(database, settings, owner="second")
    assert second is not None
    attempt(database, store, settings, first, threading.Event())
    assert generation(database) == 0
    assert second.spool.exists()
    attempt(database, store, settings, second, threading.Event())
    assert generation(database) == 1
    attempt(database, store, settings, first, threading.Event())
    assert generation(database) == 1
    assert final(database, queued).state == "committed"


def test_a_worker_that_fails_after_its_lease_was_taken_over_leaves_the_upload_to_its_successor(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database)
    queued = queue(database, settings, tar_of_arrays(PICTURES, CLASS_IDS))
    paused = ingest.claim(database, settings, owner="paused")
    lapse(database)
    second = ingest.claim(database, settings, owner="second")
    assert paused is not None
    assert second is not None
    late = settings.model_copy(update={"max_ingest_s": 1e-9})
    attempt(database, store, late, paused, threading.Event())
    attempt(database, store, settings, second, threading.Event())
    assert final(database, queued).state == "committed"


def test_the_work_on_a_deleted_buffer_ends(database: Database, store: PackStore, settings: Settings) -> None:
    create(database)
    queue(database, settings, tar_of_arrays(PICTURES, CLASS_IDS))
    held = ingest.claim(database, settings, owner="test")
    assert held is not None
    with database.session() as session:
        buffers.delete(session, "b")
    attempt(database, store, settings, held, threading.Event())
    with database.reading() as session, pytest.raises(NotFound):
        buffers.read(session, "b")
    assert list(store.digests()) == []


def test_a_running_worker_takes_what_comes_and_stops_when_asked(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database)
    stop = threading.Event()
    running = threading.Thread(target=worker.run, args=(settings, stop))
    running.start()
    queued = queue(database, settings, tar_of_arrays(PICTURES, CLASS_IDS))
    assert eventually(lambda: final(database, queued).state == "committed")
    stop.set()
    running.join(PATIENCE_S)
    assert not running.is_alive()


@pytest.mark.services
def test_workers_share_a_queue_in_postgresql(postgres_url: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=postgres_url, worker_poll_s=0.01, grace_s=60)
    settings.make_folders()
    database, stop = Database(settings), threading.Event()
    database.migrate()
    for number in range(4):
        create(database, f"b{number}", budget_bytes=4000)
    workers = [threading.Thread(target=worker.run, args=(settings, stop), daemon=True) for _ in range(3)]
    for one in workers:
        one.start()

    def send(number: int) -> Ingest:
        """Each upload twice at once, under one key."""
        images, class_ids = pictures(number // 2, 20), np.arange(20) % 2 + number // 8
        body = tar_of_arrays(images, class_ids)
        key, options = f"k{number // 2}", IngestOptions(candidates=(25, 75))
        return queue(database, settings, body, buffer=f"b{number // 2 % 4}", task=number // 8, options=options, key=key)

    with ThreadPoolExecutor(8) as pool:
        queued = list(pool.map(send, range(40)))
    assert len({one.id for one in queued}) == 20
    assert eventually(lambda: all(final(database, one).state == "committed" for one in queued))
    stop.set()
    for one in workers:
        one.join(PATIENCE_S)
    store = PackStore(settings.packs_dir)
    collect(database, store, settings.model_copy(update={"grace_s": 0}))
    with database.reading() as session:
        for number in range(4):
            found = buffers.read(session, f"b{number}")
            assert (found.generation, found.tasks) == (5, [0, 1, 2, 3, 4])
            assert 0 < found.used_bytes <= 4000
        named = set(session.scalars(select(PackRow.digest).where(PackRow.until.is_(None))))
    assert {digest for digest, _ in store.digests()} == named
    assert list(settings.spool_dir.iterdir()) == []
    database.close()
