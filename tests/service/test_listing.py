"""Filters, pages and histograms of exemplars with fields, against looking at each of them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import memory
from engram.errors import InvalidRequest
from engram.fields import Schema
from engram.packs import PackCache
from engram.schemas import BufferCreate, Exemplar, ExemplarPage, IngestOptions
from engram.selection.embedding import BuiltinEmbedder
from engram.selection.images import ArrayImages
from engram_service import buffers, filters, listing
from engram_service.commit import commit
from engram_service.database import Database
from engram_service.filters import Condition, Filters
from engram_service.listing import histogram, page
from engram_service.replay import Replay, View
from engram_service.settings import Settings
from engram_service.storage import PackStore
from tests.contents import pictures
from tests.servers import ServiceThread

FIELDS = {
    "score": "float32",
    "number": "int16",
    "flag": "bool",
    "key": "utf8",
    "note": "utf8",
    "boxes": "float32 [any, 4]",
    "logits": "float16 [3]",
}
SCHEMA = Schema.declare(FIELDS)
TASKS = {0: {0: 40, 1: 25}, 3: {1: 30, 7: 12}}
NOTES = ("", "a", "a:b", "ab", "ä", "äb", "日本")


class Stored(NamedTuple):
    """An exemplar and what it has in its fields."""

    exemplar: Exemplar
    cells: dict[str, Any]


def columns(count: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    score = rng.choice(np.array([-1.5, 0, 0.1, 2.25, np.nan, np.inf, 1e30], np.float32), count)
    return {
        "score": score,
        "number": rng.integers(-3, 4, count).astype(np.int16),
        "flag": rng.integers(0, 2, count).astype(bool),
        "key": [f"train/{seed}/{n:03d}" for n in range(count)],
        "note": [NOTES[n] for n in rng.integers(0, len(NOTES), count)],
        "boxes": [rng.normal(size=(int(n), 4)).astype(np.float32) for n in rng.integers(0, 5, count)],
        "logits": rng.normal(size=(count, 3)).astype(np.float16),
    }


def fill_with_fields(database: Database, store: PackStore, name: str = "b") -> None:
    with database.session() as session:
        buffers.create(session, BufferCreate(name=name, budget_bytes=10**7, quality=50, fields=FIELDS))
    for task, counts in TASKS.items():
        class_ids = np.repeat(list(counts), list(counts.values()))
        images = ArrayImages(
            pictures(task, len(class_ids)), class_ids, SCHEMA.columns(columns(len(class_ids), task), len(class_ids))
        )
        upload = memory.Upload(task, images, IngestOptions(ranking="ring"))
        commit(database, store, name, lambda content, u=upload: memory.add(content, u, BuiltinEmbedder((16, 16, 3))))  # type: ignore[misc]


@pytest.fixture(scope="module", params=["in memory", "on disk"])
def replay(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replay]:
    given_settings = Settings(data_dir=tmp_path_factory.mktemp("listing") / "data")
    given_settings.make_folders()
    database, store = Database(given_settings), PackStore(given_settings.packs_dir)
    database.migrate()
    fill_with_fields(database, store)
    cache = PackCache(store, 10**8 if request.param == "in memory" else 0)
    found = Replay(database, cache, given_settings)
    found.view("b", None)
    cache.settle()
    yield found
    cache.close()
    database.close()


@pytest.fixture(scope="module")
def view(replay: Replay) -> View:
    return replay.view("b", None)


@pytest.fixture(scope="module")
def stored(replay: Replay, view: View) -> list[Stored]:
    everything = page(replay, view, Filters(), limit=1000, after=None).exemplars
    entries = {view.digests[at]: view.entry(at) for at in range(len(view.digests))}
    return [Stored(each, replay.fields(entries[each.pack], each.row)) for each in everything]


def walk(replay: Replay, view: View, wanted: Filters, limit: int) -> list[Exemplar]:
    found: list[Exemplar] = []
    after = None
    while True:
        some = page(replay, view, wanted, limit=limit, after=after)
        assert len(some.exemplars) <= limit
        found += some.exemplars
        if some.next is None:
            return found
        task, class_id, rank = map(int, some.next.split("."))
        assert after is None or (task, class_id, rank) > after, "pages go on"
        after = task, class_id, rank


def holds(text: str, cells: dict[str, Any]) -> bool:
    """What a condition means, said slowly."""
    name, operation, value = text.split(":", 2)
    cell = cells[name]
    if isinstance(cell, str):
        return {"eq": cell == value, "ne": cell != value, "prefix": cell.startswith(value)}[operation]
    wanted: Any = {"true": True, "false": False}.get(value)
    if wanted is None:
        wanted = float(value) if name == "score" else int(value)
    if name == "score":
        wanted = np.float32(wanted)
    return bool(getattr(operator, operation)(cell, wanted))


conditions = st.one_of(
    st.builds(
        "score:{}:{}".format,
        st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge"]),
        st.sampled_from(["0", "0.1", "-1.5", "2.25", "1e30", "7"]),
    ),
    st.builds("number:{}:{}".format, st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge"]), st.integers(-5, 70000)),
    st.builds("flag:{}:{}".format, st.sampled_from(["eq", "ne"]), st.sampled_from(["true", "false"])),
    st.builds("note:{}:{}".format, st.sampled_from(["eq", "ne", "prefix"]), st.sampled_from([*NOTES, "b", "日"])),
    st.builds("key:{}:{}".format, st.sampled_from(["eq", "prefix"]), st.sampled_from(["train/3/", "train/0/007", ""])),
)


@given(
    where=st.lists(conditions, max_size=3),
    task=st.sampled_from([None, None, 0, 3, 5]),
    class_id=st.sampled_from([None, None, 0, 1, 7, 9]),
    low=st.sampled_from([None, 0, 120, 150, 10**6]),
    high=st.sampled_from([None, None, 150, 180, 0]),
    limit=st.integers(1, 120),
)
@settings(max_examples=30)
def test_filters_find_what_looking_at_each_exemplar_finds(
    replay: Replay,
    view: View,
    stored: list[Stored],
    where: list[str],
    task: int | None,
    class_id: int | None,
    low: int | None,
    high: int | None,
    limit: int,
) -> None:
    expected = [
        each.exemplar
        for each in stored
        if task in (None, each.exemplar.task)
        and class_id in (None, each.exemplar.class_id)
        and (low is None or each.exemplar.bytes >= low)
        and (high is None or each.exemplar.bytes <= high)
        and all(holds(text, each.cells) for text in where)
    ]
    wanted = Filters(task, class_id, low, high, filters.parse(where, SCHEMA))
    assert walk(replay, view, wanted, limit) == expected
    by_class = histogram(replay, view, wanted, "class")
    assert {each.value: each.exemplars for each in by_class.bins} == Counter(each.class_id for each in expected)
    assert by_class.counted == len(expected)
    sizes = histogram(replay, view, wanted, "bytes")
    assert sum(each.exemplars for each in sizes.bins) == len(expected)
    for each in sizes.bins:
        assert each.low is not None
        assert each.high is not None
        assert each.exemplars == sum(each.low <= found.bytes < each.high for found in expected)


def test_everything_is_listed_with_its_key(stored: list[Stored]) -> None:
    assert [(each.exemplar.task, each.exemplar.class_id) for each in stored] == [
        (task, class_id) for task, counts in TASKS.items() for class_id, n in counts.items() for _ in range(n)
    ]
    assert all(each.exemplar.key == each.cells["key"] for each in stored)


def test_a_page_that_looked_at_enough_says_where_to_go_on(
    replay: Replay, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "SCAN_EXEMPLARS", 10)
    wanted = Filters(where=filters.parse(["key:eq:train/3/000"], SCHEMA))
    first = page(replay, view, wanted, limit=5, after=None)
    assert (first.exemplars, first.next) == ([], "0.0.9")
    assert [each.key for each in walk(replay, view, wanted, 5)] == ["train/3/000"]


def test_a_field_is_counted_by_value(replay: Replay, view: View, stored: list[Stored]) -> None:
    notes = histogram(replay, view, Filters(), "field:note")
    assert {each.value: each.exemplars for each in notes.bins} == Counter(each.cells["note"] for each in stored)
    flags = histogram(replay, view, Filters(task=3), "field:flag")
    told = Counter(bool(each.cells["flag"]) for each in stored if each.exemplar.task == 3)
    assert {each.value: each.exemplars for each in flags.bins} == told
    scores = histogram(replay, view, Filters(), "field:score")
    assert scores.others == sum(not np.isfinite(each.cells["score"]) for each in stored)
    assert scores.counted == len(stored)


def test_many_different_numbers_are_counted_in_bins(
    replay: Replay, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_NUMBERS", 3)
    view.remembered.clear()
    found = histogram(replay, view, Filters(), "field:number")
    view.remembered.clear()
    assert [(each.low, each.high) for each in found.bins] == [(-3, -1), (-1, 2), (2, 4)]
    assert sum(each.exemplars for each in found.bins) == found.counted == found.exemplars


@given(values=st.lists(st.floats(-3, 3, width=32), min_size=40, max_size=80, unique=True))
@settings(max_examples=30)
def test_bins_of_numbers_hold_what_filters_by_their_ends_find(values: list[float]) -> None:
    column = np.array(values, np.float32)
    bins = listing._numbers(column)
    assert sum(each.exemplars for each in bins) == len(values)
    for each in bins:
        low, high = (
            Condition.parse(f"score:{op}:{end!r}", SCHEMA) for op, end in (("ge", each.low), ("lt", each.high))
        )
        data, places = np.frombuffer(column.tobytes(), np.uint8), np.arange(len(column)) * 4
        sizes = np.full(len(column), 4)
        assert (low.holds(data, places, sizes) & high.holds(data, places, sizes)).sum() == each.exemplars


def test_of_very_many_exemplars_a_field_is_counted_on_evenly_spread_ones(
    replay: Replay, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "COUNTED_FIELDS", 30)
    view.remembered.clear()
    found = histogram(replay, view, Filters(), "field:flag")
    view.remembered.clear()
    assert (found.exemplars, found.counted) == (107, 27)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("score", "is not like"),
        ("score:ge", "is not like"),
        ("nothing:eq:1", "no field 'nothing'"),
        ("score:prefix:1", "none of"),
        ("note:ge:a", "none of"),
        ("flag:lt:true", "none of"),
        ("flag:eq:1", "neither true nor false"),
        ("score:eq:nan", "no number"),
        ("score:eq:1e39", "no number"),
        ("number:eq:x", "no number"),
        ("boxes:eq:1", "single values"),
        ("logits:eq:1", "single values"),
    ],
)
def test_a_condition_that_says_nothing_is_told(text: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        filters.parse([text], SCHEMA)


def test_over_http_filters_are_in_the_query(client: httpx.Client, served: ServiceThread, tmp_path: Path) -> None:
    fill_with_fields(served.state.database, served.state.store)
    query: dict[str, Any] = {"where": ["flag:eq:true", "note:eq:a:b"], "min_bytes": 100, "limit": 200}
    found = ExemplarPage.model_validate(client.get("/v1/buffers/b/exemplars", params=query).json()).exemplars
    assert found
    for each in found:
        cells = client.get(f"/v1/buffers/b/exemplars/{each.pack}/{each.row}/fields").json()
        assert (cells["flag"], cells["note"]) == (True, "a:b")
    counted = client.get("/v1/buffers/b/histogram", params={**query, "of": "field:number"}).json()
    assert sum(each["exemplars"] for each in counted["bins"]) == len(found)
    wrongs: list[dict[str, Any]] = [{"where": "x"}, {"min_bytes": -1}, {"where": ["flag:eq:true"] * 9}]
    for wrong in wrongs:
        assert client.get("/v1/buffers/b/exemplars", params=wrong).status_code == 422
    for wrong in ({"of": "x"}, {"of": "field:boxes"}, {"of": "field:x"}):
        assert client.get("/v1/buffers/b/histogram", params=wrong).status_code == 422


def test_damaged_exemplars_pass_no_filter_and_are_not_counted(client: httpx.Client, served: ServiceThread) -> None:
    fill_with_fields(served.state.database, served.state.store)
    digest = client.get("/v1/buffers/b/manifest").json()["packs"][0]["digest"]
    served.state.store.delete(digest)
    served.state.cache.forget(digest)
    listed = client.get("/v1/buffers/b/exemplars?min_bytes=0&limit=500").json()["exemplars"]
    assert {each["task"] for each in listed} == {3}
    assert client.get("/v1/buffers/b/histogram?of=bytes").json()["counted"] == len(listed)
