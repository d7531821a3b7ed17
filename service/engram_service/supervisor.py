"""Runs workers as child processes: starts them, watches them, ends those that do not end by themselves.

    python -P -m engram_service.worker NAME NUMBER OF      the worker's name, and that it is number NUMBER of OF

    standard input      the settings as a line of JSON; its end tells the worker to give its ingest back and to end
    standard output     every second a line of JSON: the id of the ingest that it is at, or null

A worker ends its work by itself when its ingest was cancelled or takes too long (`heartbeat`). One that is where it
cannot notice, in a codec or in an extractor that never answers, is killed instead: the lease is gone already, or is
given up here, so nothing can be lost. So is one that has given no sign of life for `worker_silent_s`. When a worker
ends, whatever the reason, what it held is free at once and another one starts.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import threading
import time
from contextlib import suppress

from engram.errors import EngramError

from . import children, ingest, liveness
from .database import Database
from .heartbeat import too_long
from .ingest import Lease, LeaseLost
from .liveness import Identity
from .settings import Settings
from .worker import STOP_S, Post

logger = logging.getLogger(__name__)

# Cancelling is to take effect within 2 s: seen within LOOK_S, and the worker has NOTICE_S to end its work by itself.
LOOK_S = 0.25
NOTICE_S = 1.25
# How often the database is told that the workers are alive; one small transaction for all of them.
REPORT_S = 5.0
# How often the log says that they cannot be looked after: a full disk may be that of the log.
TELL_EVERY_S = 60.0
# Starting takes about a second anyway. Workers that end before they give a sign start more and more seldom.
RESTART_S = 0.2
RESTART_MOST_S = 10.0


class Supervisor:
    """The workers of one machine, from `start` to `stop`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._children: dict[int, _Child] = {}
        self._threads = [
            threading.Thread(target=self._keep, args=(number,), name=f"worker {number}", daemon=True)
            for number in range(settings.worker_count)
        ]
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        """The workers are being started."""
        self._database = Database(self._settings)
        for thread in (*self._threads, self._watcher):
            thread.start()

    def stop(self) -> None:
        """The workers have ended; ingests they were at are given back."""
        self._stopping.set()
        with self._lock:
            children = list(self._children.values())
        for child in children:
            child.let_go()
        deadline = time.monotonic() + 1.2 * STOP_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for child in children:
            child.process.kill()
        for thread in (*self._threads, self._watcher):
            thread.join(STOP_S)
        self._database.close()

    def _keep(self, number: int) -> None:
        """There is a worker of this number until the supervisor stops."""
        pause_s = RESTART_S
        while not self._stopping.is_set():
            try:
                has_started = self._run(number)
            except Exception as error:
                # No memory for another process, say: that passes, and this thread has to be there then.
                logger.error("a worker cannot be run", exc_info=error)
                has_started = False
            pause_s = RESTART_S if has_started else min(RESTART_MOST_S, 2 * pause_s)
            self._stopping.wait(pause_s)

    def _run(self, number: int) -> bool:
        """A worker of this number was there and has ended; True if it had started."""
        child = self._spawn(number)
        if child is None:
            return True
        try:
            child.listen()
        except ValueError as error:
            child.kill(f"it has said what no worker says: {error}")
        code = child.process.wait()
        child.let_go()
        with self._lock:
            del self._children[number]
        self._take_over(child)
        if not self._stopping.is_set():
            logger.error("worker %d ended with %d; another one starts", child.process.pid, code)
        return child.has_started

    def _spawn(self, number: int) -> _Child | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            self._children[number] = _Child(self._settings, Post(number=number, of=len(self._threads)))
            return self._children[number]

    def _take_over(self, child: _Child) -> None:
        """What the dead worker held is free, and nobody takes it for alive."""
        try:
            # That it was told to stop is none of the upload's doing.
            ingest.release_all(self._database, child.identity.name, counts=not self._stopping.is_set())
            with self._database.session() as session:
                liveness.forget(session, child.identity)
        except EngramError as error:
            logger.warning("worker %d has ended; its lease has to run out: %s", child.process.pid, error)

    def _watch(self) -> None:
        report_s = min(REPORT_S, self._settings.worker_silent_s / 4)
        report_at, reported = 0.0, set[Identity]()
        looked_at, told_at = time.monotonic(), float("-inf")
        while not self._stopping.wait(LOOK_S):
            with self._lock:
                children = list(self._children.values())
            now, before = time.monotonic(), looked_at
            looked_at = now
            alive = {child.identity for child in children if now - child.heard_at < report_s}
            try:
                # After a pause of the whole machine the signs that came meanwhile have to be read first.
                if now - before < NOTICE_S:
                    self._end_the_stuck(children)
                if alive and (now >= report_at or alive - reported):
                    report_at, reported = now + report_s, alive
                    with self._database.session() as session:
                        liveness.report(session, alive)
            except Exception as error:
                if now - told_at < TELL_EVERY_S:
                    continue
                told_at = now
                if isinstance(error, EngramError):
                    logger.warning("the workers cannot be looked after: %s", error)
                else:
                    logger.error("the workers cannot be looked after; this is a defect of Engram", exc_info=error)

    def _end_the_stuck(self, children: list[_Child]) -> None:
        """Workers that should have ended their work, or have shown no life, are killed."""
        settings = self._settings
        for child in children:
            if child.is_silent(settings.worker_silent_s):
                child.kill(f"it has shown no sign of life for {settings.worker_silent_s:g} s")
        leases = {child: child.lease for child in children}
        at_work = {lease for lease in leases.values() if lease is not None}
        held: set[Lease] = set()
        if at_work:
            with self._database.reading() as session:
                held = ingest.held_by(session, at_work)
        now = time.monotonic()
        for child, lease in leases.items():
            child.see(lease, is_held=lease in held)
            if lease is not None and now - child.lost_at > NOTICE_S:
                child.kill(f"it goes on with ingest {lease.id}, which is no longer its own")
            elif lease is not None and now - child.since > settings.max_ingest_s + NOTICE_S:
                with suppress(LeaseLost):
                    ingest.fail(self._database, lease, too_long(settings))
                child.kill(f"it goes on with ingest {lease.id}, which takes longer than {settings.max_ingest_s:g} s")


