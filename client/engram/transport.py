"""Draws are fetched by GET over kept-alive sockets, without httpx, which everything else goes through.

A draw is decoded in 0.8 ms, and httpx takes a quarter of that for one request, all of it under Python's lock. This
module takes a tenth. It knows only what a draw needs: no body in the request, `Content-Length` in the answer, no TLS.
An answer of another kind (a proxy that answers in chunks, say) is `Unsupported`, and the client asks again through
httpx, which is harmless because draws change nothing.

A request can be started before its answer is wanted. So one thread keeps service and decoder at work at the same time,
which several threads do worse: they lose a third to handing Python's lock to each other.

It raises httpx's exceptions, so that `engram.http` treats both ways alike.
"""

from __future__ import annotations

import re
import socket
import time
import weakref
from collections import deque
from contextlib import suppress
from typing import Final, NamedTuple

import httpx

KEEPALIVE_S: Final = 60.0
"""The service closes idle connections after 75 s; the client must be first, or a request meets a closing door."""

_MOST_HEAD_BYTES: Final = 65_536
_STATUS = re.compile(rb"HTTP/1\.1 ([2-5]\d\d)[ \r]")


class Unsupported(Exception):
    """The answer may be correct HTTP, but not of the kind that this module reads."""


class Answer(NamedTuple):
    """An HTTP answer, its body complete; names of headers are in lower case."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Connections:
    """Kept-alive connections to one address. Threads may share them; a forked process is told by `after_fork`."""

    def __init__(self, host: str, port: int, *, connect_timeout_s: float, read_timeout_s: float) -> None:
        self._address = host, port
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._idle: deque[_Connection] = deque()
        self._is_closed = False
        self._all: weakref.WeakSet[_Connection] = weakref.WeakSet()

    def close(self) -> None:
        """All idle connections are closed; those in use are when they come back."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()

    def after_fork(self) -> None:
        """In a forked process: no connection of the parent's is left here; there, nothing is closed by this.

        A request that the parent had started is sent again, on a new connection, when its answer is fetched here.
        """
        self._idle = deque()
        for connection in list(self._all):
            with suppress(OSError):
                connection.close()

    def start(self, head: bytes) -> Started:
        """Send a request, to fetch its answer later; what goes wrong is raised then.

        Without an idle connection it is sent only when the answer is fetched.
        """
        connection = self._take()
        if connection is not None:
            try:
                connection.send(head)
            except httpx.TransportError:
                connection.close()
                connection = None
        return Started(self, head, connection)

    def finish(self, head: bytes, connection: _Connection | None) -> Answer:
        """The answer to a request that was sent on this connection, or was not sent yet."""
        if connection is not None and connection.is_open:
            try:
                return self._receive(connection)
            except httpx.RemoteProtocolError:
                # It was closed while it was idle: nothing is wrong with the service yet.
                pass
        connection = _Connection(self._address, self._connect_timeout_s, self._read_timeout_s)
        self._all.add(connection)
        try:
            connection.send(head)
        except BaseException:
            connection.close()
            raise
        return self._receive(connection)

    def _take(self) -> _Connection | None:
        now = time.monotonic()
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread took the last one
                break
            if now - connection.used_at < KEEPALIVE_S:
                return connection
            connection.close()
        return None

    def _receive(self, connection: _Connection) -> Answer:
        try:
            answer, may_live = connection.receive()
        except BaseException:
            connection.close()
            raise
        if may_live and not self._is_closed:
            connection.used_at = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()
        return answer


class Started:
    """A request under way. Exactly one of `finish` and `abandon` must be called."""

    def __init__(self, connections: Connections, head: bytes, connection: _Connection | None) -> None:
        self._connections = connections
        self._head = head
        self._connection = connection

    def finish(self) -> Answer:
        """The answer.

        Raises:
            httpx.TransportError: no connection, no answer in time, or an answer that breaks off.
            Unsupported: the answer must be asked for in another way.
        """
        return self._connections.finish(self._head, self._connection)

    def abandon(self) -> None:
        """Nobody wants the answer."""
        if self._connection is not None:
            self._connection.close()


class _Connection:
    """One socket; exceptions are httpx's."""

    def __init__(self, address: tuple[str, int], connect_timeout_s: float, read_timeout_s: float) -> None:
        self.used_at = 0.0
        try:
            self._socket = socket.create_connection(address, connect_timeout_s)
        except TimeoutError as error:
            raise httpx.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(read_timeout_s)

    @property
    def is_open(self) -> bool:
        return self._socket.fileno() >= 0

    def close(self) -> None:
        self._socket.close()

    def send(self, head: bytes) -> None:
        try:
            self._socket.sendall(head)
        except OSError as error:
            raise _of_httpx(error) from error

    def receive(self) -> tuple[Answer, bool]:
        """The answer, and whether the connection can be used again."""
        try:
            received = self._socket.recv(_MOST_HEAD_BYTES)
            while (end := received.find(b"\r\n\r\n")) < 0:
                more = self._socket.recv(_MOST_HEAD_BYTES)
                if not more:
                    raise httpx.RemoteProtocolError("the connection was closed before an answer came")
                received += more
                if len(received) > _MOST_HEAD_BYTES:
                    raise httpx.RemoteProtocolError(f"an answer with a head above {_MOST_HEAD_BYTES} bytes")
            status = _STATUS.match(received)
            headers = [_field(line) for line in received[:end].split(b"\r\n")[1:]]
            fields = dict(headers)
            length = fields.get(b"content-length", b"")
            if status is None or not length.isdigit() or b"transfer-encoding" in fields:
                raise Unsupported
            body = self._body(received[end + 4 :], int(length))
        except OSError as error:
            raise _of_httpx(error) from error
        return Answer(int(status[1]), headers, body), fields.get(b"connection", b"").lower() != b"close"

    def _body(self, body: bytes, length: int) -> bytes:
        missing = length - len(body)
        if not missing:
            return body
        parts = [body]
        while missing > 0:
            part = self._socket.recv(missing)
            if not part:
                raise httpx.ReadError(f"the answer ends {missing} bytes early")
            parts.append(part)
            missing -= len(part)
        if missing < 0:
            raise httpx.RemoteProtocolError("more bytes than the answer has")
        return b"".join(parts)


def _of_httpx(error: OSError) -> httpx.TransportError:
    """What httpx raises where a socket raises this."""
    if isinstance(error, TimeoutError):
        return httpx.ReadTimeout(str(error))
    if isinstance(error, ConnectionError):
        return httpx.RemoteProtocolError(f"the connection was closed: {error}")
    return httpx.ReadError(str(error))


def _field(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name.lower(), value.strip()
