"""Metrics count what happened in every process, stay within bounds, and cost next to nothing."""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import insert, update

from engram.errors import BadUpload
from engram_service import __version__, ingest, metrics, tallies
from engram_service.database import Database
from engram_service.metrics import BUCKETS_S, Requests
from engram_service.storage import PackStore
from engram_service.tables import BufferRow, IngestRow, PackRow, TaskRow, WorkerRow
from tests.contents import create, fill, pictures
from tests.servers import ServiceProcess, ServiceThread, eventually, http
from tests.uploads import final, queue, tar_of_arrays, work_through

pytestmark = pytest.mark.slow

BODY = tar_of_arrays(pictures(1, 12), np.arange(12) % 3)

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(client: httpx.Client) -> Samples:
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"engram_{name}", frozenset(labels.items())))


def labels_of(samples: Samples, name: str) -> set[str]:
    return {value for (found, labels) in samples for _, value in labels if found == f"engram_{name}"}


def test_requests_are_counted_and_timed_by_template_and_class_of_status(
    client: httpx.Client, served: ServiceThread
) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 5})
    for step in range(3):
        assert client.get(f"/v1/buffers/b/draw?size=2&step={step}").status_code == 200
    client.head("/v1/buffers/b/draw?size=2")
    client.get("/v1/buffers/none/draw?size=2")
    client.get("/v1/nowhere/" + "x" * 50)
    client.request("PROPFIND", "/v1/buffers")
    found = scrape(client)
    draw = "/v1/buffers/{buffer}/draw"
    assert value(found, "http_requests_total", route=draw, method="GET", status="2xx") == 3
    assert value(found, "http_requests_total", route=draw, method="HEAD", status="2xx") == 1
    assert value(found, "http_requests_total", route=draw, method="GET", status="4xx") == 1
    assert value(found, "http_requests_total", route="other", method="GET", status="4xx") == 1
    assert value(found, "http_requests_total", route="/v1/buffers", method="other", status="4xx") == 1
    assert value(found, "http_request_duration_seconds_count", route=draw) == 5
    assert value(found, "http_request_duration_seconds_bucket", route=draw, le="+Inf") == 5
    assert value(found, "http_requests_in_flight") == 1
    assert value(found, "http_connections") == 1
    assert value(found, "ready") == 1
    assert value(found, "build_info", version=__version__, python=platform.python_version()) == 1
    assert found["process_resident_memory_bytes", frozenset()] > 10**6
    text = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}).text
    assert len([*parse_openmetrics(text)]) > 20  # type: ignore[no-untyped-call]


def test_times_fall_into_their_buckets() -> None:
    requests = Requests()
    for seconds in (0.0001, 0.0003, 0.0004, 1.0, 1000.0):
        requests.count({"method": "GET"}, 200, seconds)
    *counts, total = requests.series["other", "GET", 2]
    assert [counts[0], counts[1], counts[BUCKETS_S.index(1)], counts[-1], sum(counts)] == [2, 1, 1, 1, 5]
    assert total == pytest.approx(1001.0008)


def test_what_buffers_hold_and_draws_serve_is_told_for_each(client: httpx.Client, served: ServiceThread) -> None:
    database = served.state.database
    create(database, "a", budget_bytes=10**5)
    create(database, "b")
    for task in range(2):
        fill(database, served.settings, task, {task: 5}, name="b")
    bodies = [client.get(f"/v1/buffers/b/draw?size=4&step={step}").content for step in range(3)]
    found, buffer = scrape(client), client.get("/v1/buffers/b").json()
    for name in ("used_bytes", "limit_bytes", "exemplars", "generation", "quality"):
        assert value(found, f"buffer_{name}", buffer="b") == buffer[name], name
    assert value(found, "buffer_tasks", buffer="b") == 2
    assert value(found, "buffer_used_bytes", buffer="a") == 0
    assert value(found, "buffer_quality", buffer="a") == 50
    assert value(found, "draws_total", buffer="b") == 3
    assert value(found, "draw_exemplars_total", buffer="b") == 12
    assert value(found, "draw_bytes_total", buffer="b") == sum(map(len, bodies))
    assert value(found, "draw_damaged_exemplars_total", buffer="b") == 0
    assert value(found, "buffers") == 2
    assert value(found, "disk_bytes", part="live") == buffer["used_bytes"]
    assert (value(found, "disk_free_bytes") or 0) > 0
    client.delete("/v1/buffers/b")
    assert labels_of(scrape(client), "draws_total") == set()


