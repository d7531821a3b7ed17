"""The memory: content and an upload make new content, under a byte budget. No SQL, no HTTP, no files.

A memory holds tasks; a task holds exemplars of classes in rank order, so that every prefix of a class is a valid
memory. An upload to a task goes this way:

1. every class of it is ranked over what is stored of the class and what came (`selection.ranking`);
2. the memory's quality is settled (below);
3. each class is encoded along its ranking until its share is spent (`selection.filling`); what is stored of the task at
   that quality is copied;
4. every other task that exceeds its shares as they are now is cut back to a prefix per class. Nothing is decoded.

**One quality for all of a memory**, because a network learns to tell tasks by unequal artefacts. It is fixed by the
policy or decided by selection, and then it must suit a budget that later tasks will share. So nothing is decided while
nothing has to go: as long as everything ever uploaded fits at quality 90 it is kept at 90. What does not fit any more
brings the choice (`selection.quality`), and all packs are encoded once more, together: from 90 that costs 0.03 dB
against encoding the originals. The choice is provisional until every class seen has had two blocks compared; then it is
made again, and stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

import numpy as np
import numpy.typing as npt

from engram import names, pack, shares
from engram.content import NOTHING, ROOMY_QUALITY, Content, Means, Task, shares_of
from engram.errors import BadUpload, BudgetExceeded, Conflict, InvalidRequest, NotFound
from engram.fields import KEY
from engram.schemas import MAX_CLASS_ID, Decision, IngestOptions
from engram.selection import ranking
from engram.selection.embedding import BUILTIN_BLOCK, BuiltinEmbedder, Embedder, FloatArray, Shape
from engram.selection.filling import fill, smallest
from engram.selection.images import NO_IMAGES, Images, Pool, Relabelled, WorkDone
from engram.selection.quality import choose, is_enough, measure
from engram.selection.volume import DELTA, ENOUGH_BLOCKS
from engram.strip import Exemplars, runs_of

IntArray = npt.NDArray[np.int64]
Orders = dict[int, IntArray]

_FEWEST_BYTES = 7  # of an exemplar: a marker, a checksum and one byte
_RANKING_PART = 0.5  # of the progress reported


@dataclass(frozen=True)
class Upload:
    """Images for one task, and how to rank and measure them.

    Where `names` are given, the class ids of the images are places in them.
    """

    task: int
    images: Images
    options: IngestOptions
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Where:
    """Which exemplars a change means: all that have everything given here, at least a class, a key or a rank.

    `keys` are values of the field `key`, any of which an exemplar may have. `rank` counts from 0 within a class of a
    task, and needs both.
    """

    task: int | None = None
    class_id: int | None = None
    keys: tuple[str, ...] | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if (self.class_id is None and self.keys is None) or self.keys == ():
            raise InvalidRequest("name the exemplars by class id or key; a whole task is deleted as a task")
        if self.rank is not None and (self.task is None or self.class_id is None or self.keys is not None):
            raise InvalidRequest("a rank is one within a class of a task: name task and class id with it, and no key")

    @property
    def is_whole(self) -> bool:
        """Whether a class is meant as a whole, what was seen of it as well as what is stored."""
        return self.keys is None and self.rank is None

    @property
    def asked(self) -> dict[str, int | str]:
        """What is given, by name; of several keys how many there are."""
        given: dict[str, int | str | None] = {"task": self.task, "class_id": self.class_id, "rank": self.rank}
        if self.keys is not None:
            given |= {"key": self.keys[0]} if len(self.keys) == 1 else {"keys": len(self.keys)}
        return {name: value for name, value in given.items() if value is not None}

    def names(self, class_id: int) -> bool:
        """Whether exemplars of this class can be meant."""
        return self.class_id in (None, class_id)

    def __str__(self) -> str:
        said = [f"{name.replace('_', ' ')} {value!r}" for name, value in self.asked.items() if name != "keys"]
        return ", ".join([*said, *([f"any of {len(self.keys)} keys"] if self.keys and len(self.keys) > 1 else [])])


def add(
    content: Content, upload: Upload, embedder: Embedder, *, advance: Callable[[int], None] = lambda count: None
) -> Content:
    """The content with as many of the upload's images as its shares hold; deterministic.

    Args:
        content: as it stands.
        upload: at least one image.
        embedder: not asked if neither the ranking nor the choice of a quality needs it.
        advance: called often, with how many images further the work is; the counts sum to N. What it raises ends it.

    Raises:
        BudgetExceeded: not one exemplar of the task fits; `details` has `budget_bytes` and `needed_bytes`.
        BadUpload: the images have other fields than the memory's.
        Conflict: the images have another shape than the memory's.
        InvalidRequest: there are no images.
    """
    start = perf_counter()
    if len(upload.images.class_ids) == 0:
        raise InvalidRequest("0 images: at least one is needed")
    content, upload = _identified(content, upload)
    images, options = upload.images, upload.options
    _check_shape(content, images.shape)
    if images.schema != content.schema:
        raise BadUpload(f"the images bring the fields {images.schema.text or 'none'}, {content.schema.summary}")
    before = content.tasks.get(upload.task, NOTHING)
    done = WorkDone(len(images.class_ids), advance)
    pool = Pool(before.load(), images, content.policy.subsampling, done)
    came = Counter[int](np.asarray(images.class_ids).tolist())
    seen = dict(sorted((came + Counter(before.seen)).items()))
    share = _granted(content, upload.task, came, seen)
    order, means, mean_is = _rank(pool, before, came, share[upload.task], options, embedder)
    done.reach(_RANKING_PART)
    decision = Decision(
        quality=content.policy.quality or ROOMY_QUALITY,
        reason="",
        definition=options.definition,
        rule=options.rule,
        epsilon=options.epsilon,
        block=options.block or embedder.block,
        blocks={},
        delta=DELTA,
        ranking=options.ranking,
        mean=mean_is,
        embedder=embedder.name,
        images=len(images.class_ids),
        seconds=0,
        candidates=[],
    )
    if content.policy.quality is None:
        own = {class_id: order[class_id][order[class_id] >= pool.stored] for class_id in came}
        decision = _measured(decision, pool, own, own, share[upload.task], options, embedder)
    grown = replace(before, seen=seen, means=means, decision=_weightier(before.decision, decision))
    joined = replace(content, shape=images.shape, tasks=dict(sorted({**content.tasks, upload.task: grown}.items())))
    exemplars, settled, reason = _settle(content, joined, upload, pool, order, share, embedder)
    if len(exemplars) == 0:
        raise _exceeded(pool, order, share[upload.task], settled.quality or 0)
    said = {
        "quality": settled.quality,
        "reason": reason,
        "ranking": options.ranking,
        "mean": mean_is,
        "seconds": perf_counter() - start,
    }
    grown = _saying(settled.tasks[upload.task], said)
    done.reach(1)
    return _cut(replace(settled, tasks={**settled.tasks, upload.task: grown.holding(exemplars)}), share)


def reshare(content: Content, *, budget_bytes: int | None = None, without_task: int | None = None) -> Content:
    """The content with this budget and without this task.

    A smaller budget cuts the tails of every class. A larger one is filled by later uploads: what was dropped is gone.

    Raises:
        NotFound: there is no such task.
    """
    tasks = dict(content.tasks)
    if without_task is not None and tasks.pop(without_task, None) is None:
        raise NotFound(f"there is no task {without_task}; there are {sorted(tasks)}", task=without_task)
    policy = content.policy if budget_bytes is None else replace(content.policy, budget_bytes=budget_bytes)
    changed = replace(content, policy=policy, tasks=tasks)
    return _within(changed, was_roomy=content.is_roomy)


def expect(content: Content, new_classes: int) -> Content:
    """The content once so many classes more have come in a task of their own, of which nothing is known or kept.

    They take their shares, so this is what is left of all others, as long as the quality stays.
    """
    number, first = max(content.tasks, default=-1) + 1, content.next_class_id
    coming = replace(NOTHING, seen=dict.fromkeys(range(first, first + new_classes), 1))
    grown = replace(content, tasks={**content.tasks, number: coming})
    return _within(grown, was_roomy=content.is_roomy)


def remove(content: Content, where: Where) -> Content:
    """The content without these exemplars, as if they had never come; what their classes leave, others may fill.

    A class without an image in a task has no share there any more, and a task without a class is gone. What herding
    goes toward, the mean of all images seen of a class, still knows single exemplars that were removed.

    Raises:
        NotFound: nothing is there that `where` names.
    """
    tasks = dict(content.tasks)
    for number, held in _matching(content, where).items():
        task = tasks[number]
        taken = Counter[int](held.class_ids[held.is_named].tolist())
        seen = {c: count - taken[c] for c, count in task.seen.items() if not (where.is_whole and where.names(c))}
        tasks[number] = _regrouped(task, seen, held.exemplars, np.flatnonzero(~held.is_named))
        if not tasks[number].seen:
            del tasks[number]
    return _within(replace(content, tasks=tasks), was_roomy=content.is_roomy)


def relabel(content: Content, where: Where, class_id: int) -> Content:
    """The content with these exemplars in another class of their task, behind all that it holds of this class.

    Herding starts the mean of that class again, from those kept.

    Raises:
        NotFound: nothing is there that `where` names.
        InvalidRequest: there can be no such class id.
    """
    if not 0 <= class_id <= MAX_CLASS_ID:
        raise InvalidRequest(f"class ids lie in 0..{MAX_CLASS_ID}, {class_id} does not")
    tasks = dict(content.tasks)
    for number, held in _matching(content, where).items():
        task, is_moved = tasks[number], held.is_named & (held.class_ids != class_id)
        taken = Counter[int](held.class_ids[is_moved].tolist())
        if where.is_whole and where.class_id is not None and where.class_id != class_id:
            taken = Counter({where.class_id: task.seen[where.class_id]})
        if not taken:
            continue
        seen = {c: count - taken[c] for c, count in task.seen.items()}
        seen[class_id] = seen.get(class_id, 0) + taken.total()
        class_ids = np.where(is_moved, class_id, held.class_ids)
        exemplars = None if held.exemplars is None else replace(held.exemplars, class_ids=class_ids)
        changed = _regrouped(task, seen, exemplars, np.lexsort((is_moved, class_ids)))
        tasks[number] = replace(changed, means=_means(changed.means, {*changed.seen} - {class_id}))
    above = max(content.next_class_id, class_id + 1)
    return _within(replace(content, tasks=tasks, next_class_id=above), was_roomy=content.is_roomy)


@dataclass(frozen=True)
class _Held:
    """The exemplars of a task and which of them are named."""

    exemplars: Exemplars | None
    class_ids: IntArray
    is_named: npt.NDArray[np.bool_]


def _matching(content: Content, where: Where) -> dict[int, _Held]:
    """Of each task that holds something of what is named.

    Raises:
        NotFound: none does.
        InvalidRequest: a key is named and the memory keeps none.
        Conflict: a rank is named where exemplars are damaged.
    """
    if where.keys is not None and not content.schema.has_key:
        raise InvalidRequest(
            f"exemplars are found by key where a field `key` of type utf8 is: {content.schema.summary}"
        )
    found: dict[int, _Held] = {}
    for number, task in content.tasks.items():
        if where.task not in (None, number) or not any(map(where.names, task.seen)):
            continue
        exemplars = task.load()
        class_ids = np.empty(0, np.int64) if exemplars is None else exemplars.class_ids
        is_named = np.ones(len(class_ids), np.bool_) if where.class_id is None else class_ids == where.class_id
        if where.keys is not None and exemplars is not None:
            keys, wanted = exemplars.fields(frozenset({KEY}))[KEY], {*where.keys}
            is_named = is_named & np.fromiter((key in wanted for key in keys), np.bool_, len(class_ids))
        if where.rank is not None:
            if len(class_ids) != sum(task.kept.values()):
                raise Conflict(
                    f"task {number} holds {len(class_ids)} intact exemplars of {sum(task.kept.values())}, the others "
                    "are damaged, so ranks are not what they were; name exemplars by key or class"
                )
            is_named = is_named & (np.cumsum(is_named) == where.rank + 1)
        if is_named.any() or where.is_whole:
            found[number] = _Held(exemplars, class_ids, is_named)
    if not found:
        raise NotFound(f"there is no exemplar of {where}", **where.asked)
    return found


def _regrouped(task: Task, seen: Mapping[int, int], exemplars: Exemplars | None, rows: IntArray) -> Task:
    """The task with these rows of exemplars, and having seen so many of each class."""
    left = {class_id: count for class_id, count in sorted(seen.items()) if count > 0}
    kept = None if exemplars is None else exemplars.select(rows)
    return replace(task, seen=left, means=_means(task.means, {*left})).holding(kept)


def _means(means: Means | None, classes: set[int]) -> Means | None:
    """Those of these classes."""
    of_class = {} if means is None else {c: mean for c, mean in means.of_class.items() if c in classes}
    return replace(means, of_class=of_class) if means is not None and of_class else None


def _within(changed: Content, *, was_roomy: bool) -> Content:
    """The content after a change that is no upload: within its shares as they are now."""
    if not changed.tasks:
        return replace(changed, quality=None, is_provisional=True)
    share = _granted(changed)
    if was_roomy and not _fits(changed, share):
        changed = _encode_again(*_chosen(_weighed(changed, share)))
    return _cut(changed, share)


def rename(content: Content, given: Mapping[int, str]) -> Content:
    """The content in which these class ids have these names, whether or not they have been seen yet.

    Raises:
        Conflict: a name belongs to another id.
        InvalidRequest: what is given is no name.
    """
    most = max(given, default=-1)
    return replace(
        content,
        class_names=names.renamed(content.class_names, given),
        next_class_id=max(content.next_class_id, most + 1),
    )


def _identified(content: Content, upload: Upload) -> tuple[Content, Upload]:
    """The upload with class ids in place of names, and the content that knows them.

    Raises:
        InvalidRequest: there is no class id left for a new name.
    """
    class_names = content.class_names
    if upload.names is not None:
        ids = names.identify(class_names, upload.names, content.next_class_id)
        class_names = dict(sorted({**class_names, **{class_id: name for name, class_id in ids.items()}}.items()))
        places = np.array([ids[name] for name in upload.names], np.int64)
        upload = replace(upload, images=Relabelled(upload.images, places[upload.images.class_ids]), names=None)
    above = max(content.next_class_id, int(upload.images.class_ids.max()) + 1, max(class_names, default=-1) + 1)
    return replace(content, class_names=class_names, next_class_id=above), upload


def _check_shape(content: Content, shape: Shape) -> None:
    """Returns if images of this shape can join.

    Raises:
        Conflict: the memory holds images of another shape.
    """
    if content.shape not in (None, shape):
        raise Conflict(
            f"the images are {_text(shape)} (height x width x channels), the buffer holds {_text(content.shape)}; "
            "resize them or use another buffer",
            image_shape=list(shape),
            buffer_shape=list(content.shape),
        )


def _rank(
    pool: Pool,
    before: Task,
    came: Mapping[int, int],
    share: Mapping[int, int],
    options: IngestOptions,
    embedder: Embedder,
) -> tuple[Orders, Means | None, Literal["seen", "kept"] | None]:
    """Numbers of the pool of every class, best first, deeper than could ever fit; and the means they went toward."""
    is_herding = options.ranking == "herding"
    known = before.means.of_class if before.means is not None and before.means.embedder == embedder.name else {}
    means: dict[int, FloatArray] = dict(known) if is_herding else {}
    most = max(sum(share.values()) // _FEWEST_BYTES, ENOUGH_BLOCKS * max(BUILTIN_BLOCK, options.block or 0)) + 1
    by_class = np.argsort(pool.class_ids, kind="stable")
    order: Orders = {}
    # A mean that was once started again is never that of all images seen.
    restarted = bool(known) and before.decision is not None and before.decision.mean == "kept"
    done = 0
    for class_id, held in runs_of(pool.class_ids[by_class]):
        numbers = by_class[done : done + held]
        done += held
        stored, new, seen = held - came.get(class_id, 0), came.get(class_id, 0), before.seen.get(class_id, 0)
        if not new:
            order[class_id] = numbers
        elif not ranking.needs_features(options.ranking):
            words = np.random.Philox(key=np.array([options.seed, class_id], np.uint64), counter=[0, seen, 0, 0])
            rng = np.random.Generator(words)
            order[class_id] = numbers[ranking.order(stored, new, seen=seen, method=options.ranking, rng=rng)[:most]]
        else:
            parts = ranking.groups(held)
            picks, means_GD, weights_G = [], [], []
            for part in parts:
                features_ND, is_new_N = pool.embed(numbers[part], embedder), numbers[part] >= pool.stored
                mean_D, weight = ranking.mean_seen(features_ND, is_new_N, known.get(class_id), seen / len(parts))
                count = min(len(part), -(-(most + stored) // len(parts)))
                picks.append(
                    part[ranking.rank(features_ND, count, method=options.ranking, mean_D=mean_D, pulse=pool.done.pulse)]
                )
                means_GD.append(mean_D)
                weights_G.append(weight)
            order[class_id] = numbers[ranking.deal(picks, most + stored)]
            if is_herding:
                means[class_id] = np.average(means_GD, axis=0, weights=weights_G).astype(np.float32)
                restarted |= seen > 0 and class_id not in known
        pool.done.reach(_RANKING_PART * done / len(by_class))
    if not is_herding:
        return order, None, None
    return order, Means(embedder.name, means), "kept" if restarted else "seen"


def _settle(
    content: Content,
    joined: Content,
    upload: Upload,
    pool: Pool,
    order: Orders,
    share: Mapping[int, Mapping[int, int]],
    embedder: Embedder,
) -> tuple[Exemplars, Content, str]:
    """The uploaded task's exemplars, the content at the quality that is right from now on, and why it is."""
    policy, number = content.policy, upload.task
    if policy.quality is not None:
        settled = replace(joined, quality=policy.quality, is_provisional=False)
        return fill(pool, order, share[number], policy.quality), settled, "this quality was fixed with the buffer"
    was_roomy = content.is_roomy
    if was_roomy and policy.roomy_quality is not None:
        exemplars = fill(pool, order, share[number], policy.roomy_quality)
        others = replace(joined, tasks={task: held for task, held in joined.tasks.items() if task != number})
        if len(exemplars) == len(pool.class_ids) and _fits(others, share):
            reason = "everything uploaded so far fits at this quality; one is chosen when something would have to go"
            return exemplars, replace(joined, quality=policy.roomy_quality), reason
        joined = _weighed(joined, share, but=number, done=pool.done)
        task = joined.tasks[number]
        assert task.decision is not None, "the upload was measured"
        if pool.stored and not is_enough([task.decision], task.seen):
            decision = _measured(task.decision, pool, order, order, share[number], upload.options, embedder)
            joined = replace(joined, tasks={**joined.tasks, number: replace(task, decision=decision)})
    chosen, reason = _chosen(joined, last=number)
    if content.is_provisional and (content.quality is None or was_roomy or not chosen.is_provisional):
        settled = _encode_again(chosen, reason, but=number, done=pool.done)
    else:
        kind = "provisional" if content.is_provisional else "decided earlier"
        alone = choose(joined.decisions(last=number)[-1:])[1]
        settled, reason = joined, f"quality {content.quality} is the buffer's, {kind}; for this task alone, {alone}"
    assert settled.quality is not None, "a content with exemplars has a quality"
    return fill(pool, order, share[number], settled.quality), settled, reason


