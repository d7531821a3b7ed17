"""What a connection may cost: heads, bodies and readers that are too long or too slow, and too many connections."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import httpx
import numpy as np
import pytest

from engram import Client
from engram_service.edge import MAX_HEADERS, Edge
from engram_service.settings import Settings
from tests.contents import create, fill, pictures
from tests.servers import PATIENCE_S, ServiceThread, eventually
from tests.uploads import encoded, pairs, tar_of

LINE = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
UPLOAD = b"POST /v1/buffers/b/tasks/0/ingests HTTP/1.1\r\nHost: localhost\r\n"
MOST = 4096


@pytest.fixture
def strict(serve_thread: Callable[..., ServiceThread]) -> ServiceThread:
    """A service that waits for half a second at most, which a busy machine may take: for what it is to refuse."""
    return serve_thread(head_timeout_s=0.5, max_stall_s=0.5, min_body_bytes_per_s=10_000)


@pytest.fixture
def bounded(serve_thread: Callable[..., ServiceThread]) -> ServiceThread:
    """A service that takes short heads only."""
    return serve_thread(max_head_bytes=MOST)


@pytest.fixture
def lenient(serve_thread: Callable[..., ServiceThread]) -> ServiceThread:
    """A service that waits for a second and a half for slow clients: for those that it is to serve, too."""
    return serve_thread(max_stall_s=1.5, min_body_bytes_per_s=1000)


@contextmanager
def connected(served: ServiceThread) -> Iterator[socket.socket]:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        yield connection


def rest(connection: socket.socket) -> bytes:
    """What comes until the service ends the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(2**16):
            received += part
    return received


def answer(received: bytes) -> tuple[int, dict[str, object]]:
    """Status and problem of an answer."""
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head, received[:300]
    return int(head.split()[1]), json.loads(body)


def sent(served: ServiceThread, *pieces: bytes) -> bytes:
    """What the service answers until it ends the connection, which it may do before all is sent."""
    with connected(served) as connection:
        with suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
        return rest(connection)


@pytest.mark.parametrize(
    "pieces",
    [
        (LINE + b"X: ", *[b"a" * 2**18] * 20),
        (b"GET /", *[b"a" * 2**18] * 20),
        (LINE + b"X: " + b"a" * 2**20 + b"\r\nConnection: close\r\n\r\n",),
        (LINE + b"a:\r\n" * 100_000 + b"Connection: close\r\n\r\n",),
        # What follows the last piece of a body is kept as headers are.
        (b"PUT /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", *[b"a" * 2**18] * 20),
    ],
    ids=["endless header", "endless line", "header of 1 MB", "100,000 headers", "endless trailer"],
)
def test_a_head_beyond_the_limit_is_refused_whether_or_not_it_ends(bounded: ServiceThread, pieces: list[bytes]) -> None:
    status, problem = answer(sent(bounded, *pieces))
    assert (status, problem["max_head_bytes"]) == (431, MOST)
    assert "ENGRAM_MAX_HEAD_BYTES" in str(problem["detail"])
    assert httpx.get(f"{bounded.url}/healthz").status_code == 200


@pytest.mark.parametrize(("count", "status"), [(MAX_HEADERS, 200), (MAX_HEADERS + 1, 431), (2**13, 431)])
def test_a_head_may_have_so_many_headers(serve_thread: Callable[..., ServiceThread], count: int, status: int) -> None:
    served = serve_thread()
    with connected(served) as connection:
        connection.sendall(LINE + b"Connection: close\r\n" + b"a:\r\n" * (count - 2) + b"\r\n")
        assert rest(connection).startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize(("size", "status"), [(MOST, 200), (MOST + 1, 431)])
@pytest.mark.parametrize("pause", [False, True])
def test_a_head_may_have_exactly_so_many_bytes(bounded: ServiceThread, size: int, status: int, pause: bool) -> None:
    head = LINE + b"Connection: close\r\nX: "
    head += b"a" * (size - len(head) - 4) + b"\r\n\r\n"
    with connected(bounded) as connection:
        if pause:
            connection.sendall(head[:100])
            time.sleep(0.05)
            head = head[100:]
        connection.sendall(head)
        assert rest(connection).startswith(b"HTTP/1.1 %d " % status)


