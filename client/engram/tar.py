"""The upload format: a tar stream of images with class ids, as WebDataset writes it.

    KEY.ppm    the image: .ppm .pgm .png .jpg .jpeg .webp, any case
    KEY.cls    its class: an integer as ASCII text, or a name as UTF-8 (all of a stream one or the other)
    ...        the next pair; the two members of a pair are neighbours, in either order
    two blocks of zeros

KEY is the member's name up to its last dot, unique in the stream. It is a label and never a path. Directories and
files with other extensions are passed over; links, devices and sparse files are refused. ustar, GNU and PAX headers
are understood (`tar c`, Python's tarfile, WebDataset, bsdtar write one of these). `tar c` packs a folder in the order
of the disk: `tar c --sort=name` keeps pairs together.

Headers are parsed by `tarfile.TarInfo.frombuf`; the walk is ours. `tarfile.open(mode="r|")` would end silently at a
damaged header or a missing end, which is how a cut upload loses images, and reads a PAX header of any declared size
into memory. Memory is bounded by one member, plus eight bytes per key for the check that keys are unique.

Images are uint8 `[H, W, C]`, RGB or grey (C is 3 or 1).
"""

from __future__ import annotations

import io
import re
import struct
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from engram.errors import BadUpload, TooLarge
from engram.names import MAX_CLASS_ID, class_name

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)
"""What closes a tar stream."""

IMAGE_EXTENSIONS: Final = ("ppm", "pgm", "png", "jpg", "jpeg", "webp")
MAX_MEMBER_BYTES: Final = 64 * 2**20
MAX_SIDE: Final = 16_384

# A name longer than any file system's path limit is an attack on memory, not a name.
_MAX_EXTENDED_HEADER_BYTES: Final = 64 * 2**10
_MAX_CLASS_BYTES: Final = 1024
_CHUNK_BYTES: Final = 1 << 20

_CLASS_TEXT = re.compile(rb"\s*\+?([0-9]{1,18})\s*")
_PORTABLE_HEADER = re.compile(
    rb"P([56])(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,6})\s"
)
_SPARSE: Final = "sparse"
_PAX_RECORD = re.compile(rb"(\d{1,9}) ")

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Member:
    """One image with its class: an id, or a name that stands for one.

    `image` is `size` bytes at `offset` in the stream, still encoded.
    """

    key: str
    class_id: int | str
    image: bytes
    name: str
    offset: int
    size: int


def read(stream: BinaryIO, *, max_member_bytes: int = MAX_MEMBER_BYTES) -> Iterator[Member]:
    """Yield the images of a tar stream, in its order, and check the stream up to its end.

    Raises:
        BadUpload: cut short, not a tar, a member without its pair, a key twice, a bad class id or name, ids and names
            in one stream, a link or device.
        TooLarge: a member above `max_member_bytes`.
    """
    keys: set[int] = set()
    waiting: _Half | None = None
    first: tuple[str, int | str] | None = None
    for half in _halves(stream, max_member_bytes):
        if waiting is None:
            # Hashes, not names: what an uploader writes must not set how much memory a key takes.
            hashed = hash(half.key)
            if hashed in keys:
                raise BadUpload(f"key {half.key!r} appears twice; every image needs a key of its own", member=half.name)
            keys.add(hashed)
            waiting = half
            continue
        if half.key != waiting.key or half.is_image == waiting.is_image:
            raise _unpaired(waiting, half)
        image, label = (half, waiting) if half.is_image else (waiting, half)
        waiting = None
        class_id = _class(label)
        first = first or (label.name, class_id)
        if type(class_id) is not type(first[1]):
            raise _mixed(first[0], first[1], label.name, class_id)
        yield Member(
            key=image.key,
            class_id=class_id,
            image=image.content,
            name=image.name,
            offset=image.offset,
            size=len(image.content),
        )
    if waiting is not None:
        raise _unpaired(waiting, None)


@dataclass(frozen=True, slots=True)
class _Half:
    """An image or a class id, not yet matched with its neighbour."""

    key: str
    name: str
    is_image: bool
    content: bytes
    offset: int


