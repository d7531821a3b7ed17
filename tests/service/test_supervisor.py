"""Workers as processes: one upload holds up no other, and whatever happens to a worker, another one goes on.

A pipe that nobody writes to, in the place of an upload, stands for work that never ends and notices nothing.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from engram.errors import StorageFull, TooLarge, from_problem
from engram.schemas import Ingest, IngestOptions
from engram_service import cli, ingest, liveness, supervisor
from engram_service.database import Database
from engram_service.liveness import Identity, Liveness, forget, report
from engram_service.settings import Settings
from engram_service.supervisor import Supervisor
from engram_service.tables import WorkerRow
from tests.contents import create, pictures
from tests.servers import PATIENCE_S, ServiceProcess, ServiceThread, environment, eventually, http
from tests.uploads import final, queue, tar_of_arrays

BODY = tar_of_arrays(pictures(1, 12), np.arange(12) % 3)


def workers(parent: int | None = None) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(parent).children():
        with suppress(psutil.NoSuchProcess):  # killed, and not yet waited for
            if "engram_service.worker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


@contextmanager
def supervised(settings: Settings, **changes: object) -> Iterator[Supervisor]:
    of_test = {"workers": 1, "worker_niceness": 0, "worker_poll_s": 0.02}
    found = Supervisor(settings.model_copy(update={**of_test, **changes}))
    found.start()
    try:
        yield found
    finally:
        found.stop()
    assert workers() == []


def queue_endless(database: Database, settings: Settings, buffer: str) -> Ingest:
    """An upload whose work never ends: opening it waits for ever."""
    spooled = ingest.SpoolFile(settings.spool_dir)
    spooled.write(BODY)
    spooled.seal(None)
    spooled.path.unlink()
    os.mkfifo(spooled.path)
    return ingest.enqueue(database, spooled, buffer=buffer, task=0, options=IngestOptions(), key=None)[0]


def attempts(database: Database, queued: Ingest) -> int:
    """How often the work has been started."""
    return final(database, queued).attempts


def is_committed(database: Database, queued: Ingest) -> bool:
    return final(database, queued).state == "committed"


def cancel(database: Database, queued: Ingest) -> None:
    with database.session() as session:
        ingest.cancel(session, queued.id)


@pytest.mark.slow
def test_an_upload_whose_work_never_ends_holds_up_no_other_and_is_cancelled_within_seconds(
    make_service: Callable[..., ServiceProcess],
) -> None:
    service = make_service(workers=2, lease_s=3600.0)
    database, settings = Database(service.settings), service.settings
    for name in ("slow", "as-slow", "fast"):
        create(database, name)
    slow = queue_endless(database, settings, "slow")
    assert eventually(lambda: attempts(database, slow) == 1)
    fast = queue(database, settings, BODY, buffer="fast")
    assert eventually(lambda: is_committed(database, fast))
    # Now both workers are busy for ever.
    as_slow = queue_endless(database, settings, "as-slow")
    assert eventually(lambda: attempts(database, as_slow) == 1)
    waiting = queue(database, settings, BODY, buffer="fast", task=1)
    busy = workers(service.process.pid)
    with http(service) as web:
        asked = time.monotonic()
        assert web.delete(f"/v1/ingests/{slow.id}").json()["state"] == "cancelled"
        assert eventually(lambda: not all(map(is_alive, busy)))
        assert time.monotonic() - asked < 30  # 2 s, where nothing else is done
        assert eventually(lambda: is_committed(database, waiting))
        # A worker that dies leaves its ingest to the next one at once, whatever the lease.
        for worker in workers(service.process.pid):
            worker.kill()
        assert eventually(lambda: attempts(database, as_slow) == 2)
        web.delete(f"/v1/ingests/{as_slow.id}")
    database.close()


def test_work_that_takes_longer_than_it_may_fails_and_says_so(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "NOTICE_S", 0.3)
    create(database)
    with supervised(settings, max_ingest_s=0.5):
        slow = queue_endless(database, settings, "b")
        assert eventually(lambda: final(database, slow).state == "failed")
    problem = final(database, slow).problem
    assert problem is not None
    assert type(from_problem(problem)) is TooLarge
    assert "more than 0.5 s" in problem["detail"]


@pytest.mark.slow
def test_a_worker_that_gives_no_sign_of_life_is_replaced(database: Database, settings: Settings) -> None:
    create(database)
    with supervised(settings, worker_silent_s=4.0):
        assert eventually(lambda: len(beats(database)) == 1)
        (worker,) = workers()
        worker.send_signal(signal.SIGSTOP)
        queued = queue(database, settings, BODY)
        assert eventually(lambda: is_committed(database, queued))
        assert not is_alive(worker)
        assert eventually(lambda: [*beats(database)] != [])
    assert beats(database) == {}


@pytest.mark.slow
def test_workers_say_when_are_reported_come_after_their_service_and_end_when_it_is_killed(
    make_service: Callable[..., ServiceProcess],
) -> None:
    service = make_service(workers=2, worker_niceness=3)
    database = Database(service.settings)
    create(database)
    assert eventually(lambda: len(beats(database)) == 2)
    found = workers(service.process.pid)
    with database.reading() as session:
        assert set(session.scalars(select(WorkerRow.pid))) == {worker.pid for worker in found}
    assert {worker.nice() for worker in found} == {psutil.Process(service.process.pid).nice() + 3}
    queued = queue(database, service.settings, BODY)
    assert eventually(lambda: is_committed(database, queued))
    service.kill()
    assert eventually(lambda: not any(map(is_alive, found)))
    (line,) = [line for line in service.log.read_text().splitlines() if "committed as generation 1" in line]
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO worker \d+: ingest ", line)
    database.close()


@pytest.mark.slow
def test_workers_beside_another_service_are_supervised_too(settings: Settings, database: Database) -> None:
    create(database)
    command = [sys.executable, "-m", cli.__name__, "worker", "--workers", "1"]
    process = psutil.Popen(command, env=environment(data_dir=settings.data_dir, worker_niceness=0))
    try:
        assert eventually(lambda: len(workers(process.pid)) == 1)
        (first,) = workers(process.pid)
        first.kill()
        queued = queue(database, settings, BODY)
        assert eventually(lambda: is_committed(database, queued))
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    assert beats(database) == {}


@pytest.mark.slow
def test_workers_import_nothing_from_the_folder_in_which_the_service_was_started(
    database: Database, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sqlalchemy.py").write_text("raise SystemExit('not the one of the service')")
    monkeypatch.chdir(tmp_path)
    with supervised(settings):
        assert eventually(lambda: len(beats(database)) == 1)


@pytest.mark.slow
def test_a_database_that_takes_no_reports_does_not_fill_the_log(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[float] = []

    def is_full(*_: object) -> None:
        asked.append(time.monotonic())
        raise StorageFull("there is no room")

    monkeypatch.setattr(supervisor, "LOOK_S", 0.01)
    monkeypatch.setattr(supervisor, "REPORT_S", 0.05)
    monkeypatch.setattr(liveness, "report", is_full)
    began = time.monotonic()
    with supervised(settings):
        assert eventually(lambda: len(asked) > 2)
    assert all(at >= began + number * 0.05 for number, at in enumerate(asked))
    assert [line.message for line in caplog.records if "looked after" in line.message] == [
        "the workers cannot be looked after: there is no room"
    ]


def test_a_worker_command_without_workers_is_refused(settings: Settings) -> None:
    said = CliRunner().invoke(cli.app, ["worker", "--workers", "0", "--data-dir", str(settings.data_dir)])
    assert said.exit_code == 2
    assert "0 workers do no work" in said.output


def test_there_are_two_to_four_workers_unless_a_setting_says_otherwise(tmp_path: Path) -> None:
    assert 2 <= Settings(data_dir=tmp_path).worker_count <= 4
    assert [Settings(data_dir=tmp_path, workers=count).worker_count for count in (0, 1, 9)] == [0, 1, 9]


# Whether workers are alive


def beats(database: Database) -> dict[str, int]:
    with database.reading() as session:
        return {row.name: row.beat for row in session.scalars(select(WorkerRow))}


def problem(database: Database, found: Liveness) -> str | None:
    with database.reading() as session:
        return found.problem(session)


WORKER = Identity("host:1", "host", 1)


def tell(database: Database, *alive: Identity) -> None:
    with database.session() as session:
        report(session, alive)


def test_without_a_worker_that_is_alive_there_is_a_problem(database: Database, settings: Settings) -> None:
    patient, found = Liveness(settings), Liveness(settings.model_copy(update={"worker_silent_s": 1e-9}))
    assert problem(database, patient) is None
    assert "no worker has been alive for" in (problem(database, found) or "")
    tell(database, WORKER)
    assert problem(database, found) is None
    assert "no worker has been alive for" in (problem(database, found) or "")
    tell(database, WORKER, Identity("host:2", "host", 2))
    assert problem(database, found) is None
    assert problem(database, patient) is None
    assert beats(database) == {"host:1": 2, "host:2": 1}
    with database.session() as session:
        forget(session, WORKER)
    assert beats(database) == {"host:2": 1}


def test_workers_are_alive_whatever_the_clock_says(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Liveness(settings)
    tell(database, WORKER)
    real = time.time
    for later_s in (3600, -3600):
        monkeypatch.setattr(time, "time", lambda later_s=later_s: real() + later_s)
        tell(database, WORKER)
        assert problem(database, found) is None


def test_a_service_that_runs_no_workers_does_not_ask_for_any(database: Database, settings: Settings) -> None:
    found = Liveness(settings.model_copy(update={"worker_silent_s": 1e-9, "workers": 0}))
    assert problem(database, found) is None


def test_a_service_whose_workers_are_gone_is_not_ready_and_says_so(
    serve_thread: Callable[..., ServiceThread],
) -> None:
    served = serve_thread(workers=1)
    database = served.state.database
    served.app.state.liveness = Liveness(served.settings.model_copy(update={"worker_silent_s": 1e-9}))
    with http(served) as web:
        assert eventually(lambda: web.get("/readyz").status_code == 503)
        assert "no worker has been alive for" in web.get("/readyz").json()["detail"]
        health = web.get("/healthz")
        assert (health.status_code, health.json()["status"], len(health.json()["problems"])) == (200, "degraded", 1)
        tell(database, WORKER)
        assert web.get("/readyz").status_code == 200
