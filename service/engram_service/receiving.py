"""Receives files from the network: locked from the first byte on, hashed, and durable once they are whole.

The lock is an exclusive flock, which dies with its process: whoever finds a file unlocked knows that nobody receives it
any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anyio.to_thread import run_sync

from engram.errors import EngramError, StorageFull
from engram.files import disk_errors, fsync_path

# One trip to the thread pool per block: large enough to outweigh the trip, small beside the process.
BLOCK_BYTES = 1 << 20


class ReceivedFile:
    """One file on its way to disk. Methods block; coroutines call them in the thread pool.

    Args:
        path: where it is received.
        make_room: called when the disk is full; true if it is worth another try.
    """

    def __init__(self, path: Path, make_room: Callable[[], bool] = lambda: False) -> None:
        self.path = path
        self._make_room = make_room
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._file = _open_locked(path)

    @property
    def sha256(self) -> str:
        """Digest of what was written so far."""
        return self._hash.hexdigest()

    def write(self, block: bytes | bytearray) -> None:
        """The block is written and hashed.

        Raises:
            StorageFull: the disk is full.
        """
        self._hash.update(block)
        rest = memoryview(block)
        while rest:
            try:
                with disk_errors(self.path, len(rest)):
                    rest = rest[os.write(self._file, rest) :]
            except StorageFull:
                if not self._make_room():
                    raise
        self.bytes += len(block)

    def sync(self) -> None:
        """What was written survives a power cut.

        Raises:
            StorageFull: the disk is full.
        """
        with disk_errors(self.path, self.bytes):
            os.fsync(self._file)

    def rename(self, path: Path) -> None:
        """The file has this name in its folder, after a power cut too.

        Raises:
            StorageFull: the disk is full.
        """
        with disk_errors(path, self.bytes):
            self.path = self.path.rename(path)
            fsync_path(path.parent)

    def discard(self) -> None:
        """The file is gone."""
        self.path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """The file is left to the row that names it, or to the collector if none does."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


async def fill(
    file: ReceivedFile, chunks: AsyncIterator[bytes], max_bytes: int, too_large: Callable[[int], EngramError]
) -> None:
    """All chunks are written; about `BLOCK_BYTES` of them are in memory at a time.

    Raises:
        EngramError: what `too_large` makes of the bytes received so far, if they are more than `max_bytes`.
        StorageFull: the disk is full.
    """
    block = bytearray()
    async for chunk in chunks:
        block += chunk
        if file.bytes + len(block) > max_bytes:
            raise too_large(file.bytes + len(block))
        if len(block) >= BLOCK_BYTES:
            await run_sync(file.write, block)
            block = bytearray()
    await run_sync(file.write, block)


@contextmanager
def abandoned(path: Path) -> Iterator[bool]:
    """Whether the file is there and nobody receives it any more; while the block lasts it is locked."""
    try:
        # Not blocking: what lies there may be no plain file.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _is_locked_now(file)
    finally:
        os.close(file)


def _is_locked_now(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_locked(path: Path) -> int:
    """A new file, locked before anybody else could lock it for removal."""
    while True:
        with disk_errors(path, 0):
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink > 0:
            return file
        os.close(file)  # a collector found it between creation and lock
