"""Draws over HTTP: pure, within limits, honest about damage, and clear about bad requests."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from engram import batch, pack, tar
from engram.draw import STRATEGIES, Layout, Request, plan
from engram.schemas import Manifest
from engram_service.collect import collect
from engram_service.database import Database
from engram_service.settings import Settings
from tests.contents import Filling, UInt8Array, create, fill
from tests.servers import ServiceProcess, ServiceThread, http

DRAW = "/v1/buffers/b/draw"


def three_tasks(database: Database, settings: Settings) -> dict[int, UInt8Array]:
    """Buffer "b" with three tasks; the stored pixels of each, in row order."""
    create(database)
    tasks = {0: {0: 20, 1: 10}, 1: {2: 5}, 2: {0: 7, 3: 8}}
    return {task: fill(database, settings, task, counts) for task, counts in tasks.items()}


@pytest.fixture
def served(
    request: pytest.FixtureRequest, hold: Callable[[Filling], Any], serve_thread: Callable[..., ServiceThread]
) -> ServiceThread:
    """A service that holds from its start what `pixels` says, where a test asks for that."""
    if "pixels" in request.fixturenames:
        hold(three_tasks)
    return serve_thread()


@pytest.fixture
def pixels(once: Callable[[Filling], tuple[Path, Any]]) -> dict[int, UInt8Array]:
    """Those of `three_tasks`, which the service holds."""
    found: dict[int, UInt8Array] = once(three_tasks)[1]
    return found


@pytest.fixture(scope="module")
def asked(
    once: Callable[[Filling], tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of a service with `three_tasks` for requests that change nothing."""
    folder = shutil.copytree(once(three_tasks)[0], tmp_path_factory.mktemp("asked") / "data")
    served = ServiceThread(Settings(data_dir=folder))
    with http(served) as client:
        yield client
    served.stop()


def damage(served: ServiceThread, task: int) -> str:
    """One bit of one exemplar of the task's pack is another one; returns the pack's digest."""
    packs = Manifest.model_validate(httpx.get(f"{served.url}/v1/buffers/b/manifest").json()).packs
    digest: str = next(found.digest for found in packs if found.task == task)
    path = served.state.store.path(digest)
    data = bytearray(path.read_bytes())
    exemplars = pack.parse(bytes(data))
    # Not where the bit would make or break a marker: that costs the whole strip (tests of `pack.salvage`).
    first, length = int(exemplars.starts[3]), int(exemplars.lengths[3])
    at = next(at for at in range(first + 1, first + length) if data[at - 1] < 0xE0 and data[at] < 0xE0)
    data[at] ^= 0x10
    path.write_bytes(data)
    return digest


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_draw_delivers_what_the_plan_says(client: httpx.Client, pixels: dict[int, UInt8Array], strategy: str) -> None:
    manifest = Manifest.model_validate(client.get("/v1/buffers/b/manifest").json())
    answer = client.get(f"{DRAW}?size=12&seed=5&step=3&strategy={strategy}&rank=1&world_size=2")
    assert answer.headers["Content-Type"] == "application/vnd.engram.strips"
    drawn = batch.decode(answer.content)
    wanted = Request(12, seed=5, step=3, strategy=strategy, rank=1, world_size=2)  # type: ignore[arg-type]
    planned = plan(Layout(manifest.packs), wanted)
    for name in ("tasks", "rows", "class_ids"):
        assert np.array_equal(getattr(drawn, name), getattr(planned, name))
    assert answer.content.count(b"\xff\xd8\xff\xef") == 1
    expected = np.stack([pixels[task][row] for task, row in zip(drawn.tasks, drawn.rows, strict=True)])
    assert np.array_equal(drawn.images, expected)
    assert answer.headers["Engram-Exemplars"] == str(len(drawn))
    assert answer.headers["Engram-Generation"] == "3"
    assert "Engram-Damaged" not in answer.headers


