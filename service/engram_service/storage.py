"""Where packs are kept: a folder of immutable files, and a cache of them in memory.

    packs/ab/abcd...ef      one pack, named by the SHA-256 of its bytes, under its first two hex digits
    packs/ab/.abcd...tmp    a pack being written; left behind only by a crash, removed by `sweep`

A file appears under its name complete and durable or not at all: temporary file in the same folder, write, fsync,
rename, fsync of the folder. Packs never change, so readers need no lock and the cache needs no invalidation.

Bytes on a disk do rot. The cache checks every pack against its name when it loads it; from a pack that does not match
it serves the exemplars whose own checksums hold, and `damaged()` names the pack for the health page.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

import numpy as np
from numpy.typing import NDArray

from engram import pack
from engram.errors import NotFound, StorageFull, Unavailable
from engram.strip import Exemplars

logger = logging.getLogger(__name__)

RECHECK_S = 30.0
"""How long a damaged pack is served from memory before the disk is asked again: an operator may have restored it."""

_NAME = re.compile(r"[0-9a-f]{64}")

# A full disk, a full quota, a file-size limit of the process: nothing an operator would tell apart from "full".
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class PackStore:
    """Packs in a local folder. Every method is safe to call from any thread and any process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Where the pack is, whether or not it exists.

        Raises:
            NotFound: `digest` is not 64 hex digits, so that a name from the network never becomes a path.
        """
        if not _NAME.fullmatch(digest):
            raise NotFound(f"no pack {digest!r}: a pack is named by the 64 hex digits of its SHA-256")
        return self.folder / digest[:2] / digest

    def put(self, data: bytes) -> str:
        """The pack is on disk, durable, when this returns its digest. A damaged file of that name is replaced.

        Raises:
            StorageFull: the disk is full; the temporary file is gone.
        """
        digest = pack.digest(data)
        path = self.path(digest)
        if _holds(path, data):
            # Its writer may have died between rename and fsync of the folder; and a collector looks at the age.
            with disk_errors(path, len(data)):
                os.utime(path)
                fsync_path(path)
                fsync_path(path.parent)
                fsync_path(self.folder)
        else:
            write_durably(path, data)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of the pack, as they are on disk: not checked against the name.

        Raises:
            NotFound: there is no such pack.
            Unavailable: the disk does not give it.
        """
        try:
            return self.path(digest).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"no pack {digest}", digest=digest) from None
        except OSError as error:
            raise Unavailable(f"the disk does not give pack {digest}: {error}", digest=digest) from error

    def exists(self, digest: str) -> bool:
        """True if the pack has a file."""
        return self.path(digest).is_file()

    def delete(self, digest: str) -> None:
        """The pack is gone; deleting a pack that is not there is no error."""
        self.path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[tuple[str, float]]:
        """Every pack on disk with the seconds since it was last put."""
        now = time.time()
        for path in self.folder.glob("??/*"):
            with suppress(FileNotFoundError):
                if _NAME.fullmatch(path.name):
                    yield path.name, now - path.stat().st_mtime

    def sweep(self, older_than_s: float) -> int:
        """Temporary files older than this are removed: a crash left them behind; returns how many."""
        removed = 0
        for path in self.folder.glob("??/.*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > older_than_s:
                    path.unlink()
                    removed += 1
        return removed


@contextmanager
def disk_errors(path: Path, needed_bytes: int) -> Iterator[None]:
    """A full disk inside the block becomes `StorageFull`; other failures of the disk stay as they are.

    Raises:
        StorageFull: the disk, the quota or the file-size limit has no room.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free_bytes = _free_bytes(path)
        raise StorageFull(
            f"{needed_bytes} bytes were to be written and {free_bytes} are free ({os.strerror(error.errno)}); "
            "nothing was half-written. Free some space or lower a budget, then try again",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        ) from error


def write_durably(path: Path, data: bytes) -> None:
    """`path` holds exactly `data`, surviving a power cut, or is as it was before.

    Raises:
        StorageFull: the disk is full; nothing is left behind.
    """
    temporary = path.parent / f".{path.name}.{token_hex(4)}.tmp"
    with disk_errors(path, len(data)):
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fsync_path(path.parent.parent)
        try:
            with temporary.open("xb", buffering=0) as file:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(file.fileno(), rest) :]
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def fsync_path(path: Path) -> None:
    """What the file or folder holds survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


@dataclass(frozen=True, eq=False)
class LoadedPack:
    """A pack in memory. `rows` None: whole; else the row numbers that `exemplars` (None: no row) still holds."""

    digest: str
    exemplars: Exemplars | None
    rows: NDArray[np.int64] | None
    loaded_at: float

    @property
    def is_damaged(self) -> bool:
        """True if some row is missing, or the bytes do not match the name."""
        return self.rows is not None

    @property
    def is_due(self) -> bool:
        """True if the disk should be asked again."""
        return self.rows is not None and time.monotonic() - self.loaded_at > RECHECK_S

    @property
    def bytes(self) -> int:
        """Memory it takes, roughly: its data and 28 bytes of index per exemplar."""
        return 0 if self.exemplars is None else len(self.exemplars.data) + 28 * len(self.exemplars)

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where these rows are in `exemplars`; -1 for those that are lost."""
        if self.rows is None:
            return rows
        return np.where(np.isin(rows, self.rows), np.searchsorted(self.rows, rows), -1)


class PackCache:
    """Parsed packs, the least recently used dropped first; a pack larger than the whole cache stays until the next one.

    Loading is serialised per pack, not globally: one slow read does not stop draws from other packs.
    """

    def __init__(self, store: PackStore, max_bytes: int) -> None:
        self.store = store
        self.max_bytes = max_bytes
        self.bytes = 0
        self._packs: OrderedDict[str, LoadedPack] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}
        self._damaged: set[str] = set()

    def peek(self, digests: Sequence[str]) -> list[LoadedPack] | None:
        """The packs if all of them are in memory; never touches the disk."""
        with self._lock:
            found = [self._packs[digest] for digest in digests if digest in self._packs]
            if len(found) < len(digests) or any(self._packs[digest].is_due for digest in self._damaged & set(digests)):
                return None
            for digest in digests:
                self._packs.move_to_end(digest)
        return found

    def get(self, digest: str, count: int) -> LoadedPack:
        """The pack of `count` exemplars, from memory or from disk; what is damaged or missing is left out.

        Raises:
            Unavailable: the disk does not answer.
        """
        known = self.peek([digest])
        if known is not None:
            return known[0]
        with self._lock:
            turn = self._loading.setdefault(digest, threading.Lock())
        with turn:
            known = self.peek([digest])
            found = self._keep(self._load(digest, count)) if known is None else known[0]
        with self._lock:
            self._loading.pop(digest, None)
        return found

    def forget(self, digest: str) -> None:
        """The pack is not in memory and not counted as damaged: it was deleted, or put again."""
        with self._lock:
            self._damaged.discard(digest)
            self._drop(digest)

    def damaged(self) -> list[str]:
        """Packs whose bytes did not match their name, or that had no file, when they were last loaded."""
        with self._lock:
            return sorted(self._damaged)

    def _load(self, digest: str, count: int) -> LoadedPack:
        now = time.monotonic()
        try:
            data = self.store.get(digest)
        except NotFound:
            logger.error("pack %s has no file; its %d exemplars are left out", digest, count)
            return LoadedPack(digest, None, np.empty(0, np.int64), now)
        if pack.digest(data) == digest:
            return LoadedPack(digest, pack.parse(data), None, now)
        exemplars, rows = pack.salvage(data, count)
        logger.error("pack %s does not match its name; %d of %d exemplars are intact", digest, len(rows), count)
        return LoadedPack(digest, exemplars, rows, now)

    def _keep(self, loaded: LoadedPack) -> LoadedPack:
        with self._lock:
            self._drop(loaded.digest)
            self._packs[loaded.digest] = loaded
            self.bytes += loaded.bytes
            while self.bytes > self.max_bytes and len(self._packs) > 1:
                self._drop(next(iter(self._packs)))
            (self._damaged.add if loaded.is_damaged else self._damaged.discard)(loaded.digest)
        return loaded

    def _drop(self, digest: str) -> None:
        dropped = self._packs.pop(digest, None)
        if dropped is not None:
            self.bytes -= dropped.bytes
