"""The audit: who changed what, one row per change, in the transaction that makes it, so that neither is without the
other.

The row names the principal and the request that are at work (`acting`). What stood there before and what stands there
now are small: names, numbers, never images, and never anything of a token but its id. What failed changed nothing and
has no row. Rows are kept for `audit_s`.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from engram.oversight import AuditEntry, AuditPage

from .acting import ACTING, principal
from .logs import blotted
from .settings import Settings
from .tables import AuditRow

MAX_ITEMS = 20
"""Of a list or a mapping in `before` or `after`; the rest is counted."""

MAX_CHARACTERS = 200
"""Of a text there, and of a subject."""

COLLECT_ROWS = 10_000
"""How many rows are removed in one transaction."""


def record(
    session: Session,
    action: str,
    *,
    buffer: str | None = None,
    subject: str = "",
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
) -> None:
    """The change will be in the audit if this transaction commits; see `engram.oversight.AuditEntry`."""
    acting = ACTING.get()
    session.add(
        AuditRow(
            at=time.time(),
            who=acting.principal.who,
            token_id=acting.principal.token_id,
            request_id=acting.request_id,
            action=action,
            buffer=buffer,
            subject=_bounded(subject),
            before=_bounded(before),
            after=_bounded(after),
        )
    )


def page(
    session: Session,
    *,
    buffer: str | None = None,
    who: str | None = None,
    action: str | None = None,
    limit: int,
    before: int | None = None,
) -> AuditPage:
    """What whoever asks may see of the audit, the newest first, from the entry that is older than this on.

    Args:
        action: in full, or the kind of thing alone: "token" is all that happened to tokens.

    Raises:
        Forbidden: the buffer is not theirs to see.
    """
    wanted = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit + 1)
    principal().need("admin", buffer)
    prefix = principal().prefix
    if prefix:
        wanted = wanted.where(func.substr(AuditRow.buffer, 1, len(prefix)) == prefix)
    if buffer is not None:
        wanted = wanted.where(AuditRow.buffer == buffer)
    if who is not None:
        wanted = wanted.where(AuditRow.who == who)
    if action is not None and "." in action:
        wanted = wanted.where(AuditRow.action == action)
    elif action is not None:
        wanted = wanted.where(func.substr(AuditRow.action, 1, len(action) + 1) == f"{action}.")
    if before is not None:
        wanted = wanted.where(AuditRow.id < before)
    found = [_describe(row) for row in session.scalars(wanted)]
    return AuditPage(entries=found[:limit], next=str(found[limit - 1].id) if len(found) > limit else None)


def has_expired(session: Session, settings: Settings) -> bool:
    """Whether some rows have been kept for as long as they are to be."""
    oldest = session.scalar(select(func.min(AuditRow.at)))
    return oldest is not None and oldest < time.time() - settings.audit_s


def collect(session: Session, settings: Settings) -> int:
    """Rows that have been kept long enough are gone, so many at a time; returns how many."""
    expired = select(AuditRow.id).where(AuditRow.at < time.time() - settings.audit_s).limit(COLLECT_ROWS)
    gone = session.execute(delete(AuditRow).where(AuditRow.id.in_(expired)))
    return int(gone.rowcount)  # type: ignore[attr-defined]


def _describe(row: AuditRow) -> AuditEntry:
    return AuditEntry(
        id=row.id,
        at=datetime.fromtimestamp(row.at, UTC),
        who=row.who,
        token_id=row.token_id,
        request_id=row.request_id,
        action=row.action,
        buffer=row.buffer,
        subject=row.subject,
        before=row.before,
        after=_reached(row.after),
    )


def _reached(after: dict[str, Any] | None) -> dict[str, Any] | None:
    """Without the name of the buffer that another was forked from, where whoever asks may not know of it."""
    source = None if after is None else after.get("forked_from")
    return after if source is None or principal().reaches(source) else {**(after or {}), "forked_from": None}


def _bounded(value: Any) -> Any:
    """The value, or the beginning of it: whoever sends names by the thousand must not fill the disk with them."""
    if isinstance(value, str):
        # PostgreSQL keeps no NUL in a text.
        text = blotted(value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode())
        return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
    if isinstance(value, dict):
        some = {_bounded(name): _bounded(each) for name, each in list(value.items())[:MAX_ITEMS]}
        return some | ({"…": f"{len(value) - MAX_ITEMS} more"} if len(value) > MAX_ITEMS else {})
    if isinstance(value, list | tuple):
        some_of_list = [_bounded(each) for each in value[:MAX_ITEMS]]
        return [*some_of_list, f"… {len(value) - MAX_ITEMS} more"] if len(value) > MAX_ITEMS else some_of_list
    return value
