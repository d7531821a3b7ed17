"""A worker process: claim an ingest, work on it, and so on; collect garbage in between.

It is started by a `Supervisor` (`supervisor.py`), which describes what goes over the pipes between the two. A worker
may be killed at any moment: its ingest is then claimed by another one. One that is asked to stop gives its ingest back
at once, and so does one that reads the end of its standard input, because its parent has died.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from secrets import token_hex

from engram.errors import EngramError

from . import ingest, logs
from .collect import Collector
from .database import Database
from .ingest import Watch
from .settings import Settings
from .storage import PackStore
from .work import attempt

logger = logging.getLogger(__name__)

COLLECT_S = 60.0
# What a stopping worker may take to notice: it looks after every batch of images.
STOP_S = 5.0


@dataclass(frozen=True)
class Post:
    """The place of a worker among those of its supervisor, held by one process once: the name is never used again."""

    name: str = field(default_factory=lambda: f"{socket.gethostname()[:32]}:{token_hex(8)}")
    number: int = 0
    of: int = 1


def run(
    settings: Settings,
    stop: threading.Event | None = None,
    post: Post | None = None,
    is_alive: Callable[[str | None], None] = lambda ingest_id: None,
) -> None:
    """Process ingests until `stop` is set.

    Args:
        settings: of the service.
        stop: looked at wherever the work can be interrupted.
        post: the worker's name, and which part of the collecting is its own.
        is_alive: called every second or so, and often, with the ingest that the worker is at, or None.
    """
    stop, post = stop or threading.Event(), post or Post()
    settings.make_folders()
    database, store = Database(settings), PackStore(settings.packs_dir)
    watch = Watch()
    # The workers of a supervisor take turns.
    collector = Collector(database, store, settings, pulse=lambda: is_alive(None))
    round_s = min(COLLECT_S, max(1.0, settings.grace_s))
    collect_at = time.monotonic() + post.number * round_s
    try:
        while not stop.is_set():
            is_alive(None)
            if time.monotonic() >= collect_at:
                collector.run()
                collect_at = time.monotonic() + post.of * round_s
            try:
                held = ingest.claim(database, settings, owner=post.name, watch=watch)
                if held is None:
                    stop.wait(settings.worker_poll_s)
                    continue
                is_busy = partial(is_alive, held.id)
                is_busy()
                with logs.about(held.id):
                    attempt(database, store, settings, held, stop, is_busy)
            except EngramError as error:
                logger.warning("the worker cannot work: %s", error)
                stop.wait(1.0)
    finally:
        database.close()


class Signs:
    """What the supervisor reads: a line with the ingest that the worker is at, when it changes and every second."""

    EVERY_S = 1.0

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._said: str | None = None
        self._said_at = float("-inf")
        self._lock = threading.Lock()

    def __call__(self, ingest_id: str | None) -> None:
        """The supervisor is told, unless it has just been told the same."""
        with self._lock:
            now = time.monotonic()
            if ingest_id != self._said or now - self._said_at >= self.EVERY_S:
                self._said, self._said_at = ingest_id, now
                with suppress(OSError):  # the parent is gone, which `main` notices in its own way
                    os.write(self._pipe, json.dumps(ingest_id).encode() + b"\n")


def main() -> None:
    """A supervised worker; see `supervisor` for its arguments and pipes."""
    settings = Settings.model_validate_json(sys.stdin.readline())
    name, number, of = sys.argv[1:]
    logs.set_up(settings.log_level, settings.log_format, worker=name)
    # Standard output is for signs alone: what libraries print there goes where the log goes.
    signs = Signs(os.dup(1))
    os.dup2(2, 1)
    os.nice(settings.worker_niceness)
    stop = threading.Event()
    # Ctrl-C reaches the whole foreground group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # From a thread: the handler may interrupt the main thread while it holds the lock inside the event.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=stop.set).start())

    def wait_for_parent() -> None:
        # Not sys.stdin.read(): a thread inside it would hold a lock that the interpreter needs to exit.
        while os.read(0, 1024):
            pass
        stop.set()
        # A worker that does not notice, deep in a codec, must not outlive its parent: the lease sees to the rest.
        time.sleep(STOP_S)
        os._exit(1)

    threading.Thread(target=wait_for_parent, name="parent", daemon=True).start()
    run(settings, stop, Post(name, int(number), int(of)), signs)


if __name__ == "__main__":
    main()