def test_the_limit_is_of_each_head_and_not_of_a_connection(bounded: ServiceThread) -> None:
    with httpx.Client(base_url=bounded.url, headers={"X": "a" * (MOST // 2)}) as client:
        for _ in range(5):
            assert client.get("/healthz").status_code == 200


def test_a_head_that_does_not_end_in_time_is_refused(strict: ServiceThread) -> None:
    status, problem = answer(sent(strict, LINE))
    assert (status, str(problem["type"]).rpartition("/")[2]) == (408, "unavailable")


def test_a_connection_on_which_nothing_is_asked_is_closed(strict: ServiceThread) -> None:
    assert sent(strict) == b""


def test_a_second_head_has_as_long_as_the_first(strict: ServiceThread) -> None:
    with connected(strict) as connection:
        connection.sendall(LINE + b"\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
        connection.sendall(b"G")
        assert answer(rest(connection))[0] == 408


def test_an_idle_connection_may_wait_longer_than_a_head(strict: ServiceThread) -> None:
    with connected(strict) as connection:
        for pause_s in (1.2, 0.0):
            connection.sendall(LINE + b"\r\n")
            assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
            time.sleep(pause_s)


def test_an_upload_that_stops_is_refused_and_leaves_nothing(strict: ServiceThread) -> None:
    create(strict.state.database)
    with connected(strict) as connection:
        connection.sendall(UPLOAD + b"Content-Length: 1000000\r\n\r\n" + b"a" * 5000)
        status, problem = answer(rest(connection))
    assert (status, "bytes/s" in str(problem["detail"])) == (408, True)
    assert eventually(lambda: not list(strict.settings.spool_dir.iterdir()))


def test_an_upload_that_drips_is_refused(strict: ServiceThread) -> None:
    create(strict.state.database)
    with connected(strict) as connection:
        connection.sendall(UPLOAD + b"Content-Length: 1000000\r\n\r\n")

        def has_ended() -> bool:
            time.sleep(0.05)
            with suppress(ConnectionError):
                connection.sendall(b"a" * 100)
                return False
            return True

        assert eventually(has_ended)


def test_an_upload_that_is_slow_but_fast_enough_is_taken(lenient: ServiceThread) -> None:
    create(lenient.state.database)
    body = tar_of(pairs(("png", encoded(image), 0) for image in pictures(0, 30)))
    pieces = [body[at : at + 1800] for at in range(0, len(body), 1800)]
    began = time.monotonic()
    with connected(lenient) as connection:
        connection.sendall(UPLOAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.05)
        assert rest(connection).startswith(b"HTTP/1.1 202 ")
    assert time.monotonic() - began > lenient.settings.max_stall_s


def test_a_body_that_nobody_waits_for_ends_with_its_connection(strict: ServiceThread) -> None:
    received = sent(strict, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200 ")


def test_a_client_that_does_not_read_its_answer_is_let_go(lenient: ServiceThread) -> None:
    create(lenient.state.database, budget_bytes=10**7)
    fill(lenient.state.database, lenient.settings, 0, {0: 4}, shape=(512, 512, 3))
    url = "/v1/buffers/b/draw?size=1000"
    whole = len(httpx.get(lenient.url + url).content)
    assert whole > 10**7, "more than the kernel takes"
    with connected(lenient) as connection:
        connection.sendall(f"GET {url} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert eventually(lambda: lenient.state.answers.bytes > 0)
        assert eventually(lambda: lenient.state.answers.bytes == 0)
        assert len(rest(connection)) < whole
    # And one that takes its time gets all of it.
    with connected(lenient) as connection:
        connection.sendall(f"GET {url} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        received = 0
        while part := connection.recv(2**20):
            received += len(part)
            time.sleep(0.02)
        assert received > whole


@pytest.mark.slow
def test_a_trainer_that_fetched_ahead_and_then_paused_for_too_long_gets_its_draw(lenient: ServiceThread) -> None:
    create(lenient.state.database, budget_bytes=10**7, quality=90)
    fill(lenient.state.database, lenient.settings, 0, {0: 100}, shape=(64, 64, 3))
    with Client(lenient.url) as client:
        wanted = client.draw("b", 6000)
        early = client.ask("b", 6000)
        assert eventually(lambda: lenient.state.answers.bytes > 0)
        assert eventually(lambda: lenient.state.answers.bytes == 0)
        assert np.array_equal(early.finish().images, wanted.images)


def test_connections_beyond_the_limit_are_told_so_and_let_in_later(serve_thread: Callable[..., ServiceThread]) -> None:
    served = serve_thread(max_connections=3)
    with connected(served) as first, connected(served) as second, connected(served) as third:
        for connection in (first, second, third):
            connection.sendall(LINE + b"\r\n")
            assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
        status, problem = answer(sent(served))
        assert (status, str(problem["type"]).rpartition("/")[2]) == (503, "unavailable")
        first.sendall(LINE + b"\r\n")
        assert first.recv(2**16).startswith(b"HTTP/1.1 200")
    assert eventually(lambda: httpx.get(f"{served.url}/healthz").status_code == 200)


def test_requests_that_are_sent_ahead_are_few(served: ServiceThread) -> None:
    asked = LINE + b"\r\n"
    with connected(served) as connection:
        connection.sendall(asked * 4)
        received = b""
        while received.count(b"HTTP/1.1 200 ") < 4:
            received += connection.recv(2**16)
    assert sent(served, asked * 1000).count(b"HTTP/1.1 ") < 20
    assert httpx.get(f"{served.url}/healthz").status_code == 200


def test_a_connection_that_is_broken_stops_no_clock(settings: Settings) -> None:
    class Looked:
        def __init__(self, error: Exception | None) -> None:
            self.transport, self.looks, self.is_ended = self, 0, False
            self._error = error

        def look(self, _: float) -> None:
            self.looks += 1
            if self._error is not None:
                raise self._error

        def abort(self) -> None:
            self.is_ended = True

    broken, sound = Looked(RuntimeError("the handler is closed")), Looked(None)

    async def watch() -> None:
        edge = Edge(settings.model_copy(update={"head_timeout_s": 0.04}))
        watching = asyncio.create_task(edge.watch({broken, sound}))  # type: ignore[arg-type]
        while sound.looks < 3 and not watching.done():
            await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(watch())
    assert (broken.is_ended, sound.is_ended, sound.looks >= 3) == (True, False, True)


def test_what_is_no_http_is_a_problem_too(served: ServiceThread) -> None:
    status, problem = answer(sent(served, b"\x16\x03\x01 hello\r\n\r\n"))
    assert (status, problem["detail"]) == (400, "what was sent is no HTTP/1.1 request")
