"""Bound how often somebody may ask: token buckets in the memory of one process.

Each replica counts for itself: with three of them behind a balancer a client gets three times its rate.
"""

from __future__ import annotations

import time

MAX_KNOWN = 4096
"""Of whom a `Rates` remembers; the one that came first is forgotten for the next one, and begins anew."""


class Rates:
    """A bucket for each key: it holds `burst` requests and gets `per_s` more every second."""

    def __init__(self) -> None:
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, key: str, per_s: float, burst: float) -> float:
        """0.0 if there was a request in the bucket, which is taken; else the seconds until there is one."""
        now, known = time.monotonic(), self._left.get(key)
        if known is None:
            left = burst
            if len(self._left) >= MAX_KNOWN:
                del self._left[next(iter(self._left))]
        else:
            left = min(burst, known[0] + per_s * (now - known[1]))
        if left < 1.0:
            return (1.0 - left) / per_s
        self._left[key] = left - 1.0, now
        return 0.0

    def wait_s(self, key: str, per_s: float, burst: float) -> float:
        """As `take`, without taking."""
        known = self._left.get(key)
        left = burst if known is None else min(burst, known[0] + per_s * (time.monotonic() - known[1]))
        return 0.0 if left >= 1.0 else (1.0 - left) / per_s
