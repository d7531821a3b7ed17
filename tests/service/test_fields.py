"""Fields come in as members of a tar and out of draws, exports and listings; what is bad is named.

Beside them, exemplars are removed and relabelled over HTTP.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from engram import batch, memory, pack, tar
from engram.content import Content, Policy
from engram.draw import Layout, Request, plan
from engram.errors import BadUpload, EngramError, TooLarge, from_problem
from engram.fields import Column, Schema
from engram.schemas import STRIPS_MEDIA_TYPE, Buffer, BufferCreate, ExemplarPage, IngestOptions, Manifest
from engram.selection.embedding import BuiltinEmbedder
from engram.selection.images import ArrayImages
from engram_service import buffers, commit
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.spooled import SpooledImages
from engram_service.storage import PackStore
from tests.contents import Filling, pictures
from tests.servers import ServiceThread
from tests.uploads import Member, encoded, final, queue, tar_of, work_through

DECLARED = {"boxes": "float32 [any, 5]", "key": "utf8", "logits": "float16 [10]", "weight": "float32 finite"}
COUNT = 12
PICTURES = pictures(1, COUNT)
CLASS_IDS = np.arange(COUNT) % 3
COLUMNS: dict[str, Any] = {
    "boxes": [np.full((row % 3, 5), row, np.float32) for row in range(COUNT)],
    "key": [f"cam-{row}.png" for row in range(COUNT)],
    "logits": np.outer(np.arange(COUNT), np.arange(10)).astype(np.float16),
    "weight": np.linspace(0, 1, COUNT, dtype=np.float32),
}
DRAW = "/v1/buffers/b/draw?size=40&seed=3"


def create(database: Database, fields: dict[str, str] = DECLARED, *, budget_bytes: int = 10**6) -> None:
    with database.session() as session:
        buffers.create(session, BufferCreate(name="b", budget_bytes=budget_bytes, quality=60, fields=fields))


def upload(database: Database, settings: Settings, body: bytes, task: int = 0) -> dict[str, Any] | None:
    """The upload has been worked off; returns the problem that it had."""
    queued = queue(database, settings, body, task=task)
    work_through(database, PackStore(settings.packs_dir), settings)
    return final(database, queued).problem


def body(columns: dict[str, Any] = COLUMNS) -> bytes:
    return b"".join(tar.write(PICTURES, CLASS_IDS, fields=columns))


def check(found: dict[str, Column], rows: list[int]) -> None:
    """These are the fields of these images."""
    assert found.keys() == DECLARED.keys()
    for name, column in COLUMNS.items():
        for cell, row in zip(found[name], rows, strict=True):
            assert np.array_equal(cell, column[row]), (name, row)


def numbers(keys: Column) -> list[int]:
    """Which images have these keys."""
    return [int(str(key)[4:-4]) for key in keys]


def all_pictures(database: Database, settings: Settings) -> None:
    """Buffer "b" holds all pictures with their fields as task 0."""
    create(database)
    assert upload(database, settings, body()) is None


@pytest.fixture
def served(
    request: pytest.FixtureRequest, hold: Callable[[Filling], Any], serve_thread: Callable[..., ServiceThread]
) -> ServiceThread:
    """A service that holds from its start what `filled` says, where a test asks for that."""
    if "filled" in request.fixturenames:
        hold(all_pictures)
    return serve_thread()


@pytest.fixture
def filled(served: ServiceThread) -> ServiceThread:
    """A service with `all_pictures`."""
    return served


def manifest(client: httpx.Client) -> Manifest:
    return Manifest.model_validate(client.get("/v1/buffers/b/manifest").json())


def listed(client: httpx.Client) -> dict[str, tuple[str, int, int]]:
    """Pack, row and class of every exemplar by its key."""
    page = ExemplarPage.model_validate(client.get("/v1/buffers/b/exemplars?limit=1000").json())
    return {str(found.key): (found.pack, found.row, found.class_id) for found in page.exemplars}


def test_draws_bring_the_fields_of_their_exemplars(filled: ServiceThread, client: httpx.Client) -> None:
    answer = client.get(DRAW, headers={"Accept": STRIPS_MEDIA_TYPE})
    drawn = batch.decode(answer.content)
    rows = numbers(drawn.fields["key"])
    check(drawn.fields, rows)
    assert drawn.class_ids.tolist() == CLASS_IDS[rows].tolist()
    logits = drawn.fields["logits"]
    assert isinstance(logits, np.ndarray)
    assert logits.shape == (40, 10)
    found = manifest(client)
    assert found.fields == DECLARED
    packs = [pack.parse(client.get(f"/v1/packs/{entry.digest}").content) for entry in found.packs]
    parts = batch.collect(packs, plan(Layout(found.packs), Request(40, 3)))
    assert batch.assemble(parts) == answer.content


def test_a_picture_of_exemplars_with_fields_is_a_plain_jpeg(filled: ServiceThread, client: httpx.Client) -> None:
    drawn = client.get(DRAW, headers={"Accept": "image/jpeg"}).content
    assert drawn.endswith(b"\xff\xd9")
    assert b"logits" not in drawn
    sha256, row, _ = listed(client)["cam-5.png"]
    assert client.get(f"/v1/buffers/b/exemplars/{sha256}/{row}").content.endswith(b"\xff\xd9")


@pytest.mark.parametrize("path", ["/v1/buffers/b/export", DRAW])
def test_a_tar_of_exemplars_brings_their_fields_and_can_be_uploaded_again(
    filled: ServiceThread, client: httpx.Client, path: str
) -> None:
    answer = client.get(path, headers={"Accept": "application/x-tar"})
    schema = Schema.declare(DECLARED)
    members = list(tar.read(io.BytesIO(answer.content), schema=schema))
    assert members
    for member in members:
        row = int(member.fields["key"][4:-4])
        check({name: [cell] for name, cell in member.fields.items()}, [row])
        assert member.class_id == CLASS_IDS[row]
    assert upload(filled.state.database, filled.settings, answer.content, task=1) is None


def test_one_exemplar_is_found_by_key_and_its_fields_are_json(filled: ServiceThread, client: httpx.Client) -> None:
    places = listed(client)
    assert places.keys() == set(COLUMNS["key"])
    for row in (0, 7):
        sha256, place, class_id = places[f"cam-{row}.png"]
        assert class_id == CLASS_IDS[row]
        found = client.get(f"/v1/buffers/b/exemplars/{sha256}/{place}/fields").json()
        assert found == {
            "boxes": [[row] * 5] * (row % 3),
            "key": f"cam-{row}.png",
            "logits": (np.arange(10) * row).tolist(),
            "weight": COLUMNS["weight"][row].item(),
        }
    assert client.get(f"/v1/buffers/b/exemplars/{sha256}/99/fields").status_code == 404


def test_numbers_that_json_cannot_say_are_null(served: ServiceThread, client: httpx.Client) -> None:
    create(served.state.database, {"score": "float32", "pair": "float64 [2]"})
    columns = {"score": [float("nan")], "pair": [[1, float("inf")]]}
    assert (
        upload(served.state.database, served.settings, b"".join(tar.write(PICTURES[:1], [0], fields=columns))) is None
    )
    (entry,) = manifest(client).packs
    assert client.get(f"/v1/buffers/b/exemplars/{entry.digest}/0/fields").json() == {"pair": [1, None], "score": None}


def test_fields_count_in_the_budget(served: ServiceThread, client: httpx.Client) -> None:
    create(served.state.database, {"logits": "float32 [100]"}, budget_bytes=3000)
    sent = b"".join(tar.write(PICTURES, CLASS_IDS, fields={"logits": np.zeros((COUNT, 100), np.float32)}))
    assert upload(served.state.database, served.settings, sent) is None
    found = Buffer.model_validate(client.get("/v1/buffers/b").json())
    assert found.used_bytes <= 3000
    assert 0 < found.exemplars <= 5
    assert found.used_bytes == sum(len(client.get(f"/v1/packs/{e.digest}").content) for e in manifest(client).packs)


def test_arrays_in_this_process_make_the_pack_that_the_service_makes_of_their_upload(
    database: Database, settings: Settings
) -> None:
    create(database)
    given = {"boxes": COLUMNS["boxes"], "logits": COLUMNS["logits"].tolist(), "weight": np.arange(COUNT)}
    assert upload(database, settings, body(given)) is None
    with database.reading() as session:
        (row,) = buffers.live_packs(session, "b")
    schema = Schema.declare(DECLARED)
    arrays = ArrayImages(PICTURES, CLASS_IDS, schema.columns(given, COUNT))
    content = Content(Policy(10**6, quality=60), schema=schema)
    content = memory.add(content, memory.Upload(0, arrays, IngestOptions()), BuiltinEmbedder(arrays.shape))
    exemplars = content.tasks[0].load()
    assert exemplars is not None
    assert pack.digest(pack.to_bytes(exemplars)) == row.digest


def test_members_written_by_hand_are_taken_as_json_text_and_npy(
    database: Database, settings: Settings, store: PackStore
) -> None:
    create(database)
    out = io.BytesIO()
    np.save(out, np.arange(10) / 4)
    members: list[Member] = [
        ("a.boxes.json", b"[]"),
        ("a.cls", b"4"),
        ("a.logits.npy", out.getvalue()),
        ("a.png", encoded(PICTURES[0])),
        ("a.weight.txt", b"1\n"),
    ]
    assert upload(database, settings, tar_of(members)) is None
    with database.reading() as session:
        (row,) = buffers.live_packs(session, "b")
    found = pack.parse(store.get(row.digest)).fields()
    assert found["key"] == ["a"]
    assert np.array_equal(found["logits"], [np.arange(10) / 4])
    assert np.asarray(found["boxes"][0]).shape == (0, 5)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"logits": "float17"}, "cannot be 'float17'"),
        ({"rows": "int8"}, "taken by what every exemplar has"),
        ({"Logits": "int8"}, "Logits"),
        ({f"f{n}": "bool" for n in range(65)}, "65 fields"),
    ],
)
def test_a_buffer_with_fields_that_there_cannot_be_is_refused(
    client: httpx.Client, fields: dict[str, str], says: str
) -> None:
    answer = client.post("/v1/buffers", json={"name": "bad", "budget_bytes": 1000, "fields": fields})
    assert answer.status_code == 422
    assert says in answer.text
    assert client.get("/v1/buffers/bad").status_code == 404


def test_a_buffer_says_its_fields_in_one_spelling(client: httpx.Client) -> None:
    sent = {"weight": "float32  finite", "boxes": "float32[any,5]"}
    made = client.post("/v1/buffers", json={"name": "b", "budget_bytes": 1000, "fields": sent}).json()
    assert made["fields"] == {"boxes": "float32 [any, 5]", "weight": "float32 finite"}


# Bad input


def changed(**columns: Any) -> Callable[[], bytes]:
    return lambda: body(COLUMNS | columns)


def without(name: str) -> Callable[[], bytes]:
    return lambda: body({key: column for key, column in COLUMNS.items() if key != name})


def one_missing() -> bytes:
    members = tar_members(body())
    return tar_of([member for member in members if member[0] != "0000000005.weight.npy"])


def tar_members(data: bytes) -> list[Member]:
    found: list[Member] = []
    position = 0
    while data[position : position + 512].strip(b"\0"):
        head = data[position : position + 512]
        size = int(head[124:135], 8)
        found.append((head[:100].rstrip(b"\0").decode(), data[position + 512 : position + 512 + size]))
        position += 512 + -(-size // 512) * 512
    return found


WEIGHT = COLUMNS["weight"]
BAD: dict[str, tuple[Callable[[], bytes], type[EngramError], str]] = {
    "another type": (
        changed(logits=np.zeros((COUNT, 10), np.complex64).view(np.float32)[:, :10].astype(bool)),
        BadUpload,
        "field 'logits' of image '0000000000' is bool [10], the buffer declares float16 [10]",
    ),
    "another shape": (
        changed(logits=np.zeros((COUNT, 9))),
        BadUpload,
        "field 'logits' of image '0000000000' is float64 [9], the buffer declares float16 [10]",
    ),
    "another shape of one": (
        changed(boxes=[*COLUMNS["boxes"][:-1], np.zeros((2, 4))]),
        BadUpload,
        "field 'boxes' of image '0000000011' is float64 [2, 4], the buffer declares float32 [any, 5]",
    ),
    "missing for all": (without("logits"), BadUpload, "image '0000000000' has no field 'logits'"),
    "missing for one": (one_missing, BadUpload, "image '0000000005' has no field 'weight'"),
    "NaN where it is declared finite": (
        changed(weight=np.where(np.arange(COUNT) == 7, np.nan, WEIGHT)),
        BadUpload,
        "field 'weight' of image '0000000007' is nan among its values, the buffer declares float32 finite",
    ),
    "a text for a number": (changed(weight=["heavy"] * COUNT), BadUpload, "'0000000000.weight.txt' is not TXT"),
    "a number for a text": (changed(key=np.arange(COUNT)), BadUpload, "field 'key' of image '0000000000' is int64"),
    "a name that is not declared": (
        lambda: body({**COLUMNS, "logit": WEIGHT}),
        BadUpload,
        "'0000000000.logit.npy' would be a field 'logit', the buffer declares boxes float32 [any, 5]; key utf8;",
    ),
    "ten million rows": (
        changed(boxes=[*COLUMNS["boxes"][:-1], np.zeros((10_000_000, 5), np.float32)]),
        TooLarge,
        "member '0000000011.boxes.npy' has 200000128 bytes",
    ),
    "too many rows": (
        changed(boxes=[*COLUMNS["boxes"][:-1], np.zeros((100_000, 5), np.float32)]),
        BadUpload,
        "field 'boxes' of image '0000000011' has 100000 rows, 2000000 bytes; the record of an exemplar has 1048576",
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "ten million rows" else ()) for name in BAD]
)
def test_a_bad_field_ends_its_ingest_with_its_name_and_changes_nothing(
    database: Database, settings: Settings, store: PackStore, name: str
) -> None:
    create(database)
    make, error, says = BAD[name]
    problem = upload(database, settings, make())
    assert problem is not None
    raised = from_problem(problem)
    assert type(raised) is error
    assert says in raised.message
    assert list(store.digests()) == []
    assert {path.suffix for path in settings.spool_dir.iterdir()} == {".tar"}
    with database.reading() as session:
        assert buffers.read(session, "b").generation == 0


def test_fields_for_a_buffer_that_declares_none_are_refused(database: Database, settings: Settings) -> None:
    create(database, {})
    problem = upload(database, settings, body())
    assert problem is not None
    assert "the buffer declares no fields" in problem["detail"]


def test_fields_of_many_images_take_little_memory_and_no_file_that_stays(settings: Settings) -> None:
    path = settings.spool_dir / "x.tar"
    count = 3000
    logits = np.arange(count * 100, dtype=np.float32).reshape(count, 100)
    images = np.zeros((count, 4, 4, 1), np.uint8)
    path.write_bytes(b"".join(tar.write(images, [0] * count, fields={"logits": logits})))
    schema = Schema.declare({"logits": "float32 [100]"})
    with SpooledImages(path, settings, lambda found: None, schema) as found:
        assert list(settings.spool_dir.iterdir()) == [path]
        rows = np.array([2999, 0, 17])
        assert np.array_equal(schema.decode(found.records(rows))["logits"], logits[rows])


# Removing and relabelling


def test_an_exemplar_is_removed_by_key_and_by_place(filled: ServiceThread, client: httpx.Client) -> None:
    answer = client.delete("/v1/buffers/b/exemplars?key=cam-4.png")
    assert Buffer.model_validate(answer.json()).exemplars == COUNT - 1
    sha256, row, _ = listed(client)["cam-8.png"]
    answer = client.delete(f"/v1/buffers/b/exemplars/{sha256}/{row}")
    assert (answer.status_code, answer.json()["generation"]) == (200, 3)
    assert listed(client).keys() == set(COLUMNS["key"]) - {"cam-4.png", "cam-8.png"}
    drawn = batch.decode(client.get(DRAW).content)
    check(drawn.fields, numbers(drawn.fields["key"]))
    assert not {4, 8} & {*numbers(drawn.fields["key"])}
    # The pack of before is none of the buffer's any more.
    assert client.delete(f"/v1/buffers/b/exemplars/{sha256}/{row}").status_code == 404


def test_several_keys_are_removed_in_one_generation(filled: ServiceThread, client: httpx.Client) -> None:
    answer = client.delete("/v1/buffers/b/exemplars?key=cam-4.png&key=nobody&key=cam-8.png&task=0")
    assert (answer.status_code, answer.json()["generation"]) == (200, 2)
    assert listed(client).keys() == set(COLUMNS["key"]) - {"cam-4.png", "cam-8.png"}
    assert "any of 2 keys" in client.delete("/v1/buffers/b/exemplars?key=nobody&key=cam-8.png").json()["detail"]
    moved = client.patch("/v1/buffers/b/exemplars?key=cam-1.png&key=cam-2.png", json={"class_id": 9}).json()
    assert (moved["generation"], moved["classes"]) == (3, [0, 1, 2, 9])


def test_a_class_is_removed(filled: ServiceThread, client: httpx.Client) -> None:
    answer = client.delete("/v1/buffers/b/exemplars?class_id=1&task=0", headers={"If-Match": '"1"'})
    assert answer.json()["classes"] == [0, 2]
    classes = client.get("/v1/buffers/b/tasks/0").json()["classes"]
    assert [(found["class_id"], found["share_bytes"]) for found in classes] == [(0, 500_000), (2, 500_000)]
    assert [run[0] for run in manifest(client).packs[0].runs] == [0, 2]


def test_exemplars_are_relabelled_by_class_key_and_place(filled: ServiceThread, client: httpx.Client) -> None:
    assert client.patch("/v1/buffers/b/exemplars?key=cam-4.png", json={"class_id": 9}).json()["classes"] == [0, 1, 2, 9]
    assert client.patch("/v1/buffers/b/exemplars?class_id=9", json={"class_id": 2}).json()["classes"] == [0, 1, 2]
    sha256, row, _ = listed(client)["cam-3.png"]
    client.patch(f"/v1/buffers/b/exemplars/{sha256}/{row}", json={"class_id": 2})
    found = {key: class_id for key, (_, _, class_id) in listed(client).items()}
    assert found == dict(zip(COLUMNS["key"], CLASS_IDS, strict=True)) | {
        "cam-4.png": 2,
        "cam-3.png": 2,
    }
    assert list(listed(client))[-2:] == ["cam-4.png", "cam-3.png"]


@pytest.mark.parametrize("method", ["DELETE", "PATCH"])
@pytest.mark.parametrize(
    ("query", "status", "says"),
    [
        ("", 422, "class id or key"),
        ("?task=0", 422, "class id or key"),
        ("?class_id=7", 404, "no exemplar of class id 7"),
        ("?key=cam-99.png&task=0", 404, "no exemplar of task 0, key 'cam-99.png'"),
        ("?class_id=-1", 422, "class_id"),
        (f"/{'0' * 64}/0", 404, "no row 0 in a pack"),
    ],
)
def test_a_change_of_nothing_says_what_was_asked(
    filled: ServiceThread, client: httpx.Client, method: str, query: str, status: int, says: str
) -> None:
    content = {"json": {"class_id": 1}} if method == "PATCH" else {}
    answer = client.request(method, f"/v1/buffers/b/exemplars{query}", **content)  # type: ignore[arg-type]
    assert (answer.status_code, says in answer.text) == (status, True), answer.text
    assert manifest(client).generation == 1


def test_the_place_of_an_exemplar_holds_in_the_generation_in_which_it_was_looked_up(
    filled: ServiceThread, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256, row, _ = listed(client)["cam-3.png"]
    place_of = commit.place_of

    def overtaken(*where: Any) -> Any:
        found = place_of(*where)
        monkeypatch.undo()
        client.delete("/v1/buffers/b/exemplars?key=cam-0.png")
        return found

    monkeypatch.setattr(commit, "place_of", overtaken)
    headers = {"If-Match": '"1", "2"'}
    assert client.delete(f"/v1/buffers/b/exemplars/{sha256}/{row}", headers=headers).status_code == 409
    assert listed(client).keys() == set(COLUMNS["key"]) - {"cam-0.png"}


@pytest.mark.parametrize("place", [False, True])
def test_a_change_of_another_generation_is_refused(filled: ServiceThread, client: httpx.Client, place: bool) -> None:
    sha256, row, _ = listed(client)["cam-3.png"]
    path = f"/v1/buffers/b/exemplars{f'/{sha256}/{row}' if place else '?class_id=0'}"
    headers = {"If-Match": '"0"'}
    assert client.delete(path, headers=headers).status_code == 409
    assert client.patch(path, headers=headers, json={"class_id": 5}).status_code == 409
    assert client.patch(path, json={"class_id": 2**31}).status_code == 422
    assert manifest(client).generation == 1
