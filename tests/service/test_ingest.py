"""The way of an upload into the queue, and the queue: over real HTTP, with no worker running.

The disk is filled by a limit on the size of files, which the kernel enforces as it enforces a full disk.
"""

from __future__ import annotations

import hashlib
import resource
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from sqlalchemy import select

from engram.errors import (
    BadUpload,
    Conflict,
    EngramError,
    InvalidRequest,
    NotFound,
    StorageFull,
    TooLarge,
    from_problem,
)
from engram.schemas import Ingest, IngestOptions
from engram_service import ingest, worker
from engram_service.collect import collect
from engram_service.database import Database
from engram_service.ingest import LeaseLost, Watch
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import IngestRow
from tests.contents import create, pictures
from tests.servers import ServiceThread, eventually, http
from tests.uploads import final, queue, tar_of_arrays

PATH = "/v1/buffers/b/tasks/3/ingests"
BODY = tar_of_arrays(pictures(1, 4), [0, 1, 0, 1])
OTHER = tar_of_arrays(pictures(2, 4), [0, 1, 0, 1])


@pytest.fixture
def open_service(served: ServiceThread) -> ServiceThread:
    """A service without a worker, with an empty buffer "b"."""
    create(served.state.database)
    return served


@pytest.fixture
def web(open_service: ServiceThread) -> Iterator[httpx.Client]:
    with http(open_service) as client:
        yield client


def problem(response: httpx.Response) -> EngramError:
    assert response.headers["content-type"] == "application/problem+json"
    assert response.status_code == response.json()["status"]
    return from_problem(response.json())


def spooled(service: ServiceThread) -> list[str]:
    return sorted(path.name for path in service.settings.spool_dir.iterdir())


def rows(service: ServiceThread) -> list[str]:
    with service.state.database.reading() as session:
        return list(session.scalars(select(IngestRow.id)))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_accepted_upload_is_on_disk_and_in_the_queue(open_service: ServiceThread, web: httpx.Client) -> None:
    response = web.post(PATH, content=BODY, params={"epsilon": 0.25, "ranking": "ring"})
    assert response.status_code == 202
    accepted = Ingest.model_validate(response.json())
    assert response.headers["location"] == f"/v1/ingests/{accepted.id}"
    assert (accepted.buffer, accepted.task, accepted.state) == ("b", 3, "received")
    assert (accepted.body_bytes, accepted.body_sha256) == (len(BODY), hashlib.sha256(BODY).hexdigest())
    assert accepted.options == IngestOptions(epsilon=0.25, ranking="ring")
    assert ingest.spool_path(open_service.settings.spool_dir, accepted.id).read_bytes() == BODY
    assert web.get(response.headers["location"]).json() == response.json()


def test_a_body_of_unknown_length_is_accepted(open_service: ServiceThread, web: httpx.Client) -> None:
    response = web.post(PATH, content=iter([BODY[:3000], BODY[3000:]]))
    assert response.status_code == 202
    assert response.json()["body_sha256"] == hashlib.sha256(BODY).hexdigest()


def test_a_body_of_many_blocks_arrives_whole(open_service: ServiceThread, web: httpx.Client) -> None:
    body = bytes(range(256)) * 20_000
    response = web.post(PATH, content=iter([body[at : at + 70_001] for at in range(0, len(body), 70_001)]))
    path = ingest.spool_path(open_service.settings.spool_dir, response.json()["id"])
    assert path.read_bytes() == body
    assert response.json()["body_sha256"] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("length", ["Content-Length: 100000", "Transfer-Encoding: chunked"])
def test_a_connection_cut_in_the_middle_leaves_nothing(open_service: ServiceThread, length: str) -> None:
    host, port = open_service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\n{length}\r\n\r\n".encode())
        connection.sendall(b"1388\r\n" + BODY[:5000])
        assert eventually(lambda: len(spooled(open_service)) == 1)
        assert spooled(open_service)[0].endswith(".part")
    assert eventually(lambda: spooled(open_service) == [])
    assert rows(open_service) == []


