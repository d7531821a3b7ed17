"""Serve the application over HTTP, and end connections that are too many, too slow, or whose heads never end.

uvicorn and httptools bound none of this, and it comes before any token is looked at. What a connection may cost:

    head       at most `max_head_bytes` and `MAX_HEADERS`, complete or not, within `head_timeout_s` of its first byte
               (of the connection for its first request); the same bytes bound what httptools keeps of trailers
    body       `min_body_bytes_per_s` on average; `max_stall_s` of silence at once
    answer     is read at that speed, too
    pipeline   `MAX_PIPELINED` requests that wait for the answer to the one before

The clocks run in `Edge.watch`, which looks at every connection a few times in the shortest of these times, so that a
request costs no timer of its own. They stand still while the service itself is what the connection waits for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import socket
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from engram.errors import EngramError, InvalidRequest, TooLarge, Unavailable
from engram.schemas import API_HEADER, API_NUMBER

from .problems import MEDIA_TYPE
from .settings import Settings

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""How long an idle connection stays open: most pauses of a trainer are shorter."""

SHUTDOWN_S = 10
"""How long requests in progress may go on after a signal."""

MAX_PIPELINED = 8
"""A read of 256 KiB can hold 14,000 requests, and each takes 4 KB while it waits. No client of today sends ahead."""

MAX_HEADERS = 256
"""Of one request: a head of 64 KiB can hold 16,000, which take the event loop 10 ms. A proxy may add a dozen."""

LINGER_S = 1.0
"""How long a client that is refused may take to read why: closed at once, it would find its connection reset."""

# Of a head, to be parsed at once.
_PIECE_BYTES = 8192

# A handle may be needed for each connection and as many for packs and the database.
_HANDLE_SHARE = 2


