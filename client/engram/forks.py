"""After a fork: connections, locks and threads stay with the parent, and the child makes its own.

A forked process has copies of its parent's sockets and locks, but of its threads only the one that forked. Two
processes that read from one socket get each other's answers, and a lock that another thread held is never released.
So whatever holds such things registers here, and is told in the child before anything else runs there.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class HeldByAProcess(Protocol):
    """Holds what a child must not share: sockets, locks, threads."""

    def after_fork(self) -> None:
        """Called in the child, where no other thread is running yet: hold nothing of the parent's any more.

        It may close copies of descriptors, which the parent does not notice, and must take no lock.
        """


_registered: weakref.WeakSet[HeldByAProcess] = weakref.WeakSet()


def register(held: HeldByAProcess) -> None:
    """`held.after_fork` is called in every process that is forked from here, as long as the object lives."""
    _registered.add(held)


def _in_child() -> None:
    for held in list(_registered):
        held.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_in_child)
