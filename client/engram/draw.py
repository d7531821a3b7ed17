"""This file is the draw: which exemplars a replay request returns, a pure function of manifest and request.

The same manifest and the same (strategy, filters, size, seed, step, rank, world size) give the same rows on every
machine, in the service and in a `Mirror` alike. Randomness is Philox 4x64 (Salmon et al., SC 2011), a counter-based
generator, keyed by seed and step. Only its raw 64-bit words are used: numpy promises those to stay the same between
versions, and does not promise it of `Generator`'s methods.

One global batch of `size * world_size` exemplars is drawn, and each rank takes its own slice of it, so ranks are
disjoint whenever the global batch fits the memory. No exemplar is repeated within a batch before every other of its
group has been used.

    uniform          every exemplar alike
    class_balanced   equal numbers of each class (the remainder goes to classes chosen at random)
    task_balanced    equal numbers of each task
    per_task         `size` exemplars of each task (GEM needs one gradient per task)
    epoch            a seeded permutation of all exemplars cut into steps; step counts on through the epochs, each newly
                     permuted; the last batch of an epoch may be smaller (LUCIR walks all exemplars)

Cost is O(packs + size): nothing grows with the number of exemplars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from engram.errors import Conflict, InvalidRequest, NotFound
from engram.schemas import PackEntry, Strategy

IntArray = npt.NDArray[np.int64]
WordArray = npt.NDArray[np.uint64]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
_EPOCH_KEY = 2**63  # keeps the keys of epochs apart from those of steps
_ROUNDS = 4  # of the Feistel network; Luby and Rackoff (1988): four rounds of random functions are a strong permutation


@dataclass(frozen=True)
class Request:
    """What is asked for. `size` is the batch of one rank (of one task for `per_task`); seed and step are 0..2**63-1.

    Raises:
        InvalidRequest: a number is out of range or the strategy unknown.
    """

    size: int
    seed: int = 0
    step: int = 0
    strategy: Strategy = "uniform"
    tasks: tuple[int, ...] | None = None
    exclude_tasks: tuple[int, ...] = ()
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise InvalidRequest(f"strategy {self.strategy!r} is not one of {', '.join(STRATEGIES)}")
        if self.size < 1:
            raise InvalidRequest(f"size must be at least 1, got {self.size}")
        for name in ("seed", "step"):
            if not 0 <= getattr(self, name) < 2**63:
                raise InvalidRequest(f"{name} must lie in 0..2**63-1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise InvalidRequest(f"rank must lie in 0..world_size-1, got rank {self.rank} of {self.world_size}")


class Groups(NamedTuple):
    """Runs of rows gathered into groups: group g is the runs firsts[g]..firsts[g+1]-1, in order.

    `starts` are global rows, `offsets` count the group's exemplars before each run, `sizes` those of each group.
    """

    starts: IntArray
    offsets: IntArray
    firsts: IntArray
    sizes: IntArray


class Layout:
    """The index of one generation that draws are planned on: a run for each class of each pack.

    Global rows number the exemplars of all packs in manifest order.
    """

    def __init__(self, packs: Sequence[PackEntry]) -> None:
        self.pack_starts: IntArray = np.cumsum([0, *(pack.exemplars for pack in packs)])
        self.count = int(self.pack_starts[-1])
        self.tasks = sorted({pack.task for pack in packs})
        runs = [(pack.task, class_id, count) for pack in packs for class_id, count in pack.runs]
        self._run_tasks = np.array([task for task, _, _ in runs], np.int64)
        self._run_classes = np.array([class_id for _, class_id, _ in runs], np.int64)
        self._run_counts = np.array([count for _, _, count in runs], np.int64)
        self._run_starts = np.cumsum(self._run_counts) - self._run_counts
        if int(self._run_counts.sum()) != self.count:
            raise ValueError(f"the packs' runs sum to {self._run_counts.sum()} exemplars, the packs to {self.count}")
        self._groups: dict[tuple[str, tuple[int, ...] | None, tuple[int, ...]], Groups] = {}

    def groups(self, by: str, tasks: tuple[int, ...] | None, exclude_tasks: tuple[int, ...]) -> Groups:
        """The groups by "all", "class" or "task" of the tasks that pass the filters; remembered for the next step.

        Raises:
            NotFound: a named task holds no exemplar.
            Conflict: nothing is left to draw from.
        """
        key = (by, tasks, exclude_tasks)
        found = self._groups.get(key)
        if found is None:
            found = self._make_groups(by, tasks, exclude_tasks)
            if len(self._groups) >= 64:
                self._groups.clear()
            self._groups[key] = found
        return found

    def _make_groups(self, by: str, tasks: tuple[int, ...] | None, exclude_tasks: tuple[int, ...]) -> Groups:
        known = set(self.tasks)
        # Excluded tasks need not be known: one may well be the current task, which has nothing stored yet.
        missing = [task for task in tasks or () if task not in known]
        if missing:
            raise NotFound(f"task {missing[0]} holds no exemplars; tasks with exemplars: {self.tasks}")
        chosen = (known if tasks is None else set(tasks)) - set(exclude_tasks)
        runs = np.flatnonzero(np.isin(self._run_tasks, list(chosen)))
        if len(runs) == 0:
            raise Conflict(
                f"no exemplars to draw from: tasks with exemplars {self.tasks}, excluded {list(exclude_tasks)}"
            )
        label = {"all": np.zeros_like(self._run_tasks), "class": self._run_classes, "task": self._run_tasks}[by][runs]
        runs = runs[np.argsort(label, kind="stable")]
        label = np.sort(label, kind="stable")
        firsts = np.flatnonzero(np.concatenate([[True], label[1:] != label[:-1]]))
        counts = self._run_counts[runs]
        sizes = np.add.reduceat(counts, firsts)
        before = np.cumsum(counts) - counts
        bounds = np.append(firsts, len(runs))
        return Groups(self._run_starts[runs], before - np.repeat(before[firsts], np.diff(bounds)), bounds, sizes)


def plan(layout: Layout, request: Request) -> list[tuple[int, IntArray]]:
    """The rows to return, ascending, per pack that has any: (index of the pack in the manifest, rows in that pack).

    Raises:
        NotFound: a task named in `tasks` holds no exemplar.
        Conflict: nothing to draw from.
    """
    by = {"uniform": "all", "epoch": "all", "class_balanced": "class"}.get(request.strategy, "task")
    groups = layout.groups(by, request.tasks, request.exclude_tasks)
    rows = np.sort(_epoch(groups, request) if request.strategy == "epoch" else _sample(groups, request))
    # Rows ascend, so the rows of a pack are those between its two bounds.
    bounds = np.searchsorted(rows, layout.pack_starts).tolist()
    return [
        (pack, rows[first:end] - start)
        for pack, (start, (first, end)) in enumerate(zip(layout.pack_starts.tolist(), pairwise(bounds), strict=False))
        if first < end
    ]


def steps_per_epoch(layout: Layout, request: Request) -> int:
    """How many steps of this request walk every exemplar that it may return once."""
    total = int(layout.groups("all", request.tasks, request.exclude_tasks).sizes[0])
    return -(-total // (request.size * request.world_size))


def _below(words: WordArray, bounds: IntArray) -> IntArray:
    """One integer in 0..bound-1 per word (multiply and shift; the bias is below bound / 2**32)."""
    return ((words >> np.uint64(32)) * bounds.astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def _sample(groups: Groups, request: Request) -> IntArray:
    """Global rows of this rank's part of the batch."""
    words = np.random.Philox(key=np.array([request.seed, request.step], np.uint64))
    count = len(groups.sizes)
    total = request.size * request.world_size
    if request.strategy == "per_task":
        quotas = np.full(count, total, np.int64)
    else:
        share, more = divmod(total, count)
        quotas = np.full(count, share, np.int64)
        if more:
            quotas[np.argsort(words.random_raw(count), kind="stable")[:more]] += 1
    owner = np.repeat(np.arange(count), quotas)
    picks = _distinct(words, groups.sizes, quotas, owner)
    if request.world_size > 1:
        mine = _slice_of_rank(words, owner, quotas, request)
        owner, picks = owner[mine], picks[mine]
    return _rows(groups, owner, picks)


