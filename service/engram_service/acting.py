"""Who a request is from, and what that lets it do: known to everything that runs on its behalf.

`Gate` finds the principal of each request before any route sees it. Whatever the request changes then says by whom
(`audit`). Threads that answer a request inherit it. Work that nobody asked for just now is the service's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, get_args

from engram.errors import Forbidden
from engram.oversight import TokenScope

SCOPES: tuple[TokenScope, ...] = get_args(TokenScope)
"""Each includes those before it."""

_RANKS = {scope: rank for rank, scope in enumerate(SCOPES)}


@dataclass(frozen=True)
class Principal:
    """Somebody who makes requests.

    Args:
        who: the name of the token; "admin" for that of the environment, "local" for requests from this machine to a
            service without tokens, "service" for the service itself.
        scope: see `SCOPES`; None allows nothing.
        prefix: what the names of the buffers begin with that the principal may see and change; "" is all.
        token_id: None if there is no row of its token.
    """

    who: str
    scope: TokenScope | None
    prefix: str = ""
    token_id: str | None = None

    def may(self, scope: TokenScope) -> bool:
        """Whether what needs this scope is allowed."""
        return self.scope is not None and _RANKS[self.scope] >= _RANKS[scope]

    def reaches(self, buffer: str) -> bool:
        """Whether a buffer of this name is the principal's to see."""
        return buffer.startswith(self.prefix)

    def need(self, scope: TokenScope, buffer: str | None = None) -> None:
        """Returns if this is allowed, to the buffer of this name, or to what belongs to no buffer if it is None.

        Raises:
            Forbidden: it is not. Whether there is such a buffer does not matter.
        """
        if not self.may(scope):
            raise Forbidden(f"this needs a token with the scope {scope!r}; that of {self.who!r} has {self.scope!r}")
        if buffer is not None and not self.reaches(buffer):
            raise Forbidden(
                f"the token of {self.who!r} is for buffers whose names begin with {self.prefix!r}, not for {buffer!r}"
            )

    def need_everything(self, scope: TokenScope) -> None:
        """Returns if this is allowed and the principal reaches every buffer.

        Raises:
            Forbidden: it is not.
        """
        self.need(scope)
        if self.prefix:
            raise Forbidden(
                f"this concerns all buffers, and the token of {self.who!r} is for those that begin with {self.prefix!r}"
            )


SERVICE = Principal("service", "admin")
LOCAL = Principal("local", "admin")
ADMIN = Principal("admin", "admin")
NOBODY = Principal("", None)
"""Whoever asks for what is open to all."""

RESERVED = frozenset({SERVICE.who, LOCAL.who, ADMIN.who})
"""Names that no token gets."""


class Acting(NamedTuple):
    """A principal at work: in one request, or, without an id, outside of any."""

    principal: Principal = SERVICE
    request_id: str = ""


ACTING: ContextVar[Acting] = ContextVar("acting", default=Acting())  # noqa: B039 (a tuple)


@contextmanager
def on_behalf(acting: Acting) -> Iterator[None]:
    """What the block changes is changed by this principal."""
    before = ACTING.set(acting)
    try:
        yield
    finally:
        ACTING.reset(before)


def principal() -> Principal:
    """Whoever the current request is from."""
    return ACTING.get().principal
