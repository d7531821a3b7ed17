"""A headless Chromium that pages are tested with, and what it must never have to complain about."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.servers import PATIENCE_S

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "install Debian's packages chromium and chromium-driver to run this"

WIDE, NARROW = (1280, 900), (390, 844)

_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--lang=en-US",
]

_AXE = Path(__file__).with_name("axe.min.js")
_SERIOUS = frozenset({"serious", "critical"})


class Browser:
    """One window on one service. `assert_clean` says what was wrong with the pages that it has seen."""

    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, path: str) -> None:
        """The page at this path of the service is shown, its scripts have run."""
        self.driver.get(self.url + path)
        self.wait("return document.readyState === 'complete'")

    @property
    def path(self) -> str:
        """Path and query of the page that is shown."""
        found = urlsplit(self.driver.current_url)
        return found.path + (f"?{found.query}" if found.query else "")

    @property
    def text(self) -> str:
        """What is written on the page, white space closed up."""
        return " ".join(self.find("body").text.split())

    def find(self, css: str) -> WebElement:
        """The first element of the page that the selector names."""
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def find_all(self, css: str) -> list[WebElement]:
        """All of them."""
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def click(self, css: str) -> None:
        """A click on the first element that the selector names, scrolled to."""
        element = self.find(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def follow(self, text: str) -> None:
        """A click on the link of this text; the page that it leads to is shown."""
        before = self.find("html").id
        element = self.driver.find_element(By.LINK_TEXT, text)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()
        self.until(lambda: self.find("html").id != before)

    def submit(self, css: str) -> None:
        """A click on a button that leads to another page, which is shown."""
        before = self.find("html").id
        self.click(css)
        self.until(lambda: self.find("html").id != before)

    def enter(self, css: str, value: str) -> None:
        """A field has this value, typed."""
        field = self.find(css)
        field.clear()
        field.send_keys(value)

    def choose(self, css: str, value: str) -> None:
        """A choice has this value."""
        Select(self.find(css)).select_by_value(value)

    def press(self, *keys: str) -> None:
        """Keys, to whatever has the focus; see `Keys`."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def run(self, script: str, *values: object) -> Any:
        """What a script gives that runs in the page."""
        return self.driver.execute_script(script, *values)

    def wait(self, script: str) -> None:
        """Returns when a script in the page gives what is true."""
        self.until(lambda: self.run(script))

    def until(self, condition: Any) -> None:
        """Returns when the condition comes true; pages may change under it."""
        WebDriverWait(self.driver, PATIENCE_S, 0.02, ignored_exceptions=(Exception,)).until(lambda _: condition())

    def resize(self, size: tuple[int, int]) -> None:
        """The page has this width and height, a phone's if it is narrow."""
        width, height = size
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def darken(self, is_dark: bool = True) -> None:
        """The viewer prefers dark pages, or light ones."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """The page as a PNG, from top to bottom if it is to be whole."""
        import base64

        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(found["data"]))

    def assert_fits(self) -> None:
        """Nothing makes the page wider than the window."""
        wide = self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{self.path} is {wide} pixels wider than the window"

    def assert_accessible(self) -> None:
        """axe-core finds nothing serious on the page that is shown."""
        self.run(_AXE.read_text(encoding="utf-8"))
        found = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document, {resultTypes: ['violations']}).then(r => done(r.violations), e => done(String(e)));"
        )
        assert isinstance(found, list), found
        wrong = [
            f"{each['id']}: {each['help']} at {[node['target'] for node in each['nodes']][:5]}"
            for each in found
            if each["impact"] in _SERIOUS
        ]
        assert not wrong, f"{self.path}: {wrong}"

    def assert_clean(self, *, expected: tuple[str, ...] = ()) -> None:
        """No console error, no request to another host, nothing serious for axe-core.

        Args:
            expected: what a message of the console may contain, where a test brings about a refusal.
        """
        logged = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        errors = [
            entry["message"]
            for entry in logged
            if entry["level"] in ("SEVERE", "WARNING") and not any(part in entry["message"] for part in expected)
        ]
        assert not errors, errors
        assert not (foreign := self.foreign()), foreign
        self.assert_accessible()

    def foreign(self) -> list[str]:
        """Addresses of other hosts that pages have asked for since the last look."""
        own = urlsplit(self.url).netloc
        return [
            address
            for address in self._requested()
            if urlsplit(address).scheme not in ("data", "blob", "about") and urlsplit(address).netloc != own
        ]

    def forget(self) -> None:
        """Nobody is logged in, logs are empty, the window is wide and light, as for a new visitor."""
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        self.driver.delete_all_cookies()
        self.resize(WIDE)
        self.darken(False)

    def _requested(self) -> Iterator[str]:
        for entry in self.driver.get_log("performance"):  # type: ignore[no-untyped-call]
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                yield message["params"]["request"]["url"]


@contextmanager
def chromium(url: str) -> Iterator[Browser]:
    """A browser for the service at this address."""
    assert CHROMIUM is not None, MISSING
    assert DRIVER is not None, MISSING
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=ChromeService(DRIVER))
    try:
        driver.set_page_load_timeout(PATIENCE_S)
        driver.set_script_timeout(PATIENCE_S)
        found = Browser(driver, url)
        found.resize(WIDE)
        yield found
    finally:
        driver.quit()


__all__ = ["CHROMIUM", "DRIVER", "MISSING", "NARROW", "WIDE", "Browser", "Keys", "chromium"]
