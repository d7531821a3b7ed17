"""Sessions of the console: who is logged in, and the proof that a form is from one of its own pages.

A browser holds a cookie of 256 random bits. It gets one before it is logged in, too: what forms have to repeat (their
CSRF token) is derived from it, and no other site can read or guess it. Logging in makes a new cookie, whose SHA-256 a
row of `sessions` names together with the token's. The session is worth what that token is: it ends with it, after
`session_s`, or by logging out.
"""

from __future__ import annotations

import logging
import time
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from hashlib import sha256
from secrets import token_bytes

from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.orm import Session as Transaction

from engram.errors import EngramError, RateLimited, Unauthorized

from . import audit
from .acting import ACTING, NOBODY, Acting, Principal, on_behalf, principal
from .database import Database
from .rates import Rates
from .settings import Settings
from .tables import SessionRow
from .tokens import Tokens, digest_of

logger = logging.getLogger(__name__)

COOKIE = "engram_console"

REFUSALS_PER_S, REFUSALS_BURST = 1 / 60, 20.0
"""Logins that failed and have a row each in the audit; those between are counted in the next one."""

BEGUN_PER_S, BEGUN_BURST = 1 / 10, 100.0
"""Logins of one token. Each has a row in the audit, so whoever may only read must not make any number of them."""

MAX_SESSIONS = 100
"""Of one token at a time; the oldest ends for the next."""


@dataclass(frozen=True)
class Session:
    """What a browser's cookie stands for. `csrf` is what its forms have to repeat."""

    csrf: str
    principal: Principal = NOBODY


def make_cookie() -> str:
    """A cookie that nobody has ever seen."""
    return urlsafe_b64encode(token_bytes(32)).rstrip(b"=").decode()


def csrf_of(cookie: str) -> str:
    """What forms repeat: it is known to whoever has the cookie, and tells nothing of it."""
    return sha256(b"csrf " + cookie.encode("utf-8", "surrogateescape")).hexdigest()


class Sessions:
    """The sessions of one service."""

    def __init__(self, database: Database, tokens: Tokens, settings: Settings) -> None:
        self._database, self._tokens = database, tokens
        self.session_s = settings.session_s
        self._refusals, self._begun = Rates(), Rates()
        self._untold = 0

    def find(self, cookie: str) -> Session | None:
        """Who is logged in with this cookie; None: nobody, any more.

        Raises:
            RateLimited: its token has asked too often.
            Unavailable: the database does not answer.
        """
        alive = select(SessionRow.token_sha256).where(
            SessionRow.id_sha256 == digest_of(cookie), SessionRow.expires_at > time.time()
        )
        with self._database.reading() as session:
            token = session.scalar(alive)
        if token is None:
            return None
        try:
            return Session(csrf_of(cookie), self._tokens.peek(token) or self._tokens.find(token))
        except Unauthorized:
            return None

    def begin(self, secret: str, *, before: str, address: str) -> str:
        """The new cookie of somebody who has shown this token. The one so far is worth nothing any more.

        Args:
            secret: the token.
            before: the cookie so far.
            address: of the client.

        Raises:
            Unauthorized: the token is nobody's, was revoked or has expired.
            RateLimited: too many wrong ones came from this address, or too many logins of this token.
            Unavailable, StorageFull: the database does not take the session.
        """
        try:
            found = self._tokens.try_secret(secret, address)
        except Unauthorized:
            self._refused(address)
            raise
        cookie, token, now = make_cookie(), digest_of(secret), time.time()
        wait_s = self._begun.take(token, BEGUN_PER_S, BEGUN_BURST)
        if wait_s > 0:
            raise RateLimited(
                f"the token of {found.who!r} has logged in too often; it may again in {wait_s:.3g} s",
                retry_after_s=wait_s,
            )
        with on_behalf(Acting(found, ACTING.get().request_id)), self._database.session() as session:
            session.execute(delete(SessionRow).where(SessionRow.id_sha256 == digest_of(before)))
            of_token = select(SessionRow.id_sha256).where(SessionRow.token_sha256 == token)
            newest = of_token.order_by(SessionRow.created_at.desc()).limit(MAX_SESSIONS - 1)
            session.execute(
                delete(SessionRow).where(SessionRow.token_sha256 == token, SessionRow.id_sha256.not_in(newest))
            )
            session.add(
                SessionRow(
                    id_sha256=digest_of(cookie), token_sha256=token, created_at=now, expires_at=now + self.session_s
                )
            )
            audit.record(session, "session.begin", subject=found.who)
        return cookie

    def end(self, cookie: str) -> None:
        """Nobody is logged in with this cookie any more."""
        with self._database.session() as session:
            gone = session.execute(delete(SessionRow).where(SessionRow.id_sha256 == digest_of(cookie)))
            if gone.rowcount:  # type: ignore[attr-defined]
                audit.record(session, "session.end", subject=principal().who)

    def _refused(self, address: str) -> None:
        """The audit knows of a login that failed, if it does not know of many already: nobody fills the disk so."""
        if self._refusals.take("", REFUSALS_PER_S, REFUSALS_BURST) > 0:
            self._untold += 1
            return
        untold, self._untold = self._untold, 0
        try:
            with self._database.session() as session:
                audit.record(session, "session.refuse", subject=f"from {address}", after={"others_before": untold})
        except EngramError as error:
            logger.warning("a refused login cannot be written down: %s", error)


def have_expired(session: Transaction) -> bool:
    """Whether some sessions are over and can be collected."""
    return session.scalars(select(SessionRow.id_sha256).where(_is_over()).limit(1)).first() is not None


def collect(session: Transaction) -> int:
    """Sessions that are over have no row; returns how many."""
    gone = session.execute(delete(SessionRow).where(_is_over()))
    return int(gone.rowcount)  # type: ignore[attr-defined]


def _is_over() -> ColumnElement[bool]:
    return SessionRow.expires_at <= time.time()