def test_an_unknown_buffer_is_refused_before_the_body_is_read(open_service: ServiceThread, web: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        yield BODY
        assert eventually(answered.is_set)

    answered = threading.Event()

    def ask() -> EngramError:
        with web.stream("POST", PATH.replace("/b/", "/nobody/"), content=endless()) as response:
            response.read()
            return problem(response)

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask)
        threading.Timer(0.5, answered.set).start()
        assert type(answer.result()) is NotFound
    assert spooled(open_service) == []


def test_an_unknown_extractor_is_refused_before_the_body_is_read(
    open_service: ServiceThread, web: httpx.Client
) -> None:
    error = problem(web.post(f"{PATH}?extractor={'ab' * 32}", content=BODY))
    assert type(error) is NotFound
    assert "ab" * 32 in error.message
    assert rows(open_service) == []


def test_an_empty_body_is_refused(open_service: ServiceThread, web: httpx.Client) -> None:
    error = problem(web.post(PATH, content=b""))
    assert type(error) is BadUpload
    assert "0 bytes" in error.message
    assert spooled(open_service) == rows(open_service) == []


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_beyond_the_limit_is_refused(is_announced: bool, serve_thread: Callable[..., ServiceThread]) -> None:
    service = serve_thread(max_body_bytes=len(BODY) - 1)
    create(service.state.database)
    with http(service) as web:
        error = problem(web.post(PATH, content=BODY if is_announced else iter([BODY])))
    assert type(error) is TooLarge
    assert str(len(BODY) - 1) in error.message
    assert spooled(service) == rows(service) == []


def digest_header(body: bytes) -> dict[str, str]:
    return {"Content-Digest": f"sha-256=:{b64encode(hashlib.sha256(body).digest()).decode()}:"}


def test_a_body_that_is_not_what_was_announced_is_refused(open_service: ServiceThread, web: httpx.Client) -> None:
    error = problem(web.post(PATH, content=BODY, headers=digest_header(OTHER)))
    assert type(error) is BadUpload
    assert b64encode(hashlib.sha256(BODY).digest()).decode() in error.message
    assert spooled(open_service) == rows(open_service) == []
    assert web.post(PATH, content=BODY, headers=digest_header(BODY)).status_code == 202
    assert web.post(PATH, content=BODY, headers={"Content-Digest": "md5=:AAAA:"}).status_code == 202


@pytest.mark.parametrize("value", ["sha-256=:AAAA:", "sha-256=:A===:"])
def test_a_malformed_digest_is_an_invalid_request(value: str, web: httpx.Client) -> None:
    assert type(problem(web.post(PATH, content=BODY, headers={"Content-Digest": value}))) is InvalidRequest


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("quality=50", "it is the buffer's"),
        ("candidates=10,0", "candidates.1"),
        ("candidates=", "candidates"),
        ("candidates=10;20", "candidates.0"),
        ("ranking=best", "ranking"),
        ("epsilon=0", "epsilon"),
        ("epsilon=nan", "epsilon"),
        ("block=1", "block"),
        ("seed=-1", "seed"),
        ("extractor=abc", "extractor"),
        ("definition=other", "definition"),
        ("qualty=50", "qualty"),
    ],
)
def test_options_out_of_range_are_refused_by_name(
    query: str, says: str, open_service: ServiceThread, web: httpx.Client
) -> None:
    error = problem(web.post(f"{PATH}?{query}", content=BODY))
    assert type(error) is InvalidRequest
    assert says in error.message
    assert rows(open_service) == []


@pytest.mark.parametrize("task", ["-1", str(2**31), "first"])
def test_a_task_is_a_number(task: str, web: httpx.Client) -> None:
    assert type(problem(web.post(f"/v1/buffers/b/tasks/{task}/ingests", content=BODY))) is InvalidRequest