def _unpaired(half: _Half, following: _Half | None) -> BadUpload:
    missing = f"{half.key}.cls" if half.is_image else f"an image {half.key}.({'|'.join(IMAGE_EXTENSIONS)})"
    after = "the stream ends" if following is None else f"{following.name!r} follows"
    return BadUpload(
        f"member {half.name!r} has no pair: expected {missing} beside it, but {after}; "
        "the two members of a pair must be neighbours (`tar c --sort=name`)",
        member=half.name,
    )


def _class(label: _Half) -> int | str:
    """The class id that a member holds, or the name."""
    match = _CLASS_TEXT.fullmatch(label.content)
    if match is None:
        try:
            return class_name(label.content.decode("utf-8"))
        except ValueError as error:
            raise BadUpload(
                f"member {label.name!r} holds {label.content[:24]!r} where a class id, an integer "
                f"from 0 to {MAX_CLASS_ID}, or the name of a class was expected ({error})",
                member=label.name,
            ) from error
    class_id = int(match[1])
    if class_id > MAX_CLASS_ID:
        raise BadUpload(
            f"class id {class_id} of member {label.name!r} is above {MAX_CLASS_ID}",
            member=label.name,
            class_id=class_id,
        )
    return class_id


def _mixed(first: str, held: int | str, then: str, found: int | str) -> BadUpload:
    return BadUpload(
        f"member {first!r} holds {held!r} and member {then!r} holds {found!r}: "
        "the classes of an upload are all integers or all names",
        member=then,
        first_member=first,
    )


def _halves(stream: BinaryIO, max_member_bytes: int) -> Iterator[_Half]:
    source = _Source(stream)
    extended: dict[str, str] = {}
    while (info := source.header()) is not None:
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            if info.size > _MAX_EXTENDED_HEADER_BYTES:
                raise BadUpload(
                    f"extended header of {info.size} bytes at byte {source.offset} of the tar, "
                    f"at most {_MAX_EXTENDED_HEADER_BYTES} are accepted"
                )
            content = source.content(info.size, "an extended header")
            if info.type == tarfile.XHDTYPE:
                extended |= _pax_records(content)
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = content.rstrip(b"\0").decode("utf-8", "replace")
            continue
        name = extended.get("path", info.name)
        size = _size(extended, info, name)
        is_regular = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) and _SPARSE not in extended
        extended = {}
        if info.isdir():
            source.skip(size, name)
            continue
        if not is_regular:
            raise BadUpload(
                f"member {name!r} is a link, a device or another special file; only regular files are read", member=name
            )
        stem, _, extension = name.rpartition(".")
        extension = extension.lower()
        is_image = extension in IMAGE_EXTENSIONS
        if not is_image and extension != "cls":
            source.skip(size, name)
            continue
        limit = max_member_bytes if is_image else _MAX_CLASS_BYTES
        if size > limit:
            raise TooLarge(
                f"member {name!r} has {size} bytes, at most {limit} are accepted",
                member=name,
                member_bytes=size,
                limit_bytes=limit,
            )
        offset = source.offset
        yield _Half(stem, name, is_image, source.content(size, name), offset)


def _size(extended: dict[str, str], info: tarfile.TarInfo, name: str) -> int:
    text = extended.get("size")
    if text is None:
        size = info.size
    elif text.isascii() and text.isdigit():
        size = int(text[:20])
    else:
        raise BadUpload(f"member {name!r} declares the size {text[:24]!r}", member=name)
    if size < 0:
        raise BadUpload(f"member {name!r} declares a size of {size} bytes", member=name)
    return size


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


