"""Packs in a folder: read through their indexes, whatever happens to either while they are read."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import cast
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import batch, files, index, pack, packs, strip
from engram.draw import Layout, Request, plan
from engram.errors import NotFound, Unavailable
from engram.packs import Damaged, LoadedPack, PackCache, PackFolder
from engram.schemas import PackEntry, Subsampling
from tests.contents import pictures
from tests.servers import environment

COUNT = 30


def packed(seed: int = 0, count: int = COUNT) -> bytes:
    class_ids = np.sort(np.arange(count) % 3)
    return pack.to_bytes(strip.encode(pictures(seed, count), class_ids, quality=50))


@pytest.fixture
def folder(tmp_path: Path) -> PackFolder:
    """Empty."""
    found = PackFolder(tmp_path / "packs")
    found.folder.mkdir()
    return found


def put(folder: PackFolder, seed: int = 0, count: int = COUNT) -> str:
    """A pack with its index; returns its digest."""
    data = packed(seed, count)
    digest = folder.put(data)
    folder.write_index(digest, pack.parse(data))
    return digest


def opened(folder: PackFolder, digests: Sequence[str], max_bytes: int = 0, max_handles: int | None = None) -> PackCache:
    """A cache that holds these packs; by default none of them in memory."""
    cache = PackCache(folder, max_bytes, max_handles=max_handles)
    cache.hold(digests)
    return cache


def drawn(cache: PackCache, digests: Sequence[str], size: int = 20, step: int = 0) -> tuple[bytes, int]:
    """The body of a draw from these packs, and how many exemplars of it were lost."""
    runs = [(0, COUNT // 3), (1, COUNT // 3), (2, COUNT // 3)]
    entries = [
        PackEntry(digest=digest, task=task, bytes=0, exemplars=COUNT, quality=50, runs=runs)
        for task, digest in enumerate(digests)
    ]
    chosen = plan(Layout(entries), Request(size, step=step))

    def use(loaded: list[LoadedPack]) -> tuple[bytes, int]:
        intact = np.ones(len(chosen.rows), bool)
        places = chosen.rows.copy()
        for at, found in enumerate(loaded):
            here = chosen.packs == at
            places[here] = found.places(chosen.rows[here])
        intact = places >= 0
        held = {at: found.exemplars for at, found in enumerate(loaded) if found.exemplars is not None}
        parts = packs.collect(held, type(chosen)(*(column[intact] for column in chosen)), places[intact])
        return batch.assemble(parts), int((~intact).sum())

    return cache.read([(digest, COUNT) for digest in digests], use)


def expected(folder: PackFolder, digests: Sequence[str], size: int = 20, step: int = 0) -> tuple[bytes, int]:
    """The same draw from packs that were read and parsed whole."""
    cache = opened(folder, digests, 10**9)
    for digest in digests:
        cache.whole(digest, COUNT)
    return drawn(cache, digests, size, step)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def flip_segment(folder: PackFolder, digest: str, row: int) -> None:
    """One bit of one exemplar, where it makes or breaks no marker."""
    path = folder.path(digest)
    data = path.read_bytes()
    exemplars = pack.parse(data)
    first, length = int(exemplars.starts[row]), int(exemplars.lengths[row])
    flip(path, next(at for at in range(first + 1, first + length) if data[at - 1] < 0xE0 and data[at] < 0xE0))


@given(st.integers(1, 90), st.integers(0, 5), st.sampled_from(["4:2:0", "4:4:4"]))
@settings(max_examples=30, deadline=None)
def test_an_index_says_what_parsing_the_pack_says(count: int, classes: int, subsampling: Subsampling) -> None:
    class_ids = np.sort(np.arange(count) % (classes + 1))
    data = pack.to_bytes(strip.encode(pictures(1, count), class_ids, quality=50, subsampling=subsampling))
    parsed, digest = pack.parse(data), pack.digest(data)
    found = index.parse(index.to_bytes(parsed, digest), digest)
    assert found is not None
    assert found.is_sound
    assert found.pack_bytes == len(data)
    exemplars = found.over(data)
    assert exemplars.form == parsed.form
    for name in ("starts", "lengths", "class_ids", "checksums"):
        assert np.array_equal(getattr(exemplars, name), getattr(parsed, name)), name
    assert pack.to_bytes(exemplars) == data


def test_an_index_of_a_pack_beyond_4_gib_has_wide_starts() -> None:
    parsed = pack.parse(packed())
    moved = replace(parsed, starts=parsed.starts + 2**32, data=cast(bytes, range(2**33)))
    found = index.of(moved, "0" * 64)
    assert found.pack_bytes == 2**33
    assert np.array_equal(found.starts, parsed.starts + 2**32)


@settings(max_examples=80)
@given(st.data())
def test_no_damage_to_an_index_goes_unnoticed(data: st.DataObject) -> None:
    digest = "ab" * 32
    whole = index.to_bytes(pack.parse(packed()), digest)
    broken = bytearray(whole)
    if data.draw(st.booleans()):
        broken = broken[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        broken[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    found = index.parse(bytes(broken), digest)
    assert found is None or not found.is_sound
    assert index.parse(whole, "cd" * 32) is None


def test_draws_from_disk_equal_draws_from_memory(folder: PackFolder) -> None:
    digests = [put(folder, seed) for seed in range(3)]
    cache = opened(folder, digests)
    for step in range(5):
        assert drawn(cache, digests, step=step) == expected(folder, digests, step=step)
    assert cache.peek(digests) is None
    assert cache.bytes == 0


def test_a_draw_from_disk_reads_no_pack_whole(folder: PackFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [put(folder, seed) for seed in range(3)]
    wanted = expected(folder, digests)
    monkeypatch.setattr(folder, "get", None)
    cache = opened(folder, digests)
    cache.close()  # so that nothing is read in the background
    assert drawn(cache, digests) == wanted


@pytest.mark.parametrize(
    "what", ["missing", "empty", "cut", "of another pack", "garbage", "a wrong checksum", "a folder"]
)
def test_an_index_that_does_not_hold_is_made_anew(folder: PackFolder, what: str) -> None:
    digests = [put(folder, seed) for seed in range(2)]
    wanted = expected(folder, digests, size=60)
    path = folder.index_path(digests[0])
    whole = path.read_bytes()
    match what:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(whole[:-5])
        case "of another pack":
            path.write_bytes(folder.index_path(digests[1]).read_bytes())
        case "garbage":
            path.write_bytes(os.urandom(len(whole)))
        case "a wrong checksum":
            flip(path, len(whole) - 3)
        case "a folder":
            path.unlink()
            path.mkdir()
    cache = opened(folder, digests)
    assert drawn(cache, digests, size=60) == wanted
    assert cache.damaged() == []
    assert path.is_dir() or path.read_bytes() == whole


def test_of_a_damaged_pack_what_is_drawn_is_intact_and_the_pack_is_named(folder: PackFolder) -> None:
    digests = [put(folder, seed) for seed in range(2)]
    flip_segment(folder, digests[1], 7)
    cache = opened(folder, digests)
    body, lost = drawn(cache, digests, size=2 * COUNT)
    assert (len(batch.decode(body)), lost) == (2 * COUNT - 1, 1)
    assert cache.damaged() == [digests[1]]


def test_damage_that_no_draw_met_is_found_in_the_background(folder: PackFolder) -> None:
    for max_bytes in (0, 10**9):
        digest = put(folder)
        cache = opened(folder, [digest], max_bytes)
        flip_segment(folder, digest, 7)
        cache.get(digest, COUNT)
        assert cache.settle(60)
        assert cache.damaged() == [digest]
        folder.put(packed())


def test_a_pack_that_is_cut_short_while_it_is_open_loses_its_end_and_nothing_else(folder: PackFolder) -> None:
    digests = [put(folder, seed) for seed in range(2)]
    cache = opened(folder, digests)
    drawn(cache, digests, size=2 * COUNT)
    os.truncate(folder.path(digests[1]), folder.path(digests[1]).stat().st_size - 40)
    body, lost = drawn(cache, digests, size=2 * COUNT)
    assert lost > 0
    assert len(batch.decode(body)) == 2 * COUNT - lost
    assert cache.damaged() == [digests[1]]


def test_a_pack_that_is_deleted_while_it_is_open_is_read_to_the_end(folder: PackFolder) -> None:
    digests = [put(folder, seed) for seed in range(2)]
    cache = opened(folder, digests)
    cache.get(digests[0], COUNT), cache.get(digests[1], COUNT)
    cache.settle(60)
    wanted = expected(folder, digests)
    folder.delete(digests[0])
    assert drawn(cache, digests) == wanted


def test_a_pack_that_is_deleted_and_closed_is_missing(folder: PackFolder) -> None:
    digests = [put(folder, seed) for seed in range(2)]
    cache = opened(folder, digests, max_handles=1)
    drawn(cache, digests)
    folder.delete(digests[0])
    body, lost = drawn(cache, digests, size=2 * COUNT)
    assert (len(batch.decode(body)), lost) == (COUNT, COUNT)
    assert cache.damaged() == [digests[0]]


def test_a_pack_that_comes_back_is_whole_again(folder: PackFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = put(folder)
    data = folder.get(digest)
    flip_segment(folder, digest, 3)
    cache = opened(folder, [digest])
    assert drawn(cache, [digest], size=COUNT)[1] == 1
    folder.put(data)
    monkeypatch.setattr("engram.packs.RECHECK_S", 0.0)
    assert drawn(cache, [digest], size=COUNT)[1] == 0
    assert cache.damaged() == []


def test_packs_that_fit_are_in_memory_after_a_while_and_the_others_are_not_thrown_about(folder: PackFolder) -> None:
    digests = [put(folder, seed) for seed in range(4)]
    sizes = [folder.path(digest).stat().st_size for digest in digests]
    cache = opened(folder, digests, sum(sizes[:2]) + 10)
    for _ in range(3):
        for digest in digests:
            cache.get(digest, COUNT)
        assert cache.settle(60)
        assert [cache.peek([digest]) is not None for digest in digests] == [True, True, False, False]
        assert cache.bytes == sum(sizes[:2])
    assert drawn(cache, digests) == expected(folder, digests)


def test_what_nobody_holds_takes_nothing_and_makes_room(folder: PackFolder) -> None:
    digests = [put(folder, seed) for seed in range(2)]
    room = max(folder.path(digest).stat().st_size for digest in digests)
    cache = opened(folder, digests, room)
    for digest in digests:
        cache.get(digest, COUNT)
    cache.settle(60)
    assert cache.peek(digests[:1]) is not None
    assert cache.peek(digests[1:]) is None
    cache.release(digests[:1])
    cache.settle(60)
    assert cache.peek(digests[1:]) is not None
    cache.release(digests[1:])
    assert (cache.bytes, cache.index_bytes) == (0, 0)
    assert open_packs(folder) == []


def open_packs(folder: PackFolder) -> list[str]:
    """The packs of the folder that this process has open."""
    names = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            names.append(descriptor.readlink())
    return [name.name for name in names if name.parent == folder.folder]


def test_no_more_packs_are_open_than_allowed(folder: PackFolder) -> None:
    digests = [put(folder, seed) for seed in range(6)]
    cache = opened(folder, digests, max_handles=2)
    for step in range(4):
        assert drawn(cache, digests, step=step) == expected(folder, digests, step=step)
        assert len(open_packs(folder)) <= 2


@pytest.mark.slow
def test_a_process_without_descriptors_left_draws_all_the_same(tmp_path: Path, folder: PackFolder) -> None:
    digests = [put(folder, seed) for seed in range(20)]
    wanted = [expected(folder, digests, size=100, step=step)[0] for step in range(3)]
    program = f"""