class _Child:
    """A worker process and what is known of it. One thread listens, another looks."""

    def __init__(self, settings: Settings, post: Post) -> None:
        # None of its parent's secrets: the token is the HTTP side's.
        environment = {name: value for name, value in os.environ.items() if name != "ENGRAM_ADMIN_TOKEN"}
        # The matrices of selection are small: more threads only fight over the cores (16 s against 121 s when busy).
        environment.setdefault("OMP_NUM_THREADS", "1")
        self.process = subprocess.Popen(
            children.command("engram_service.worker", post.name, str(post.number), str(post.of)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment | children.search_path(),
        )
        self.identity = Identity(post.name, socket.gethostname(), self.process.pid)
        self.heard_at = float("-inf")
        """When it last gave a sign."""
        self.lease: Lease | None = None
        """What it is at."""
        self.since = 0.0
        """Since when."""
        self.lost_at = float("inf")
        """When it was first seen to go on with what is no longer its own."""
        self._is_killed = False
        assert self.process.stdin is not None, "it is a pipe"
        with suppress(BrokenPipeError):
            self.process.stdin.write(settings.model_dump_json(exclude={"admin_token"}).encode() + b"\n")
            self.process.stdin.flush()

    def listen(self) -> None:
        """Returns when the worker has closed its end of the pipe."""
        assert self.process.stdout is not None, "it is a pipe"
        with self.process.stdout as signs:
            for sign in signs:
                ingest_id = json.loads(sign)
                self.heard_at = time.monotonic()
                if ingest_id != (self.lease and self.lease.id):
                    self.since, self.lost_at = self.heard_at, float("inf")
                    self.lease = None if ingest_id is None else Lease(ingest_id, self.identity.name)

    def let_go(self) -> None:
        """The worker reads the end of its standard input."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()

    def see(self, lease: Lease | None, *, is_held: bool) -> None:
        """The database says whether the worker still holds what it is at."""
        if lease is None or is_held or lease is not self.lease:
            self.lost_at = float("inf")
        else:
            self.lost_at = min(self.lost_at, time.monotonic())

    @property
    def has_started(self) -> bool:
        """Whether it has given a sign."""
        return self.heard_at > float("-inf")

    def is_silent(self, limit_s: float) -> bool:
        """Whether it has started and has then given no sign for so long."""
        return self.has_started and time.monotonic() - self.heard_at > limit_s

    def kill(self, why: str) -> None:
        """The worker has ended, or is about to."""
        if not self._is_killed:
            logger.warning("worker %d is ended: %s", self.process.pid, why)
            self._is_killed = True
            self.process.kill()
