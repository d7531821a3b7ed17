"""What an operator does with buffers, done in a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from engram import Client
from engram.errors import NotFound
from tests.browser.browsing import NARROW, Browser
from tests.contents import pictures

BUDGET = 12_000


@pytest.fixture
def own(engram: Client, request: pytest.FixtureRequest) -> Iterator[str]:
    """A buffer that is the test's to change: two tasks of two classes."""
    name = f"own-{abs(hash(request.node.name)) % 10**6}"
    engram.create_buffer(name, budget_bytes=BUDGET, quality=50)
    for task in range(2):
        images = pictures(task, 80)
        ids = np.arange(80) % 2 + 2 * task
        engram.wait(engram.upload(name, task, images, ids))
    yield name
    for left in [name, f"{name}-snap"]:
        try:
            engram.delete_buffer(left)
        except NotFound:
            continue


def test_a_buffer_is_made_on_the_overview(browser: Browser, engram: Client) -> None:
    browser.open("/console")
    browser.click("#new summary")
    browser.enter("[name=name]", "made-here")
    browser.enter("[name=budget]", "2MB")
    browser.choose("[name=per]", "class")
    browser.submit("#new button.main")
    assert browser.path == "/console/buffers/made-here"
    assert browser.find("h1").text == "made-here"
    assert engram.buffer("made-here").budget_bytes == 2_000_000
    browser.assert_clean()
    browser.click("#delete summary")
    browser.enter("#delete [name=confirm]", "made-here")
    browser.submit("#delete button")
    assert browser.path == "/console"
    assert "made-here" not in browser.text


def test_a_mistake_leaves_what_was_typed(browser: Browser) -> None:
    browser.open("/console")
    browser.click("#new summary")
    browser.enter("[name=name]", "made-here")
    browser.enter("[name=budget]", "a lot")
    browser.submit("#new button.main")
    assert "'a lot' is not an amount" in browser.find("#new .problem").text
    assert browser.find("[name=name]").get_attribute("value") == "made-here"
    browser.assert_clean(expected=("422",))


def test_the_overview_keeps_itself_current(browser: Browser, engram: Client, own: str) -> None:
    browser.open("/console")
    assert f"{own}-snap" not in browser.text
    engram.fork(own, f"{own}-snap")
    browser.until(lambda: f"{own}-snap" in browser.text)


def test_the_page_of_a_buffer_says_what_the_next_class_would_evict(browser: Browser, engram: Client, own: str) -> None:
    browser.open(f"/console/buffers/{own}")
    browser.until(lambda: browser.find_all("#next #forecast"))
    held = engram.buffer(own)
    assert f"of {held.exemplars} exemplars would go" in browser.find("#next").text


def test_a_budget_is_lowered_after_a_dry_run_that_tells_the_truth(browser: Browser, engram: Client, own: str) -> None:
    browser.open(f"/console/buffers/{own}")
    browser.enter("#budget [name=budget]", "5kB")
    browser.submit("#budget button")
    told = browser.find("#forecast .note").text
    before = engram.buffer(own)
    lost = int(told.split()[0])
    assert 0 < lost < before.exemplars
    browser.assert_clean()
    browser.submit("button.danger")
    after = engram.buffer(own)
    assert (after.budget_bytes, after.exemplars) == (5000, before.exemplars - lost)
    assert browser.path == f"/console/buffers/{own}"


def test_long_names_fit_on_a_phone(browser: Browser, engram: Client) -> None:
    buffer = "a" * 63
    engram.create_buffer(buffer, budget_bytes=BUDGET, quality=50)
    try:
        engram.wait(engram.upload(buffer, 0, pictures(0, 8), ["\N{LATIN SMALL LETTER U WITH DIAERESIS}" * 60, "b"] * 4))
        browser.resize(NARROW)
        own = f"/console/buffers/{buffer}"
        for path in (own, f"{own}/classes", f"{own}/exemplars", f"{own}/tasks/0", f"{own}/tasks/0/map"):
            browser.open(path)
            browser.assert_fits()
    finally:
        engram.delete_buffer(buffer)


def test_classes_get_names(browser: Browser, engram: Client, own: str) -> None:
    browser.open(f"/console/buffers/{own}/classes")
    browser.enter("[name=name-1]", "<i>one</i>")
    browser.submit("button.main")
    assert engram.buffer(own).class_names == {1: "<i>one</i>"}
    assert browser.find("[name=name-1]").get_attribute("value") == "<i>one</i>"
    browser.open(f"/console/buffers/{own}")
    assert "<i>one</i>" in browser.text


def test_a_task_is_deleted(browser: Browser, engram: Client, own: str) -> None:
    browser.open(f"/console/buffers/{own}")
    browser.click("tbody tr:nth-child(2) details summary")
    browser.enter("tbody tr:nth-child(2) [name=confirm]", "1")
    browser.submit("tbody tr:nth-child(2) button")
    assert engram.buffer(own).tasks == [0]


def test_a_snapshot_is_made_compared_and_deleted(browser: Browser, engram: Client, own: str) -> None:
    browser.open(f"/console/buffers/{own}/snapshots")
    browser.enter("form [name=name]", f"{own}-snap")
    browser.submit("button.main")
    assert engram.buffer(f"{own}-snap").is_frozen
    engram.delete_task(own, 1)
    browser.open(f"/console/buffers/{own}/snapshots")
    browser.submit("td a[href*=compare]")
    assert "They share 1 pack," in browser.text
    browser.assert_clean()
    browser.open(f"/console/buffers/{own}-snap")
    browser.click("#delete summary")
    browser.enter("#delete [name=confirm]", f"{own}-snap")
    browser.submit("#delete button")
    assert f"{own}-snap" not in [buffer.name for buffer in engram.buffers()]


def test_an_ingest_is_followed_live_and_tried_again(browser: Browser, engram: Client, own: str) -> None:
    engram.change_budget(own, 1)
    queued = engram.upload(own, 7, pictures(9, 40), np.zeros(40, np.int64))
    browser.open(f"/console/ingests/{queued.id}")
    browser.until(lambda: "failed" in browser.find("#ingest").text)
    assert "raise the budget" in browser.find("#ingest .problem").text
    engram.change_budget(own, BUDGET)
    browser.submit("#ingest button.main")
    browser.until(lambda: "committed" in browser.find("#ingest").text)
    assert 7 in engram.buffer(own).tasks


def test_an_ingest_is_cancelled(browser: Browser, engram: Client, own: str) -> None:
    images = pictures(3, 4000)
    queued = [engram.upload(own, 8 + n, images, np.arange(4000) % 50) for n in range(3)][-1]
    browser.open(f"/console/ingests?buffer={own}")
    browser.follow(queued.id[:16])
    browser.submit("#ingest button.danger")
    assert "cancelled" in browser.find("#ingest").text
    assert engram.ingest(queued).state == "cancelled"


def test_forms_work_without_a_script(browser: Browser, engram: Client, own: str) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.driver.get(f"{browser.url}/console/buffers/{own}/classes")
        field = browser.find("[name=name-0]")
        field.send_keys("zero")
        field.submit()
        browser.until(lambda: json.dumps(engram.buffer(own).class_names) == '{"0": "zero"}')
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
