"""The pages of tokens and of the audit."""

from __future__ import annotations

import html
import re

import httpx

from engram_service import tokens
from engram_service.console import audit_log
from tests.contents import create
from tests.servers import ServiceThread


def csrf_of(client: httpx.Client) -> str:
    found = re.search(r'name="csrf" value="([^"]+)"', client.get("/console/tokens").text)
    assert found is not None
    return found[1]


def make(client: httpx.Client, **form: str) -> httpx.Response:
    return client.post("/console/tokens", data={"csrf": csrf_of(client), "name": "trainer", **form})


def test_a_token_is_made_shown_once_and_revoked(client: httpx.Client) -> None:
    made = make(client, name="lab 7", scope="write", prefix="lab-", expires_in_days="30", requests_per_s="2.5")
    assert (made.status_code, made.headers["Cache-Control"]) == (201, "no-store")
    secret = re.search(r"engram_[\w-]{49}", made.text)
    assert secret is not None
    assert tokens.is_well_formed(secret[0])
    assert secret[0] not in client.get("/console/tokens").text
    (listed,) = client.get("/v1/tokens").json()["tokens"]
    wanted = {"name": "lab 7", "scope": "write", "prefix": "lab-", "requests_per_s": 2.5}
    assert {key: listed[key] for key in wanted} == wanted
    assert listed["expires_at"] is not None
    revoked = client.post(f"/console/tokens/{listed['id']}/revoke", data={"csrf": csrf_of(client)})
    assert (revoked.status_code, revoked.headers["Location"]) == (303, "../../../console/tokens")
    assert "revoked" in client.get("/console/tokens").text
    assert client.get("/v1/whoami", headers={"Authorization": f"Bearer {secret[0]}"}).status_code == 401
    assert client.post("/console/tokens/nothing/revoke", data={"csrf": csrf_of(client)}).status_code == 404


def test_a_form_that_cannot_be_comes_back_as_it_was_with_what_is_wrong(client: httpx.Client) -> None:
    for wrong in (
        {"name": ""},
        {"name": "<script>alert(1)</script>"},
        {"scope": "root"},
        {"prefix": "A%"},
        {"expires_in_days": "soon"},
        {"expires_in_days": "-1"},
        {"expires_in_days": "nan"},
        {"requests_per_s": "0"},
        {"name": "admin"},
    ):
        answer = make(client, **wrong)
        assert answer.status_code == 422, wrong
        assert 'role="alert"' in answer.text
        assert "<script>alert" not in answer.text
        ((key, value),) = wrong.items()
        if key != "scope":
            assert f'value="{html.escape(value)}"'.replace("&quot;", "&#34;") in answer.text
    assert client.get("/v1/tokens").json()["tokens"] == []


def test_the_audit_shows_filters_and_pages(client: httpx.Client, served: ServiceThread) -> None:
    for number in range(audit_log.PAGE + 5):
        create(served.state.database, f"b{number}")
    make(client)
    page = client.get("/console/audit")
    assert page.text.count("<tr>") == audit_log.PAGE + 1
    following = re.search(r'href="([^"]*cursor=[^"]+)"', page.text)
    assert following is not None
    second = client.get(f"/console/audit{html.unescape(following[1])}")
    assert second.text.count("<tr>") == 6 + 1
    assert 'rel="next"' not in second.text
    only = client.get("/console/audit?buffer=&who=&action=token")
    assert only.text.count("<tr>") == 1 + 1
    assert "token.create" in only.text
    assert "GET /v1/audit?action=token" in only.text
    assert client.get("/console/audit?action=token.create").text.count("<tr>") == 1 + 1
    assert "Nothing was changed" in client.get("/console/audit?buffer=none").text
    assert client.get("/console/audit?cursor=x").status_code == 422


def test_the_audit_has_a_line_for_each_value_that_changed(client: httpx.Client, served: ServiceThread) -> None:
    create(served.state.database)
    budget = client.get("/v1/buffers/b").json()["budget_bytes"]
    assert client.patch("/v1/buffers/b", json={"budget_bytes": budget + 1}).status_code == 200
    (entry,) = client.get("/v1/audit?action=buffer.change").json()["entries"]
    same = [name for name, value in entry["before"].items() if entry["after"].get(name) == value]
    assert "exemplars" in same
    page = client.get("/console/audit?action=buffer.change").text
    lines = re.findall(r"<li>(.*?)</li>", page.partition("<tbody>")[2])
    assert f'<span class="quiet">budget_bytes</span> {budget:,} → {budget + 1:,}' in lines
    assert not any(f">{name}<" in line for name in same for line in lines)


def test_the_audit_leads_to_the_ingest(client: httpx.Client, served: ServiceThread) -> None:
    create(served.state.database)
    tar = {"Content-Type": "application/x-tar"}
    accepted = client.post("/v1/buffers/b/tasks/0/ingests", content=b"x" * 1024, headers=tar)
    assert accepted.status_code == 202, accepted.text
    ingest = accepted.json()["id"]
    page = client.get("/console/audit?action=ingest.receive").text
    address = re.search(rf'href="([^"]*/ingests/{ingest})"', page)
    assert address is not None
    assert client.get(address[1].removeprefix("..")).status_code == 200


def test_what_others_chose_is_text_on_the_page(client: httpx.Client, served: ServiceThread) -> None:
    create(served.state.database)
    name = "<img src=x onerror=alert(1)> & \"'"
    assert client.patch("/v1/buffers/b", json={"class_names": {"0": name}}).status_code == 200
    page = client.get("/console/audit").text
    assert "<img src=x" not in page
    assert "img src=x onerror" in page