def test_candidates_are_a_list_with_commas(web: httpx.Client) -> None:
    response = web.post(f"{PATH}?candidates=10,50,90&epsilon=0.25&block=16", content=BODY)
    assert response.status_code == 202
    assert IngestOptions.model_validate(response.json()["options"]) == IngestOptions(
        candidates=(10, 50, 90), epsilon=0.25, block=16
    )


def test_a_repeated_upload_is_the_same_ingest(open_service: ServiceThread, web: httpx.Client) -> None:
    key = {"Idempotency-Key": "run-1/task-3"}
    first = web.post(PATH, content=BODY, headers=key)
    again = web.post(PATH, content=BODY, headers=key)
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json() == again.json()
    assert first.headers["location"] == again.headers["location"]
    assert rows(open_service) == [first.json()["id"]]
    assert spooled(open_service) == [f"{first.json()['id']}.tar"]


@pytest.mark.parametrize(
    ("path", "body", "query"), [(PATH, OTHER, ""), (PATH.replace("3", "4"), BODY, ""), (PATH, BODY, "?ranking=ring")]
)
def test_a_key_names_one_upload(
    path: str, body: bytes, query: str, open_service: ServiceThread, web: httpx.Client
) -> None:
    key = {"Idempotency-Key": "k"}
    first = web.post(PATH, content=BODY, headers=key).json()["id"]
    error = problem(web.post(path + query, content=body, headers=key))
    assert type(error) is Conflict
    assert error.details["ingest"] == first
    assert rows(open_service) == [first]
    assert spooled(open_service) == [f"{first}.tar"]


def test_keys_belong_to_a_buffer(open_service: ServiceThread, web: httpx.Client) -> None:
    create(open_service.state.database, "c")
    key = {"Idempotency-Key": "k"}
    first = web.post(PATH, content=BODY, headers=key).json()["id"]
    assert web.post(PATH.replace("/b/", "/c/"), content=BODY, headers=key).json()["id"] != first


def test_identical_uploads_at_the_same_time_are_one_ingest(open_service: ServiceThread) -> None:
    def send(_: int) -> tuple[int, str]:
        with http(open_service) as web:
            response = web.post(PATH, content=iter([BODY[:100], BODY[100:]]), headers={"Idempotency-Key": "k"})
            return response.status_code, response.json()["id"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, range(8)))
    assert sorted(status for status, _ in answers) == [200] * 7 + [202]
    assert {name for _, name in answers} == set(rows(open_service))
    assert spooled(open_service) == [f"{name}.tar" for name in rows(open_service)]


def test_a_full_disk_refuses_the_upload_and_keeps_nothing(open_service: ServiceThread, web: httpx.Client) -> None:
    body = bytes(4 << 20)
    with files_of_at_most(2 << 20):
        response = web.post(PATH, content=body)
    error = problem(response)
    assert type(error) is StorageFull
    assert response.status_code == 507
    assert spooled(open_service) == rows(open_service) == []
    assert web.post(PATH, content=body).status_code == 202


def test_waiting_ends_when_the_ingest_is_final(open_service: ServiceThread, web: httpx.Client) -> None:
    name = web.post(PATH, content=BODY).json()["id"]
    assert web.get(f"/v1/ingests/{name}?wait=0.05").json()["state"] == "received"
    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        waiting = pool.submit(web.get, f"/v1/ingests/{name}?wait=50")
        with http(open_service) as other:
            assert other.delete(f"/v1/ingests/{name}").json()["state"] == "cancelled"
        assert waiting.result().json()["state"] == "cancelled"
        assert time.monotonic() - start < 45


def test_an_unknown_ingest_is_not_found(web: httpx.Client) -> None:
    for response in (web.get("/v1/ingests/x"), web.get("/v1/ingests/x?wait=9"), web.delete("/v1/ingests/x")):
        assert type(problem(response)) is NotFound


# The queue, without HTTP


