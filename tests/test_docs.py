"""The documentation is true: tables equal the code, commands exist, links resolve, sessions run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from docs import tables
from engram_service.settings import Settings
from tests.contents import pictures
from tests.servers import ServiceProcess, environment

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PROMISES = ROOT / "docs" / "promises.md"
SERVICE = ROOT / "docs" / "service.md"
FIELDS = ROOT / "docs" / "fields.md"
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


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


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


def test_the_python_session_of_the_service_runs_against_a_real_one(service: ServiceProcess, tmp_path: Path) -> None:
    (session,) = code_blocks(SERVICE, "python")
    assert len(session.splitlines()) <= 24
    assert "exemplars in" in run_python(session, tmp_path, url=service.url)


def test_the_first_ten_lines_of_the_readme_run_without_a_service(tmp_path: Path) -> None:
    (session,) = code_blocks(README, "python")
    assert session.index("LocalBuffer(") < 200
    assert "(256, 28, 28, 1) uint8" in run_python(session, tmp_path)


NETWORK = """
import numpy as np
from engram import Client
images, class_ids = np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), np.uint8), np.arange(80) % 4
network = lambda images: images.reshape(len(images), -1)[:, :10] / 255
client = Client()
"""
"""What the reader of the page on fields has: images, a network, a client."""


def test_the_example_of_a_field_runs_against_a_real_service(service: ServiceProcess, tmp_path: Path) -> None:
    (example,) = code_blocks(FIELDS, "python")
    assert len(example.splitlines()) == 5
    output = run_python(
        f"{NETWORK}{example}\nclient.close()\nprint(batch.fields['logits'].shape)", tmp_path, service.url
    )
    assert output.strip() == "(64, 10)"


def run_python(program: str, folder: Path, url: str = "http://127.0.0.1:9") -> str:
    """The output of a program, run in a folder by a process of its own in which warnings are errors."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=environment(url=url),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not all(map(shutil.which, ("bash", "curl", "tar"))), reason="needs bash, curl and tar")
def test_the_curl_session_runs_against_a_real_service(service: ServiceProcess, tmp_path: Path) -> None:
    (session,) = [block for block in code_blocks(SERVICE, "console") if "curl" in block]
    commands = re.sub(r"^(?!\$ |> ).*\n", "", session, flags=re.MULTILINE)
    commands = re.sub(r"^[$>] ", "", commands, flags=re.MULTILINE)
    assert "http://127.0.0.1:8077" in commands
    write_pictures(tmp_path / "photos")
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands.replace("http://127.0.0.1:8077", service.url)],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr + result.stdout
    with Image.open(tmp_path / "draw.jpg") as strip:
        assert strip.format == "JPEG"
        assert strip.size == (32, 8 * 32)


def write_pictures(folder: Path) -> None:
    """What the curl session starts from: pictures with their class ids beside them."""
    folder.mkdir()
    for number, pixels in enumerate(pictures(3, 20, (32, 32, 3))):
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.cls").write_text(str(number % 2))