class _Source:
    """A tar stream read forward, which knows where it is and which member it read last."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._last = ""
        self.offset = 0

    def header(self) -> tarfile.TarInfo | None:
        """The next header, None at the end of the archive."""
        block = self._exactly(BLOCK, "a header")
        if not block.strip(b"\0"):
            self._end()
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except (tarfile.HeaderError, ValueError) as error:
            if self.offset == BLOCK:
                kind = "gzip-compressed: send it uncompressed" if block[:2] == b"\x1f\x8b" else "no tar stream"
                raise BadUpload(f"the body is {kind} (no tar header in its first {BLOCK} bytes)") from error
            raise BadUpload(
                f"damaged tar: no valid header at byte {self.offset - BLOCK}{self._after()}",
                offset=self.offset - BLOCK,
            ) from error

    def content(self, size: int, name: str) -> bytes:
        """The `size` bytes of the member whose header came last; its padding is passed over."""
        content = self._exactly(size, repr(name))
        self._exactly(-size % BLOCK, repr(name))
        self._last = name
        return content

    def skip(self, size: int, name: str) -> None:
        left = size + -size % BLOCK
        while left:
            left -= len(self._exactly(min(left, _CHUNK_BYTES), repr(name)))
        self._last = name

    def _end(self) -> None:
        """One block of zeros was read: there is a second, and after it nothing but zeros."""
        if self._exactly(BLOCK, "the end").strip(b"\0"):
            raise BadUpload(f"damaged tar: a single block of zeros at byte {self.offset - 2 * BLOCK}{self._after()}")
        while chunk := self._stream.read(_CHUNK_BYTES):
            if chunk.strip(b"\0"):
                raise BadUpload(
                    f"there are more bytes after the end of the tar at byte {self.offset}; "
                    "join archives with `tar --concatenate` or upload them one by one"
                )
            self.offset += len(chunk)

    def _after(self) -> str:
        return f", after member {self._last!r}" if self._last else ""

    def _exactly(self, size: int, what: str) -> bytes:
        if not size:
            return b""
        content = self._stream.read(size)
        if len(content) != size:
            content = self._rest(content, size, what)
        self.offset += size
        return content

    def _rest(self, content: bytes, size: int, what: str) -> bytes:
        """Pipes and sockets may answer with less than was asked for; only an empty answer is the end."""
        parts = [content]
        received = len(content)
        while received < size:
            part = self._stream.read(size - received) if parts[-1] else b""
            if not part:
                end = self.offset + received
                raise BadUpload(
                    f"the tar ends at byte {end}, inside {what}{self._after()}: {size - received} bytes are missing; "
                    "the upload was cut short, send it again",
                    offset=end,
                )
            parts.append(part)
            received += len(part)
        return b"".join(parts)


def write(images_NHWC: UInt8Array, class_ids: npt.ArrayLike, *, start: int = 0) -> Iterator[bytes]:
    """Yield a tar stream of arrays in chunks of about 1 MiB: PPM or PGM members, so that nothing is encoded.

    Keys are the images' numbers, counted from `start`. Class ids are integers; strings are names.

    Raises:
        ValueError: as `labelled`.
    """
    images_NHWC, class_ids_N, names = labelled(images_NHWC, class_ids)
    layout = _Layout(images_NHWC.shape[1:], class_ids_N, names)
    count = len(images_NHWC)
    step = max(1, _CHUNK_BYTES // layout.pair_bytes)
    for first in range(0, count, step):
        rows = slice(first, min(count, first + step))
        yield layout.pairs(images_NHWC[rows], rows, start)
    yield END


def labelled(
    images_NHWC: UInt8Array, class_ids: npt.ArrayLike
) -> tuple[UInt8Array, npt.NDArray[np.int64], tuple[str, ...] | None]:
    """Images [N, H, W, C] and an int64 for each: its class id and None, or its place in the names that follow.

    Raises:
        ValueError: not uint8 `[N, H, W, C]` or `[N, H, W]`, C not 1 or 3, counts that differ, a class id out of range,
            a string that is no name of a class.
    """
    images_NHWC = np.asarray(images_NHWC)
    if images_NHWC.ndim == 3:
        images_NHWC = images_NHWC[..., None]
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] not in (1, 3):
        raise ValueError(
            "images must be uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W], "
            f"got {images_NHWC.dtype} {list(images_NHWC.shape)}"
        )
    ids = np.asarray(class_ids)
    if ids.dtype == object and all(isinstance(name, str) for name in ids.flat):
        ids = ids.astype(str)
    is_named = ids.dtype.kind == "U"
    if ids.shape != (len(images_NHWC),) or (ids.size and not is_named and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(
            f"{len(images_NHWC)} images need as many integer class ids or names, got {ids.dtype} {list(ids.shape)}"
        )
    if is_named:
        # Texts that differ may be one name: places of texts become places of names.
        texts, places = np.unique(ids, return_inverse=True)
        spelled = [class_name(text) for text in texts.tolist()]
        names = tuple(sorted({*spelled}))
        return images_NHWC, np.array([names.index(name) for name in spelled], np.int64)[places], names
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= MAX_CLASS_ID:
        raise ValueError(f"class ids must be 0 to {MAX_CLASS_ID}, got {int(ids.min())} to {int(ids.max())}")
    return images_NHWC, ids.astype(np.int64), None


_KEY_DIGITS: Final = 10
# Where a ustar header keeps its checksum: six octal digits, a zero byte, a space.
_CHECKSUM: Final = slice(148, 154)


class _Layout:
    """The bytes of one pair, made once; for each image only key, checksums and pixels are filled in.

    `tarfile` needs 20 us per member for the same bytes, this about 2 us per pair.
    """

    def __init__(
        self, shape: tuple[int, ...], class_ids_N: npt.NDArray[np.int64], names: tuple[str, ...] | None = None
    ) -> None:
        height, width, channels = shape
        extension, magic = ("pgm", "P5") if channels == 1 else ("ppm", "P6")
        header = f"{magic}\n{width} {height}\n255\n".encode()
        self._pixels = slice(BLOCK + len(header), BLOCK + len(header) + height * width * channels)
        blank = "0" * _KEY_DIGITS
        image = entry(f"{blank}.{extension}", header + bytes(height * width * channels))
        self._label = len(image)
        distinct, self._template_N = np.unique(class_ids_N, return_inverse=True)
        texts = [(str(c) if names is None else names[c]).encode() for c in distinct.tolist()]
        longest = max(map(len, texts), default=0)
        # All pairs are of one size: where a name needs more than one block, spaces fill up the others.
        filled = [text.ljust(longest) if longest > BLOCK else text for text in texts]
        self._templates = np.stack(
            [np.frombuffer(image + entry(f"{blank}.cls", text), np.uint8) for text in filled]
            or [np.zeros(len(image) + 2 * BLOCK, np.uint8)]
        )
        self.pair_bytes = self._templates.shape[1]

    def pairs(self, images_NHWC: UInt8Array, rows: slice, start: int) -> bytes:
        count = len(images_NHWC)
        out = self._templates[self._template_N[rows]]
        out[:, self._pixels] = images_NHWC.reshape(count, -1)
        keys = np.arange(start + rows.start, start + rows.stop, dtype=np.int64)
        digits = _decimal_digits(keys)
        grown = digits.sum(axis=1, dtype=np.int64)
        digits += ord("0")
        for header in (0, self._label):
            out[:, header : header + _KEY_DIGITS] = digits
            field = out[:, header + _CHECKSUM.start : header + _CHECKSUM.stop]
            field[:] = _octal_digits(_from_octal(field) + grown) + np.uint8(ord("0"))
        return out.tobytes()


def _decimal_digits(keys_N: npt.NDArray[np.int64]) -> UInt8Array:
    powers = 10 ** np.arange(_KEY_DIGITS - 1, -1, -1, dtype=np.int64)
    return (keys_N[:, None] // powers % 10).astype(np.uint8)


def _from_octal(digits: UInt8Array) -> npt.NDArray[np.int64]:
    return (digits.astype(np.int64) - ord("0")) @ (8 ** np.arange(5, -1, -1, dtype=np.int64))


def _octal_digits(values_N: npt.NDArray[np.int64]) -> UInt8Array:
    return (values_N[:, None] >> np.arange(15, -1, -3) & 7).astype(np.uint8)


def write_encoded(files: Iterable[tuple[str, bytes, int | str]]) -> Iterator[bytes]:
    """Yield a tar stream of already encoded images given as (extension, bytes, class id or name).

    Raises:
        ValueError: an extension that `read` would pass over.
    """
    parts: list[bytes] = []
    size = 0
    for number, (extension, content, class_id) in enumerate(files):
        if extension.lower() not in IMAGE_EXTENSIONS:
            raise ValueError(f"extension {extension!r} is not one of {', '.join(IMAGE_EXTENSIONS)}")
        key = f"{number:0{_KEY_DIGITS}d}"
        parts += entry(f"{key}.{extension}", content), entry(f"{key}.cls", str(class_id).encode())
        size += len(content) + 4 * BLOCK
        if size >= _CHUNK_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join([*parts, END])


def entry(name: str, content: bytes) -> bytes:
    """One member of a tar stream: header, content and padding. A stream of them is closed with `END`."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    header = info.tobuf(tarfile.USTAR_FORMAT if len(name) <= 100 else tarfile.PAX_FORMAT)
    return header + content + bytes(-len(content) % BLOCK)


