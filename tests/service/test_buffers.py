"""Buffers and tasks over HTTP: create, read, budgets, deletion, manifests, and their problems."""

from __future__ import annotations

import httpx
import pytest

from engram.schemas import Buffer, BufferList, Manifest, Task
from engram_service import buffers
from engram_service.database import Database
from engram_service.settings import Settings
from tests.contents import create, fill
from tests.servers import ServiceThread


def made(client: httpx.Client, name: str = "b", **members: object) -> httpx.Response:
    return client.post("/v1/buffers", json={"name": name, "budget_bytes": 100_000, **members})


def filled(client: httpx.Client, served: ServiceThread, *tasks: dict[int, int]) -> None:
    made(client).raise_for_status()
    for number, counts in enumerate(tasks):
        fill(served.state.database, served.settings, number, counts)


def test_a_new_buffer_is_empty_and_says_where_it_is(client: httpx.Client) -> None:
    answer = made(client, budget_bytes=1234, per="class", share_by="task", subsampling="4:4:4")
    assert answer.status_code == 201
    assert answer.headers["Location"] == "/v1/buffers/b"
    assert answer.headers["ETag"].startswith('"0-')
    buffer = Buffer.model_validate(answer.json())
    assert (buffer.generation, buffer.used_bytes, buffer.limit_bytes, buffer.tasks) == (0, 0, 0, [])
    assert Buffer.model_validate(client.get("/v1/buffers/b").json()) == buffer


@pytest.mark.parametrize(("quality", "state"), [(40, "fixed"), (None, "provisional")])
def test_a_quality_is_fixed_when_the_buffer_is_made_or_left_open(
    client: httpx.Client, quality: int | None, state: str
) -> None:
    buffer = Buffer.model_validate(made(client, quality=quality).json())
    assert (buffer.quality, buffer.quality_is) == (quality, state)


def test_a_quality_is_open_until_something_would_have_to_go(client: httpx.Client, served: ServiceThread) -> None:
    def quality() -> tuple[int | None, str]:
        buffer = Buffer.model_validate(client.get("/v1/buffers/b").json())
        return buffer.quality, buffer.quality_is

    filled(client, served, {0: 66}, {1: 66})
    assert quality() == (90, "provisional")
    generation = client.get("/v1/buffers/b").json()["generation"]
    client.patch("/v1/buffers/b", json={"budget_bytes": 12_000}).raise_for_status()
    decided, state = quality()
    assert state == "decided"
    manifest = Manifest.model_validate(client.get("/v1/buffers/b/manifest").json())
    assert (manifest.generation, {pack.quality for pack in manifest.packs}) == (generation + 1, {decided})
    for task in (0, 1):
        found = Task.model_validate(client.get(f"/v1/buffers/b/tasks/{task}").json())
        assert found.decision is not None
        assert found.quality == found.decision.quality == decided
    client.patch("/v1/buffers/b", json={"budget_bytes": 100_000}).raise_for_status()
    fill(served.state.database, served.settings, 2, {2: 66})
    assert quality() == (decided, "decided")


def test_a_name_is_taken_once(client: httpx.Client) -> None:
    made(client).raise_for_status()
    problem = made(client).json()
    assert problem["type"].endswith("/conflict")
    assert "'b'" in problem["detail"]


def test_buffers_are_listed_by_name(client: httpx.Client) -> None:
    for name in ("c", "a", "b"):
        made(client, name).raise_for_status()
    listed = BufferList.model_validate(client.get("/v1/buffers").json())
    assert [buffer.name for buffer in listed.buffers] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "members",
    [
        {"name": "Upper"},
        {"name": "../b"},
        {"name": ""},
        {"budget_bytes": 0},
        {"budget_bytes": "much"},
        {"budget_bytes": 2**63},
        {"per": "image"},
        {"quality": 0},
        {"quality": 101},
        {"quality": "fine"},
        {"quality_is": "fixed"},
        {"misspelt": 1},
    ],
)
def test_a_malformed_buffer_is_an_invalid_request(client: httpx.Client, members: dict[str, object]) -> None:
    answer = client.post("/v1/buffers", json={"name": "b", "budget_bytes": 100_000, **members})
    assert answer.status_code == 422
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["type"].endswith("/invalid-request")
    assert client.get("/v1/buffers").json() == {"buffers": []}