class Edge:
    """The bounds of one server."""

    def __init__(self, settings: Settings) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = settings.max_connections
        self.max_connections = most if soft == resource.RLIM_INFINITY else min(most, max(1, soft // _HANDLE_SHARE))
        self.max_head_bytes = settings.max_head_bytes
        self.head_timeout_s = settings.head_timeout_s
        self.min_bytes_per_s = settings.min_body_bytes_per_s
        self.max_stall_s = settings.max_stall_s

    async def watch(self, connections: set[Connection]) -> None:
        """Ends connections that are too slow, until it is cancelled."""
        pause_s = min(1.0, self.head_timeout_s / 4, self.max_stall_s / 4)
        now = asyncio.get_running_loop().time
        before = now()
        while True:
            await asyncio.sleep(pause_s)
            # While the loop was busy, nothing was read: that is not the clients' fault.
            elapsed_s, before = min(now() - before, 2 * pause_s), now()
            for connection in list(connections):
                try:
                    connection.look(elapsed_s)
                except Exception as error:
                    # One broken connection must not stop the clocks of all others.
                    logger.error("a connection cannot be looked at; it is ended", exc_info=error)
                    connection.transport.abort()


class Connection(HttpToolsProtocol):
    """One connection of uvicorn's, held to the bounds of an `Edge`."""

    def __init__(self, *args: Any, edge: Edge, **given: Any) -> None:
        super().__init__(*args, **given)
        self._edge = edge
        # The request that is being answered, or was last; `cycle` is the one that was read last.
        self._answered: RequestResponseCycle | None = None
        self._is_refused = False
        self._in_body = False
        # Received since a head or a piece of a body was last complete: of a head, or of what only frames a body.
        self._unparsed_bytes = 0
        self._received_bytes = 0
        self._unsent_bytes = 0
        self._was_read = False
        self._head_s = 0.0
        self._refused_s = 0.0
        self._body_credit_s = self._answer_credit_s = edge.max_stall_s

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._edge.max_connections:
            self._is_refused = True
            most = self._edge.max_connections
            error = Unavailable(f"{most} connections are open, the most that this service takes; try again", most=most)
            transport.write(_answer(error, HTTPStatus.SERVICE_UNAVAILABLE))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's; who answers is told even if there are requests behind."""
        self._disconnect()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, at most as much at once as a head may still have."""
        if self._is_refused:
            return
        self._received_bytes += len(data)
        most = self._edge.max_head_bytes
        if len(data) <= _PIECE_BYTES and self._unparsed_bytes + len(data) <= most:
            self._unparsed_bytes += len(data)
            super().data_received(data)
            return
        left = memoryview(data)
        while left and not self._is_refused and not self.transport.is_closing():
            if self._unparsed_bytes >= most:
                self._refuse_head(f"more than {most} bytes, the most that ENGRAM_MAX_HEAD_BYTES allows")
                return
            if self._unparsed_bytes and len(self.headers) > MAX_HEADERS:
                self._refuse_head(f"more than {MAX_HEADERS} headers")
                return
            # A body is handed on as it came, with what little of the next head may be behind it.
            is_body = self._in_body and not self._unparsed_bytes
            piece = left if is_body else left[: min(most - self._unparsed_bytes, _PIECE_BYTES)]
            self._unparsed_bytes += len(piece)
            super().data_received(cast(bytes, piece))
            left = left[len(piece) :]

    def on_headers_complete(self) -> None:
        """As uvicorn's."""
        self._unparsed_bytes, self._head_s = 0, 0.0
        self._in_body, self._body_credit_s = True, self._edge.max_stall_s
        if len(self.pipeline) >= MAX_PIPELINED or len(self.headers) > MAX_HEADERS:
            raise ValueError("more than is understood")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """As uvicorn's."""
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """As uvicorn's."""
        self._unparsed_bytes, self._in_body = 0, False
        super().on_message_complete()

    def resume_writing(self) -> None:
        """As uvicorn's."""
        self._was_read = True
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What cannot be parsed is a problem like any other."""
        if self.headers and len(self.headers) > MAX_HEADERS:
            self._refuse_head(f"more than {MAX_HEADERS} headers")
            return
        self._refuse(InvalidRequest("what was sent is no HTTP/1.1 request"), HTTPStatus.BAD_REQUEST)

    @property
    def _is_answering(self) -> bool:
        return self._answered is not None and not self._answered.response_complete

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _disconnect(self) -> None:
        """Who makes an answer finds that nobody wants it any more."""
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def look(self, elapsed_s: float) -> None:
        """The connection is ended if it has been too slow, the last `elapsed_s` seconds among others."""
        if self._is_refused:
            self._refused_s += elapsed_s
            if self._refused_s > LINGER_S:
                self.transport.abort()
            return
        self._look_at_reader(elapsed_s)
        received, self._received_bytes = self._received_bytes, 0
        if self.transport.is_closing():
            return
        is_idle = not self._is_answering
        if self._in_body:
            # Nobody waits for the rest of a body once it is answered.
            self._look_at_body(0 if is_idle else received, elapsed_s)
        elif is_idle and (self._unparsed_bytes or self._answered is None):
            self._head_s += elapsed_s
            if self._head_s > self._edge.head_timeout_s:
                if not self._unparsed_bytes:
                    self.transport.close()
                    return
                self._refuse_slow(f"no whole head of a request came within {self._edge.head_timeout_s:g} s")

    def _look_at_reader(self, elapsed_s: float) -> None:
        """Of an answer that the kernel has no room for, bytes must go at the least speed."""
        edge = self._edge
        unsent = self.transport.get_write_buffer_size()
        gained_s = max(0, self._unsent_bytes - unsent) / edge.min_bytes_per_s
        if not unsent or self._was_read:
            gained_s = edge.max_stall_s
        self._unsent_bytes, self._was_read = unsent, False
        self._answer_credit_s = min(edge.max_stall_s, self._answer_credit_s + gained_s - elapsed_s)
        if self._answer_credit_s < 0 and unsent:
            self.transport.abort()

    def _look_at_body(self, received: int, elapsed_s: float) -> None:
        edge = self._edge
        if self.flow.read_paused:
            return
        gained_s = received / edge.min_bytes_per_s - elapsed_s
        self._body_credit_s = min(edge.max_stall_s, self._body_credit_s + gained_s)
        if self._body_credit_s < 0:
            self._refuse_slow(
                f"the body came at less than {edge.min_bytes_per_s} bytes/s for {edge.max_stall_s:g} s; "
                "ENGRAM_MIN_BODY_BYTES_PER_S and ENGRAM_MAX_STALL_S allow more"
            )

    def _refuse_head(self, what: str) -> None:
        error = TooLarge(f"the head of a request has {what}", max_head_bytes=self._edge.max_head_bytes)
        self._refuse(error, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def _refuse_slow(self, sentence: str) -> None:
        self._refuse(Unavailable(sentence), HTTPStatus.REQUEST_TIMEOUT)

    def _refuse(self, error: EngramError, status: int) -> None:
        """No more of this connection is read; the client is told why unless it has part of another answer."""
        self._is_refused = True
        self._unset_keepalive_if_required()
        cut = self._is_answering and self._answered is not None and self._answered.response_started
        self._disconnect()
        if self.transport.is_closing() or self.pipeline or cut:
            self.pipeline.clear()
            self.transport.abort()
            return
        self.transport.write(_answer(error, status))
        self.transport.write_eof()
        self.flow.pause_reading()


class Server(uvicorn.Server):
    """Serves an application within the bounds of `settings`, and says where it listens once it does.

    Scripts and tests wait for that line, or for `port_file`, which gets the port.
    """

    def __init__(self, application: Any, settings: Settings, port_file: Path | None = None) -> None:
        self.edge = Edge(settings)
        super().__init__(
            uvicorn.Config(
                application,
                http=cast(type[asyncio.Protocol], partial(Connection, edge=self.edge)),
                ws="none",
                log_config=None,
                # `around.Around` writes it, with what it knows of the request.
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=SHUTDOWN_S,
            )
        )
        self.port_file = port_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Connections are accepted when the line is out."""
        await super().startup(sockets)
        if not sockets or not self.started:
            return
        connections = cast(set[Connection], self.server_state.connections)
        if (state := getattr(self.config.app, "state", None)) is not None and hasattr(state, "metrics"):
            state.metrics.connections = connections.__len__
        self._watch = asyncio.create_task(self.edge.watch(connections))
        host, port = sockets[0].getsockname()[:2]
        if self.port_file is not None:
            partial_file = self.port_file.with_name(f".{self.port_file.name}.{os.getpid()}")
            partial_file.write_text(f"{port}\n")
            partial_file.rename(self.port_file)
        print(f"Engram service on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().shutdown(sockets)
        self._watch.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that its port is known, and not yet listening."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _answer(error: EngramError, status: int) -> bytes:
    """A whole HTTP answer with the problem, for connections on which no request was understood."""
    title = HTTPStatus(status).phrase
    body = json.dumps({**error.to_problem(), "title": title, "status": int(status)}).encode()
    retry = "Retry-After: 1\r\n" if isinstance(error, Unavailable) else ""
    head = (
        f"HTTP/1.1 {int(status)} {title}\r\nContent-Type: {MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\n"
        f"{API_HEADER}: {API_NUMBER}\r\n{retry}Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
