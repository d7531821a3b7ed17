"""Keeps an ingest claimed while its worker is at it, publishes the progress, and ends the work when it should.

Work ends cooperatively: every loop of it calls `check` or `advance`, which raise once the ingest was cancelled, has
taken too long, or the worker is to stop. A worker that does not come to such a place is ended from outside
(`supervisor`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from types import TracebackType

from engram.errors import EngramError, TooLarge
from engram.schemas import State

from . import ingest
from .database import Database
from .ingest import Claim, LeaseLost
from .settings import Settings

logger = logging.getLogger(__name__)

# Progress is what a person watches: once a second is enough, and one small transaction. It also notices a cancellation.
HEARTBEAT_S = 1.0


class Stopped(Exception):
    """The worker was asked to stop in the middle of an ingest."""


def too_long(settings: Settings) -> TooLarge:
    """What an ingest fails with that takes longer than it may."""
    return TooLarge(
        f"the work on this upload took more than {settings.max_ingest_s:g} s, the most that ENGRAM_MAX_INGEST_S "
        "allows; split the upload",
        max_ingest_s=settings.max_ingest_s,
    )


class Heartbeat:
    """Renews a lease from a thread for the length of a `with` block.

    Args:
        stop: set when the worker is to stop.
        is_alive: called by the thread every second or so.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        held: Claim,
        stop: threading.Event,
        is_alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.state: State = "selecting"
        self.images_done = 0
        self.images_total = 0
        self._database, self._settings, self._held, self._stop = database, settings, held, stop
        self._is_alive = is_alive
        self._is_lost = False
        self._due = time.monotonic() + settings.max_ingest_s
        self._ended = threading.Event()
        # In the context of whoever works: what it logs is about the same upload.
        context = copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._beat,), name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def found(self, images: int) -> None:
        """So many images of the upload have been read so far; raises as `check`."""
        self.images_total = images
        self.check()

    def advance(self, images: int) -> None:
        """So many more images have been worked on; raises as `check`."""
        self.images_done = min(self.images_done + images, self.images_total)
        self.check()

    def check(self) -> None:
        """Returns if the work should go on; costs a quarter of a microsecond.

        Raises:
            LeaseLost: the ingest is no longer ours.
            Stopped: the worker is to stop.
            TooLarge: the work takes longer than it may.
        """
        if self._is_lost:
            raise LeaseLost(self._held.id)
        if self._stop.is_set():
            raise Stopped(self._held.id)
        if time.monotonic() > self._due:
            raise too_long(self._settings)

    def enter(self, state: State) -> None:
        """The ingest is in this state now, for everybody to see; raises as `check`.

        Raises:
            StorageFull, Unavailable: the database does not take it.
        """
        self.state = state
        self._publish()
        self.check()

    def _publish(self) -> None:
        ingest.heartbeat(
            self._database,
            self._held,
            state=self.state,
            images_done=self.images_done,
            images_total=self.images_total,
        )

    def _beat(self) -> None:
        interval_s = min(HEARTBEAT_S, self._settings.lease_s / 4)
        while not self._ended.wait(interval_s):
            self._is_alive()
            try:
                self._publish()
            except LeaseLost:
                self._is_lost = True
                return
            except EngramError as error:
                logger.warning("ingest %s: its lease could not be renewed: %s", self._held.id, error)