def _measured(
    decision: Decision,
    pool: Pool,
    order: Orders,
    originals: Orders,
    share: Mapping[int, int],
    options: IngestOptions,
    embedder: Embedder,
) -> Decision:
    """The decision with what is measured on these images."""
    found = measure(pool, order, originals, share, options=options, embedder=embedder)
    by = {"definition": options.definition, "rule": options.rule, "epsilon": options.epsilon, "embedder": embedder.name}
    return decision.model_copy(update=vars(found) | by)


def _weightier(before: Decision | None, now: Decision) -> Decision:
    """The one that rests on more blocks, the later of equals."""
    if before is None or sum(now.blocks.values()) >= sum(before.blocks.values()):
        return now
    return before


def _weighed(
    content: Content,
    share: Mapping[int, Mapping[int, int]],
    *,
    but: int | None = None,
    done: WorkDone | None = None,
) -> Content:
    """Every task but one has been measured on all that it holds, which is as good as the originals while there is room.

    So what came in uploads too small to say anything has a say. Only tasks that have not said enough are measured, on
    pixels: the extractors of earlier uploads are not at hand.
    """
    tasks = dict(content.tasks)
    for number, task in tasks.items():
        said = task.decision
        exemplars = None if number == but or said is None or is_enough([said], task.seen) else task.load()
        if exemplars is None or said is None:
            continue
        pool = Pool(exemplars, NO_IMAGES, content.policy.subsampling, done)
        order = {class_id: np.flatnonzero(exemplars.class_ids == class_id) for class_id in task.kept}
        options = IngestOptions(
            candidates=tuple(candidate.quality for candidate in said.candidates),
            definition=said.definition,
            rule=said.rule,
            epsilon=said.epsilon,
            block=said.pixel_block or said.block,
        )
        decision = _measured(said, pool, order, order, share[number], options, BuiltinEmbedder(pool.shape))
        tasks[number] = replace(task, decision=decision)
    return replace(content, tasks=tasks)