def test_the_choice_of_quality_and_its_ratio_are_told(client: httpx.Client, served: ServiceThread) -> None:
    database = served.state.database
    create(database, quality=None, budget_bytes=10**6)
    images = pictures(3, 120)
    queue(database, served.settings, tar_of_arrays(images, np.arange(120) % 2))
    work_through(database, served.state.store, served.settings)
    decision = client.get("/v1/buffers/b/tasks/0").json()["decision"]
    chosen = next(each for each in decision["candidates"] if each["quality"] == decision["quality"])
    for _ in range(2):
        found = scrape(client)
        assert value(found, "buffer_quality", buffer="b") == decision["quality"]
        assert value(found, "buffer_decision_ratio", buffer="b") == pytest.approx(
            chosen["ratio"][decision["definition"]]
        )


def test_ingests_are_counted_as_they_end_however_they_end_and_after_their_buffer_is_gone(
    client: httpx.Client, served: ServiceThread
) -> None:
    database, settings = served.state.database, served.settings
    create(database)
    queue(database, settings, BODY)
    queue(database, settings, b"no tar", task=1)
    waiting = queue(database, settings, BODY, task=2)
    found = scrape(client)
    assert value(found, "ingests", state="received") == 3
    assert value(found, "ingest_oldest_seconds") is not None
    with database.session() as session:
        ingest.cancel(session, waiting.id)
        ingest.cancel(session, waiting.id)
    work_through(database, served.state.store, settings)
    endless = queue(database, settings, BODY, task=3)
    with database.session() as session:
        session.execute(update(IngestRow).where(IngestRow.id == endless.id).values(attempts=settings.max_attempts))
    assert ingest.claim(database, settings, owner="test") is None
    assert final(database, endless).state == "failed"
    client.delete("/v1/buffers/b")
    found = scrape(client)
    ended = {state: value(found, "ingests_ended_total", state=state) for state in ingest.FINAL}
    assert ended == {"committed": 1, "failed": 2, "cancelled": 1}
    assert value(found, "ingest_failures_total", problem=BadUpload.slug) == 1
    assert value(found, "ingest_failures_total", problem="internal-error") == 1
    assert value(found, "ingest_working_seconds_count") == value(found, "ingest_waiting_seconds_count") == 2
    assert value(found, "ingest_working_seconds_bucket", le="+Inf") == 2
    assert value(found, "ingests", state="received") == 0


def test_a_time_that_runs_backwards_or_a_problem_of_another_version_breaks_no_tally(database: Database) -> None:
    create(database)
    now = time.time()
    row = {
        "buffer": "b",
        "task": 0,
        "state": "failed",
        "body_sha256": "",
        "body_bytes": 0,
        "options": {},
        "created_at": now + 100,
        "started_at": now + 50,
        "updated_at": now,
    }
    with database.session() as session:
        session.execute(
            insert(IngestRow),
            [
                row | {"id": "1", "problem": {"type": "about:blank\n{evil}"}},
                row | {"id": "2", "problem": None},
            ],
        )
        for name in "12":
            tallies.ingest_ended(session, name)
    with database.reading() as session:
        found = tallies.read(session)
    assert found["problems"] == {"internal-error": 2}
    assert found["waiting_s"] == {"sum": 0.0, "0.1": 2.0}
    assert found["working_s"] == {"sum": 0.0, "0.1": 2.0}


def test_damaged_packs_are_told(client: httpx.Client, served: ServiceThread) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 5})
    fill(served.state.database, served.settings, 1, {0: 5})
    assert value(scrape(client), "damaged_packs") == 0
    digest = client.get("/v1/buffers/b/manifest").json()["packs"][0]["digest"]
    served.state.store.delete(digest)
    assert client.get("/v1/buffers/b/draw?size=10&strategy=epoch").headers["Engram-Damaged"] == "5"
    found = scrape(client)
    assert value(found, "damaged_packs") == 1
    assert value(found, "draw_damaged_exemplars_total", buffer="b") == 5
    assert value(found, "draw_exemplars_total", buffer="b") == 5


