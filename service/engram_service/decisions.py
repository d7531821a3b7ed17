"""What selection would choose under other settings, from what it measured when the tasks were uploaded.

R of every candidate is known, under every definition, so the choice is made again by the function that made it
(`engram.selection.quality.choose`). How many exemplars would fit another share was not measured: it follows from the
mean bytes of those that did, an estimate.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from engram import shares
from engram.content import ROOMY_QUALITY
from engram.errors import NotFound
from engram.oversight import WhatIf, WhatIfAsk, WhatIfCandidate
from engram.schemas import Candidate, Decision
from engram.selection.quality import choose, is_near_one, pooled

from . import buffers
from .tables import BufferRow, TaskRow


def what_if(session: Session, buffer: str, task: int, ask: WhatIfAsk) -> WhatIf:
    """What would be chosen for the buffer if this task were the last and its options these.

    Raises:
        NotFound: no such buffer or task, or nothing is known of how its quality came about.
    """
    row = buffers.find(session, buffer)
    stored = buffers.task(session, buffer, task)
    if stored.decision is None:
        raise NotFound(f"task {task} of buffer {buffer!r} has no decision", buffer=buffer, task=task)
    asked = {name: value for name, value in ask if value is not None and name != "budget_bytes"}
    own = stored.decision.model_copy(update=asked)
    others = [decision for number, decision in _decisions(session, buffer) if number != task]
    decisions = [decision for decision in [*others, own] if decision.candidates]
    budget = ask.budget_bytes or row.budget_bytes
    share = _share_bytes(session, row, task, budget)
    quality, says = choose(decisions) if own.candidates else (None, _unmeasured(row))
    over_all = pooled(decisions, own.definition, [each.quality for each in own.candidates])
    return WhatIf(
        buffer=buffer,
        task=task,
        definition=own.definition,
        rule=own.rule,
        epsilon=own.epsilon,
        budget_bytes=budget,
        share_bytes=share,
        quality=quality,
        says=says,
        is_now=row.quality,
        now_is=row.quality_is,
        candidates=[_again(each, own, over_all[each.quality], share) for each in own.candidates],
    )


def _again(candidate: Candidate, decision: Decision, ratio: float | None, share_bytes: int) -> WhatIfCandidate:
    fits = share_bytes * candidate.exemplars // candidate.bytes if candidate.bytes else 0
    return WhatIfCandidate(
        quality=candidate.quality,
        ratio=(candidate.pixel_ratio or candidate.ratio)[decision.definition],
        pooled_ratio=ratio,
        passes=is_near_one(ratio, decision.epsilon),
        exemplars=candidate.exemplars,
        bytes=candidate.bytes,
        exemplars_then=min(fits, decision.images),
    )


def _decisions(session: Session, buffer: str) -> list[tuple[int, Decision]]:
    """Of all tasks that have one, in their order."""
    rows = session.execute(
        select(TaskRow.task, TaskRow.decision).where(TaskRow.buffer == buffer).order_by(TaskRow.task)
    )
    return [(number, Decision.model_validate(decision)) for number, decision in rows if decision is not None]


def _share_bytes(session: Session, row: BufferRow, task: int, budget_bytes: int) -> int:
    """What this budget leaves the task: where it is shared by nothing, what the others do not hold."""
    classes = buffers.classes_by_task(session, row.name)
    if row.share_by != "none":
        granted = shares.leaves(budget_bytes, per=row.per, share_by=row.share_by, classes_by_task=classes)
        return sum(share for (number, _), share in granted.items() if number == task)
    distinct = len({class_id for held in classes.values() for class_id in held})
    taken = sum(pack.bytes for pack in buffers.live_packs(session, row.name) if pack.task != task)
    return max(0, shares.limit(budget_bytes, per=row.per, classes=distinct) - taken)


def _unmeasured(row: BufferRow) -> str:
    if row.quality_is == "fixed":
        return f"quality {row.quality} was fixed with the buffer, so no candidate was measured"
    return f"no candidate was measured; everything is kept at {ROOMY_QUALITY} as long as it fits"
