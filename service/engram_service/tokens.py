"""The rules of tokens: make, list, revoke, and tell whose token a request carries.

A token is `engram_`, 43 characters that stand for 256 random bits, and 6 that are their checksum, so that a scanner of
leaked secrets recognises one, and a mistyped one is refused without a look at the database. Only its SHA-256 is kept.

What a process has looked up it takes for true for `RECHECK_S`. So a revocation is true at once in the process that was
asked for it, and `RECHECK_S` later in all others.
"""

from __future__ import annotations

import hmac
import logging
import re
import threading
import time
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from secrets import token_bytes, token_hex
from typing import Any
from zlib import crc32

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from engram.errors import EngramError, InvalidRequest, NotFound, RateLimited, Unauthorized
from engram.oversight import Token, TokenCreate, TokenMade

from . import audit
from .acting import ADMIN, RESERVED, Principal, principal
from .database import Database
from .logs import blotted
from .rates import Rates
from .settings import Settings
from .tables import TokenRow

logger = logging.getLogger(__name__)

RECHECK_S = 0.25
"""How long a process may hold a token for good that was revoked elsewhere. The time of one look is nothing to a draw
from an embedded database, and half of a draw from another."""

BURST_S = 2.0
"""What a token has not asked for in so many seconds it may ask for at once."""

WRONG_PER_S, WRONG_BURST = 1.0, 20.0
"""How many wrong tokens one client address may try: it stops guesses, and a flood of them from keeping the database
busy. Behind a proxy all clients have one address; tokens that were good a moment ago are let through all the same."""

USED_S = 60.0
"""How exactly `last_used_at` is known."""

MAX_KNOWN = 10_000
"""Tokens in memory; beyond it they are looked up again."""

_FORM = re.compile(r"(engram_[A-Za-z0-9_-]{43})([A-Za-z0-9_-]{6})")

_ROW = "SELECT id, name, scope, prefix, requests_per_s, expires_at, revoked_at FROM tokens WHERE secret_sha256 = ?"


def make_secret() -> str:
    """A token that nobody has ever seen."""
    body = "engram_" + _text(token_bytes(32))
    return body + _checksum(body)


def is_well_formed(secret: str) -> bool:
    """Whether this may be a token that `make_secret` made."""
    match = _FORM.fullmatch(secret)
    return match is not None and _checksum(match[1]) == match[2]


def digest_of(secret: str) -> str:
    """What is kept of a token."""
    return sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _checksum(body: str) -> str:
    return _text(crc32(body.encode()).to_bytes(4))


def _text(some: bytes) -> str:
    return urlsafe_b64encode(some).rstrip(b"=").decode()


def create(session: Session, wanted: TokenCreate) -> TokenMade:
    """A new token, whose secret is told here and never again.

    Raises:
        Forbidden: whoever asks does not reach everything, or has less than the token would.
        InvalidRequest: the name is that of a principal without a token, or holds a token.
    """
    maker = principal()
    maker.need_everything("admin")
    maker.need(wanted.scope)
    if wanted.name.casefold() in RESERVED:
        raise InvalidRequest(f"{wanted.name!r} is what the service calls somebody else; choose another name")
    if blotted(wanted.name) != wanted.name:
        raise InvalidRequest("the name holds what looks like a token; names are seen by many")
    secret, now = make_secret(), time.time()
    row = TokenRow(
        id=token_hex(8),
        name=wanted.name,
        secret_sha256=digest_of(secret),
        scope=wanted.scope,
        prefix=wanted.prefix,
        requests_per_s=wanted.requests_per_s,
        created_at=now,
        created_by=maker.who,
        expires_at=None if wanted.expires_in_s is None else now + wanted.expires_in_s,
    )
    session.add(row)
    session.flush()
    audit.record(session, "token.create", subject=row.name, after={"id": row.id, **wanted.model_dump(mode="json")})
    return TokenMade(**_describe(row).model_dump(), token=secret)