def test_workers_are_alive_while_their_counters_move(client: httpx.Client, served: ServiceThread) -> None:
    database, told = served.state.database, served.state.metrics
    at = {"host": "h", "pid": 1, "started_at": 0.0, "seen_at": 0.0}
    with database.session() as session:
        session.execute(insert(WorkerRow), [{"name": name, "beat": 1} | at for name in ("moves", "stands")])
    assert value(scrape(client), "workers") == 2
    # Since long ago, by the stopwatch of the service.
    told._beats = {name: (beat, since - 1000) for name, (beat, since) in told._beats.items()}
    with database.session() as session:
        session.execute(update(WorkerRow).where(WorkerRow.name == "moves").values(beat=2))
    assert value(scrape(client), "workers") == 1


def test_names_cannot_break_the_format_and_no_label_comes_from_a_request(
    client: httpx.Client, served: ServiceThread
) -> None:
    database = served.state.database
    evil = 'x"} 1\nengram_buffers 7\\<script>\x00\x1b'
    with database.session() as session:
        session.execute(
            insert(BufferRow),
            [
                {
                    "name": evil,
                    "budget_bytes": 1,
                    "per": "buffer",
                    "share_by": "class",
                    "subsampling": "4:2:0",
                    "created_at": 1.0,
                }
            ],
        )
    for path in (f"/v1/buffers/{'%0A%22'}", "/%00", "/v1/ingests/%22%7D", "/v1/buffers/x%0Ay/draw?size=1"):
        client.get(path)
    found = scrape(client)
    assert value(found, "buffers") == 1
    assert value(found, "buffer_limit_bytes", buffer=evil) == 1
    routes = labels_of(found, "http_requests_total") - {"GET", "4xx", "2xx", "other"}
    described = client.get("/openapi.json").json()["paths"]
    assert routes <= described.keys()


def test_a_database_that_does_not_answer_leaves_the_other_metrics(
    client: httpx.Client, served: ServiceThread, caplog: pytest.LogCaptureFixture
) -> None:
    served.settings.data_dir.joinpath("engram.sqlite").rename(served.settings.data_dir / "elsewhere")
    found = scrape(client)
    assert value(found, "ready") == 0
    assert value(found, "buffers") is None
    assert value(found, "http_connections") == 1


def many_buffers(database: Database, buffers: int, tasks: int) -> None:
    """Rows alone: nothing is on disk."""
    decision = {
        "quality": 50,
        "reason": "r",
        "definition": "raw",
        "rule": "any",
        "epsilon": 0.3,
        "block": 32,
        "blocks": {},
        "delta": 0.0,
        "ranking": "herding",
        "embedder": "builtin",
        "images": 1,
        "candidates": [
            {
                "quality": quality,
                "exemplars": 1,
                "classes": 10,
                "bytes": 1,
                "ratio": {"raw": 1.25, "per_sample": 1.0, "log_ratio": 1.0},
                "passes": True,
                "gaps": {str(class_id): 0.5 for class_id in range(10)},
                "singular_classes": [],
            }
            for quality in (10, 25, 50, 75, 90)
        ],
    }
    names = [f"buffer-{number:04d}" for number in range(buffers)]
    made = {"per": "class", "share_by": "class", "subsampling": "4:2:0", "created_at": 1.0, "quality": 50}
    runs = [[class_id, 50] for class_id in range(10)]
    pack = {"bytes": 10_000, "exemplars": 500, "quality": 50, "runs": runs, "class_bytes": [900] * 10, "since": 0}
    seen = {str(class_id): 500 for class_id in range(10)}
    with database.session() as session:
        session.execute(insert(BufferRow), [made | {"name": name, "budget_bytes": 10**6} for name in names])
        session.execute(
            insert(TaskRow),
            [
                {"buffer": name, "task": task, "seen": seen, "decision": decision}
                for name in names
                for task in range(tasks)
            ],
        )
        session.execute(
            insert(PackRow),
            [
                pack | {"buffer": name, "task": task, "digest": f"{at:032d}{task:032d}"}
                for at, name in enumerate(names)
                for task in range(tasks)
            ],
        )


