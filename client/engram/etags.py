"""The entity tag of a buffer: the number of a generation, a dash, and when the buffer was made, in hexadecimal.

A buffer that is deleted and made anew under its old name counts generations from 0 again, so the number alone would
name two contents. Both sides of the wire can compute the tag: a mirror asks with the one of what it holds.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def of(generation: int, created_at: datetime) -> str:
    """The tag without its quotes, such as `7-64d7be9ec2f40`."""
    return f"{generation}-{(created_at - _EPOCH) // timedelta(microseconds=1):x}"
