"""What draws have served is counted by class and by whom, written down, and never in the way of a draw."""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest

from engram import batch
from engram.errors import Forbidden, InvalidRequest, StorageFull
from engram.oversight import ServedList
from engram.schemas import ExemplarPage
from engram_service import acting, buffers, served
from engram_service.acting import Acting, Principal
from engram_service.database import Database
from engram_service.replay import View
from engram_service.served import Amount, Key, Served
from engram_service.settings import Settings
from tests.contents import create, fill
from tests.servers import ServiceProcess, ServiceThread, eventually, http

pytestmark = pytest.mark.slow

Counts = Counter[tuple[int, int]]


@pytest.fixture
def filled(served: ServiceThread) -> ServiceThread:
    create(served.state.database)
    for task, counts in enumerate(({0: 20, 1: 10}, {2: 5}, {0: 7, 3: 8})):
        fill(served.state.database, served.settings, task, counts)
    return served


def drawn(client: httpx.Client, query: str) -> Counts:
    """How many exemplars of each (task, class) the answer has."""
    answer = client.get(f"/v1/buffers/b/draw?{query}")
    assert answer.status_code == 200, answer.text
    found = batch.decode(answer.content)
    return Counter(zip(found.tasks.tolist(), found.class_ids.tolist(), strict=True))


def listed(client: httpx.Client, query: str = "") -> ServedList:
    answer = client.get(f"/v1/draws?{query}")
    assert answer.status_code == 200, answer.text
    return ServedList.model_validate_json(answer.content)


def counts(page: ServedList) -> Counts:
    found = Counts()
    for row in page.served:
        found[row.task, row.class_id] += row.exemplars
    return found


@contextmanager
def as_principal(who: str, prefix: str = "") -> Iterator[None]:
    token = acting.ACTING.set(Acting(Principal(who, "read", prefix)))
    try:
        yield
    finally:
        acting.ACTING.reset(token)


def view_of(database: Database, name: str = "b") -> View:
    with database.reading() as session:
        row = buffers.find(session, name)
        held = buffers.packs_to_draw_from(session, name, row.generation)
        return View(name, row.generation, row.created_at, held)


def rows(database: Database, buffer: str | None = None) -> list[tuple[str, str, int, int, int]]:
    with database.reading() as session:
        found = served.page(session, buffer=buffer, limit=10_000, cursor=None).served
    return [(row.buffer, row.who, row.task, row.class_id, row.exemplars) for row in found]


def test_every_exemplar_of_every_kind_of_draw_is_counted_in_its_task_and_class(
    filled: ServiceThread, client: httpx.Client
) -> None:
    wanted = Counts()
    for step in range(3):
        for strategy in ("uniform", "class_balanced", "per_task", "epoch"):
            wanted += drawn(client, f"size=7&step={step}&strategy={strategy}&rank=1&world_size=2")
    wanted += drawn(client, "size=9&tasks=2")
    answer = client.get("/v1/buffers/b/draw?size=6&tasks=1", headers={"Accept": "application/x-tar"})
    assert answer.status_code == 200
    wanted[1, 2] += 6
    filled.state.served.flush()
    page = listed(client)
    assert counts(page) == wanted
    assert {row.buffer for row in page.served} == {"b"}
    assert len({row.who for row in page.served}) == 1
    listing = ExemplarPage.model_validate(client.get("/v1/buffers/b/exemplars?limit=1000").json()).exemplars
    for row in page.served:
        sizes = [each.bytes for each in listing if (each.task, each.class_id) == (row.task, row.class_id)]
        assert row.bytes == pytest.approx(row.exemplars * np.mean(sizes), rel=0.01, abs=1)


