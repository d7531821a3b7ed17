"""Find out who a request is from, and let it through only to what the table of access allows.

It is middleware around the whole application, so that no route slips past it. The API knows bearer tokens, the console
knows cookies, and neither takes the other's. The environment's token may do everything; the others are rows (`tokens`).

Without a token in the environment the service listens on loopback only, and whoever names no token may do everything.
It then checks that the request names a loopback host and comes from no foreign page: otherwise any web site could reach
it through its visitor's browser, by DNS rebinding or by a form that posts here. A request that does name a token is
treated as that token's there, too.
"""

from __future__ import annotations

import ipaddress
import re
import time
from functools import lru_cache
from hashlib import sha256
from typing import Any
from urllib.parse import quote

from anyio.to_thread import run_sync
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engram.errors import EngramError, Forbidden, Unauthorized

from .access import MAX_PATH_CHARACTERS, Access, Row
from .acting import ACTING, LOCAL, NOBODY, Acting, Principal
from .problems import problem_response
from .sessions import COOKIE, Session, Sessions, csrf_of, make_cookie
from .settings import Settings
from .tokens import RECHECK_S, Known, Tokens

_COOKIE = re.compile(rf"(?:^|;) *{COOKIE}=([A-Za-z0-9_-]{{43}}) *(?:;|$)")

_CONSOLE = "/console"
_LOGIN = "/console/login"

_BEARER = b"bearer "

MAX_PASSED = 1024
"""Requests that are remembered to have been let through."""

_Asked = tuple[str, str, bytes]
"""A method, a path, and what the Authorization header says."""


class Gate:
    """Lets a request through to `app` if whoever it is from may make it; tells the application who that is.

    Sets `engram.principal` in the scope and `acting.ACTING`; for the console `engram.session`, too.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        tokens: Tokens,
        sessions: Sessions,
        access: Access | None = None,
    ) -> None:
        self.app = app
        self._tokens, self._sessions = tokens, sessions
        self._access = access or Access()
        self._passed: dict[_Asked, Known] = {}
        self._forget_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; anything that is not HTTP (the lifespan) passes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = path_of(scope)
        asked = scope["method"], path, _header(scope, b"authorization")
        known = self._passed.get(asked)
        try:
            if known is not None and known.is_fresh:
                found = self._tokens.counted(known)
            else:
                found, send = await self._let_in(scope, asked, send)
        except _LoginNeeded:
            await _to_login(scope, path)(scope, receive, send)
            return
        except EngramError as error:
            await problem_response(error, scope["path"])(scope, receive, send)
            return
        scope["engram.principal"] = found
        # Whoever made the context takes it back: `around.Around`.
        ACTING.set(Acting(found, scope.get("engram.request_id", "")))
        await self.app(scope, receive, send)

    async def _let_in(self, scope: Scope, asked: _Asked, send: Send) -> tuple[Principal, Send]:
        """Whoever the request is from, who may make it; and what sends the answer.

        Raises:
            EngramError: it may not be made.
            _LoginNeeded: nobody is logged in at the console.
        """
        method, path, given = asked
        ACTING.set(Acting(NOBODY, scope.get("engram.request_id", "")))
        is_console = path == _CONSOLE or path.startswith(_CONSOLE + "/")
        if self._tokens.is_open:
            _check_is_from_here(scope)
        row, buffer = self._access.find(method, path)
        is_bearer = False
        if row is not None and row.scope is None and path != _LOGIN:
            found = NOBODY
        elif is_console:
            send = await self._begin_session(scope, row, send)
            found = scope["engram.session"].principal
        else:
            found, is_bearer = await self._bearer(scope, given), bool(given)
        scope["engram.principal"] = found
        if row is not None:
            row.check(found, buffer)
        elif _is_routed(scope):
            raise Forbidden(f"nobody may {method} {path}: it has no row in the table of access")
        if row is not None and is_bearer and not self._tokens.is_open:
            self._remember(asked)
        return found, send

    def _remember(self, asked: _Asked) -> None:
        """What was let through is, as long as the token is known to be good: some hundreds of milliseconds.

        A trainer asks for one thing by the thousand. No token stays here for longer than others come.
        """
        now = time.monotonic()
        if now >= self._forget_at or len(self._passed) >= MAX_PASSED:
            self._passed.clear()
            self._forget_at = now + RECHECK_S
        known = self._tokens.known(sha256(asked[2][len(_BEARER) :]).hexdigest())
        if known is not None and len(asked[1]) <= MAX_PATH_CHARACTERS:
            self._passed[asked] = known

    async def _bearer(self, scope: Scope, given: bytes) -> Principal:
        """Whoever the bearer token is of.

        Raises:
            Unauthorized: there is none, or it is nobody's, revoked or expired.
            RateLimited: it has asked too often, or its address has tried too many wrong ones.
        """
        if not given:
            if self._tokens.is_open:
                return LOCAL
            raise Unauthorized("this request needs an Authorization header: `Bearer` and the token of the service")
        # The scheme is case-insensitive (RFC 9110); the token is not.
        if given[: len(_BEARER)].lower() != _BEARER:
            raise Unauthorized("the Authorization header is not `Bearer` and a token of this service")
        secret = given[len(_BEARER) :]
        digest = sha256(secret).hexdigest()
        found = self._tokens.peek(digest)
        if found is not None:
            return found
        if self._tokens.known(digest) is not None:
            return await run_sync(self._tokens.find, digest)
        return await run_sync(self._tokens.try_secret, secret.decode("latin-1"), (scope.get("client") or ("",))[0])

    async def _begin_session(self, scope: Scope, row: Row | None, send: Send) -> Send:
        """`engram.session` is whoever the cookie is of; the answer sets one where there is none.

        Raises:
            Forbidden: an unsafe request is from a page of another site.
            _LoginNeeded: nobody is logged in, and the page is not open.
        """
        _check_site(scope)
        cookie = cookie_of(scope)
        found = None
        if cookie is not None:
            found = await run_sync(self._sessions.find, cookie)
        if found is None:
            is_open = row is not None and row.scope is None
            if not (self._tokens.is_open or is_open):
                raise _LoginNeeded
            if cookie is None:
                cookie = make_cookie()
                send = _with_cookie(send, set_cookie(scope, cookie))
            found = Session(csrf_of(cookie), LOCAL if self._tokens.is_open else NOBODY)
        scope["engram.session"], scope["engram.cookie"] = found, cookie
        return send


class _LoginNeeded(Exception):
    """Nobody is logged in at the console."""


def path_of(scope: Scope) -> str:
    """The path as the routes have it, below the prefix of a proxy."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def cookie_of(scope: Scope) -> str | None:
    """The console's cookie, if it has the form of one."""
    sent = ";".join(value.decode("latin-1") for key, value in scope["headers"] if key == b"cookie")
    match = _COOKIE.search(sent)
    return match[1] if match else None


