"""Tokens: made once, kept as digests, worth nothing from the moment that they are revoked."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

from engram_service import tokens
from engram_service.settings import Settings
from engram_service.tables import TokenRow
from engram_service.tokens import Tokens
from tests.servers import ADMIN_TOKEN, ServiceThread, http

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def make(admin: httpx.Client) -> Make:
    """Makes tokens: `make(scope="write")`."""

    def made(**given: object) -> dict[str, Any]:
        answer = admin.post("/v1/tokens", json={"name": "trainer", **given})
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    return made


def get(service: ServiceThread, token: str, path: str = "/v1/buffers") -> httpx.Response:
    return httpx.get(service.url + path, headers={"Authorization": f"Bearer {token}"})


def test_a_token_is_told_once_and_kept_as_a_digest(guarded: ServiceThread, admin: httpx.Client, make: Make) -> None:
    made = make(scope="write", prefix="lab-", expires_in_s=60, requests_per_s=5)
    assert re.fullmatch(r"engram_[A-Za-z0-9_-]{49}", made["token"])
    listed = admin.get("/v1/tokens")
    assert [token["id"] for token in listed.json()["tokens"]] == [made["id"]]
    assert made["token"] not in listed.text
    assert (made["created_by"], made["revoked_at"], made["last_used_at"]) == ("admin", None, None)
    stored = b"".join(path.read_bytes() for path in guarded.settings.data_dir.glob("engram.sqlite*"))
    assert made["token"].encode() not in stored
    assert tokens.digest_of(made["token"]).encode() in stored


def test_a_secret_says_whether_it_is_one() -> None:
    secret = tokens.make_secret()
    assert tokens.is_well_formed(secret)
    assert secret != tokens.make_secret()
    for at in range(len(secret)):
        other = "x" if secret[at] != "x" else "y"
        assert not tokens.is_well_formed(secret[:at] + other + secret[at + 1 :])
    assert not tokens.is_well_formed(secret + "\n")
    assert not tokens.is_well_formed("")


def test_a_token_tells_who_it_is_of(guarded: ServiceThread, make: Make) -> None:
    made = make(name="lab 7", scope="write", prefix="lab-")
    assert get(guarded, made["token"], "/v1/whoami").json() == {"who": "lab 7", "scope": "write", "prefix": "lab-"}
    assert get(guarded, ADMIN_TOKEN, "/v1/whoami").json() == {"who": "admin", "scope": "admin", "prefix": ""}


def test_a_revoked_token_is_refused_at_once(guarded: ServiceThread, admin: httpx.Client, make: Make) -> None:
    made = make()
    for _ in range(3):
        assert get(guarded, made["token"]).status_code == 200
    revoked = admin.delete(f"/v1/tokens/{made['id']}")
    answer = get(guarded, made["token"])
    assert (answer.status_code, answer.json()["detail"]) == (401, "the token was revoked")
    again = admin.delete(f"/v1/tokens/{made['id']}")
    assert again.json()["revoked_at"] == revoked.json()["revoked_at"] is not None
    assert admin.delete("/v1/tokens/nothing").status_code == 404
    assert len(admin.get("/v1/tokens").json()["tokens"]) == 1


def test_another_replica_refuses_a_revoked_token_within_its_recheck(
    serve_thread: Callable[..., ServiceThread], guarded: ServiceThread, admin: httpx.Client, make: Make
) -> None:
    other, made = serve_thread(admin_token=ADMIN_TOKEN, data_dir=guarded.settings.data_dir), make()
    assert get(other, made["token"]).status_code == 200
    admin.delete(f"/v1/tokens/{made['id']}")
    revoked_at = time.monotonic()
    while get(other, made["token"]).status_code == 200:
        assert time.monotonic() < revoked_at + 4 * tokens.RECHECK_S


def test_an_expired_token_is_refused(guarded: ServiceThread, make: Make) -> None:
    made = make(expires_in_s=3600)
    assert get(guarded, made["token"]).status_code == 200
    with guarded.state.database.session() as session:
        session.execute(update(TokenRow).values(expires_at=time.time() - 1))
    guarded.state.tokens.forget()
    answer = get(guarded, made["token"])
    assert (answer.status_code, answer.json()["detail"]) == (401, "the token has expired")


def test_a_token_is_not_held_for_good_beyond_its_end(settings: Settings, guarded: ServiceThread, make: Make) -> None:
    made = make(expires_in_s=0.05)
    begun = time.monotonic()
    while get(guarded, made["token"]).status_code == 200:
        assert time.monotonic() < begun + 1


IMPOSSIBLE: list[dict[str, Any]] = [
    {"name": ""},
    {"name": "admin"},
    {"name": tokens.make_secret()},
    {"name": "Local"},
    {"name": "admin "},
    {"name": "service"},
    {"name": "<b>"},
    {"name": "a\nb"},
    {"name": "x" * 101},
    {"scope": "root"},
    {"prefix": "%"},
    {"prefix": "A"},
    {"prefix": "x" * 64},
    {"expires_in_s": 0},
    {"expires_in_s": -1},
    {"expires_in_s": 1e300},
    {"requests_per_s": 0},
    {"requests_per_s": "NaN"},
    {"requests_per_s": 5e-324},
    {"token": "engram_mine"},
]


def test_a_token_that_cannot_be_is_refused(admin: httpx.Client) -> None:
    for wanted in IMPOSSIBLE:
        answer = admin.post("/v1/tokens", json={"name": "trainer", **wanted})
        assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (422, "invalid-request"), wanted
    assert admin.get("/v1/tokens").json()["tokens"] == []


@pytest.mark.parametrize("given", [{"scope": "read"}, {"scope": "write"}, {"scope": "admin", "prefix": "lab-"}])
def test_only_who_reaches_everything_makes_lists_and_revokes_tokens(
    guarded: ServiceThread, admin: httpx.Client, make: Make, given: dict[str, Any]
) -> None:
    made = make(**given)
    with http(guarded, made["token"]) as client:
        for answer in (
            client.post("/v1/tokens", json={"name": "other", "prefix": "lab-x"}),
            client.get("/v1/tokens"),
            client.delete(f"/v1/tokens/{made['id']}"),
        ):
            assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (403, "forbidden")
    assert len(admin.get("/v1/tokens").json()["tokens"]) == 1


def test_an_admin_token_makes_others(guarded: ServiceThread, make: Make) -> None:
    made = make(name="ops", scope="admin")
    with http(guarded, made["token"]) as client:
        answer = client.post("/v1/tokens", json={"name": "other", "scope": "admin"})
    assert (answer.status_code, answer.json()["created_by"]) == (201, "ops")


def test_on_loopback_a_token_counts_where_none_is_needed(served: ServiceThread, client: httpx.Client) -> None:
    assert client.get("/v1/whoami").json()["who"] == "local"
    made = client.post("/v1/tokens", json={"name": "trainer", "scope": "read"}).json()
    assert get(served, made["token"], "/v1/whoami").json()["who"] == "trainer"
    assert get(served, made["token"], "/v1/tokens").status_code == 403
    assert get(served, "wrong").status_code == 401
    client.delete(f"/v1/tokens/{made['id']}")
    assert get(served, made["token"]).status_code == 401


def test_a_token_beyond_its_rate_is_told_when_to_come_back(guarded: ServiceThread, make: Make) -> None:
    slow, free = make(requests_per_s=0.5)["token"], make()["token"]
    assert get(guarded, slow).status_code == 200
    answer = get(guarded, slow)
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (429, "rate-limited")
    assert 1 <= int(answer.headers["Retry-After"]) <= 2
    for _ in range(10):
        assert get(guarded, free).status_code == 200


def test_the_rate_of_the_settings_is_of_every_token_without_its_own(
    serve_thread: Callable[..., ServiceThread],
) -> None:
    service = serve_thread(admin_token=ADMIN_TOKEN, requests_per_s=1.5)
    with http(service, ADMIN_TOKEN) as admin:
        quick = admin.post("/v1/tokens", json={"name": "quick", "requests_per_s": 1000}).json()["token"]
    statuses = [get(service, quick).status_code for _ in range(20)]
    assert set(statuses) == {200}
    assert 429 in [get(service, ADMIN_TOKEN).status_code for _ in range(4)]
    assert httpx.get(f"{service.url}/healthz").status_code == 200


def test_a_flood_of_wrong_tokens_is_not_looked_at_and_stops_nobody_else(
    serve_thread: Callable[..., ServiceThread],
) -> None:
    guarded = serve_thread(admin_token=ADMIN_TOKEN)
    with http(guarded, ADMIN_TOKEN) as admin:
        token = admin.post("/v1/tokens", json={"name": "trainer"}).json()["token"]
    assert get(guarded, token).status_code == 200
    statuses = [get(guarded, tokens.make_secret()).status_code for _ in range(25)]
    assert statuses[0] == 401
    assert statuses[-1] == 429
    assert get(guarded, token).status_code == 200
    assert get(guarded, ADMIN_TOKEN).status_code == 200


def test_when_a_token_was_used_is_written_down_beside_the_requests(guarded: ServiceThread, make: Make) -> None:
    made = make()
    known: Tokens = guarded.state.tokens

    def used_at() -> float | None:
        with guarded.state.database.reading() as session:
            found: float | None = session.scalar(select(TokenRow.last_used_at).where(TokenRow.id == made["id"]))
            return found

    get(guarded, made["token"])
    assert used_at() is None
    known.write_down()
    first = used_at()
    assert first is not None
    known.forget()
    get(guarded, made["token"])
    known.write_down()
    assert used_at() == first


def test_every_answer_has_the_id_of_its_request(guarded: ServiceThread) -> None:
    def ask(path: str, given: str | bytes | None) -> str:
        named = {} if given is None else {b"X-Request-ID": given}
        headers = {b"Authorization": f"Bearer {ADMIN_TOKEN}".encode(), **named}
        answer = httpx.get(guarded.url + path, headers=headers)  # type: ignore[arg-type]
        return answer.headers["X-Request-ID"]

    for path in ("/v1/buffers", "/v1/buffers/none", "/nothing", "/healthz"):
        assert ask(path, "run-7_epoch.3") == "run-7_epoch.3"
    made = {ask("/v1/buffers", given) for given in (None, None, "", "a b", "x" * 65, "é".encode())}
    assert len(made) == 6
    assert all(re.fullmatch("[A-Za-z0-9._-]{1,64}", each) for each in made)
    refused = httpx.get(f"{guarded.url}/v1/buffers", headers={"X-Request-ID": "mine"})
    assert (refused.status_code, refused.headers["X-Request-ID"]) == (401, "mine")


def test_a_flood_of_wrong_tokens_stops_no_good_ones_when_another_is_revoked(
    serve_thread: Callable[..., ServiceThread],
) -> None:
    service = serve_thread(admin_token=ADMIN_TOKEN)
    with http(service, ADMIN_TOKEN) as admin:
        good, bad = (admin.post("/v1/tokens", json={"name": name}).json() for name in ("good", "bad"))
        assert [get(service, made["token"]).status_code for made in (good, bad)] == [200, 200]
        while get(service, tokens.make_secret()).status_code == 401:
            pass
        assert admin.delete(f"/v1/tokens/{bad['id']}").status_code == 200
        assert get(service, good["token"]).status_code == 200
        assert get(service, bad["token"]).status_code == 401
        assert admin.get("/v1/tokens").status_code == 200
