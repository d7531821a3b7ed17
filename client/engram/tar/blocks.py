"""Reads a tar stream member by member, forward, and believes none of its numbers.

    header    512 bytes, the fields that matter here at their places:
                0  name:100   UTF-8, ended by a zero byte
              124  size:12    octal text, or 0x80 and eleven bytes, big-endian
              148  checksum:8 octal text: the sum of all bytes of the header, these as blanks
              156  type:1     0 or "0" a file, "5" a directory, "x" "g" "L" "K" an extended header
              257  "ustar" 0  prefix:155 at 345 is valid: folders above the name
    content   size bytes, and zeros up to a whole block
    ...       the next member; an extended header is a member that says something of the one behind it
    two blocks of zeros

A size that no member can have is refused before anything is read by it, as is a damaged header, a missing end, or an
extended header that is longer than any name. The standard library does none of this: see ADR 19.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from os import SEEK_CUR
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
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"x", b"g", b"L", b"K"
_EXTENDED: Final = frozenset({_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK})
# The last is a contiguous file, which is a hint for a disk.
_REGULAR: Final = frozenset({b"0", b"\0", b"7"})
_DIRECTORY: Final = b"5"

_PAX_RECORD = re.compile(rb"(\d{1,9}) ")
_SPARSE: Final = "sparse"
_POSIX: Final = b"ustar\0"
# 2^64 has twenty digits.
_PAX_SIZE = re.compile(r"[0-9]{1,19}")


@dataclass(slots=True)
class Header:
    """What a member says of itself."""

    name: str
    size: int
    kind: bytes

    @property
    def is_directory(self) -> bool:
        """Also in archives from before there was a type for it."""
        return self.kind == _DIRECTORY or (self.kind == b"\0" and self.name.endswith("/"))


class Archive:
    """A tar stream read forward, which knows where it is and which member it read last.

    Of a file whose size is given, what is skipped is not read.
    """

    def __init__(self, stream: BinaryIO, check: Callable[[], None], *, file_bytes: int | None = None) -> None:
        self._stream = stream
        self._check = check
        self._file_bytes = file_bytes
        self._check_at = _CHECK_BYTES
        self._last = ""
        self.offset = 0

    def member(self) -> Header | None:
        """The next regular file or directory with its full name, None at the end of the archive.

        Raises:
            BadUpload: the stream is no tar, is damaged or cut, or has a link, a device or a sparse file there.
        """
        extended: dict[str, str] = {}
        while (header := self._header()) is not None and header.kind in _EXTENDED:
            if header.size > _MAX_EXTENDED_HEADER_BYTES:
                raise BadUpload(
                    f"extended header of {header.size} bytes at byte {self.offset} of the tar, "
                    f"at most {_MAX_EXTENDED_HEADER_BYTES} are accepted"
                )
            content = self.content(header.size, "an extended header")
            if header.kind == _LONG_NAME:
                extended["path"] = content.rstrip(b"\0").decode("utf-8", "replace")
            elif header.kind == _PAX:
                extended |= _pax_records(content)
            elif header.kind == _PAX_GLOBAL and _pax_records(content):
                raise BadUpload("a global PAX header gives one name or size to all members of the tar")
        if header is None:
            return None
        if extended:
            header.name = extended.get("path", header.name)
            header.size = _pax_size(extended, header)
        if (header.kind not in _REGULAR and header.kind != _DIRECTORY) or _SPARSE in extended:
            raise BadUpload(
                f"member {header.name!r} is a link, a device or another special file; only regular files are read",
                member=header.name,
            )
        return header

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
        if self._file_bytes is not None:
            self._seek(left, name)
            left = 0
        while left:
            left -= len(self._exactly(min(left, CHUNK_BYTES), name))
            self._look()
        self._last = name

    def _seek(self, size: int, name: str) -> None:
        end = self.offset + size
        if end > (self._file_bytes or 0):
            raise BadUpload(
                f"the tar is cut short: it has {self._file_bytes} bytes, and member {name!r} ends at byte {end}",
                offset=self._file_bytes,
            )
        self._stream.seek(size, SEEK_CUR)
        self.offset = end

    def _header(self) -> Header | None:
        self._look()
        block = self._exactly(BLOCK, "")
        if not block.strip(b"\0"):
            self._end()
            return None
        if not _is_header(block):
            at = self.offset - BLOCK
            if not at:
                kind = "gzip-compressed: send it uncompressed" if block[:2] == b"\x1f\x8b" else "no tar stream"
                raise BadUpload(f"the body is {kind} (no tar header in its first {BLOCK} bytes)")
            raise BadUpload(f"damaged tar: no valid header at byte {at}{self._after()}", offset=at)
        name = _text(block[:100])
        if block[345] and block[257:263] == _POSIX:
            name = f"{_text(block[345:500])}/{name}"
        try:
            return Header(name, _number(block[124:136]), block[156:157])
        except ValueError as error:
            raise BadUpload(f"member {name!r} declares the size {block[124:136]!r}", member=name) from error

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


def _is_header(block: bytes) -> bool:
    """Whether the checksum is that of the block."""
    try:
        said = _number(block[148:156])
    except ValueError:
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    # Some old programs add bytes up as if they were signed.
    return said == sum(rest) or said == sum(byte - 256 * (byte > 127) for byte in rest)


def _number(field: bytes) -> int:
    """The number of a header's field.

    Raises:
        ValueError: it holds none, or one below zero.
    """
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip(b" ")
    if not text:
        return 0
    # int() alone would take signs and underscores.
    if not text.isdigit():
        raise ValueError(f"no octal number: {field!r}")
    return int(text, 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _pax_size(extended: dict[str, str], header: Header) -> int:
    """What a PAX header says of the member's size, else what its own says.

    Raises:
        BadUpload: it is no number of bytes.
    """
    text = extended.get("size")
    if text is None:
        return header.size
    if not _PAX_SIZE.fullmatch(text):
        raise BadUpload(f"member {header.name!r} declares the size {text[:24]!r}", member=header.name)
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
