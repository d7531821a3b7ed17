"""Amounts of bytes as people write them: 500000, 1.5MB, 64KiB, 1TB."""

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


Bytes = Annotated[int, BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)]
"""An integer that may be given as such a text."""