import os, resource, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from engram import packs
from engram.packs import PackCache, PackFolder
from tests.client.test_packs import drawn, opened
from pathlib import Path
digests = {digests!r}
cache = opened(PackFolder(Path({str(folder.folder)!r})), digests, max_handles=1000)
drawn(cache, digests[:5], size=5)
used = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, used + 2))
for step in range(3):
    sys.stdout.write(drawn(cache, digests, size=100, step=step)[0].hex() + "\\n")
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert [bytes.fromhex(line) for line in answer.stdout.split()] == wanted


def test_the_number_of_open_packs_follows_the_limit_of_the_process() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert packs.default_handles() == 64
        packs.raise_handles()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def in_threads(count: int, work: Callable[[int], object]) -> None:
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("has_index", [True, False])
def test_threads_that_draw_first_at_once_open_each_pack_once(
    folder: PackFolder, monkeypatch: pytest.MonkeyPatch, has_index: bool
) -> None:
    digests = [put(folder, seed) for seed in range(4)]
    wanted = expected(folder, digests)
    loads: list[str] = []
    load = folder.load

    def counted(digest: str, count: int) -> object:
        loads.append(digest)
        return load(digest, count)

    monkeypatch.setattr(folder, "load", counted)
    if not has_index:
        for digest in digests:
            folder.index_path(digest).unlink()
    cache = opened(folder, digests, 10**9)
    found: list[tuple[bytes, int]] = []
    in_threads(8, lambda _: found.append(drawn(cache, digests)))
    assert found == [wanted] * 8
    assert sorted(loads) == ([] if has_index else sorted(digests))


