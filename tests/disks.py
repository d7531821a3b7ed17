"""Disks for tests: a small one that can be filled to the last byte, and folders that become read-only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """An empty disk of this size, mounted on the folder; the test is skipped where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    with _mounted(["-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], folder):
        yield folder


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written below the folder, by its path, inside the block."""
    if os.geteuid() == 0:
        # Permissions do not bind root; files that are open already stay as they are.
        with _mounted(["--bind", str(folder), str(folder)], folder):
            subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
            yield
        return
    parts = [path for path in folder.rglob("*") if path.is_dir()]
    for path in (folder, *parts):
        path.chmod(0o500)
    try:
        yield
    finally:
        for path in (folder, *parts):
            path.chmod(0o700)


def free_bytes(folder: Path) -> int:
    """What is left on its disk."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def fill_up(path: Path) -> None:
    """The file takes all that is left on its disk."""
    with path.open("wb", buffering=0) as file:
        for block in (2**20, 4096, 1):
            try:
                while file.write(bytes(block)) == block:
                    pass
            except OSError:
                continue


@contextmanager
def _mounted(arguments: list[str], folder: Path) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(["mount", *arguments], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        # Lazily: a service that a failed test left behind may still hold files.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
