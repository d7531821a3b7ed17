"""The pages of tasks, exemplars and maps: what they show, what their forms do, and whom they offer it to."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin

import httpx
import numpy as np
import pytest
from PIL import Image

from engram import tar
from engram.schemas import BufferCreate, IngestOptions
from engram_service import buffers
from engram_service.console import exemplars
from engram_service.console.exemplar import boxes, described
from tests.contents import create, pictures
from tests.servers import ServiceThread, http
from tests.uploads import final, queue, work_through

pytestmark = pytest.mark.slow

FIELDS = {"key": "utf8", "score": "float32", "boxes": "float32 [any, 4]", "flag": "bool"}
NASTY = "<b>&\"'</b>"


def csrf_of(page: str) -> str:
    found = re.search(r'name="csrf" value="([^"]+)"', page)
    assert found is not None
    return found[1]


def upload(served: ServiceThread, task: int, images: Any, names: Any, **given: Any) -> None:
    state = served.state
    body = b"".join(tar.write(images, names, fields=given.get("fields")))
    queued = queue(state.database, served.settings, body, task=task, options=IngestOptions(ranking="ring", epsilon=0.2))
    work_through(state.database, state.store, served.settings)
    assert final(state.database, queued).state == "committed", final(state.database, queued).problem


@pytest.fixture
def filled(served: ServiceThread) -> ServiceThread:
    """Buffer "b": two tasks of three named classes, one of them nasty, with fields."""
    with served.state.database.session() as session:
        buffers.create(session, BufferCreate(name="b", budget_bytes=10**6, quality=75, fields=FIELDS))
    for task in (0, 1):
        count = 12
        columns = {
            "key": [f"{NASTY}/{task}/{n}" for n in range(count)],
            "score": np.linspace(0, 1, count).astype(np.float32),
            "boxes": [np.array([[1, 2, 8, 4]], np.float32)[: n % 2] for n in range(count)],
            "flag": np.arange(count) % 3 == 0,
        }
        upload(
            served, task, pictures(task, count), [("cat", "dog", NASTY)[n % 3] for n in range(count)], fields=columns
        )
    return served


@pytest.fixture
def page(client: httpx.Client) -> Callable[..., str]:
    def read(path: str, **query: Any) -> str:
        answer = client.get(path, params=query, follow_redirects=True)
        assert answer.status_code == 200, answer.text
        assert NASTY not in answer.text, "what data say is text"
        return answer.text

    return read


def shown(page: str) -> list[str]:
    """Addresses of the pictures in the grid."""
    return [
        html.unescape(found) for found in re.findall(r'<li><a href="[^"]*" title="[^"]*"><img[^>]* src="([^"]+)"', page)
    ]


def listed(client: httpx.Client, **query: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/v1/buffers/b/exemplars", params=query).json()["exemplars"]
    return found


def test_the_grid_shows_the_exemplars_that_pass_and_their_pictures(
    client: httpx.Client, filled: ServiceThread, page: Callable[..., str]
) -> None:
    path = "/console/buffers/b/exemplars"
    assert len(shown(page(path))) == 24
    query = {"task": 1, "where": ["score:ge:0.5", "flag:eq:false"], "max_bytes": 10_000}
    found = page(path, **query)
    expected = listed(client, **query)
    addresses = [urljoin(str(client.base_url) + path, address) for address in shown(found)]
    assert [address.rsplit("/", 3)[1:3] for address in addresses] == [[e["pack"], str(e["row"])] for e in expected]
    answer = client.get(addresses[0])
    assert "immutable" in answer.headers["cache-control"]
    assert Image.open(io.BytesIO(answer.content)).size == (16, 16)
    assert client.get(addresses[0], headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert "score:ge:0.5" in found


def test_empty_fields_of_the_form_filter_by_nothing_and_a_condition_becomes_part_of_the_address(
    client: httpx.Client, filled: ServiceThread, page: Callable[..., str]
) -> None:
    blank = {"task": "", "class_id": "", "min_bytes": "", "max_bytes": "", "field": "", "operation": "eq", "value": ""}
    assert len(shown(page("/console/buffers/b/exemplars", **blank))) == 24
    asked = {**blank, "task": "0", "where": "score:ge:0.1", "field": "flag", "value": "true"}
    answer = client.get("/console/buffers/b/exemplars", params=asked)
    assert answer.status_code == 303
    assert answer.headers["location"].endswith("exemplars?task=0&where=score%3Age%3A0.1&where=flag%3Aeq%3Atrue")
    assert client.get("/console/buffers/b/exemplars?task=x").status_code == 422
    assert client.get("/console/buffers/b/exemplars?where=nothing:eq:1").status_code == 422
    assert client.get("/console/buffers/x/exemplars").status_code == 404


def test_a_bar_of_a_histogram_leads_to_what_it_counts(
    client: httpx.Client, filled: ServiceThread, page: Callable[..., str]
) -> None:
    path = "/console/buffers/b/histograms"
    found = page(path, task=1)
    bars = re.findall(r'<a href="([^"]+)" title="[^"]*" aria-label="([^"]*): (\d+) exemplars"', found)
    assert {label.split(" ")[0] for _, label, _ in bars} == {"Class", "Bytes", "score", "flag"}
    for address, label, count in bars:
        if count != "0":
            behind = client.get(urljoin(str(client.base_url) + path, html.unescape(address)))
            assert len(shown(behind.text)) == int(count), label


def test_an_exemplar_is_shown_large_with_its_fields_and_boxes_and_at_lower_qualities(
    client: httpx.Client, filled: ServiceThread, page: Callable[..., str]
) -> None:
    for each in listed(client, task=0, class_id=1):
        path = f"/console/buffers/b/exemplars/{each['pack']}/{each['row']}"
        found = page(path)
        fields = client.get(f"/v1/buffers/b/exemplars/{each['pack']}/{each['row']}/fields").json()
        assert found.count('<rect class="box"') == len(fields["boxes"])
        assert html.escape(fields["key"], quote=False).replace('"', "&#34;").replace("'", "&#39;") in found
        for quality in (50, 25, 10):
            assert f"picture?quality={quality}" in found
        assert client.get(f"{path}/picture?quality=10").headers["content-type"] == "image/jpeg"
        assert ("read as two corners" in page(path, corners=1)) == bool(fields["boxes"])
    assert client.get(f"/console/buffers/b/exemplars/{'0' * 64}/0").status_code == 404
    assert client.get(f"{path[: path.rfind('/')]}/99").status_code == 404


def test_a_whole_pack_is_a_picture(client: httpx.Client, filled: ServiceThread, page: Callable[..., str]) -> None:
    found = page("/console/buffers/b/exemplars", task=0)
    address = re.search(r'href="([^"]+packs/[^"]+)"', found)
    assert address is not None
    picture = client.get(urljoin(str(client.base_url) + "/console/buffers/b/exemplars", address[1]))
    assert Image.open(io.BytesIO(picture.content)).size == (16, 12 * 16)


def act(client: httpx.Client, what: str, **fields: Any) -> httpx.Response:
    csrf = csrf_of(client.get("/console/buffers/b/exemplars?class_id=0").text)
    return client.post(f"/console/buffers/b/exemplars/{what}", data={"csrf": csrf, **fields})


def test_forms_remove_one_a_key_and_a_class(client: httpx.Client, filled: ServiceThread) -> None:
    first = listed(client)[0]
    answer = act(client, "remove", pack=first["pack"], row=first["row"])
    assert answer.status_code == 303
    assert client.get(urljoin(str(answer.url), answer.headers["location"])).status_code == 200
    left = listed(client)
    assert [each["key"] for each in left] == [each["key"] for each in left if each["key"] != first["key"]]
    assert len(left) == 23
    act(client, "remove", key=left[0]["key"])
    assert len(listed(client)) == 22
    assert act(client, "remove", class_id=2, task=1).status_code == 422
    act(client, "remove", class_id=2, task=1, confirm="delete 2")
    assert {(each["task"], each["class_id"]) for each in listed(client)} == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}


def test_forms_relabel_by_id_and_by_name(client: httpx.Client, filled: ServiceThread) -> None:
    first = listed(client)[0]
    names = {name: int(number) for number, name in client.get("/v1/buffers/b").json()["class_names"].items()}
    act(client, "relabel", pack=first["pack"], row=first["row"], to=NASTY)
    moved = next(each for each in listed(client) if each["key"] == first["key"])
    assert moved["class_id"] == names[NASTY]
    act(client, "relabel", class_id=names["dog"], to="9")
    assert names["dog"] not in {each["class_id"] for each in listed(client)}
    assert sum(each["class_id"] == 9 for each in listed(client)) == 8


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"task": "0"},
        {"class_id": "x"},
        {"pack": "0" * 64, "row": "0"},
        {"key": "none has it"},
        {"class_id": "77", "confirm": "delete 77"},
    ],
)
def test_a_form_that_names_nothing_changes_nothing(
    client: httpx.Client, filled: ServiceThread, fields: dict[str, str]
) -> None:
    generation = client.get("/v1/buffers/b").json()["generation"]
    assert act(client, "remove", **fields).status_code in (404, 422)
    assert act(client, "relabel", to="1", **fields).status_code in (404, 422)
    assert client.post("/console/buffers/b/exemplars/remove", data={"class_id": "0"}).status_code == 403
    assert client.get("/v1/buffers/b").json()["generation"] == generation


def test_a_frozen_buffer_offers_no_change(
    client: httpx.Client, filled: ServiceThread, page: Callable[..., str]
) -> None:
    client.post("/v1/buffers/b/forks", json={"name": "f", "frozen": True}).raise_for_status()
    assert "Delete" in page("/console/buffers/b/exemplars", class_id=0)
    assert "Delete" not in page("/console/buffers/f/exemplars", class_id=0)


def test_changes_are_offered_to_those_who_may_make_them(serve_thread: Callable[..., ServiceThread]) -> None:
    served = serve_thread(admin_token="of the environment".replace(" ", "-"))
    create(served.state.database)
    upload(served, 0, pictures(0, 4), np.arange(4) % 2)
    with http(served, "of-the-environment") as admin:
        tokens = {
            scope: admin.post("/v1/tokens", json={"name": scope, "scope": scope}).json() for scope in ("read", "write")
        }
        other = admin.post("/v1/tokens", json={"name": "other", "scope": "write", "prefix": "x"}).json()
    for token, offered in ((tokens["read"], False), (tokens["write"], True), (other, None)):
        with http(served) as browser:
            csrf = csrf_of(browser.get("/console/login").text)
            browser.post("/console/login", data={"csrf": csrf, "token": token["token"]})
            for path in ("exemplars?class_id=0", "tasks/0", "tasks/0/map", "histograms"):
                answer = browser.get(f"/console/buffers/b/{path}")
                assert answer.status_code == (403 if offered is None else 200)
            grid = browser.get("/console/buffers/b/exemplars?class_id=0")
            assert ("Delete" in grid.text) == bool(offered)
            if offered:
                continue
            fields = {"csrf": csrf_of(grid.text), "class_id": "0", "confirm": "delete 0"}
            assert browser.post("/console/buffers/b/exemplars/remove", data=fields).status_code == 403
    with http(served, "of-the-environment") as admin:
        assert admin.get("/v1/buffers/b").json()["exemplars"] == 4


def test_of_very_many_classes_the_number_is_typed(
    filled: ServiceThread, page: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exemplars, "MAX_LISTED", 2)
    found = page("/console/buffers/b/exemplars", class_id=1)
    assert re.search(r'<input name="class_id" type="text" value="1"', found)
    assert '<select name="task">' in found


def test_the_confirmation_says_when_it_is_gone_from_where(page: Callable[..., str], filled: ServiceThread) -> None:
    said = page("/console/buffers/b/exemplars", class_id=0)
    for part in ("mirrors at their next sync", "10 minutes", "backups as long as you keep them", "snapshots and forks"):
        assert part in said


@pytest.fixture
def chosen(served: ServiceThread) -> ServiceThread:
    """Buffer "b" whose quality selection chose."""
    create(served.state.database, budget_bytes=20_000, quality=None)
    for task in (0, 1):
        upload(served, task, pictures(task, 200), np.arange(200) % 2 + 2 * task)
    return served


def test_the_page_of_a_task_says_what_was_chosen_and_what_would_have_been(
    client: httpx.Client, chosen: ServiceThread, page: Callable[..., str]
) -> None:
    path = "/console/buffers/b/tasks/1"
    found = html.unescape(page(path))
    decision = client.get("/v1/buffers/b/tasks/1").json()["decision"]
    assert decision["reason"][1:] in found
    assert "That is the buffer’s quality" in found or "The buffer has" in found
    for epsilon in (0.001, 50):
        again = client.get(f"/v1/buffers/b/tasks/1/decision?epsilon={epsilon}").json()
        other = html.unescape(page(path, epsilon=epsilon, rule="any", budget_bytes="", definition="raw"))
        assert again["says"][1:] in other
        assert f'"label": "chosen: {again["quality"]}"' in other
    assert client.get(path + "?epsilon=0").status_code == 422
    assert client.get(path + "?rule=x").status_code == 422
    assert client.get("/console/buffers/b/tasks/9").status_code == 404


def test_a_fixed_quality_has_no_candidates(page: Callable[..., str], filled: ServiceThread) -> None:
    found = page("/console/buffers/b/tasks/0")
    assert "was fixed with the buffer" in found
    assert "data-chart" not in found


def test_a_map_has_a_point_for_each_exemplar_and_a_ring_for_each_original(
    client: httpx.Client, filled: ServiceThread, page: Callable[..., str]
) -> None:
    found = page("/console/buffers/b/tasks/0/map")
    assert found.count('r="7"') == 24
    assert found.count('class="point') == 3
    assert found.count('class="ring') == 3
    assert page("/console/buffers/b/tasks/0/map", class_id=1).count(" dim") == 4
    original = client.get("/console/buffers/b/tasks/0/originals/0")
    assert Image.open(io.BytesIO(original.content)).format == "PNG"
    assert client.get("/console/buffers/b/tasks/0/originals/12").status_code == 404
    assert client.get("/console/buffers/b/tasks/0/originals/-1").status_code == 404
    assert client.get("/console/buffers/b/tasks/9/map").status_code == 404
    assert client.get("/console/buffers/b/tasks/0/map?method=x").status_code == 422


def test_boxes_are_pixels_or_parts_of_the_sides_and_a_corner_and_a_size_or_two_corners() -> None:
    def places(values: Any, *, as_corners: bool = False) -> list[tuple[float, ...]]:
        found = boxes(np.array(values, np.float32), (10, 20), as_corners=as_corners)
        return [(each["x"], each["y"], each["width"], each["height"]) for each in found]

    assert places([[2, 3, 4, 5]]) == [(2, 3, 4, 5)]
    assert places([[2, 3, 4, 5]], as_corners=True) == [(2, 3, 2, 2)]
    assert places([[0.5, 0.5, 0.25, 0.5]]) == [(10, 5, 5, 5)]
    assert boxes(np.array([[1, 2, 3, 4, 7]], np.float32), (10, 20), as_corners=False)[0]["label"] == "7"
    for nothing in (None, "text", np.zeros((0, 4)), np.zeros((2, 3)), np.array([[np.nan, 0, 1, 1]])):
        assert boxes(nothing, (10, 20), as_corners=False) == []


def test_values_are_written_as_people_write_them() -> None:
    assert described(np.array(True)) == "true"
    assert described(np.array(7, np.int64)) == "7"
    assert described(np.array(0.1, np.float32)) == "0.1"
    assert described(np.array([1, 2], np.int16)) == "int16 [2]: 1, 2"
    assert described(np.zeros((10, 10), np.float32)).endswith(", …")


def test_an_empty_buffer_has_an_empty_grid(
    client: httpx.Client, served: ServiceThread, page: Callable[..., str]
) -> None:
    create(served.state.database)
    assert "There is no exemplar" in page("/console/buffers/b/exemplars")
    assert "<figure" not in page("/console/buffers/b/histograms")


def test_an_exemplar_of_an_older_generation_is_shown_as_such_and_cannot_be_changed(
    client: httpx.Client, filled: ServiceThread, page: Callable[..., str]
) -> None:
    first = listed(client, task=0)[0]
    path = f"/console/buffers/b/exemplars/{first['pack']}/{first['row']}"
    assert "older generation" not in page(path)
    act(client, "remove", pack=first["pack"], row=first["row"])
    assert "of an older generation" in page(path)
    assert "Delete" not in page(path)
    assert act(client, "remove", pack=first["pack"], row=first["row"]).status_code == 404


def test_a_damaged_exemplar_is_a_problem_on_a_page(client: httpx.Client, filled: ServiceThread) -> None:
    first = listed(client, task=0)[0]
    filled.state.store.delete(first["pack"])
    filled.state.cache.forget(first["pack"])
    for path in ("", "/picture", "/picture?quality=10"):
        answer = client.get(f"/console/buffers/b/exemplars/{first['pack']}/{first['row']}{path}")
        assert (answer.status_code, answer.headers["content-type"]) == (503, "text/html; charset=utf-8")
    assert client.get(f"/console/buffers/b/packs/{first['pack']}/picture").status_code == 503
    assert client.get("/console/buffers/b/exemplars").status_code == 200
