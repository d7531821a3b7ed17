"""Writes files that appear whole or not at all, and reads what the machine allows a process to keep.

A temporary file in the same folder, then a rename. Temporary names begin with a point and end in `.tmp`; a crash leaves
them behind, and `sweep` removes them.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from engram.errors import StorageFull, Unavailable

# A full disk, a full quota, a file-size limit of the process: nothing an operator would tell apart from "full".
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def write_durably(path: Path, data: bytes) -> None:
    """`path` holds exactly `data`, surviving a power cut, or is as it was before.

    Raises:
        StorageFull: the disk is full; nothing is left behind.
        Unavailable: the disk does not take it for another reason; nothing is left behind.
    """
    with disk_errors(path, len(data)):
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fsync_path(path.parent.parent)
        _write(path, data, durably=True)
        fsync_path(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """`path` holds exactly `data` or is as it was, as long as the machine does not stop; nothing waits for the disk.

    Raises:
        StorageFull: the disk is full; nothing is left behind.
        Unavailable: the disk does not take it for another reason; nothing is left behind.
    """
    with disk_errors(path, len(data)):
        _write(path, data, durably=False)


@contextmanager
def disk_errors(path: Path, needed_bytes: int) -> Iterator[None]:
    """What the disk refuses inside the block becomes an error of the tree.

    Raises:
        StorageFull: the disk, the quota or the file-size limit has no room.
        Unavailable: anything else: a folder that is gone or read-only, a disk that fails.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise Unavailable(
                f"the disk does not take {path}: {error.strerror}; is its folder there, and may it be written to?"
            ) from error
        free_bytes = _free_bytes(path)
        raise StorageFull(
            f"{needed_bytes} bytes were to be written and {free_bytes} are free ({os.strerror(error.errno)}); "
            "nothing was half-written. Free some space or delete a task or a buffer, then try again",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        ) from error


def fsync_path(path: Path) -> None:
    """What the file or folder holds survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pass_over(path: Path, error: OSError) -> None:
    """Says nothing of a file that cannot be removed."""


def sweep(
    temporaries: Iterator[Path], older_than_s: float, refused: Callable[[Path, OSError], None] = pass_over
) -> int:
    """Temporary files older than this are removed: a crash left them behind; returns how many.

    Args:
        temporaries: to look at.
        older_than_s: since they were written.
        refused: called with each file that cannot be removed, and why.
    """
    removed = 0
    for path in temporaries:
        try:
            if time.time() - path.stat().st_mtime > older_than_s:
                path.unlink()
                removed += 1
        except FileNotFoundError:
            pass
        except OSError as error:
            refused(path, error)
    return removed


def memory_limit_bytes() -> int:
    """The memory that this process may use: the machine's, or what its control group leaves of that."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":  # version 2
                limits += _limits(_CGROUPS, group, "memory.max")
            elif "memory" in controllers.split(","):
                limits += _limits(_CGROUPS / "memory", group, "memory.limit_in_bytes")
    return min(limits)


def _limits(root: Path, group: str, name: str) -> list[int]:
    """What a control group and those around it allow. In a container its own group may be what is mounted as root."""
    found = []
    inner = root / group.lstrip("/")
    for folder in [inner, *inner.parents]:
        with suppress(OSError, ValueError):
            found.append(int((folder / name).read_text()))  # "max" is none
        if folder == root:
            break
    return found


def _write(path: Path, data: bytes, *, durably: bool) -> None:
    temporary = path.parent / f".{path.name}.{token_hex(4)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if durably:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _free_bytes(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