def test_filters_keep_and_drop_tasks(client: httpx.Client, pixels: dict[int, UInt8Array]) -> None:
    only = batch.decode(client.get(f"{DRAW}?size=10&tasks=0,1").content)
    assert set(only.tasks.tolist()) == {0, 1}
    # The task being learned is excluded before it holds anything.
    without = batch.decode(client.get(f"{DRAW}?size=10&exclude_tasks=0,9").content)
    assert set(without.tasks.tolist()) == {1, 2}


@pytest.mark.slow
def test_the_same_url_gives_the_same_bytes_from_another_process(
    client: httpx.Client, served: ServiceThread, make_service: Callable[..., ServiceProcess]
) -> None:
    database, settings = served.state.database, served.settings
    create(database)
    fill(database, settings, 0, {0: 30, 1: 30})
    fill(database, settings, 1, {2: 30})
    urls = [f"{DRAW}?size=20&seed=9&step={step}&generation=1" for step in range(5)]
    first = [client.get(url).content for url in urls]
    with http(make_service("--workers", "0", data_dir=settings.data_dir)) as other:
        assert [other.get(url).content for url in urls] == first
        # While a later generation exists.
        fill(database, settings, 2, {3: 5})
        assert [other.get(url).content for url in urls] == first


def test_draws_from_packs_that_do_not_fit_the_cache_are_the_same(
    serve_thread: Callable[..., ServiceThread],
) -> None:
    roomy, cramped = serve_thread(), serve_thread(cache_bytes=0)
    create(roomy.state.database)
    for task in range(3):
        fill(roomy.state.database, roomy.settings, task, {task: 10})
    for step in range(4):
        url = f"{DRAW}?size=9&step={step}&generation=3"
        assert httpx.get(cramped.url + url).content == httpx.get(roomy.url + url).content
    assert roomy.state.cache.settle(60)
    assert cramped.state.cache.bytes < roomy.state.cache.bytes


def test_an_older_generation_answers_until_it_is_collected(
    client: httpx.Client, served: ServiceThread, pixels: dict[int, UInt8Array]
) -> None:
    old = f"{DRAW}?size=5&generation=2"
    before = client.get(old).content
    assert client.delete("/v1/buffers/b/tasks/1").status_code == 204
    assert client.get(old).content == before
    collect(served.state.database, served.state.store, Settings(data_dir=served.settings.data_dir, grace_s=0))
    served.state.replay.forget("b")  # else the generation is answered from memory for another second
    problem = client.get(old).json()
    assert (problem["status"], problem["current_generation"]) == (404, 4)
    assert "has been collected; the current one is 4" in problem["detail"]
    assert client.get(f"{DRAW}?size=5&generation=4").status_code == 200


def test_a_tar_holds_the_same_exemplars(client: httpx.Client, pixels: dict[int, UInt8Array]) -> None:
    url = f"{DRAW}?size=12&seed=4&strategy=class_balanced"
    drawn = batch.decode(client.get(url).content)
    answer = client.get(url, headers={"Accept": "application/x-tar"})
    assert answer.headers["Content-Type"] == "application/x-tar"
    members = list(tar.read(io.BytesIO(answer.content)))
    assert [member.class_id for member in members] == drawn.class_ids.tolist()
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as opened:
        names = opened.getnames()
    assert names[:2] == [members[0].key + ".jpg", members[0].key + ".cls"]


@pytest.mark.parametrize("accept", ["image/jpeg", "image/avif,image/webp,image/*,*/*;q=0.8"])
def test_a_picture_shows_the_same_exemplars_from_top_to_bottom(
    client: httpx.Client, pixels: dict[int, UInt8Array], accept: str
) -> None:
    url = f"{DRAW}?size=12&seed=4&strategy=task_balanced"
    drawn = batch.decode(client.get(url).content)
    answer = client.get(url, headers={"Accept": accept})
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert answer.headers["Engram-Exemplars"] == "12"
    assert b"\xff\xc4" in answer.content, "a decoder may know no standard Huffman tables"
    shown = simplejpeg.decode_jpeg(answer.content, fastupsample=True)
    assert np.array_equal(shown, drawn.images.reshape(12 * 16, 16, 3))


