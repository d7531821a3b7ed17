"""Free room on a full disk: what deletes, shrinks or cancels works there too, and its bytes are free at once.

Deleting writes first: a row, or the shorter pack that takes the place of a longer one. On a full disk that room comes
from the reserve, from what only older generations name, which then has no period of grace, and from uploads that are
only kept to be tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from engram.errors import StorageFull

from . import ingest
from .collect import collect_rows, collect_uploads
from .database import Database
from .settings import Settings
from .storage import PackStore, Reserve

_T = TypeVar("_T")


class Room:
    """The room on the disk of one service."""

    def __init__(self, database: Database, store: PackStore, settings: Settings) -> None:
        self.reserve = Reserve(settings.reserve_path, settings.reserve_bytes)
        self._database, self._store = database, store
        self._at_once = settings.model_copy(update={"grace_s": 0.0, "retired_bytes": 0, "failed_s": 0.0})

    @contextmanager
    def emergency(self) -> Iterator[Callable[[], object]]:
        """Inside the block the reserve may be used; what it gives removes, when it is called, all that can go.

        Raises:
            Unavailable: the data folder is gone or cannot be written to, or another emergency goes on for too long.
        """
        with self.reserve.given_up():
            yield self._collect

    def freeing(self, work: Callable[[], _T]) -> _T:
        """What `work` gives, which is called again in an emergency if the disk is full; its bytes are free then.

        Raises:
            StorageFull: there is no room even then.
        """
        try:
            return work()
        except StorageFull:
            with self.emergency() as collect:
                done = work()
                collect()
                return done

    def without_kept_uploads(self) -> bool:
        """Uploads that are only kept to be tried again are gone; false if there were none.

        Raises:
            Unavailable: the database does not answer.
        """
        with self._database.reading() as session:
            if not ingest.kept(session):
                return False
        return self.freeing(lambda: collect_uploads(self._database, self._at_once)) > 0

    def _collect(self) -> None:
        collect_rows(self._database, self._store, self._at_once)
        self._database.truncate_log()
