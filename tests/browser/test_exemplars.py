"""The pages of tasks, exemplars and maps in a browser: charts, live answers, filters by click, forms, pictures."""

from __future__ import annotations

import numpy as np
import pytest

from engram import Client
from tests.browser.browsing import NARROW, WIDE, Browser
from tests.browser.filling import FASHION, PHOTOGRAPHS
from tests.contents import pictures

LOADED = """
const pictures = [...document.querySelectorAll('main img')];
for (const each of pictures) each.loading = 'eager';
return pictures.length > 0 && pictures.every(each => each.hidden || (each.complete && each.naturalWidth > 0));
"""


@pytest.fixture
def with_boxes(engram: Client) -> str:
    """The path of the page of an exemplar that has boxes."""
    for each in engram.exemplars(PHOTOGRAPHS):
        if len(engram.exemplar_fields(PHOTOGRAPHS, each.pack, each.row)["boxes"]):
            return f"/console/buffers/{PHOTOGRAPHS}/exemplars/{each.pack}/{each.row}"
    raise AssertionError("no exemplar has boxes")


def test_every_page_is_clean_light_and_dark_wide_and_narrow(browser: Browser, with_boxes: str) -> None:
    for path in (
        f"/console/buffers/{FASHION}/tasks/1",
        f"/console/buffers/{FASHION}/exemplars?task=1&class_id=2",
        f"/console/buffers/{PHOTOGRAPHS}/exemplars?where=score%3Age%3A0.2",
        with_boxes,
        f"/console/buffers/{FASHION}/tasks/1/map?class_id=2",
    ):
        for size, is_dark in ((WIDE, False), (WIDE, True), (NARROW, False)):
            browser.resize(size)
            browser.darken(is_dark)
            browser.open(path)
            browser.assert_fits()
            browser.assert_clean()


def test_another_epsilon_is_answered_as_it_is_typed(browser: Browser, engram: Client) -> None:
    browser.open(f"/console/buffers/{FASHION}/tasks/1")
    assert browser.run("return document.querySelectorAll('.plot canvas').length") == 2
    before = browser.find("#choice").text
    browser.enter("input[name=epsilon]", "0.001")
    browser.until(lambda: "no candidate has R within 0.001 of 1" in browser.find("#choice").text)
    assert "epsilon=0.001" in browser.path, "what is shown has an address"
    assert browser.run("return document.querySelectorAll('.plot canvas').length") == 2, "charts are drawn again"
    browser.choose("select[name=rule]", "all_higher")
    browser.until(lambda: "with all above it" in browser.find("#choice").text)
    browser.follow("As it was") if browser.find_all("a.button") else browser.open(f"/console/buffers/{FASHION}/tasks/1")
    assert browser.find("#choice").text == before


def test_a_click_on_a_bar_filters_the_grid_and_pictures_load(browser: Browser) -> None:
    browser.open(f"/console/buffers/{PHOTOGRAPHS}/exemplars")
    everything = len(browser.find_all(".grid li"))
    browser.wait(LOADED)
    browser.until(lambda: len(browser.find_all(".histogram")) == 3)
    bar = browser.find_all(".histogram")[2].find_element("css selector", "li:nth-child(3) a")
    count = int(bar.accessible_name.rpartition(": ")[2].split()[0])
    before = browser.find("html").id
    bar.click()
    browser.until(lambda: browser.find("html").id != before)
    assert len(browser.find_all(".grid li")) == count < everything
    assert "where=score" in browser.path
    browser.choose("select[name=class_id]", "1")
    browser.submit("form.filters button.main")
    assert "class_id=1" in browser.path
    assert "where=score" in browser.path, "other filters stay"


def test_an_exemplar_is_large_and_sharp_with_its_boxes_on_it(browser: Browser, with_boxes: str) -> None:
    browser.open(with_boxes)
    picture = browser.find(".large image")
    assert picture.value_of_css_property("image-rendering") == "pixelated"
    assert picture.size["width"] > 300
    assert browser.find_all("rect.box")
    browser.follow("read them as two corners")
    assert "corners=1" in browser.path


def test_lower_qualities_stand_beside_what_is_stored(browser: Browser, engram: Client) -> None:
    first = next(engram.exemplars(FASHION))
    browser.open(f"/console/buffers/{FASHION}/exemplars/{first.pack}/{first.row}")
    browser.wait(LOADED)
    assert len(browser.find_all(".versions li")) == 1 + sum(quality < first.quality for quality in (10, 25, 50, 75, 90))


def test_exemplars_are_deleted_and_relabelled_after_a_confirmation(browser: Browser, engram: Client) -> None:
    engram.create_buffer("mistakes", budget_bytes=10**6, quality=75, fields={"key": "utf8"})
    keys = [f"image {number}" for number in range(12)]
    names = np.array(["cat", "dog", "owl"])[np.arange(12) % 3]
    engram.wait(engram.upload("mistakes", 0, pictures(0, 12), names.tolist(), fields={"key": keys}))
    first = next(engram.exemplars("mistakes"))
    browser.open(f"/console/buffers/mistakes/exemplars/{first.pack}/{first.row}")
    browser.click("details.confirm summary")
    assert "mirrors at their next sync" in browser.find("details.confirm").text
    browser.submit("details.confirm button.danger")
    assert browser.path.startswith("/console/buffers/mistakes/exemplars?task=0")
    assert first.key not in {each.key for each in engram.exemplars("mistakes")}
    ids = {name: class_id for class_id, name in engram.buffer("mistakes").class_names.items()}
    browser.open(f"/console/buffers/mistakes/exemplars?task=0&class_id={ids['dog']}")
    relabel = browser.find_all("details.confirm")[1]
    relabel.find_element("css selector", "summary").click()
    relabel.find_element("css selector", "input[name=to]").send_keys("owl")
    before = browser.find("html").id
    relabel.find_element("css selector", "button.danger").click()
    browser.until(lambda: browser.find("html").id != before)
    assert sum(each.class_id == ids["owl"] for each in engram.exemplars("mistakes")) == 8
    browser.open(f"/console/buffers/mistakes/exemplars?task=0&class_id={ids['owl']}")
    browser.click("details.confirm summary")
    browser.enter("details.confirm input[name=confirm]", f"delete {ids['owl']}")
    browser.submit("details.confirm button.danger")
    assert {each.class_id for each in engram.exemplars("mistakes")} == {ids["cat"]}


def test_a_point_of_the_map_shows_its_picture_and_leads_to_it(browser: Browser) -> None:
    browser.open(f"/console/buffers/{FASHION}/tasks/1/map")
    for kind in ("ring", "point"):
        browser.run(
            "document.querySelector(arguments[0]).dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))",
            f".map .{kind} circle",
        )
        browser.wait(
            "const shown = document.querySelector('.thumbnail img'); return shown.complete && shown.naturalWidth > 0"
        )
    before = browser.find("html").id
    browser.run("document.querySelector('.map .point circle').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    browser.until(lambda: browser.find("html").id != before)
    assert "/exemplars/" in browser.path
