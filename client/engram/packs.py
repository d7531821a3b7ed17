"""Reads packs that lie in a folder: by `pread` through their indexes, or from memory where they fit.

    FOLDER/DIGEST            a pack, named by the SHA-256 of its bytes
    FOLDER/DIGEST.index      where its exemplars lie (`engram.index`), made anew whenever it is missing or does not hold
    FOLDER/.NAME.XXXX.tmp    a file being written; left behind only by a crash, removed by `sweep`

A file appears under its name complete or not at all. Packs never change, so readers need no lock and nothing that is
kept needs invalidation.

Opening a pack reads its index and no more. A draw then reads the segments that it needs, over a descriptor that stays
open, and compares each with its checksum. A mapped file would be faster by a third, but one that is cut short kills the
process with SIGBUS. Packs are also read whole, hashed and kept in memory as long as they fit a bound: draws from those
are plain slices. What does not fit stays on disk; nothing is thrown out to make room for something else.

Bytes on a disk do rot. From a pack that does not match its name the exemplars are served whose own checksums hold, and
`damaged` names the pack.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from engram import batch, files, forks, index, pack
from engram.draw import Plan
from engram.errors import EngramError, NotFound, Unavailable
from engram.schemas import PackEntry
from engram.strip import Bytes, Exemplars, Loose, runs_of

logger = logging.getLogger(__name__)

RECHECK_S = 30.0
"""How long a damaged pack is served from memory before the disk is asked again: somebody may have restored it."""

CACHE_BYTES = 2**30
"""Packs kept in memory unless told otherwise, or a quarter of the memory that the process may use if that is less."""

_NAME = re.compile(r"[0-9a-f]{64}")
_INDEX = ".index"

# A quarter of what the process may open, for it has connections too; beyond some number it gains nothing.
_HANDLE_SHARE, _MOST_HANDLES = 4, 16_384

# Packs are read in the background about half of the time, so that draws find the processor free.
_BREATH_S = 0.02
# Nor while the first draw still opens packs.
_PATIENCE_S = 0.1
_BLOCK_BYTES = 2**22

# What a pack takes in memory beside its bytes, roughly: some objects, and a row of its index for each exemplar.
_OBJECT_BYTES, _ROW_BYTES = 1500, 12

# A disk that gives other bytes at every reading: nobody should try for ever.
_ATTEMPTS = 3

_TOO_MANY = frozenset({errno.EMFILE, errno.ENFILE})

_T = TypeVar("_T")


class Damaged(Unavailable):
    """A pack on disk does not give the bytes that its index promises; `digest` is its name."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"pack {digest} is damaged on disk or gone", digest=digest)
        self.digest = digest


