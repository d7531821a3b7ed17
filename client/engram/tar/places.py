"""Lists where the members of a tar file lie, without reading what they hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from engram.errors import TooLarge

from .blocks import Archive


@dataclass(frozen=True, slots=True)
class Place:
    """A member: `size` bytes at `offset` in the file, and its content if that was asked for."""

    name: str
    offset: int
    size: int
    content: bytes | None = None


def places(file: BinaryIO, *, wanted: Callable[[str], bool], max_bytes: int) -> Iterator[Place]:
    """Yield the regular files of a tar file, in its order.

    Args:
        file: a file on disk, at the beginning of the tar.
        wanted: of which names the content is read, too.
        max_bytes: of such a content.

    Raises:
        BadUpload: the file is no tar, damaged or cut short, or has a link or a device.
        TooLarge: a member whose content is wanted is larger.
    """
    archive = Archive(file, lambda: None, file_bytes=os.fstat(file.fileno()).st_size)
    while (header := archive.member()) is not None:
        offset, content = archive.offset, None
        if wanted(header.name) and not header.is_directory:
            if header.size > max_bytes:
                raise TooLarge(f"member {header.name!r} has {header.size} bytes, at most {max_bytes} are accepted")
            content = archive.content(header.size, header.name)
        else:
            archive.skip(header.size, header.name)
        if not header.is_directory:
            yield Place(header.name, offset, header.size, content)
