"""Amounts of bytes and of time as people write them: 500000, 1.5MB, 64KiB, 1TB; 90s, 12h, 30d."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, ByteSize, TypeAdapter

# ByteSize alone reads no further than it understands: it takes 1,000 for one byte. Of numbers without end it says
# something else.
_AMOUNT = re.compile(r"\s*([0-9]{1,25}(?:\.[0-9]{1,25})?)\s*([kmgtpe]i?)?b?\s*", re.IGNORECASE)
_BYTE_SIZE = TypeAdapter(ByteSize)


def parse(text: str) -> int:
    """How many bytes a text stands for; MB are millions, MiB are 2**20.

    Raises:
        ValueError: it is no amount.
    """
    if _AMOUNT.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not an amount of bytes like 500000, 1.5MB, 64KiB or 1TB")
    return int(_BYTE_SIZE.validate_python(text))


_DURATION = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smhdw])\s*")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_s(text: str) -> float:
    """How many seconds a text stands for.

    Raises:
        ValueError: it is no time.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a time like 90s, 15m, 12h, 30d or 4w")
    return float(match[1]) * _SECONDS[match[2]]


Bytes = Annotated[int, BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)]
"""An integer that may be given as such a text."""
