"""What a change would leave of a buffer, exactly, without making it: another budget, more classes, or both.

It is `engram.memory` that makes the change, as it would for a commit, on packs of which only the indexes are read: what
a share keeps of a class depends on the sizes of its exemplars alone. Nothing is written, and no image is touched but
where the first exemplars ever would have to go. Then the quality is chosen too, for which the images are needed.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from engram import memory, pack, shares
from engram.content import Content
from engram.errors import Conflict
from engram.oversight import Forecast, ForecastClass
from engram.strip import Exemplars

from .buffers import check_thawed, find, live_packs
from .commit import read_content
from .storage import PackStore
from .turns import Turn

MAX_PIXELS = 2**25
"""Of all images of a buffer whose quality has to be chosen for a forecast: some seconds of one core."""

IMAGE_PIXELS = 2**10
"""What an image counts as at least: of smaller ones the time goes into what is done once for each."""

_TURN = Turn("forecasts are being made that choose a quality")


def forecast(
    session: Session, store: PackStore, buffer: str, *, budget_bytes: int | None = None, new_classes: int = 0
) -> Forecast:
    """What the buffer would hold under this budget, and once so many classes more had come with a task of their own.

    Of new classes nothing is known but that they take their shares: that their images may change the quality of the
    whole buffer, as long as it is provisional, is left out.

    Raises:
        NotFound: there is no such buffer.
        Conflict: it is frozen; or nothing had to go so far, and choosing a quality would take too long for a forecast.
        Unavailable: the disk does not give what is asked of it, or too many wait for forecasts that encode images.
    """
    row = find(session, buffer)
    check_thawed(row)
    before = read_content(session, _Indexes(store.folder), row)
    if before.is_roomy:
        before = read_content(session, _Bounded(store.folder, _pixels(before)), row)
    with _TURN.taken() if before.is_roomy else nullcontext():
        after = before if budget_bytes is None else memory.reshare(before, budget_bytes=budget_bytes)
        after = memory.expect(after, new_classes) if new_classes else after
    now = {
        live.task: dict(zip((class_id for class_id, _ in live.runs), live.class_bytes, strict=True))
        for live in live_packs(session, buffer)
    }
    then = {
        number: now.get(number, {}) if after.tasks[number] is task else _class_bytes(after.tasks[number].load())
        for number, task in before.tasks.items()
    }
    return Forecast(
        buffer=buffer,
        generation=row.generation,
        limit_bytes=_limit_bytes(after),
        quality=before.quality,
        quality_then=after.quality,
        exemplars=_exemplars(before),
        used_bytes=sum(task.pack_bytes for task in before.tasks.values()),
        exemplars_then=_exemplars(after),
        used_bytes_then=sum(task.pack_bytes for task in after.tasks.values()),
        classes=[
            ForecastClass(
                task=number,
                class_id=class_id,
                exemplars=task.kept.get(class_id, 0),
                bytes=now.get(number, {}).get(class_id, 0),
                exemplars_then=after.tasks[number].kept.get(class_id, 0),
                bytes_then=then[number].get(class_id, 0),
            )
            for number, task in before.tasks.items()
            for class_id in sorted(task.seen)
        ],
    )


class _Indexes(PackStore):
    """Gives exemplars without their bytes: cutting asks for sizes only."""

    def load(self, digest: str, count: int) -> tuple[Exemplars | None, NDArray[np.int64] | None]:
        """The exemplars of a pack that should hold `count`, from its index, or from the pack if that does not hold."""
        found = self.read_index(digest)
        return super().load(digest, count) if found is None or not found.is_sound else (found.over(b""), None)


class _Bounded(PackStore):
    """Gives packs as they are, if the images of all together are not too many."""

    def __init__(self, folder: Path, pixels: int) -> None:
        super().__init__(folder)
        self._pixels = pixels

    def load(self, digest: str, count: int) -> tuple[Exemplars | None, NDArray[np.int64] | None]:
        """The exemplars of a pack; see `PackStore`."""
        if self._pixels > MAX_PIXELS:
            raise Conflict(
                f"nothing has had to go so far, so this change chooses a quality and encodes all images again: "
                f"{self._pixels:,} pixels, each image counted as {IMAGE_PIXELS:,} at least, and a forecast does that "
                f"with {MAX_PIXELS:,}",
                pixels=self._pixels,
                max_pixels=MAX_PIXELS,
            )
        return super().load(digest, count)


def _class_bytes(exemplars: Exemplars | None) -> dict[int, int]:
    if exemplars is None:
        return {}
    class_ids = np.unique(exemplars.class_ids).tolist()
    return dict(zip(class_ids, pack.class_bytes(exemplars), strict=True))


def _exemplars(content: Content) -> int:
    return sum(sum(task.kept.values()) for task in content.tasks.values())


def _pixels(content: Content) -> int:
    height, width, _ = content.shape or (0, 0, 0)
    return max(height * width, IMAGE_PIXELS) * _exemplars(content)


def _limit_bytes(content: Content) -> int:
    distinct = {class_id for classes in content.classes().values() for class_id in classes}
    policy = content.policy
    return shares.limit(policy.budget_bytes, per=policy.per, classes=len(distinct))
