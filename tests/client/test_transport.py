"""The short way of draws against servers that answer in every lawful and unlawful manner."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from engram.transport import SHORT, Transport

TIMEOUTS = {"connect": 2.0, "read": 0.5, "write": 2.0, "pool": 2.0}


@contextmanager
def server(*answers: bytes) -> Iterator[tuple[str, list[int]]]:
    """Gives one answer per request; an answer that ends in `<close>` ends its connection. Counts the connections."""
    left = list(answers)
    connections: list[int] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while left:
            peer, _ = listener.accept()
            connections.append(peer.fileno())
            with peer:
                while left and peer.recv(65536):
                    answer = left.pop(0)
                    peer.sendall(answer.removesuffix(b"<close>"))
                    if answer.endswith(b"<close>"):
                        break

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/draw?size=1", connections
    finally:
        if left:
            left.clear()
            socket.create_connection(listener.getsockname()).close()
        thread.join()
        listener.close()


def answer(body: bytes, *fields: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *fields, b"", body])


@pytest.fixture
def transport() -> Iterator[Transport]:
    found = Transport()
    yield found
    found.close()


def get(transport: Transport, url: str) -> bytes:
    extensions = {"timeout": TIMEOUTS, SHORT: True}
    response = transport.handle_request(httpx.Request("GET", url, extensions=extensions))
    try:
        return response.read()
    finally:
        response.close()


def test_requests_share_a_connection(transport: Transport) -> None:
    with server(answer(b"one"), answer(b"", b"X: y"), answer(bytes(300_000))) as (url, connections):
        assert [get(transport, url), get(transport, url), get(transport, url)] == [b"one", b"", bytes(300_000)]
        assert len(connections) == 1


def test_the_answer_has_its_status_and_headers(transport: Transport) -> None:
    with server(answer(b"{}", b"Content-Type: application/problem+json").replace(b"200 OK", b"404 Not Found")) as (
        url,
        _,
    ):
        extensions = {"timeout": TIMEOUTS, SHORT: True}
        response = transport.handle_request(httpx.Request("GET", url, extensions=extensions))
    assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")


@pytest.mark.parametrize("farewell", [answer(b"one", b"Connection: close") + b"<close>", answer(b"one") + b"<close>"])
def test_a_connection_that_was_closed_is_replaced(transport: Transport, farewell: bytes) -> None:
    with server(farewell, answer(b"two")) as (url, connections):
        assert [get(transport, url), get(transport, url)] == [b"one", b"two"]
        assert len(connections) == 2


def test_an_answer_in_chunks_is_asked_for_again_through_httpx(transport: Transport) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n0\r\n\r\n"
    with server(chunked, chunked) as (url, connections):
        assert get(transport, url) == b"one"
        assert len(connections) == 2


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (b"<close>", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-<close>", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf<close>", httpx.ReadError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", httpx.ReadTimeout),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\ntoo much", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nX: " + bytes(70_000), httpx.RemoteProtocolError),
    ],
)
def test_an_answer_that_is_wrong_raises_what_httpx_raises(
    transport: Transport, wrong: bytes, error: type[Exception]
) -> None:
    with server(wrong, b"never sent") as (url, _), pytest.raises(error):
        get(transport, url)


def test_no_server_is_a_connection_error(transport: Transport) -> None:
    with pytest.raises(httpx.ConnectError):
        get(transport, "http://127.0.0.1:1/")
