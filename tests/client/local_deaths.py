"""Kills writers of a local buffer at every step of a change and checks what they leave; run as a program.

    python -m tests.client.local_deaths FOLDER [POINTS]

A writer dies by SIGKILL at its n-th audited call (open, rename, remove, mkdir, link). `POINTS` such n are tried, chosen
at random; without it all are.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from engram import IngestOptions, LocalBuffer, pack
from tests.contents import pictures

STEPS = ("open", "os.rename", "os.remove", "os.mkdir", "os.link")

CHANGES: list[Callable[[LocalBuffer], object]] = [
    lambda buffer: buffer.add(0, pictures(0, 30), ["cat", "dog"] * 15, options=IngestOptions(ranking="ring")),
    lambda buffer: buffer.add(1, pictures(1, 30), [7] * 30, options=IngestOptions(ranking="ring")),
    lambda buffer: buffer.change_budget(1500),
    lambda buffer: buffer.delete_task(0),
    lambda buffer: buffer.fork(buffer.folder.with_name("fork"), budget_bytes=900),
]


def contents(folder: Path) -> tuple[int, list[str]]:
    """The generation and its packs, each of which is what its name says."""
    manifest = LocalBuffer(folder).manifest
    for entry in manifest.packs:
        data = (folder / "packs" / entry.digest).read_bytes()
        assert pack.digest(data) == entry.digest
    if manifest.packs:
        assert LocalBuffer(folder).draw(5).images.shape == (5, 16, 16, 3)
    return manifest.generation, [entry.digest for entry in manifest.packs]


def work(folder: Path, first: int) -> None:
    """Every change from this one on."""
    buffer = LocalBuffer(folder, **({} if first else {"budget_bytes": 3000, "quality": 60}))  # type: ignore[arg-type]
    for change in CHANGES[first:]:
        change(buffer)


def die_after(calls: int) -> None:
    """This process is killed at that audited call."""
    left = count(calls, -1)

    def hook(event: str, _: object) -> None:
        if event in STEPS and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def is_killed(folder: Path, calls: int) -> bool:
    """A child does all changes unless it dies before."""
    child = os.fork()
    if child == 0:
        die_after(calls)
        work(folder, 0)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a writer failed"
    return os.WIFSIGNALED(status)


def main(scratch: Path, points: int | None) -> None:
    whole = scratch / "whole" / "buffer"
    LocalBuffer(whole, budget_bytes=3000, quality=60)
    expected = [contents(whole)]
    for change in CHANGES:
        change(LocalBuffer(whole))
        expected.append(contents(whole))
    in_fork = contents(whole.with_name("fork"))
    place = scratch / "killed"
    total = next(n for n in count(50, 50) if not is_killed(place / str(n) / "buffer", n))
    chosen = sorted(random.Random(0).sample(range(total), points)) if points else range(total)
    seen: set[int] = set()
    for n in chosen:
        folder = place / f"at-{n}" / "buffer"
        if not is_killed(folder, n):
            continue
        if not (folder / "manifest.json").exists():
            # It died before there was a buffer: one can be made.
            work(folder, 0)
            assert contents(folder) == expected[-1]
            continue
        generation, digests = contents(folder)
        assert (generation, digests) == expected[generation], f"killed at call {n}"
        seen.add(generation)
        fork = folder.with_name("fork")
        if (fork / "manifest.json").exists():
            assert contents(fork) == in_fork
        else:
            # A fork that was not finished is in nobody's way.
            shutil.rmtree(fork, ignore_errors=True)
            work(folder, generation)
            assert contents(folder) == expected[-1]
            # The next change removes what the dead one left.
            LocalBuffer(folder).change_budget(1500)
            assert {path.stem for path in (folder / "packs").iterdir()} == set(expected[-1][1])
            assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    print(f"{len(list(chosen))} deaths, generations {sorted(seen)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
