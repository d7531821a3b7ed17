"""Fill a memory while a method learns: what is kept is decided here, example by example, and sent in batches.

`Reservoir` keeps a uniform sample of all that was offered, `Ring` the last images of each task. Each has slots, and
says into which slot an example goes. An `OnlineWriter` remembers the key of the exemplar in every slot; what it
replaces is dropped from the memory by that key, in the change in which the new exemplars come. A memory may keep fewer
than it is given, where a share cannot hold them: those slots are free afterwards.

Images are uint8 `[N, H, W, C]`. Keys are texts, each offered once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engram_trainer.examples import ClassIds, Images
from engram_trainer.memory import KeptBy, Memory

Slot = tuple[int, int]
"""Task and number: the task is 0 where slots belong to no task."""


class Policy(Protocol):
    """Decides which examples are kept."""

    kept_by: ClassVar[KeptBy]
    """What a memory drops first if it cannot hold them all."""
    slots: int | None
    """How many exemplars are kept in all; None until that is known."""

    def place(self, task: int, count: int) -> list[Slot | None]:
        """The slot of each of the next `count` examples, None where one is not kept."""

    def state_dict(self) -> dict[str, Any]:
        """How far it is."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class Reservoir:
    """A uniform sample of everything that was offered.

    Args:
        slots: how many examples are kept; None until a writer asks the memory's budget.
        seed: of the draws, which depend on it and on how many examples were offered before.

    Source: Vitter, Random sampling with a reservoir (ACM TOMS 1985), algorithm R: the example that comes after n others
    takes the place j, drawn from 0..n inclusive, if j is a slot. (A-GEM's code draws from 0..n-1.)
    """

    kept_by: ClassVar[KeptBy] = "reservoir"

    def __init__(self, slots: int | None, *, seed: int) -> None:
        self.slots, self.seed = _checked(slots), seed
        self.offered = 0

    def place(self, task: int, count: int) -> list[Slot | None]:
        """The slot of each of the next `count` examples."""
        assert self.slots is not None, "a writer has asked for the slots"
        words = np.random.Philox(key=np.array([self.seed, self.offered], np.uint64))
        before_N = self.offered + np.arange(count)
        drawn_N = np.random.Generator(words).integers(0, before_N, endpoint=True)
        self.offered += count
        slots_N = np.where(before_N < self.slots, before_N, drawn_N)
        return [(0, slot) if slot < self.slots else None for slot in slots_N.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """How many examples were offered, and how many are kept."""
        return {"offered": self.offered, "slots": self.slots}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.offered, self.slots = state["offered"], state["slots"]


class Ring:
    """The last examples of each task, of all tasks equally many.

    Args:
        slots: how many examples are kept in all; None until a writer asks the memory's budget.
        tasks: how many distinct tasks the stream has.

    Source: Lopez-Paz & Ranzato, GEM (NIPS 2017), section 3: the last m = M / T examples of each task. Departure: every
    task has a pointer of its own and loses no example where it wraps; the reference code has one pointer for all tasks,
    and what of a batch does not fit before the end is dropped.
    """

    kept_by: ClassVar[KeptBy] = "ring"

    def __init__(self, slots: int | None, *, tasks: int) -> None:
        self.slots, self.tasks = _checked(slots), tasks
        self._next: dict[int, int] = {}

    def place(self, task: int, count: int) -> list[Slot | None]:
        """The slot of each of the next `count` examples of this task."""
        assert self.slots is not None, "a writer has asked for the slots"
        each, first = max(1, self.slots // self.tasks), self._next.get(task, 0)
        self._next[task] = (first + count) % each
        return [(task, number % each) for number in range(first, first + count)]

    def state_dict(self) -> dict[str, Any]:
        """Where each task's pointer is."""
        return {"next": dict(self._next), "slots": self.slots}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._next, self.slots = dict(state["next"]), state["slots"]


@dataclass(frozen=True, eq=False)
class _Accepted:
    """An example that is not in the memory yet."""

    task: int
    image: Images
    class_id: int
    fields: Mapping[str, npt.NDArray[Any]]


class OnlineWriter:
    """Keeps a memory filled with what its policy accepts.

    Args:
        memory: its exemplars have keys.
        policy: which examples are kept.
        flush: accepted examples are sent as soon as there are so many.

    Raises:
        ValueError: `flush` is below 1.
    """

    def __init__(self, memory: Memory, policy: Policy, *, flush: int) -> None:
        if flush < 1:
            raise ValueError(f"flush must be at least 1, not {flush}")
        self.memory, self.policy, self._flush = memory, policy, flush
        self._held: dict[Slot, str] = {}
        """The key in each slot that is not free, sent or not."""
        self._keys: set[str] = set()
        """The same keys."""
        self._waiting: dict[str, _Accepted] = {}
        """What is to be sent, by key, in order."""
        self._replaced: dict[str, None] = {}
        """Keys in the memory whose slots have been given away, in order."""

    def offer(
        self,
        task: int,
        images_NHWC: Images,
        class_ids: ClassIds,
        keys: Sequence[str],
        fields: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        """Examples of one task that the method has just seen, in order, each with a key that was never offered before.

        Raises:
            ValueError: the memory has a budget that is no number of slots, or a key was offered before.
        """
        if self.policy.slots is None:
            self.policy.slots = self.memory.slots(images_NHWC, np.asarray(class_ids), fields)
        for number, slot in enumerate(self.policy.place(task, len(images_NHWC))):
            if slot is None:
                continue
            key = keys[number]
            if key in self._keys:
                raise ValueError(f"an example with the key {key!r} is kept already; keys must be new")
            self._replace(slot)
            self._held[slot] = key
            self._keys.add(key)
            columns = {name: np.array(column[number]) for name, column in fields.items()}
            self._waiting[key] = _Accepted(task, np.array(images_NHWC[number]), int(class_ids[number]), columns)
        if len(self._waiting) >= self._flush:
            self.flush()

    def flush(self) -> None:
        """The memory holds all that was accepted, as far as its shares reach.

        Raises:
            EngramError: the memory cannot take it.
        """
        if not self._waiting and not self._replaced:
            return
        by_task: dict[int, list[str]] = {}
        for key, accepted in self._waiting.items():
            by_task.setdefault(accepted.task, []).append(key)
        drop = [*self._replaced]
        for task, keys in by_task.items():
            found = [self._waiting[key] for key in keys]
            self.memory.exchange(
                task,
                np.stack([each.image for each in found]),
                np.array([each.class_id for each in found], np.int64),
                fields={name: np.stack([each.fields[name] for each in found]) for name in found[0].fields},
                keys=keys,
                drop=drop,
                kept_by=self.policy.kept_by,
            )
            drop = []
        self._waiting, self._replaced = {}, {}
        self._hold(self.memory.keys())

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what is kept from here on, what was not sent yet included."""
        return {
            "policy": self.policy.state_dict(),
            "held": [[*slot, key] for slot, key in self._held.items()],
            "replaced": [*self._replaced],
            "waiting": [
                {
                    "key": key,
                    "task": each.task,
                    "class_id": each.class_id,
                    "image": torch.from_numpy(each.image),
                    "fields": {name: torch.from_numpy(value) for name, value in each.fields.items()},
                }
                for key, each in self._waiting.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the memory must be as it was then."""
        self.policy.load_state_dict(state["policy"])
        self._held = {(task, number): key for task, number, key in state["held"]}
        self._keys = {*self._held.values()}
        self._replaced = dict.fromkeys(state["replaced"])
        self._waiting = {
            each["key"]: _Accepted(
                each["task"],
                each["image"].numpy(),
                each["class_id"],
                {name: value.numpy() for name, value in each["fields"].items()},
            )
            for each in state["waiting"]
        }

    def _hold(self, keys: set[str]) -> None:
        """Slots whose exemplars are not among these are free."""
        self._held = {slot: key for slot, key in self._held.items() if key in keys}
        self._keys = {*self._held.values()}

    def _replace(self, slot: Slot) -> None:
        """The slot is free: its exemplar will be dropped, or is not sent at all."""
        key = self._held.pop(slot, None)
        if key is None:
            return
        self._keys.discard(key)
        if self._waiting.pop(key, None) is None:
            self._replaced[key] = None


def _checked(slots: int | None) -> int | None:
    if slots is not None and slots < 1:
        raise ValueError(f"slots must be at least 1, not {slots}")
    return slots
