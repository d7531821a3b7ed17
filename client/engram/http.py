"""Requests to one service: how they are sent, what their failures mean, and when they are tried again.

There are two ways of sending. Draws over plain HTTP go by `engram.transport`; everything else goes straight to a
transport of httpx: cookies, redirects, authentication flows and hooks of `httpx.Client` are not used here, and would
cost a third of a draw. Both raise httpx's exceptions, which `_FAILURES` turns into ours.

Threads may share an `Http`. A forked process makes connections of its own and leaves its parent's alone, whatever the
parent's threads were doing when it was forked.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final, TypedDict, TypeVar, Unpack
from urllib.parse import quote, urlencode, urlsplit

import httpx
import pydantic

from engram import forks
from engram.errors import EngramError, InvalidRequest, RateLimited, Unavailable, from_problem, of_status
from engram.oversight import AuditPage, ServedList
from engram.schemas import API_HEADER, API_NUMBER, ExemplarPage, IngestPage
from engram.transport import KEEPALIVE_S, Connections, Started, Unsupported

DEFAULT_URL: Final = "http://127.0.0.1:8077"

# Pauses of about 0.1, 0.2, 0.4, ... seconds: four retries outlast a restart of the service's process.
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 30.0

_LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=KEEPALIVE_S)

_NEVER_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout)
_FAILURES: Final[tuple[tuple[tuple[type[httpx.RequestError], ...], type[EngramError], str], ...]] = (
    (
        _NEVER_SENT,
        Unavailable,
        "no service answers at {service} ({what}): is it running? start it with `engram-service serve`, or set "
        "ENGRAM_URL",
    ),
    ((httpx.TimeoutException,), Unavailable, "{url} did not answer in time ({kind}); try again later"),
    ((httpx.LocalProtocolError,), InvalidRequest, "{url} cannot be asked for: {what}"),
    ((httpx.RequestError,), Unavailable, "the connection to {url} broke ({kind}: {what}); try again"),
)
"""What goes wrong on the way, the first row that fits; and the sentence for it."""

_left_to_the_parent: list[httpx.BaseTransport] = []
"""Transports that a forked process has copies of. They are kept, not closed: closing one takes a lock, which a thread
of the parent may have held; and one that is forgotten warns of open sockets. Their descriptors end with the process."""

M = TypeVar("M", bound=pydantic.BaseModel)
P = TypeVar("P", ExemplarPage, IngestPage, AuditPage, ServedList)


@dataclass(frozen=True)
class Body:
    """What a request carries; `content` is called for each attempt."""

    content: Callable[[], bytes | Iterable[bytes]]
    media_type: str


def json_body(model: pydantic.BaseModel) -> Body:
    """A model as the body of a request."""
    content = model.model_dump_json().encode()
    return Body(lambda: content, "application/json")


class _Options(TypedDict, total=False):
    headers: Sequence[tuple[str, str]]
    body: Body
    retry: bool
    wait_s: float


class Http:
    """The connections to a service; its arguments are those of `Client`."""

    def __init__(
        self,
        url: str,
        *,
        token: str,
        connect_timeout_s: float,
        read_timeout_s: float,
        write_timeout_s: float,
        retries: int,
        transport: httpx.BaseTransport | None,
    ) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.url!r} is not the URL of a service, like {DEFAULT_URL}")
        token = token.strip()
        if not (token.isascii() and token.isprintable()):
            raise ValueError("the token must be printable ASCII, as it travels in an HTTP header")
        self._headers = [("Host", parts.netloc.rpartition("@")[2]), ("User-Agent", "engram"), ("Accept", "*/*")]
        if token:
            self._headers.append(("Authorization", f"Bearer {token}"))
        self._timeouts = {"connect": connect_timeout_s, "read": read_timeout_s, "write": write_timeout_s}
        self._retries = retries
        # Sockets of our own serve where nothing lies between: no TLS, no transport of the caller's.
        self._connections = None
        if transport is None and parts.scheme == "http":
            self._connections = Connections(
                parts.hostname, parts.port or 80, connect_timeout_s=connect_timeout_s, read_timeout_s=read_timeout_s
            )
        fields = "".join(f"\r\n{name}: {value}" for name, value in self._headers)
        self._head_start = f"GET {quote(parts.path)}".encode("ascii")
        self._head_end = f" HTTP/1.1{fields}\r\n\r\n".encode("ascii")
        self._is_tls = parts.scheme == "https"
        # Its own generator: a program that seeds the global one must not see its draws change with the network.
        self._random = random.Random()
        self._is_api_checked = False
        self._given = transport
        self._transport = transport
        self._making_transport = threading.Lock()
        forks.register(self)

    def close(self) -> None:
        """Close all connections of this process."""
        if self._connections is not None:
            self._connections.close()
        if self._transport is not None:
            self._transport.close()

    def after_fork(self) -> None:
        """In a forked process: the next request makes a connection."""
        self._making_transport = threading.Lock()
        self._random = random.Random()  # processes that are refused together should not come back together
        if self._transport is not None:
            _left_to_the_parent.append(self._transport)
        self._transport = None
        if self._connections is not None:
            self._connections.after_fork()

    def start(self, path: str) -> Started | None:
        """Ask for a draw, to be fetched by `send`; None if it cannot be asked for before it is fetched."""
        if self._connections is None:
            return None
        return self._connections.start(self._head_start + path.encode("ascii") + self._head_end)

    def send(
        self,
        method: str,
        path: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: Body | None = None,
        retry: bool | None = None,
        wait_s: float = 0.0,
        started: Started | None = None,
    ) -> bytes:
        """The body of a successful answer; empty for 204 and 304.

        What fails on the way is tried again, with growing pauses and jitter, unless that could do something twice: if
        `retry` says so (None: reads only), or if no connection was made. `Retry-After` is obeyed.

        Args:
            method: of HTTP.
            path: after the service's URL, quoted.
            headers: in addition to those of every request.
            body: of the request.
            retry: whether the same request twice does what it does once.
            wait_s: how much longer than usual the service may take.
            started: what `start` returned for this path.

        Raises:
            EngramError: what the service says, or Unavailable.
        """
        retry = method == "GET" if retry is None else retry
        attempt = 0
        while True:
            try:
                if started is not None:
                    under_way, started = started, None
                    content = self._finish(under_way, path)
                    if content is not None:
                        return content
                with self._answer(path, self._request(method, path, headers, body, wait_s)) as response:
                    return response.read()
            except (Unavailable, RateLimited) as error:
                pause_s = self._pause_s(attempt, error)
                may_retry = retry or isinstance(error.__cause__, _NEVER_SENT)
                if attempt == self._retries or pause_s > _LONGEST_PAUSE_S or not may_retry:
                    raise
            attempt += 1
            time.sleep(pause_s)

    def fetch(self, kind: type[M], method: str, path: str, **options: Unpack[_Options]) -> M:
        """The answer to `send` as a model.

        Raises:
            EngramError: as `send`, or the answer is not of this kind.
        """
        return self.read(kind, self.send(method, path, **options), path)

    def read(self, kind: type[M], content: bytes, path: str) -> M:
        """An answer's body as a model, or EngramError; members that this version does not know are ignored."""
        try:
            return kind.model_validate_json(content)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "its JSON"
            raise EngramError(
                f"{self.url}{path} answered what this client cannot read as {kind.__name__} ({where}: {first['msg']}); "
                "if the service is newer, install its version here"
            ) from error

    def pages(self, kind: type[P], path: str, **query: object) -> Iterator[P]:
        """The pages of a list, from the first to the last; of the query, what is None is left out.

        Raises:
            EngramError: as `fetch`.
        """
        asked = {name: value for name, value in query.items() if value is not None}
        while True:
            page = self.fetch(kind, "GET", f"{path}?{urlencode(asked, doseq=True)}")
            yield page
            if page.next is None:
                return
            asked["cursor"] = page.next

    @contextmanager
    def download(self, path: str) -> Iterator[Iterator[bytes]]:
        """The body of an answer piece by piece. Never tried again: its pieces may have been used.

        Raises:
            EngramError: what the service says, or Unavailable; while it is read, too.
        """
        with self._answer(path, self._request("GET", path)) as response:
            yield response.iter_bytes()

    def _finish(self, started: Started, path: str) -> bytes | None:
        """The answer to a started request; None if it must be asked for through httpx."""
        try:
            answer = started.finish()
        except Unsupported:
            return None
        except httpx.RequestError as error:
            raise self._failure(error, path) from error
        if answer.status == 200 and self._is_api_checked:
            return answer.body
        response = httpx.Response(answer.status, headers=answer.headers, content=answer.body)
        self._raise_for_problem(response, path)
        return answer.body

    def _request(
        self,
        method: str,
        path: str,
        headers: Sequence[tuple[str, str]] = (),
        body: Body | None = None,
        wait_s: float = 0.0,
    ) -> httpx.Request:
        timeouts = self._timeouts | {"read": self._timeouts["read"] + wait_s} if wait_s else self._timeouts
        own = [*self._headers, *headers, *([] if body is None else [("Content-Type", body.media_type)])]
        content = None if body is None else body.content()
        return httpx.Request(method, self.url + path, headers=own, content=content, extensions={"timeout": timeouts})

    @contextmanager
    def _answer(self, path: str, request: httpx.Request) -> Iterator[httpx.Response]:
        """A successful answer, not read yet."""
        try:
            response = self._httpx().handle_request(request)
            try:
                self._raise_for_problem(response, path)
                yield response
            finally:
                response.close()
        except httpx.RequestError as error:
            raise self._failure(error, path) from error

    def _httpx(self) -> httpx.BaseTransport:
        """This process's transport. It is made when it is needed: certificates take 90 ms to load."""
        if self._transport is None:
            if self._given is not None:
                raise RuntimeError(
                    "this client has a transport of its caller's own, which cannot be used in a forked process; make "
                    "the client there"
                )
            with self._making_transport:
                if self._transport is None:
                    # Without TLS there is nothing to verify.
                    self._transport = httpx.HTTPTransport(verify=self._is_tls, limits=_LIMITS)
        return self._transport

    def _pause_s(self, attempt: int, error: EngramError) -> float:
        """How long to wait before trying again: what the service asked for, or longer each time, never in step."""
        pause_s = _FIRST_PAUSE_S * 2.0**attempt * self._random.uniform(0.5, 1.5)
        asked_s = error.details.get("retry_after_s")
        return max(pause_s, asked_s) if isinstance(asked_s, (int, float)) else pause_s

    def _failure(self, error: httpx.RequestError, path: str) -> EngramError:
        kind, sentence = next((kind, sentence) for causes, kind, sentence in _FAILURES if isinstance(error, causes))
        what = str(error) or "timed out"
        return kind(sentence.format(service=self.url, url=self.url + path, kind=type(error).__name__, what=what))

    def _raise_for_problem(self, response: httpx.Response, path: str) -> None:
        """The error that an answer carries is raised; problem+json as the class it names."""
        status = response.status_code
        number = response.headers.get(API_HEADER)
        if status < 300:
            self._check_api(number)
        if status < 300 or status == 304:
            return
        url = self.url + path
        content = response.read()
        if status < 400:
            target = response.headers.get("Location", "nowhere")
            raise Unavailable(f"{url} redirects to {target}, which is not followed; use that service's URL")
        if number is not None:
            self._check_api(number)
        retry_after_s = _retry_after_s(response.headers.get("Retry-After"))
        details = {} if retry_after_s is None else {"retry_after_s": retry_after_s}
        if response.headers.get("Content-Type", "").startswith("application/problem+json"):
            try:
                problem = json.loads(content)
            except ValueError:
                problem = None
            if isinstance(problem, dict):
                raise from_problem(details | problem, status)
        text = content[:200].decode("utf-8", "replace").strip()
        kind = of_status(status)
        raise kind(f"{url} answered {status}: {text or 'no explanation'}; is it an Engram service?", **details)

    def _check_api(self, number: str | None) -> None:
        """Returns if the service speaks this client's API; looked at until it did once."""
        if self._is_api_checked:
            return
        if number is None or not number.isdecimal():
            raise EngramError(
                f"{self.url} is no Engram service, or one older than this client: it states no number of its API, this "
                f"client speaks {API_NUMBER}; update the service (`pip install --upgrade 'engram[service]'`)"
            )
        if int(number) != API_NUMBER:
            what, update = (
                ("older", "'engram[service]'` there") if int(number) < API_NUMBER else ("newer", "engram` here")
            )
            raise EngramError(
                f"the service at {self.url} is {what} than this client: it speaks API {number}, the client "
                f"{API_NUMBER}; run `pip install --upgrade {update}"
            )
        self._is_api_checked = True


def _retry_after_s(text: str | None) -> float | None:
    """The seconds of a Retry-After header, which may also be a date."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
