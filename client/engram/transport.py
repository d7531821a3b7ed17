"""This file is the short way for draws: GET over kept-alive sockets, everything else through httpx.

A draw's answer is decoded in about a millisecond, and httpx's own transport (httpcore and h11, pure Python) takes a
quarter of that for one request, all of it under Python's lock. This transport takes a third of it. It knows only what
a draw needs: no body in the request, `Content-Length` in the answer, no TLS. Whatever else turns up (a proxy that
answers in chunks, say) is asked for again through httpx, which is harmless because draws change nothing.

A request can be started before its answer is wanted. So one thread keeps service and decoder at work at the same time,
which several threads do worse: they spend as long handing Python's lock to each other as decoding.

It raises httpx's exceptions, so the client does not notice the difference.
"""

from __future__ import annotations

import re
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import httpx

_KEEPALIVE_S: Final = 60.0
"""The service closes idle connections after 75 s; the client must be first, or a request meets a closing door."""

_MOST_HEAD_BYTES: Final = 65_536
_HEAD = re.compile(rb"HTTP/1\.1 (\d{3})[ \r]")

SHORT: Final = "engram_short"
"""The extension of a request that may take the short way."""


class _Unsupported(Exception):
    """The answer is correct HTTP that this file does not read."""


class Transport(httpx.BaseTransport):
    """httpx's transport with a shortcut for requests that carry the extension `SHORT`. Safe to share by threads."""

    def __init__(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=_KEEPALIVE_S)
        self._general = httpx.HTTPTransport(limits=limits)
        self._idle: deque[_Connection] = deque()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """The answer to a request.

        Raises:
            httpx.TransportError: no connection, no answer in time, or an answer that breaks off.
        """
        return self.start(request).finish()

    def start(self, request: httpx.Request) -> Started:
        """Send a request now, to fetch its answer later; what goes wrong is raised then."""
        if SHORT not in request.extensions or request.url.scheme != "http":
            return Started(self, request, None)
        connection = self._take(request)
        if connection is not None:
            try:
                connection.send(request)
            except httpx.TransportError:
                connection.close()
                connection = None
        return Started(self, request, connection)

    def finish(self, request: httpx.Request, connection: _Connection | None) -> httpx.Response:
        """The answer to a request that was sent on this connection, or was not sent yet."""
        if SHORT not in request.extensions or request.url.scheme != "http":
            return self._general.handle_request(request)
        try:
            if connection is not None:
                try:
                    return self._receive(connection, request)
                except httpx.RemoteProtocolError:
                    # It was closed while it was idle: nothing is wrong with the service yet.
                    pass
            connection = _Connection(request)
            connection.send(request)
            return self._receive(connection, request)
        except _Unsupported:
            return self._general.handle_request(request)

    def close(self) -> None:
        """All connections are closed."""
        while self._idle:
            self._idle.pop().close()
        self._general.close()

    def _take(self, request: httpx.Request) -> _Connection | None:
        now = time.monotonic()
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread took the last one
                break
            if now - connection.used_at < _KEEPALIVE_S and connection.address == _address(request):
                return connection
            connection.close()
        return None

    def _receive(self, connection: _Connection, request: httpx.Request) -> httpx.Response:
        try:
            response, may_live = connection.receive(request)
        except BaseException:
            connection.close()
            raise
        if may_live:
            connection.used_at = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()
        return response


class Started:
    """A request under way. Exactly one of `finish` and `abandon` must be called."""

    def __init__(self, transport: Transport, request: httpx.Request, connection: _Connection | None) -> None:
        self._transport = transport
        self._request = request
        self._connection = connection

    def finish(self) -> httpx.Response:
        """The answer.

        Raises:
            httpx.TransportError: no connection, no answer in time, or an answer that breaks off.
        """
        return self._transport.finish(self._request, self._connection)

    def abandon(self) -> None:
        """Nobody wants the answer."""
        if self._connection is not None:
            self._connection.close()


class _Connection:
    """One socket; exceptions are httpx's."""

    def __init__(self, request: httpx.Request) -> None:
        self.address = _address(request)
        self.used_at = 0.0
        try:
            self._socket = socket.create_connection(self.address, request.extensions["timeout"]["connect"])
        except TimeoutError as error:
            raise httpx.ConnectTimeout(str(error), request=request) from error
        except OSError as error:
            raise httpx.ConnectError(str(error), request=request) from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(request.extensions["timeout"]["read"])

    def close(self) -> None:
        self._socket.close()

    def send(self, request: httpx.Request) -> None:
        with _translated(request):
            self._socket.sendall(_head_of(request))

    def receive(self, request: httpx.Request) -> tuple[httpx.Response, bool]:
        """The answer, and whether the connection can be used again."""
        with _translated(request):
            return self._answer(request)

    def _answer(self, request: httpx.Request) -> tuple[httpx.Response, bool]:
        received = self._socket.recv(_MOST_HEAD_BYTES)
        while (end := received.find(b"\r\n\r\n")) < 0:
            more = self._socket.recv(_MOST_HEAD_BYTES)
            if not more:
                raise httpx.RemoteProtocolError("the connection was closed before an answer came", request=request)
            received += more
            if len(received) > _MOST_HEAD_BYTES:
                raise httpx.RemoteProtocolError(f"an answer with a head above {_MOST_HEAD_BYTES} bytes")
        status = _HEAD.match(received)
        headers = [_field(line) for line in received[:end].split(b"\r\n")[1:]]
        fields = dict(headers)
        length = fields.get(b"content-length", b"")
        if status is None or not length.isdigit() or b"transfer-encoding" in fields or status[1] < b"200":
            raise _Unsupported
        body = self._body(received[end + 4 :], int(length), request)
        may_live = fields.get(b"connection", b"").lower() != b"close"
        return httpx.Response(int(status[1]), headers=headers, content=body, request=request), may_live

    def _body(self, body: bytes, length: int, request: httpx.Request) -> bytes:
        parts = [body]
        missing = length - len(body)
        while missing > 0:
            part = self._socket.recv(missing)
            if not part:
                raise httpx.ReadError(f"the answer ends {missing} bytes early", request=request)
            parts.append(part)
            missing -= len(part)
        if missing < 0:
            raise httpx.RemoteProtocolError("more bytes than the answer has", request=request)
        return b"".join(parts)


@contextmanager
def _translated(request: httpx.Request) -> Iterator[None]:
    """A socket's exceptions become httpx's."""
    try:
        yield
    except TimeoutError as error:
        raise httpx.ReadTimeout(str(error), request=request) from error
    except ConnectionError as error:
        raise httpx.RemoteProtocolError(f"the connection was closed: {error}", request=request) from error
    except OSError as error:
        raise httpx.ReadError(str(error), request=request) from error


def _address(request: httpx.Request) -> tuple[str, int]:
    return request.url.host, request.url.port or 80


def _head_of(request: httpx.Request) -> bytes:
    lines = [name + b": " + value for name, value in request.headers.raw]
    return b"\r\n".join((b"GET " + request.url.raw_path + b" HTTP/1.1", *lines, b"\r\n"))


def _field(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name.lower(), value.strip()
