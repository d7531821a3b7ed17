"""What all commands have in common: the service that they talk to, their options, and how they fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import pydantic
import typer

from engram import display
from engram.client import Client
from engram.errors import EngramError, Unauthorized
from engram.schemas import first_fault

BufferArgument = Annotated[str, typer.Argument(help="The buffer's name.")]
TaskArgument = Annotated[int, typer.Argument(min=0, help="The task's number.")]
IngestArgument = Annotated[str, typer.Argument(help="The id that `engram upload` printed.")]
CountOption = Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print what the service says, as JSON.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@dataclass(frozen=True)
class Service:
    """The options before a command, which name the service."""

    url: str | None
    profile: str | None


@contextmanager
def client_of(context: typer.Context) -> Iterator[Client]:
    """A client for one command. What can go wrong becomes one line and exit code 1."""
    service: Service = context.obj
    with failing(), Client(service.url, profile=service.profile) as client:
        yield client


@contextmanager
def failing() -> Iterator[None]:
    """What goes wrong inside the block becomes one line on standard error, and exit code 1."""
    try:
        yield
    except pydantic.ValidationError as error:
        display.fail(first_fault(error))
    except Unauthorized as error:
        display.fail(f"{error}. Put one into ENGRAM_TOKEN, or keep one with `engram login`")
    except (EngramError, ValueError, OSError) as error:
        display.fail(str(error))
