"""The worker: it claims ingests, selects and encodes their exemplars, commits them, and collects garbage.

One worker does one ingest at a time. `engram-service serve` runs one as a child process (`Supervisor`), so that a
large upload never slows a draw and a crash in a codec never takes the service along; `engram-service worker` runs
another one anywhere that reaches the same database and data folder.

Dying is part of the plan. The lease is renewed by a thread while the work goes on; a worker that is killed stops
renewing and its ingest is claimed again. One that is asked to stop gives its ingest back at once. A child whose
parent died reads the end of its standard input and does the same.

What an upload did wrong (`EngramError`) ends its ingest with a problem for the user. A full disk or a silent
database is tried again, and so is anything unexpected, `max_attempts` times in all.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from types import TracebackType

from engram import memory
from engram.content import Content
from engram.errors import EngramError, NotFound, StorageFull, Unavailable
from engram.schemas import State
from engram.selection.embedding import BuiltinEmbedder, Embedder

from . import buffers, extractors, ingest
from .collect import collect
from .commit import commit
from .database import Database
from .embedder import OnnxEmbedder
from .ingest import Claim, LeaseLost
from .settings import Settings
from .spooled import SpooledImages
from .storage import PackStore

logger = logging.getLogger(__name__)

# Progress is what a person watches: once a second is enough, and one small transaction.
HEARTBEAT_S = 1.0
COLLECT_S = 60.0
# What a stopping worker may take to notice: it looks after every batch of images.
STOP_S = 10.0
# Starting takes about a second anyway: a worker that cannot start costs a fraction of one core, and says so.
RESTART_S = 0.2


class Stopped(Exception):
    """The worker was asked to stop in the middle of an ingest."""


class Heartbeat:
    """Keeps a claim alive from a thread, publishes its progress, and tells the work when to give up."""

    def __init__(self, database: Database, settings: Settings, held: Claim, stop: threading.Event) -> None:
        self.state: State = "selecting"
        self.images_done = 0
        self.images_total = 0
        self._database, self._settings, self._held, self._stop = database, settings, held, stop
        self._is_lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def found(self, images: int) -> None:
        """So many images have been found in the upload.

        Raises:
            LeaseLost: the ingest is no longer ours.
            Stopped: the worker is to stop.
        """
        self.images_total = images
        self.check()

    def advance(self, images: int) -> None:
        """So many more images have been worked on.

        Raises:
            LeaseLost: the ingest is no longer ours.
            Stopped: the worker is to stop.
        """
        self.images_done = min(self.images_done + images, self.images_total)
        self.check()

    def check(self) -> None:
        """Returns if the work should go on.

        Raises:
            LeaseLost: the ingest is no longer ours.
            Stopped: the worker is to stop.
        """
        if self._is_lost:
            raise LeaseLost(self._held.id)
        if self._stop.is_set():
            raise Stopped(self._held.id)

    def enter(self, state: State) -> None:
        """The ingest is in this state now, for everybody to see.

        Raises:
            LeaseLost: the ingest is no longer ours.
            Stopped: the worker is to stop.
            StorageFull, Unavailable: the database does not take it.
        """
        self.state = state
        self._publish()
        self.check()

    def _publish(self) -> None:
        ingest.heartbeat(
            self._database,
            self._settings,
            self._held,
            state=self.state,
            images_done=self.images_done,
            images_total=self.images_total,
        )

    def _beat(self) -> None:
        interval_s = min(HEARTBEAT_S, self._settings.lease_s / 4)
        while not self._ended.wait(interval_s):
            try:
                self._publish()
            except LeaseLost:
                self._is_lost = True
                return
            except EngramError as error:
                logger.warning("ingest %s: its lease could not be renewed: %s", self._held.id, error)


def run(settings: Settings, stop: threading.Event | None = None) -> None:
    """Works off ingests until `stop` is set."""
    stop = stop or threading.Event()
    settings.make_folders()
    database, store = Database(settings), PackStore(settings.packs_dir)
    owner = f"{socket.gethostname()[:32]}:{os.getpid()}:{token_hex(4)}"
    collect_every_s = min(COLLECT_S, max(1.0, settings.grace_s))
    collect_at = time.monotonic()
    try:
        while not stop.is_set():
            try:
                if time.monotonic() >= collect_at:
                    collect(database, store, settings)
                    collect_at = time.monotonic() + collect_every_s
                held = ingest.claim(database, settings, owner=owner)
                if held is None:
                    stop.wait(settings.worker_poll_s)
                else:
                    attempt(database, store, settings, held, stop)
            except EngramError as error:
                logger.warning("the worker cannot work: %s", error)
                stop.wait(1.0)
    finally:
        database.close()


def attempt(database: Database, store: PackStore, settings: Settings, held: Claim, stop: threading.Event) -> None:
    """The claim has ended, one way or another: committed, failed, or given back to be tried again.

    Raises:
        Unavailable: the database does not answer; the lease will run out.
    """
    try:
        generation = perform(database, store, settings, held, stop)
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


def perform(database: Database, store: PackStore, settings: Settings, held: Claim, stop: threading.Event) -> int:
    """The upload is committed; returns the generation. Nothing has changed if it raises.

    Raises:
        BadUpload, TooLarge, Conflict, BudgetExceeded, BadExtractor, NotFound: what is wrong with the upload.
        LeaseLost: the ingest is no longer this worker's.
        Stopped: `stop` was set.
        StorageFull, Unavailable: worth another attempt.
    """
    with database.reading() as session:
        schema = buffers.schema(session, held.buffer)
    with (
        Heartbeat(database, settings, held, stop) as beat,
        SpooledImages(held.spool, settings, beat.found, schema) as images,
        embedder(settings, held, images.shape) as chosen,
    ):
        upload = memory.Upload(held.task, images, held.options, images.names)

        def grow(content: Content) -> Content:
            beat.enter("selecting")
            after = memory.add(content, upload, chosen, advance=beat.advance)
            beat.enter("encoding")
            return after

        return commit(database, store, held.buffer, grow, ingest=held)


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


class Supervisor:
    """A worker in a child process, started again whenever it ends, stopped with its parent."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stopping = threading.Event()
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)

    def start(self) -> None:
        """The worker is being started."""
        self._thread.start()

    def stop(self) -> None:
        """The worker has ended; an ingest it was at is given back."""
        self._stopping.set()
        with self._lock:
            if self._child is not None:
                self._let_go(self._child)
        self._thread.join(2 * STOP_S)

    def _supervise(self) -> None:
        while not self._stopping.is_set():
            child = self._spawn()
            if child is None:
                return
            code = child.wait()
            self._let_go(child)
            if not self._stopping.is_set():
                logger.error("the worker ended with %d; another one starts", code)
                self._stopping.wait(RESTART_S)

    def _spawn(self) -> subprocess.Popen[str] | None:
        # It finds the modules that its parent found, and none of its parent's secrets: the token is the HTTP side's.
        environment = {name: value for name, value in os.environ.items() if name != "ENGRAM_ADMIN_TOKEN"}
        # The matrices of selection are small: more threads only fight over the cores (16 s against 121 s when busy).
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(part).absolute()) for part in sys.path if part)
        with self._lock:
            if self._stopping.is_set():
                return None
            child = subprocess.Popen(
                [sys.executable, "-m", "engram_service.worker"],
                stdin=subprocess.PIPE,
                env=environment,
                text=True,
                encoding="utf-8",
            )
            self._child = child
            if child.stdin is not None:
                with suppress(BrokenPipeError):
                    child.stdin.write(self._settings.model_dump_json(exclude={"admin_token"}) + "\n")
                    child.stdin.flush()
            return child

    @staticmethod
    def _let_go(child: subprocess.Popen[str]) -> None:
        """The child reads the end of its standard input."""
        if child.stdin is not None:
            with suppress(BrokenPipeError):
                child.stdin.close()


def main() -> None:
    """A supervised worker: settings come as a line on standard input, its end means that the parent is gone."""
    settings = Settings.model_validate_json(sys.stdin.readline())
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(levelname)s: worker: %(message)s", stream=sys.stderr
    )
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
    run(settings, stop)


if __name__ == "__main__":
    main()
