"""The pages of ingests and extractors: history, reasons, and what tries again, cancels and deletes."""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import sha256

import httpx
import pytest

from engram_service.storage import PackStore
from engram_service.tables import ExtractorRow
from tests.contents import create, pictures
from tests.pages import post, text
from tests.servers import ServiceThread
from tests.uploads import queue, tar_of_arrays, work_through

pytestmark = pytest.mark.slow

HTML = "<b>&\"'</b>"


def prepared(served: ServiceThread) -> list[str]:
    """Ids of an ingest that committed, one that failed and one that waits."""
    database, settings = served.state.database, served.settings
    create(database, "b")
    create(database, "c")
    bodies = {"b": tar_of_arrays(pictures(0, 12), [0, 1] * 6), "c": b"no tar" * 200}
    ids = [queue(database, settings, body, buffer=name).id for name, body in bodies.items()]
    work_through(database, PackStore(settings.packs_dir), settings)
    return [*ids, queue(database, settings, bodies["b"], task=3).id]


def test_ingests_are_listed_with_their_reasons_and_filtered(served: ServiceThread, client: httpx.Client) -> None:
    done, failed, waiting = prepared(served)
    page = client.get("/console/ingests")
    for ingest in (done, failed, waiting):
        assert f'href="../console/ingests/{ingest}"' in page.text
    problem = client.get(f"/v1/ingests/{failed}").json()["problem"]["detail"]
    assert problem in text(page)
    assert 'hx-trigger="every 1s"' in page.text
    for query, shown in (
        ("buffer=c", {failed}),
        ("state=failed", {failed}),
        ("state=received&buffer=b", {waiting}),
        ("state=nonsense", {done, failed, waiting}),
        ("buffer=c&state=committed", set[str]()),
    ):
        found = client.get(f"/console/ingests?{query}").text
        assert {ingest for ingest in (done, failed, waiting) if ingest in found} == shown, query
    assert "hx-trigger" not in client.get("/console/ingests?state=failed").text, "nothing moves there"
    assert client.get("/v1/ingests?state=failed").json()["ingests"][0]["id"] == failed
    assert client.get("/v1/ingests?state=nonsense").status_code == 422
    assert client.get("/console/ingests?buffer=none").status_code == 404
    assert client.get("/console/ingests?cursor=x").status_code == 422


def test_an_ingest_is_cancelled_and_tried_again(served: ServiceThread, client: httpx.Client) -> None:
    done, failed, waiting = prepared(served)
    assert post(client, f"/console/ingests/{waiting}/cancel").status_code == 303
    assert client.get(f"/v1/ingests/{waiting}").json()["state"] == "cancelled"
    assert "Try again" in client.get(f"/console/ingests/{waiting}").text
    assert post(client, f"/console/ingests/{waiting}/retry").status_code == 303
    assert client.get(f"/v1/ingests/{waiting}").json()["state"] == "received"
    for path, status in (
        (f"{done}/cancel", 409),
        (f"{done}/retry", 409),
        (f"{waiting}/retry", 409),
        ("0" * 32 + "/cancel", 404),
        ("0" * 32 + "/retry", 404),
    ):
        assert post(client, f"/console/ingests/{path}").status_code == status, path
    problem = client.get(f"/v1/ingests/{failed}").json()["problem"]["detail"]
    assert problem in text(client.get(f"/console/ingests/{failed}"))
    assert client.get("/console/ingests/" + "0" * 32).status_code == 404


def test_a_long_history_has_pages(served: ServiceThread, client: httpx.Client) -> None:
    create(served.state.database, "b")
    ids = [queue(served.state.database, served.settings, b"tar", task=n).id for n in range(52)]
    page = client.get("/console/ingests?state=received").text
    assert all(ingest in page for ingest in ids[2:])
    assert ids[1] not in page
    link = page.partition('rel="next"')[0].rpartition('href="')[2].partition('"')[0].replace("&amp;", "&")
    rest = client.get(f"/console/ingests{link}").text
    assert [ingest for ingest in ids if f'id="ingest-{ingest}"' in rest] == ids[:2]


def test_extractors_are_listed_with_the_decisions_that_rest_on_them(
    served: ServiceThread, client: httpx.Client
) -> None:
    prepared(served)
    digest = sha256(b"model").hexdigest()
    with served.state.database.session() as session:
        row = ExtractorRow(sha256=digest, bytes=5, input_shape=[None, 3, 8, 8], dimensions=16, created_at=time.time())
        session.add(row)
    (served.settings.extractors_dir / digest).write_bytes(b"model")
    found = text(client.get("/console/extractors"))
    assert f"{digest[:16]} 5 B N×3×8×8 16" in found
    assert post(client, f"/console/extractors/{digest}/delete").status_code == 303
    assert client.get("/v1/extractors").json()["extractors"] == []
    assert post(client, f"/console/extractors/{digest}/delete").status_code == 404
    assert "None is registered" in text(client.get("/console/extractors"))


def test_forms_of_ingests_and_extractors_need_the_token_of_the_session(
    served: ServiceThread, client: httpx.Client
) -> None:
    _, _, waiting = prepared(served)
    for path in (f"ingests/{waiting}/cancel", f"ingests/{waiting}/retry", f"extractors/{'0' * 64}/delete"):
        assert client.post(f"/console/{path}", follow_redirects=False).status_code == 403
    assert client.get(f"/v1/ingests/{waiting}").json()["state"] == "received"


def test_ingests_of_another_prefix_are_not_there(serve_thread: Callable[..., ServiceThread]) -> None:
    service = serve_thread(admin_token="a" * 40)
    admin = httpx.Client(base_url=service.url, headers={"Authorization": "Bearer " + "a" * 40})
    with admin, httpx.Client(base_url=service.url) as browser:
        for name in ("mine-b", "other"):
            admin.post("/v1/buffers", json={"name": name, "budget_bytes": 24_000})
        mine, other = (
            queue(service.state.database, service.settings, b"tar", buffer=name).id for name in ("mine-b", "other")
        )
        wanted = {"name": "writer", "scope": "write", "prefix": "mine-"}
        secret = admin.post("/v1/tokens", json=wanted).json()["token"]
        login = browser.get("/console/login").text
        csrf = login.partition('"X-CSRF-Token": "')[2].partition('"')[0]
        assert browser.post("/console/login", data={"csrf": csrf, "token": secret}).status_code == 303
        page = browser.get("/console/ingests").text
        assert mine in page
        assert other not in page
        assert browser.get(f"/console/ingests/{other}").status_code == 404
        assert browser.get("/console/ingests?buffer=other").status_code == 403
        assert post(browser, f"/console/ingests/{other}/cancel").status_code == 404
        assert post(browser, f"/console/ingests/{mine}/cancel").status_code == 303
        assert post(browser, f"/console/extractors/{'0' * 64}/delete").status_code == 403
