"""Reads a tar stream member by member, forward, and believes none of its numbers.

    header    512 bytes: name, size, type, checksum
    content   size bytes, and zeros up to a whole block
    ...       the next member; extended headers are members that say something of the one behind them
    two blocks of zeros

Headers are parsed by `tarfile.TarInfo.frombuf`; the walk is ours: `tarfile` ends silently at a damaged header or a
missing end, which is how a cut upload loses images, reads a PAX header of any declared size into memory, and takes
sizes below zero. Here a size that no member can have is refused before anything is read by it.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable
from typing import BinaryIO, Final

from engram.errors import BadUpload

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)
"""What closes a tar stream."""

CHUNK_BYTES: Final = 1 << 20

# Of headers alone this is some 5 ms of work, of passed-over content 0.1 ms.
_CHECK_BYTES: Final = 256 * BLOCK

# A name longer than any file system's path limit is an attack on memory, not a name.
_MAX_EXTENDED_HEADER_BYTES: Final = 64 * 2**10
_EXTENDED: Final = frozenset({tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK})
_REGULAR: Final = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})

_PAX_RECORD = re.compile(rb"(\d{1,9}) ")
_SPARSE: Final = "sparse"
# 2^64 has twenty digits.
_PAX_SIZE = re.compile(r"[0-9]{1,19}")


class Archive:
    """A tar stream read forward, which knows where it is and which member it read last."""

    def __init__(self, stream: BinaryIO, check: Callable[[], None]) -> None:
        self._stream = stream
        self._check = check
        self._check_at = _CHECK_BYTES
        self._last = ""
        self.offset = 0

    def member(self) -> tarfile.TarInfo | None:
        """The next regular file or directory with its full name, None at the end of the archive.

        Raises:
            BadUpload: the stream is no tar, is damaged or cut, or has a link, a device or a sparse file there.
        """
        extended: dict[str, str] = {}
        while (info := self._header()) is not None and info.type in _EXTENDED:
            if info.size > _MAX_EXTENDED_HEADER_BYTES:
                raise BadUpload(
                    f"extended header of {info.size} bytes at byte {self.offset} of the tar, "
                    f"at most {_MAX_EXTENDED_HEADER_BYTES} are accepted"
                )
            content = self.content(info.size, "an extended header")
            if info.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = content.rstrip(b"\0").decode("utf-8", "replace")
            elif info.type == tarfile.XHDTYPE:
                extended |= _pax_records(content)
            elif info.type == tarfile.XGLTYPE and _pax_records(content):
                raise BadUpload("a global PAX header gives one name or size to all members of the tar")
        if info is None:
            return None
        if extended:
            info.name = extended.get("path", info.name)
            info.size = _pax_size(extended, info)
        if not info.isdir() and (info.type not in _REGULAR or _SPARSE in extended):
            raise BadUpload(
                f"member {info.name!r} is a link, a device or another special file; only regular files are read",
                member=info.name,
            )
        return info

    def content(self, size: int, name: str) -> bytes:
        """The `size` bytes of the member whose header came last; its padding is passed over.

        Raises:
            BadUpload: the stream ends before.
        """
        content = self._exactly(size, name)
        self._exactly(-size % BLOCK, name)
        self._last = name
        return content

    def skip(self, size: int, name: str) -> None:
        """The content of the member whose header came last is passed over.

        Raises:
            BadUpload: the stream ends before.
        """
        left = size + -size % BLOCK
        while left:
            left -= len(self._exactly(min(left, CHUNK_BYTES), name))
            self._look()
        self._last = name

    def _header(self) -> tarfile.TarInfo | None:
        self._look()
        block = self._exactly(BLOCK, "")
        if not block.strip(b"\0"):
            self._end()
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except (tarfile.HeaderError, ValueError) as error:
            at = self.offset - BLOCK
            if not at:
                kind = "gzip-compressed: send it uncompressed" if block[:2] == b"\x1f\x8b" else "no tar stream"
                raise BadUpload(f"the body is {kind} (no tar header in its first {BLOCK} bytes)") from error
            raise BadUpload(f"damaged tar: no valid header at byte {at}{self._after()}", offset=at) from error
        if info.size < 0:
            raise BadUpload(f"member {info.name!r} declares a size of {info.size} bytes", member=info.name)
        return info

    def _look(self) -> None:
        """Whoever wants this to end is heard, every so many bytes."""
        if self.offset >= self._check_at:
            self._check_at = self.offset + _CHECK_BYTES
            self._check()

    def _end(self) -> None:
        """One block of zeros was read: there is a second, and after it nothing but zeros."""
        if self._exactly(BLOCK, "").strip(b"\0"):
            raise BadUpload(f"damaged tar: a single block of zeros at byte {self.offset - 2 * BLOCK}{self._after()}")
        while chunk := self._stream.read(CHUNK_BYTES):
            if chunk.strip(b"\0"):
                raise BadUpload(
                    f"there are more bytes after the end of the tar at byte {self.offset}; "
                    "join archives with `tar --concatenate` or upload them one by one"
                )
            self.offset += len(chunk)
            self._look()

    def _after(self) -> str:
        return f", after member {self._last!r}" if self._last else ""

    def _exactly(self, size: int, name: str) -> bytes:
        """So many bytes, of the member of this name or of what stands between members."""
        if not size:
            return b""
        content = self._stream.read(size)
        if len(content) != size:
            content = self._rest(content, size, name)
        self.offset += size
        return content

    def _rest(self, content: bytes, size: int, name: str) -> bytes:
        """Pipes and sockets may answer with less than was asked for; only an empty answer is the end."""
        parts = [content]
        received = len(content)
        while received < size:
            part = self._stream.read(size - received) if parts[-1] else b""
            if not part:
                end = self.offset + received
                inside = repr(name) if name else "a header or the end"
                raise BadUpload(
                    f"the tar ends at byte {end}, inside {inside}{self._after()}: {size - received} bytes are missing; "
                    "the upload was cut short, send it again",
                    offset=end,
                )
            parts.append(part)
            received += len(part)
        return b"".join(parts)


def _pax_size(extended: dict[str, str], info: tarfile.TarInfo) -> int:
    """What a PAX header says of the member's size, else what its own says.

    Raises:
        BadUpload: it is no number of bytes.
    """
    text = extended.get("size")
    if text is None:
        return info.size
    if not _PAX_SIZE.fullmatch(text):
        raise BadUpload(f"member {info.name!r} declares the size {text[:24]!r}", member=info.name)
    return int(text)


def _pax_records(content: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a PAX header that matter here; the others would pile up in memory."""
    records: dict[str, str] = {}
    position = 0
    while position < len(content) and content[position]:
        match = _PAX_RECORD.match(content, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(content) or content[end - 1] != 0x0A:
            raise BadUpload(f"damaged PAX header: bad record at its byte {position}")
        key, equals, value = content[match.end() : end - 1].partition(b"=")
        if not equals:
            raise BadUpload(f"damaged PAX header: no '=' in the record at its byte {position}")
        if key in (b"path", b"size"):
            records[key.decode()] = value.decode("utf-8", "replace")
        elif key.startswith(b"GNU.sparse."):
            records[_SPARSE] = ""
        position = end
    return records
