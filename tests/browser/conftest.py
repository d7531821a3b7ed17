"""A real service with real buffers, and a browser that looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engram import Client
from tests.browser import filling
from tests.browser.browsing import CHROMIUM, DRIVER, MISSING, Browser, chromium
from tests.servers import ServiceProcess


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs a browser."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service with the buffers of `filling`, made once: tests that change something make a buffer of their own."""
    running = ServiceProcess(tmp_path_factory.mktemp("console"))
    with Client(running.url) as client:
        filling.fill(client)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def window(console: ServiceProcess) -> Iterator[Browser]:
    """The browser of all tests: starting one takes a second."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip(MISSING)
    with chromium(console.url) as found:
        yield found


@pytest.fixture
def browser(window: Browser) -> Iterator[Browser]:
    """A wide, light window on `console` that has seen nothing yet; after the test the last page must be clean."""
    window.forget()
    yield window
    window.assert_clean()


@pytest.fixture
def engram(console: ServiceProcess) -> Iterator[Client]:
    """A client of `console`."""
    with Client(console.url) as found:
        yield found