def test_packs_that_are_let_go_while_threads_draw_from_them_are_drawn_to_the_end(folder: PackFolder) -> None:
    digests = [put(folder, seed) for seed in range(6)]
    wanted = [expected(folder, digests, step=step) for step in range(20)]
    cache = PackCache(folder, 5000, max_handles=2)

    def work(number: int) -> None:
        for step in range(20):
            if number % 2:
                cache.hold(digests)
                cache.release(digests)
            else:
                assert drawn(cache, digests, step=step) == wanted[step]

    in_threads(4, work)
    cache.settle(60)
    assert (cache.bytes, cache.index_bytes) == (0, 0)


def test_a_disk_that_gives_other_bytes_each_time_is_unavailable_and_not_asked_for_ever(
    folder: PackFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = put(folder)
    cache = opened(folder, [digest])
    cache.close()
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda *where: bytes(len(read(*where))))
    with pytest.raises(Damaged) as caught:
        drawn(cache, [digest])
    assert isinstance(caught.value, Unavailable)


def test_picked_rows_of_a_pack_on_disk_are_compared_with_their_checksums(folder: PackFolder) -> None:
    digest = put(folder)
    loaded = opened(folder, [digest]).get(digest, COUNT)
    assert loaded.exemplars is not None
    rows = np.array([7, 8])
    assert list(map(crc32, packs.pick(loaded.exemplars, rows).segments)) == loaded.exemplars.checksums[rows].tolist()
    flip_segment(folder, digest, 7)
    with pytest.raises(Damaged):
        packs.pick(loaded.exemplars, rows)
    assert len(packs.pick(loaded.exemplars, rows[1:]).segments) == 1


@pytest.mark.parametrize("name", ["", "..", "../" + "a" * 64, "A" * 64, "a" * 63])
def test_no_name_leads_out_of_the_folder(folder: PackFolder, name: str) -> None:
    with pytest.raises(NotFound):
        folder.index_path(name)


@pytest.mark.parametrize(
    ("tree", "limit"),
    [
        ({}, None),
        ({"memory.max": "max\n", "box/memory.max": "123456\n"}, 123456),
        ({"memory.max": "1000\n", "box/memory.max": "max\n"}, 1000),
        ({"memory/memory.limit_in_bytes": "5000\n"}, 5000),
    ],
)
def test_the_memory_of_a_control_group_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: dict[str, str], limit: int | None
) -> None:
    for name, text in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    own = tmp_path / "own"
    own.write_text("4:memory:/box\n0::/box\n")
    monkeypatch.setattr("engram.files._CGROUPS", tmp_path)
    monkeypatch.setattr("engram.files._OWN_CGROUPS", own)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert files.memory_limit_bytes() == (machine if limit is None else limit)
