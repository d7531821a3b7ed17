"""Every page of the console in a browser: clean, wide and narrow, light and dark, by keyboard."""

from __future__ import annotations

import pytest

from tests.browser.browsing import NARROW, WIDE, Browser, Keys

PAGES = ["/console", "/console/nothing"]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_clean_light_and_dark_wide_and_narrow(browser: Browser, path: str) -> None:
    expected = ("404",) if path.endswith("/nothing") else ()
    for size in (WIDE, NARROW):
        for is_dark in (False, True):
            browser.resize(size)
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
