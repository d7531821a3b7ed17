"""Cut a data set into the stream of tasks that a learner meets one after the other.

Scenarios:

    class-incremental   each task brings new classes; the learner must tell all classes seen so far apart
    task-incremental    the same tasks, but a test image comes with its task, so only that task's classes compete
    permuted            every task has all classes, its pixels shuffled by a permutation of its own
    rotated             every task has all classes, turned by an angle of its own

Tasks may return: a *visit* is one time that a learner meets a task, and each visit of a task trains on a part of its
images that no other visit has. Unless `visits` says otherwise, every task is visited once, in order. A memory that is
filled once a task is learned keeps exemplars of its first visit; one that is filled online sees all of them.

Images are uint8 `[N, H, W, C]`. A class id is the data set's number; its *label* is its place in `Stream.class_order`,
the order in which classes arrive. Everything random is drawn from the configuration's seed, the angles too.

Source: permuted and rotated as in Lopez-Paz & Ranzato, GEM (NIPS 2017), section 4: rotations draw one angle from each
of `tasks` equal bins of 0 to 180 degrees. Departure: the reference code takes its angles from an unseeded generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from engram_trainer.datasets import Dataset
from engram_trainer.examples import ClassIds, Examples, Images

Scenario = Literal["class-incremental", "task-incremental", "permuted", "rotated"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)


@dataclass(frozen=True)
class StreamConfig:
    """Which tasks are made of a data set."""

    scenario: Scenario = "class-incremental"
    tasks: int = 5
    """Number of tasks, the first (base) one included."""
    base_classes: int | None = None
    """Classes of the first task; None splits the classes evenly over all tasks."""
    seed: int = 0
    """Draws the order of classes, the permutations, the angles, the training images and the validation split."""
    class_order: tuple[int, ...] | None = None
    """An explicit order of class ids, in place of the seed's."""
    train_per_class: int | None = None
    """At most so many training images of each class (in each task), chosen by the seed; None takes all."""
    train_per_task: int | None = None
    """At most so many training images of each task, chosen by the seed; None takes all."""
    test_per_class: int | None = None
    """At most so many test images of each class: the first ones, the same for every seed; None takes all."""
    visits: tuple[int, ...] | None = None
    """The task of each visit, e.g. (0, 1, 2, 0, 1). Tasks are numbered in the order in which they are first met."""
    validation_ratio: float = 0.0
    """For tuning: this part of each class's training images is held out and takes the place of the test images."""

    @property
    def brings_classes(self) -> bool:
        """Whether each task brings classes of its own; otherwise it transforms the images of all classes."""
        return self.scenario in ("class-incremental", "task-incremental")

    def require_new_classes(self, method: str) -> None:
        """Returns if every task that a learner meets brings classes.

        Raises:
            ValueError: there are tasks that bring none, which this method cannot learn.
        """
        if not self.brings_classes:
            raise ValueError(f"{method} needs tasks that bring classes; {self.scenario} tasks bring none")
        if self.visits is not None:
            raise ValueError(f"{method} needs tasks that bring classes; tasks that return bring none")


@dataclass(frozen=True, eq=False)
class Task:
    """One step of a stream: a task, or a visit to it."""

    index: int
    """Which task."""
    classes: tuple[int, ...]
    train: Examples
    """Of a visit: its part."""
    test: Examples
    visit: int
    """How many visits came before, of any task; the same as `index` where no task returns."""


