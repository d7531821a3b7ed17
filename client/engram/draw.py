"""The draw: which exemplars a replay request returns, a pure function of manifest and request.

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

Cost is O(groups + size): nothing grows with the number of exemplars or packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import index
from reprlib import repr as shortened
from typing import NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

# From here and not as `np.random`, which numpy imports when it is first asked for: that took a first draw 20 ms.
from numpy.random import Philox

from engram.errors import Conflict, InvalidRequest, NotFound
from engram.schemas import Strategy

IntArray = npt.NDArray[np.int64]
WordArray = npt.NDArray[np.uint64]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
_NUMBERS = ("size", "seed", "step", "rank", "world_size")
_EPOCH_KEY = 2**63  # keeps the keys of epochs apart from those of steps
_ROUNDS = 4  # of the Feistel network; Luby and Rackoff (1988): four rounds of random functions are a strong permutation


@dataclass(frozen=True)
class Request:
    """What is asked for. `size` is the batch of one rank (of one task for `per_task`); seed and step are 0..2**63-1.

    Tasks may be given as any sequence of integers, integers as numpy's.

    Raises:
        InvalidRequest: a number is out of range or no integer, the strategy unknown, or tasks are no integers.
    """

    size: int
    seed: int = 0
    step: int = 0
    strategy: Strategy = "uniform"
    tasks: Sequence[int] | None = None
    exclude_tasks: Sequence[int] = ()
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            if type(getattr(self, name)) is not int:
                object.__setattr__(self, name, _integer(name, getattr(self, name)))
        if self.tasks is not None and not _are_integers(self.tasks):
            object.__setattr__(self, "tasks", _integers("tasks", self.tasks))
        if not _are_integers(self.exclude_tasks):
            object.__setattr__(self, "exclude_tasks", _integers("exclude_tasks", self.exclude_tasks))
        if self.strategy not in STRATEGIES:
            raise InvalidRequest(f"strategy {self.strategy!r} is not one of {', '.join(STRATEGIES)}")
        if self.size < 1:
            raise InvalidRequest(f"size must be at least 1, got {self.size}")
        for name in ("seed", "step"):
            if not 0 <= getattr(self, name) < 2**63:
                raise InvalidRequest(f"{name} must lie in 0..2**63-1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise InvalidRequest(f"rank must lie in 0..world_size-1, got rank {self.rank} of {self.world_size}")


def _integer(name: str, number: int) -> int:
    try:
        return index(number)
    except TypeError:
        raise InvalidRequest(f"{name} is an integer, got {shortened(number)}") from None


def _are_integers(tasks: Sequence[int]) -> bool:
    return type(tasks) is tuple and {*map(type, tasks)} <= {int}


def _integers(name: str, tasks: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(map(index, tasks))
    except TypeError:
        raise InvalidRequest(f"{name} are several integers, as in {name}=[0, 2], got {shortened(tasks)}") from None


class Held(Protocol):
    """What a draw must know of a pack; a `PackEntry`, for one."""

    @property
    def task(self) -> int:
        """The task whose exemplars it holds."""

    @property
    def exemplars(self) -> int:
        """How many."""

    @property
    def runs(self) -> Sequence[Sequence[int]]:
        """[class id, count] for each class, in order of rows."""


class Groups(NamedTuple):
    """Groups of exemplars, laid end to end on one axis, each a sequence of runs of rows.

    `sizes` are the groups' exemplars and `begins` where each begins on the axis; `run_begins` are where the runs do,
    ascending, and `run_rows` their first global rows.
    """

    sizes: IntArray
    begins: IntArray
    run_begins: IntArray
    run_rows: IntArray


class Plan(NamedTuple):
    """The exemplars to return, by pack and row ascending; the arrays are aligned by exemplar.

    `packs` are places in the manifest, `rows` count within the pack, `runs` are places in the layout's runs (none if
    the plan is not from a layout).
    """

    packs: IntArray
    rows: IntArray
    tasks: IntArray
    class_ids: IntArray
    runs: IntArray = np.empty(0, np.int64)


class Layout:
    """The index of one generation that draws are planned on: a run for each class of each pack.

    Global rows number the exemplars of all packs in manifest order. `run_tasks`, `run_classes` and `run_counts` say
    what each run holds.
    """

    def __init__(self, packs: Sequence[Held]) -> None:
        self.pack_starts: IntArray = np.cumsum([0, *(pack.exemplars for pack in packs)])
        self.count = int(self.pack_starts[-1])
        self.tasks = sorted({pack.task for pack in packs})
        lengths = [len(pack.runs) for pack in packs]
        numbers = chain.from_iterable(chain.from_iterable(pack.runs) for pack in packs)
        runs = np.fromiter(numbers, np.int64, 2 * sum(lengths)).reshape(-1, 2)
        self._run_packs = np.repeat(np.arange(len(packs)), lengths)
        self.run_tasks = np.repeat(np.array([pack.task for pack in packs], np.int64), lengths)
        self.run_classes, self.run_counts = runs.T.copy()
        self._run_starts = np.cumsum(self.run_counts) - self.run_counts
        if int(self.run_counts.sum()) != self.count:
            raise ValueError(f"the packs' runs sum to {self.run_counts.sum()} exemplars, the packs to {self.count}")
        self._groups: dict[tuple[str, Sequence[int] | None, Sequence[int]], Groups] = {}

    @property
    def bytes(self) -> int:
        """Memory it takes; groups are remembered beside that, up to 64 times as much."""
        return self.pack_starts.nbytes + 5 * self._run_packs.nbytes

    def runs(self, pack: int) -> list[tuple[int, int]]:
        """(class id, count) of each class of the pack at this place in the manifest."""
        first, end = np.searchsorted(self._run_packs, [pack, pack + 1]).tolist()
        return list(zip(self.run_classes[first:end].tolist(), self.run_counts[first:end].tolist(), strict=True))

    def stretches(self, task: int | None, class_id: int | None, first: int = 0) -> tuple[IntArray, IntArray]:
        """Global rows of a task or a class or both, from row `first` on: where each run begins, and how many it has."""
        begins = np.maximum(self._run_starts, first)
        counts = self._run_starts + self.run_counts - begins
        is_wanted = counts > 0
        if task is not None:
            is_wanted &= self.run_tasks == task
        if class_id is not None:
            is_wanted &= self.run_classes == class_id
        return begins[is_wanted], counts[is_wanted]

    def after(self, task: int, class_id: int, rank: int) -> int:
        """The first global row that comes after this place in the order of tasks, classes and ranks."""
        first, end = np.searchsorted(self.run_tasks, [task, task + 1]).tolist()
        run = first + int(np.searchsorted(self.run_classes[first:end], class_id))
        if run == len(self._run_starts):
            return self.count
        is_there = run < end and int(self.run_classes[run]) == class_id
        return int(self._run_starts[run]) + (min(rank + 1, int(self.run_counts[run])) if is_there else 0)

    def ranks(self, rows: IntArray) -> IntArray:
        """The places of these global rows in their classes, from 0."""
        return rows - self._run_starts[np.searchsorted(self._run_starts, rows, side="right") - 1]

    def groups(self, by: str, tasks: Sequence[int] | None, exclude_tasks: Sequence[int]) -> Groups:
        """The groups by "all", "class" or "task" of the tasks that pass the filters; remembered for the next step.

        The filters are those of a `Request`, which are tuples.

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

    def locate(self, rows: IntArray) -> Plan:
        """Where these global rows, ascending, are."""
        runs = np.searchsorted(self._run_starts, rows, side="right") - 1
        packs = self._run_packs[runs]
        return Plan(packs, rows - self.pack_starts[packs], self.run_tasks[runs], self.run_classes[runs], runs)

    def _make_groups(self, by: str, tasks: Sequence[int] | None, exclude_tasks: Sequence[int]) -> Groups:
        known = set(self.tasks)
        # Excluded tasks need not be known: one may well be the current task, which has nothing stored yet.
        missing = [task for task in tasks or () if task not in known]
        if missing:
            raise NotFound(f"task {missing[0]} holds no exemplars; tasks with exemplars: {self.tasks}")
        chosen = (known if tasks is None else set(tasks)) - set(exclude_tasks)
        runs = np.flatnonzero(np.isin(self.run_tasks, list(chosen)))
        if len(runs) == 0:
            raise Conflict(
                f"no exemplars to draw from: tasks with exemplars {self.tasks}, excluded {list(exclude_tasks)}"
            )
        label = {"all": np.zeros_like(self.run_tasks), "class": self.run_classes, "task": self.run_tasks}[by][runs]
        order = np.argsort(label, kind="stable")
        runs, label = runs[order], label[order]
        firsts = np.flatnonzero(np.concatenate([[True], label[1:] != label[:-1]]))
        counts = self.run_counts[runs]
        sizes = np.add.reduceat(counts, firsts)
        return Groups(sizes, np.cumsum(sizes) - sizes, np.cumsum(counts) - counts, self._run_starts[runs])


