"""A service is copied while it runs and restored elsewhere: whole, or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import alembic.command
import numpy as np
import psutil
import pytest
from alembic.config import Config
from sqlalchemy import create_engine, select, text, update
from typer.testing import CliRunner, Result

from engram.client import Client
from engram.errors import Conflict, EngramError, NotFound, StripCorrupt
from engram.mirror import Mirror
from engram.schemas import ForkCreate, Ingest
from engram_service import backup, buffers, cli, commit, ingest
from engram_service.app import create_app, open_database
from engram_service.backup import back_up, complete
from engram_service.collect import collect
from engram_service.database import Database, migrations_folder
from engram_service.restore import restore
from engram_service.samples import Sample
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import AuditRow, ExtractorRow, IngestRow, PackRow, SessionRow, TaskRow, TokenRow
from tests.contents import create, fill, pictures
from tests.servers import PATIENCE_S, ServiceProcess, ServiceThread, eventually, http
from tests.uploads import encoded, queue, tar_of_arrays, work_through

pytestmark = pytest.mark.slow

BODY = tar_of_arrays(pictures(7, 4), [7] * 4)
MODEL = b"a model"
SAMPLE = Sample(np.array([1]), np.array([0.5]), [""], [encoded(pictures(1, 1)[0])]).to_bytes()
SAMPLE_SHA256 = hashlib.sha256(SAMPLE).hexdigest()
MODEL_SHA256 = hashlib.sha256(MODEL).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "backups"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Settings:
    """Of a service on another disk, which is empty."""
    return Settings(data_dir=tmp_path / "elsewhere", workers=0)


@pytest.fixture(scope="module")
def prepared(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks, a snapshot of two of them, a waiting upload, an extractor, a token and somebody logged in."""
    settings = Settings(data_dir=shutil.copytree(migrated, tmp_path_factory.mktemp("prepared") / "data"))
    database, store = Database(settings), PackStore(settings.packs_dir)
    create(database)
    for task in range(2):
        fill(database, settings, task, {task: 12})
    commit.fork(database, store, "b", ForkCreate(name="snapshot", frozen=True))
    fill(database, settings, 2, {2: 12})
    queue(database, settings, BODY, task=7)
    (settings.extractors_dir / MODEL_SHA256).write_bytes(MODEL)
    (settings.samples_dir / SAMPLE_SHA256).write_bytes(SAMPLE)
    with database.session() as session:
        session.execute(update(TaskRow).where(TaskRow.task == 1).values(sample=SAMPLE_SHA256))
        shape = [None, 3, 16, 16]
        session.add(ExtractorRow(sha256=MODEL_SHA256, bytes=7, input_shape=shape, dimensions=4, created_at=1.0))
        session.add(
            TokenRow(
                id="t", name="n", secret_sha256="5e" * 32, scope="read", prefix="", created_at=1.0, created_by="admin"
            )
        )
        session.add(SessionRow(id_sha256="cafe" * 16, token_sha256="5e" * 32, created_at=1.0, expires_at=2e9))
    database.close()
    return settings.data_dir


@pytest.fixture
def settings(prepared: Path, tmp_path: Path) -> Settings:
    """Of a service with all of that, in a folder of the test's own."""
    return Settings(data_dir=shutil.copytree(prepared, tmp_path / "data"))


@pytest.fixture
def filled(database: Database) -> Database:
    """Its database."""
    return database


def manifests(database: Database) -> list[dict[str, Any]]:
    with database.reading() as session:
        found = [buffers.manifest(session, each.name) for each in buffers.read_all(session)]
    return [each.model_dump(exclude={"created_at"}) for each in found]


def states(database: Database) -> list[str]:
    with database.reading() as session:
        return list(session.scalars(select(IngestRow.state).order_by(IngestRow.id)))


def seen(database: Database, task: int) -> int:
    with database.reading() as session:
        return sum(row.seen for row in buffers.task(session, "b", task).classes)


def opened(settings: Settings) -> Database:
    return open_database(settings)


