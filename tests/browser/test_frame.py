"""Every page of the console in a browser: clean, wide and narrow, light and dark, by keyboard."""

from __future__ import annotations

import pytest

from engram import Client
from tests.browser.browsing import WIDE, Browser, Keys

NARROWEST = 360, 740

PAGES = [
    "/console",
    "/console/buffers/fashion",
    "/console/buffers/fashion-2",
    "/console/buffers/fashion/classes",
    "/console/buffers/fashion/forecast?budget=20kB&new_classes=2",
    "/console/buffers/fashion/snapshots",
    "/console/buffers/fashion/compare?with=fashion-2",
    "/console/ingests",
    "/console/extractors",
    "/console/buffers/fashion/tasks/1",
    "/console/buffers/fashion/tasks/1/map",
    "/console/buffers/photographs/exemplars",
    "/console/draws?buffer=fashion",
    "/console/tokens",
    "/console/audit",
    "/console/nothing",
]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_clean_light_and_dark_wide_and_narrow(browser: Browser, path: str) -> None:
    expected = ("404",) if path.endswith("/nothing") else ()
    for size in (WIDE, NARROWEST):
        browser.resize(size)
        for is_dark in (False, True):
            browser.darken(is_dark)
            browser.open(path)
            browser.assert_fits()
            browser.assert_clean(expected=expected)


def test_the_keyboard_reaches_the_content_first(browser: Browser) -> None:
    browser.open("/console")
    browser.press(Keys.TAB)
    assert browser.driver.switch_to.active_element.text == "Skip to content"
    browser.press(Keys.ENTER)
    assert browser.run("return document.activeElement.id") == "main"


def test_a_failed_ingest_shows_its_reason_and_opens(browser: Browser, engram: Client) -> None:
    (failed,) = [ingest for ingest in engram.ingests("fashion") if ingest.state == "failed"]
    assert failed.problem is not None
    browser.open("/console/ingests?state=failed")
    assert failed.problem["detail"] in browser.text
    browser.follow(failed.id[:16])
    assert browser.path == f"/console/ingests/{failed.id}"
    assert failed.problem["detail"] in browser.text
