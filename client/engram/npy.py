"""Arrays as files of numpy (`.npy`), without pickles and with headers that are read once.

    93 "NUMPY" major:1 minor:1  header_bytes:2 (version 1, little-endian) or 4 (version 2)  header  values

The header is the text of a Python dict: dtype, order and shape. Numbers, bools and texts are read; arrays of objects
are pickles, which are programs, and structured ones have no meaning here.
"""

from __future__ import annotations

import io
import tokenize
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from engram.errors import BadUpload

# What `numpy.save` writes takes 128 bytes; parsing a long text as Python takes memory and time.
_MAX_HEADER_BYTES = 4096
_MAX_DIMENSIONS = 16
# numpy takes a header that is no Python for one of Python 2, whose tokens it goes through.
_HEADER_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    RecursionError,
    MemoryError,
    EOFError,
    OSError,
    tokenize.TokenError,
)


def read(content: bytes) -> npt.NDArray[Any]:
    """The array of a whole file, a view of it.

    Raises:
        BadUpload: it is no such file, or not of the length that its header says.
    """
    is_wide = content[6:7] > b"\x01"
    start = 12 + int.from_bytes(content[8:12], "little") if is_wide else 10 + int.from_bytes(content[8:10], "little")
    try:
        dtype, shape, is_fortran = _read_header(content[: min(start, _MAX_HEADER_BYTES)])
    except _HEADER_ERRORS as error:
        raise BadUpload(f"no array of numpy: {error}") from error
    expected, found = dtype.itemsize * prod(shape), len(content) - start
    if dtype.kind not in "biufU" or dtype.itemsize == 0 or len(shape) > _MAX_DIMENSIONS:
        raise BadUpload(f"declared as an array of {dtype} {list(shape)[:_MAX_DIMENSIONS]}, not of numbers or texts")
    if expected != found:
        raise BadUpload(f"declared as an array of {expected} bytes, {found} are there")
    try:
        values = np.frombuffer(content, dtype, offset=start) if expected else np.empty(0, dtype)
        return values.reshape(shape, order="F" if is_fortran else "C")
    except ValueError as error:
        raise BadUpload(f"declared as an array of an impossible shape: {error}") from error


@lru_cache(maxsize=256)
def header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What precedes the values of an array in C order; `dtype` is `array.dtype.str`."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@lru_cache(maxsize=256)
def _read_header(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """Dtype, shape and order. The images of an upload have few different ones, and parsing takes 30 us."""
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version}")
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = parse(stream, _MAX_HEADER_BYTES)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {shape}")
    return dtype, shape, is_fortran