def _chosen(content: Content, *, last: int | None = None) -> tuple[Content, str]:
    """The content with the quality that its tasks ask for; its packs are as they were."""
    decisions = content.decisions(last)
    quality, reason = choose(decisions)
    classes = {class_id for task in content.tasks.values() for class_id in task.seen}
    return replace(content, quality=quality, is_provisional=not is_enough(decisions, classes)), reason


def _encode_again(content: Content, reason: str, *, but: int | None = None, done: WorkDone | None = None) -> Content:
    """Every pack, but that of one task, is encoded at the content's quality."""
    assert content.quality is not None, "a quality was chosen"
    tasks = dict(content.tasks)
    for number, task in tasks.items():
        exemplars = None if number == but else task.load()
        if exemplars is None or exemplars.form.quality == content.quality:
            continue
        pool = Pool(exemplars, NO_IMAGES, content.policy.subsampling, done)
        said = {"quality": content.quality, "reason": f"encoded again with the whole buffer: {reason}"}
        tasks[number] = _saying(task, said).holding(pool.encode(np.arange(len(exemplars)), content.quality))
    return replace(content, tasks=tasks)


def _saying(task: Task, said: Mapping[str, object]) -> Task:
    return task if task.decision is None else replace(task, decision=task.decision.model_copy(update=said))


