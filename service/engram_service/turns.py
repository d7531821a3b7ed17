"""What takes seconds of a core is done for one request at a time, and few may wait for their turn.

Whoever waits holds one of the threads in which all other requests are answered: if any number might wait, a client that
may only read could keep everybody else from being answered.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from engram.errors import Unavailable

MAX_WAITING = 4
"""Requests that wait while one is worked on: a tenth of the threads."""

RETRY_S = 5.0
"""When another try is worth it."""


class Turn:
    """Lets one request at a time in.

    Args:
        what: they all want, as in "maps are being made".
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._free = threading.Lock()
        self._places = threading.BoundedSemaphore(MAX_WAITING + 1)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Nobody else is inside the block.

        Raises:
            Unavailable: too many wait already.
        """
        if not self._places.acquire(blocking=False):
            raise Unavailable(
                f"{MAX_WAITING + 1} {self._what} or waited for, one after the other; try again",
                retry_after_s=RETRY_S,
            )
        try:
            with self._free:
                yield
        finally:
            self._places.release()
