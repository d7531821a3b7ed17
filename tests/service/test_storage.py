"""Where packs are kept: whole or not at all, on disk and in memory, on a full and on a rotten disk."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from engram import pack, strip
from engram.errors import NotFound, StorageFull, Unavailable
from engram.files import write_durably
from engram_service.storage import PackStore
from tests.contents import pictures
from tests.servers import environment


def packed(seed: int = 0, count: int = 10) -> bytes:
    return pack.to_bytes(strip.encode(pictures(seed, count), np.zeros(count, np.int64), quality=50))


def leftovers(store: PackStore) -> list[Path]:
    return [path for path in store.folder.rglob("*") if path.is_file()]


def test_what_is_put_comes_back_under_its_digest(store: PackStore) -> None:
    data = packed()
    digest = store.put(data)
    assert digest == pack.digest(data)
    assert store.get(digest) == data
    assert store.exists(digest)
    assert store.path(digest) == store.folder / digest[:2] / digest


def test_putting_twice_keeps_one_file_and_makes_it_young_again(store: PackStore) -> None:
    digest = store.put(packed())
    os.utime(store.path(digest), (1, 1))
    assert [found for found, age_s in store.digests() if age_s > 10**6] == [digest]
    assert store.put(packed()) == digest
    assert [found for found, age_s in store.digests() if age_s < 60] == [digest]
    assert leftovers(store) == [store.path(digest)]


def test_putting_again_repairs_a_damaged_file(store: PackStore) -> None:
    data = packed()
    digest = store.put(data)
    store.path(digest).write_bytes(data[:-1])
    store.put(data)
    assert store.get(digest) == data


def test_what_was_deleted_is_not_found_and_deleting_it_again_is_fine(store: PackStore) -> None:
    digest = store.put(packed())
    store.write_index(digest, pack.parse(packed()))
    store.delete(digest)
    store.delete(digest)
    assert not store.exists(digest)
    assert leftovers(store) == []
    with pytest.raises(NotFound, match=digest):
        store.get(digest)


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "a" * 63, "A" * 64, "g" * 64, "a" * 64 + "\n"])
def test_no_name_leads_out_of_the_folder(store: PackStore, name: str) -> None:
    for method in (store.path, store.get, store.delete, store.exists):
        with pytest.raises(NotFound):
            method(name)


def test_a_pack_that_the_disk_does_not_give_is_unavailable(store: PackStore) -> None:
    digest = store.put(packed())
    store.path(digest).unlink()
    store.path(digest).mkdir()
    with pytest.raises(Unavailable, match=digest):
        store.get(digest)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_turns_out_full_at_the_end_leaves_nothing_half_written(
    store: PackStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = store.put(packed(1))

    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageFull) as caught:
            store.put(packed(2))
    assert caught.value.details["needed_bytes"] == len(packed(2))
    assert caught.value.details["free_bytes"] > 0
    assert leftovers(store) == [store.path(before)]
    assert store.get(store.put(packed(2))) == packed(2)


def test_a_really_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        store = PackStore(disk / "packs")
        kept = store.put(packed(1))
        with pytest.raises(StorageFull, match="nothing was half-written"):
            store.put(os.urandom(100_000))
        assert leftovers(store) == [store.path(kept)]
        assert store.get(kept) == packed(1)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_limit_on_file_sizes_is_a_full_disk_too(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(StorageFull):
            write_durably(tmp_path / "file", bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_killed_leaves_a_temporary_that_is_swept(store: PackStore) -> None:
    program = f"""
import os, signal
from engram_service.storage import PackStore
def die(descriptor):
    if os.readlink(f"/proc/self/fd/{{descriptor}}").endswith(".tmp"):
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = die
PackStore(__import__("pathlib").Path({str(store.folder)!r})).put(b"x" * 1000)
"""
    assert subprocess.run([sys.executable, "-c", program], env=environment(), timeout=60, check=False).returncode == -9
    (temporary,) = leftovers(store)
    assert list(store.digests()) == []
    assert store.sweep(older_than_s=3600) == 0
    os.utime(temporary, (1, 1))
    assert store.sweep(older_than_s=3600) == 1
    assert leftovers(store) == []


def test_an_index_whose_pack_is_gone_is_swept(store: PackStore) -> None:
    kept, gone = store.put(packed(1)), store.put(packed(2))
    for digest, seed in ((kept, 1), (gone, 2)):
        store.write_index(digest, pack.parse(packed(seed)))
        os.utime(store.index_path(digest), (1, 1))
    store.path(gone).unlink()
    assert store.sweep(older_than_s=3600) == 1
    assert sorted(leftovers(store)) == [store.path(kept), store.index_path(kept)]


def test_a_pack_is_visible_whole_or_not_at_all_while_many_put_it(store: PackStore) -> None:
    data = packed(3, 200)
    digest = pack.digest(data)
    seen: set[bytes | None] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(store.get(digest) if store.exists(digest) else None)
            time.sleep(0)

    watcher = threading.Thread(target=look)
    watcher.start()
    writers = [threading.Thread(target=store.put, args=(data,)) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    watcher.join()
    assert seen <= {None, data}
    assert leftovers(store) == [store.path(digest)]
