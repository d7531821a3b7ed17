"""Decodes the images of uploads, whose size is known from their headers before anything is decoded.

PPM, PGM, PNG, JPEG and WebP become uint8 `[H, W, C]`, RGB or grey (C is 3 or 1). A header is short, and claims are
checked before they cost anything: pixels, sides, and how often a JPEG goes over its coefficients.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from engram.errors import BadUpload, TooLarge

UInt8Array = npt.NDArray[np.uint8]

IMAGE_EXTENSIONS: Final = ("ppm", "pgm", "png", "jpg", "jpeg", "webp")
MAX_SIDE: Final = 16_384

# Three numbers take 30 bytes; the rest is room for comments.
_MAX_PORTABLE_HEADER_BYTES: Final = 4096
# Possessive: a pattern that could give blanks back keeps a state for each of them.
_PORTABLE_HEADER = re.compile(
    rb"P([56])(?:\s|#[^\n]*+\n)++(\d{1,9}+)(?:\s|#[^\n]*+\n)++(\d{1,9}+)(?:\s|#[^\n]*+\n)++(\d{1,6}+)\s"
)

_START_OF_SCAN: Final = b"\xff\xda"
# Encoders make some ten. Each is a pass over all coefficients and can be had for 30 bytes, so that a member of 64 MiB
# could keep a decoder busy for hours.
_MAX_SCANS: Final = 100


def decode(data: bytes, *, max_pixels: int, min_side: int, max_side: int = MAX_SIDE) -> UInt8Array:
    """The pixels of an encoded image, uint8 `[H, W, 3]` or `[H, W, 1]`; its declared size is checked before decoding.

    Black-and-white becomes grey, a palette becomes RGB, an alpha channel is dropped if it is opaque everywhere. An
    EXIF orientation is not applied (as in torchvision's and datasets' loaders).

    Raises:
        BadUpload: not a PPM, PGM, PNG, JPEG or WebP image, damaged, CMYK, 16 bit, animated, transparent, too small.
        TooLarge: more than `max_pixels`, or a side above `max_side`, or a JPEG of too many scans.
    """
    if data[:2] in (b"P5", b"P6"):
        kind, width, height, start = _portable_header(data)
        _check_size(width, height, max_pixels, min_side, max_side)
        return _portable_pixels(data, start, (height, width, 3 if kind == 6 else 1))
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10":
        # Pillow would cut 16-bit RGB down to 8 bits without a word.
        raise BadUpload("a PNG image with 16 bits per channel; images need 8 bits per channel")
    if data[:2] == b"\xff\xd8" and data.count(_START_OF_SCAN) > _MAX_SCANS:
        raise TooLarge(
            f"a JPEG image of {data.count(_START_OF_SCAN)} scans; at most {_MAX_SCANS} are accepted",
            max_scans=_MAX_SCANS,
        )
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


def _portable_header(data: bytes) -> tuple[int, int, int, int]:
    """5 or 6, width, height and where the pixels begin."""
    match = _PORTABLE_HEADER.match(data, 0, _MAX_PORTABLE_HEADER_BYTES)
    if match is None:
        raise BadUpload(
            f"a PPM or PGM image with a damaged header (in its first {_MAX_PORTABLE_HEADER_BYTES} bytes there must be "
            "width, height and 255)"
        )
    kind, width, height, maximum = (int(group) for group in match.groups())
    if maximum != 255:
        raise BadUpload(f"a PPM or PGM image with a maximum of {maximum}; images need 8 bits per channel (255)")
    return kind, width, height, match.end()


def _portable_pixels(data: bytes, start: int, shape: tuple[int, int, int]) -> UInt8Array:
    height, width, channels = shape
    expected, found = height * width * channels, len(data) - start
    if found != expected:
        raise BadUpload(f"a PPM or PGM image of {width} x {height} needs {expected} bytes of pixels, it has {found}")
    return np.frombuffer(data, np.uint8, expected, start).reshape(shape)


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
