"""What is wrong with disk and database is said, by `/healthz`, by `/readyz` and by every request that meets it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from engram_service import cli
from engram_service.database import Database
from engram_service.settings import Settings
from tests.contents import create, fill, pictures
from tests.disks import read_only
from tests.servers import ServiceProcess, ServiceThread, environment, eventually
from tests.uploads import tar_of_arrays

GET = ("/v1/buffers", "/v1/buffers/b", "/v1/buffers/b/manifest", "/v1/buffers/b/draw?size=2", "/v1/ingests/x")


def says(client: httpx.Client) -> tuple[str, int, str]:
    """The status and the problem of `/healthz`, the status of `/readyz`; both say the same."""
    health, ready = client.get("/healthz"), client.get("/readyz")
    assert health.status_code == 200
    problems: list[str] = health.json()["problems"]
    if ready.status_code == 200:
        assert (health.json()["status"], problems) == ("ok", [])
        return "ok", 200, ""
    assert ready.json()["problems"] == problems
    assert ready.json()["detail"] == "; ".join(problems)
    return health.json()["status"], ready.status_code, problems[0]


def upload(client: httpx.Client, task: int = 0) -> httpx.Response:
    body = tar_of_arrays(pictures(task, 4), [0, 1, 0, 1])
    return client.post(f"/v1/buffers/b/tasks/{task}/ingests", content=body)


def overwrite(path: Path) -> None:
    """The middle of the file is noise, as a failing disk leaves it; the write-ahead log is part of the file first."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(100)
        file.write(os.urandom(path.stat().st_size - 100))


def test_a_database_that_becomes_corrupt_is_refused_by_everything_and_said_to_be(
    served: ServiceThread, client: httpx.Client
) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 4})
    assert says(client) == ("ok", 200, "")
    overwrite(served.settings.data_dir / "engram.sqlite")
    served.state.database._check_at = 0.0  # as if the time until the next look at the file had passed
    status, ready, problem = says(client)
    assert (status, ready) == ("degraded", 503)
    assert "engram.sqlite is corrupt" in problem
    assert "put back a backup of the data folder" in problem
    for path in GET:
        answer = client.get(path)
        assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (503, "unavailable"), path
        assert "put back a backup" in answer.json()["detail"]
        assert "Retry-After" in answer.headers
    assert client.post("/v1/buffers", json={"name": "c", "budget_bytes": 1000}).status_code == 503
    assert client.delete("/v1/buffers/b").status_code == 503
    assert upload(client).status_code == 503


def test_a_request_that_meets_the_corruption_makes_the_service_unready_at_once(
    served: ServiceThread, client: httpx.Client
) -> None:
    create(served.state.database)
    assert says(client) == ("ok", 200, "")
    overwrite(served.settings.data_dir / "engram.sqlite")
    served.state.database.engine.dispose()  # what the pool holds may still be right
    assert client.get("/v1/buffers").status_code == 503
    assert says(client)[:2] == ("degraded", 503)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("serve", kind) for kind in ("noise", "cut short", "text", "a damaged page")),
        ("worker", "a damaged page"),
        # A migration that has nothing to do reads no more than the version.
        ("migrate", "noise"),
    ],
)
def test_no_command_starts_on_a_corrupt_database_and_each_says_what_to_do(
    settings: Settings, database: Database, name: str, kind: str
) -> None:
    create(database)
    fill(database, settings, 0, {0: 4})
    database.close()
    path = settings.data_dir / "engram.sqlite"
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "noise": os.urandom(len(whole)),
            "cut short": whole[:-8192],
            "text": b"not a database" * 1000,
            "a damaged page": whole[:middle] + b"\xff" * 4096 + whole[middle + 4096 :],
        }[kind]
    )
    ended = CliRunner().invoke(cli.app, [name, "--data-dir", str(settings.data_dir), *PORT[name]])
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("engram-service: the database")
    assert "corrupt" in ended.stderr
    assert "put back a backup of the data folder" in ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr


PORT = {"serve": ["--port", "0"], "worker": [], "migrate": []}