def test_a_buffer_that_is_not_there_is_not_found_whatever_is_asked_of_it(client: httpx.Client) -> None:
    asked = [
        client.get("/v1/buffers/none"),
        client.delete("/v1/buffers/none"),
        client.patch("/v1/buffers/none", json={"budget_bytes": 1}),
        client.get("/v1/buffers/none/manifest"),
        client.get("/v1/buffers/none/tasks/0"),
        client.delete("/v1/buffers/none/tasks/0"),
        client.get("/v1/buffers/none/draw?size=1"),
        client.get("/v1/buffers/none/draw?size=1&generation=0"),
        client.get("/v1/buffers/none/export"),
        client.get("/v1/buffers/none/exemplars"),
    ]
    assert [answer.status_code for answer in asked] == [404] * len(asked)
    assert {answer.json()["type"].rpartition("/")[2] for answer in asked} == {"not-found"}


def test_a_filled_buffer_says_what_it_holds(client: httpx.Client, served: ServiceThread) -> None:
    filled(client, served, {0: 3, 1: 2}, {5: 4})
    buffer = Buffer.model_validate(client.get("/v1/buffers/b").json())
    manifest = Manifest.model_validate(client.get("/v1/buffers/b/manifest").json())
    on_disk = sum(served.state.store.path(pack.digest).stat().st_size for pack in manifest.packs)
    assert (buffer.generation, buffer.tasks, buffer.classes) == (2, [0, 1], [0, 1, 5])
    assert (buffer.exemplars, buffer.image_shape) == (9, (16, 16, 3))
    assert buffer.used_bytes == manifest.used_bytes == on_disk <= buffer.limit_bytes
    assert [(pack.task, pack.runs) for pack in manifest.packs] == [(0, [(0, 3), (1, 2)]), (1, [(5, 4)])]


def test_a_task_says_what_it_holds(client: httpx.Client, served: ServiceThread) -> None:
    filled(client, served, {0: 3, 1: 2}, {5: 4})
    task = Task.model_validate(client.get("/v1/buffers/b/tasks/0").json())
    assert [(found.class_id, found.seen, found.exemplars) for found in task.classes] == [(0, 3, 3), (1, 2, 2)]
    assert sum(found.share_bytes for found in task.classes) == 100_000 - 33_333
    assert sum(found.bytes for found in task.classes) < task.bytes


def test_a_missing_task_names_those_that_are_there(client: httpx.Client, served: ServiceThread) -> None:
    filled(client, served, {0: 1}, {1: 1})
    problem = client.get("/v1/buffers/b/tasks/7").json()
    assert problem["detail"].endswith("it has 0, 1")


