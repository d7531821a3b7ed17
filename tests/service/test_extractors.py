"""Extractors over HTTP: checked before they are kept, bounded, idempotent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import httpx
import pytest

from engram.schemas import Extractor
from tests.models import model
from tests.servers import ServiceThread, http


def put(client: httpx.Client, data: bytes, digest: str | None = None) -> httpx.Response:
    return client.put(f"/v1/extractors/{digest or hashlib.sha256(data).hexdigest()}", content=data)


def kept(served: ServiceThread) -> list[str]:
    return sorted(path.name for path in served.settings.extractors_dir.iterdir())


def test_a_model_is_registered_once(client: httpx.Client, served: ServiceThread) -> None:
    data = model()
    first = put(client, data)
    assert first.status_code == 201, first.text
    found = Extractor.model_validate(first.json())
    assert (found.sha256, found.bytes, found.dimensions) == (hashlib.sha256(data).hexdigest(), len(data), 8)
    assert found.input_shape == (None, 3, None, None)
    assert first.headers["Location"] == f"/v1/extractors/{found.sha256}"
    again = put(client, data)
    assert (again.status_code, again.json()) == (200, first.json())
    assert client.get(f"/v1/extractors/{found.sha256}").json() == first.json()
    assert kept(served) == [found.sha256]


def test_a_lost_file_is_made_good_by_the_next_upload(client: httpx.Client, served: ServiceThread) -> None:
    put(client, model()).raise_for_status()
    (name,) = kept(served)
    (served.settings.extractors_dir / name).unlink()
    assert put(client, model()).status_code == 200
    assert kept(served) == [name]


def test_bytes_that_are_not_the_named_ones_are_a_bad_upload(client: httpx.Client, served: ServiceThread) -> None:
    answer = put(client, model(), "0" * 64)
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (422, "bad-upload")
    assert answer.json()["sha256"] == hashlib.sha256(model()).hexdigest()
    assert kept(served) == []


@pytest.mark.parametrize("data", [b"", b"not a model", model()[:-20]])
def test_what_cannot_serve_is_a_bad_extractor(client: httpx.Client, served: ServiceThread, data: bytes) -> None:
    answer = put(client, data)
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (422, "bad-extractor"), answer.text
    assert kept(served) == []
    assert client.get(f"/v1/extractors/{hashlib.sha256(data).hexdigest()}").status_code == 404


def test_a_model_has_a_limit_that_counts_as_it_streams(serve_thread: Callable[..., ServiceThread]) -> None:
    served = serve_thread(max_extractor_bytes=1000)

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(500)

    with http(served) as client:
        assert put(client, model()).status_code == 201
        answer = client.put(f"/v1/extractors/{'0' * 64}", content=endless())
    assert (answer.status_code, answer.json()["max_extractor_bytes"]) == (413, 1000)
    assert [name for name in kept(served) if name.startswith(".")] == []


@pytest.mark.parametrize("name", ["x", "0" * 63, "A" * 64, "..%2f..%2fengram.sqlite"])
def test_a_name_that_is_no_digest_is_refused(client: httpx.Client, served: ServiceThread, name: str) -> None:
    assert client.put(f"/v1/extractors/{name}", content=model()).status_code in (404, 422)
    assert client.get(f"/v1/extractors/{name}").status_code in (404, 422)
    assert kept(served) == []
