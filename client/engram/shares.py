"""Divide a byte budget exactly over classes or tasks.

A *leaf* is one class within one task: what shrinks and grows as a unit. Shares sum to the budget and equal parts
differ by at most one byte. Where a budget is shared by nothing, what is stored has what it takes, and what comes has
the room that is left (`room`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engram.schemas import MAX_BUDGET_BYTES, Per, ShareBy

Leaf = tuple[int, int]
"""(task, class id)"""


def split(total: int, count: int) -> list[int]:
    """`count` parts that sum to `total` and differ by at most one, the larger ones first.

    Raises:
        ValueError: `count` is not positive or `total` is negative.
    """
    if count < 1 or total < 0:
        raise ValueError(f"cannot split {total} bytes into {count} parts")
    share, more = divmod(total, count)
    return [share + 1] * more + [share] * (count - more)


def limit(budget_bytes: int, *, per: Per, classes: int) -> int:
    """The total that a buffer may use: the budget itself, or the budget times its distinct classes.

    It is never above `MAX_BUDGET_BYTES`, like the budgets themselves.
    """
    return min(budget_bytes if per == "buffer" else budget_bytes * classes, MAX_BUDGET_BYTES)


def leaves(
    budget_bytes: int, *, per: Per, share_by: ShareBy, classes_by_task: Mapping[int, Sequence[int]]
) -> dict[Leaf, int]:
    """The share of every leaf; together they are exactly the buffer's limit.

    By class, each distinct class has an equal share, divided over the tasks that hold it. By task, each task has an
    equal share, divided over its classes (GEM's M/T). By nothing, there are none.
    """
    if share_by == "none":
        return {}
    held = [(task, class_id) for task in sorted(classes_by_task) for class_id in sorted(classes_by_task[task])]
    if not held:
        return {}
    total = limit(budget_bytes, per=per, classes=len({class_id for _, class_id in held}))
    side = 1 if share_by == "class" else 0
    groups: dict[int, list[Leaf]] = {}
    for leaf in held:
        groups.setdefault(leaf[side], []).append(leaf)
    shares: dict[Leaf, int] = {}
    for key, share in zip(sorted(groups), split(total, len(groups)), strict=True):
        shares.update(zip(groups[key], split(share, len(groups[key])), strict=True))
    return shares


def room(
    total: int,
    held: Mapping[int, Mapping[int, int]],
    *,
    task: int | None = None,
    coming: Mapping[int, int] | None = None,
) -> dict[int, dict[int, int]]:
    """Bytes for each class of each task where a budget is shared by nothing.

    Tasks have what they hold, or their part of the total in proportion if that is less than all hold together. A task
    that gets more has all that the others leave, its classes in proportion to what they will hold.

    Args:
        total: the limit.
        held: bytes by task and class.
        task: the one that gets more.
        coming: about how many bytes of each class come to it; only their proportions matter if it holds nothing.
    """
    found = {number: dict(classes) for number, classes in held.items()}
    taken = sum(sum(classes.values()) for number, classes in held.items() if number != task)
    if taken > total:
        found = {n: {c: size * total // taken for c, size in classes.items()} for n, classes in found.items()}
        taken = total
    if task is not None:
        own, new = found.get(task, {}), coming or {}
        weights = {c: own.get(c, 0) + new.get(c, 0) for c in sorted({*own, *new})}
        whole = max(1, sum(weights.values()))
        found[task] = {c: (total - taken) * weight // whole for c, weight in weights.items()}
    return found
