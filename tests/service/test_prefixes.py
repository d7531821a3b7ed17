"""A token with a prefix: it sees and changes buffers whose names begin so, and cannot tell what else there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.contents import create, fill
from tests.servers import ServiceThread, http
from tests.uploads import queue


@pytest.fixture
def filled(guarded: ServiceThread) -> ServiceThread:
    """The service with a buffer `lab-1` and one beside the prefix, each with a pack and a waiting upload."""
    service = guarded
    for seed, name in enumerate(("lab-1", "other")):
        create(service.state.database, name, budget_bytes=5000)
        fill(service.state.database, service.settings, 0, {seed: 3}, name=name, seed=seed)
    for name in ("lab-1", "other"):
        queue(service.state.database, service.settings, b"a tar", buffer=name)
    return service


@pytest.fixture
def lab(filled: ServiceThread, admin: httpx.Client) -> Iterator[httpx.Client]:
    """Whoever may do everything to buffers whose names begin with "lab-"."""
    made = admin.post("/v1/tokens", json={"name": "lab", "scope": "admin", "prefix": "lab-"}).json()
    with http(filled, made["token"]) as found:
        yield found


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["type"].rpartition("/")[2]


def pack_of(admin: httpx.Client, buffer: str) -> str:
    digest: str = admin.get(f"/v1/buffers/{buffer}/manifest").json()["packs"][0]["digest"]
    return digest


def test_lists_show_what_is_within_the_prefix(admin: httpx.Client, lab: httpx.Client) -> None:
    assert [buffer["name"] for buffer in lab.get("/v1/buffers").json()["buffers"]] == ["lab-1"]
    assert [buffer["name"] for buffer in admin.get("/v1/buffers").json()["buffers"]] == ["lab-1", "other"]
    assert {found["buffer"] for found in lab.get("/v1/ingests").json()["ingests"]} == {"lab-1"}
    assert problem(lab.get("/v1/ingests", params={"buffer": "other"})) == (403, "forbidden")
    assert problem(lab.get("/v1/ingests", params={"buffer": "lab-none"})) == (404, "not-found")


def test_a_buffer_beside_the_prefix_is_forbidden_whether_there_is_one_or_not(lab: httpx.Client) -> None:
    for name in ("other", "none", "lab", "LAB-1", "xlab-1", "lab%2D"[:3]):
        for path in ("", "/manifest", "/draw?size=1", "/export", "/exemplars", "/tasks/0"):
            answer = lab.get(f"/v1/buffers/{name}{path}")
            assert problem(answer) == (403, "forbidden")
    assert lab.get("/v1/buffers/lab-1/draw?size=1").status_code == 200
    assert problem(lab.get("/v1/buffers/lab-none/draw?size=1")) == (404, "not-found")


def test_an_ingest_beside_the_prefix_is_not_there(admin: httpx.Client, lab: httpx.Client) -> None:
    ingests = admin.get("/v1/ingests").json()["ingests"]
    by_buffer = {found["buffer"]: found["id"] for found in ingests if found["state"] == "received"}
    for method in ("GET", "DELETE"):
        assert problem(lab.request(method, f"/v1/ingests/{by_buffer['other']}")) == (404, "not-found")
        assert lab.request(method, f"/v1/ingests/{by_buffer['lab-1']}").status_code == 200
    assert admin.get(f"/v1/ingests/{by_buffer['other']}").json()["state"] == "received"


def test_a_pack_is_there_if_some_buffer_within_the_prefix_names_it(admin: httpx.Client, lab: httpx.Client) -> None:
    own, other = pack_of(admin, "lab-1"), pack_of(admin, "other")
    assert lab.get(f"/v1/packs/{own}").status_code == 200
    assert problem(lab.get(f"/v1/packs/{other}")) == (404, "not-found")
    assert problem(lab.get(f"/v1/buffers/lab-1/exemplars/{other}/0")) == (404, "not-found")
    assert admin.post("/v1/buffers/other/forks", json={"name": "lab-2"}).status_code == 201
    assert lab.get(f"/v1/packs/{other}").status_code == 200


def test_new_buffers_get_names_within_the_prefix(admin: httpx.Client, lab: httpx.Client) -> None:
    for path, body in (("/v1/buffers", {"budget_bytes": 10}), ("/v1/buffers/lab-1/forks", {})):
        for name in ("other", "new", "lab"):
            assert problem(lab.post(path, json={"name": name, **body})) == (403, "forbidden")
        assert lab.post(path, json={"name": f"lab-{len(path)}", **body}).status_code == 201
    assert problem(lab.post("/v1/buffers/other/forks", json={"name": "lab-9"})) == (403, "forbidden")
    assert len(admin.get("/v1/buffers").json()["buffers"]) == 4


def test_a_budget_is_for_administrators_and_names_are_for_writers(filled: ServiceThread, admin: httpx.Client) -> None:
    made = admin.post("/v1/tokens", json={"name": "trainer", "scope": "write", "prefix": "lab-"}).json()
    changes: list[tuple[dict[str, Any], int]] = [
        ({"class_names": {"0": "zero"}}, 200),
        ({"budget_bytes": 4000}, 403),
        ({"budget_bytes": 4000, "class_names": {"1": "one"}}, 403),
    ]
    with http(filled, made["token"]) as client:
        for change, status in changes:
            assert client.patch("/v1/buffers/lab-1", json=change).status_code == status
    found = admin.get("/v1/buffers/lab-1").json()
    assert (found["budget_bytes"], found["class_names"]) == (5000, {"0": "zero"})


def test_an_encoded_slash_or_line_end_leads_past_no_check(lab: httpx.Client) -> None:
    for path in ("/buffers/other%2Fmanifest", "/buffers/lab-1%2F..%2Fother", "/buffers%0A", "/buffers/other%0A"):
        assert lab.get(f"/v1{path}").status_code in (403, 404)
    assert lab.get("//v1/buffers/other").status_code in (403, 404)


def test_the_audit_names_no_source_beside_the_prefix(admin: httpx.Client, lab: httpx.Client) -> None:
    for source, name in (("other", "lab-2"), ("lab-1", "lab-3")):
        assert admin.post(f"/v1/buffers/{source}/forks", json={"name": name}).status_code == 201
    told = {each["buffer"]: each for each in lab.get("/v1/audit?action=buffer.fork").json()["entries"]}
    assert "other" not in str(told)
    assert {name: entry["after"]["forked_from"] for name, entry in told.items()} == {"lab-2": None, "lab-3": "lab-1"}
    known = {each["buffer"]: each for each in admin.get("/v1/audit?action=buffer.fork").json()["entries"]}
    assert known["lab-2"]["after"]["forked_from"] == "other"
