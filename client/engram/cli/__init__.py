"""The `engram` command: manage buffers, upload images, draw exemplars, read decisions, tokens and the audit.

The service is named by `--url` or `ENGRAM_URL`, the token by `ENGRAM_TOKEN` (an option would show it to every process),
or both by a profile that `engram login` made (see `engram.profiles`). Results go to standard output, with `--json` as
the service said them; errors go to standard error in one line, with exit code 1.
"""

from __future__ import annotations

from typing import Annotated

import typer

from engram import __version__, display
from engram.cli import buffers, exemplars, login, operators, uploads
from engram.cli.connection import Service
from engram.http import DEFAULT_URL

app = typer.Typer(
    help="Compressed replay memory for continual learning: look after the buffers of an Engram service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for panel, part in {
    "Buffers": buffers,
    "Uploads and decisions": uploads,
    "Exemplars": exemplars,
    "Operation": operators,
    "Profiles": login,
}.items():
    for each in (*part.commands.registered_commands, *part.commands.registered_groups):
        each.rich_help_panel = panel
    app.add_typer(part.commands)


def _version(is_asked: bool) -> None:
    if is_asked:
        display.say(f"engram {__version__}")
        raise typer.Exit


@app.callback()
def _service(
    context: typer.Context,
    url: Annotated[
        str | None,
        typer.Option(help=f"The service; else ENGRAM_URL, that of the profile, or {DEFAULT_URL}."),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="A profile of `engram login`; else ENGRAM_PROFILE, or the one called default."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    context.obj = Service(url, profile)
