"""Maps of tasks: exact axes, the same each time, with the originals beside what is stored."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from engram import tar
from engram.oversight import TaskMap
from engram.schemas import IngestOptions
from engram_service import maps
from tests.contents import create, fill, pictures
from tests.servers import ServiceThread
from tests.uploads import final, queue, work_through

pytestmark = pytest.mark.slow


def read(client: httpx.Client, query: str = "", task: int = 0) -> TaskMap:
    answer = client.get(f"/v1/buffers/b/tasks/{task}/map{query}")
    assert answer.status_code == 200, answer.text
    return TaskMap.model_validate(answer.json())


def upload(served: ServiceThread, count: int = 30, budget_bytes: int = 10**6, quality: int = 75) -> None:
    """Buffer "b", whose task 0 has pictures of two classes and their originals."""
    state = served.state
    create(state.database, budget_bytes=budget_bytes, quality=quality)
    body = b"".join(tar.write(pictures(0, count), np.arange(count) % 2))
    queued = queue(state.database, served.settings, body, options=IngestOptions(ranking="ring"))
    work_through(state.database, state.store, served.settings)
    assert final(state.database, queued).state == "committed"


def test_the_axes_are_those_of_largest_variance_and_have_one_sign() -> None:
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(40, 6)) * [1, 9, 2, 1, 5, 1]).astype(np.float32)
    points, explained = maps.principal_axes(features)
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(np.abs(points), np.abs(centred @ axes[:2].T))
    assert explained == pytest.approx((values[:2] ** 2).sum() / (values**2).sum())
    assert np.array_equal(maps.principal_axes(features)[0], points)
    # Seen from the other side the points are where they were, mirrored; the directions are not.
    assert np.allclose(maps.principal_axes(-features)[0], -points)


def test_exemplars_and_originals_lie_on_one_map(client: httpx.Client, served: ServiceThread) -> None:
    upload(served)
    found = read(client)
    assert (found.method, found.exemplars, len(found.points)) == ("pca", 30, 30)
    rows = {
        (each["pack"], each["row"]): each["class_id"]
        for each in client.get("/v1/buffers/b/exemplars").json()["exemplars"]
    }
    assert {(each.pack, each.row): each.class_id for each in found.points} == rows
    assert Counter(each.class_id for each in found.originals) == {0: 15, 1: 15}
    assert max(max(abs(each.x), abs(each.y)) for each in (*found.points, *found.originals)) <= 1
    stored = np.array([(each.x, each.y) for each in found.points])
    originals = np.array([(each.x, each.y) for each in found.originals])
    nearest = np.linalg.norm(stored[:, None] - originals[None], axis=2).min(axis=1)
    assert np.median(nearest) < 0.1, "a stored image lies near its original"
    assert read(client) == found


def test_of_many_exemplars_some_are_drawn_always_the_same(
    client: httpx.Client, served: ServiceThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "MAX_POINTS", 10)
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 20, 3: 15})
    found = read(client)
    assert (found.exemplars, len(found.points), found.originals) == (35, 10, [])
    served.state.replay.forget("b")
    assert read(client) == found


def test_a_new_generation_has_a_new_map(client: httpx.Client, served: ServiceThread) -> None:
    upload(served)
    before = read(client)
    client.delete("/v1/buffers/b/exemplars?class_id=1").raise_for_status()
    after = read(client)
    assert after.generation == before.generation + 1
    assert {each.class_id for each in (*after.points, *after.originals)} == {0}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_very_few_exemplars_have_a_map_too(client: httpx.Client, served: ServiceThread, count: int) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: count})
    assert len(read(client).points) == count


@pytest.mark.slow
def test_tsne_is_used_where_its_library_is(client: httpx.Client, served: ServiceThread) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn makes maps by t-SNE: pip install 'engram[maps]'")
    upload(served)
    found = read(client, "?method=tsne")
    assert (found.method, found.explained_ratio, len(found.points)) == ("tsne", None, 30)
    assert "tsne" in found.methods


def test_what_is_not_installed_is_said(
    client: httpx.Client, served: ServiceThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 3})
    monkeypatch.setitem(maps._LIBRARIES, "umap", "no_such_library")
    answer = client.get("/v1/buffers/b/tasks/0/map?method=umap")
    assert answer.status_code == 422
    assert "engram[maps]" in answer.json()["detail"]
    assert "umap" not in read(client).methods


def test_a_task_of_which_nothing_is_intact_has_no_map(client: httpx.Client, served: ServiceThread) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 3})
    digest = client.get("/v1/buffers/b/manifest").json()["packs"][0]["digest"]
    served.state.store.delete(digest)
    served.state.cache.forget(digest)
    assert client.get("/v1/buffers/b/tasks/0/map").status_code == 503


@pytest.mark.parametrize(
    ("path", "status"), [("b/tasks/9/map", 404), ("x/tasks/0/map", 404), ("b/tasks/0/map?method=x", 422)]
)
def test_what_has_no_map_is_a_problem(client: httpx.Client, served: ServiceThread, path: str, status: int) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 3})
    assert client.get(f"/v1/buffers/{path}").status_code == status


def test_whoever_waits_for_maps_leaves_threads_to_others(
    client: httpx.Client, served: ServiceThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(served)
    make, may_end = maps._made, threading.Event()

    def slow(*given: Any) -> TaskMap:
        may_end.wait(60)
        return make(*given)

    monkeypatch.setattr(maps, "_made", slow)
    with ThreadPoolExecutor(60) as threads:
        asked = [threads.submit(client.get, "/v1/buffers/b/tasks/0/map") for _ in range(60)]
        try:
            assert client.get("/v1/buffers", timeout=45).status_code == 200
        finally:
            may_end.set()
        answers = [each.result() for each in asked]
    assert {answer.status_code for answer in answers} == {200, 503}
    assert {answer.headers["Retry-After"] for answer in answers if answer.status_code == 503} == {"5"}
    assert client.get("/v1/buffers/b/tasks/0/map").status_code == 200