class PackFolder:
    """Packs in a folder. Every method is safe to call from any thread and any process."""

    pattern = "*"
    """Where files are, below the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Where the pack is, whether or not it exists.

        Raises:
            NotFound: `digest` is not 64 hex digits, so that a name from the network never becomes a path.
        """
        return Path(self.place(digest))

    def place(self, digest: str) -> str:
        """As `path`, in a tenth of the time: a first draw opens hundreds of packs."""
        if not _NAME.fullmatch(digest):
            raise NotFound(f"no pack {digest!r}: a pack is named by the 64 hex digits of its SHA-256")
        return f"{self.folder}/{digest}"

    def index_path(self, digest: str) -> Path:
        """Where the pack's index is, whether or not it exists."""
        path = self.path(digest)
        return path.with_name(path.name + _INDEX)

    def put(self, data: bytes) -> str:
        """The pack is on disk, durable, when this returns its digest. A damaged file of that name is replaced.

        Raises:
            StorageFull: the disk is full; the temporary file is gone.
        """
        digest = pack.digest(data)
        path = self.path(digest)
        if _holds(path, data):
            # Its writer may have died between rename and fsync of the folder; and a collector looks at the age.
            with files.disk_errors(path, len(data)):
                os.utime(path)
                for part in (path, *path.relative_to(self.folder).parents):
                    files.fsync_path(self.folder / part)
        else:
            files.write_durably(path, data)
        return digest

    def keep(self, task: int, exemplars: Exemplars) -> PackEntry:
        """The pack of a task's exemplars is on disk, durable, with its index; returns a manifest's line of it.

        Raises:
            StorageFull: the disk is full; nothing is left behind.
        """
        data = pack.to_bytes(exemplars)
        digest = self.put(data)
        self.write_index(digest, pack.parse(data))
        return PackEntry(
            digest=digest,
            task=task,
            bytes=len(data),
            exemplars=len(exemplars),
            quality=exemplars.form.quality,
            runs=runs_of(exemplars.class_ids),
        )

    def write_index(self, digest: str, exemplars: Exemplars) -> None:
        """The pack, parsed as `exemplars`, has an index; or has none if it cannot be written: it is not essential."""
        try:
            files.write_whole(self.index_path(digest), index.to_bytes(exemplars, digest))
        except EngramError as error:
            logger.warning("the index of pack %s cannot be written: %s", digest, error)

    def read_index(self, digest: str) -> index.Index | None:
        """The pack's index; None if there is none that holds.

        Raises:
            OSError: the process may open no more files.
        """
        try:
            return index.parse(_read_file(self.place(digest) + _INDEX), digest)
        except OSError as error:
            if error.errno in _TOO_MANY:
                raise
            return None

    def get(self, digest: str) -> bytes:
        """The bytes of the pack, as they are on disk: not checked against the name.

        Raises:
            NotFound: there is no such pack.
            Unavailable: the disk does not give it.
        """
        try:
            return _read_file(self.place(digest))
        except FileNotFoundError:
            raise NotFound(f"no pack {digest}", digest=digest) from None
        except OSError as error:
            raise Unavailable(f"the disk does not give pack {digest}: {error}", digest=digest) from error

    def load(self, digest: str, count: int) -> tuple[Exemplars | None, NDArray[np.int64] | None]:
        """The exemplars of a pack that should hold `count`, read whole and verified; its index is made if need be.

        The second part is None for a pack that matches its name. Of one that does not it is the rows that are intact,
        and the first part holds these (None if there are none, or no file).

        Raises:
            Unavailable: the disk does not give it.
        """
        try:
            data = self.get(digest)
        except NotFound:
            logger.error("pack %s has no file; its %d exemplars are left out", digest, count)
            return None, np.empty(0, np.int64)
        if pack.digest(data) == digest:
            exemplars = pack.parse(data)
            self.write_index(digest, exemplars)
            return exemplars, None
        exemplars_left, rows = pack.salvage(data, count)
        logger.error("pack %s does not match its name; %d of its %d exemplars are intact", digest, len(rows), count)
        return exemplars_left if len(rows) else None, rows

    def exists(self, digest: str) -> bool:
        """True if the pack has a file."""
        return self.path(digest).is_file()

    def delete(self, digest: str) -> None:
        """The pack is gone with its index; deleting a pack that is not there is no error."""
        self.path(digest).unlink(missing_ok=True)
        self.index_path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[tuple[str, float]]:
        """Every pack on disk with the seconds since it was last put."""
        now = time.time()
        for path in self.folder.glob(self.pattern):
            with suppress(FileNotFoundError):
                if _NAME.fullmatch(path.name):
                    yield path.name, now - path.stat().st_mtime

    def sweep(self, older_than_s: float, refused: Callable[[Path, OSError], None] = files.pass_over) -> int:
        """Temporary files, and indexes without a pack, that are older than this are removed; returns how many.

        Args:
            older_than_s: since they were written.
            refused: called with each file that cannot be removed, and why.
        """
        left = (path for path in self.folder.glob(self.pattern) if self._is_left_behind(path))
        return files.sweep(left, older_than_s, refused)

    def _is_left_behind(self, path: Path) -> bool:
        if path.suffix == _INDEX and not path.name.startswith("."):
            return not path.with_suffix("").exists()
        return path.name.startswith(".") and path.suffix == ".tmp"


def _read_file(path: str) -> bytes:
    """In a third of the time that `Path.read_bytes` takes for a small file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts, left = [], os.fstat(descriptor).st_size
        while left > 0 and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(descriptor)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


class _File:
    """An open descriptor, closed when nobody refers to it: so never while another thread reads from it."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _OnDisk:
    """The bytes of a pack that stay on disk: slices are read where they are asked for."""

    __slots__ = ("_handles", "digest", "file")

    def __init__(self, digest: str, handles: _Handles) -> None:
        self.digest = digest
        self.file: _File | None = None
        self._handles = handles

    def __getitem__(self, where: slice) -> bytes:
        start, end = where.start, where.stop
        try:
            file = self.file or self._handles.open(self)
            data = os.pread(file.descriptor, end - start, start)
        except OSError:
            raise Damaged(self.digest) from None
        if len(data) != end - start:
            raise Damaged(self.digest)
        return data


