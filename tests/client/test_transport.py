"""Draws' sockets against servers that answer in every lawful and unlawful manner."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest

from engram.transport import Connections, Unsupported


@contextmanager
def server(*answers: bytes) -> Iterator[tuple[int, list[int]]]:
    """Gives one answer per request; an answer that ends in `<close>` ends its connection. Counts the connections."""
    left = list(answers)
    connections: list[int] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while left:
            peer, _ = listener.accept()
            connections.append(peer.fileno())
            with peer, suppress(ConnectionError):
                while left and peer.recv(65536):
                    answer = left.pop(0)
                    peer.sendall(answer.removesuffix(b"<close>"))
                    if answer.endswith(b"<close>"):
                        break

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1], connections
    finally:
        if left:
            left.clear()
            socket.create_connection(listener.getsockname()).close()
        thread.join()
        listener.close()


def answer(body: bytes, *fields: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *fields, b"", body])


HEAD = b"GET /draw?size=1 HTTP/1.1\r\nHost: x\r\n\r\n"


PATIENCE_S = 30.0
"""A machine with much else to do answers late; only who waits for an answer that never comes waits for less."""


@contextmanager
def connected(port: int, read_timeout_s: float = PATIENCE_S) -> Iterator[Connections]:
    found = Connections("127.0.0.1", port, connect_timeout_s=PATIENCE_S, read_timeout_s=read_timeout_s)
    try:
        yield found
    finally:
        found.close()


def test_requests_share_a_connection() -> None:
    with server(answer(b"one"), answer(b"", b"X: y"), answer(bytes(300_000))) as (port, made), connected(port) as to:
        assert [to.start(HEAD).finish().body for _ in range(3)] == [b"one", b"", bytes(300_000)]
        assert len(made) == 1


def test_an_answer_has_its_status_and_headers() -> None:
    problem = answer(b"{}", b"Content-Type: application/problem+json").replace(b"200 OK", b"404 Not Found")
    with server(problem) as (port, _), connected(port) as to:
        found = to.start(HEAD).finish()
    assert (found.status, dict(found.headers)[b"content-type"]) == (404, b"application/problem+json")


@pytest.mark.parametrize("farewell", [answer(b"one", b"Connection: close") + b"<close>", answer(b"one") + b"<close>"])
def test_a_connection_that_was_closed_is_replaced(farewell: bytes) -> None:
    with server(farewell, answer(b"two")) as (port, made), connected(port) as to:
        assert [to.start(HEAD).finish().body for _ in range(2)] == [b"one", b"two"]
        assert len(made) == 2


def test_a_request_is_started_before_its_answer_is_wanted_and_may_be_abandoned() -> None:
    with server(*[answer(b"any")] * 4) as (port, made), connected(port) as to:
        to.start(HEAD).finish()
        to.start(HEAD).abandon()
        assert to.start(HEAD).finish().body == b"any"
        assert len(made) == 2


def test_an_answer_in_chunks_is_left_to_httpx() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n0\r\n\r\n"
    with server(chunked) as (port, _), connected(port) as to, pytest.raises(Unsupported):
        to.start(HEAD).finish()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (b"<close>", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-<close>", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf<close>", httpx.ReadError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\ntoo much", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nX: " + bytes(70_000), httpx.RemoteProtocolError),
    ],
)
def test_an_answer_that_is_wrong_raises_what_httpx_raises(wrong: bytes, error: type[Exception]) -> None:
    with server(wrong, b"never sent") as (port, _), connected(port) as to, pytest.raises(error):
        to.start(HEAD).finish()


def test_an_answer_that_stands_still_is_a_timeout() -> None:
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"
    with (
        server(half, b"never sent") as (port, _),
        connected(port, read_timeout_s=0.1) as to,
        pytest.raises(httpx.ReadTimeout),
    ):
        to.start(HEAD).finish()


def test_no_server_is_a_connection_error() -> None:
    with connected(1) as to, pytest.raises(httpx.ConnectError):
        to.start(HEAD).finish()


def test_nothing_is_kept_once_the_connections_are_closed() -> None:
    with server(answer(b"one"), answer(b"two")) as (port, made), connected(port) as to:
        to.close()
        assert [to.start(HEAD).finish().body for _ in range(2)] == [b"one", b"two"]
        assert len(made) == 2


def test_a_request_under_way_is_sent_again_where_the_connection_is_not_ours_any_more() -> None:
    with server(answer(b"one"), answer(b"two"), answer(b"three")) as (port, made), connected(port) as to:
        to.start(HEAD).finish()
        started = to.start(HEAD)
        to.after_fork()
        assert started.finish().body in (b"two", b"three")
        assert len(made) == 2