@pytest.mark.slow
def test_a_service_that_cannot_start_exits_with_2_and_no_traceback(settings: Settings) -> None:
    (settings.data_dir / "engram.sqlite").write_bytes(b"not a database" * 1000)
    command = [sys.executable, "-m", "engram_service.cli", "serve", "--port", "0"]
    given = environment(data_dir=settings.data_dir)
    ended = subprocess.run(command, env=given, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("engram-service: the database")


@pytest.mark.parametrize("how", ["gone", "replaced"])
def test_a_database_that_is_taken_away_acknowledges_nothing(
    served: ServiceThread, client: httpx.Client, how: str
) -> None:
    create(served.state.database)
    path = served.settings.data_dir / "engram.sqlite"
    if how == "replaced":
        shutil.copy(path, path.with_name("other"))
        path.with_name("other").replace(path)
    else:
        path.unlink()
    assert client.post("/v1/buffers", json={"name": "c", "budget_bytes": 1000}).status_code == 503
    assert upload(client).status_code == 503
    status, ready, problem = says(client)
    assert (status, ready) == ("degraded", 503)
    assert "engram.sqlite" in problem
    assert how in problem
    # Nothing made an empty one in its place.
    assert path.exists() == (how == "replaced")


def test_an_empty_database_is_not_made_beside_packs_that_it_would_collect(
    settings: Settings, database: Database
) -> None:
    create(database)
    fill(database, settings, 0, {0: 4})
    database.close()
    for path in settings.data_dir.glob("engram.sqlite*"):
        path.unlink()
    ended = CliRunner().invoke(cli.app, ["serve", "--data-dir", str(settings.data_dir), "--port", "0"])
    assert ended.exit_code == 2
    assert "there are packs" in ended.stderr
    assert "put back a backup" in ended.stderr


@pytest.mark.parametrize("part", ["packs", "spool", "extractors", "."])
def test_a_data_folder_that_is_missing_is_said_and_never_a_defect(
    served: ServiceThread, client: httpx.Client, part: str
) -> None:
    create(served.state.database)
    shutil.rmtree(served.settings.data_dir / part)
    status, ready, problem = says(client)
    assert (status, ready) == ("degraded", 503)
    assert str(served.settings.data_dir / part) in problem
    assert "missing" in problem
    answers: dict[str, Any] = {
        "upload": upload(client),
        "extractor": client.put(f"/v1/extractors/{'0' * 64}", content=b"x"),
        "list": client.get("/v1/buffers"),
    }
    assert {name: answer.text for name, answer in answers.items() if answer.status_code == 500} == {}
    if part in ("spool", "."):
        assert answers["upload"].status_code == 503


def test_a_read_only_data_folder_is_said_and_never_a_defect(served: ServiceThread, client: httpx.Client) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 4})
    with read_only(served.settings.data_dir):
        status, ready, problem = says(client)
        assert (status, ready) == ("degraded", 503)
        assert "read-only" in problem
        refused = [upload(client), client.put(f"/v1/extractors/{'0' * 64}", content=b"x")]
        assert {answer.status_code for answer in refused} == {503}
        # What needs no writing goes on.
        assert client.get("/v1/buffers/b/draw?size=2").status_code == 200
    assert says(client) == ("ok", 200, "")


@pytest.mark.parametrize("name", ["serve", "worker", "migrate"])
def test_no_command_starts_on_a_read_only_folder_and_each_says_so(settings: Settings, name: str) -> None:
    with read_only(settings.data_dir):
        ended = CliRunner().invoke(cli.app, [name, "--data-dir", str(settings.data_dir), *PORT[name]])
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("engram-service: the disk does not")
    assert ended.stderr.count("\n") == 1, ended.stderr


@pytest.mark.slow
def test_a_service_says_what_happened_to_its_folder_while_it_ran(
    make_service: Callable[..., ServiceProcess],
) -> None:
    service = make_service(workers=0)
    with httpx.Client(base_url=service.url) as client:
        assert says(client) == ("ok", 200, "")
        service.data_dir.rename(service.data_dir.with_name("elsewhere"))
        assert says(client)[:2] == ("degraded", 503)
        service.data_dir.with_name("elsewhere").rename(service.data_dir)
        assert eventually(lambda: client.get("/readyz").status_code == 200)