class _Handles:
    """The packs whose descriptors are open, at most so many; the first to be opened is the first to be closed.

    That is as good as keeping those used last: draws go to all packs alike. And it costs a draw nothing.
    """

    def __init__(self, folder: PackFolder, most: int) -> None:
        self.most = most
        self._folder = folder
        self._open: dict[_OnDisk, None] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def after_fork(self) -> None:
        """In a forked process: the lock may have been held by a thread of the parent's."""
        self._lock = threading.Lock()

    def open(self, source: _OnDisk) -> _File:
        file = self.with_room(lambda: _File(self._folder.place(source.digest)))
        with self._lock:
            source.file = file
            self._open[source] = None
            while len(self._open) > self.most:
                self._close_first()
        return file

    def close(self, source: _OnDisk) -> None:
        with self._lock:
            self._open.pop(source, None)
            source.file = None

    def let_go(self, source: _OnDisk) -> None:
        """It is closed with the last snapshot that reads from it, for its file may be gone soon."""
        with self._lock:
            self._open.pop(source, None)

    def with_room(self, work: Callable[[], _T]) -> _T:
        """What `work` gives, which opens a file; where the process may open no more, half of ours are closed first.

        Raises:
            OSError: none of ours is left to be closed.
        """
        while True:
            try:
                return work()
            except (OSError, Unavailable) as error:
                cause = error.__cause__ if isinstance(error, Unavailable) else error
                if not (isinstance(cause, OSError) and cause.errno in _TOO_MANY and self._open):
                    raise
            with self._lock:
                self.most = max(1, len(self._open) // 2)
                for _ in range(-(-len(self._open) // 2)):
                    self._close_first()

    def _close_first(self) -> None:
        source = next(iter(self._open))
        del self._open[source]
        source.file = None


@dataclass(frozen=True, eq=False)
class LoadedPack:
    """A pack that can be read. `rows` None: whole; else the row numbers that `exemplars` (None: no row) still holds."""

    digest: str
    count: int
    exemplars: Exemplars | None
    rows: NDArray[np.int64] | None
    pack_bytes: int
    in_memory: bool
    loaded_at: float

    @property
    def is_damaged(self) -> bool:
        """True if some row is missing, or the bytes do not match the name."""
        return self.rows is not None

    @property
    def is_due(self) -> bool:
        """True if the disk should be asked again."""
        return self.rows is not None and time.monotonic() - self.loaded_at > RECHECK_S

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest of its exemplars, record included; at most."""
        found = self.exemplars
        if found is None:
            return 0
        return int(found.lengths.max()) + (0 if found.record_lengths is None else int(found.record_lengths.max()))

    @property
    def bytes(self) -> int:
        """Of its data in memory."""
        return self.pack_bytes if self.in_memory else 0

    @property
    def index_bytes(self) -> int:
        """Of all the rest."""
        return _OBJECT_BYTES + (0 if self.exemplars is None else _ROW_BYTES * len(self.exemplars))

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where these rows are in `exemplars`; -1 for those that are lost."""
        if self.rows is None:
            return rows
        return np.where(np.isin(rows, self.rows), np.searchsorted(self.rows, rows), -1)


class PackCache:
    """Packs of a folder, opened once and read by many. Safe to call from any thread.

    Only packs that are held (`hold`, until `release`) are remembered, so whoever knows which generations are in use
    decides what may take memory and descriptors.

    Args:
        max_bytes: of packs in memory; None: `CACHE_BYTES`, or a quarter of the memory that this process may use.
        eager: packs that fit are read whole when they are opened; else a thread reads them afterwards.
    """

    def __init__(
        self, folder: PackFolder, max_bytes: int | None = None, *, max_handles: int | None = None, eager: bool = False
    ) -> None:
        self.store = folder
        self.max_bytes = min(CACHE_BYTES, files.memory_limit_bytes() // 4) if max_bytes is None else max_bytes
        self.bytes = 0
        self.index_bytes = 0
        self.eager = eager
        self._handles = _Handles(folder, default_handles() if max_handles is None else max_handles)
        self._packs: dict[str, LoadedPack] = {}
        self._held: dict[str, int] = {}
        self._damaged: set[str] = set()
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}
        self._waiting: dict[str, None] = {}
        self._settled = threading.Condition(self._lock)
        self._reader: threading.Thread | None = None
        self._is_closed = threading.Event()
        forks.register(self)

    def after_fork(self) -> None:
        """In a forked process: no thread of the parent's is at work here, and descriptors may be shared."""
        self._lock, self._loading, self._waiting = threading.Lock(), {}, {}
        self._settled, self._reader = threading.Condition(self._lock), None
        self._handles.after_fork()

    def hold(self, digests: Iterable[str]) -> None:
        """These packs may be remembered; each call is undone by one of `release`."""
        with self._lock:
            for digest in digests:
                self._held[digest] = self._held.get(digest, 0) + 1

    def release(self, digests: Iterable[str]) -> None:
        """Packs that nobody else holds take no memory and no descriptor any more."""
        with self._lock:
            for digest in digests:
                left = self._held[digest] - 1
                if left:
                    self._held[digest] = left
                else:
                    del self._held[digest]
                    self._drop(digest)
            # There may be room now for packs that did not fit.
            for loaded in self._packs.values():
                if not loaded.in_memory and self.bytes + loaded.pack_bytes <= self.max_bytes:
                    self._read_later(loaded.digest)

    def peek(self, digests: Sequence[str]) -> list[LoadedPack] | None:
        """The packs if all of them are in memory; never touches the disk."""
        known = self._packs
        found = [loaded for digest in digests if (loaded := known.get(digest)) is not None and loaded.in_memory]
        if len(found) < len(digests) or (self._damaged and any(loaded.is_due for loaded in found)):
            return None
        return found

    def get(self, digest: str, count: int) -> LoadedPack:
        """The pack of `count` exemplars; of a damaged one what is known to be intact.

        What is not `in_memory` may turn out to be damaged when it is read: see `read`.

        Raises:
            Unavailable: the disk does not answer.
        """
        known = self._packs.get(digest)
        if known is not None and not known.is_due:
            return known
        with self._turn(digest):
            known = self._packs.get(digest)
            if known is not None and not known.is_due:
                return known
            opened = None if digest in self._damaged else self._open(digest, count)
            return self._keep(opened or self._load(digest, count))

    def whole(self, digest: str, count: int) -> LoadedPack:
        """As `get`, every byte verified; in memory if it is held and fits there.

        Raises:
            Unavailable: the disk does not answer.
        """
        loaded = self.get(digest, count)
        if loaded.in_memory:
            return loaded
        with self._turn(digest):
            if digest in self._held and self.bytes + loaded.pack_bytes <= self.max_bytes:
                return self._keep(self._read(digest, count) or self._load(digest, count))
        return loaded if self._matches_on_disk(loaded, gently=False) else self.reload(digest, count)

    def read(self, packs: Sequence[tuple[str, int]], use: Callable[[list[LoadedPack]], _T]) -> _T:
        """What `use` makes of these packs, each given by digest and count of exemplars.

        If it meets one that is `Damaged`, that one is read whole, and `use` is called again with what is intact.

        Raises:
            Unavailable: the disk does not answer, or gives other bytes each time.
        """
        tried: dict[str, int] = {}
        again: dict[str, LoadedPack] = {}
        while True:
            loaded = [again.get(digest) or self.get(digest, count) for digest, count in packs]
            try:
                return use(loaded)
            except Damaged as error:
                tried[error.digest] = tried.get(error.digest, 0) + 1
                if tried[error.digest] > _ATTEMPTS:
                    raise
                again[error.digest] = self.reload(error.digest, dict(packs)[error.digest])

    def reload(self, digest: str, count: int) -> LoadedPack:
        """The pack, read whole from disk now, whatever was known of it; not kept in memory if it does not fit.

        Raises:
            Unavailable: the disk does not answer.
        """
        with self._turn(digest):
            return self._keep(self._load(digest, count))

    def add(self, digest: str, data: bytes) -> LoadedPack:
        """The pack of this digest, which the caller has compared, is in the folder with its index, and open.

        Raises:
            StripCorrupt: these bytes are no pack.
            StorageFull: the disk is full.
        """
        exemplars = pack.parse(data)
        with self._turn(digest):
            files.write_whole(self.store.path(digest), data)
            self.store.write_index(digest, exemplars)
            found = index.of(exemplars, digest).over(data)
            return self._keep(LoadedPack(digest, len(found), found, None, len(data), True, time.monotonic()))

    def forget(self, digest: str) -> None:
        """The pack is not in memory and not counted as damaged: it was deleted, or put again."""
        with self._lock:
            self._damaged.discard(digest)
            self._drop(digest)

    def damaged(self) -> list[str]:
        """Packs whose bytes did not match their name, or that had no file, when they were last read whole."""
        with self._lock:
            return sorted(self._damaged)

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait until no pack is left to be read in the background; false if that takes longer."""
        with self._settled:
            return self._settled.wait_for(lambda: self._reader is None, timeout_s)

    def close(self) -> None:
        """Nothing is read in the background any more, and nothing is kept."""
        self._is_closed.set()
        self.settle()
        with self._lock:
            for digest in list(self._packs):
                self._drop(digest)

    def _turn(self, digest: str) -> _Turn:
        return _Turn(self._loading, digest, self._lock)

    def _open(self, digest: str, count: int) -> LoadedPack | None:
        """The pack, read through its index; None if it must be read whole."""
        source = _OnDisk(digest, self._handles)
        try:
            found = self._index(digest, count)
            if found is None:
                return None
            if self.eager and self.bytes + found.pack_bytes <= self.max_bytes:
                return self._read(digest, count)
            file = self._handles.open(source)
            if os.fstat(file.descriptor).st_size != found.pack_bytes:
                self._handles.close(source)
                return None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unavailable(f"the disk does not give pack {digest}: {error}", digest=digest) from error
        # It looks like bytes to `gather`, which takes slices and nothing else.
        exemplars = found.over(cast(Bytes, source))
        return LoadedPack(digest, count, exemplars, None, found.pack_bytes, False, time.monotonic())

    def _index(self, digest: str, count: int) -> index.Index | None:
        found = self._handles.with_room(lambda: self.store.read_index(digest))
        return None if found is None or len(found) != count else found

    def _read(self, digest: str, count: int, *, gently: bool = False) -> LoadedPack | None:
        """The pack in memory if it has an index that holds and matches its name; None if it must be parsed."""
        known = self._index(digest, count)
        if known is None or not known.is_sound:
            return None
        try:
            data = self._handles.with_room(lambda: self.store.get(digest))
        except NotFound:
            return None
        if len(data) != known.pack_bytes or self._digest(data, gently=gently) != digest:
            return None
        return LoadedPack(digest, count, known.over(data), None, len(data), True, time.monotonic())

    def _digest(self, data: bytes, *, gently: bool) -> str:
        if not gently:
            return pack.digest(data)
        found, view = sha256(), memoryview(data)
        for at in range(0, len(data), _BLOCK_BYTES):
            with _Breath(self._is_closed):
                found.update(view[at : at + _BLOCK_BYTES])
        return found.hexdigest()

    def _load(self, digest: str, count: int) -> LoadedPack:
        """The pack in memory, parsed; of a damaged one what is intact."""
        exemplars, rows = self._handles.with_room(lambda: self.store.load(digest, count))
        size = 0 if exemplars is None else len(exemplars.data)
        if exemplars is not None and rows is None:
            exemplars = index.of(exemplars, digest).over(exemplars.data)
        return LoadedPack(digest, count, exemplars, rows, size, True, time.monotonic())

    def _keep(self, loaded: LoadedPack) -> LoadedPack:
        """It is remembered, in memory or not; returns it as it is remembered, or as it is if nobody holds it."""
        digest = loaded.digest
        with self._lock:
            (self._damaged.add if loaded.is_damaged else self._damaged.discard)(digest)
            if digest not in self._held:
                return loaded
            self._drop(digest)
            # Of a damaged pack there is nothing on disk that could be read without reading all of it.
            kept = loaded
            if isinstance(loaded.exemplars, index.Indexed) and self.bytes + loaded.bytes > self.max_bytes:
                source = cast(Bytes, _OnDisk(digest, self._handles))
                kept = replace(loaded, exemplars=loaded.exemplars.index.over(source), in_memory=False)
            self._packs[digest] = kept
            self.bytes += kept.bytes
            self.index_bytes += kept.index_bytes
            if not loaded.in_memory:
                self._read_later(digest)
        return kept

    def _drop(self, digest: str) -> None:
        dropped = self._packs.pop(digest, None)
        if dropped is not None:
            self.bytes -= dropped.bytes
            self.index_bytes -= dropped.index_bytes
            if not dropped.in_memory and dropped.exemplars is not None:
                self._handles.let_go(cast(_OnDisk, dropped.exemplars.data))

    def _read_later(self, digest: str) -> None:
        if self._is_closed.is_set() or self.eager:
            return
        self._waiting[digest] = None
        if self._reader is None:
            self._reader = threading.Thread(target=self._read_all, name="pack reader", daemon=True)
            self._reader.start()

    def _read_all(self) -> None:
        """Every waiting pack is verified, and in memory if it fits."""
        self._is_closed.wait(_PATIENCE_S)
        while True:
            with self._settled:
                if not self._waiting or self._is_closed.is_set():
                    self._waiting.clear()
                    self._reader = None
                    self._settled.notify_all()
                    return
                digest = next(iter(self._waiting))
                del self._waiting[digest]
                loaded = self._packs.get(digest)
            try:
                if loaded is not None and not loaded.in_memory:
                    self._verify(loaded)
            except (EngramError, OSError) as error:
                logger.warning("pack %s could not be verified: %s", digest, error)
            loaded = None  # what was let go meanwhile is closed now, not with the next pack

    def _verify(self, loaded: LoadedPack) -> None:
        digest, count = loaded.digest, loaded.count
        if self.bytes + loaded.pack_bytes <= self.max_bytes:
            with _Breath(self._is_closed):
                found = self._read(digest, count, gently=True)
            # A pack that was collected is drawn from to the end by whoever has it open.
            if found or self.store.exists(digest):
                self._keep(found or self._load(digest, count))
        elif not self._matches_on_disk(loaded):
            self._keep(self._load(digest, count))

    def _matches_on_disk(self, loaded: LoadedPack, *, gently: bool = True) -> bool:
        found, at = sha256(), 0
        data = cast(Exemplars, loaded.exemplars).data
        while at < loaded.pack_bytes and not self._is_closed.is_set():
            end = min(at + _BLOCK_BYTES, loaded.pack_bytes)
            with _Breath(self._is_closed) if gently else nullcontext():
                try:
                    found.update(data[at:end])
                except Damaged:
                    return False
            at = end
        return found.hexdigest() == loaded.digest or self._is_closed.is_set()


class _Turn:
    """One thread at a time opens a pack; others do not wait for it."""

    def __init__(self, turns: dict[str, threading.Lock], digest: str, lock: threading.Lock) -> None:
        with lock:
            self._mine = turns.setdefault(digest, threading.Lock())
        self._turns, self._digest = turns, digest

    def __enter__(self) -> None:
        self._mine.acquire()

    def __exit__(self, *_: object) -> None:
        self._turns.pop(self._digest, None)
        self._mine.release()


class _Breath:
    """After the block the thread rests as long as it took, at most `_BREATH_S`."""

    def __init__(self, is_closed: threading.Event) -> None:
        self._is_closed = is_closed

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._is_closed.wait(min(_BREATH_S, time.monotonic() - self._began))


def collect(
    packs: Sequence[Exemplars] | Mapping[int, Exemplars], plan: Plan, places: NDArray[np.int64] | None = None
) -> list[batch.Part]:
    """As `batch.collect`, from packs that may lie on disk: what is read there is compared with its checksum.

    Raises:
        Damaged: a pack does not hold what it should.
    """
    parts = batch.collect(packs, plan, places)
    for part in parts:
        if not part.exemplars.is_intact():
            raise Damaged(_culprit(packs, plan, plan.rows if places is None else places))
    return parts


def pick(exemplars: Exemplars, rows: NDArray[np.int64]) -> Loose:
    """These rows, their bytes compared with their checksums if they lie on disk.

    Raises:
        Damaged: the pack does not hold what it should.
    """
    found = exemplars.select(rows).loose()
    if isinstance(exemplars.data, _OnDisk) and not found.is_intact():
        raise Damaged(exemplars.data.digest)
    return found


def _culprit(packs: Sequence[Exemplars] | Mapping[int, Exemplars], plan: Plan, places: NDArray[np.int64]) -> str:
    """The pack on disk of which a drawn exemplar does not match its checksum; the first if they do now."""
    on_disk = [i for i in dict.fromkeys(plan.packs.tolist()) if isinstance(packs[i].data, _OnDisk)]
    for at in on_disk:
        try:
            pick(packs[at], places[plan.packs == at])
        except Damaged as error:
            return error.digest
    return cast(_OnDisk, packs[on_disk[0]].data).digest


def default_handles() -> int:
    """How many packs this process may keep open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _MOST_HANDLES * _HANDLE_SHARE if soft == resource.RLIM_INFINITY else soft
    return max(8, min(_MOST_HANDLES, allowed // _HANDLE_SHARE))


def raise_handles() -> None:
    """This process may open as many files as its hard limit allows, which is what administrators set for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
