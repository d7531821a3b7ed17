"""The site of the documentation builds without a warning, has every page, and asks no other host for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from docs import reference, tables
from tests.servers import environment

ROOT = Path(__file__).parent.parent


class Tags(HTMLParser):
    """What a page loads, where it leads, and the names of its places."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        address = given.get("src") or given.get("href") or given.get("data") or given.get("action")
        if address is not None:
            (self.leads if tag in ("a", "form") else self.loads).append(address)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make site` builds it."""
    folder = tmp_path_factory.mktemp("site")
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=environment() | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    # Strict: a warning is an error.
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


@pytest.mark.slow
def test_the_site_has_every_page_and_every_link_leads_somewhere(site: Path) -> None:
    pages = {path: Tags(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    names = {str(path.relative_to(site)) for path in pages}
    assert {
        f"{path.relative_to(ROOT / 'docs').with_suffix('')}.html" for path in (ROOT / "docs").rglob("*.md")
    } <= names
    assert {"index.html", "reference.html", "CHANGELOG.html", "bench/RESULTS.html"} <= names
    broken = []
    for path, tags in pages.items():
        for address in (*tags.leads, *tags.loads):
            parts = urlsplit(address)
            if parts.scheme or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            is_there = target.is_file() and (not anchor or target not in pages or anchor in pages[target].places)
            if not is_there and anchor != "__top":
                broken.append(f"{path.relative_to(site)}: {address}")
    assert not broken


@pytest.mark.slow
def test_no_page_asks_another_host_for_anything(site: Path) -> None:
    loaded = {
        address
        for path in site.rglob("*.html")
        for address in Tags(path.read_text(encoding="utf-8")).loads
        if re.match(r"(?:[a-z]+:)?//", address)
    }
    fetched = {
        f"{path.name}: {address}"
        for path in site.rglob("*.css")
        for address in re.findall(
            r"(?:url\(|@import\s+)[\"']?((?:[a-z]+:)?//[^\"')]+)", path.read_text(encoding="utf-8")
        )
    }
    assert not loaded | fetched
    # The theme's script fetches two things when a page asks for them: diagrams and facts of a repository.
    texts = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    assert not [text for text in texts if 'class="mermaid"' in text or 'data-md-component="source"' in text]


@pytest.mark.slow
def test_the_reference_shows_every_operation_with_what_it_needs(site: Path) -> None:
    text = unescape(re.sub(r"<[^>]+>", "", (site / "reference.html").read_text(encoding="utf-8")))
    operations = tables.routes()
    assert len(operations) > 20
    for method, path, _ in operations:
        assert f"{method} {path}" in text
    assert text.count("Needs: ") == len(operations)


def test_a_type_is_said_in_a_few_words() -> None:
    assert reference.type_of({"type": "integer", "minimum": 0, "maximum": 9, "default": 4}) == (
        "integer 0..9, `4` if left out"
    )
    assert reference.type_of({"anyOf": [{"$ref": "#/components/schemas/Task"}, {"type": "null"}]}) == (
        "[Task](#task) or null"
    )
    assert reference.type_of({"type": "array", "items": {"type": "string"}}) == "list of text"
    assert reference.type_of({"enum": ["a", "b"], "type": "string"}) == "`a`, `b`"
    assert reference.type_of({"type": "number", "exclusiveMinimum": 0}) == "number above 0"
