"""Processes that share a client, a mirror or a loader: forked at the worst moments, spawned, many at once."""

import multiprocessing
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import engram
from engram import Client, Mirror, ReplayLoader
from engram.draw import Request
from engram.sources import Source
from tests.client.conftest import Filled, Make
from tests.client.drawers import HANGS_S, digest, draw_each, in_child
from tests.client.faults import faulty

# Python 3.12 warns of every fork of a process with threads. That is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture
def mirror(filled: Filled, tmp_path: Path) -> Mirror:
    """Of the read-only buffer, for the batches that are right."""
    return Mirror(filled.client, filled.name, tmp_path / "mirror")


def right(mirror: Mirror, steps: range) -> dict[int, str]:
    """The batches of the pure function, from the packs."""
    snapshot = mirror.snapshot()
    return {step: digest(snapshot.draw(Request(64, seed=3, step=step))) for step in steps}


def drawn_by(source: Source, count: int, workers: dict[str, int]) -> dict[int, str]:
    """The batches of steps 0..count-1, drawn at once by so many processes of each start method."""
    spawn = multiprocessing.get_context("spawn")
    total = sum(workers.values())
    together = spawn.Barrier(total, timeout=HANGS_S)
    running, number = [], 0
    for method, of_method in workers.items():
        context: Any = multiprocessing.get_context(method)
        for _ in range(of_method):
            here, there = spawn.Pipe(duplex=False)
            arguments = (source, range(number, count, total), together, there)
            process = context.Process(target=draw_each, args=arguments)
            process.start()
            there.close()
            running.append((process, here))
            number += 1
    found: dict[int, str] = {}
    for process, here in running:
        assert here.poll(2 * HANGS_S), "a worker hangs"
        answer = here.recv()
        process.join()
        assert isinstance(answer, dict), answer
        found |= answer
    return found


def used(client: Client, buffer: str) -> Client:
    """A client that has idle connections of both kinds."""
    client.draw(buffer, 4)
    client.buffer(buffer)
    return client


def test_every_batch_of_forked_and_spawned_workers_is_right(filled: Filled, mirror: Mirror) -> None:
    source = (used(filled.client, filled.name), filled.name)
    found = drawn_by(source, 120, {"fork": 2, "spawn": 1})
    assert found == right(mirror, range(120))


@pytest.mark.slow
def test_a_mirror_is_drawn_from_by_forked_and_spawned_workers(mirror: Mirror) -> None:
    assert drawn_by(mirror, 30, {"fork": 1, "spawn": 1}) == right(mirror, range(30))


@pytest.mark.slow
def test_two_thousand_draws_by_eight_forked_and_eight_spawned_workers_are_right(filled: Filled, mirror: Mirror) -> None:
    source = (used(filled.client, filled.name), filled.name)
    assert drawn_by(source, 2000, {"fork": 8, "spawn": 8}) == right(mirror, range(2000))


