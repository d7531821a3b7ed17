"""Packs over HTTP: immutable, by range, verified, and honest when the disk is not."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image

from engram import pack
from engram.schemas import Manifest, PackEntry
from engram_service.database import Database
from engram_service.settings import Settings
from tests.contents import Filling, create, fill
from tests.servers import ServiceThread


def one_pack(database: Database, settings: Settings) -> None:
    """In buffer "b"."""
    create(database)
    fill(database, settings, 0, {0: 20})


@pytest.fixture
def served(
    request: pytest.FixtureRequest, hold: Callable[[Filling], Any], serve_thread: Callable[..., ServiceThread]
) -> ServiceThread:
    """A service that holds from its start what `entry` says, where a test asks for that."""
    if "entry" in request.fixturenames:
        hold(one_pack)
    return serve_thread()


@pytest.fixture
def entry(client: httpx.Client) -> PackEntry:
    """The only pack of buffer "b"."""
    return Manifest.model_validate(client.get("/v1/buffers/b/manifest").json()).packs[0]


def test_a_pack_is_its_name_and_may_be_kept_for_ever(client: httpx.Client, entry: PackEntry) -> None:
    answer = client.get(f"/v1/packs/{entry.digest}")
    assert len(answer.content) == entry.bytes
    digest = hashlib.sha256(answer.content)
    assert digest.hexdigest() == entry.digest
    assert answer.headers["Content-Type"] == "application/vnd.engram.strips"
    assert answer.headers["ETag"] == f'"{entry.digest}"'
    assert answer.headers["Repr-Digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert "immutable" in answer.headers["Cache-Control"]


def test_a_pack_that_the_client_holds_is_not_sent_again(client: httpx.Client, entry: PackEntry) -> None:
    for held in (f'"{entry.digest}"', f'"other", W/"{entry.digest}"', "*"):
        again = client.get(f"/v1/packs/{entry.digest}", headers={"If-None-Match": held})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get(f"/v1/packs/{entry.digest}", headers={"If-None-Match": '"other"'}).status_code == 200


def test_a_pack_is_a_picture_too(client: httpx.Client, entry: PackEntry) -> None:
    url, asked = f"/v1/packs/{entry.digest}", {"Accept": "image/jpeg"}
    plain, answer = client.get(url), client.get(url, headers=asked)
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert {plain.headers["Vary"], answer.headers["Vary"]} == {"Accept"}
    exemplars = pack.parse(plain.content)
    assert answer.content == exemplars.loose().picture()
    assert Image.open(io.BytesIO(answer.content)).size == (16, 20 * 16)
    held = answer.headers["ETag"]
    assert held != plain.headers["ETag"]
    assert client.get(url, headers=asked | {"If-None-Match": held}).status_code == 304
    assert client.get(url, headers={"If-None-Match": held}).status_code == 200


def test_a_pack_beyond_one_picture_is_a_problem_as_a_picture(client: httpx.Client, served: ServiceThread) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 4}, shape=(20_000, 8, 3))
    digest = client.get("/v1/buffers/b/manifest").json()["packs"][0]["digest"]
    assert client.get(f"/v1/packs/{digest}").status_code == 200
    problem = client.get(f"/v1/packs/{digest}", headers={"Accept": "image/jpeg"}).json()
    assert (problem["status"], problem["max_images"]) == (422, 3)


@pytest.mark.parametrize(
    ("asked", "part"),
    [("bytes=0-9", slice(0, 10)), ("bytes=10-", slice(10, None)), ("bytes=-7", slice(-7, None))],
)
def test_a_broken_download_goes_on_where_it_stopped(
    client: httpx.Client, entry: PackEntry, asked: str, part: slice
) -> None:
    whole = client.get(f"/v1/packs/{entry.digest}").content
    answer = client.get(f"/v1/packs/{entry.digest}", headers={"Range": asked, "If-Range": f'"{entry.digest}"'})
    assert (answer.status_code, answer.content) == (206, whole[part])
    assert answer.headers["Content-Range"].endswith(f"/{entry.bytes}")


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=-", "bytes", "lines=1-2", "bytes=0-1,4-5", "bytes=" + "9" * 999])
def test_what_is_no_single_range_is_ignored(client: httpx.Client, entry: PackEntry, asked: str) -> None:
    answer = client.get(f"/v1/packs/{entry.digest}", headers={"Range": asked})
    assert (answer.status_code, len(answer.content)) == (200, entry.bytes)


def test_a_range_outside_the_pack_is_refused_with_its_size(client: httpx.Client, entry: PackEntry) -> None:
    answer = client.get(f"/v1/packs/{entry.digest}", headers={"Range": f"bytes={entry.bytes}-"})
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, f"bytes */{entry.bytes}")
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize("name", ["0" * 64, "short", "..%2f..%2fengram.sqlite", "A" * 64])
def test_what_is_no_pack_is_not_found(client: httpx.Client, entry: PackEntry, name: str) -> None:
    answer = client.get(f"/v1/packs/{name}")
    assert (answer.status_code, answer.headers["Content-Type"]) == (404, "application/problem+json")


def test_a_file_that_no_generation_names_is_not_served(
    client: httpx.Client, served: ServiceThread, entry: PackEntry
) -> None:
    stray = served.state.store.put(b"not named by any row")
    assert client.get(f"/v1/packs/{stray}").status_code == 404


def test_a_damaged_pack_is_marked_and_must_not_be_kept(
    client: httpx.Client, served: ServiceThread, entry: PackEntry
) -> None:
    path = served.state.store.path(entry.digest)
    data = path.read_bytes()
    path.write_bytes(data[:-40])
    answer = client.get(f"/v1/packs/{entry.digest}", headers={"If-None-Match": f'"{entry.digest}"'})
    assert answer.content == data[:-40]
    assert int(answer.headers["Engram-Damaged"]) > 0
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers.get("ETag") != f'"{entry.digest}"'
    assert client.get("/healthz").json()["damaged_packs"] == [entry.digest]
    picture = client.get(f"/v1/packs/{entry.digest}", headers={"Accept": "image/jpeg"})
    assert (picture.status_code, picture.json()["type"].rpartition("/")[2]) == (503, "unavailable")


def test_the_picture_of_a_damaged_pack_shows_what_is_intact(
    client: httpx.Client, served: ServiceThread, entry: PackEntry
) -> None:
    path = served.state.store.path(entry.digest)
    data = bytearray(path.read_bytes())
    first, length = (int(column[7]) for column in (pack.parse(bytes(data)).starts, pack.parse(bytes(data)).lengths))
    at = next(at for at in range(first + 1, first + length) if data[at - 1] < 0xE0 and data[at] < 0xE0)
    data[at] ^= 0x10
    path.write_bytes(data)
    picture = client.get(f"/v1/packs/{entry.digest}", headers={"Accept": "image/jpeg"})
    assert Image.open(io.BytesIO(picture.content)).size == (16, 19 * 16)
    assert (picture.headers["Engram-Damaged"], picture.headers["Cache-Control"]) == ("1", "no-store")


def test_a_pack_without_a_file_is_not_found_and_shows_in_health(
    client: httpx.Client, served: ServiceThread, entry: PackEntry
) -> None:
    served.state.store.delete(entry.digest)
    assert client.get(f"/v1/packs/{entry.digest}").status_code == 404
    assert client.get("/healthz").json()["damaged_packs"] == [entry.digest]
