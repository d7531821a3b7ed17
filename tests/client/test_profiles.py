"""Services known by a name: who may read their file, what wins, and where a token may go."""

from __future__ import annotations

import os
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from engram import Client, profiles
from engram.cli import app
from engram.profiles import Profile, resolve
from tests.servers import ServiceThread


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the profiles are in these tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "engram" / "profiles.toml"


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def test_what_is_written_is_read_and_nobody_else_can_read_it(file: Path) -> None:
    umask = os.umask(0)
    try:
        profiles.write("default", Profile("http://one", "engram_1"))
        profiles.write("other", Profile("http://two"))
    finally:
        os.umask(umask)
    assert profiles.read() == {"default": Profile("http://one", "engram_1"), "other": Profile("http://two")}
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    profiles.write("default", None)
    assert list(profiles.read()) == ["other"]
    assert "engram_1" not in repr(Profile("u", "engram_1"))


@settings(max_examples=30)
@given(url=st.text(st.characters(exclude_categories=["Cs"])), token=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, url: str, token: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        profiles.write("p.1", Profile(url, token))
        assert profiles.read() == {"p.1": Profile(url, token)}


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o601])
def test_a_file_that_others_can_read_is_refused(file: Path, mode: int) -> None:
    profiles.write("default", Profile("http://one", "engram_1"))
    file.chmod(mode)
    with pytest.raises(ValueError, match=f"chmod 600 {file}"):
        Client()
    done = run("buffers")
    assert (done.exit_code, "others can read it" in done.stderr, "engram_1" in done.stderr) == (1, True, False)


@pytest.mark.parametrize(
    "content",
    ["[default", "x = 1", "[a]\ntoken = 't'", "[a]\nurl = 1", "[a]\nurl = 'u'\ntokn = 't'", "[a]\nurl='u'\ntoken=1"],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True)
    file.touch(mode=0o600)
    file.write_text(content)
    with pytest.raises(ValueError, match=str(file)):
        profiles.read()


@pytest.mark.parametrize("name", ["", "a b", "-x", ".", "a/b", "x" * 65, 'a"]'])
def test_names_are_plain(name: str) -> None:
    with pytest.raises(ValueError, match="is no name for a profile"):
        profiles.write(name, Profile("http://one"))


def test_what_is_given_wins_over_the_environment_and_that_over_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(None, None, None) == ("http://127.0.0.1:8077", "")
    profiles.write("default", Profile("http://one", "engram_1"))
    profiles.write("two", Profile("http://two", "engram_2"))
    assert resolve(None, None, None) == ("http://one", "engram_1")
    monkeypatch.setenv("ENGRAM_PROFILE", "two")
    assert resolve(None, None, None) == ("http://two", "engram_2")
    monkeypatch.setenv("ENGRAM_TOKEN", "engram_e")
    assert resolve(None, None, None) == ("http://two", "engram_e")
    monkeypatch.setenv("ENGRAM_URL", "http://e")
    assert resolve(None, None, None) == ("http://e", "engram_e")
    assert resolve(None, None, "default") == ("http://one", "engram_1")
    assert resolve(None, "engram_g", "default") == ("http://one", "engram_g")
    assert resolve("http://g", "engram_g", None) == ("http://g", "engram_g")
    assert resolve(None, "", None) == ("http://e", "")
    with pytest.raises(ValueError, match=r"there is no profile 'three' in .*, only default, two"):
        resolve(None, None, "three")


def test_a_profiles_token_goes_to_no_other_service(monkeypatch: pytest.MonkeyPatch) -> None:
    profiles.write("default", Profile("https://one", "engram_1"))
    assert resolve("https://other", None, None) == ("https://other", "")
    assert resolve("https://other", None, "default") == ("https://other", "")
    assert resolve("https://one/", None, None) == ("https://one/", "engram_1")
    monkeypatch.setenv("ENGRAM_URL", "http://one")
    assert resolve(None, None, None) == ("http://one", "")


def test_a_relative_folder_of_configurations_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "config")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profiles.path() == tmp_path / ".config" / "engram" / "profiles.toml"


def test_logging_in_checks_and_keeps_a_token_that_is_never_shown(guarded: ServiceThread) -> None:
    wrong = run("login", guarded.url, "--profile", "work", stdin="engram_wrong\n")
    assert (wrong.exit_code, profiles.read()) == (1, {})
    done = run("login", guarded.url, "--profile", "work", stdin="the-first-token\n")
    assert (done.exit_code, done.stdout) == (0, f"profile work: {guarded.url}, admin, admin on all buffers\n")
    assert "the-first-token" not in done.stdout + done.stderr
    assert run("whoami").exit_code == 1
    assert run("--profile", "work", "whoami").stdout == "admin, admin on all buffers\n"
    with Client(profile="work") as client:
        assert client.buffers() == []
    listed = run("profiles")
    assert (listed.stdout, "the-first-token" in listed.stdout) == (f"work  {guarded.url}\n", False)
    assert run("logout", "--profile", "work").stdout == "profile work is forgotten\n"
    assert run("logout", "--profile", "work").exit_code == 1


def test_a_service_without_tokens_is_a_profile_too(served: ServiceThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_PROFILE", "here")
    assert run("login", served.url, stdin="").exit_code == 0
    assert profiles.read() == {"here": Profile(served.url)}
    assert run("buffers").exit_code == 0


def test_a_profile_can_be_kept_of_a_service_that_does_not_run_yet() -> None:
    assert run("login", "http://127.0.0.1:1", "--no-check", stdin=f"{string.ascii_letters}\n").exit_code == 0
    assert profiles.read()["default"].token == string.ascii_letters


@pytest.fixture
def guarded(serve_thread: object) -> ServiceThread:
    made: ServiceThread = serve_thread(admin_token="the-first-token")  # type: ignore[operator]
    return made