def test_what_does_not_fit_one_picture_is_a_problem_that_says_so(client: httpx.Client, served: ServiceThread) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 3}, shape=(20_000, 8, 3))
    answer = client.get(f"{DRAW}?size=4", headers={"Accept": "image/jpeg"})
    assert (answer.status_code, answer.json()["max_images"]) == (422, 3)
    assert "one picture holds 1 to 3 exemplars of 20000x8, not 4" in answer.json()["detail"]
    assert client.get(f"{DRAW}?size=3", headers={"Accept": "image/jpeg"}).status_code == 200
    digest = client.get("/v1/buffers/b/manifest").json()["packs"][0]["digest"]
    assert client.get(f"/v1/packs/{digest}", headers={"Accept": "image/jpeg"}).status_code == 200


def test_of_a_damaged_pack_the_intact_exemplars_are_served(
    client: httpx.Client, served: ServiceThread, pixels: dict[int, UInt8Array]
) -> None:
    digest = damage(served, 0)
    assert client.get("/healthz").json()["status"] == "ok"
    answer = client.get(f"{DRAW}?size=50&strategy=epoch")
    drawn = batch.decode(answer.content)
    assert (len(drawn), answer.headers["Engram-Damaged"]) == (49, "1")
    for task, row, image in zip(drawn.tasks.tolist(), drawn.rows.tolist(), drawn.images, strict=True):
        assert np.array_equal(image, pixels[task][row])
    health = client.get("/healthz").json()
    assert (health["status"], health["damaged_packs"]) == ("degraded", [digest])


def test_a_draw_without_one_intact_exemplar_is_unavailable_and_others_go_on(
    client: httpx.Client, served: ServiceThread, pixels: dict[int, UInt8Array]
) -> None:
    manifest = Manifest.model_validate(client.get("/v1/buffers/b/manifest").json())
    served.state.store.delete(manifest.packs[1].digest)
    answer = client.get(f"{DRAW}?size=3&tasks=1")
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (503, "unavailable")
    assert "Retry-After" in answer.headers
    assert client.get(f"{DRAW}?size=3&tasks=0,2").status_code == 200
    partial = client.get(f"{DRAW}?size=50&strategy=epoch")
    assert partial.headers["Engram-Damaged"] == "5"
    assert client.get("/healthz").json()["damaged_packs"] == [manifest.packs[1].digest]