def set_cookie(scope: Scope, cookie: str, *, max_age_s: float | None = None) -> str:
    """The header that gives a browser this cookie; with an age of 0 it takes it away.

    Pages right below /console name no path, for browsers take that of the page's folder: /console, below whatever
    prefix a proxy has.
    """
    parts = [f"{COOKIE}={cookie}", "HttpOnly", "SameSite=Strict"]
    if path_of(scope).count("/") != _LOGIN.count("/"):
        parts.append(f"Path={scope.get('root_path', '')}{_CONSOLE}")
    if scope.get("scheme") == "https":
        parts.append("Secure")
    if max_age_s is not None:
        parts.append(f"Max-Age={int(max_age_s)}")
    return "; ".join(parts)


def _with_cookie(send: Send, cookie: str) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start" and not any(key == b"set-cookie" for key, _ in message["headers"]):
            message["headers"] = [*message["headers"], (b"set-cookie", cookie.encode())]
        await send(message)

    return sent


def _to_login(scope: Scope, path: str) -> Response:
    """To the login, and from there back to this page. The address is relative, as all of the console are."""
    if _header(scope, b"hx-request"):
        # A fragment of a page that is open: the page as a whole has to be asked for again.
        return Response(status_code=401, headers={"HX-Refresh": "true", "Cache-Control": "no-store"})
    target = "../" * (path.count("/") - 1) + _LOGIN[1:]
    if scope["method"] == "GET" and path != _CONSOLE:
        query = scope["query_string"].decode("latin-1")
        target += "?next=" + quote(quote(path) + (f"?{query}" if query else ""), safe="")
    return Response(status_code=303, headers={"Location": target, "Cache-Control": "no-store"})


def _is_routed(scope: Scope) -> bool:
    """Whether the application has a route for this request; what it has not, it says itself."""
    app: Any = scope.get("app")
    return app is not None and any(route.matches(scope)[0] is Match.FULL for route in app.routes)


def _check_site(scope: Scope) -> None:
    """Returns if a request that may change something is from a page of this site, as far as browsers say: beside the
    cookie's SameSite and the form's token.

    Raises:
        Forbidden: it is from elsewhere.
    """
    if scope["method"] in ("GET", "HEAD"):
        return
    site = _header(scope, b"sec-fetch-site")
    origin = _header(scope, b"origin")
    # Over plain HTTP browsers say the one only to this machine; a proxy may hide from us what the other should be.
    if site:
        is_own = site in (b"same-origin", b"none")
    else:
        is_own = not origin or origin.partition(b"://")[2] == _header(scope, b"host")
    if not is_own:
        raise Forbidden("this form was sent by a page of another site")


def _check_is_from_here(scope: Scope) -> None:
    origin = _header(scope, b"origin")
    if origin and not _is_from_here(origin.partition(b"://")[2] or origin):
        raise Forbidden(f"this service has no token, so it answers no web page of another machine: {origin!r}")
    host = _header(scope, b"host")
    if not _is_from_here(host):
        raise Forbidden(
            f"this service has no token, so it answers requests for this machine only, not for {host!r}; "
            "set ENGRAM_ADMIN_TOKEN to use other names",
        )


def require_token_beyond_loopback(settings: Settings) -> None:
    """Refuse settings with which other machines could use the service without a token.

    Raises:
        Forbidden: the address can be reached from other machines and there is no token.
    """
    if settings.admin_token is None and not is_loopback(settings.host):
        raise Forbidden(
            f"{settings.host} can be reached from other machines: set ENGRAM_ADMIN_TOKEN to a secret "
            "(`openssl rand -hex 32` makes one), or listen on 127.0.0.1"
        )


def _header(scope: Scope, name: bytes) -> bytes:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""


@lru_cache(64)
def _is_from_here(authority: bytes) -> bool:
    """Whether `host`, `host:port` or `[address]:port` is this machine; an empty one is that of HTTP/1.0."""
    name = authority.decode("latin-1").lower()
    name = name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
    return not name or is_loopback(name)


def is_loopback(name: str) -> bool:
    """Whether only this machine can reach a host name or address."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
