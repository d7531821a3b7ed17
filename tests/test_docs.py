"""The documentation is true: tables equal the code, everything has its place in them, links resolve."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from docs import tables
from engram_service.settings import Settings

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PROMISES = ROOT / "docs" / "promises.md"
PAGES = [
    README,
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "bench/README.md", "bench/RESULTS.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
DECISIONS = sorted((ROOT / "docs" / "adr").glob("*.md"))


def committed_files() -> list[Path]:
    """Every file that git would commit, or without git everything in the source folders."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]
    folders = [ROOT / name for name in ("client", "service", "trainer", "migrations", "tests", "bench", "docs", ".ci")]
    return [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_of_settings_routes_and_errors_equal_the_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- table:" in text
    assert tables.render(text) == text, "run: make docs"


def test_every_setting_says_what_it_is_for() -> None:
    silent = [name for name, field in Settings.model_fields.items() if len(field.description or "") < 20]
    assert not silent


def test_every_route_says_what_it_does() -> None:
    silent = [f"{method} {path}" for method, path, operation in tables.routes() if not operation.get("description")]
    assert not silent


@pytest.mark.parametrize("name", tables.COMMANDS)
def test_every_command_and_option_says_what_it_does(name: str) -> None:
    commands = tables.commands(name)
    assert len(commands) > 2
    silent = [typed for typed, command in commands if len(command.help or "") < 10]
    silent += [
        f"{typed} {option.opts[0]}"
        for typed, command in commands
        for option in tables.options(command)
        if option.param_type_name == "option" and not option.help
    ]
    assert not silent


def test_every_metric_says_what_it_counts() -> None:
    assert len(tables.metrics()) > 20
    assert not [name for name, _, _, meaning in tables.metrics() if len(meaning) < 8]
    assert not [name for name, *_ in tables.metrics() if not name.startswith("engram_")]


def test_every_action_of_the_audit_is_on_the_page_of_operators() -> None:
    """An action is a text that is given to `audit.record` or to a `Deed`, as the first text among its arguments."""
    recorded = set()
    for path in (ROOT / "service" / "engram_service").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("record", "Deed"):
                recorded |= {
                    found.value
                    for each in node.args
                    for found in ast.walk(each)
                    if isinstance(found, ast.Constant) and re.fullmatch(r"[a-z]+\.[a-z]+", str(found.value))
                }
    assert len(recorded) > 10
    page = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    table = page[page.index("<!-- actions -->") :].split("\n\n")[0]
    assert {*re.findall(r"`([a-z]+\.[a-z]+)`", table)} == recorded


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_one_title_and_no_heading_skips_a_level(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    levels = [len(marks) for marks in re.findall(r"^(#+) \S", text, re.MULTILINE)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_picture_says_what_it_shows(page: Path) -> None:
    found = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert not [path for words, path in found if len(words) < 12]


def test_every_picture_is_on_a_page() -> None:
    """`make screenshots` takes the console's in more sizes and colours than pages show."""
    shown = {
        (page.parent / path).resolve()
        for page in PAGES
        for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    pictures = [path for path in (ROOT / "docs" / "images").iterdir() if not path.name.startswith("console-")]
    assert not [path.name for path in pictures if path.resolve() not in shown]
    assert len([path for path in shown if path.name.startswith("console-")]) > 10


def test_no_page_has_a_place_left_for_something() -> None:
    left = re.compile(r"TODO|FIXME|TBD|XXX|<!-- (?!not run: |table: |end |actions |local buffer: )")
    assert not [page.name for page in PAGES if left.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_that_are_named_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^\$ )make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE))
    missing = [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_and_scripts_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"\b(?:bench|tests)/[\w/]+\.py\b", page.read_text(encoding="utf-8")))
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing


def test_every_promise_names_a_test_that_exists() -> None:
    promises = re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", PROMISES.read_text(encoding="utf-8"))
    assert len(promises) > 10
    lines = [line for line in PROMISES.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(promises) == len(lines) - 1, "every line of the table but its head names one test"
    sources = {path: (PROMISES.parent / path).read_text(encoding="utf-8") for _, path in promises}
    assert not [name for name, path in promises if f"def {name}(" not in sources[path]]


def test_decisions_are_numbered_without_gaps_and_have_all_parts() -> None:
    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))
    for path in DECISIONS:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {int(path.name[:4])}. ")
        headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences", "Alternatives", "Enforced by"], path.name
        assert "tests/" in text.split("## Enforced by")[1], f"{path.name} is enforced by no test"


def test_no_committed_file_names_a_path_or_a_registry_of_one_machine() -> None:
    forbidden = re.compile(rb"/root/|/home/[a-z]+/|find-links|--index-url|--extra-index-url")
    found = {
        str(path.relative_to(ROOT)): match[0].decode()
        for path in committed_files()
        if path != Path(__file__) and (match := forbidden.search(path.read_bytes()))
    }
    assert not found


def test_nothing_large_is_committed() -> None:
    assert sum(path.stat().st_size for path in committed_files()) < 12 * 2**20