def _slice_of_rank(words: np.random.Philox, owner: IntArray, quotas: IntArray, request: Request) -> IntArray:
    """The positions in the global batch that belong to this rank."""
    if request.strategy == "per_task":
        position = np.arange(len(owner)) - np.repeat(np.cumsum(quotas) - quotas, quotas)
        return np.flatnonzero(position // request.size == request.rank)
    # Dealt out group by group, so that every rank gets its share of every group.
    return np.arange(request.rank, len(owner), request.world_size)


def _distinct(words: np.random.Philox, sizes: IntArray, quotas: IntArray, owner: IntArray) -> IntArray:
    """For each group g, quotas[g] picks in 0..sizes[g]-1, in random order: distinct as far as the group reaches.

    Groups of which less than half is wanted are sampled by rejection, each repeated pick drawn again; the others are
    shuffled whole, which costs at most twice their quota. A quota beyond the group's size takes the whole group as
    often as it fits.
    """
    whole, wanted = quotas // sizes, quotas % sizes
    shuffled = (whole > 0) | (2 * wanted > sizes)
    if not shuffled.any():
        return _rejection(words, sizes, owner)
    picks = np.empty(len(owner), np.int64)
    sparse = ~shuffled[owner]
    if sparse.any():
        picks[sparse] = _rejection(words, sizes, owner[sparse])
    for group in np.flatnonzero(shuffled):
        size, quota = int(sizes[group]), int(quotas[group])
        rounds = -(-quota // size)
        order = np.argsort(words.random_raw(rounds * size).reshape(rounds, size), axis=1, kind="stable")
        picks[owner == group] = order.ravel()[:quota]
    return picks


def _rejection(words: np.random.Philox, sizes: IntArray, owner: IntArray) -> IntArray:
    bounds = sizes[owner]
    picks = _below(words.random_raw(len(owner)), bounds)
    base = (np.cumsum(sizes) - sizes)[owner]
    while True:
        places = np.sort(base + picks)
        if (places[1:] != places[:-1]).all():
            return picks
        _, first = np.unique(base + picks, return_index=True)
        again = np.ones(len(picks), bool)
        again[first] = False
        picks[again] = _below(words.random_raw(int(again.sum())), bounds[again])


def _rows(groups: Groups, owner: IntArray, picks: IntArray) -> IntArray:
    """Global rows of the picks-th exemplars of their groups."""
    # Runs of all groups laid end to end: one sorted axis, searched once.
    ends = np.cumsum(groups.sizes)
    along = picks + (ends - groups.sizes)[owner]
    run_along = groups.offsets + np.repeat(ends - groups.sizes, np.diff(groups.firsts))
    run = np.searchsorted(run_along, along, side="right") - 1
    return groups.starts[run] + along - run_along[run]


def _epoch(groups: Groups, request: Request) -> IntArray:
    total = int(groups.sizes[0])
    batch = request.size * request.world_size
    steps = -(-total // batch)
    epoch, step = divmod(request.step, steps)
    first = step * batch + request.rank * request.size
    positions = np.arange(first, min(first + request.size, total), dtype=np.int64)
    keys = np.random.Philox(key=np.array([request.seed, epoch + _EPOCH_KEY], np.uint64)).random_raw(_ROUNDS)
    picks = _permute(positions, total, keys)
    return _rows(groups, np.zeros(len(picks), np.int64), picks)


def _permute(positions: IntArray, count: int, keys: WordArray) -> IntArray:
    """Where a keyed permutation of 0..count-1 sends these positions, in O(len(positions)).

    A Feistel network on the smallest even number of bits that holds `count`; results beyond it are sent through again
    until they fall inside ("cycle walking", Black and Rogaway, CT-RSA 2002), fewer than four times on average.
    """
    half = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = positions.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= np.uint64(count)]
    return out.astype(np.int64)


def _mix(words: WordArray) -> WordArray:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