def test_a_smaller_budget_makes_a_generation_within_it(client: httpx.Client, served: ServiceThread) -> None:
    filled(client, served, {0: 50, 1: 50})
    before = Buffer.model_validate(client.get("/v1/buffers/b").json())
    answer = client.patch(
        "/v1/buffers/b", json={"budget_bytes": before.used_bytes // 2}, headers={"If-Match": f'"{before.generation}"'}
    )
    after = Buffer.model_validate(answer.json())
    assert after.generation == before.generation + 1
    assert answer.headers["ETag"].startswith(f'"{after.generation}-')
    assert 0 < after.used_bytes <= after.budget_bytes == before.used_bytes // 2


def test_a_change_that_expects_another_generation_changes_nothing(client: httpx.Client, served: ServiceThread) -> None:
    filled(client, served, {0: 5})
    before = client.get("/v1/buffers/b").json()
    moved = {"If-Match": '"0"'}
    assert client.patch("/v1/buffers/b", json={"budget_bytes": 5000}, headers=moved).status_code == 409
    assert client.delete("/v1/buffers/b/tasks/0", headers=moved).status_code == 409
    assert client.delete("/v1/buffers/b/tasks/0", headers={"If-Match": '"x"'}).status_code == 422
    assert client.delete("/v1/buffers/b", headers=moved).status_code == 409
    assert client.get("/v1/buffers/b").json() == before
    assert client.delete("/v1/buffers/b", headers={"If-Match": '"0", "1"'}).status_code == 204


def test_a_tag_of_a_buffer_that_was_deleted_names_nothing_of_the_one_made_anew(
    client: httpx.Client, served: ServiceThread
) -> None:
    filled(client, served, {0: 5})
    tag = client.get("/v1/buffers/b/manifest").headers["ETag"]
    assert tag == client.get("/v1/buffers/b").headers["ETag"]
    assert client.delete("/v1/buffers/b", headers={"If-Match": tag}).status_code == 204
    filled(client, served, {7: 3})
    manifest = client.get("/v1/buffers/b/manifest", headers={"If-None-Match": tag})
    assert (manifest.status_code, manifest.json()["generation"]) == (200, 1)
    assert manifest.headers["ETag"] != tag
    for method, path in (
        ("DELETE", "/v1/buffers/b"),
        ("DELETE", "/v1/buffers/b/tasks/0"),
        ("DELETE", "/v1/buffers/b/exemplars?class_id=7"),
        ("DELETE", f"/v1/buffers/b/exemplars/{manifest.json()['packs'][0]['digest']}/0"),
    ):
        assert client.request(method, path, headers={"If-Match": tag}).status_code == 409, path
    assert client.get("/v1/buffers/b").headers["ETag"] == manifest.headers["ETag"]


def test_a_deleted_task_is_gone_from_the_next_generation(client: httpx.Client, served: ServiceThread) -> None:
    filled(client, served, {0: 3}, {1: 4})
    assert client.delete("/v1/buffers/b/tasks/0").status_code == 204
    manifest = Manifest.model_validate(client.get("/v1/buffers/b/manifest").json())
    assert [pack.task for pack in manifest.packs] == [1]
    assert client.get("/v1/buffers/b/tasks/0").status_code == 404


def test_an_older_manifest_answers_until_it_is_collected(client: httpx.Client, served: ServiceThread) -> None:
    filled(client, served, {0: 3}, {1: 4})
    old = Manifest.model_validate(client.get("/v1/buffers/b/manifest?generation=1").json())
    assert [pack.task for pack in old.packs] == [0]
    problem = client.get("/v1/buffers/b/manifest?generation=3").json()
    assert "is yet to come" in problem["detail"]
    assert problem["current_generation"] == 2


def test_an_unchanged_manifest_is_not_sent_again(client: httpx.Client, served: ServiceThread) -> None:
    filled(client, served, {0: 3})
    first = client.get("/v1/buffers/b/manifest")
    assert first.headers["ETag"].startswith('"1-')
    for query in ("", "?generation=1"):
        again = client.get(f"/v1/buffers/b/manifest{query}", headers={"If-None-Match": first.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
    fill(served.state.database, served.settings, 1, {1: 1})
    for query in ("", "?generation=1"):
        again = client.get(f"/v1/buffers/b/manifest{query}", headers={"If-None-Match": first.headers["ETag"]})
        assert (again.status_code, again.headers["ETag"] == first.headers["ETag"]) == (200, False)


def test_a_deleted_buffer_is_gone_and_its_name_free(client: httpx.Client, served: ServiceThread) -> None:
    filled(client, served, {0: 3})
    draw = "/v1/buffers/b/draw?size=2&generation=1"
    assert client.get(draw).status_code == 200
    assert client.delete("/v1/buffers/b").status_code == 204
    assert client.get("/v1/buffers/b").status_code == 404
    made(client).raise_for_status()
    assert client.get("/v1/buffers/b/draw?size=2").status_code == 409


def test_a_commit_that_fails_is_no_success(client: httpx.Client, served: ServiceThread) -> None:
    filled(client, served, {0: 3})
    before = client.get("/v1/buffers/b").json()
    # Deferred constraints are checked by COMMIT itself: the last moment at which a transaction can fail.
    with served.state.database.engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE parents (id INTEGER PRIMARY KEY)")
        connection.exec_driver_sql(
            "CREATE TABLE orphans (id INTEGER REFERENCES parents (id) DEFERRABLE INITIALLY DEFERRED)"
        )
        for table, when in (("buffers", "INSERT"), ("buffers", "UPDATE"), ("buffers", "DELETE")):
            connection.exec_driver_sql(
                f"CREATE TRIGGER fail_{when} AFTER {when} ON {table} BEGIN INSERT INTO orphans VALUES (1); END"
            )
        connection.commit()
    answers = [
        made(client, "c"),
        client.patch("/v1/buffers/b", json={"budget_bytes": 5000}),
        client.delete("/v1/buffers/b"),
        client.delete("/v1/buffers/b/tasks/0"),
    ]
    assert [answer.status_code for answer in answers] == [500] * 4
    assert client.get("/v1/buffers/b").json() == before
    assert client.get("/v1/buffers/c").status_code == 404


def test_a_defect_is_a_problem_without_a_stack(client: httpx.Client, served: ServiceThread) -> None:
    served.state.database = object()
    answer = client.get("/v1/buffers")
    assert (answer.status_code, answer.headers["Content-Type"]) == (500, "application/problem+json")
    assert answer.json()["detail"].startswith("AttributeError")
    assert "Traceback" not in answer.text


def test_what_is_nowhere_and_what_is_not_possible_are_problems(client: httpx.Client) -> None:
    nowhere = client.get("/v2")
    assert (nowhere.status_code, nowhere.json()["type"]) == (404, "https://engram.dev/problems/not-found")
    impossible = client.put("/v1/buffers", json={})
    assert impossible.status_code == 405
    assert impossible.headers["Content-Type"] == "application/problem+json"
    assert set(impossible.headers["Allow"].split(", ")) == {"GET", "HEAD", "POST"}


def test_the_interface_description_knows_every_route_and_its_problems(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    assert {"/v1/buffers/{buffer}/draw", "/v1/packs/{sha256}", "/healthz"} <= schema["paths"].keys()
    names = [parameter["name"] for parameter in schema["paths"]["/v1/buffers/{buffer}/draw"]["get"]["parameters"]]
    assert names == [
        *("buffer", "size", "seed", "step", "strategy", "tasks", "exclude_tasks", "rank", "world_size", "generation")
    ]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (path, method)
            assert "application/problem+json" in operation["responses"]["503"]["content"]


def test_a_body_that_is_not_declared_as_json_is_told_so(client: httpx.Client) -> None:
    problem = client.post(
        "/v1/buffers",
        content='{"name": "b", "budget_bytes": 1}',
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    ).json()
    assert problem["status"] == 422
    assert "Content-Type: application/json" in problem["detail"]


def test_generations_are_told_as_their_manifests_tell_them(database: Database, settings: Settings) -> None:
    create(database)
    for task in range(3):
        fill(database, settings, task, {task: 12})
    with database.reading() as session:
        found = buffers.generations(session, "b")
        told = [buffers.manifest(session, "b", each.generation) for each in found]
        assert [each.generation for each in found] == [3, 2, 1, 0]
        assert [each.bytes for each in found] == [each.used_bytes for each in told]
        assert [each.exemplars for each in found] == [sum(p.exemplars for p in each.packs) for each in told]
        assert found[0].replaced_at is None
        assert [each.generation for each in buffers.generations(session, "b", limit=2)] == [3, 2]
