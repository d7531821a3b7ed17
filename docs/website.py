"""Make the site of the pages in docs/ and of those beside it: mkdocs calls this (`hooks` in mkdocs.yml).

README.md is the first page. Pages link to tests, benchmarks and modules as files of the repository, so that the links
work where the repository is read; in the site each such file becomes a page that shows it. Nothing is fetched, and a
link that leads nowhere stops the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs import reference

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "bench/README.md": "bench/README.md",
    "bench/RESULTS.md": "bench/RESULTS.md",
}
"""Pages that lie outside docs/, and where the site has them."""

FOLDERS = {"docs/adr": "decisions.md", "bench": "bench/README.md", "docs": "index.md"}
"""Folders that pages link to, and what the site shows in their place."""

LINK = re.compile(r'(\]\(|src=")([^)"\s]+)')
FENCE = re.compile(r"(^```.*?^```\n?)", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml", ".json": "json", ".go": "go"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site has the pages outside docs/, the API reference, and every file of the repository that a page names."""
    for outside, place in OUTSIDE.items():
        files.append(File.generated(config, place, content=(ROOT / outside).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference.md", content=reference.page()))
    named = {
        path
        for file in files.documentation_pages()
        for _, target in LINK.findall(FENCE.sub("", file.content_string))
        if (path := repository_path(file.src_uri, target)) is not None and place_of(path).startswith("source/")
    }
    for path in sorted(named):
        files.append(File.generated(config, place_of(path), content=_shown(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text with links as the site has them."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def moved(match: re.Match[str]) -> str:
        path = repository_path(here, match[2])
        if path is None:
            return match[0]
        anchor = match[2].partition("#")[1:]
        return match[1] + posixpath.relpath(place_of(path), posixpath.dirname(here) or ".") + "".join(anchor)

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


def repository_path(page: str, target: str) -> str | None:
    """The file of the repository that a page of the site links to, None for addresses and anchors.

    Raises:
        PluginError: there is no such file.
    """
    if "://" in target or target.startswith(("#", "mailto:")) or page == "reference.md":
        return None
    written_in = next((path for path, place in OUTSIDE.items() if place == page), f"docs/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(written_in), target.partition("#")[0]))
    if not (ROOT / path).exists():
        raise PluginError(f"{written_in} links to {target}, which is not there")
    return path


def place_of(path: str) -> str:
    """Where the site has a file or folder of the repository."""
    page = OUTSIDE.get(path) or FOLDERS.get(path)
    if page is not None:
        return page
    return path.removeprefix("docs/") if path.startswith("docs/") and not path.endswith(".py") else f"source/{path}.md"


def _shown(path: str) -> str:
    """A page that shows a file, which the search leaves out."""
    file = ROOT / path
    if file.is_dir():
        raise PluginError(f"a page links to the folder {path}, for which the site has no page")
    language = LANGUAGES.get(PurePosixPath(path).suffix, "text")
    text = file.read_text(encoding="utf-8")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n`````{language}\n{text}\n`````\n"
