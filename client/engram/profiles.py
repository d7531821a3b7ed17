"""Services that are known by a name: their URLs and tokens, in a file that only its owner can read.

    $XDG_CONFIG_HOME/engram/profiles.toml, or ~/.config/engram/profiles.toml

    [default]
    url = "https://engram.example.org"
    token = "engram_..."

`engram login` writes it. Where a client or a command is told nothing, it takes the profile named by `ENGRAM_PROFILE`,
else the one called "default", if there is one. What is given beats what the environment says, which beats a profile:

    URL    given, of the profile that is given, ENGRAM_URL, of a profile, http://127.0.0.1:8077
    token  given, ENGRAM_TOKEN unless a profile is given, of the profile

A profile's token goes to that profile's URL and to no other.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Final

from engram.http import DEFAULT_URL

DEFAULT: Final = "default"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MEMBERS = {"url", "token"}


@dataclass(frozen=True)
class Profile:
    """Where a service is, and the token for it; "" is none. Its text does not show the token."""

    url: str
    token: str = ""

    def __repr__(self) -> str:
        return f"Profile(url={self.url!r}, token={'...' if self.token else ''!r})"


def path() -> Path:
    """Where the profiles are, whether or not there are any."""
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    # A relative one is to be ignored, says the specification.
    folder = Path(configured) if configured.startswith("/") else Path("~/.config").expanduser()
    return folder / "engram" / "profiles.toml"


def resolve(url: str | None, token: str | None, profile: str | None) -> tuple[str, str]:
    """The URL and the token that a client uses that is given these, "" being none; see the module docstring.

    Raises:
        ValueError: there is no such profile, or the file cannot be used.
    """
    environment = os.environ.get
    if profile is None and url is None:
        url = environment("ENGRAM_URL") or None
    if profile is None:
        token = environment("ENGRAM_TOKEN") or None if token is None else token
    found = _found(profile) if url is None or token is None else None
    if url is None:
        url = found.url if found is not None else DEFAULT_URL
    if token is None and found is not None and found.url.rstrip("/") == url.rstrip("/"):
        token = found.token
    return url, token or ""


def chosen(name: str | None) -> str:
    """The name of the profile that is meant where this one is given."""
    return name or os.environ.get("ENGRAM_PROFILE") or DEFAULT


def _found(name: str | None) -> Profile | None:
    wanted = chosen(name)
    profiles = read()
    if wanted not in profiles:
        if wanted == DEFAULT:
            return None
        known = f"only {', '.join(profiles)}" if profiles else "nor any other"
        raise ValueError(f"there is no profile {wanted!r} in {path()}, {known}; `engram login` makes one")
    return profiles[wanted]


def read() -> dict[str, Profile]:
    """All profiles by name; none if there is no file, or one that this user cannot read.

    Raises:
        ValueError: others can read the file, it is somebody else's, or it is not what `write` makes.
    """
    file = path()
    try:
        with file.open("rb") as stream:
            found = os.fstat(stream.fileno())
            if hasattr(os, "getuid"):
                if found.st_uid not in (os.getuid(), 0):
                    raise ValueError(f"{file} belongs to another user, so what it says is not to be trusted")
                if stat.S_IMODE(found.st_mode) & 0o077:
                    raise ValueError(
                        f"{file} holds tokens and others can read it (mode {stat.S_IMODE(found.st_mode):o}): "
                        f"chmod 600 {file}, and consider its tokens known"
                    )
            content = stream.read()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    try:
        held = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    return {name: _profile(name, members, file) for name, members in held.items()}


def _profile(name: str, members: object, file: Path) -> Profile:
    if not isinstance(members, dict) or not members.keys() <= _MEMBERS or not isinstance(members.get("url"), str):
        raise ValueError(f"[{name}] in {file} should have a url and a token, and nothing else")
    token = members.get("token", "")
    if not isinstance(token, str):
        raise ValueError(f"the token of [{name}] in {file} should be a text")
    return Profile(members["url"], token)


def write(name: str, profile: Profile | None) -> None:
    """The profile is in the file, or, if it is None, is not; the others stay. The file changes at once or not at all.

    Raises:
        ValueError: it is no name for a profile, or the file cannot be used as it is.
        OSError: the disk does not take it.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a profile: letters, digits, dots, dashes and underscores are")
    held = read()
    if profile is None:
        held.pop(name, None)
    else:
        held[name] = profile
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = file.with_name(f".{file.name}.{token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write("".join(map(_section, held.items())))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _section(named: tuple[str, Profile]) -> str:
    name, profile = named
    token = f"token = {_quoted(profile.token)}\n" if profile.token else ""
    return f"[{_quoted(name)}]\nurl = {_quoted(profile.url)}\n{token}\n"


def _quoted(text: str) -> str:
    """A basic string of TOML."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    # What is no printable character is written by its number.
    return character if character.isprintable() else f"\\U{ord(character):08x}"
