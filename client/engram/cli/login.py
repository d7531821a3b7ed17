"""Commands on profiles: log in to a service once, and name it by its profile from then on."""

from __future__ import annotations

import getpass
import sys
from typing import Annotated

import typer

from engram import display, profiles
from engram.cli.connection import JsonOption, Service, failing
from engram.client import Client
from engram.http import DEFAULT_URL

commands = typer.Typer()

ProfileOption = Annotated[
    str | None, typer.Option("--profile", help=f"The name; that of the options before, or {profiles.DEFAULT!r}.")
]


@commands.command()
def login(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="The service.")] = DEFAULT_URL,
    profile: ProfileOption = None,
    check: Annotated[bool, typer.Option(help="Ask the service whose token it is, before it is kept.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Keep a service and its token in a profile. The token is asked for, or read from standard input."""
    with failing():
        name = _name(context, profile)
        token = _asked(url)
        text = "not checked"
        if check:
            with Client(url, token=token) as client:
                found = client.whoami()
            text = display.who(found)
        profiles.write(name, profiles.Profile(url, token))
        said = {"profile": name, "url": url, "file": str(profiles.path())}
        display.as_json(said) if as_json else display.say(f"profile {name}: {url}, {text}")


@commands.command()
def logout(context: typer.Context, profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """Forget a profile. Its token stays good until it is revoked."""
    with failing():
        name = _name(context, profile)
        if name not in profiles.read():
            raise ValueError(f"there is no profile {name!r} in {profiles.path()}")
        profiles.write(name, None)
        display.as_json({"profile": name}) if as_json else display.say(f"profile {name} is forgotten")


@commands.command(name="profiles")
def list_profiles(as_json: JsonOption = False) -> None:
    """List the profiles and their services; never their tokens."""
    with failing():
        found = {name: profile.url for name, profile in profiles.read().items()}
        if as_json:
            display.as_json(found)
        for name, url in ({} if as_json else found).items():
            display.say(f"{name}  {url}")


def _name(context: typer.Context, profile: str | None) -> str:
    service: Service = context.obj
    return profiles.chosen(profile or service.profile)


def _asked(url: str) -> str:
    """The token, which is not shown."""
    if sys.stdin.isatty():
        return getpass.getpass(f"Token for {url}: ").strip()
    return sys.stdin.readline().strip()
