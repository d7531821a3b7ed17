"""Reject requests without the bearer token, or from elsewhere than this machine when there is no token.

It is middleware around the whole application and denies by default: a route that is added tomorrow is closed until it
is named in `OPEN_PATHS`. Without a token the service listens on loopback only, and then checks that the request names a
loopback host and comes from no foreign page: otherwise any web site could reach it through its visitor's browser, by
DNS rebinding or by a form that posts here.
"""

from __future__ import annotations

import hmac
import ipaddress

from starlette.types import ASGIApp, Receive, Scope, Send

from engram.errors import EngramError, Forbidden, Unauthorized

from .pages import FILE_PATHS
from .problems import problem_response
from .settings import Settings

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/redoc", "/openapi.json"}) | FILE_PATHS
"""What needs no token: whether the service lives, and what its interface is."""


class Gate:
    """Lets a request through to `app` if it carries the token, or comes from this machine when there is none."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        token = settings.admin_token
        self._expected = None if token is None else b"Bearer " + token.get_secret_value().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; anything that is not HTTP (the lifespan) passes."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await problem_response(error, scope["path"])(scope, receive, send)

    def _refusal(self, scope: Scope) -> EngramError | None:
        expected = self._expected
        if expected is None:
            origin = _header(scope, b"origin")
            if origin and not _is_from_here(origin.partition(b"://")[2] or origin):
                return Forbidden(f"this service has no token, so it answers no web page of another machine: {origin!r}")
            host = _header(scope, b"host")
            return (
                None
                if _is_from_here(host)
                else Forbidden(
                    f"this service has no token, so it answers requests for this machine only, not for {host!r}; "
                    "set ENGRAM_ADMIN_TOKEN to use other names",
                )
            )
        if scope["path"] in OPEN_PATHS:
            return None
        given = _header(scope, b"authorization")
        # The scheme is case-insensitive (RFC 9110); the token is not.
        if hmac.compare_digest(b"Bearer " + given[7:] if given[:7].lower() == b"bearer " else given, expected):
            return None
        if not given:
            return Unauthorized("this request needs an Authorization header: `Bearer` and the token of the service")
        return Unauthorized("the bearer token is not the one of this service")


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
