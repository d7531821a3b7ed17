"""The work on one ingest: read the upload, select and encode its exemplars, commit them.

What an upload did wrong (`EngramError`) ends its ingest with a problem for the user. A full disk or a silent
database is tried again, and so is anything unexpected, `max_attempts` times in all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from engram import memory
from engram.content import Content
from engram.errors import EngramError, NotFound, StorageFull, Unavailable
from engram.selection.embedding import BuiltinEmbedder, Embedder

from . import buffers, extractors, ingest, samples
from .acting import on_behalf
from .commit import commit
from .database import Database
from .embedder import OnnxEmbedder
from .heartbeat import Heartbeat, Stopped
from .ingest import Claim, LeaseLost
from .samples import Sample
from .settings import Settings
from .spooled import SpooledImages
from .storage import PackStore

logger = logging.getLogger(__name__)


def attempt(
    database: Database,
    store: PackStore,
    settings: Settings,
    held: Claim,
    stop: threading.Event,
    is_alive: Callable[[], None] = lambda: None,
) -> None:
    """The claim has ended, one way or another: committed, failed, or given back to be tried again.

    Raises:
        Unavailable: the database does not answer; the lease will run out.
    """
    try:
        with on_behalf(held.acting):
            generation = perform(database, store, settings, held, Heartbeat(database, settings, held, stop, is_alive))
        logger.info("ingest %s: committed as generation %d of buffer %s", held.id, generation, held.buffer)
    except LeaseLost:
        logger.info("ingest %s: cancelled, deleted or taken over", held.id)
        return
    except Stopped:
        with suppress(LeaseLost):
            ingest.release(database, held, after_s=0, counts=False)
        return
    except Exception as error:
        if not _is_final(error) and held.attempts < settings.max_attempts:
            logger.warning("ingest %s: attempt %d failed, another follows", held.id, held.attempts, exc_info=error)
            with suppress(LeaseLost):
                ingest.release(database, held, after_s=_pause_s(error, held, settings))
            return
        problem = error if isinstance(error, EngramError) else _defect(error, held)
        logger.info("ingest %s: failed: %s", held.id, problem, exc_info=None if problem is error else error)
        with suppress(LeaseLost):
            ingest.fail(database, held, problem)
        return
    with suppress(OSError):  # the collector tries again, and says why it cannot
        held.spool.unlink(missing_ok=True)


def _is_final(error: Exception) -> bool:
    """True if another attempt would end the same way."""
    return isinstance(error, EngramError) and not isinstance(error, (StorageFull, Unavailable))


def _pause_s(error: Exception, held: Claim, settings: Settings) -> float:
    """How long until the next attempt: a full disk needs somebody to come, other failures often are gone at once."""
    return settings.lease_s if isinstance(error, EngramError) else min(settings.lease_s, 0.25 * 2**held.attempts)


def _defect(error: Exception, held: Claim) -> EngramError:
    return EngramError(
        f"{type(error).__name__} in the worker, {held.attempts} times; this is a defect of Engram, "
        "its log has the details",
        attempts=held.attempts,
    )


def perform(database: Database, store: PackStore, settings: Settings, held: Claim, heartbeat: Heartbeat) -> int:
    """The upload is committed; returns the generation. Nothing has changed if it raises.

    Raises:
        BadUpload, TooLarge, Conflict, BudgetExceeded, BadExtractor, NotFound: what is wrong with the upload.
        LeaseLost: the ingest is no longer this worker's.
        Stopped: the worker is to stop.
        StorageFull, Unavailable: worth another attempt.
    """
    with database.reading() as session:
        schema = buffers.schema(session, held.buffer)
    with (
        heartbeat as beat,
        SpooledImages(held.spool, settings, beat.found, schema) as images,
        embedder(settings, held, images.shape) as chosen,
    ):
        upload = memory.Upload(held.task, images, held.options, images.names)

        def grow(content: Content) -> Content:
            beat.enter("selecting")
            after = memory.add(content, upload, chosen, advance=beat.advance)
            beat.enter("encoding")
            return after

        def resample(before: Content, after: Content, known: Mapping[int, Sample]) -> dict[int, Sample | None]:
            drawn = samples.draw(images, settings.sample_originals, held.id)
            if drawn is None:
                return {}
            names, per_class = images.names, settings.sample_originals
            return samples.joined(before, after, known, task=held.task, drawn=drawn, names=names, per_class=per_class)

        return commit(database, store, held.buffer, grow, ingest=held, resample=resample)


@contextmanager
def embedder(settings: Settings, held: Claim, shape: tuple[int, int, int]) -> Iterator[Embedder]:
    """The embedding that the ingest asks for.

    Raises:
        NotFound: no extractor of that digest is registered.
        BadExtractor: the model fails.
    """
    digest = held.options.extractor
    if digest is None:
        yield BuiltinEmbedder(shape)
        return
    path = extractors.path(settings, digest)
    if not path.is_file():
        raise NotFound(f"no extractor {digest}; register it with PUT /v1/extractors/{digest}", extractor=digest)
    with OnnxEmbedder(path, digest, extractors.limits(settings)) as model:
        yield model