def test_what_was_drawn_is_written_down_without_being_asked_for(
    serve_thread: Callable[..., ServiceThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "FLUSH_S", 0.02)
    service = serve_thread()
    create(service.state.database)
    fill(service.state.database, service.settings, 0, {0: 20, 1: 10})
    with http(service) as client:
        wanted = drawn(client, "size=12")
        assert eventually(lambda: counts(listed(client)) == wanted)


def test_requests_that_serve_nothing_count_nothing(filled: ServiceThread, client: httpx.Client) -> None:
    assert client.get("/v1/buffers/b/draw?size=3&tasks=9").status_code == 404
    assert client.get("/v1/buffers/b/draw?size=0").status_code == 422
    assert client.get("/v1/buffers/b/export").status_code == 200
    assert client.get("/v1/buffers/b/manifest").status_code == 200
    filled.state.served.flush()
    assert listed(client).served == []


def test_the_end_of_the_service_writes_down_the_rest_and_the_next_one_counts_on(
    filled: ServiceThread, client: httpx.Client, serve_thread: Callable[..., ServiceThread]
) -> None:
    wanted = drawn(client, "size=12")
    filled.stop()
    again = serve_thread()
    with http(again) as other:
        wanted += drawn(other, "size=5&step=1")
        again.state.served.flush()
        assert counts(listed(other)) == wanted


def test_several_processes_and_threads_add_up(settings: Settings, database: Database) -> None:
    create(database)
    fill(database, settings, 0, {0: 3, 1: 4})
    several = [Database(settings) for _ in range(4)]

    def draw(own: Database) -> None:
        counted = Served(own)
        for round_ in range(10):
            with as_principal(f"trainer {round_ % 2}"):
                counted.note(view_of(own), np.array([0, 1, 1]), 100, 0)
            counted.flush()

    threads = [threading.Thread(target=draw, args=(own,)) for own in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in several:
        own.close()
    assert rows(database) == [
        ("b", "trainer 0", 0, 0, 20),
        ("b", "trainer 0", 0, 1, 40),
        ("b", "trainer 1", 0, 0, 20),
        ("b", "trainer 1", 0, 1, 40),
    ]


def test_what_was_drawn_of_a_buffer_that_is_deleted_meanwhile_is_dropped_and_not_its_successors(
    settings: Settings, database: Database
) -> None:
    counted = Served(database)
    for name in ("b", "c", "stays"):
        create(database, name)
        fill(database, settings, 0, {0: 3}, name=name)
        counted.note(view_of(database, name), np.array([0, 0]), 100, 0)
    with database.session() as session:
        buffers.delete(session, "b")
        buffers.delete(session, "c")
    create(database, "c")
    counted.flush()
    assert rows(database) == [("stays", "service", 0, 0, 2)]
    with database.session() as session:
        buffers.delete(session, "stays")
    assert rows(database) == []


def test_a_database_that_does_not_answer_delays_the_counting_and_fails_no_draw(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create(database)
    fill(database, settings, 0, {0: 3})
    counted, view = Served(database), view_of(database)
    with monkeypatch.context() as broken:
        broken.setattr(served, "write", lambda *_: (_ for _ in ()).throw(StorageFull("no room")))
        for _ in range(3):
            counted.note(view, np.array([0, 0]), 100, 0)
            counted.flush()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]  # said once, not each time
    assert rows(database) == []
    counted.flush()
    assert rows(database) == [("b", "service", 0, 0, 6)]
    counted.flush()
    assert rows(database) == [("b", "service", 0, 0, 6)]


def test_what_cannot_be_written_takes_no_more_than_so_much_memory(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(database)
    fill(database, settings, 0, dict.fromkeys(range(20), 1))
    monkeypatch.setattr(served, "MAX_ROWS", 10)
    monkeypatch.setattr(served, "MAX_SUM_BYTES", 64)
    monkeypatch.setattr(served, "FOLD_EXEMPLARS", 100)
    counted, view = Served(database), view_of(database)
    for _ in range(50):
        counted.note(view, np.arange(20), 100, 0)
        assert counted._noted_exemplars < 100
    assert counted._sum_bytes <= 64
    assert len(counted._unwritten) == 10
    counted.flush()
    assert [exemplars for *_, exemplars in rows(database)] == [50] * 10
    assert counted.totals()["b"].exemplars == 1000


def test_many_rows_are_written_in_several_transactions(settings: Settings, database: Database) -> None:
    create(database)
    fill(database, settings, 0, {0: 3})
    with database.reading() as session:
        made_at = buffers.find(session, "b").created_at
    many = [(Key("b", made_at, "t", 0, class_id), Amount(1, 2.4, 3.0)) for class_id in range(served.FLUSH_ROWS * 2 + 1)]
    counted = Served(database)
    counted._unwritten = dict(many)
    counted.flush()
    assert len(rows(database)) == len(many)


def test_pages_follow_one_another_and_filters_narrow_them(filled: ServiceThread, client: httpx.Client) -> None:
    database = filled.state.database
    create(database, "a")
    fill(database, filled.settings, 0, {0: 2, 1: 2}, name="a")
    counted = Served(database)
    for who in ("zoe", "Ann <b>", "bob\t"):
        for name in ("a", "b"):
            view = view_of(database, name)
            with as_principal(who):
                counted.note(view, np.arange(len(view.layout.run_counts)), 1, 0)
    counted.flush()
    whole = listed(client, "limit=1000").served
    assert len(whole) == 3 * (2 + 5)
    pages, cursor = [], ""
    while True:
        page = listed(client, f"limit=4{cursor}")
        pages += page.served
        if page.next is None:
            break
        cursor = f"&cursor={page.next}"
    assert pages == whole
    assert {row.buffer for row in listed(client, "buffer=a").served} == {"a"}
    only = client.get("/v1/draws", params={"who": "Ann <b>", "task": 2}).json()["served"]
    assert {(row["who"], row["task"]) for row in only} == {("Ann <b>", 2)}
    with database.reading() as session:
        with as_principal("t", prefix="b"):
            bounded = served.page(session, limit=100)
            assert {row.buffer for row in bounded.served} == {"b"} == {*served.by_buffer(session, limit=9)}
            with pytest.raises(Forbidden):
                served.page(session, buffer="a", limit=1)
        with as_principal("t", prefix="B"):
            assert served.page(session, limit=100).served == []
        of_class = served.by_class(session, "b", limit=3)
        assert [(*place, found.exemplars) for place, found in of_class.items()] == [(0, 0, 3), (0, 1, 3), (1, 2, 3)]
        rest = served.by_class(session, "b", who="zoe", limit=9, after=(1, 2))
        assert [(*place, found.exemplars) for place, found in rest.items()] == [(2, 0, 1), (2, 3, 1)]
        assert {task: found.exemplars for task, found in served.by_task(session, "b").items()} == {0: 6, 1: 3, 2: 6}
        everyone = served.by_who(session, "b", limit=9)
        assert {who: found.exemplars for who, found in everyone.items()} == {"zoe": 5, "Ann <b>": 5, "bob\t": 5}


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("buffer=none", 404),
        ("limit=0", 422),
        ("limit=1001", 422),
        ("cursor=x", 422),
        ("cursor=%C3%A9", 422),
        ("cursor=bnVsbA", 422),
        ("task=-1", 422),
        ("who=%00", 422),
        ("buffer=%00", 404),
    ],
)
def test_a_request_that_cannot_be_met_says_why(client: httpx.Client, query: str, status: int) -> None:
    answer = client.get(f"/v1/draws?{query}")
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")


@pytest.mark.parametrize(
    "place", [["b", "w", 1], ["b", "w", 1, 2, 3], ["b", 1, 1, 1], ["b", "\0", 1, 1], ["b", "w", 1, 1e9]]
)
def test_a_made_up_cursor_is_refused(place: list[object]) -> None:
    made = base64.urlsafe_b64encode(json.dumps(place).encode()).decode()
    with pytest.raises(InvalidRequest):
        served._after(made)


@pytest.mark.slow
def test_a_killed_service_loses_seconds_at_most(make_service: Callable[..., ServiceProcess]) -> None:
    service = make_service("--workers", "0")
    database = Database(service.settings)
    create(database)
    fill(database, service.settings, 0, {0: 30})
    with http(service) as client:
        wanted = drawn(client, "size=12")
        assert eventually(lambda: counts(listed(client)) == wanted)
        drawn(client, "size=12")
    service.process.kill()
    service.process.wait()
    assert sum(row[-1] for row in rows(database)) in (12, 24)
    database.close()
