"""What the service keeps of generations: as much as is in use, within bounds, and nothing of what was collected."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from engram import batch
from engram.draw import Request
from engram.errors import NotFound, Unavailable
from engram.packs import PackCache
from engram_service import buffers
from engram_service.collect import collect
from engram_service.database import Database
from engram_service.replay import Replay
from engram_service.settings import Settings
from engram_service.storage import PackStore
from tests.contents import Filling, create, fill
from tests.servers import ServiceThread, environment


def three_generations(database: Database, settings: Settings) -> None:
    """Of a buffer "b", each with all packs new."""
    create(database, budget_bytes=3000)
    for task in range(3):
        fill(database, settings, task, {2 * task: 10, 2 * task + 1: 10})


@pytest.fixture
def settings(hold: Callable[[Filling], Any], tmp_path: Path) -> Settings:
    """Of a data folder with `three_generations`."""
    hold(three_generations)
    return Settings(data_dir=tmp_path / "data")


@pytest.fixture
def replay(database: Database, settings: Settings) -> Replay:
    """Of `three_generations`; nothing in memory yet."""
    return Replay(database, PackCache(PackStore(settings.packs_dir), 10**9), settings)


def draw(replay: Replay, generation: int | None = None, step: int = 0) -> bytes:
    drawn = replay.draw(replay.view("b", generation), Request(12, step=step))
    assert drawn is not None
    return drawn.body


def test_draws_from_disk_and_from_memory_are_alike(replay: Replay) -> None:
    first = [draw(replay, step=step) for step in range(5)]
    replay.cache.settle(60)
    view = replay.peek("b", None)
    assert view is not None
    drawn = [replay.draw(view, Request(12, step=step), may_load=False) for step in range(5)]
    assert [found.body for found in drawn if found is not None] == first


@pytest.mark.parametrize("generation", [None, 1], ids=["newest", "pinned"])
def test_a_buffer_that_another_process_deleted_or_made_anew_is_not_drawn_from(
    serve_thread: Callable[..., ServiceThread], generation: int | None
) -> None:
    one, other = serve_thread(), serve_thread()
    query = "/v1/buffers/b/draw?size=4" + ("" if generation is None else f"&generation={generation}")
    create(one.state.database)
    fill(one.state.database, one.settings, 0, {0: 9})
    first = httpx.get(one.url + query)
    assert first.status_code == 200
    assert httpx.delete(f"{other.url}/v1/buffers/b").status_code == 204
    assert httpx.get(one.url + query).status_code == 404
    create(other.state.database)
    fill(other.state.database, other.settings, 0, {5: 9}, seed=5)
    again = httpx.get(one.url + query)
    assert (again.status_code, again.content == first.content) == (200, False)


def test_the_event_loop_gets_no_draw_that_would_read_the_disk(replay: Replay) -> None:
    replay.cache.close()
    draw(replay)
    view = replay.peek("b", None)
    assert view is not None
    assert replay.draw(view, Request(12), may_load=False) is None


def test_a_generation_that_was_collected_leaves_nothing_behind(
    replay: Replay, database: Database, settings: Settings
) -> None:
    for generation in (1, 2, 3):
        draw(replay, generation)
    replay.cache.settle(60)
    all_bytes = replay.cache.bytes
    collect(database, PackStore(settings.packs_dir), settings.model_copy(update={"grace_s": 0.0}))
    draw(replay, 3)
    with database.reading() as session:
        live = sum(entry.bytes for entry in buffers.manifest(session, "b").packs)
    assert 0 < replay.cache.bytes == live < all_bytes
    with pytest.raises(NotFound, match="collected"):
        replay.view("b", 1)


def test_a_generation_that_is_collected_during_a_draw_is_gone_and_not_damaged(
    replay: Replay, database: Database, settings: Settings
) -> None:
    view = replay.view("b", 1)
    collect(database, PackStore(settings.packs_dir), settings.model_copy(update={"grace_s": 0.0}))
    with pytest.raises(NotFound, match="generation 1 of buffer 'b' has been collected"):
        replay.draw(view, Request(12))


def test_a_generation_that_is_collected_after_its_packs_were_opened_is_drawn_to_the_end(
    replay: Replay, database: Database, settings: Settings
) -> None:
    view = replay.view("b", 1)
    wanted = replay.draw(view, Request(12))
    collect(database, PackStore(settings.packs_dir), settings.model_copy(update={"grace_s": 0.0}))
    assert replay.draw(view, Request(12)) == wanted


def test_what_generations_take_is_bounded_in_bytes_and_the_last_one_stays(
    replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {generation: draw(replay, generation) for generation in (1, 2, 3)}
    monkeypatch.setattr("engram_service.replay.MAX_VIEW_BYTES", 0)
    for generation in (2, 1, 3):
        assert draw(replay, generation) == wanted[generation]
        assert [replay.peek("b", number) is not None for number in (1, 2, 3)] == [
            number == generation for number in (1, 2, 3)
        ]


def test_of_one_buffer_only_some_superseded_generations_are_kept(
    replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engram_service.replay.MAX_SUPERSEDED", 1)
    for generation in (1, 2, 3):
        draw(replay, generation)
    assert [replay.peek("b", number) is not None for number in (1, 2, 3)] == [False, True, True]


def test_an_idle_generation_is_let_go_sooner_if_it_has_a_successor(
    replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(replay, 1)
    draw(replay, 3)
    monkeypatch.setattr("engram_service.replay.IDLE_SUPERSEDED_S", 0.0)
    replay.view("b", 3)
    assert replay.peek("b", 1) is None
    assert replay.peek("b", 3) is not None


def test_a_deleted_buffer_takes_nothing(replay: Replay) -> None:
    draw(replay)
    replay.cache.settle(60)
    replay.forget("b")
    assert (replay.cache.bytes, replay.cache.index_bytes) == (0, 0)


def test_all_of_a_draw_being_damaged_is_unavailable(replay: Replay, settings: Settings) -> None:
    view = replay.view("b", None)
    for digest in view.digests:
        PackStore(settings.packs_dir).path(digest).write_bytes(b"rotten")
    with pytest.raises(Unavailable, match="all 12 exemplars"):
        replay.draw(view, Request(12))
    assert replay.cache.damaged() == sorted(view.digests)


def test_health_forgets_damaged_packs_that_were_collected(served: ServiceThread) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 10})
    digest = httpx.get(f"{served.url}/v1/buffers/b/manifest").json()["packs"][0]["digest"]
    served.state.store.path(digest).write_bytes(b"rotten")
    assert httpx.get(f"{served.url}/v1/packs/{digest}").headers["Engram-Damaged"] == "10"
    assert httpx.get(f"{served.url}/healthz").json()["damaged_packs"] == [digest]
    httpx.delete(f"{served.url}/v1/buffers/b")
    assert httpx.get(f"{served.url}/healthz").json()["damaged_packs"] == []


@pytest.mark.slow
def test_nothing_is_imported_on_the_way_of_a_first_draw(
    serve_thread: Callable[..., ServiceThread],
) -> None:
    served = serve_thread()
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 20, 1: 20})
    program = f"""
