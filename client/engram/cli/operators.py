"""Commands of operators: health, disk, extractors, tokens, the audit, what was drawn."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from engram import amounts, display
from engram.cli.connection import CountOption, JsonOption, YesOption, client_of
from engram.oversight import TokenScope

commands = typer.Typer()
token = typer.Typer(help="Make, list and revoke tokens.", no_args_is_help=True)
commands.add_typer(token, name="token")


@commands.command()
def health(context: typer.Context, as_json: JsonOption = False) -> None:
    """Say whether the service can work."""
    with client_of(context) as client:
        found = client.health()
        display.as_json(found) if as_json else display.health(found)


@commands.command()
def extractors(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the registered extractors."""
    with client_of(context) as client:
        found = client.extractors()
        display.as_json(found) if as_json else display.extractors(found)


@commands.command()
def disk(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show what the service takes on its disk."""
    with client_of(context) as client:
        found = client.disk()
        display.as_json(found) if as_json else display.disk(found)


@commands.command()
def whoami(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show whose token is used, and what it allows."""
    with client_of(context) as client:
        found = client.whoami()
        display.as_json(found) if as_json else display.say(display.who(found))


@commands.command()
def audit(
    context: typer.Context,
    buffer: Annotated[str | None, typer.Option(help="Only what was done to this buffer.")] = None,
    who: Annotated[str | None, typer.Option(help="Only what was done with the token of this name.")] = None,
    action: Annotated[
        str | None, typer.Option(help="Only this, as in exemplars.remove, or all of its kind: exemplars.")
    ] = None,
    count: CountOption = 20,
    as_json: JsonOption = False,
) -> None:
    """List changes: who made them, to what; --json tells what was there before and after."""
    with client_of(context) as client:
        entries = client.audit(buffer=buffer, who=who, action=action, page_size=min(count, 500))
        found = list(islice(entries, count))
        display.as_json(found) if as_json else display.audit(found)


@commands.command()
def draws(
    context: typer.Context,
    buffer: Annotated[str | None, typer.Argument(help="Only from this buffer.")] = None,
    who: Annotated[str | None, typer.Option(help="Only with the token of this name.")] = None,
    task: Annotated[int | None, typer.Option(min=0, help="Only of this task.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List what draws have served of each class of each task, and to whom."""
    with client_of(context) as client:
        found = list(client.draws(buffer=buffer, who=who, task=task))
        display.as_json(found) if as_json else display.draws(found)


@token.command(name="create")
def create_token(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Of whoever will use it, for the audit.")],
    scope: Annotated[TokenScope, typer.Option(help="What it allows, each including those before.")] = "read",
    prefix: Annotated[str, typer.Option(help="Only for buffers whose names begin so.")] = "",
    expires: Annotated[str | None, typer.Option(help="How long it holds, as in 12h or 30d; else for ever.")] = None,
    requests: Annotated[float | None, typer.Option(help="The most requests a second.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token. Its secret, told this once, is all that is written to standard output."""
    with client_of(context) as client:
        expires_in_s = None if expires is None else amounts.parse_s(expires)
        made = client.create_token(name, scope=scope, prefix=prefix, expires_in_s=expires_in_s, requests_per_s=requests)
        if as_json:
            display.as_json(made)
        else:
            typer.echo(f"token {made.id} of {made.name}: {display.allows(made)}. It is not told again", err=True)
            display.say(made.token)


@token.command(name="list")
def list_tokens(context: typer.Context, as_json: JsonOption = False) -> None:
    """List tokens, the newest first; their secrets nobody knows."""
    with client_of(context) as client:
        found = client.tokens()
        display.as_json(found) if as_json else display.tokens(found)


@token.command(name="revoke")
def revoke_token(
    context: typer.Context,
    token_id: Annotated[str, typer.Argument(metavar="ID", help="As `engram token list` has it.")],
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Let no request pass with a token any more, from now on."""
    if not yes:
        typer.confirm(f"Revoke token {token_id}?", abort=True, err=True)
    with client_of(context) as client:
        found = client.revoke_token(token_id)
        display.as_json(found) if as_json else display.say(f"token {found.id} of {found.name} is revoked")
