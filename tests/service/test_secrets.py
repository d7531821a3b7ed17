"""Nothing of a token is anywhere but with whoever holds it: not in logs, the audit, pages, problems or the database."""

from __future__ import annotations

import logging
import re

import httpx
import pytest

from engram_service import tokens
from engram_service.sessions import COOKIE
from tests.servers import ADMIN_TOKEN, ServiceThread, http


def test_a_day_of_everybody_leaves_nothing_of_a_token_behind(
    guarded: ServiceThread, admin: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    with http(guarded) as browser:

        def ask(client: httpx.Client, method: str, path: str, **given: object) -> httpx.Response:
            answer = client.request(method, path, **given)  # type: ignore[arg-type]
            said.append(f"{answer.status_code} {path} {answer.headers.get('Location')} {answer.text}")
            return answer

        made = admin.post("/v1/tokens", json={"name": "trainer", "scope": "write"}).json()
        own, wrong = made["token"], tokens.make_secret()
        secrets = {ADMIN_TOKEN, own, wrong}
        for secret in (own, wrong, own + "x", f"{own} {own}"):
            headers = {"Authorization": f"Bearer {secret}"}
            for method, path in (("GET", "/v1/whoami"), ("POST", "/v1/tokens"), ("GET", "/nothing"), ("PUT", "/v1/x")):
                ask(admin, method, path, headers=headers)
        ask(admin, "POST", "/v1/tokens", json={"name": own})
        ask(admin, "GET", "/v1/whoami", headers={"Authorization": own})
        csrf = csrf_of(browser.get("/console/login"))
        for secret in (wrong, own + "x", own):
            ask(browser, "POST", "/console/login", data={"csrf": csrf, "token": secret})
        secrets.add(browser.cookies[COOKIE])
        for path in ("/console", "/console/tokens", "/console/audit", "/console/nothing"):
            ask(browser, "GET", path)
        browser.cookies.clear()
        csrf = csrf_of(browser.get("/console/login"))
        assert browser.post("/console/login", data={"csrf": csrf, "token": ADMIN_TOKEN}).status_code == 303
        secrets.add(browser.cookies[COOKIE])
        for path in ("/console", "/console/tokens", "/console/audit"):
            ask(browser, "GET", path)
        made_here = browser.post("/console/tokens", data={"csrf": csrf_of(browser.get("/console/tokens")), "name": "x"})
        secrets |= set(re.findall(r"engram_[\w-]{49}", made_here.text))
        ask(admin, "DELETE", f"/v1/tokens/{made['id']}")
        for path in ("/v1/tokens", "/v1/audit", "/metrics", "/healthz", "/openapi.json"):
            ask(admin, "GET", path)
    assert len(secrets) == 6
    # Those of the client's own library are about what it sends and gets.
    ours = [record for record in caplog.records if not record.name.startswith("httpcore")]
    log = "\n".join(f"{vars(record)} {record.getMessage()}" for record in ours)
    assert "/v1/whoami" in log
    stored = b"".join(path.read_bytes() for path in guarded.settings.data_dir.rglob("*") if path.is_file())
    for secret in secrets:
        for part in (secret, secret[7:20], secret[-12:]):
            assert part not in log
            assert part.encode() not in stored
            assert not [text for text in said if part in text]


def csrf_of(page: httpx.Response) -> str:
    found = re.search(r'name="csrf" value="([^"]+)"', page.text)
    assert found is not None
    return found[1]