def read_all(session: Session) -> list[Token]:
    """Every token, the newest first."""
    return [
        _describe(row) for row in session.scalars(select(TokenRow).order_by(TokenRow.created_at.desc(), TokenRow.id))
    ]


def revoke(session: Session, token_id: str) -> Token:
    """The token is worth nothing any more, and neither is a session that was begun with it.

    Revoking one that was revoked before changes nothing. Processes forget it as the module says: see `Tokens.forget`.

    Raises:
        NotFound: there is no such token.
        Forbidden: whoever asks does not reach everything.
    """
    principal().need_everything("admin")
    row = session.get(TokenRow, token_id, with_for_update=True)
    if row is None:
        raise NotFound(f"there is no token with the id {token_id!r}; list those that there are", token=token_id)
    if row.revoked_at is None:
        row.revoked_at = time.time()
        audit.record(
            session, "token.revoke", subject=row.name, before={"id": row.id, "scope": row.scope, "prefix": row.prefix}
        )
    return _describe(row)


def _describe(row: TokenRow) -> Token:
    return Token(
        id=row.id,
        name=row.name,
        scope=row.scope,
        prefix=row.prefix,
        requests_per_s=row.requests_per_s,
        created_at=datetime.fromtimestamp(row.created_at, UTC),
        created_by=row.created_by,
        expires_at=_time(row.expires_at),
        revoked_at=_time(row.revoked_at),
        last_used_at=_time(row.last_used_at),
    )


def _time(at: float | None) -> datetime | None:
    return None if at is None else datetime.fromtimestamp(at, UTC)


@dataclass(slots=True)
class Known:
    """A token that was good when it was looked at, until `fresh_until` by the stopwatch."""

    principal: Principal
    per_s: float | None
    fresh_until: float

    @property
    def is_fresh(self) -> bool:
        """Whether it is still taken for good without another look."""
        return self.fresh_until > time.monotonic()


