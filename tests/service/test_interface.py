"""The interface: described as strictly as the service is, readable without internet, with HEAD wherever GET is."""

from __future__ import annotations

import re
import shutil
from base64 import b64encode
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engram.schemas import MAX_BUDGET_BYTES, Buffer, BufferCreate
from engram_service.database import Database
from engram_service.settings import Settings
from tests.contents import create, fill
from tests.servers import ServiceThread, http


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[httpx.Client]:
    """A client of a service with an empty buffer "b", for requests that change nothing."""
    served = ServiceThread(Settings(data_dir=shutil.copytree(migrated, tmp_path_factory.mktemp("asked") / "data")))
    create(served.state.database)
    with http(served) as client:
        yield client
    served.stop()


@pytest.fixture(scope="module")
def described(asked: httpx.Client) -> dict[str, Any]:
    """The OpenAPI document."""
    document: dict[str, Any] = asked.get("/openapi.json").json()
    return document


def operations(described: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, operation) for path, item in described["paths"].items() for method, operation in item.items()
    ]


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_a_page_of_the_interface_loads_nothing_from_elsewhere(
    serve_thread: Callable[..., ServiceThread], page: str
) -> None:
    with http(serve_thread(admin_token="secret")) as client:
        answer = client.get(page)
        html, policy = answer.text, answer.headers["Content-Security-Policy"]
        named = re.findall(r"""(?:src|href|spec-url)="([^"]+)"|url: '([^']+)'""", html)
        files = {one or other for one, other in named}
        assert len(files) >= 3
        assert "://" not in html + policy
        for name in files:
            found = client.get(f"/{name}")
            assert (found.status_code, len(found.content) > 1000) == (200, True), name
    for script in re.findall(r"<script>(.*?)</script>", html, re.DOTALL):
        assert f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in policy


def test_head_is_answered_wherever_get_is_with_the_same_headers_and_no_body(
    client: httpx.Client, served: ServiceThread, described: dict[str, Any]
) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 5})
    pack = client.get("/v1/buffers/b/manifest").json()["packs"][0]["digest"]
    known = {"buffer": "b", "task": 0, "pack": pack, "row": 0, "sha256": pack, "ingest_id": "none"}
    paths = [path for path, method, _ in operations(described) if method == "get"] + ["/docs", "/openapi.json", "/none"]
    assert len(paths) > 15
    for path in paths:
        url = path.format(**known) + ("?size=3" if path.endswith("/draw") else "")
        got, head = client.get(url), client.head(url)
        assert (head.status_code, head.content) == (got.status_code, b""), url
        apart = {"date", "transfer-encoding"}
        assert {name for name in got.headers if name not in apart} == {n for n in head.headers if n not in apart}, url
        if path != "/metrics":  # which counts these very requests
            assert head.headers.get("Content-Length") == got.headers.get("Content-Length"), url
    assert client.head("/v1/buffers/b/forks").status_code == 405
    assert client.post("/v1/buffers/b").headers["Allow"] == "DELETE, GET, HEAD, PATCH"


def test_every_answer_that_a_route_may_give_is_described(described: dict[str, Any]) -> None:
    for path, method, operation in operations(described):
        statuses = operation["responses"].keys()
        assert "default" not in statuses
        assert {"403", "431", "503"} <= statuses
        assert "404" in statuses or "{" not in path
        assert method == "get" or {"409", "413", "422", "507"} <= statuses


def test_no_parameter_is_described_as_null(described: dict[str, Any]) -> None:
    parameters = [p for _, _, operation in operations(described) for p in operation.get("parameters", ())]
    assert len(parameters) > 50
    assert not [parameter for parameter in parameters if {"type": "null"} in parameter["schema"].get("anyOf", ())]


def parameter(described: dict[str, Any], path: str, name: str, method: str = "get") -> dict[str, Any]:
    (found,) = [p for p in described["paths"][path][method]["parameters"] if p["name"] == name]
    return dict(found["schema"])


@pytest.mark.parametrize(
    ("method", "path", "name", "value"),
    [
        ("patch", "/v1/buffers/{buffer}", "if-match", "null"),
        ("delete", "/v1/buffers/{buffer}", "if-match", "7"),
        ("delete", "/v1/buffers/{buffer}/tasks/{task}", "if-match", ""),
        ("get", "/v1/buffers/{buffer}/exemplars", "cursor", ""),
        ("get", "/v1/buffers/{buffer}/exemplars", "cursor", "1.2"),
    ],
)
def test_a_text_that_the_service_refuses_does_not_match_its_description(
    asked: httpx.Client, described: dict[str, Any], method: str, path: str, name: str, value: str
) -> None:
    assert not re.fullmatch(parameter(described, path, name, method)["pattern"], value)
    given: dict[str, Any] = {"headers": {name: value}} if name == "if-match" else {"params": {name: value}}
    if method == "patch":
        given["json"] = {"budget_bytes": 5}
    assert asked.request(method, path.format(buffer="b", task=0), **given).status_code == 422


