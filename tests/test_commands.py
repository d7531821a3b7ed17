"""What the three commands have in common: their version, their help, completion, amounts of bytes, what they need."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from pydantic import ValidationError

from engram import __version__, amounts
from engram_service.settings import Settings

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = {"engram": "engram", "engram-service": "engram_service", "engram-train": "engram_trainer"}


def run(command: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """The command as its console script starts it; what it exits with."""
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    with pytest.raises(SystemExit) as ended:
        import_module(f"{COMMANDS[command]}.__main__").main()
    return ended.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_tells_its_version(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert PROJECT["version"] == __version__
    assert run(command, "--version", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == f"engram {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_short_option_explains_too_and_the_shell_can_complete(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "-h", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert f"Usage: {command}" in said
    assert "--install-completion" in said
    monkeypatch.setenv("COMP_WORDS", f"{command} --vers")
    monkeypatch.setenv("COMP_CWORD", "1")
    monkeypatch.setenv(f"_{command.replace('-', '_').upper()}_COMPLETE", "complete_bash")
    run(command, monkeypatch=monkeypatch)
    assert capsys.readouterr().out.split() == ["--version"]


@pytest.mark.parametrize(
    ("command", "absent", "extra"),
    [
        ("engram", "typer", "cli"),
        ("engram-service", "typer", "service"),
        ("engram-train", "torch", "trainer"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(
    command: str, absent: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.delitem(sys.modules, f"{COMMANDS[command]}.cli", raising=False)
    said = run(command, "--version", monkeypatch=monkeypatch)
    assert said == f"{command} needs {absent}, which is not installed here: pip install 'engram[{extra}]'"
    assert extra in PROJECT["optional-dependencies"]


def test_each_command_is_the_entry_point_of_its_package() -> None:
    assert PROJECT["scripts"] == {command: f"{package}.__main__:main" for command, package in COMMANDS.items()}


def test_the_library_alone_needs_no_package_of_the_commands_and_the_service_no_driver_of_postgresql() -> None:
    alone = [name for name in PROJECT["dependencies"] if name.startswith(("rich", "typer"))]
    service = [name for name in PROJECT["optional-dependencies"]["service"] if "psycopg" in name]
    assert alone + service == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12),
        ("2k", 2000),
        ("2 KiB", 2048),
        ("0.5MB", 500_000),
        ("1gib", 2**30),
        ("1TB", 10**12),
        ("1.5tib", 3 * 2**39),
    ],
)
def test_amounts_of_bytes_have_units(text: str, number: int) -> None:
    assert amounts.parse(text) == number


@pytest.mark.parametrize(
    "text", ["", "much", "1,000", "1MB please", "-1", "1e6", "5 apples", "10 mbit", "MB", "9" * 400 + "MB", "٣MB"]
)
def test_what_is_no_amount_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an amount of bytes like 500000"):
        amounts.parse(text)


def test_every_setting_in_bytes_takes_a_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in Settings.model_fields if name.endswith("_bytes")]
    assert len(names) > 4
    for name in names:
        monkeypatch.setenv(f"ENGRAM_{name.upper()}", "3GiB")
    settings = Settings(data_dir=tmp_path)
    assert {getattr(settings, name) for name in names} == {3 * 2**30}


def test_the_wheel_leaves_out_the_sample() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    large = [path for package in wheel["packages"] for path in (ROOT / package).rglob("*") if path.suffix == ".gz"]
    assert large
    assert not [path for path in large if not any((ROOT / left_out) in path.parents for left_out in wheel["exclude"])]


def test_a_database_without_its_driver_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ValidationError, match=r"it needs psycopg, .*pip install 'engram\[service,postgres\]'"):
        Settings(data_dir=tmp_path, database_url="postgresql+psycopg://engram@/postgres")
    with pytest.raises(ValidationError, match="not the URL of a database, like"):
        Settings(data_dir=tmp_path, database_url="postgres.example.org/engram")


def test_the_help_of_engram_groups_its_commands() -> None:
    from typer.testing import CliRunner

    from engram.cli import app

    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100"}).stdout
    for panel in ("Buffers", "Uploads and decisions", "Exemplars", "Operation", "Profiles"):
        assert f"─ {panel} ─" in shown
    assert "─ Commands ─" not in shown
