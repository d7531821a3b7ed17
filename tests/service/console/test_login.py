"""Sessions of the console: begun with a token, worth what it is, and of no use to other sites."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select, update

from engram_service import sessions
from engram_service.collect import collect
from engram_service.tables import AuditRow, SessionRow, TokenRow
from tests.servers import ADMIN_TOKEN, ServiceThread, http


@pytest.fixture
def browser(guarded: ServiceThread) -> Iterator[httpx.Client]:
    """A client that keeps cookies and nothing else."""
    with http(guarded) as found:
        yield found


def csrf_of(page: httpx.Response) -> str:
    found = re.search(r'name="csrf" value="([^"]+)"', page.text)
    assert found is not None, page.text
    return found[1]


def log_in(browser: httpx.Client, token: str, **form: str) -> httpx.Response:
    csrf = csrf_of(browser.get("/console/login"))
    return browser.post("/console/login", data={"csrf": csrf, "token": token, **form})


def make(admin: httpx.Client, **given: object) -> dict[str, Any]:
    made: dict[str, Any] = admin.post("/v1/tokens", json={"name": "viewer", **given}).json()
    return made


def rows(service: ServiceThread) -> int:
    with service.state.database.reading() as session:
        return session.scalar(select(func.count()).select_from(SessionRow)) or 0


def test_who_is_not_logged_in_is_sent_to_the_login_and_back(guarded: ServiceThread, browser: httpx.Client) -> None:
    sent = browser.get("/console/audit?who=a%20b&action=token")
    assert (sent.status_code, sent.headers["Cache-Control"]) == (303, "no-store")
    page = browser.get("/console/audit?who=a%20b&action=token", follow_redirects=True)
    wanted = re.search(r'name="next" value="([^"]+)"', page.text)
    assert wanted is not None
    assert wanted[1] == "/console/audit?who=a%20b&amp;action=token"
    answer = log_in(browser, ADMIN_TOKEN, next=wanted[1].replace("&amp;", "&"))
    assert answer.status_code == 303
    back = browser.get(str(answer.url.join(answer.headers["Location"])))
    assert str(back.url).endswith("/console/audit?who=a%20b&action=token")
    assert back.status_code == 200


def test_the_login_leads_to_no_other_place(guarded: ServiceThread, browser: httpx.Client) -> None:
    for wanted in (
        "https://evil.example",
        "//evil.example/console",
        "/v1/buffers",
        "/consolex",
        "/console/../v1/buffers",
        "/console/..",
        "/console/%2e%2e/%2E./v1/buffers",
        "/console/.%2e",
        "/console\\..\\x",
        "/console/x\n",
        "/console@evil.example",
        "console",
        "javascript:alert(1)",
    ):
        answer = log_in(browser, ADMIN_TOKEN, next=wanted)
        assert (answer.status_code, answer.headers["Location"]) == (303, "../console"), wanted
        browser.cookies.clear()


def test_the_cookie_is_for_the_console_and_no_script(guarded: ServiceThread, browser: httpx.Client) -> None:
    first = browser.get("/console/login").headers["Set-Cookie"]
    begun = log_in(browser, ADMIN_TOKEN).headers["Set-Cookie"]
    for cookie in (first, begun):
        assert "; HttpOnly" in cookie
        assert "; SameSite=Strict" in cookie
        assert "Secure" not in cookie
        assert "Domain" not in cookie
    assert "Max-Age=43200" in begun
    # Without a path it is that of the folder of the login.
    assert [cookie.path for cookie in browser.cookies.jar] == ["/console"]
    assert browser.get("/console").status_code == 200
    cookie = dict(browser.cookies)[sessions.COOKIE]
    for path in ("/v1/buffers", "/v1/whoami", "/metrics"):
        answer = httpx.get(guarded.url + path, headers={"Cookie": f"{sessions.COOKIE}={cookie}"})
        assert answer.status_code == 401


def test_behind_a_proxy_with_tls_the_cookie_is_for_tls_alone(browser: httpx.Client) -> None:
    page = browser.get("/console/login", headers={"X-Forwarded-Proto": "https"})
    assert "; Secure" in page.headers["Set-Cookie"]


def test_a_bearer_token_opens_no_page(admin: httpx.Client) -> None:
    assert admin.get("/console").status_code == 303


def test_logging_in_makes_a_new_cookie_and_stores_its_digest_alone(
    guarded: ServiceThread, browser: httpx.Client
) -> None:
    browser.get("/console/login")
    before = dict(browser.cookies)[sessions.COOKIE]
    log_in(browser, ADMIN_TOKEN)
    after = dict(browser.cookies)[sessions.COOKIE]
    assert before != after
    stored = b"".join(path.read_bytes() for path in guarded.settings.data_dir.glob("engram.sqlite*"))
    assert after.encode() not in stored
    assert ADMIN_TOKEN.encode() not in stored
    assert rows(guarded) == 1
    log_in(browser, ADMIN_TOKEN)
    assert rows(guarded) == 1
    assert httpx.get(f"{guarded.url}/console", cookies={sessions.COOKIE: after}).status_code == 303


def test_a_cookie_that_somebody_else_has_chosen_is_nobody_s(guarded: ServiceThread) -> None:
    planted = "A" * 43
    with http(guarded) as victim:
        victim.cookies.set(sessions.COOKIE, planted, path="/console")
        csrf = csrf_of(victim.get("/console/login"))
        begun = victim.post("/console/login", data={"csrf": csrf, "token": ADMIN_TOKEN})
        assert begun.status_code == 303
        assert planted not in begun.headers["Set-Cookie"]
    assert httpx.get(f"{guarded.url}/console", cookies={sessions.COOKIE: planted}).status_code == 303


def test_a_wrong_token_begins_nothing(guarded: ServiceThread, admin: httpx.Client, browser: httpx.Client) -> None:
    wrong = "engram_guess<b>"
    answer = log_in(browser, wrong)
    assert (answer.status_code, "not a token of this service" in answer.text) == (401, True)
    assert wrong not in answer.text
    assert rows(guarded) == 0
    (entry,) = admin.get("/v1/audit").json()["entries"]
    assert (entry["action"], entry["who"], entry["subject"]) == ("session.refuse", "", "from 127.0.0.1")


def test_logins_are_refused_after_many_that_were_wrong_and_do_not_fill_the_audit(
    serve_thread: Callable[..., ServiceThread],
) -> None:
    guarded = serve_thread(admin_token=ADMIN_TOKEN)
    with http(guarded) as browser:
        form = {"csrf": csrf_of(browser.get("/console/login")), "token": "wrong"}
        statuses = [browser.post("/console/login", data=form).status_code for _ in range(25)]
    assert statuses[:20] == [401] * 20
    assert statuses[-1] == 429
    with guarded.state.database.reading() as session:
        assert 1 <= (session.scalar(select(func.count()).select_from(AuditRow)) or 0) <= 21


def test_a_form_without_the_session_s_token_changes_nothing(
    guarded: ServiceThread, admin: httpx.Client, browser: httpx.Client
) -> None:
    other = csrf_of(httpx.get(f"{guarded.url}/console/login"))
    browser.get("/console/login")
    for given in ({}, {"csrf": ""}, {"csrf": other}):
        assert browser.post("/console/login", data={"token": ADMIN_TOKEN, **given}).status_code == 403
    assert rows(guarded) == 0
    log_in(browser, ADMIN_TOKEN)
    for given in ({}, {"csrf": ""}, {"csrf": other}):
        assert browser.post("/console/tokens", data={"name": "x", **given}).status_code == 403
        assert browser.post("/console/logout", data=given).status_code == 403
    assert admin.get("/v1/tokens").json()["tokens"] == []
    assert rows(guarded) == 1


def test_a_form_of_another_site_is_refused_whatever_it_holds(guarded: ServiceThread, browser: httpx.Client) -> None:
    log_in(browser, ADMIN_TOKEN)
    csrf = csrf_of(browser.get("/console/tokens"))
    host = guarded.url.partition("://")[2]
    foreign = [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://evil.example/{host}"},
    ]
    for headers in foreign:
        answer = browser.post("/console/tokens", data={"name": "x", "csrf": csrf}, headers=headers)
        assert (answer.status_code, "another site" in answer.text) == (403, True), headers
    for headers in ({"Sec-Fetch-Site": "same-origin"}, {"Origin": guarded.url}, {}):
        answer = browser.post("/console/tokens", data={"name": "x", "csrf": csrf}, headers=headers)
        assert answer.status_code == 201, headers


def test_a_session_ends_with_logging_out(guarded: ServiceThread, admin: httpx.Client, browser: httpx.Client) -> None:
    log_in(browser, ADMIN_TOKEN)
    cookie = dict(browser.cookies)[sessions.COOKIE]
    csrf = csrf_of(browser.get("/console"))
    out = browser.post("/console/logout", data={"csrf": csrf})
    assert (out.status_code, out.headers["Location"]) == (303, "../console/login")
    assert dict(browser.cookies) == {}
    assert httpx.get(f"{guarded.url}/console", cookies={sessions.COOKIE: cookie}).status_code == 303
    assert [entry["action"] for entry in admin.get("/v1/audit").json()["entries"]] == ["session.end", "session.begin"]


def test_a_session_ends_at_once_with_its_token(
    guarded: ServiceThread, admin: httpx.Client, browser: httpx.Client
) -> None:
    made = make(admin)
    log_in(browser, made["token"])
    assert browser.get("/console").status_code == 200
    admin.delete(f"/v1/tokens/{made['id']}")
    assert browser.get("/console").status_code == 303
    assert browser.get("/console", headers={"HX-Request": "true"}).headers["HX-Refresh"] == "true"
    assert log_in(browser, made["token"]).status_code == 401


def test_a_session_ends_with_the_end_of_its_token_and_after_its_time(
    guarded: ServiceThread, admin: httpx.Client, browser: httpx.Client
) -> None:
    log_in(browser, make(admin)["token"])
    with guarded.state.database.session() as session:
        session.execute(update(TokenRow).values(expires_at=time.time() - 1))
    guarded.state.tokens.forget()
    assert browser.get("/console").status_code == 303
    log_in(browser, ADMIN_TOKEN)
    assert browser.get("/console").status_code == 200
    with guarded.state.database.session() as session:
        session.execute(update(SessionRow).values(expires_at=time.time() - 1))
    assert browser.get("/console").status_code == 303
    assert collect(guarded.state.database, guarded.state.store, guarded.settings).records == 1
    assert rows(guarded) == 0


def test_a_session_ends_when_the_environment_has_another_token(
    serve_thread: Callable[..., ServiceThread], guarded: ServiceThread, browser: httpx.Client
) -> None:
    log_in(browser, ADMIN_TOKEN)
    cookie = dict(browser.cookies)[sessions.COOKIE]
    changed = serve_thread(admin_token="another-token", data_dir=guarded.settings.data_dir)
    assert httpx.get(f"{changed.url}/console", cookies={sessions.COOKIE: cookie}).status_code == 303


def test_a_session_may_do_what_its_token_may(
    guarded: ServiceThread, admin: httpx.Client, browser: httpx.Client
) -> None:
    log_in(browser, make(admin, scope="read", prefix="lab-")["token"])
    page = browser.get("/console")
    assert page.status_code == 200
    assert "Tokens</a>" not in page.text
    csrf = csrf_of(page)
    for path in ("/console/tokens", "/console/audit", "/console/buffers/other", "/console/buffers/other/x"):
        assert browser.get(path).status_code == 403
        assert browser.post(path, data={"csrf": csrf}).status_code == 403
    assert browser.get("/console/buffers/lab-1").status_code == 404


def test_sessions_of_one_token_are_bounded(guarded: ServiceThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 3)
    opened = []
    for _ in range(5):
        with http(guarded) as browser:
            log_in(browser, ADMIN_TOKEN)
            opened.append(dict(browser.cookies)[sessions.COOKIE])
    statuses = [httpx.get(f"{guarded.url}/console", cookies={sessions.COOKIE: cookie}).status_code for cookie in opened]
    assert statuses == [303, 303, 200, 200, 200]


def test_without_a_token_the_console_is_open_and_still_checks_its_forms(client: httpx.Client) -> None:
    page = client.get("/console/tokens")
    assert page.status_code == 200
    csrf = csrf_of(page)
    assert client.post("/console/tokens", data={"name": "x"}).status_code == 403
    assert client.post("/console/tokens", data={"name": "x", "csrf": csrf}).status_code == 201
    client.cookies.clear()
    assert client.post("/console/tokens", data={"name": "y", "csrf": csrf}).status_code == 403
    assert len(client.get("/v1/tokens").json()["tokens"]) == 1


def test_logins_without_end_are_refused_and_do_not_fill_the_audit(
    serve_thread: Callable[..., ServiceThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "BEGUN_BURST", 3.0)
    guarded = serve_thread(admin_token=ADMIN_TOKEN)
    with http(guarded, ADMIN_TOKEN) as admin:
        secret = make(admin)["token"]
    with http(guarded) as browser:
        answers = [log_in(browser, secret) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [303] * 3 + [429] * 2
        assert "logged in too often" in answers[-1].text
        assert log_in(browser, ADMIN_TOKEN).status_code == 303, "of others nothing is said"
    with guarded.state.database.reading() as session:
        begun = select(func.count()).select_from(AuditRow).where(AuditRow.action == "session.begin")
        assert session.scalar(begun) == 4
