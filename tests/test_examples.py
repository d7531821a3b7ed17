"""Every code block of README and docs runs as a reader would run it, or says why it cannot run here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.contents import pictures
from tests.examples import ROOT, Block, blocks, resembles, run_python, run_shell
from tests.servers import environment

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for page in PAGES for block in blocks(page)]

REASONS = {
    "it installs packages",
    "it names a host of yours",
    "it needs a data set that is not here",
    "it needs a GPU",
    "it needs Docker",
    "it needs root",
    "it runs the benchmarks",
    "it runs the tests",
    "it serves until it is stopped",
    "it shows a part of a file",
}
"""Why a block may not be run. A new reason is a decision: is there really no way?"""

RUN = ("python", "console", "bash")
PARSED: dict[str, Callable[[str], object]] = {
    "python": lambda text: compile(text, "a page", "exec"),
    "json": json.loads,
    "toml": tomllib.loads,
    "yaml": yaml.safe_load,
}
KNOWN = {*RUN, *PARSED, "http", "nginx", "ini", "text"}

SAMPLES = """
import numpy as np
from engram import Client
images, class_ids = np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), np.uint8), np.arange(80) % 4
names = [f"cam-{number}.png" for number in range(80)]
network = lambda images: images.reshape(len(images), -1)[:, :10] / 255
client = Client()
"""
"""What the reader of the page on fields has: images with names, a network, a client."""

PRELUDES = {"docs/fields.md": (SAMPLES, "\nclient.close()")}
"""What comes before and after the Python of a page."""

OPERATORS = {"docs/operators.md", "docs/security.md"}
"""Pages whose reader runs the service: it has a token, and the reader the service's environment."""

ADMIN_TOKEN = "of-the-operator-who-reads-the-pages"

QUICK = {"docs/fields.md"}
"""The others take a second for each command that they start, or train something."""


def is_run(block: Block) -> bool:
    return block.language in RUN and block.reason is None and bool(block.shell.strip() or block.language == "python")


RUN_PAGES = sorted({str(block.page.relative_to(ROOT)) for block in BLOCKS if is_run(block)})


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_of_a_known_language_and_can_be_read_as_such(block: Block) -> None:
    assert block.language in KNOWN
    parse = PARSED.get(block.language)
    if parse is not None:
        parse(block.text)
    if block.language in ("console", "bash"):
        assert block.shell.strip(), "a console block has lines that begin with `$ `"
        subprocess.run(["bash", "-n", "-c", block.shell], check=True, capture_output=True)
    if block.language == "http":
        assert re.match(r"(GET|HEAD|POST|PUT|PATCH|DELETE) /\S* HTTP/1.1\n|HTTP/1.1 \d{3} ", block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_has_code_that_these_tests_do_not_see(page: Path) -> None:
    """Blocks by indentation, by tildes or with their fence indented."""
    text = page.read_text(encoding="utf-8")
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"(?:\n\n|^)    \S.*", rest)
    assert not re.findall(r"^\s*(?:```|~~~).*", rest, re.MULTILINE)


def test_blocks_that_are_not_run_say_why_in_one_of_few_ways() -> None:
    assert {block.reason for block in BLOCKS if block.reason is not None} <= REASONS
    assert not [str(block) for block in BLOCKS if block.reason is not None and block.language not in RUN]
    for page in PAGES:
        named = re.findall(r"^<!-- not run:", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(named) == len([block for block in blocks(page) if block.reason]), f"{page}: a reason without a block"


def test_enough_of_the_pages_is_run() -> None:
    assert {"README.md", "docs/client.md", "docs/fields.md", "docs/trainer.md", "docs/operators.md"} <= {*RUN_PAGES}


def test_the_ten_lines_of_the_readme_run_without_a_service(tmp_path: Path) -> None:
    (block,) = [block for block in blocks(README) if block.language == "python"]
    assert block.text.index("LocalBuffer(") < 200
    assert len(block.text.splitlines()) <= 12
    assert "(256, 28, 28, 1) uint8" in run_python(block.text, tmp_path, environment())


@pytest.mark.skipif(not all(map(shutil.which, ("bash", "curl", "tar"))), reason="needs bash, curl and tar")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else (pytest.mark.slow,)) for name in RUN_PAGES]
)
@pytest.mark.timeout(1800)
def test_the_blocks_of_a_page_run_one_after_the_other(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """In one folder, against one service; a page's Python is one program."""
    folder = tmp_path / "reader"
    prepare(folder)
    if name in OPERATORS:
        service = request.getfixturevalue("make_service")(admin_token=ADMIN_TOKEN)
        given = environment(url=service.url, token=ADMIN_TOKEN, admin_token=ADMIN_TOKEN, data_dir=service.data_dir)
    else:
        given = environment(url=request.getfixturevalue("service").url)
    found = [block for block in blocks(ROOT / name) if is_run(block)]
    before, after = PRELUDES.get(name, ("", ""))
    program = "\n".join(block.text for block in found if block.language == "python")
    if program:
        run_python(f"{before}{program}{after}", folder, given)
    for block in found:
        if block.language != "python":
            run_shell(block, folder, given)
    if (folder / "draw.jpg").exists():
        with Image.open(folder / "draw.jpg") as strip:
            assert (strip.format, strip.size) == ("JPEG", (32, 8 * 32))


def prepare(folder: Path) -> None:
    """What a reader begins with: pictures with their class ids beside them, and the same in a folder for each class."""
    by_class = folder / "by-class"
    flat = folder / "photos"
    for made in (flat, by_class / "cat", by_class / "dog"):
        made.mkdir(parents=True)
    for number, pixels in enumerate(pictures(3, 20, (32, 32, 3))):
        picture = Image.fromarray(pixels)
        picture.save(flat / f"{number:03d}.png")
        (flat / f"{number:03d}.cls").write_text(str(number % 2))
        picture.save(by_class / ("cat", "dog")[number % 2] / f"{number:03d}.png")


@pytest.mark.parametrize(
    ("said", "shown", "is_alike"),
    [
        ("a 1 b\n", "a 2  b\n", True),
        ("12,345 bytes in 3.5 s\n", "1 bytes in 0 s\n", True),
        ("a\nb\nc\nd\n", "a\n...\nd\n", True),
        ("a\nd\n", "a\n...\nd\n", True),
        ("a\nb\n", "a\n", False),
        ("error\n", "a\n", False),
        ("a\n", "a\nb\n", False),
    ],
)
def test_output_is_compared_line_by_line_whatever_the_numbers(said: str, shown: str, is_alike: bool) -> None:
    assert resembles(said, shown) == is_alike