class Tokens:
    """What a process knows of tokens: whose they are, how often they may ask, when they were used last.

    Safe to call from any thread.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._per_s = settings.requests_per_s
        token = settings.admin_token
        self._admin = None if token is None else digest_of(token.get_secret_value())
        self._known: dict[str, Known] = {}
        self._changes = 0
        self._lock = threading.Lock()
        self._rates, self._wrong = Rates(), Rates()
        self._used: dict[str, float] = {}
        self._written: dict[str, float] = {}

    @property
    def is_open(self) -> bool:
        """True if the environment names no token: then whoever names none either is `LOCAL`."""
        return self._admin is None

    def known(self, digest: str) -> Known | None:
        """What is known of a token that was good when it was looked at last."""
        return self._known.get(digest)

    def peek(self, digest: str) -> Principal | None:
        """Whose token it is, if that is known or can be found out without waiting.

        Raises:
            Unauthorized: it was revoked or has expired.
            RateLimited: it has asked too often.
        """
        known = self._known.get(digest)
        if known is None:
            return None
        if not known.is_fresh:
            changes = self._changes
            row = self._database.glance(_ROW, digest)
            if row is None:
                return None
            known = self._take(digest, row, changes)
        return self.counted(known)

    def find(self, digest: str) -> Principal:
        """Whose token it is. This may wait for the database.

        Raises:
            Unauthorized: nobody's; or it was revoked or has expired.
            RateLimited: it has asked too often.
            Unavailable: the database does not answer.
        """
        if self._admin is not None and hmac.compare_digest(digest, self._admin):
            known = self._known[digest] = Known(ADMIN, self._per_s, float("inf"))
        else:
            known = self._look_up(digest)
        return self.counted(known)

    def try_secret(self, secret: str, address: str) -> Principal:
        """Whose token it is, of one that was not known a moment ago.

        Args:
            secret: the token itself.
            address: of the client that has sent it.

        Raises:
            RateLimited: too many wrong ones came from there, so it was not looked at; or it has asked too often.
            Unauthorized, Unavailable: as `find`.
        """
        wait_s = self._wrong.wait_s(address, WRONG_PER_S, WRONG_BURST)
        if wait_s > 0:
            raise RateLimited(
                "too many wrong tokens came from your address; this one was not looked at", retry_after_s=wait_s
            )
        try:
            digest = digest_of(secret)
            is_admin = self._admin is not None and hmac.compare_digest(digest, self._admin)
            if not is_admin and not is_well_formed(secret):
                raise Unauthorized("this is not a token of this service")
            return self.find(digest)
        except Unauthorized:
            self._wrong.take(address, WRONG_PER_S, WRONG_BURST)
            raise

    def counted(self, known: Known) -> Principal:
        """Whose token it is; it has asked once more.

        Raises:
            RateLimited: too often.
        """
        per_s = known.per_s
        if per_s is not None:
            wait_s = self._rates.take(known.principal.token_id or "", per_s, max(1.0, BURST_S * per_s))
            if wait_s > 0.0:
                raise RateLimited(
                    f"the token of {known.principal.who!r} may make {per_s:g} requests a second; the next one is free "
                    f"in {wait_s:.3g} s",
                    requests_per_s=per_s,
                    retry_after_s=wait_s,
                )
        return known.principal

    def forget(self) -> None:
        """Every token is looked up again: one was revoked. Those that were good are still let through a flood of wrong
        ones from their address, to be looked up."""
        with self._lock:
            self._changes += 1
            for known in self._known.values():
                known.fresh_until = 0.0

    def write_down(self) -> None:
        """The database knows when tokens were used, as exactly as `USED_S` says. It may fail, which is said in the log.

        It is called now and then, beside the requests.
        """
        with self._lock:
            used = {name: at for name, at in self._used.items() if at - self._written.get(name, 0.0) >= USED_S}
            self._used = {name: at for name, at in self._used.items() if name not in used}
        if not used:
            return
        try:
            with self._database.session() as session:
                for name, at in used.items():
                    session.execute(update(TokenRow).where(TokenRow.id == name).values(last_used_at=at))
        except EngramError as error:
            logger.warning("when tokens were used cannot be written down now: %s", error)
            return
        self._written |= used

    def _look_up(self, digest: str) -> Known:
        changes = self._changes
        row = self._database.glance(_ROW, digest)
        if row is None:
            columns = (
                TokenRow.id,
                TokenRow.name,
                TokenRow.scope,
                TokenRow.prefix,
                TokenRow.requests_per_s,
                TokenRow.expires_at,
                TokenRow.revoked_at,
            )
            with self._database.reading() as session:
                found = session.execute(select(*columns).where(TokenRow.secret_sha256 == digest)).one_or_none()
            if found is None:
                raise Unauthorized("this is not a token of this service")
            row = tuple(found)
        return self._take(digest, row, changes)

    def _take(self, digest: str, row: tuple[Any, ...], changes: int) -> Known:
        """The token as its row has it, from now on; the row was read after so many changes.

        Raises:
            Unauthorized: it was revoked or has expired.
        """
        now = time.time()
        token_id, name, scope, prefix, per_s, expires_at, revoked_at = row
        if revoked_at is not None:
            self._drop(digest)
            raise Unauthorized("the token was revoked")
        if expires_at is not None and expires_at <= now:
            self._drop(digest)
            raise Unauthorized("the token has expired")
        left_s = RECHECK_S if expires_at is None else min(RECHECK_S, expires_at - now)
        known = Known(
            Principal(name, scope, prefix, token_id), self._per_s if per_s is None else per_s, time.monotonic() + left_s
        )
        with self._lock:
            self._used[token_id] = now
            # A revocation since the row was read may concern it.
            if changes == self._changes:
                if len(self._known) >= MAX_KNOWN:
                    self._known.clear()
                self._known[digest] = known
        return known

    def _drop(self, digest: str) -> None:
        with self._lock:
            self._known.pop(digest, None)