@dataclass(frozen=True, eq=False)
class Stream:
    """All tasks in order. `class_order[label]` is the class id of a label."""

    config: StreamConfig
    dataset: str
    tasks: tuple[Task, ...]
    """Each once, with all its images."""
    visits: tuple[Task, ...]
    """What a learner meets, one after the other; the tasks themselves where none returns."""
    class_order: tuple[int, ...]
    shape: tuple[int, int, int]
    class_names: tuple[str, ...] = ()

    @property
    def task_is_given(self) -> bool:
        """Whether a test image comes with its task, so that only that task's classes compete."""
        return self.config.scenario == "task-incremental"

    def labels(self, class_ids: ClassIds) -> npt.NDArray[np.int64]:
        """The labels of class ids: their places in the order of arrival.

        Raises:
            KeyError: a class id is not in the stream.
        """
        order = np.array(self.class_order, np.int64)
        ascending = np.argsort(order)
        places = np.searchsorted(order[ascending], class_ids).clip(max=len(order) - 1)
        labels = ascending[places]
        if not np.array_equal(order[labels], class_ids):
            raise KeyError(
                f"class ids {sorted({*np.unique(class_ids).tolist()} - {*self.class_order})} are not in the stream"
            )
        found: npt.NDArray[np.int64] = labels.astype(np.int64)
        return found

    def seen(self, visit: int) -> int:
        """How many labels have arrived once visit `visit` is there."""
        return len({class_id for task in self.visits[: visit + 1] for class_id in task.classes})


def build(dataset: Dataset, config: StreamConfig) -> Stream:
    """Cut a data set into tasks.

    Raises:
        ValueError: the configuration does not fit the data set.
    """
    if config.scenario not in SCENARIOS:
        raise ValueError(f"scenario {config.scenario!r} is not one of {', '.join(SCENARIOS)}")
    if config.tasks < 1:
        raise ValueError(f"a stream needs at least 1 task, not {config.tasks}")
    for name in ("train_per_class", "train_per_task", "test_per_class"):
        limit = getattr(config, name)
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1, not {limit}")
    dataset = _limited(dataset, config)
    order = _class_order(dataset, config)
    if not config.brings_classes:
        if config.base_classes is not None:
            raise ValueError(
                f"base_classes has no meaning in the {config.scenario} scenario: every task has all classes"
            )
        tasks = tuple(_transformed(dataset, config, index) for index in range(config.tasks))
    else:
        groups = _groups(order, config)
        tasks = tuple(_classes_only(dataset, config, index, classes) for index, classes in enumerate(groups))
    return Stream(config, dataset.name, tasks, _visits(tasks, config), order, dataset.shape, dataset.class_names)


def _visits(tasks: tuple[Task, ...], config: StreamConfig) -> tuple[Task, ...]:
    """The tasks in the order in which they are met, the images of each dealt out to its visits."""
    if config.visits is None:
        return tasks
    first = list(dict.fromkeys(config.visits))
    if first != list(range(len(tasks))):
        raise ValueError(
            f"visits {config.visits} first meet the tasks {first}; there are {len(tasks)} tasks, numbered from 0 in "
            f"the order in which they are first met"
        )
    visits = []
    for visit, index in enumerate(config.visits):
        task, times = tasks[index], config.visits.count(index)
        rows = np.concatenate(
            [
                _generator(config, VISIT, index, class_id).permutation(
                    np.flatnonzero(task.train.class_ids == class_id)
                )[config.visits[:visit].count(index) :: times]
                for class_id in task.classes
            ]
        )
        if len(rows) == 0:
            raise ValueError(f"task {index} has too few training images to be visited {times} times")
        visits.append(replace(task, train=task.train.select(np.sort(rows)), visit=visit))
    return tuple(visits)


def _generator(config: StreamConfig, *key: int) -> np.random.Generator:
    """A generator of its own for each purpose, so that one choice never shifts another."""
    return np.random.default_rng([config.seed, *key])


ORDER, TRAIN, VALIDATION, PIXELS, ANGLE, PER_TASK, VISIT = range(7)


def _class_order(dataset: Dataset, config: StreamConfig) -> tuple[int, ...]:
    if config.class_order is None:
        shuffled = _generator(config, ORDER).permutation(np.array(dataset.classes))
        return tuple(int(class_id) for class_id in shuffled)
    if sorted(config.class_order) != list(dataset.classes):
        raise ValueError(f"class_order {config.class_order} is not an order of the classes {dataset.classes}")
    return config.class_order