def claimed(database: Database, settings: Settings, owner: str) -> ingest.Claim:
    found = ingest.claim(database, settings, owner=owner)
    assert found is not None
    return found


def expire(database: Database, held: ingest.Claim) -> None:
    """The worker has died, and its supervisor has noticed."""
    ingest.release_all(database, held.owner)


def taken_over(database: Database, settings: Settings, owner: str) -> ingest.Claim:
    """What a worker claims once it has seen the lease of another stand still for `lease_s`."""
    watch, found = Watch(), list[ingest.Claim | None]()

    def look() -> bool:
        found.append(ingest.claim(database, settings, owner=owner, watch=watch))
        return found[-1] is not None

    assert eventually(look)
    assert found[0] is None
    assert found[-1] is not None
    return found[-1]


def beat(database: Database, held: ingest.Claim) -> None:
    ingest.heartbeat(database, held, state="selecting", images_done=1, images_total=2)


def test_ingests_of_a_buffer_are_worked_off_one_by_one_in_order_of_arrival(
    database: Database, settings: Settings
) -> None:
    create(database, "b")
    create(database, "c")
    first, second = (queue(database, settings, BODY, task=task) for task in (7, 2))
    elsewhere = queue(database, settings, BODY, buffer="c")
    one = claimed(database, settings, "one")
    two = claimed(database, settings, "two")
    assert (one.id, two.id) == (first.id, elsewhere.id)
    assert ingest.claim(database, settings, owner="three") is None
    ingest.fail(database, one, BadUpload("no"))
    assert claimed(database, settings, "three").id == second.id


def test_a_clock_that_was_set_back_does_not_change_the_order(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(database)
    first = queue(database, settings, BODY)
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: 1e9)
        second = queue(database, settings, OTHER)
    assert second.created_at >= first.created_at
    assert claimed(database, settings, "one").id == first.id


def test_two_workers_never_hold_the_same_ingest(database: Database, settings: Settings) -> None:
    for number in range(12):
        create(database, f"b{number}")
        queue(database, settings, BODY, buffer=f"b{number}")

    def claim_all(owner: str) -> list[str]:
        held = []
        while (found := ingest.claim(database, settings, owner=owner)) is not None:
            held.append(found.id)
        return held

    with ThreadPoolExecutor(4) as pool:
        held = [name for names in pool.map(claim_all, "abcd") for name in names]
    assert len(held) == len(set(held)) == 12


def test_a_lease_that_stands_still_is_claimed_again_and_the_first_holder_loses_it(
    database: Database, settings: Settings
) -> None:
    create(database)
    queued = queue(database, settings, BODY)
    first = claimed(database, settings, "first")
    beat(database, first)
    second = taken_over(database, settings.model_copy(update={"lease_s": 0.1}), "second")
    assert (second.id, second.attempts) == (queued.id, 2)
    with pytest.raises(LeaseLost):
        beat(database, first)
    with pytest.raises(LeaseLost):
        ingest.fail(database, first, BadUpload("late"))
    beat(database, second)
    assert final(database, queued).state == "selecting"


def test_a_heartbeat_keeps_the_lease_and_publishes_progress(database: Database, settings: Settings) -> None:
    create(database)
    queued = queue(database, settings, BODY)
    held = claimed(database, settings, "one")
    watch, shortly = Watch(), settings.model_copy(update={"lease_s": 1e-9})
    for images_done in range(3):
        ingest.heartbeat(database, held, state="encoding", images_done=images_done, images_total=4)
        assert ingest.claim(database, shortly, owner="two", watch=watch) is None
    now = final(database, queued)
    assert (now.state, now.images_done, now.images_total) == ("encoding", 2, 4)
    assert ingest.claim(database, shortly, owner="two", watch=watch) is not None


