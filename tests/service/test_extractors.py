"""Extractors over HTTP: checked before they are kept, bounded, idempotent."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import psutil
import pytest

from engram import Client
from engram.errors import Conflict, NotFound
from engram.schemas import Extractor, IngestOptions
from engram_service import extractors, ingest
from tests.contents import create, pictures
from tests.models import endless_model, model
from tests.servers import ServiceThread, http
from tests.uploads import queue, tar_of_arrays, work_through

pytestmark = pytest.mark.slow


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


def test_what_cannot_serve_is_a_bad_extractor(client: httpx.Client, served: ServiceThread) -> None:
    data = model()[:-20]
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


def collect(served: ServiceThread, **settings: float) -> int:
    """How many files were removed; none refused to be."""
    stuck: dict[str, OSError] = {}
    found = extractors.collect(served.state.database, served.settings.model_copy(update=settings), stuck=stuck)
    assert stuck == {}
    return found


def test_extractors_are_listed_and_deleted(served: ServiceThread) -> None:
    with Client(served.url) as client:
        assert client.extractors() == []
        first, second = (client.register_extractor(model(seed=seed)) for seed in (0, 1))
        assert client.extractors() == [first, second]
        client.delete_extractor(first.sha256)
        assert client.extractors() == [second]
        assert kept(served) == [second.sha256]
        for missing in (client.extractor, client.delete_extractor):
            with pytest.raises(NotFound):
                missing(first.sha256)
        assert client.register_extractor(model()).sha256 == first.sha256


def test_an_extractor_that_a_waiting_ingest_needs_is_not_deleted(served: ServiceThread) -> None:
    database, settings = served.state.database, served.settings
    create(database)
    with Client(served.url) as client:
        digest = client.register_extractor(model()).sha256
        queued = queue(database, settings, b"a tar", options=IngestOptions(extractor=digest))
        with pytest.raises(Conflict, match=queued.id):
            client.delete_extractor(digest)
        assert collect(served, extractor_grace_s=0) == 0
        with database.session() as session:
            ingest.cancel(session, queued.id)
        client.delete_extractor(digest)
    assert kept(served) == []


def test_an_extractor_that_nothing_names_goes_after_its_period_of_grace(served: ServiceThread) -> None:
    with Client(served.url) as client:
        old, again, new = (client.register_extractor(model(seed=seed)).sha256 for seed in range(3))
        for digest in (old, again):
            long_ago = time.time() - 1000
            os.utime(served.settings.extractors_dir / digest, (long_ago, long_ago))
        client.register_extractor(model(seed=1))
        assert collect(served) == 0
        assert collect(served, extractor_grace_s=500) == 1
        assert {each.sha256 for each in client.extractors()} == {again, new} == {*kept(served)}


def test_an_extractor_stays_as_long_as_a_decision_names_it(served: ServiceThread) -> None:
    database, settings = served.state.database, served.settings
    create(database, quality=None)
    with Client(served.url) as client:
        digest = client.register_extractor(model()).sha256
        body = tar_of_arrays(pictures(0, 8), [0, 1] * 4)
        queue(database, settings, body, options=IngestOptions(extractor=digest))
        work_through(database, served.state.store, settings)
        decision = client.task("b", 0).decision
        assert decision is not None
        assert decision.embedder == digest
        assert collect(served, extractor_grace_s=0) == 0
        client.delete_task("b", 0)
        assert collect(served, extractor_grace_s=0) == 1
        assert client.extractors() == []


def test_files_that_a_crash_left_behind_go_and_one_that_is_being_received_stays(served: ServiceThread) -> None:
    folder = served.settings.extractors_dir
    (folder / ".0123456789abcdef.tmp").write_bytes(b"of a registration that was killed")
    (folder / ("ab" * 32)).write_bytes(b"of one that was killed before its row")
    (folder / "notes.txt").write_bytes(b"somebody else's")
    data = model()

    def body() -> Iterator[bytes]:
        yield data[:100]
        while sum(name.endswith(".tmp") for name in kept(served)) < 2:
            time.sleep(0.01)
        removed.append(collect(served))
        yield data[100:]

    removed: list[int] = []
    digest = hashlib.sha256(data).hexdigest()
    with http(served) as client:
        assert client.put(f"/v1/extractors/{digest}", content=body()).status_code == 201
    assert removed == [2]
    assert kept(served) == sorted([digest, "notes.txt"])


def test_a_file_that_cannot_be_removed_is_named_and_stops_nothing(served: ServiceThread) -> None:
    folder = served.settings.extractors_dir
    (folder / ("ab" * 32)).mkdir()
    (folder / ("cd" * 32)).write_bytes(b"x")
    stuck: dict[str, OSError] = {}
    assert extractors.collect(served.state.database, served.settings, stuck=stuck) == 1
    assert [*stuck] == [str(folder / ("ab" * 32))]


def children(module: str) -> list[int]:
    """Processes of this one that run a module."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            found += [child.pid] * (f"engram_service.{module}" in child.cmdline())
    return found


def is_extractor(child: psutil.Process) -> bool:
    """Whether a process runs a model; one that has ended meanwhile does not."""
    try:
        return any("extractor_child" in word for word in child.cmdline())
    except psutil.Error:
        return False


@pytest.mark.slow
def test_few_models_are_checked_at_a_time_and_further_ones_are_told_to_come_back(
    serve_thread: Callable[..., ServiceThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extractors, "CHECK_WAIT_S", 0.3)
    served = serve_thread(max_extractor_checks=1, extractor_batch_s=10)
    most = 0

    def register(seed: int) -> httpx.Response:
        data = endless_model() + bytes([0x12, 1, 48 + seed])  # another name of its producer: another digest
        with http(served) as client:
            return put(client, data)

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.02):
            most = max(most, sum(map(is_extractor, psutil.Process().children())))

    ended = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(register, range(6)))
    finally:
        ended.set()
        watcher.join()
    assert most == 1
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
    assert refused[0].json()["max_extractor_checks"] == 1
    assert {answer.status_code for answer in answers if answer not in refused} == {422}
    assert kept(served) == []
    with http(served) as client:
        assert put(client, model()).status_code == 201
