"""The page of draws says what was served of each buffer, task and class, and to whom; names are text."""

from __future__ import annotations

import re
from collections.abc import Callable

import httpx
import pytest
from sqlalchemy import insert, update

from engram_service.console import draws
from engram_service.tables import BufferRow, ServedRow
from tests.contents import create, fill
from tests.servers import ServiceThread, http

pytestmark = pytest.mark.slow

EVIL = "<img src=x onerror=alert(1)>"


def serve_rows(service: ServiceThread, rows: list[tuple[str, str, int, int, int]]) -> None:
    """As if these (buffer, who, task, class id, exemplars) had been drawn."""
    names = "buffer", "who", "task", "class_id", "exemplars"
    with service.state.database.session() as session:
        more = {"bytes": 1000, "last_at": 1.7e9}
        session.execute(insert(ServedRow), [dict(zip(names, row, strict=True)) | more for row in rows])


@pytest.fixture
def filled(served: ServiceThread) -> ServiceThread:
    database = served.state.database
    create(database)
    fill(database, served.settings, 0, {0: 20, 1: 10})
    fill(database, served.settings, 1, {2: 5})
    create(database, "other")
    with database.session() as session:
        named = update(BufferRow).where(BufferRow.name == "b").values(class_names={"1": EVIL})
        session.execute(named)
    serve_rows(
        served,
        [
            ("b", "ann", 0, 0, 50),
            ("b", "ann", 0, 1, 5),
            ("b", EVIL, 0, 0, 10),
            ("b", EVIL, 1, 2, 7),
            ("other", "ann", 0, 0, 1),
        ],
    )
    return served


def rows_of(page: str, caption: str) -> list[list[str]]:
    """The cells of a table's rows, without markup."""
    table = page[page.index(f"<caption>{caption}") :]
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    return [
        [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)]
        for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    ]


def test_each_buffer_is_listed_with_what_was_drawn_from_it(filled: ServiceThread, client: httpx.Client) -> None:
    page = client.get("/console/draws").text
    assert [row[:2] for row in rows_of(page, "Served")] == [["b", "72"], ["other", "1"]]
    assert "GET /v1/draws<" in page


def test_a_buffer_tells_to_whom_and_of_which_tasks_and_classes(filled: ServiceThread, client: httpx.Client) -> None:
    page = client.get("/console/draws?buffer=b").text
    assert [row[1] for row in rows_of(page, "To whom")] == ["55", "17"]
    assert [(row[0], row[2]) for row in rows_of(page, "Of which tasks")] == [("0", "65"), ("1", "7")]
    classes = rows_of(page, "Of which classes")
    assert [(row[0], row[2], row[4], row[5]) for row in classes] == [
        ("0", "60", "20", "3.0"),
        ("0", "5", "10", "0.5"),
        ("1", "7", "5", "1.4"),
    ]
    assert EVIL not in page
    assert page.count("&lt;img") >= 2


def test_filters_narrow_the_tables_and_stand_in_the_address(filled: ServiceThread, client: httpx.Client) -> None:
    page = client.get("/console/draws", params={"buffer": "b", "who": EVIL, "task": "0"}).text
    assert [(row[0], row[2]) for row in rows_of(page, "Of which classes")] == [("0", "10")]
    assert len(rows_of(page, "To whom")) == 2
    assert EVIL not in page
    assert "Show all" in page


def test_many_classes_come_page_by_page(
    filled: ServiceThread, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "PAGE", 2)
    first = client.get("/console/draws?buffer=b").text
    assert len(rows_of(first, "Of which classes")) == 2
    following = re.search(r'<p class="pager"><a href="([^"]+)"', first)
    assert following is not None
    second = client.get("/console/draws" + following[1].replace("&amp;", "&")).text
    assert [row[0] for row in rows_of(second, "Of which classes")] == ["1"]
    assert 'class="pager"' not in second


def test_a_buffer_nobody_has_drawn_from_says_so(served: ServiceThread, client: httpx.Client) -> None:
    assert "Nothing was drawn yet" in client.get("/console/draws").text
    create(served.state.database)
    assert "Nobody has drawn" in client.get("/console/draws?buffer=b").text


@pytest.mark.parametrize(
    ("query", "status"), [("buffer=none", 404), ("buffer=b&cursor=x", 422), ("buffer=b&task=x", 422), ("who=%00", 422)]
)
def test_what_cannot_be_shown_is_a_page_that_says_why(client: httpx.Client, query: str, status: int) -> None:
    answer = client.get(f"/console/draws?{query}")
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "text/html; charset=utf-8")


def test_somebody_with_a_prefix_sees_their_own_buffers_alone(serve_thread: Callable[..., ServiceThread]) -> None:
    service = serve_thread(admin_token="a" * 32)
    for name in ("t-1", "u-1"):
        create(service.state.database, name)
    serve_rows(service, [("t-1", "ann", 0, 0, 5), ("u-1", "ann", 0, 0, 6)])
    with http(service, "a" * 32) as admin:
        made = admin.post("/v1/tokens", json={"name": "t", "scope": "read", "prefix": "t-"}).json()["token"]
    with http(service) as browser:
        login = browser.get("/console/login").text
        csrf = re.search(r'name="csrf" value="([^"]+)"', login)
        assert csrf is not None
        assert browser.post("/console/login", data={"csrf": csrf[1], "token": made}).status_code == 303
        assert [row[0] for row in rows_of(browser.get("/console/draws").text, "Served")] == ["t-1"]
        assert browser.get("/console/draws?buffer=t-1").status_code == 200
        assert browser.get("/console/draws?buffer=u-1").status_code == 403
    with http(service, made) as client:
        assert [row["buffer"] for row in client.get("/v1/draws").json()["served"]] == ["t-1"]
        assert client.get("/v1/draws?buffer=u-1").status_code == 403