def decode_image(data: bytes, *, max_pixels: int, min_side: int, max_side: int = MAX_SIDE) -> UInt8Array:
    """The pixels of an encoded image, uint8 `[H, W, 3]` or `[H, W, 1]`; its declared size is checked before decoding.

    Black-and-white becomes grey, a palette becomes RGB, an alpha channel is dropped if it is opaque everywhere. An
    EXIF orientation is not applied (as in torchvision's and datasets' loaders).

    Raises:
        BadUpload: not a PPM, PGM, PNG, JPEG or WebP image, damaged, CMYK, 16 bit, animated, transparent, too small.
        TooLarge: more than `max_pixels`, or a side above `max_side`.
    """
    if data[:2] in (b"P5", b"P6"):
        return _decode_portable(data, max_pixels, min_side, max_side)
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10":
        # Pillow would cut 16-bit RGB down to 8 bits without a word.
        raise BadUpload("a PNG image with 16 bits per channel; images need 8 bits per channel")
    try:
        # Pillow warns of oddities that the checks here decide on (a broken animation, a large picture).
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            _check_size(image.width, image.height, max_pixels, min_side, max_side)
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                raise BadUpload(f"an animated image with {frames} frames; send each as an image of its own")
            return _eight_bit(image)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"{error}") from error
    except _PILLOW_ERRORS as error:
        raise BadUpload(f"not a readable PNG, JPEG, WebP, PPM or PGM image: {error}") from error


