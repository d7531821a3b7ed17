"""The page of draws in a browser: what a client draws is shown by task and class, and to whom."""

from __future__ import annotations

from engram import Client
from tests.browser.browsing import NARROW, WIDE, Browser
from tests.browser.filling import FASHION
from tests.servers import eventually


def test_what_was_drawn_is_shown_and_narrowed_by_a_click(browser: Browser, engram: Client) -> None:
    for step in range(5):
        engram.draw(FASHION, 20, step=step)

    def is_shown() -> bool:
        browser.open("/console/draws")
        return FASHION in browser.driver.page_source

    assert eventually(is_shown)
    browser.assert_clean()
    for size in (WIDE, NARROW):
        browser.resize(size)
        browser.open(f"/console/draws?buffer={FASHION}")
        browser.assert_fits()
        browser.assert_clean()
    browser.resize(WIDE)
    browser.driver.find_element("link text", "local").click()
    assert eventually(lambda: "who=local" in browser.driver.current_url)
    assert "only what local drew" in browser.driver.page_source
