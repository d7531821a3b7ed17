"""What answers may cost in memory: one by one, and all that are on their way together."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from fastapi import Response
from fastapi.routing import APIRoute

from engram import strip
from engram.draw import Request
from engram.errors import InvalidRequest, Unavailable
from engram.packs import PackCache
from engram_service.answers import LARGE_BYTES, Answers
from engram_service.database import Database
from engram_service.replay import Replay
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import PackRow
from tests.contents import create, pictures
from tests.servers import PATIENCE_S, ServiceProcess, ServiceThread, eventually, http

DRAW = "/v1/buffers/b/draw"
MANY = 1000
"""Exemplars of a draw that is large."""
HELD = 1200


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Path:
    """A data folder whose buffer "b" has one pack of 1,200 exemplars of 512x512, some 15 KB each."""
    settings = Settings(data_dir=shutil.copytree(migrated, tmp_path_factory.mktemp("large") / "data"))
    class_ids = np.repeat([0, 1], HELD // 2)
    some = strip.encode(pictures(0, 20, (512, 512, 3)), np.zeros(20, np.int64), quality=50)
    exemplars = replace(some.select(np.arange(HELD) % 20), class_ids=class_ids)
    database = Database(settings)
    create(database, budget_bytes=10**8)
    entry = PackStore(settings.packs_dir).keep(0, exemplars)
    values = entry.model_dump(exclude={"runs"}) | {"runs": [list(run) for run in entry.runs]}
    with database.session() as session:
        session.add(PackRow(buffer="b", since=0, class_bytes=[0, 0], **values))
    database.close()
    return settings.data_dir


@pytest.fixture
def serve(large: Path) -> Iterator[Callable[..., ServiceThread]]:
    """Starts services on `large`; no test here changes it."""
    running: list[ServiceThread] = []

    def start(**given: object) -> ServiceThread:
        running.append(ServiceThread(Settings(data_dir=large, **given)))  # type: ignore[arg-type]
        return running[-1]

    yield start
    for service in running:
        service.stop()


@pytest.fixture
def make_replay(large: Path) -> Iterator[Callable[..., Replay]]:
    """Makes the `Replay` of `large` with these settings, nothing in memory yet."""
    made: list[Replay] = []

    def make(cache_bytes: int, **given: object) -> Replay:
        settings = Settings(data_dir=large, **given)  # type: ignore[arg-type]
        made.append(Replay(Database(settings), PackCache(PackStore(settings.packs_dir), cache_bytes), settings))
        return made[-1]

    yield make
    for replay in made:
        # What is still being read would count among the next test's memory.
        replay.cache.close()
        replay.database.close()


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that `work` has at one time, beside what there was before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("accept", ["*/*", "application/x-tar", "image/jpeg"])
def test_a_draw_is_bounded_in_bytes_and_says_how_many_exemplars_fit(
    serve: Callable[..., ServiceThread], accept: str
) -> None:
    served = serve(max_answer_bytes=600_000)
    with httpx.Client(base_url=served.url, headers={"Accept": accept}, timeout=60) as client:
        refused = client.get(f"{DRAW}?size=100")
        problem = refused.json()
        assert (refused.status_code, problem["max_answer_bytes"]) == (422, 600_000)
        assert "ENGRAM_MAX_ANSWER_BYTES" in problem["detail"]
        assert f"about {problem['fits']} of these exemplars fit" in problem["detail"]
        fitting = client.get(f"{DRAW}?size={problem['fits'] - 2}")
        assert fitting.status_code == 200, fitting.text
        assert 400_000 < len(fitting.content) <= 600_000


def test_a_draw_that_is_too_large_is_refused_before_any_of_it_is_made(make_replay: Callable[..., Replay]) -> None:
    replay = make_replay(10**9, max_answer_bytes=2 * 10**6)
    view = replay.view("b", None)
    replay.draw(view, Request(2))

    def refused() -> None:
        with pytest.raises(InvalidRequest, match="of these exemplars fit"):
            replay.draw(view, Request(8192))

    assert peak_bytes(refused) < 2 * 10**6


def test_the_event_loop_makes_no_large_draw(make_replay: Callable[..., Replay]) -> None:
    replay = make_replay(10**9)
    view = replay.view("b", None)
    small = replay.draw(view, Request(10))
    replay.cache.settle(60)
    assert replay.draw(view, Request(10), may_load=False) == small
    assert replay.draw(view, Request(MANY), may_load=False) is None
    assert replay.pick(view, Request(MANY)).bytes > LARGE_BYTES


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_what_a_draw_is_said_to_weigh_is_about_what_it_has(
    make_replay: Callable[..., Replay], cache_bytes: int
) -> None:
    replay = make_replay(cache_bytes)
    picked = replay.pick(replay.view("b", None), Request(MANY))
    drawn = replay.make(picked)
    assert 0.98 * picked.bytes < len(drawn.body) <= picked.bytes
    assert drawn.exemplars == MANY


@pytest.mark.slow
def test_an_export_holds_a_piece_of_a_pack_and_not_all_of_it(make_replay: Callable[..., Replay]) -> None:
    replay = make_replay(0)
    view = replay.view("b", None)
    held = view.entry(0).bytes
    pieces: list[int] = []
    assert peak_bytes(lambda: pieces.extend(map(len, replay.export(view)))) < 8 * 2**20 < held < sum(pieces)


def test_a_pack_that_does_not_fit_in_memory_is_verified_without_being_there(make_replay: Callable[..., Replay]) -> None:
    replay = make_replay(0)
    entry = replay.view("b", None).entry(0)
    replay.cache.get(entry.digest, entry.exemplars)
    assert replay.cache.settle(PATIENCE_S), "it is verified in the background, too"
    assert peak_bytes(lambda: replay.cache.whole(entry.digest, entry.exemplars)) < 6 * 2**20 < entry.bytes
    assert not replay.cache.whole(entry.digest, entry.exemplars).is_damaged


def test_a_picture_of_a_pack_is_bounded_and_the_pack_itself_is_not(serve: Callable[..., ServiceThread]) -> None:
    served = serve(max_answer_bytes=10**6)
    with http(served) as client:
        entry = client.get("/v1/buffers/b/manifest").json()["packs"][0]
        path = f"/v1/packs/{entry['digest']}"
        refused = client.get(path, headers={"Accept": "image/jpeg"})
        assert (refused.status_code, refused.json()["max_answer_bytes"]) == (422, 10**6)
        assert len(client.get(path).content) == entry["bytes"]


def test_answers_on_their_way_share_a_bounded_memory_and_all_of_them_arrive(
    serve: Callable[..., ServiceThread],
) -> None:
    size = len(httpx.get(f"{serve().url}{DRAW}?size={MANY}", timeout=60).content)
    served = serve(answer_memory_bytes=3 * size)
    held: list[int] = []

    def draw(step: int) -> int:
        with httpx.stream("GET", f"{served.url}{DRAW}?size={MANY}&step={step}", timeout=60) as answer:
            held.append(served.state.answers.bytes)
            return sum(map(len, answer.iter_raw()))

    with ThreadPoolExecutor(12) as threads:
        assert min(threads.map(draw, range(12))) > 0.9 * size
    assert 0 < max(held) <= 3 * 1.1 * size
    assert eventually(lambda: served.state.answers.bytes == 0)


def test_a_large_answer_of_any_route_finds_room_or_is_refused(serve: Callable[..., ServiceThread]) -> None:
    served = serve(answer_memory_bytes=1)

    def large_answer() -> Response:
        return Response(bytes(3 * LARGE_BYTES))

    # In front of the route that the table of routes knows by this path.
    served.app.router.routes.insert(0, APIRoute("/v1/whoami", large_answer))
    with http(served) as client:
        assert client.get("/v1/whoami").content == bytes(3 * LARGE_BYTES)
        with stalled(served, f"{DRAW}?size={MANY}"):
            assert eventually(lambda: served.state.answers.bytes > 0)
            refused = client.get("/v1/whoami")
            assert (refused.status_code, refused.json()["answer_memory_bytes"]) == (503, 1)
            assert refused.headers["Retry-After"] == "1"
            assert client.get(f"{DRAW}?size=10").status_code == 200, "small answers need no room"
        assert eventually(lambda: served.state.answers.bytes == 0)
        assert client.get("/v1/whoami").status_code == 200


def test_a_request_that_gets_no_room_in_time_is_told_to_come_back(
    serve: Callable[..., ServiceThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engram_service.answers.WAIT_S", 0.2)
    served = serve(answer_memory_bytes=1)
    with stalled(served, f"{DRAW}?size={MANY}"), http(served) as client:
        assert eventually(lambda: served.state.answers.bytes > 0)
        for path in (f"{DRAW}?size={MANY}", "/v1/buffers/b/export"):
            refused = client.get(path)
            assert (refused.status_code, refused.json()["type"].rpartition("/")[2]) == (503, "unavailable")


def test_room_is_given_in_turn_and_nothing_of_it_is_lost() -> None:
    async def run() -> None:
        answers = Answers(10)
        scopes: list[dict[str, object]] = [{} for _ in range(5)]
        first, second, third, small, gone = scopes
        await answers.take(first, 50)
        waiting = [asyncio.create_task(answers.take(scope, size)) for scope, size in ((second, 8), (gone, 9))]
        await asyncio.sleep(0)
        later = [asyncio.create_task(answers.take(scope, size)) for scope, size in ((third, 9), (small, 1))]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            answers.take_now({}, 1)
        waiting[1].cancel()
        answers.give_back(first)
        await waiting[0]
        assert (answers.bytes, [task.done() for task in later]) == (8, [False, False])
        answers.give_back(second)
        await asyncio.gather(*later)
        assert answers.bytes == 10
        for scope in (third, small, gone):
            answers.give_back(scope)
        assert answers.bytes == 0

    asyncio.run(run())


@pytest.mark.slow
def test_forty_of_the_largest_draws_at_once_leave_the_service_small(
    large: Path, make_service: Callable[..., ServiceProcess]
) -> None:
    size = 4000
    service = make_service("--workers", "0", data_dir=large, answer_memory_bytes=160 * 2**20)
    with http(service) as client:
        whole = len(client.get(f"{DRAW}?size={size}").content)
    assert whole > 40 * 2**20
    process = psutil.Process(service.process.pid)
    most: list[int] = []

    def draw(step: int) -> int:
        received = 0
        with httpx.stream("GET", f"{service.url}{DRAW}?size={size}&step={step}", timeout=120) as answer:
            for part in answer.iter_raw():
                received += len(part)
                most.append(process.memory_info().rss)
        return received

    with ThreadPoolExecutor(40) as threads:
        assert min(threads.map(draw, range(40))) > 0.9 * whole
    print(max(most) / 2**20)
    assert max(most) < 600 * 2**20 < 40 * whole


@contextmanager
def stalled(served: ServiceThread, path: str) -> Iterator[None]:
    """A client that asked for this and does not read."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        yield
