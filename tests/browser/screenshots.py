"""Write the pictures of the documentation: pages of the console of a service that is made for it (`make screenshots`).

Each page that `PAGES` names becomes docs/images/console-NAME.png, and -narrow, -dark where it says so.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from engram import Client
from engram_trainer.local_service import local_service
from tests.browser import filling
from tests.browser.browsing import NARROW, WIDE, Browser, chromium

FOLDER = Path(__file__).parents[2] / "docs" / "images"
COLOURS = 128
"""Of a page's palette; pages that show images have twice as many."""


@dataclass(frozen=True)
class Page:
    """A page and how it is looked at: `wait` is a selector of what has to be there."""

    name: str
    path: str
    wait: str = "h1"
    is_narrow: bool = False
    is_dark: bool = False
    has_images: bool = False


BUFFER = f"/console/buffers/{filling.FASHION}"
PHOTOGRAPHS = f"/console/buffers/{filling.PHOTOGRAPHS}"

PAGES = (
    Page("overview", "/console", is_narrow=True, is_dark=True),
    Page("buffer", BUFFER, "#next #forecast", is_narrow=True, is_dark=True),
    Page("classes", f"{BUFFER}/classes"),
    Page("forecast", f"{BUFFER}/forecast?budget=40kB"),
    Page("snapshots", f"{BUFFER}/snapshots"),
    Page("compare", f"{BUFFER}/compare?with={filling.SNAPSHOT}"),
    Page("ingests", "/console/ingests", is_narrow=True),
    Page("extractors", "/console/extractors"),
    Page("task", f"{BUFFER}/tasks/1", is_narrow=True, is_dark=True),
    Page("exemplars", f"{PHOTOGRAPHS}/exemplars", has_images=True, is_narrow=True),
    Page("map", f"{BUFFER}/tasks/1/map", has_images=True),
    Page("draws", f"/console/draws?buffer={filling.FASHION}"),
    Page("tokens", "/console/tokens"),
    Page("audit", "/console/audit"),
)


def main() -> None:
    """Entry point of `python -m tests.browser.screenshots`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--only", nargs="*", help="names of pages")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, local_service(folder, workers=1) as service:
        with Client(service.url) as client:
            filling.fill(client, per_class=300, tasks=5, budget_bytes=120_000, photograph_quality=75)
            row = max(client.exemplars(filling.PHOTOGRAPHS, task=0), key=lambda each: each.bytes)
            filling.use(client)
        with chromium(service.url) as browser:
            one = Page("exemplar", f"{PHOTOGRAPHS}/exemplars/{row.pack}/{row.row}", has_images=True)
            for page in (*PAGES, one):
                if not given.only or page.name in given.only:
                    take(browser, page, given.out)
    written = sorted(given.out.glob("console-*.png"))
    print(f"{len(written)} pictures, {sum(path.stat().st_size for path in written):,} bytes, in {given.out}")


def take(browser: Browser, page: Page, folder: Path) -> None:
    """The pictures of one page."""
    looks = [("", WIDE, False)]
    looks += [("-narrow", NARROW, False)] * page.is_narrow + [("-dark", WIDE, True)] * page.is_dark
    for suffix, size, is_dark in looks:
        browser.resize(size)
        browser.darken(is_dark)
        browser.open(page.path)
        browser.until(lambda: browser.find_all(page.wait))
        browser.wait("return document.querySelectorAll('.htmx-request').length === 0")
        browser.wait("return [...document.images].every(image => image.complete)")
        path = folder / f"console-{page.name}{suffix}.png"
        browser.picture(path, whole=size == WIDE)
        with Image.open(path) as picture:
            small = picture.convert("RGB").quantize(COLOURS * (2 if page.has_images else 1))
        small.save(path, optimize=True)


if __name__ == "__main__":
    main()
