"""What a memory holds: tasks with their exemplars in rank order, at one quality, under a policy. `memory` changes it.

A task's exemplars are asked for only when they are needed: `Task.load` may read a file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from engram import pack, shares
from engram.fields import NO_FIELDS, Schema
from engram.schemas import Decision, Per, ShareBy, Subsampling
from engram.selection.embedding import FloatArray, Shape
from engram.strip import Exemplars, runs_of

ROOMY_QUALITY = 90
"""What is kept while everything fits: encoding again from it costs next to nothing."""


@dataclass(frozen=True)
class Policy:
    """How a memory shares its bytes and finds its quality.

    `roomy_quality` None decides at the first upload, whether something has to go or not.
    """

    budget_bytes: int
    per: Per = "buffer"
    share_by: ShareBy = "class"
    subsampling: Subsampling = "4:2:0"
    quality: int | None = None
    roomy_quality: int | None = ROOMY_QUALITY


@dataclass(frozen=True, eq=False)
class Means:
    """The mean feature of all images seen of each class, under one embedder: what herding goes toward."""

    embedder: str
    of_class: Mapping[int, FloatArray]

    def to_bytes(self) -> bytes:
        """A line of JSON, then float32 [classes, D], little-endian."""
        head = json.dumps({"embedder": self.embedder, "classes": list(self.of_class)}).encode()
        rows = [np.asarray(mean, "<f4").tobytes() for mean in self.of_class.values()]
        return head + b"\n" + b"".join(rows)

    @classmethod
    def from_bytes(cls, data: bytes) -> Means:
        """The inverse of `to_bytes`."""
        head, _, rows = data.partition(b"\n")
        found = json.loads(head)
        means = np.frombuffer(rows, "<f4").reshape(len(found["classes"]), -1)
        return cls(found["embedder"], dict(zip(found["classes"], means, strict=True)))


@dataclass(frozen=True, eq=False)
class Task:
    """What a memory holds of one task.

    Args:
        seen: how many images of each class were ever uploaded; every class here has a share.
        kept: how many exemplars of each class are stored.
        pack_bytes: of the pack that holds them, 0 if there is none.
        load: the exemplars, classes ascending, in rank order within a class; None if there are none.
        decision: what the task's images said about quality.
        means: what herding goes toward when more images come.
    """

    seen: Mapping[int, int]
    kept: Mapping[int, int]
    pack_bytes: int
    load: Callable[[], Exemplars | None] = field(repr=False)
    decision: Decision | None = field(default=None, repr=False)
    means: Means | None = field(default=None, repr=False)

    def holding(self, exemplars: Exemplars | None) -> Task:
        """The same task with these exemplars."""
        if exemplars is None or len(exemplars) == 0:
            return replace(self, kept={}, pack_bytes=0, load=lambda: None)
        runs = runs_of(exemplars.class_ids)
        size = pack.size(exemplars.form, runs, exemplars.sizes)
        return replace(self, kept=dict(runs), pack_bytes=size, load=lambda: exemplars)


NOTHING = Task({}, {}, 0, lambda: None)


@dataclass(frozen=True, eq=False)
class Content:
    """A memory as it stands. `quality` is that of every exemplar, None while there has been none.

    `schema` are the fields that every exemplar has beside its image; they are declared with the memory and stay.
    `class_names` are the names of class ids. `next_class_id` is above every id that was ever seen or named, so that a
    new name never gets the id of a class that was deleted.
    """

    policy: Policy
    tasks: Mapping[int, Task] = field(default_factory=dict)
    quality: int | None = None
    is_provisional: bool = True
    shape: Shape | None = None
    schema: Schema = NO_FIELDS
    class_names: Mapping[int, str] = field(default_factory=dict)
    next_class_id: int = 0

    def classes(self) -> dict[int, list[int]]:
        """The classes each task has ever seen, stored or not: all of them have shares."""
        return {number: sorted(task.seen) for number, task in self.tasks.items()}

    def decisions(self, last: int | None) -> list[Decision]:
        """Those of all tasks in which candidates were measured, that of task `last` at the end."""
        ordered = sorted(self.tasks, key=lambda number: (number == last, number))
        found = [self.tasks[number].decision for number in ordered]
        return [decision for decision in found if decision is not None and decision.candidates]

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing that was ever uploaded has been dropped."""
        return all(Counter(task.kept) == Counter(task.seen) for task in self.tasks.values())

    @property
    def is_roomy(self) -> bool:
        """Whether nothing has had to go yet, so that the quality is still open."""
        policy = self.policy
        if policy.quality is not None or policy.roomy_quality is None or not self.is_provisional:
            return False
        return self.quality in (None, policy.roomy_quality) and self.keeps_everything


def shares_of(policy: Policy, classes_by_task: Mapping[int, list[int]]) -> dict[int, dict[int, int]]:
    """Bytes of each class of each task."""
    leaves = shares.leaves(
        policy.budget_bytes, per=policy.per, share_by=policy.share_by, classes_by_task=classes_by_task
    )
    found: dict[int, dict[int, int]] = {task: {} for task in classes_by_task}
    for (task, class_id), share in leaves.items():
        found[task][class_id] = share
    return found