def _groups(order: tuple[int, ...], config: StreamConfig) -> list[tuple[int, ...]]:
    """Consecutive groups of classes: `base_classes` first, then equal steps."""
    base, steps = config.base_classes, config.tasks
    if base is None:
        if len(order) % steps:
            raise ValueError(f"{len(order)} classes do not split evenly into {steps} tasks; set tasks or base_classes")
        base = len(order) // steps
    rest = len(order) - base
    if base < 1 or rest < 0 or (steps == 1 and rest) or (steps > 1 and (rest < steps - 1 or rest % (steps - 1))):
        raise ValueError(f"{base} base classes leave {rest} classes, which do not split evenly into {steps - 1} steps")
    size = rest // (steps - 1) if steps > 1 else 0
    return [order[:base], *(order[base + step * size : base + (step + 1) * size] for step in range(steps - 1))]


def _limited(dataset: Dataset, config: StreamConfig) -> Dataset:
    """The data set after the validation split and the limits per class."""
    train, test = dataset.train, dataset.test
    if not 0 <= config.validation_ratio < 1:
        raise ValueError(f"validation_ratio must be in 0..1 (exclusive), not {config.validation_ratio}")
    if config.validation_ratio:
        counts = {c: round(config.validation_ratio * int((train.class_ids == c).sum())) for c in dataset.classes}
        held = _sample(train.class_ids, counts, _generator(config, VALIDATION))
        test, train = train.select(held), train.select(np.setdiff1d(np.arange(len(train)), held))
    if config.train_per_class is not None and config.brings_classes:
        counts = dict.fromkeys(dataset.classes, config.train_per_class)
        train = train.select(_sample(train.class_ids, counts, _generator(config, TRAIN)))
    return replace(dataset, train=train, test=test).first(test=config.test_per_class)


def _sample(class_ids: ClassIds, counts: dict[int, int], generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Rows of `counts[c]` images of every class c (all of them where there are fewer), ascending."""
    chosen = [
        generator.permutation(np.flatnonzero(class_ids == class_id))[: counts[class_id]] for class_id in sorted(counts)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _classes_only(dataset: Dataset, config: StreamConfig, index: int, classes: tuple[int, ...]) -> Task:
    train = np.flatnonzero(np.isin(dataset.train.class_ids, classes))
    test = np.flatnonzero(np.isin(dataset.test.class_ids, classes))
    train = _per_task(train, config, index)
    return Task(index, classes, dataset.train.select(train), dataset.test.select(test), visit=index)


def _per_task(rows: npt.NDArray[np.int64], config: StreamConfig, index: int) -> npt.NDArray[np.int64]:
    if config.train_per_task is None:
        return rows
    return np.sort(_generator(config, PER_TASK, index).permutation(rows)[: config.train_per_task])


def _transformed(dataset: Dataset, config: StreamConfig, index: int) -> Task:
    rows = np.arange(len(dataset.train))
    if config.train_per_class is not None:
        counts = dict.fromkeys(dataset.classes, config.train_per_class)
        rows = _sample(dataset.train.class_ids, counts, _generator(config, TRAIN, index))
    train = dataset.train.select(_per_task(rows, config, index))
    change: Callable[[Images], Images]
    if config.scenario == "permuted":
        height, width, _ = dataset.shape
        places = _generator(config, PIXELS, index).permutation(height * width)
        change = partial(permute, places=places)
    else:
        width_degrees = 180 / config.tasks
        change = partial(rotate, degrees=width_degrees * (index + _generator(config, ANGLE, index).random()))
    return Task(index, dataset.classes, train.mapped(change), dataset.test.mapped(change), visit=index)


def permute(images_NHWC: Images, places: npt.NDArray[np.int64]) -> Images:
    """Move the pixel at `places[i]` to place i (row by row), channels staying together."""
    count, height, width, channels = images_NHWC.shape
    flat = images_NHWC.reshape(count, height * width, channels)
    return flat[:, places].reshape(images_NHWC.shape)


def rotate(images_NHWC: Images, degrees: float) -> Images:
    """Turn images anticlockwise about their centre, bilinear, black outside."""
    turned = np.empty_like(images_NHWC)
    for row, image in enumerate(images_NHWC):
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        turned[row] = np.asarray(picture.rotate(degrees, Image.Resampling.BILINEAR)).reshape(image.shape)
    return turned
