"""Pages of the console: templates, the policy of their headers, the check of forms, problems as pages.

Every address on a page is relative to the page, so the console works below the prefix of a proxy that says nothing of
it. No page has scripts or styles of its own: the policy allows the files under `STATIC` only, and no other host.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from engram.errors import EngramError, Forbidden

from .. import __version__, problems
from ..acting import Principal

CONSOLE = "/console"
STATIC = "console/static"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

MAX_SEGMENTS = 60
"""Of a bar; more would be thinner than a pixel on a phone."""

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Place:
    """An entry of the navigation: the page's path below /console, and who sees it."""

    label: str
    path: tuple[str, ...]
    is_for_admins: bool = False
    is_for_all_buffers: bool = False

    def is_open_to(self, principal: Principal) -> bool:
        """Whether the page would let this principal in."""
        return (principal.may("admin") or not self.is_for_admins) and not (self.is_for_all_buffers and principal.prefix)


PLACES = (
    Place("Overview", ()),
    Place("Ingests", ("ingests",)),
    Place("Draws", ("draws",)),
    Place("Extractors", ("extractors",)),
    Place("Tokens", ("tokens",), is_for_admins=True, is_for_all_buffers=True),
    Place("Audit", ("audit",), is_for_admins=True),
)


class Console:
    """What all pages of an application are rendered with."""

    def __init__(self) -> None:
        self.templates = Environment(
            loader=FileSystemLoader(_FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.templates.filters.update(
            bytes=readable_bytes,
            count=readable_count,
            time=readable_time,
            iso=_iso,
            percent=_percent,
            segments=_segments,
            rectangles=_rectangles,
        )
        self.templates.globals.update(version=__version__)


def render(
    request: HTTPConnection, name: str, /, *, status: int = 200, problem: EngramError | None = None, **context: Any
) -> HTMLResponse:
    """The page that a template makes of this; where there is a problem, which forms show, with the status of that.

    Beside `context` and `problem`, templates have `principal` (None where nobody is logged in), `csrf`, `nav`,
    `url(...)` (the address of a path below /console), `static(name)` and `here(**changes)` (this page with other
    filters).
    """
    console: Console = request.app.state.console
    principal: Principal | None = request.scope.get("engram.principal")
    if principal is not None and principal.scope is None:
        principal = None
    path = tuple(part for part in request.url.path.split("/") if part)[1:]
    open_to = [] if principal is None else [place for place in PLACES if place.is_open_to(principal)]
    given: dict[str, Any] = {
        "principal": principal,
        "csrf": csrf_of(request),
        "nav": [(place.label, url(request, *place.path), place.path == path[:1]) for place in open_to],
        "url": lambda *parts, **query: url(request, *parts, **query),
        "static": lambda file: f"{up(request)}{STATIC}/{file}?v={_version(file)}",
        "here": lambda **changes: _here(request, changes),
        "request_id": request.scope.get("engram.request_id", ""),
        "problem": None if problem is None else problem.to_problem(),
    }
    page = console.templates.get_template(name).render(given | context)
    answered = status if problem is None else problem.status
    return HTMLResponse(page, status_code=answered, headers={"Cache-Control": "no-store"})


def url(request: HTTPConnection, *parts: object, **query: object) -> str:
    """The address of a page of the console, relative to that of the request: `url(request, "buffers", name)`.

    What is None in `query` is left out.
    """
    given = {key: value for key, value in query.items() if value is not None}
    path = "/".join(["console", *(quote(str(part), safe="") for part in parts)])
    return f"{up(request)}{path}{'?' if given else ''}{urlencode(given, doseq=True)}"


def redirect(request: HTTPConnection, *parts: object, **query: object) -> Response:
    """What a form that has changed something answers: go and look at it there."""
    return Response(status_code=303, headers={"Location": url(request, *parts, **query), "Cache-Control": "no-store"})


def csrf_of(request: HTTPConnection) -> str:
    """What forms of this session carry, so that no other site can make them."""
    session = request.scope.get("engram.session")
    return "" if session is None else str(session.csrf)


async def check_csrf(request: Request) -> None:
    """Returns if the request reads only, or comes from a page of this session.

    Raises:
        Forbidden: it does not.
    """
    if request.method in ("GET", "HEAD"):
        return
    given: object = request.headers.get("x-csrf-token")
    if given is None:
        given = (await request.form()).get("csrf")
    own = csrf_of(request)
    if not own or not isinstance(given, str) or not hmac.compare_digest(given.encode(), own.encode()):
        raise Forbidden(
            "this form does not belong to your session, or the session has ended: go back, load the page again and "
            "send it once more"
        )


class Files(StaticFiles):
    """The files under `STATIC`; an address with the file's version is good for ever."""

    def __init__(self) -> None:
        super().__init__(directory=_FOLDER / "static")

    async def get_response(self, path: str, scope: Scope) -> Response:
        """One file."""
        response = await super().get_response(path, scope)
        is_exact = scope["query_string"].startswith(b"v=")
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if is_exact else "no-cache"
        return response


def framed(scope: Scope, receive: Receive, send: Send) -> Send:
    """What sends the answer to a request: under /console answers carry the policy, and problems are pages.

    So it does not matter whether a view, the framework or the Gate refuses a request. Who asks for JSON gets it.
    """
    path = scope["path"]
    return _Framed(scope, receive, send) if path == CONSOLE or path.startswith(f"{CONSOLE}/") else send


class _Framed:
    """Passes an answer's messages on, a problem as a page: `send` of one request."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._problem: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            missing = [(name, value) for name, value in HEADERS.items() if name not in headers]
            message["headers"] = [
                *message["headers"],
                *((name.lower().encode(), value.encode()) for name, value in missing),
            ]
            wants_json = "application/json" in Headers(scope=self._scope).get("accept", "")
            if headers.get("content-type", "").startswith(problems.MEDIA_TYPE) and not wants_json:
                self._problem = message
                return
        if self._problem is None:
            await self._send(message)
            return
        self._body += message.get("body", b"")
        if not message.get("more_body", False):
            await self._answer(self._problem)

    async def _answer(self, start: Message) -> None:
        # What was a HEAD has no body to read the problem from.
        problem = json.loads(self._body) if self._body else _bare(start["status"])
        page = _problem_page(HTTPConnection(self._scope), problem)
        kept = [header for header in start["headers"] if header[0] not in (b"content-type", b"content-length")]
        body = bytes(page.body)
        is_head = self._scope["method"] == "HEAD"
        length = (b"content-length", str(len(body)).encode())
        headers = [*kept, (b"content-type", b"text/html; charset=utf-8"), length]
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": b"" if is_head else body, "more_body": False})


def _problem_page(request: HTTPConnection, problem: dict[str, Any]) -> HTMLResponse:
    # A page that cannot say who asks still says what is wrong.
    scope: MutableMapping[str, Any] = request.scope
    if problem["status"] == 401:
        scope["engram.principal"] = None
    return render(request, "problem.html", status=problem["status"], refusal=problem)


def _bare(status: int) -> dict[str, Any]:
    return {"status": status, "title": HTTPStatus(status).phrase, "detail": ""}


def up(request: HTTPConnection) -> str:
    """From the address of the request to the root of the service."""
    raw: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    return "../" * (raw.partition(b"?")[0].count(b"/") - 1)


def _here(request: HTTPConnection, changes: dict[str, object]) -> str:
    """The address of this page with other values in its query; None leaves a key out."""
    kept = [(key, value) for key, value in request.query_params.multi_items() if key not in changes]
    changed = [(key, value) for key, value in changes.items() if value is not None]
    return f"?{urlencode([*kept, *changed], doseq=True)}"


@cache
def _version(file: str) -> str:
    return sha256((_FOLDER / "static" / file).read_bytes()).hexdigest()[:12]


def readable_bytes(size: float) -> str:
    """1,234 B, 12.3 kB, 4.56 MB: three digits and the unit, in thousands as budgets are given."""
    amount, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(amount) < 999.5:
            break
        if unit != "TB":
            amount /= 1000
    if unit == "B":
        return f"{int(amount)} B"
    return f"{amount:.{2 if abs(amount) < 9.995 else 1 if abs(amount) < 99.95 else 0}f} {unit}"


def readable_count(number: float) -> str:
    """1,234,567."""
    return f"{number:,}"


def readable_time(moment: datetime | float | None) -> str:
    """2026-01-31 23:59:59, in UTC; "never" if it is None."""
    return "never" if moment is None else f"{_utc(moment):%Y-%m-%d %H:%M:%S}"


def _iso(moment: datetime | float) -> str:
    return _utc(moment).isoformat()


def _utc(moment: datetime | float) -> datetime:
    return moment.astimezone(UTC) if isinstance(moment, datetime) else datetime.fromtimestamp(moment, UTC)


def _segments(sizes: Mapping[object, int], what: str) -> list[tuple[str, int]]:
    """Parts of a bar, each named; of very many only so many as one can tell apart, and the rest."""
    parts = [(f"{what}{key}", size) for key, size in sizes.items()]
    first, rest = parts[:MAX_SEGMENTS], parts[MAX_SEGMENTS:]
    return [*first, (f"{len(rest)} more", sum(size for _, size in rest))] if rest else first


def _rectangles(segments: list[tuple[str, int]], whole: int) -> Markup:
    """The parts of a bar of 1000 x 10, one beside the other. A page may have a thousand: a template would take long."""
    drawn, at = [], 0
    for number, (name, size) in enumerate(segments):
        place = f'x="{1000 * at / whole:.2f}" y="0" width="{1000 * size / whole:.2f}" height="10"'
        title = escape(f"{name}: {readable_bytes(size)}")
        drawn.append(f'<rect class="s{number % 8}" {place}><title>{title}</title></rect>')
        at += size
    return Markup("".join(drawn))


def _percent(part: float, whole: float) -> str:
    """A part of a whole, to a tenth where that says more; "0 %" of nothing."""
    if not whole:
        return "0 %"
    share = 100 * part / whole
    return f"{share:.1f} %" if 0 < share < 9.95 else f"{share:.0f} %"
