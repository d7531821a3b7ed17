"""Overview and the pages of a buffer: what they show, what their forms do, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import httpx
import pytest

from engram.schemas import BufferCreate, ForkCreate
from engram_service import buffers, commit
from tests.contents import fill
from tests.pages import post, text
from tests.servers import ServiceThread, http

pytestmark = pytest.mark.slow

HTML = "<b>&\"'</b>"


@dataclass
class Filled:
    """A service with a buffer `b` of two tasks, and a client of it."""

    service: ServiceThread
    client: httpx.Client

    def buffer(self, name: str = "b") -> dict[str, object]:
        found: dict[str, object] = self.client.get(f"/v1/buffers/{name}").json()
        return found


@pytest.fixture
def filled(served: ServiceThread, client: httpx.Client) -> Filled:
    database, settings = served.state.database, served.settings
    with database.session() as session:
        buffers.create(session, BufferCreate(name="b", budget_bytes=24_000, quality=50))
    fill(database, settings, 0, {0: 50, 1: 30})
    fill(database, settings, 1, {2: 7, 7: 60})
    client.patch("/v1/buffers/b", json={"class_names": {"0": HTML, "7": "boots"}})
    return Filled(served, client)


def test_the_overview_shows_every_buffer_against_its_limit(filled: Filled) -> None:
    page = filled.client.get("/console")
    found = text(page)
    assert "Buffers 1 Exemplars" in found
    assert 'href="console/buffers/b"' in page.text
    assert "of 24.0 kB" in page.text
    assert "Health ok" in found


def test_the_overview_says_what_is_wrong(filled: Filled) -> None:
    extractors = filled.service.settings.extractors_dir
    extractors.rmdir()
    assert f"{extractors} is missing" in text(filled.client.get("/console"))


def test_a_buffer_is_made_by_a_form(client: httpx.Client) -> None:
    fields = {"name": " new ", "budget": "1.5MB", "per": "class", "share_by": "task", "subsampling": "4:4:4"}
    answer = post(client, "/console/buffers", **fields, quality="60", fields="key: utf8\n\nscore:float32 finite")
    assert (answer.status_code, answer.headers["location"]) == (303, "../console/buffers/new")
    made = client.get("/v1/buffers/new").json()
    assert (made["budget_bytes"], made["per"], made["share_by"], made["quality"]) == (1_500_000, "class", "task", 60)
    assert made["fields"] == {"key": "utf8", "score": "float32 finite"}


def test_a_form_that_says_no_buffer_comes_back_with_the_reason(client: httpx.Client) -> None:
    cases: list[tuple[dict[str, str], str]] = [
        ({"name": "Capital"}, "name: String should match"),
        ({"name": HTML}, "name: String should match"),
        ({"budget": "much"}, "budget: 'much' is not an amount"),
        ({"budget": ""}, "budget: '' is not an amount"),
        ({"budget": "0"}, "budget_bytes: Input should be greater"),
        ({"quality": "best"}, "quality: 'best' is not a whole number"),
        ({"quality": "101"}, "quality: Input should be less"),
        ({"per": "nobody"}, "per: Input should be"),
        ({"fields": "key utf8"}, "a line is a name, a colon and a type"),
        ({"fields": f"key: {HTML}"}, HTML),
    ]
    for change, sentence in cases:
        answer = post(client, "/console/buffers", **({"name": "new", "budget": "1MB"} | change))
        assert answer.status_code == 422
        assert sentence in text(answer)
        assert HTML not in answer.text
        assert client.get("/v1/buffers").json()["buffers"] == []


def test_a_name_that_is_taken_comes_back_with_the_reason(filled: Filled) -> None:
    answer = post(filled.client, "/console/buffers", name="b", budget="1MB")
    assert answer.status_code == 409
    assert "there is a buffer 'b' already" in text(answer)


def test_a_buffer_shows_its_tasks_and_names_as_text(filled: Filled) -> None:
    page = filled.client.get("/console/buffers/b")
    found = text(page)
    assert HTML in found
    assert HTML not in page.text
    assert "boots" in found
    assert "80 " in found, "images seen of task 0"
    assert "24.0 kB for the buffer, equal shares for classes" in found
    assert 'hx-get="../../console/buffers/b/forecast?new_classes=1"' in page.text


def test_a_buffer_that_is_not_there_is_a_page(client: httpx.Client) -> None:
    for page in ("", "/classes", "/forecast", "/snapshots", "/compare?with=b"):
        answer = client.get(f"/console/buffers/none{page}")
        assert answer.status_code == 404, page
        assert "there is no buffer 'none'" in text(answer)


def test_classes_are_renamed_by_a_form(filled: Filled) -> None:
    page = filled.client.get("/console/buffers/b/classes")
    assert HTML not in page.text
    fields = {"name-0": HTML, "name-1": " shirt ", "name-2": "", "name-7": "boots & more"}
    answer = post(filled.client, "/console/buffers/b/classes", **fields)
    assert answer.status_code == 303
    assert filled.buffer()["class_names"] == {"0": HTML, "1": "shirt", "7": "boots & more"}


def test_names_that_cannot_be_come_back_with_the_reason(filled: Filled) -> None:
    cases: list[tuple[dict[str, str], int, str]] = [
        ({"name-1": "boots"}, 409, "boots"),
        ({"name-7": ""}, 422, "not taken away"),
        ({"name-1": "12"}, 422, "class_names"),
        ({"name-x": "shirt"}, 422, "class_names"),
        ({"name-99999999999": "shirt"}, 422, "class_names"),
    ]
    for fields, status, sentence in cases:
        before = filled.buffer()
        answer = post(filled.client, "/console/buffers/b/classes", **fields)
        assert answer.status_code == status
        assert sentence in text(answer)
        assert filled.buffer() == before


def test_names_that_stay_make_no_generation(filled: Filled) -> None:
    before = filled.buffer()
    assert post(filled.client, "/console/buffers/b/classes", **{"name-7": "boots"}).status_code == 303
    assert filled.buffer() == before


def test_a_dry_run_says_what_would_go_and_the_button_does_just_that(filled: Filled) -> None:
    page = filled.client.get("/console/buffers/b/forecast?budget=9000")
    told = filled.client.get("/v1/buffers/b/forecast?budget_bytes=9000").json()
    lost = told["exemplars"] - told["exemplars_then"]
    assert lost > 0
    assert f"{lost} of {told['exemplars']} exemplars would go" in text(page)
    assert HTML not in page.text
    state = page.text.partition('name="state" value="')[2].partition('"')[0]
    answer = post(filled.client, "/console/buffers/b/budget", budget=9000, state=state)
    assert answer.status_code == 303
    after = filled.buffer()
    assert (after["exemplars"], after["budget_bytes"]) == (told["exemplars_then"], 9000)


def test_a_budget_is_not_changed_if_the_buffer_was_meanwhile(filled: Filled) -> None:
    page = filled.client.get("/console/buffers/b/forecast?budget=9000")
    state = page.text.partition('name="state" value="')[2].partition('"')[0]
    filled.client.patch("/v1/buffers/b", json={"class_names": {"2": "other"}})
    before = filled.buffer()
    answer = post(filled.client, "/console/buffers/b/budget", budget=9000, state=state)
    assert answer.status_code == 409
    assert "decide anew" in text(answer)
    assert filled.buffer() == before


def test_a_forecast_of_nonsense_says_why(filled: Filled) -> None:
    cases: list[tuple[str, str]] = [
        ("budget=much", "'much' is not an amount"),
        ("budget=0", "budget: it lies in 1.."),
        ("new_classes=-1", "new classes: '-1' is not a whole number"),
        ("new_classes=10001", "new classes: at most 10000"),
        ("new_classes=%3Cb%3E", "'<b>' is not a whole number"),
    ]
    for query, sentence in cases:
        answer = filled.client.get(f"/console/buffers/b/forecast?{query}")
        assert answer.status_code == 422
        assert sentence in text(answer)


def test_a_frozen_buffer_offers_no_change_and_takes_none(filled: Filled) -> None:
    commit.fork(filled.service.state.database, filled.service.state.store, "b", ForkCreate(name="f", frozen=True))
    page = filled.client.get("/console/buffers/f").text
    assert "Delete task" not in page
    assert "Another budget" not in page
    assert "<input name=" not in filled.client.get("/console/buffers/f/classes").text
    assert "is frozen" in text(filled.client.get("/console/buffers/f/forecast?budget=9000"))
    forms: list[tuple[str, dict[str, object]]] = [
        ("budget", {"budget": 9000}),
        ("classes", {"name-1": "x"}),
        ("tasks/0/delete", {"confirm": 0}),
    ]
    for path, fields in forms:
        answer = post(filled.client, f"/console/buffers/f/{path}", **fields)
        assert answer.status_code == 409, path
        assert "is frozen" in text(answer)


def test_a_task_is_deleted_once_its_number_is_typed(filled: Filled) -> None:
    assert post(filled.client, "/console/buffers/b/tasks/0/delete", confirm="1").status_code == 422
    assert filled.buffer()["tasks"] == [0, 1]
    assert post(filled.client, "/console/buffers/b/tasks/0/delete", confirm="0").status_code == 303
    assert filled.buffer()["tasks"] == [1]
    assert post(filled.client, "/console/buffers/b/tasks/0/delete", confirm="0").status_code == 404


def test_a_buffer_is_deleted_once_its_name_is_typed(filled: Filled) -> None:
    answer = post(filled.client, "/console/buffers/b/delete", confirm="a")
    assert answer.status_code == 422
    assert "type b" in text(answer)
    assert post(filled.client, "/console/buffers/b/delete", confirm="b", state="1").status_code == 409
    answer = post(filled.client, "/console/buffers/b/delete", confirm="b")
    assert (answer.status_code, answer.headers["location"]) == (303, "../../../console")
    assert filled.client.get("/v1/buffers/b").status_code == 404


def test_forms_without_the_token_of_the_session_do_nothing(filled: Filled) -> None:
    before = filled.buffer()
    for path in ("budget", "classes", "delete", "tasks/0/delete", "forks"):
        for fields in ({}, {"csrf": "x"}, {"csrf": ""}):
            answer = filled.client.post(
                f"/console/buffers/b/{path}", data={"confirm": "b", "budget": "9000", **fields}, follow_redirects=False
            )
            assert answer.status_code == 403, path
            assert "does not belong to your session" in text(answer)
    assert filled.buffer() == before


def test_snapshots_are_made_listed_and_compared(filled: Filled) -> None:
    answer = post(filled.client, "/console/buffers/b/forks", name="snap", frozen="yes", generation="3")
    assert answer.status_code == 303, text(answer)
    made = filled.buffer("snap")
    assert (made["is_frozen"], made["forked_from"], made["forked_generation"]) == (True, "b", 3)
    post(filled.client, "/console/buffers/b/tasks/0/delete", confirm="0")
    for name, other in (("b", "snap"), ("snap", "b")):
        page = filled.client.get(f"/console/buffers/{name}/snapshots")
        assert f'href="../../../console/buffers/{name}/compare?with={other}"' in page.text
        found = text(filled.client.get(f"/console/buffers/{name}/compare?with={other}"))
        assert "They share 1 pack," in found
        assert HTML in found


def test_related_buffers_are_those_of_the_same_origin(filled: Filled) -> None:
    for source, name in (("b", "c"), ("c", "d"), ("b", "e")):
        post(filled.client, f"/console/buffers/{source}/forks", name=name, frozen="")
    post(filled.client, "/console/buffers", name="z", budget="1MB")
    rows = filled.client.get("/console/buffers/e/snapshots").text.partition("<tbody>")[2].partition("</tbody>")[0]
    assert [name for name in "bcdez" if f">{name}<" in rows or f"{name} <span" in rows] == list("bcde")
    filled.client.delete("/v1/buffers/b")
    rows = filled.client.get("/console/buffers/e/snapshots").text.partition("<tbody>")[2].partition("</tbody>")[0]
    assert "compare" not in rows


def test_a_fork_that_cannot_be_comes_back_with_the_reason(filled: Filled) -> None:
    cases: list[tuple[dict[str, str], int, str]] = [
        ({"name": "b"}, 409, "there is a buffer 'b' already"),
        ({"name": HTML}, 422, "name: String should match"),
        ({"name": "c", "budget": "much"}, 422, "not an amount"),
        ({"name": "c", "generation": "1"}, 409, "generation"),
        ({"name": "c", "generation": "x"}, 422, "not a whole number"),
    ]
    for fields, status, sentence in cases:
        answer = post(filled.client, "/console/buffers/b/forks", **fields)
        assert answer.status_code == status
        assert sentence in text(answer)
        assert HTML not in answer.text


def test_a_comparison_with_nothing_is_refused(filled: Filled) -> None:
    assert filled.client.get("/console/buffers/b/compare").status_code == 422
    assert filled.client.get("/console/buffers/b/compare?with=none").status_code == 404


def test_a_reader_of_a_prefix_sees_its_buffers_and_is_offered_no_change(
    serve_thread: Callable[..., ServiceThread],
) -> None:
    service = serve_thread(admin_token="a" * 40)
    with http(service, "a" * 40) as admin:
        for name in ("team-b", "other"):
            assert admin.post("/v1/buffers", json={"name": name, "budget_bytes": 24_000}).status_code == 201
        wanted = {"name": "reader", "scope": "read", "prefix": "team-"}
        secret = admin.post("/v1/tokens", json=wanted).json()["token"]
    fill(service.state.database, service.settings, 0, {0: 5}, name="team-b")
    with http(service) as browser:
        login = browser.get("/console/login").text
        csrf = login.partition('"X-CSRF-Token": "')[2].partition('"')[0]
        assert browser.post("/console/login", data={"csrf": csrf, "token": secret}).status_code == 303
        page = browser.get("/console")
        assert "team-b" in page.text
        assert "other" not in page.text
        assert "New buffer" not in page.text
        for offer in ("Delete", "Another budget", "Audit"):
            assert offer not in browser.get("/console/buffers/team-b").text
        for path in ("", "/classes", "/forecast", "/snapshots", "/compare?with=team-b"):
            assert browser.get(f"/console/buffers/other{path}").status_code == 403, path
        assert browser.get("/console/buffers/team-b/compare?with=other").status_code == 403
        for path in ("buffers", "buffers/team-b/budget", "buffers/team-b/forks", "buffers/team-b/delete"):
            fields = {"name": "team-c", "budget": "9000", "confirm": "team-b"}
            assert post(browser, f"/console/{path}", **fields).status_code == 403, path