def files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def downgrade(file: Path, revision: str) -> None:
    """The database has an older schema."""
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()))
    engine = create_engine(f"sqlite:///{file}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.downgrade(config, revision)
    engine.dispose()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_what_is_restored_is_what_was_there(
    filled: Database, settings: Settings, folder: Path, elsewhere: Settings
) -> None:
    name, made = back_up(filled, settings, folder)
    assert (len(made.packs), len(made.uploads), len(made.extractors), made.damaged) == (3, 1, 1, ())
    found = restore(elsewhere, folder)
    assert (found.name, found.was_outdated, found.left_out) == (name, False, [])
    database = opened(elsewhere)
    try:
        assert manifests(database) == manifests(filled)
        assert (elsewhere.extractors_dir / MODEL_SHA256).read_bytes() == MODEL
        assert (elsewhere.samples_dir / SAMPLE_SHA256).read_bytes() == SAMPLE
        with database.reading() as session:
            (said,) = session.scalars(select(AuditRow).where(AuditRow.action == "service.restore"))
            assert (said.who, said.subject) == ("service", name)
            assert [row.secret_sha256 for row in session.scalars(select(TokenRow))] == ["5e" * 32]
            assert session.scalars(select(SessionRow)).all() == []
        # What was acknowledged is still promised.
        work_through(database, PackStore(elsewhere.packs_dir), elsewhere)
        assert (states(database).count("committed"), seen(database, 7)) == (1 + states(filled).count("committed"), 4)
    finally:
        database.close()


def test_draws_are_the_same_bit_for_bit_and_a_mirror_learns_that_it_is_another_history(
    filled: Database, settings: Settings, folder: Path, elsewhere: Settings, serve_thread: Callable[..., ServiceThread]
) -> None:
    back_up(filled, settings, folder)
    restore(elsewhere, folder)
    before, after = serve_thread(), ServiceThread(elsewhere)
    try:
        with http(before) as one, http(after) as two:
            for query in ("size=9&seed=1", "size=5&strategy=class_balanced", "size=7&strategy=epoch&step=1"):
                path = f"/v1/buffers/b/draw?{query}"
                assert one.get(path).content == two.get(path).content
            tag = one.get("/v1/buffers/b/manifest").headers["etag"]
            again = two.get("/v1/buffers/b/manifest", headers={"If-None-Match": tag})
            assert (again.status_code, again.headers["etag"] != tag) == (200, True)
    finally:
        after.stop()


def test_only_what_is_new_is_copied_again(filled: Database, settings: Settings, folder: Path) -> None:
    back_up(filled, settings, folder)
    packs = {path: path.stat().st_ino for path in folder.glob("packs/*/*")}
    fill(filled, settings, 4, {4: 12})
    _, made = back_up(filled, settings, folder)
    assert len(complete(folder)) == 2
    later = {path: path.stat().st_ino for path in folder.glob("packs/*/*")}
    assert packs.items() < later.items()
    assert len(later) == len(packs) + 1
    assert {path.name for path in later} == set(made.packs)


def test_of_sessions_and_of_what_is_only_kept_nothing_is_in_a_copy(
    filled: Database, settings: Settings, folder: Path, elsewhere: Settings
) -> None:
    kept = queue(filled, settings, BODY, task=8)
    with filled.session() as session:
        ingest.cancel(session, kept.id)
    name, made = back_up(filled, settings, folder)
    assert kept.id not in made.uploads
    assert sorted(path.name for path in (folder / name).iterdir()) == ["backup.json", "engram.sqlite"]
    assert b"cafe" * 16 not in (folder / name / "engram.sqlite").read_bytes()
    copied = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
    assert {path.stat().st_mode & 0o077 for path in (folder, *copied)} == {0}
    restore(elsewhere, folder)
    database = opened(elsewhere)
    with database.reading() as session:
        assert not ingest.read(session, kept.id).can_retry
    database.close()


def test_older_generations_stay_behind(
    filled: Database, store: PackStore, settings: Settings, folder: Path, elsewhere: Settings
) -> None:
    commit.reshare(filled, store, "b", without_task=2)
    _, made = back_up(filled, settings, folder)
    assert len(made.packs) == 2
    restore(elsewhere, folder)
    database = opened(elsewhere)
    with database.reading() as session:
        with pytest.raises(NotFound):
            buffers.manifest(session, "b", 3)
        assert buffers.manifest(session, "b", 4).packs == buffers.manifest(session, "b").packs
    database.close()


def test_what_is_collected_before_it_was_copied_makes_the_rows_be_copied_again(
    filled: Database, store: PackStore, settings: Settings, folder: Path, elsewhere: Settings
) -> None:
    calls: list[int] = []

    def meanwhile(done: int, _: int) -> None:
        calls.append(done)
        if len(calls) <= 2:
            # All packs that the rows name but the snapshot's are removed: grace is over at once.
            for task in (0, 1, 2):
                with suppress(NotFound):
                    commit.reshare(filled, store, "b", without_task=task)
            fill(filled, settings, 10 + len(calls), {3: 5 + len(calls)})
            collect(filled, store, settings.model_copy(update={"grace_s": 0.0, "retired_bytes": 0}))

    back_up(filled, settings, folder, progress=meanwhile)
    assert calls.count(0) > 1
    assert len(complete(folder)) == 1
    restore(elsewhere, folder)
    database = opened(elsewhere)
    assert manifests(database) == manifests(filled)
    database.close()


def test_an_upload_that_is_committed_during_the_backup_is_in_it_as_one_or_the_other(
    filled: Database, store: PackStore, settings: Settings, folder: Path, elsewhere: Settings
) -> None:
    def meanwhile(done: int, _: int) -> None:
        if done == 0:
            work_through(filled, store, settings)

    back_up(filled, settings, folder, progress=meanwhile)
    assert seen(filled, 7) == 4
    restore(elsewhere, folder)
    database = opened(elsewhere)
    work_through(database, PackStore(elsewhere.packs_dir), elsewhere)
    assert seen(database, 7) == 4
    database.close()


def test_only_the_newest_copies_stay_and_what_they_need(
    filled: Database, store: PackStore, settings: Settings, folder: Path, elsewhere: Settings
) -> None:
    first, made = back_up(filled, settings, folder, keep=2)
    commit.reshare(filled, store, "b", without_task=2)
    (gone,) = set(made.packs) - set(back_up(filled, settings, folder, keep=2)[1].packs)
    work_through(filled, store, settings)
    assert list(folder.glob(f"packs/*/{gone}"))
    third, _ = back_up(filled, settings, folder, keep=2)
    assert complete(folder)[-1] == third
    assert first not in complete(folder)
    assert not list(folder.glob(f"packs/*/{gone}"))
    assert list(folder.glob("uploads/*")) != []
    back_up(filled, settings, folder, keep=1)
    assert complete(folder) == [name for name in complete(folder) if name > third]
    assert list(folder.glob("uploads/*")) == []
    restore(elsewhere, folder)


def test_a_copy_without_its_list_is_none_and_the_next_backup_removes_it(
    filled: Database, settings: Settings, folder: Path, elsewhere: Settings
) -> None:
    name, _ = back_up(filled, settings, folder)
    (folder / name / "backup.json").unlink()
    (folder / "packs" / "ab").mkdir(exist_ok=True)
    (folder / "packs" / "ab" / ".abab.0.tmp").write_bytes(b"half")
    for wanted in (None, name):
        with pytest.raises(NotFound, match="no complete backup"):
            restore(elsewhere, folder, name=wanted)
    assert not elsewhere.data_dir.exists()
    again, _ = back_up(filled, settings, folder)
    assert {path.name for path in folder.iterdir()} == {again, "packs", "uploads", "extractors", "samples"}
    assert not list(folder.rglob("*.tmp"))


def test_a_pack_that_is_damaged_is_left_out_and_named_unless_an_earlier_copy_has_it(
    filled: Database, store: PackStore, settings: Settings, folder: Path, elsewhere: Settings
) -> None:
    back_up(filled, settings, folder)
    digest = manifests(filled)[0]["packs"][0]["digest"]
    store.path(digest).write_bytes(b"rotten")
    assert back_up(filled, settings, folder)[1].damaged == ()
    other = folder.with_name("other")
    done = run("backup", other, "--data-dir", settings.data_dir)
    assert done.exit_code == 1
    assert f"damaged, left out: packs/{digest[:2]}/{digest}" in done.stderr
    found = restore(elsewhere, other)
    assert found.left_out == [f"packs/{digest[:2]}/{digest}"]
    service = ServiceThread(elsewhere)
    try:
        with http(service) as client:
            assert client.get("/v1/buffers/b/draw?size=30").status_code == 200
            assert client.get("/healthz").json()["damaged_packs"] == [digest]
    finally:
        service.stop()


def test_a_pack_without_a_file_does_not_keep_the_rest_from_being_backed_up(
    filled: Database, store: PackStore, settings: Settings, folder: Path
) -> None:
    digest = manifests(filled)[0]["packs"][0]["digest"]
    store.path(digest).unlink()
    _, made = back_up(filled, settings, folder)
    assert made.damaged == (f"packs/{digest[:2]}/{digest}",)


def test_a_bad_sector_does_not_keep_the_rest_from_being_backed_up(
    filled: Database, store: PackStore, settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = manifests(filled)[0]["packs"][0]["digest"]
    read = backup.copy

    def fail(source: Any, target: Path, file: backup.File) -> None:
        read(BadSector() if file.sha256 == digest else source, target, file)

    monkeypatch.setattr(backup, "copy", fail)
    _, made = back_up(filled, settings, folder)
    assert made.damaged == (f"packs/{digest[:2]}/{digest}",)
    assert not list(folder.rglob("*.tmp"))


class BadSector(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


def test_more_uploads_may_wait_than_a_process_may_have_files_open(
    filled: Database, settings: Settings, folder: Path
) -> None:
    for number in range(600):
        (settings.spool_dir / f"{number:032x}.tar").write_bytes(b"")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
    try:
        assert len(back_up(filled, settings, folder)[1].uploads) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_newest_copy_is_the_last_one_made_whatever_the_clock_says(
    filled: Database, settings: Settings, folder: Path
) -> None:
    ahead, _ = back_up(filled, settings, folder)
    (folder / ahead).rename(folder / "2099-01-01T00-00-00.999Z")
    last, _ = back_up(filled, settings, folder, keep=1)
    assert complete(folder) == [last] == ["2099-01-01T00-00-01.000Z"]


@pytest.mark.parametrize("what", ["packs/*/*", "uploads/*", "extractors/*", "samples/*", "*/engram.sqlite"])
@pytest.mark.parametrize("how", ["changed", pytest.param("missing", marks=pytest.mark.slow)])
def test_a_damaged_copy_is_not_restored(
    filled: Database, settings: Settings, folder: Path, elsewhere: Settings, what: str, how: str
) -> None:
    back_up(filled, settings, folder)
    path = next(iter(folder.glob(what)))
    if how == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    of_the_disk = elsewhere.data_dir / "lost+found"
    of_the_disk.mkdir(parents=True)
    with pytest.raises(StripCorrupt, match=path.name):
        restore(elsewhere, folder)
    assert list(elsewhere.data_dir.iterdir()) == [of_the_disk]
    if "sqlite" not in what:
        assert restore(elsewhere, folder, leave_out_damaged=True).left_out == [str(path.relative_to(folder))]


def test_nothing_is_restored_over_anything(
    filled: Database, settings: Settings, folder: Path, elsewhere: Settings
) -> None:
    back_up(filled, settings, folder)
    before = files(settings.data_dir)
    with pytest.raises(Conflict, match="not empty"):
        restore(settings, folder)
    assert files(settings.data_dir) == before
    elsewhere.data_dir.mkdir()
    (elsewhere.data_dir / "lost+found").mkdir()
    restore(elsewhere, folder)
    with pytest.raises(Conflict, match="not empty"):
        restore(elsewhere, folder)


@pytest.mark.parametrize("when", [0, 3])
def test_a_restore_that_was_cut_short_leaves_nothing_that_a_service_starts_on(
    filled: Database, settings: Settings, folder: Path, elsewhere: Settings, when: int
) -> None:
    back_up(filled, settings, folder)

    def die(done: int, of: int) -> None:
        if done == when:
            os._exit(9)

    child = os.fork()
    if child == 0:
        restore(elsewhere, folder, progress=die)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    with pytest.raises(EngramError, match="is under way or was cut short"):
        create_app(elsewhere)


def test_a_copy_of_an_older_version_is_migrated_and_one_of_a_newer_version_refused(
    filled: Database, settings: Settings, folder: Path, elsewhere: Settings
) -> None:
    name, _ = back_up(filled, settings, folder)
    rows, listed = folder / name / "engram.sqlite", folder / name / "backup.json"

    def rewrite(*statements: str) -> None:
        with closing(sqlite3.connect(rows)) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()
        digest = hashlib.sha256(rows.read_bytes()).hexdigest()
        listed.write_text(json.dumps(json.loads(listed.read_text()) | {"database_sha256": digest}))

    with filled.reading() as session:
        current = session.scalar(text("SELECT version_num FROM alembic_version"))
    rewrite("UPDATE alembic_version SET version_num = 'later'")
    with pytest.raises(Conflict, match="does not know"):
        restore(elsewhere, folder)
    assert list(elsewhere.data_dir.iterdir()) == []
    rewrite(f"UPDATE alembic_version SET version_num = '{current}'")
    downgrade(rows, "0004")
    rewrite()
    done = run("restore", folder, "--data-dir", elsewhere.data_dir)
    assert done.exit_code == 0, done.stderr
    assert "its schema is this version's now" in done.stdout
    database = opened(elsewhere)
    assert manifests(database) == manifests(filled)
    database.close()
    listed.write_text(json.dumps(json.loads(listed.read_text()) | {"format": 2}))
    with pytest.raises(Conflict, match="made by a newer one"):
        restore(elsewhere, folder, name=name)


def test_names_in_a_list_lead_nowhere_else(
    filled: Database, settings: Settings, folder: Path, elsewhere: Settings
) -> None:
    name, _ = back_up(filled, settings, folder)
    listed = folder / name / "backup.json"
    said = json.loads(listed.read_text())
    for hostile in ({"uploads": {"../../x": [MODEL_SHA256, 7]}}, {"packs": {"../x": 1}}, {"extractors": {"/x": 1}}):
        listed.write_text(json.dumps(said | hostile))
        with pytest.raises(Conflict):
            restore(elsewhere, folder)


def test_a_backup_belongs_elsewhere_and_one_is_made_at_a_time(
    filled: Database, settings: Settings, folder: Path
) -> None:
    for place in (settings.data_dir, settings.data_dir / "backups", settings.data_dir.parent):
        with pytest.raises(Conflict, match="lie in one another"):
            back_up(filled, settings, place)
    folder.mkdir()
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(Conflict, match="another backup"):
        back_up(filled, settings, folder)
    os.close(held)
    back_up(filled, settings, folder)


def test_the_commands_say_what_they_did(filled: Database, settings: Settings, folder: Path, tmp_path: Path) -> None:
    nothing = run("backup", folder, "--data-dir", tmp_path / "nothing")
    assert (nothing.exit_code, nothing.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "nothing").exists()
    done = run("backup", folder, "--data-dir", settings.data_dir, "--keep", 3)
    assert done.exit_code == 0, done.stderr
    name = complete(folder)[0]
    assert done.stdout.startswith(f"backup {name}: 3 packs of ")
    restored = run("restore", folder, "--data-dir", tmp_path / "again", "--name", name)
    assert restored.stdout.startswith(f"backup {name} is restored to {tmp_path / 'again'}: 3 packs\n"), restored.stderr
    assert "1 tokens hold as they did at " in restored.stdout
    assert run("restore", folder, "--data-dir", tmp_path / "again").exit_code == 2
    assert run("restore", tmp_path, "--data-dir", tmp_path / "third").exit_code == 2


def test_a_backup_that_never_catches_up_gives_up_and_leaves_earlier_ones_alone(
    filled: Database, store: PackStore, settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = back_up(filled, settings, folder)
    monkeypatch.setattr(backup, "ROUNDS", 3)
    rounds: list[int] = []

    def meanwhile(done: int, _: int) -> None:
        if done == 0:
            rounds.append(len(rounds))
            fill(filled, settings, 20 + len(rounds), {20 + len(rounds): 6})
            collect(filled, store, settings.model_copy(update={"grace_s": 0.0, "retired_bytes": 0}))
            with filled.reading() as session:
                live = set(session.scalars(select(PackRow.digest)))
            for digest, _age_s in store.digests():
                if digest in live and not list(folder.glob(f"packs/*/{digest}")):
                    store.path(digest).unlink()

    fill(filled, settings, 19, {19: 6})
    with pytest.raises(EngramError, match="in each of 3 rounds"):
        back_up(filled, settings, folder, progress=meanwhile)
    assert len(rounds) == 3
    assert complete(folder) == [name]


def kill(service: ServiceProcess) -> None:
    """The service and its workers, as a power cut would."""
    children = psutil.Process(service.process.pid).children(recursive=True)
    service.process.kill()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            os.kill(child.pid, signal.SIGKILL)
    service.process.wait(PATIENCE_S)


@pytest.mark.slow
def test_the_drill_a_service_under_load_is_backed_up_killed_and_restored_elsewhere(
    make_service: Callable[..., ServiceProcess], folder: Path, tmp_path: Path
) -> None:
    service = make_service()
    ended = threading.Event()
    acknowledged: list[Ingest] = []
    drawn: list[bytes] = []

    def upload() -> None:
        with Client(service.url) as client:
            while not ended.is_set():
                number = len(acknowledged)
                sent = client.upload(
                    "b", number % 5, pictures(number, 8), [number % 5] * 8, idempotency_key=str(number)
                )
                acknowledged.append(sent)
                # A few wait at any time.
                eventually(lambda: client.ingest(acknowledged[-3:][0]).state == "committed" or ended.is_set())

    def draw() -> None:
        with http(service) as client:
            while not ended.is_set():
                answer = client.get(f"/v1/buffers/b/draw?size=8&seed={len(drawn)}")
                if answer.status_code == 200:
                    drawn.append(answer.content)

    with Client(service.url) as client:
        client.create_buffer("b", budget_bytes=20_000, quality=50)
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(upload), pool.submit(draw)]
            assert eventually(lambda: len(drawn) > 3 and len(acknowledged) > 8)
            before = list(acknowledged)
            done = run("backup", folder, "--data-dir", service.settings.data_dir)
            during = len(drawn)
            assert eventually(lambda: len(drawn) > during)
            ended.set()
            for one in running:
                one.result()
        assert done.exit_code == 0, done.stderr
        restored = tmp_path / "restored"
        assert run("restore", folder, "--data-dir", restored).exit_code == 0
        database = Database(Settings(data_dir=restored))
        with database.reading() as session:
            generation = buffers.read(session, "b").generation
            known = {row.id: row.state for row in session.scalars(select(IngestRow))}
        database.close()
        manifest = client.manifest("b", generation=generation)
        draws = [client.draw("b", 8, seed=seed, generation=generation).images.tobytes() for seed in range(3)]
        mirror = Mirror(client, "b", tmp_path / "mirror")
    kill(service)
    made = backup.read(folder, complete(folder)[0])
    # Whatever was acknowledged when the backup began is in it: committed, or waiting with its upload.
    assert {one.id for one in before} <= set(known)
    assert {name for name, state in known.items() if state != "committed"} == set(made.uploads)
    again = make_service(data_dir=restored, grace_s=600)
    with Client(again.url) as client:
        same = client.manifest("b", generation=generation)
        assert same.model_copy(update={"created_at": manifest.created_at}) == manifest
        assert draws == [client.draw("b", 8, seed=seed, generation=generation).images.tobytes() for seed in range(3)]
        for name in known:
            client.wait(name, timeout_s=PATIENCE_S)
        assert sum(row.seen for task in client.buffer("b").tasks for row in client.task("b", task).classes) == 8 * len(
            known
        )
        # The same upload once more is the same ingest still.
        assert client.upload("b", 0, pictures(0, 8), [0] * 8, idempotency_key="0").id == before[0].id
        other = Mirror(client, "b", tmp_path / "mirror")
        assert other.draw(8).images.tobytes() == client.draw("b", 8).images.tobytes()
    assert mirror.generation >= generation