def plan(layout: Layout, request: Request) -> Plan:
    """What the request returns.

    Raises:
        NotFound: a task named in `tasks` holds no exemplar.
        Conflict: nothing to draw from.
    """
    by = {"uniform": "all", "epoch": "all", "class_balanced": "class"}.get(request.strategy, "task")
    groups = layout.groups(by, request.tasks, request.exclude_tasks)
    rows = np.sort(_epoch(groups, request) if request.strategy == "epoch" else _sample(groups, request))
    return layout.locate(rows)


def _below(words: WordArray, bounds: IntArray) -> IntArray:
    """One integer in 0..bound-1 per word (multiply and shift; the bias is below bound / 2**32)."""
    return ((words >> np.uint64(32)) * bounds.astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def _sample(groups: Groups, request: Request) -> IntArray:
    """Global rows of this rank's part of the batch."""
    words = Philox(key=np.array([request.seed, request.step], np.uint64))
    count = len(groups.sizes)
    total = request.size * request.world_size
    if request.strategy == "per_task":
        quotas = np.full(count, total, np.int64)
    else:
        share, more = divmod(total, count)
        quotas = np.full(count, share, np.int64)
        if more:
            quotas[_smallest(words.random_raw(count), more)] += 1
    owner = np.repeat(np.arange(count), quotas)
    picks = _distinct(words, groups, quotas, owner)
    if request.world_size > 1:
        mine = _slice_of_rank(words, owner, quotas, request)
        owner, picks = owner[mine], picks[mine]
    return _rows(groups, owner, picks)


def _slice_of_rank(words: Philox, owner: IntArray, quotas: IntArray, request: Request) -> IntArray:
    """The positions in the global batch that belong to this rank."""
    if request.strategy == "per_task":
        position = np.arange(len(owner)) - np.repeat(np.cumsum(quotas) - quotas, quotas)
        return np.flatnonzero(position // request.size == request.rank)
    # Dealt out group by group, so that every rank gets its share of every group.
    return np.arange(request.rank, len(owner), request.world_size)


def _smallest(words: WordArray, count: int) -> IntArray:
    """Where the `count` smallest words are, in no order; of equal ones the first."""
    last = np.partition(words, count - 1)[count - 1]
    below = np.flatnonzero(words < last)
    return np.concatenate([below, np.flatnonzero(words == last)[: count - len(below)]])


def _distinct(words: Philox, groups: Groups, quotas: IntArray, owner: IntArray) -> IntArray:
    """For each group g, quotas[g] picks in 0..sizes[g]-1, in random order: distinct as far as the group reaches.

    Groups of which less than half is wanted are sampled by rejection, each repeated pick drawn again; the others are
    shuffled whole, which costs at most twice their quota. A quota beyond the group's size takes the whole group as
    often as it fits.
    """
    whole, wanted = np.divmod(quotas, groups.sizes)
    shuffled = (whole > 0) | (2 * wanted > groups.sizes)
    if not shuffled.any():
        return _rejection(words, groups, owner)
    picks = np.empty(len(owner), np.int64)
    dense = shuffled[owner]
    if not dense.all():
        picks[~dense] = _rejection(words, groups, owner[~dense])
    picks[dense] = _shuffles(words, groups.sizes[shuffled], quotas[shuffled])
    return picks


def _shuffles(words: Philox, sizes: IntArray, quotas: IntArray) -> IntArray:
    """The first quotas[g] of 0..sizes[g]-1 shuffled, and shuffled again as often as it takes, group after group."""
    rounds = -(-quotas // sizes)
    decks = np.repeat(sizes, rounds)
    begins = np.repeat(np.cumsum(decks) - decks, decks)
    deck = np.repeat(np.arange(len(decks), dtype=np.uint64), decks)
    # One key of deck and word sorts 30 times as fast as the two: the decks are in order already.
    bits = np.uint64(max(1, len(decks).bit_length()))
    keys = deck << (np.uint64(64) - bits) | words.random_raw(len(deck)) >> bits
    order = np.argsort(keys, kind="stable") - begins
    totals = rounds * sizes
    place = np.arange(len(deck)) - np.repeat(np.cumsum(totals) - totals, totals)
    shuffled: IntArray = order[place < np.repeat(quotas, totals)]
    return shuffled


def _rejection(words: Philox, groups: Groups, owner: IntArray) -> IntArray:
    """One pick for each element of `owner`; of a group's equal picks all but the first are drawn again, till none are.

    Sorted are places on the axis with their positions in the low bits. What is drawn again is merged into them, so that
    the rounds after the first cost little.
    """
    bounds, base = groups.sizes[owner], groups.begins[owner]
    picks = _below(words.random_raw(len(owner)), bounds)
    bits = len(owner).bit_length()
    keys = (base + picks) << bits | np.arange(len(owner))
    keys.sort()
    while True:
        places = keys >> bits
        repeated = places[1:] == places[:-1]
        if not repeated.any():
            return picks
        again = np.sort(keys[1:][repeated] & (1 << bits) - 1)
        picks[again] = _below(words.random_raw(len(again)), bounds[again])
        drawn = np.sort(base[again] + picks[again] << bits | again)
        keys = np.sort(np.concatenate([keys[:1], keys[1:][~repeated], drawn]), kind="stable")


def _rows(groups: Groups, owner: IntArray, picks: IntArray) -> IntArray:
    """Global rows of the picks-th exemplars of their groups."""
    along = picks + groups.begins[owner]
    run = np.searchsorted(groups.run_begins, along, side="right") - 1
    rows: IntArray = groups.run_rows[run] + along - groups.run_begins[run]
    return rows


def _epoch(groups: Groups, request: Request) -> IntArray:
    total = int(groups.sizes[0])
    batch = request.size * request.world_size
    steps = -(-total // batch)
    epoch, step = divmod(request.step, steps)
    first = step * batch + request.rank * request.size
    positions = np.arange(first, min(first + request.size, total), dtype=np.int64)
    keys = Philox(key=np.array([request.seed, epoch + _EPOCH_KEY], np.uint64)).random_raw(_ROUNDS)
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
