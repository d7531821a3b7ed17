"""Keeps packs in a folder of folders, so that none holds more files than a file system likes, and room for a full disk.

    packs/ab/abcd...ef          one pack, named by the SHA-256 of its bytes, under its first two hex digits
    packs/ab/abcd...ef.index    where its exemplars lie
    packs/ab/.abcd...tmp        a file being written; left behind only by a crash

    reserve         takes up room that only what frees room may use

How packs are written and read is in `engram.packs`.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engram.errors import StorageFull, Unavailable
from engram.files import disk_errors
from engram.packs import PackFolder

LEAST_RESERVE_BYTES = 2**16
"""Where there is no room for all of the reserve, it is made in half the size, and so on down to this."""

WAIT_S = 10.0
"""How long a request waits for the reserve; all threads of the service would soon do nothing else."""

LOOK_S = 0.02


class PackStore(PackFolder):
    """Packs in a local folder. Every method is safe to call from any thread and any process."""

    pattern = "??/*"

    def place(self, digest: str) -> str:
        """Where the pack is, whether or not it exists.

        Raises:
            NotFound: `digest` is not 64 hex digits, so that a name from the network never becomes a path.
        """
        return f"{super().place(digest)[:-64]}{digest[:2]}/{digest}"


class Reserve:
    """Bytes on the disk that are given up when it is full: deleting something writes a little first."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size

    def keep(self) -> bool:
        """The reserve is as large as the disk has room for; True if it is whole. Nothing happens while it is in use.

        Raises:
            Unavailable: the folder is gone or cannot be written to.
        """
        if self._is_whole():
            return True
        with self._locked(wait_s=0) as is_mine:
            if is_mine:
                self._make()
        return self._is_whole()

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """Inside the block its bytes are free; one block at a time. Afterwards it is kept again, as far as possible.

        Raises:
            Unavailable: the folder is gone or cannot be written to, or another block goes on for too long.
        """
        with self._locked(WAIT_S) as is_mine:
            if not is_mine:
                raise Unavailable("the disk is full, and something else is freeing room on it; try again")
            with disk_errors(self.path, 0):
                self.path.unlink(missing_ok=True)
            try:
                yield
            finally:
                self._make()

    def _is_whole(self) -> bool:
        try:
            return self.path.stat().st_size >= self.size
        except OSError:
            return False

    def _make(self) -> None:
        size = self.size
        with disk_errors(self.path, size):
            file = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            held = os.fstat(file).st_size
            while size >= LEAST_RESERVE_BYTES and size > held:
                try:
                    with disk_errors(self.path, size):
                        os.posix_fallocate(file, 0, size)
                    return
                except StorageFull:
                    # What it has already is kept: on a full disk somebody else would take it.
                    os.ftruncate(file, held)
                    size //= 2
        finally:
            os.close(file)

    @contextmanager
    def _locked(self, wait_s: float) -> Iterator[bool]:
        """The folder is locked, by its own descriptor: the file comes and goes. False if another one has the lock."""
        deadline = time.monotonic() + wait_s
        with disk_errors(self.path, 0):
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            while not (is_mine := _try_lock(folder)) and time.monotonic() < deadline:
                time.sleep(LOOK_S)
            yield is_mine
        finally:
            os.close(folder)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
