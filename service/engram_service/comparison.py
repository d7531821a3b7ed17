"""What two buffers have in common: packs that both name, which lie on the disk once, and classes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from engram.schemas import Buffer

from . import buffers
from .acting import principal
from .tables import PackRow


@dataclass
class Side:
    """Exemplars and bytes that one of the buffers has of something."""

    exemplars: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Leaf:
    """A class of a task in both buffers. It `is_shared` if both hold it in the same pack."""

    task: int
    class_id: int
    name: str | None
    one: Side
    other: Side
    is_shared: bool


@dataclass(frozen=True)
class Comparison:
    """Two buffers. Their packs count once in `shared_packs` and `shared_bytes` if both name them."""

    one: Buffer
    other: Buffer
    packs: int
    other_packs: int
    shared_packs: int
    shared_bytes: int
    leaves: list[Leaf]


def compare(session: Session, name: str, other: str) -> Comparison:
    """The two buffers as they stand.

    Raises:
        Forbidden: whoever asks may not see one of them.
        NotFound: one of them is not there.
    """
    principal().need("read", other)
    one_buffer, other_buffer = buffers.read(session, name), buffers.read(session, other)
    one, two = buffers.live_packs(session, name), buffers.live_packs(session, other)
    shared = {pack.digest: pack.bytes for pack in one if pack.digest in {each.digest for each in two}}
    sides: dict[tuple[int, int], tuple[Side, Side]] = {}
    for at, packs in enumerate((one, two)):
        for pack in packs:
            for (class_id, count), size in zip(pack.runs, pack.class_bytes, strict=True):
                side = sides.setdefault((pack.task, class_id), (Side(), Side()))[at]
                side.exemplars, side.bytes = side.exemplars + count, side.bytes + size
    in_shared = {(p.task, class_id) for p in one if p.digest in shared for class_id, _ in p.runs}
    names = other_buffer.class_names | one_buffer.class_names
    return Comparison(
        one=one_buffer,
        other=other_buffer,
        packs=len(one),
        other_packs=len(two),
        shared_packs=len(shared),
        shared_bytes=sum(shared.values()),
        leaves=[
            Leaf(task, class_id, names.get(class_id), *sides[task, class_id], (task, class_id) in in_shared)
            for task, class_id in sorted(sides)
        ],
    )


def family(found: Sequence[Buffer], name: str) -> list[Buffer]:
    """The buffer with all that it was forked from and all that was forked from one of them, by name.

    Only buffers in `found` are known: what was deleted, or may not be seen, joins nothing.
    """
    by_name = {buffer.name: buffer for buffer in found}
    near: dict[str, set[str]] = {}
    for buffer in found:
        source = by_name.get(buffer.forked_from or "")
        # Another buffer may have got the name since.
        if source is not None and source.created_at <= buffer.created_at:
            near.setdefault(buffer.name, set()).add(source.name)
            near.setdefault(source.name, set()).add(buffer.name)
    reached, left = {name}, [name]
    while left:
        more = near.get(left.pop(), set()) - reached
        reached |= more
        left += more
    return [buffer for buffer in found if buffer.name in reached]


def shared_bytes(session: Session, name: str) -> dict[str, int]:
    """How many bytes of the buffer's packs each other buffer names as well, of those that do."""
    own = select(PackRow.digest).where(PackRow.buffer == name, PackRow.until.is_(None))
    rows = session.execute(
        select(PackRow.buffer, PackRow.bytes).where(
            PackRow.digest.in_(own), PackRow.until.is_(None), PackRow.buffer != name, buffers.reached(PackRow.buffer)
        )
    )
    found: dict[str, int] = {}
    for buffer, size in rows:
        found[buffer] = found.get(buffer, 0) + size
    return found
