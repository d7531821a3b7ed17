"""Bound the memory of answers: what is large waits for room before it is made, and gives it back when it was sent.

Answers up to `LARGE_BYTES` are free: connections and the kernel bound them. The event loop makes and sends those at
once; a larger one is made by a thread, one at a time, so that small requests find the processor free, and is sent in
slices, so that little of it lies in a connection that nobody reads from.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import Scope

from engram.errors import Unavailable

LARGE_BYTES = 2**20
"""The event loop makes as much in about half a millisecond."""

WAIT_S = 30.0
"""How long a request waits for room: as long as a reader that has stopped may hold it."""

_TAKEN = "engram.taken_bytes"


class Answers:
    """The memory that large answers share. For the event loop's thread only.

    Args:
        max_bytes: of all together; one answer gets room whatever its size when there is no other.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.making = asyncio.Lock()
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, scope: Scope, size: int) -> None:
        """The request has room for an answer of this size; requests get it in turn.

        Raises:
            Unavailable: there was none for `WAIT_S`.
        """
        if self._waiting or not self._has_room(size):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((size, turn))
            try:
                async with asyncio.timeout(WAIT_S):
                    await turn
            except BaseException as error:
                if turn.done() and not turn.cancelled():
                    self.bytes -= size  # its turn came too late
                self._waiting = deque(each for each in self._waiting if each[1] is not turn)
                self._let_in()
                if isinstance(error, TimeoutError):
                    raise self._full(size) from None
                raise
        else:
            self.bytes += size
        scope[_TAKEN] = size

    def take_now(self, scope: Scope, size: int) -> None:
        """As `take`, without waiting."""
        if self._waiting or not self._has_room(size):
            raise self._full(size)
        self.bytes += size
        scope[_TAKEN] = size

    def has_taken(self, scope: Scope) -> bool:
        """True if the request has room already."""
        return _TAKEN in scope

    def give_back(self, scope: Scope) -> None:
        """What the request has taken is there for others."""
        if _TAKEN in scope:
            self.bytes -= scope.pop(_TAKEN)
            self._let_in()

    def _has_room(self, size: int) -> bool:
        return not self.bytes or self.bytes + size <= self.max_bytes

    def _let_in(self) -> None:
        while self._waiting and self._has_room(self._waiting[0][0]):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self.bytes += size
                turn.set_result(None)

    def _full(self, size: int) -> Unavailable:
        return Unavailable(
            f"answers of {self.bytes} bytes are on their way, and this one has {size}; ENGRAM_ANSWER_MEMORY_BYTES "
            f"allows {self.max_bytes}: try again",
            answer_memory_bytes=self.max_bytes,
        )