def test_a_pack_that_is_put_back_is_whole_again(
    client: httpx.Client, served: ServiceThread, pixels: dict[int, UInt8Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.model_validate(client.get("/v1/buffers/b/manifest").json())
    data = served.state.store.get(manifest.packs[0].digest)
    damage(served, 0)
    assert client.get(f"{DRAW}?size=50&strategy=epoch").headers["Engram-Damaged"] == "1"
    assert served.state.store.put(data) == manifest.packs[0].digest
    monkeypatch.setattr("engram.packs.RECHECK_S", 0.0)
    assert "Engram-Damaged" not in client.get(f"{DRAW}?size=50&strategy=epoch").headers
    assert client.get("/healthz").json()["status"] == "ok"


@pytest.mark.parametrize(
    ("query", "status", "says"),
    [
        ("", 422, "needs `size`"),
        ("size=0", 422, "at least 1"),
        ("size=-3", 422, "at least 1"),
        ("size=8193", 422, "at most 8192"),
        ("size=9999999999999999999999999", 422, "must be an integer"),
        ("size=1.5", 422, "must be an integer"),
        ("size=٣", 422, "must be an integer"),
        ("size=1&size=2", 422, "given twice"),
        ("size=1&sead=2", 422, "no parameter 'sead'"),
        ("size=1&seed=-1", 422, "seed must lie in"),
        ("size=1&seed=9223372036854775808", 422, "seed must lie in"),
        ("size=1&strategy=best", 422, "'best' is not one of"),
        ("size=1&tasks=", 409, "no exemplars"),
        ("size=1&tasks=1,,2", 422, "must be an integer"),
        ("size=1&tasks=7", 404, "task 7 holds no exemplars"),
        ("size=1&exclude_tasks=0,1,2", 409, "no exemplars"),
        ("size=1&rank=1", 422, "rank 1 of 1"),
        ("size=1&world_size=0", 422, "rank 0 of 0"),
        ("size=8192&world_size=1000000000", 422, "global batch"),
        ("size=8000&strategy=per_task", 422, "24000 exemplars"),
        ("size=1&generation=99", 404, "is yet to come; the current one is 3"),
        ("size=1&generation=-1", 404, "has been collected"),
        ("size=%ff", 422, "cannot be read"),
        ("size=%00", 422, "must be an integer"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(asked: httpx.Client, query: str, status: int, says: str) -> None:
    answer = asked.get(f"{DRAW}?{query}")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (answer.status_code, says in answer.json()["detail"]) == (status, True), answer.text


def test_the_limits_of_a_draw_are_settings(serve_thread: Callable[..., ServiceThread]) -> None:
    served = serve_thread(max_draw=4, max_global_draw=6)
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 10})
    assert httpx.get(f"{served.url}{DRAW}?size=4").status_code == 200
    problem = httpx.get(f"{served.url}{DRAW}?size=5").json()
    assert (problem["max_draw"], "ENGRAM_MAX_DRAW" in problem["detail"]) == (4, True)
    assert httpx.get(f"{served.url}{DRAW}?size=3&world_size=2").status_code == 200
    assert httpx.get(f"{served.url}{DRAW}?size=4&world_size=2").json()["max_global_draw"] == 6


TEXT = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.lists(st.integers(-3, 2**33), max_size=5).map(lambda numbers: ",".join(map(str, numbers))),
    st.text(max_size=12),
    st.sampled_from([*STRATEGIES, "", "1e3", "0x1", "NaN", "null", "true", " 1", "+1", "1_0"]),
)
NAMES = ["size", "seed", "step", "strategy", "tasks", "exclude_tasks", "rank", "world_size", "generation"]
QUERIES = st.lists(st.tuples(st.one_of(st.sampled_from(NAMES), st.text(max_size=4)), TEXT), max_size=12)


@hypothesis_settings(max_examples=50)
@given(pairs=QUERIES, path=st.sampled_from(["draw", "manifest", "exemplars", "exemplars/x/0", "export", "tasks/0"]))
def test_no_query_is_answered_with_a_defect(asked: httpx.Client, pairs: list[tuple[str, str]], path: str) -> None:
    query = "&".join(f"{quote(name, errors='replace')}={quote(text, errors='replace')}" for name, text in pairs)
    answer = asked.get(f"/v1/buffers/b/{path}?{query}")
    assert answer.status_code < 500, (query, answer.text)
    if answer.status_code >= 400:
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["detail"]


@hypothesis_settings(max_examples=20)
@given(query=st.binary(max_size=40), part=st.text(max_size=20), number=TEXT)
def test_no_address_is_answered_with_a_defect(asked: httpx.Client, query: bytes, part: str, number: str) -> None:
    name, index = quote(part, safe="", errors="replace"), quote(number, safe="", errors="replace")
    for path in (
        f"/v1/buffers/{name}",
        f"/v1/buffers/{name}/draw",
        f"/v1/buffers/b/tasks/{index}",
        f"/v1/packs/{name}",
        f"/v1/buffers/b/exemplars/{name}/{index}",
        f"/v1/extractors/{name}",
        f"/v1/ingests/{name}",
    ):
        answer = asked.get(f"{path}?{quote(query, safe='=&%+')}")
        assert answer.status_code < 500, (path, query, answer.text)


def test_the_pack_of_a_manifest_is_what_draws_are_made_of(client: httpx.Client, pixels: dict[int, UInt8Array]) -> None:
    manifest = Manifest.model_validate(client.get("/v1/buffers/b/manifest").json())
    packs = [pack.parse(client.get(f"/v1/packs/{entry.digest}").content) for entry in manifest.packs]
    wanted = Request(16, seed=1, strategy="task_balanced")
    parts = batch.collect(packs, plan(Layout(manifest.packs), wanted))
    assert client.get(f"{DRAW}?size=16&seed=1&strategy=task_balanced").content == batch.assemble(parts)