def test_of_many_buffers_the_first_have_series_and_the_page_stays_cheap(
    client: httpx.Client, served: ServiceThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_buffers(served.state.database, 200, 5)
    monkeypatch.setattr(metrics, "MAX_BUFFERS", 150)
    found = scrape(client)
    assert value(found, "buffers") == 200
    assert len(labels_of(found, "buffer_used_bytes")) == 150
    assert value(found, "buffer_used_bytes", buffer="buffer-0149") == 50_000
    assert value(found, "buffer_limit_bytes", buffer="buffer-0000") == 10**7
    assert value(found, "buffer_decision_ratio", buffer="buffer-0000") == 1.25
    assert (
        min(value(scrape(client), "scrape_seconds") or 9.0 for _ in range(3)) < 1.0
    )  # 0.04 s, where nothing else is done


def test_counting_a_request_costs_microseconds() -> None:
    requests, count = Requests(), 20_000
    scope = {"method": "GET"}
    began = time.process_time()
    for _ in range(count):
        requests.count(scope, 200, 0.0004)
    assert (time.process_time() - began) / count < 50e-6  # 1 us, where nothing else is done


@pytest.mark.slow
def test_one_page_has_what_all_processes_did_also_those_that_were_killed(
    make_service: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    first = make_service(workers=2)
    database, settings = Database(first.settings), first.settings
    for name in ("a", "b", "c", "d"):
        create(database, name)
    with http(first) as client:
        for name in ("a", "b", "c"):
            queue(database, settings, BODY, buffer=name)
        assert eventually(lambda: value(scrape(client), "ingests_ended_total", state="committed") == 3)
        assert eventually(lambda: value(scrape(client), "workers") == 2)
        # A worker that is killed has counted what it did, and its attempt is not lost.
        spooled = queue(database, settings, BODY, buffer="d")
        with database.reading() as session:
            pids = [row.pid for row in session.query(WorkerRow)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: final(database, spooled).state == "committed")
        assert value(scrape(client), "ingests_ended_total", state="committed") == 4
        assert client.get("/v1/buffers/a/draw?size=3").status_code == 200
    first.process.kill()
    first.process.wait()
    # A service that starts anew, with workers elsewhere, goes on from there.
    second = make_service("--workers", "0", data_dir=settings.data_dir)
    store = PackStore(settings.packs_dir)
    queue(database, settings, b"no tar", buffer="a", task=1)
    work_through(database, store, settings)
    with http(second) as client:
        found = scrape(client)
        assert value(found, "ingests_ended_total", state="committed") == 4
        assert value(found, "ingests_ended_total", state="failed") == 1
        assert value(found, "draws_total", buffer="a") is None
    database.close()


@pytest.mark.slow
def test_a_page_of_100_buffers_of_20_tasks_takes_less_than_50_ms(served: ServiceThread) -> None:
    many_buffers(served.state.database, 100, 20)
    took = []
    for _ in range(6):
        began = time.thread_time()
        served.state.metrics.page("")
        took.append(time.thread_time() - began)
    assert min(took[1:]) < 0.05, took


def test_settings_choose_who_may_scrape(serve_thread: Callable[..., ServiceThread]) -> None:
    service = serve_thread(admin_token="a" * 32)
    with http(service, "a" * 32) as admin:
        assert admin.get("/metrics").status_code == 200
        reader = admin.post("/v1/tokens", json={"name": "prometheus", "scope": "read"}).json()["token"]
        bounded = admin.post("/v1/tokens", json={"name": "team", "scope": "admin", "prefix": "t-"}).json()["token"]
        for token, status in ((reader, 200), (bounded, 403), ("wrong", 401)):
            with http(service, token) as client:
                assert client.get("/metrics").status_code == status
        page = admin.get("/metrics").text
    for secret in (reader, bounded, "a" * 32):
        assert secret not in page