_PILLOW_FORMATS: Final = ("PNG", "JPEG", "WEBP")
# What Pillow's plugins raise for damaged files, found by cutting and flipping bytes.
_PILLOW_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
)


def _check_size(width: int, height: int, max_pixels: int, min_side: int, max_side: int) -> None:
    if width * height > max_pixels or max(width, height) > max_side:
        raise TooLarge(
            f"an image of {width} x {height} pixels; at most {max_pixels} pixels and {max_side} a side are accepted",
            width=width,
            height=height,
            max_pixels=max_pixels,
            max_side=max_side,
        )
    if min(width, height) < min_side:
        raise BadUpload(
            f"an image of {width} x {height} pixels; each side needs at least {min_side}", width=width, height=height
        )


def _decode_portable(data: bytes, max_pixels: int, min_side: int, max_side: int) -> UInt8Array:
    match = _PORTABLE_HEADER.match(data)
    if match is None:
        raise BadUpload("a PPM or PGM image with a damaged header")
    kind, width, height, maximum = (int(group) for group in match.groups())
    if maximum != 255:
        raise BadUpload(f"a PPM or PGM image with a maximum of {maximum}; images need 8 bits per channel (255)")
    _check_size(width, height, max_pixels, min_side, max_side)
    channels = 3 if kind == 6 else 1
    expected, found = height * width * channels, len(data) - match.end()
    if found != expected:
        raise BadUpload(f"a PPM or PGM image of {width} x {height} needs {expected} bytes of pixels, it has {found}")
    return np.frombuffer(data, np.uint8, expected, match.end()).reshape(height, width, channels)


def _eight_bit(image: Image.Image) -> UInt8Array:
    opened: Image.Image = image
    if image.mode == "P" or image.has_transparency_data:
        opened = image.convert("RGBA")
        if int(np.asarray(opened)[..., 3].min()) != 255:
            raise BadUpload("an image with transparent pixels; put it on a background first")
        opened = opened.convert("L" if image.mode == "LA" else "RGB")
    elif image.mode == "1":
        opened = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        raise BadUpload(f"an image of mode {image.mode} (CMYK, 16 bit, ...); images must be 8-bit RGB or grey")
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = np.asarray(opened)
    return pixels if pixels.ndim == 3 else pixels[..., None]
