"""The code blocks of the documentation: found, sorted by language, and run as a reader would run them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.*?) -->\n)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
DEFAULT_URL = "http://127.0.0.1:8077"
MARK = "@@ command @@"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `reason` says why it is not run, if it is not."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[tuple[str, str]]:
        """The commands of a console, each with the output that the page shows, "" if it shows none."""
        found: list[tuple[str, str]] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], ""))
            elif line.startswith("> ") and found:
                found[-1] = (f"{found[-1][0]}\n{line[2:]}", "")
            elif found and line.startswith("    ") and found[-1][0].endswith("\\"):
                found[-1] = (f"{found[-1][0]}\n{line}", "")
            elif found:
                found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
        return found

    @property
    def shell(self) -> str:
        """What a shell is given to run it."""
        return self.text if self.language == "bash" else "\n".join(command for command, _ in self.commands)


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: match.start("language")].count("\n") + 1, match["language"], match["text"], match["reason"])
        for match in BLOCK.finditer(text)
    ]


def run_python(program: str, folder: Path, given: dict[str, str]) -> str:
    """The output of a program, run in a folder by a process of its own in which warnings are errors."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=given,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{program}\n{result.stderr}"
    return result.stdout


def run_shell(block: Block, folder: Path, given: dict[str, str]) -> None:
    """The commands of a block ran one after the other in one shell, each with the output that the page shows.

    Our three commands are those of this checkout; `.venv/bin/` is taken off, the default address is that of the service
    in `ENGRAM_URL`.
    """
    commands = block.commands if block.language == "console" else [(block.text, "")]
    script = f"\necho '{MARK}'\n".join(command for command, _ in commands)
    script = script.replace(".venv/bin/", "").replace(DEFAULT_URL, given["ENGRAM_URL"])
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"exec 2>&1\n{script}"],
        env=given
        | {
            "PATH": f"{commands_folder(folder)}:{given['PATH']}",
            "COLUMNS": "150",
            "HOME": str(folder),
            "XDG_CONFIG_HOME": "",
        },
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, f"{block}: {result.stdout}{result.stderr}"
    for (command, shown), said in zip(commands, result.stdout.split(f"{MARK}\n"), strict=True):
        assert not shown.strip() or resembles(said, shown), f"{block}: {command} says\n{said}\nand not\n{shown}"


def commands_folder(folder: Path) -> Path:
    """A folder of our three commands, as this interpreter and this checkout have them."""
    made = folder.parent / f"{folder.name}-bin"
    if not made.exists():
        made.mkdir()
        modules = {"engram": "engram", "engram-service": "engram_service", "engram-train": "engram_trainer"}
        for name, module in modules.items():
            (made / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
            (made / name).chmod(0o755)
    return made


def resembles(said: str, shown: str) -> bool:
    """Whether what a command said is what a page shows, whatever the numbers; a line `...` stands for any lines."""

    def plain(line: str) -> str:
        return re.sub(r"\s+", " ", re.sub(r"\d[\d,.]*", "0", line)).strip()

    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(plain(line)) + r"\n" for line in shown.splitlines()
    )
    return re.fullmatch(pattern, "".join(f"{plain(line)}\n" for line in said.splitlines())) is not None