import socket, sys
from pathlib import Path
from engram_service.settings import Settings
from tests.servers import ServiceThread
service = ServiceThread(Settings(data_dir=Path({str(served.settings.data_dir)!r})))
port = int(service.url.rpartition(":")[2])
before = set(sys.modules)
for number in range(2):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        target = f"/v1/buffers/b/draw?size=12&seed={{number}}&strategy=class_balanced"
        connection.sendall(f"GET {{target}} HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nConnection: close\\r\\n\\r\\n".encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 200"), answer
print(sorted(set(sys.modules) - before))
service.stop()
"""
    given = environment()
    given["PYTHONPATH"] += f":{Path(__file__).parents[2]}"
    answer = subprocess.run(
        [sys.executable, "-c", program], env=given, capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "[]"


def test_a_service_with_little_memory_draws_the_same(serve_thread: Callable[..., ServiceThread]) -> None:
    roomy, cramped = serve_thread(), serve_thread(cache_bytes=2500)
    create(roomy.state.database)
    for task in range(4):
        fill(roomy.state.database, roomy.settings, task, {task: 20})
    for step in range(6):
        url = f"/v1/buffers/b/draw?size=30&step={step}"
        bodies = {httpx.get(service.url + url).content for service in (roomy, cramped)}
        assert len(bodies) == 1
        assert len(batch.decode(bodies.pop())) == 30
    cramped.state.cache.settle(60)
    assert 0 < cramped.state.cache.bytes <= 2500
