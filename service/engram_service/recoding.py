"""One exemplar as it would look at a lower quality: encoded again from what is stored, as a whole buffer would be."""

from __future__ import annotations

from engram.errors import InvalidRequest
from engram.oversight import Qualities, Recoded
from engram.schemas import CANDIDATE_QUALITIES, PackEntry
from engram.strip import Exemplars, encode

from .replay import Replay


def qualities(
    replay: Replay, entry: PackEntry, row: int, candidates: tuple[int, ...] = CANDIDATE_QUALITIES
) -> Qualities:
    """The bytes of one exemplar as it is stored, and at each candidate below that quality.

    Raises:
        NotFound: the pack has no such row.
        Unavailable: the row is damaged, or the disk does not answer.
    """
    lower = [quality for quality in sorted({*candidates}, reverse=True) if quality < entry.quality]
    found = [again(replay, entry, row, quality) for quality in (entry.quality, *lower)]
    sizes = [Recoded(quality=each.form.quality, bytes=int(each.sizes[0])) for each in found]
    return Qualities(pack=entry.digest, row=row, stored=sizes[0], lower=sizes[1:])


def jpeg(replay: Replay, entry: PackEntry, row: int, quality: int) -> bytes:
    """One exemplar, encoded again at a quality, as a stand-alone JPEG.

    Raises:
        InvalidRequest: the quality is above that of what is stored.
        NotFound, Unavailable: as `qualities`.
    """
    return again(replay, entry, row, quality).jpeg(0)


def again(replay: Replay, entry: PackEntry, row: int, quality: int) -> Exemplars:
    """The exemplar at this quality; as it is stored if that is its own.

    Raises:
        InvalidRequest, NotFound, Unavailable: as `jpeg`.
    """
    if quality > entry.quality:
        raise InvalidRequest(
            f"the exemplar is stored at quality {entry.quality} and there is nothing better to show at {quality}",
            quality=quality,
            stored_quality=entry.quality,
        )
    held = replay.one(entry, row)
    if quality == entry.quality:
        return held.together()
    form = held.form
    return encode(
        held.decode(),
        held.class_ids,
        quality=quality,
        subsampling=form.subsampling,
        schema=form.schema,
        records=held.records,
    )