Way = Callable[[Client, str], object]
WAYS: dict[str, Way] = {
    "sockets": lambda client, buffer: digest(client.draw(buffer, 64, seed=3, step=1)),
    "httpx": lambda client, buffer: client.buffer(buffer),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_fork_while_another_thread_awaits_an_answer_disturbs_neither(
    filled: Filled, mirror: Mirror, connect: Make, way: str
) -> None:
    ask = WAYS[way]
    expected = ask(filled.client, filled.name)
    with faulty(filled.client.url, None, None, "hold") as proxy:
        client = used(connect(proxy.url), filled.name)
        found: list[object] = []
        other = threading.Thread(target=lambda: found.append(ask(client, filled.name)))
        other.start()
        assert proxy.holds.wait(HANGS_S)

        def work() -> tuple[object, dict[int, str]]:
            answers = (
                ask(client, filled.name),
                {step: digest(client.draw(filled.name, 64, seed=3, step=step)) for step in range(4)},
            )
            client.close()
            return answers

        assert in_child(work) == (expected, right(mirror, range(4)))
        assert other.is_alive(), "the answer is still awaited"
        proxy.release.set()
        other.join()
        assert found == [expected]


def test_a_process_that_is_forked_again_and_again_while_threads_draw_never_sees_a_wrong_batch(
    filled: Filled, mirror: Mirror, connect: Make
) -> None:
    client = connect(filled.client.url)
    expected = right(mirror, range(40))
    wrong: list[object] = []
    stop = threading.Event()

    def draw(first: int) -> None:
        step = first
        while not stop.is_set():
            if digest(client.draw(filled.name, 64, seed=3, step=step)) != expected[step]:
                wrong.append(step)
            client.buffer(filled.name)
            step = (step + 3) % 40

    threads = [threading.Thread(target=draw, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(4):
            steps = range(number, number + 5)
            assert in_child(
                lambda steps=steps: {  # type: ignore[misc]
                    step: digest(client.draw(filled.name, 64, seed=3, step=step)) for step in steps
                }
            ) == right(mirror, steps)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_draw_that_was_asked_for_before_a_fork_is_fetched_by_both(
    filled: Filled, mirror: Mirror, connect: Make
) -> None:
    client = used(connect(filled.client.url, retries=0, read_timeout_s=HANGS_S), filled.name)
    pending = client.ask(filled.name, 64, seed=3, step=7)
    expected = right(mirror, range(7, 8))[7]
    assert in_child(lambda: digest(pending.finish())) == expected
    assert digest(pending.finish()) == expected


def test_a_lock_that_was_held_at_the_fork_does_not_stop_the_child(
    filled: Filled, mirror: Mirror, connect: Make
) -> None:
    client = used(connect(filled.client.url), filled.name)
    pool = client._http._httpx()._pool  # type: ignore[attr-defined]
    # In the child these stay locked for ever, as the locks of threads that it does not have.
    with pool._optional_thread_lock, client._http._making_transport, mirror._refreshing:
        found = in_child(lambda: (client.buffer(filled.name).name, mirror.refresh()))
    assert found == (filled.name, False)


def test_closing_in_the_child_leaves_the_parents_connections_open(filled: Filled, connect: Make) -> None:
    with faulty(filled.client.url) as proxy:
        client = used(connect(proxy.url), filled.name)
        before = proxy.connections
        in_child(client.close)
        client.draw(filled.name, 4)
        client.buffer(filled.name)
        assert proxy.connections == before


@pytest.mark.parametrize("threads", [0, 2])
def test_a_loader_goes_on_in_the_child_and_in_the_parent(
    filled: Filled, mirror: Mirror, connect: Make, threads: int
) -> None:
    expected = list(right(mirror, range(12)).values())
    client = used(connect(filled.client.url, retries=0, read_timeout_s=HANGS_S), filled.name)
    for source in ((client, filled.name), mirror):
        with ReplayLoader(source, 64, seed=3, steps=12, threads=threads) as loader:
            begun = [digest(next(loader)) for _ in range(4)]
            assert begun + in_child(lambda loader=loader: [digest(batch) for batch in loader]) == expected  # type: ignore[misc]
            assert begun + [digest(batch) for batch in loader] == expected


def test_a_mirror_is_refreshed_in_a_child_while_a_thread_of_the_parent_refreshes_it(
    filled: Filled, connect: Make, tmp_path: Path
) -> None:
    with faulty(filled.client.url) as proxy:
        mirror = Mirror(connect(proxy.url), filled.name, tmp_path)
        proxy.faults.append("hold")
        refreshed: list[bool] = []
        other = threading.Thread(target=lambda: refreshed.append(mirror.refresh()))
        other.start()
        assert proxy.holds.wait(HANGS_S)
        assert in_child(mirror.refresh) is False
        proxy.release.set()
        other.join()
        assert refreshed == [False]


def test_a_pickled_client_has_the_same_settings_and_connections_of_its_own(serve_thread: Make, connect: Make) -> None:
    service = serve_thread(admin_token="secret")
    client = connect(service.url + "/", token="secret", read_timeout_s=7.0, retries=1)
    client.create_buffer("b", budget_bytes=1000)
    with pickle.loads(pickle.dumps(client)) as other:
        assert other.buffers() == client.buffers()
        assert other.__reduce__()[0].keywords == client.__reduce__()[0].keywords  # type: ignore[attr-defined]
        assert other.__reduce__()[0].keywords["read_timeout_s"] == 7.0


def test_a_pickled_mirror_draws_the_same_batches(filled: Filled, mirror: Mirror) -> None:
    other = pickle.loads(pickle.dumps(mirror))
    assert (other.buffer, other.folder, other.generation) == (mirror.buffer, mirror.folder, mirror.generation)
    assert digest(other.draw(64, seed=3, step=5)) == digest(mirror.draw(64, seed=3, step=5))
    other._client.close()


def test_a_transport_of_the_callers_own_stays_in_its_process(filled: Filled, connect: Make) -> None:
    with httpx.HTTPTransport() as transport:
        client = connect(filled.client.url, transport=transport)
        assert client.draw(filled.name, 4) is not None
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(client)

        def work() -> str:
            with pytest.raises(RuntimeError) as caught:
                client.draw(filled.name, 4)
            return str(caught.value)

        assert "make the client there" in in_child(work)
        assert len(client.draw(filled.name, 4)) == 4


def test_children_of_a_process_do_not_pause_in_step(filled: Filled, connect: Make) -> None:
    client = connect(filled.client.url)
    error = engram.Unavailable("busy")
    pauses = [in_child(lambda: client._http._pause_s(3, error)) for _ in range(3)]
    assert len(set(pauses)) == 3