def test_limits_that_are_settings_are_described(serve_thread: Callable[..., ServiceThread]) -> None:
    with http(serve_thread(max_draw=11, max_global_draw=33, max_page=22)) as client:
        described = client.get("/openapi.json").json()
    draw = "/v1/buffers/{buffer}/draw"
    assert [parameter(described, draw, name)["maximum"] for name in ("size", "world_size", "rank")] == [11, 33, 32]
    assert parameter(described, "/v1/buffers/{buffer}/exemplars", "limit")["maximum"] == 22
    assert parameter(described, "/v1/ingests", "limit")["maximum"] == 22
    assert parameter(described, draw, "tasks")["items"] == {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}


def test_members_of_objects_that_the_service_refuses_are_not_described(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    for schema, name, wrong in (("BufferCreate", "fields", "Logits"), ("BufferChange", "class_names", "07")):
        member = schemas[schema]["properties"][name]
        assert "patternProperties" not in member
        assert not re.fullmatch(member["propertyNames"]["pattern"], wrong)


@pytest.mark.parametrize("value", [True, False, "77", "77.0", None, 77.5, [77], {}, 0, -1, 2**53])
def test_a_budget_is_a_number_and_nothing_that_looks_like_one(asked: httpx.Client, value: object) -> None:
    answer = asked.post("/v1/buffers", json={"name": "c", "budget_bytes": value})
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (422, "invalid-request")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/buffers", {"name": "c", "budget_bytes": 7, "quality": "50"}),
        ("POST", "/v1/buffers", {"name": "c", "budget_bytes": 7, "quality": True}),
        ("PATCH", "/v1/buffers/b", {"budget_bytes": "7"}),
        ("PATCH", "/v1/buffers/b", {"class_names": {"07": "cat"}}),
        ("PATCH", "/v1/buffers/b", {"class_names": {" 7": "cat"}}),
        ("PATCH", "/v1/buffers/b", {"class_names": {"7.0": "cat"}}),
        ("POST", "/v1/buffers/b/forks", {"name": "c", "frozen": "yes"}),
        ("POST", "/v1/buffers/b/forks", {"name": "c", "frozen": 1}),
        ("POST", "/v1/buffers/b/forks", {"name": "c", "generation": "0"}),
        ("POST", "/v1/buffers/b/forks", {"name": "c", "generation": False}),
        ("POST", "/v1/buffers/b/forks", {"name": "c", "budget_bytes": True}),
        ("PATCH", "/v1/buffers/b/exemplars?class_id=0", {"class_id": "1"}),
        ("PATCH", "/v1/buffers/b/exemplars?class_id=0", {"class_id": True}),
    ],
)
def test_json_of_another_type_is_refused(asked: httpx.Client, method: str, path: str, body: dict[str, object]) -> None:
    assert asked.request(method, path, json=body).status_code == 422


def test_whole_numbers_are_taken_however_they_are_written(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/buffers", content=b'{"name": "b", "budget_bytes": 1e6}', headers={"content-type": "application/json"}
    )
    assert (answer.status_code, answer.json()["budget_bytes"]) == (201, 10**6)
    assert BufferCreate(name="b", budget_bytes=np.int64(7)).budget_bytes == 7


def test_no_limit_is_beyond_what_json_can_say_exactly(client: httpx.Client, served: ServiceThread) -> None:
    body = {"name": "b", "budget_bytes": MAX_BUDGET_BYTES, "per": "class", "quality": 50}
    client.post("/v1/buffers", json=body).raise_for_status()
    fill(served.state.database, served.settings, 0, {0: 2, 1: 2, 2: 2})
    assert Buffer.model_validate(client.get("/v1/buffers/b").json()).limit_bytes == MAX_BUDGET_BYTES
    assert client.get("/v1/buffers/b/manifest").json()["limit_bytes"] == MAX_BUDGET_BYTES
    shares = [found["share_bytes"] for found in client.get("/v1/buffers/b/tasks/0").json()["classes"]]
    assert sum(shares) == MAX_BUDGET_BYTES


@pytest.mark.services
def test_names_that_postgresql_cannot_hold_are_refused(tmp_path: Path, postgres_url: str) -> None:
    settings = Settings(data_dir=tmp_path, database_url=postgres_url)
    database = Database(settings)
    database.migrate()
    database.close()
    served = ServiceThread(settings)
    with http(served) as client:
        for path in ("/v1/buffers/%00", "/v1/buffers/a%00b/manifest", "/v1/buffers/%00/draw?size=1", "/v1/ingests/%00"):
            assert client.get(path).status_code == 422, path
    served.stop()
