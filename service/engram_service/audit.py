"""Write down who changed what: one row per change, in the transaction that makes it, so that neither is without the
other.

The row names the principal and the request that are at work (`acting`). What stood there before and what stands there
now are small: names, numbers, never images, and never anything of a token but its id.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy.orm import Session

from .acting import ACTING
from .tables import AuditRow


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
            subject=subject,
            before=before,
            after=after,
        )
    )