def clock(monkeypatch: pytest.MonkeyPatch, later_s: float) -> None:
    """The clock of the machine is set; a stopwatch does not notice."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + later_s)


def test_a_clock_set_back_does_not_keep_the_lease_of_a_dead_worker_alive(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(database)
    queued = queue(database, settings, BODY)
    hasty = settings.model_copy(update={"lease_s": 0.3, "worker_poll_s": 0.02})
    claimed(database, hasty, "one that dies")
    clock(monkeypatch, -3600)
    stop = threading.Event()
    running = threading.Thread(target=worker.run, args=(hasty, stop))
    running.start()
    try:
        assert eventually(lambda: final(database, queued).state == "committed")
    finally:
        stop.set()
        running.join()


def test_a_clock_set_forward_takes_no_lease_from_a_worker_that_is_alive(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(database)
    queue(database, settings, BODY)
    claimed(database, settings, "one")
    clock(monkeypatch, 3600)
    assert ingest.claim(database, settings, owner="two") is None


def test_a_clock_that_is_set_changes_no_pause_between_two_attempts(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(database)
    queued = queue(database, settings, BODY)
    ingest.release(database, claimed(database, settings, "one"), after_s=0.2)
    with monkeypatch.context() as patched:
        clock(patched, 3600)
        assert ingest.claim(database, settings, owner="two") is None
    clock(monkeypatch, -3600)
    assert taken_over(database, settings, "two").id == queued.id


def test_an_upload_that_kills_its_workers_is_given_up(database: Database, settings: Settings) -> None:
    create(database)
    queued, behind = queue(database, settings, BODY), queue(database, settings, OTHER)
    for attempt in range(1, settings.max_attempts + 1):
        held = claimed(database, settings, f"worker {attempt}")
        assert (held.id, held.attempts) == (queued.id, attempt)
        expire(database, held)
    assert claimed(database, settings, "survivor").id == behind.id
    ended = final(database, queued)
    assert ended.state == "failed"
    assert ended.problem is not None
    assert ended.problem["status"] == 500
    assert ended.problem["attempts"] == settings.max_attempts
    assert "died each time" in ended.problem["detail"]


def test_a_claim_that_is_given_back_is_there_for_the_next_worker(database: Database, settings: Settings) -> None:
    create(database)
    queued = queue(database, settings, BODY)
    ingest.release(database, claimed(database, settings, "one"), after_s=0, counts=False)
    assert final(database, queued).state == "received"
    assert claimed(database, settings, "two").attempts == 1


def test_a_cancelled_ingest_stops_its_worker_and_frees_the_next_one(database: Database, settings: Settings) -> None:
    create(database)
    queued, behind = queue(database, settings, BODY), queue(database, settings, OTHER)
    held = claimed(database, settings, "one")
    for _ in range(2):
        with database.session() as session:
            assert ingest.cancel(session, queued.id).state == "cancelled"
    with pytest.raises(LeaseLost):
        beat(database, held)
    assert claimed(database, settings, "one").id == behind.id


# The collector


def test_what_is_being_received_or_waits_is_kept_and_what_nobody_will_ask_for_is_removed(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database)
    receiving = ingest.SpoolFile(settings.spool_dir)
    receiving.write(BODY)
    unqueued = ingest.SpoolFile(settings.spool_dir)
    unqueued.write(BODY)
    unqueued.seal(None)
    waiting, cancelled = queue(database, settings, BODY), queue(database, settings, OTHER)
    with database.session() as session:
        ingest.cancel(session, cancelled.id)
    abandoned = settings.spool_dir / "0123.part"
    abandoned.write_bytes(b"from a service that was killed")
    orphan = ingest.spool_path(settings.spool_dir, "4567")
    orphan.write_bytes(b"from a service that was killed before the row")
    found = collect(database, store, settings.model_copy(update={"failed_s": 0.0}))
    assert found.uploads == 3
    assert set(settings.spool_dir.iterdir()) == {
        receiving.path,
        unqueued.path,
        ingest.spool_path(settings.spool_dir, waiting.id),
    }
    for upload in (receiving, unqueued):
        upload.release()
    assert collect(database, store, settings).uploads == 2
