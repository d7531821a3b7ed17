"""Single exemplars over HTTP: pages with filters and a cursor, and one as a picture."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from engram.schemas import Exemplar, ExemplarPage
from engram_service.database import Database
from engram_service.settings import Settings
from tests.contents import Filling, UInt8Array, create, fill
from tests.servers import ServiceThread

EXEMPLARS = "/v1/buffers/b/exemplars"


def three_tasks(database: Database, settings: Settings) -> dict[int, UInt8Array]:
    """Buffer "b" with three tasks; the stored pixels of each, in row order."""
    create(database)
    tasks = {0: {0: 4, 1: 3}, 1: {2: 5}, 4: {0: 2, 3: 1}}
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


def walk(client: httpx.Client, query: str) -> list[list[Exemplar]]:
    pages: list[list[Exemplar]] = []
    cursor = ""
    while True:
        page = ExemplarPage.model_validate(client.get(f"{EXEMPLARS}?{query}{cursor}").json())
        pages.append(page.exemplars)
        if page.next is None:
            return pages
        cursor = f"&cursor={page.next}"


def keys(exemplars: list[Exemplar]) -> list[tuple[int, int, int]]:
    return [(found.task, found.class_id, found.rank) for found in exemplars]


def test_pages_walk_everything_once_in_order(client: httpx.Client, pixels: dict[int, UInt8Array]) -> None:
    everything = keys(walk(client, "limit=1000")[0])
    assert everything == sorted(everything)
    assert len(everything) == 15
    for limit in (1, 4, 5, 14, 15):
        pages = walk(client, f"limit={limit}")
        assert [key for page in pages for key in keys(page)] == everything
        assert {len(page) for page in pages[:-1]} <= {limit}
        assert len(pages) == -(-15 // limit)


def test_filters_select_task_and_class(client: httpx.Client, pixels: dict[int, UInt8Array]) -> None:
    assert keys(walk(client, "limit=9&class_id=0")[0]) == [(0, 0, r) for r in range(4)] + [(4, 0, 0), (4, 0, 1)]
    assert [keys(page) for page in walk(client, "limit=1&task=4&class_id=0")] == [[(4, 0, 0)], [(4, 0, 1)]]
    assert walk(client, "task=9") == [[]]


def test_paging_goes_on_when_a_generation_comes_between(
    client: httpx.Client, served: ServiceThread, pixels: dict[int, UInt8Array]
) -> None:
    first = ExemplarPage.model_validate(client.get(f"{EXEMPLARS}?limit=8").json())
    client.delete("/v1/buffers/b/tasks/1").raise_for_status()
    rest = ExemplarPage.model_validate(client.get(f"{EXEMPLARS}?limit=8&cursor={first.next}").json())
    assert keys(rest.exemplars) == [(4, 0, 0), (4, 0, 1), (4, 3, 0)]


def test_an_exemplar_is_a_picture_of_its_pixels(client: httpx.Client, pixels: dict[int, UInt8Array]) -> None:
    found = walk(client, "limit=1000")[0][9]
    answer = client.get(f"{EXEMPLARS}/{found.pack}/{found.row}")
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answer.content)).size == (16, 16)
    # Viewers smooth chroma where a strip repeats it; without that the pixels are the same.
    shown = simplejpeg.decode_jpeg(answer.content, fastupsample=True)
    assert np.array_equal(shown, pixels[found.task][found.row])
    again = client.get(f"{EXEMPLARS}/{found.pack}/{found.row}", headers={"If-None-Match": answer.headers["ETag"]})
    assert again.status_code == 304


def test_sizes_are_what_an_exemplar_adds_to_a_pack(client: httpx.Client, pixels: dict[int, UInt8Array]) -> None:
    found = walk(client, "limit=1000&task=0")[0]
    task = client.get("/v1/buffers/b/tasks/0").json()
    for summary in task["classes"]:
        assert summary["bytes"] == sum(one.bytes for one in found if one.class_id == summary["class_id"])


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("?limit=0", 422),
        ("?limit=1001", 422),
        ("?cursor=1.2", 422),
        ("?cursor=", 422),
        ("?task=-1", 422),
        (f"/{'0' * 64}/0", 404),
        ("/x/0", 404),
        ("/x/y", 422),
    ],
)
def test_what_cannot_be_shown_is_a_problem(
    client: httpx.Client, pixels: dict[int, UInt8Array], path: str, status: int
) -> None:
    answer = client.get(EXEMPLARS + path)
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")


def test_a_row_beyond_the_pack_names_the_rows_there_are(client: httpx.Client, pixels: dict[int, UInt8Array]) -> None:
    found = walk(client, "limit=1000")[0][0]
    assert "rows 0..6, not 7" in client.get(f"{EXEMPLARS}/{found.pack}/7").json()["detail"]


def test_a_pack_of_another_buffer_is_not_found(
    client: httpx.Client, served: ServiceThread, pixels: dict[int, UInt8Array]
) -> None:
    create(served.state.database, "other")
    fill(served.state.database, served.settings, 0, {0: 1}, name="other", seed=99)
    digest = client.get("/v1/buffers/other/manifest").json()["packs"][0]["digest"]
    assert client.get(f"/v1/buffers/other/exemplars/{digest}/0").status_code == 200
    assert client.get(f"{EXEMPLARS}/{digest}/0").status_code == 404


def test_damaged_exemplars_are_listed_without_size_and_not_shown(
    client: httpx.Client, served: ServiceThread, pixels: dict[int, UInt8Array]
) -> None:
    digest = walk(client, "task=1")[0][0].pack
    served.state.store.delete(digest)
    served.state.cache.forget(digest)
    assert [one.bytes for one in walk(client, "task=1")[0]] == [0] * 5
    answer = client.get(f"{EXEMPLARS}/{digest}/0")
    assert (answer.status_code, answer.json()["row"]) == (503, 0)
