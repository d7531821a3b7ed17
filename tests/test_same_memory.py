"""A local buffer and a service make the same packs of the same changes, whatever these are."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from engram import LocalBuffer, tar
from engram.errors import EngramError, from_problem
from engram.memory import Upload, Where, add
from engram.schemas import BufferChange, BufferCreate, ForkCreate, IngestOptions
from engram.selection.embedding import FloatArray, FunctionEmbedder
from engram.selection.images import ArrayImages
from engram_service import buffers
from engram_service.commit import change, commit, fork, place_of, relabel, remove, reshare
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from tests.contents import UInt8Array, pictures
from tests.uploads import final, queue, work_through

SHAPE = (16, 16, 3)
_numbers = count()


@dataclass
class Service:
    """A data folder without a server, as its worker and its routes see it."""

    settings: Settings
    database: Database
    store: PackStore


@pytest.fixture(scope="module")
def shared(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("shared") / "data"
    shutil.copytree(migrated, folder)
    settings = Settings(data_dir=folder)
    database = Database(settings)
    yield Service(settings, database, PackStore(settings.packs_dir))
    database.close()


class Both:
    """One buffer in a folder and one in a service, changed alike."""

    def __init__(self, service: Service, folder: Path, **policy: Any) -> None:
        self.service, self.folder, self.name = service, folder, f"b{next(_numbers)}"
        self.local = LocalBuffer(folder / self.name, **policy)
        with service.database.session() as session:
            buffers.create(session, BufferCreate(name=self.name, **policy))

    def upload(
        self,
        task: int,
        images: UInt8Array,
        labels: list[int] | list[str],
        options: IngestOptions,
        fields: dict[str, Any] | None = None,
    ) -> None:
        def send() -> None:
            service = self.service
            body = b"".join(tar.write(images, labels, fields=fields))
            queued = queue(service.database, service.settings, body, buffer=self.name, task=task, options=options)
            work_through(service.database, service.store, service.settings)
            ended = final(service.database, queued)
            if ended.problem is not None:
                raise from_problem(ended.problem)

        self.alike(lambda: self.local.add(task, images, labels, options=options, fields=fields), send)

    def remove(self, named: dict[str, Any]) -> None:
        self.alike(
            lambda: self.local.remove(**named),
            lambda: remove(self.service.database, self.service.store, self.name, where(named)),
        )

    def relabel(self, named: dict[str, Any], class_id: int) -> None:
        self.alike(
            lambda: self.local.relabel(class_id, **named),
            lambda: relabel(self.service.database, self.service.store, self.name, where(named), class_id),
        )

    def remove_one(self, place: int) -> None:
        """The exemplar at this place of all, if there are as many."""
        rows = [(entry.digest, row) for entry in self.local.manifest.packs for row in range(entry.exemplars)]
        if place < len(rows):
            with self.service.database.reading() as session:
                where, _ = place_of(session, self.name, *rows[place])
            self.alike(
                lambda: self.local.remove(exemplar=rows[place]),
                lambda: remove(self.service.database, self.service.store, self.name, where),
            )

    def delete_task(self, task: int) -> None:
        self.alike(
            lambda: self.local.delete_task(task),
            lambda: reshare(self.service.database, self.service.store, self.name, without_task=task),
        )

    def change_budget(self, budget_bytes: int) -> None:
        self.alike(
            lambda: self.local.change_budget(budget_bytes),
            lambda: self._change(BufferChange(budget_bytes=budget_bytes)),
        )

    def rename(self, names: dict[int, str]) -> None:
        self.alike(
            lambda: self.local.rename_classes(names),
            lambda: self._change(BufferChange(class_names=names)),
        )

    def fork(self, budget_bytes: int | None) -> None:
        """Both go on in a fork."""
        name = f"b{next(_numbers)}"
        wanted = ForkCreate(name=name, budget_bytes=budget_bytes)
        fork(self.service.database, self.service.store, self.name, wanted)
        self.local = self.local.fork(self.folder / name, budget_bytes=budget_bytes)
        self.name = name

    def _change(self, wanted: BufferChange) -> None:
        change(self.service.database, self.service.store, self.name, wanted)

    def alike(self, here: Callable[[], object], there: Callable[[], object]) -> None:
        """Both do it, or both refuse for the same reason; what they hold then is the same."""
        ends: list[str | None] = []
        for do in (here, there):
            try:
                do()
            except EngramError as error:
                ends.append(type(error).__name__)
            else:
                ends.append(None)
        assert ends[0] == ends[1]
        self.check()

    def check(self) -> None:
        with self.service.database.reading() as session:
            expected = buffers.manifest(session, self.name)
            described = buffers.read(session, self.name)
            tasks = [buffers.task(session, self.name, number) for number in described.tasks]
        assert [entry.digest for entry in self.local.manifest.packs] == [entry.digest for entry in expected.packs]
        born_together = {"created_at": self.local.manifest.created_at}
        assert self.local.manifest == expected.model_copy(update=born_together)
        assert {path.stem for path in (self.local.folder / "packs").iterdir()} == {e.digest for e in expected.packs}
        # A folder does not know which buffer it was forked from.
        own_to_services = {"created_at", "forked_from", "forked_generation"}
        assert self.local.describe().model_dump(exclude=own_to_services) == described.model_dump(
            exclude=own_to_services
        )
        own = [self.local.task(number) for number in self.local.tasks]
        no_time: Any = {"decision": {"seconds"}}
        assert [task.model_dump(exclude=no_time) for task in own] == [
            task.model_dump(exclude=no_time) for task in tasks
        ]


def labels() -> st.SearchStrategy[list[int] | list[str]]:
    ids = st.lists(st.integers(0, 4), min_size=1, max_size=24)
    names = st.lists(st.sampled_from(["ant", "bee", "cat", "dog"]), min_size=1, max_size=24)
    return st.one_of(ids, names)


def options() -> st.SearchStrategy[IngestOptions]:
    return st.builds(
        IngestOptions,
        ranking=st.sampled_from(["herding", "greedy_dpp", "reservoir", "ring", "random"]),
        seed=st.integers(0, 3),
        block=st.sampled_from([None, 4]),
    )


def where(named: dict[str, Any]) -> Where:
    """What the service makes of the same names."""
    others = {name: value for name, value in named.items() if name != "key"}
    return Where(**others, keys=(named["key"],) if "key" in named else None)


def named() -> st.SearchStrategy[dict[str, Any]]:
    """Exemplars, by class and task or by key."""
    by_class = st.fixed_dictionaries({"class_id": st.integers(0, 4)}, optional={"task": st.integers(0, 2)})
    return st.one_of(by_class, st.builds(lambda number: {"key": f"{number:010d}"}, st.integers(0, 9)))


FIELDS = {"key": "utf8", "logits": "float16 [3]", "boxes": "float32 [any, 4]", "weight": "float32 finite"}


def fields_of(number: int, declared: dict[str, str], images: int) -> dict[str, Any] | None:
    """What an upload brings; keys are filled in."""
    generator = np.random.default_rng(number)
    made: dict[str, Any] = {
        "logits": generator.normal(size=(images, 3)).astype(np.float16),
        "boxes": [generator.normal(size=(count, 4)).astype(np.float32) for count in generator.integers(0, 3, images)],
        "weight": generator.normal(size=images).astype(np.float32),
    }
    return {name: made[name] for name in declared if name in made} or None


def steps() -> st.SearchStrategy[list[tuple[Any, ...]]]:
    upload = st.tuples(st.just("upload"), st.integers(0, 2), labels(), options())
    return st.lists(
        st.one_of(
            upload,
            upload,
            upload,
            st.tuples(st.just("delete_task"), st.integers(0, 2)),
            st.tuples(st.just("change_budget"), st.integers(500, 8000)),
            st.tuples(st.just("rename"), st.dictionaries(st.integers(0, 6), st.sampled_from("bcd"), max_size=2)),
            st.tuples(st.just("fork"), st.none() | st.integers(500, 8000)),
            st.tuples(st.just("remove"), named()),
            st.tuples(st.just("remove_one"), st.integers(0, 20)),
            st.tuples(st.just("relabel"), named(), st.integers(0, 4)),
        ),
        min_size=1,
        max_size=6,
    )


def policies() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "budget_bytes": st.integers(500, 8000),
            "per": st.sampled_from(["buffer", "class"]),
            "share_by": st.sampled_from(["class", "task", "none"]),
            "subsampling": st.sampled_from(["4:2:0", "4:4:4"]),
            "quality": st.sampled_from([None, None, 50]),
            "fields": st.just({}) | st.sets(st.sampled_from(sorted(FIELDS))).map(lambda n: {k: FIELDS[k] for k in n}),
        }
    )


def replay(shared: Service, policy: dict[str, Any], made: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        both = Both(shared, Path(folder), **policy)
        for number, (name, *arguments) in enumerate(made):
            if name == "upload":
                task, given, chosen = arguments
                brought = fields_of(number, policy["fields"], len(given))
                both.upload(task, pictures(number, len(given), SHAPE), given, chosen, brought)
            elif name != "rename" or arguments[0]:
                getattr(both, name)(*arguments)


RELAXED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@run_settings(max_examples=8, **RELAXED)  # type: ignore[arg-type]
@given(policies(), steps())
def test_local_buffer_and_service_hold_the_same_packs_after_any_changes(
    shared: Service, policy: dict[str, Any], made: list[tuple[Any, ...]]
) -> None:
    replay(shared, policy, made)


@pytest.mark.slow
@run_settings(max_examples=50, **RELAXED)  # type: ignore[arg-type]
@given(policies(), steps())
def test_local_buffer_and_service_hold_the_same_packs_after_fifty_sequences_of_changes(
    shared: Service, policy: dict[str, Any], made: list[tuple[Any, ...]]
) -> None:
    replay(shared, policy, made)


def test_one_shared_function_gives_the_same_packs(shared: Service, tmp_path: Path) -> None:
    both = Both(shared, tmp_path, budget_bytes=3000)
    projection = np.random.default_rng(0).normal(size=(16 * 16 * 3, 12)).astype(np.float32)

    def embed(images: UInt8Array) -> FloatArray:
        return (images.reshape(len(images), -1) @ projection).astype(np.float32)

    for number in range(4):
        images = pictures(number, 30, SHAPE)
        class_ids = np.arange(30) % 3
        chosen = IngestOptions(ranking="herding", block=4)
        both.local.add(number % 2, images, class_ids, options=chosen, embed=embed, embed_name="a projection")
        upload = Upload(number % 2, ArrayImages(images, class_ids), chosen)
        embedder = FunctionEmbedder("a projection", embed)
        commit(
            shared.database,
            shared.store,
            both.name,
            lambda before, u=upload, e=embedder: add(before, u, e),  # type: ignore[misc]
        )
        both.check()