def _granted(
    content: Content,
    task: int | None = None,
    came: Mapping[int, int] | None = None,
    seen: Mapping[int, int] | None = None,
) -> dict[int, dict[int, int]]:
    """Bytes for each class of each task, once so many images of each class have come to one, which has seen so many."""
    policy, classes = content.policy, content.classes()
    if task is not None:
        classes[task] = list(seen or ())
    if policy.share_by != "none":
        return shares_of(policy, classes)
    held = {number: _spread(each.pack_bytes, each.kept) for number, each in content.tasks.items()}
    coming = dict(came or {})
    stored = None if task is None else content.tasks.get(task, NOTHING).load()
    if task is not None and stored is not None:
        held[task] = dict(zip((c for c, _ in runs_of(stored.class_ids)), pack.class_bytes(stored), strict=True))
        each_bytes = max(1, int(stored.sizes.mean()))
        coming = {class_id: count * each_bytes for class_id, count in coming.items()}
    distinct = len({class_id for of in classes.values() for class_id in of})
    total = shares.limit(policy.budget_bytes, per=policy.per, classes=distinct)
    found = shares.room(total, held, task=task, coming=coming)
    return {number: dict.fromkeys(classes[number], 0) | found[number] for number in classes}


def _spread(size: int, counts: Mapping[int, int]) -> dict[int, int]:
    """These bytes divided over classes as their exemplars are; nothing is lost."""
    whole = sum(counts.values())
    found = {class_id: size * count // whole for class_id, count in counts.items()}
    for class_id in list(found)[:1]:
        found[class_id] += size - sum(found.values())
    return found


def _fits(content: Content, share: Mapping[int, Mapping[int, int]]) -> bool:
    """Whether every task is within its shares."""
    return all(task.pack_bytes <= sum(share[number].values()) for number, task in content.tasks.items())


def _cut(content: Content, share: Mapping[int, Mapping[int, int]]) -> Content:
    """Every task that exceeds its shares is cut back to a prefix per class.

    A task within the sum of its shares stays as it is, unread, even if one of its classes lives off another's.
    """
    tasks = dict(content.tasks)
    for number, task in tasks.items():
        if task.pack_bytes > sum(share[number].values()):
            exemplars = task.load()
            tasks[number] = task.holding(None if exemplars is None else pack.fit(exemplars, share[number]))
    return replace(content, tasks=tasks)


def _exceeded(pool: Pool, order: Orders, share: Mapping[int, int], quality: int) -> BudgetExceeded:
    # A class of which nothing is left does not lend its share.
    total, needed = sum(share[class_id] for class_id in order), smallest(pool, order, quality)
    return BudgetExceeded(
        f"not one exemplar fits: the classes at hand have {total:,} bytes together, and the smallest exemplar at the "
        f"head of a class needs {needed:,} at quality {quality}; raise the budget",
        budget_bytes=total,
        needed_bytes=needed,
        quality=quality,
    )


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
