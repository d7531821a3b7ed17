"""Commands on buffers: make, list, show, resize, fork, name classes, delete."""

from __future__ import annotations

from typing import Annotated

import typer

from engram import amounts, display
from engram.cli.connection import BufferArgument, JsonOption, YesOption, client_of
from engram.schemas import Per, ShareBy, Subsampling

commands = typer.Typer()


@commands.command()
def buffers(context: typer.Context, as_json: JsonOption = False) -> None:
    """List all buffers."""
    with client_of(context) as client:
        found = client.buffers()
        display.as_json(found) if as_json else display.buffers(found)


@commands.command()
def create(
    context: typer.Context,
    buffer: BufferArgument,
    budget: Annotated[str, typer.Option(help="Bytes, as in 500000, 1.5MB or 64KiB.")],
    per: Annotated[Per, typer.Option(help="Whether the budget is of the whole buffer or of each class.")] = "buffer",
    share_by: Annotated[
        ShareBy, typer.Option(help="Who gets equal shares: classes, tasks, or none: what is stored stays.")
    ] = "class",
    subsampling: Annotated[Subsampling, typer.Option(help="Chroma subsampling of all exemplars.")] = "4:2:0",
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Fix the JPEG quality of all exemplars; else it is selected.")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="NAME=TYPE of what exemplars have, as in 'logits=float16 [100]'; again.")
    ] = None,
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Be content with an equal buffer.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Create a buffer."""
    with client_of(context) as client:
        made = client.create_buffer(
            buffer,
            budget_bytes=amounts.parse(budget),
            per=per,
            share_by=share_by,
            subsampling=subsampling,
            quality=quality,
            fields=_declared(field or []),
            exist_ok=exist_ok,
        )
        display.as_json(made) if as_json else display.say(f"buffer {made.name}: {display.budget(made)}")


@commands.command(name="budget")
def change_budget(
    context: typer.Context,
    buffer: BufferArgument,
    budget: Annotated[str, typer.Argument(help="Bytes, as in 500000, 1.5MB or 64KiB.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would leave.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Give a buffer another budget; a smaller one drops what was ranked last."""
    with client_of(context) as client:
        budget_bytes = amounts.parse(budget)
        if dry_run:
            then = client.forecast(buffer, budget_bytes=budget_bytes)
            display.as_json(then) if as_json else display.forecast(then)
            return
        found = client.change_budget(buffer, budget_bytes)
        if as_json:
            display.as_json(found)
        else:
            display.say(f"buffer {found.name}: {display.budget(found)}, {found.exemplars:,} exemplars kept")


@commands.command()
def forecast(
    context: typer.Context,
    buffer: BufferArgument,
    budget: Annotated[str | None, typer.Option(help="Bytes, as in 500000 or 1.5MB; else the budget of now.")] = None,
    new_classes: Annotated[int, typer.Option(min=0, help="How many classes more have come then.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Say what another budget, or more classes, would leave; nothing is changed."""
    with client_of(context) as client:
        budget_bytes = None if budget is None else amounts.parse(budget)
        found = client.forecast(buffer, budget_bytes=budget_bytes, new_classes=new_classes)
        display.as_json(found) if as_json else display.forecast(found)


def _declared(fields: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in fields]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"fields are declared as NAME=TYPE, as in 'logits=float16 [100]', not {fields}")
    return {name.strip(): type_text for name, _, type_text in pairs}


@commands.command()
def show(context: typer.Context, buffer: BufferArgument, as_json: JsonOption = False) -> None:
    """Show a buffer and its tasks."""
    with client_of(context) as client:
        found = client.buffer(buffer)
        if as_json:
            display.as_json(found)
        else:
            display.buffer(found, [client.task(buffer, number) for number in found.tasks])


@commands.command()
def fork(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="The buffer to begin with.")],
    name: Annotated[str, typer.Argument(help="The new buffer's name.")],
    budget: Annotated[str | None, typer.Option(help="Bytes of the new buffer; the source's if not given.")] = None,
    generation: Annotated[int | None, typer.Option(min=0, help="The one that the source must be at.")] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="Make a snapshot, which takes no change.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a buffer that begins with the content of another one and shares its packs."""
    with client_of(context) as client:
        budget_bytes = None if budget is None else amounts.parse(budget)
        made = client.fork(source, name, generation=generation, budget_bytes=budget_bytes, frozen=frozen)
        kind = "snapshot" if made.is_frozen else "buffer"
        text = f"{kind} {made.name}: generation {made.generation} of {source}, {made.exemplars:,} exemplars"
        display.as_json(made) if as_json else display.say(text)


@commands.command()
def snapshots(
    context: typer.Context,
    buffer: Annotated[str | None, typer.Argument(help="Only those of this buffer.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List snapshots: the buffers that are frozen, which `engram fork --frozen` makes."""
    with client_of(context) as client:
        frozen = [each for each in client.buffers() if each.is_frozen]
        found = [each for each in frozen if buffer is None or each.forked_from == buffer]
        display.as_json(found) if as_json else display.buffers(found)


@commands.command()
def rename(
    context: typer.Context,
    buffer: BufferArgument,
    names: Annotated[list[str], typer.Argument(help="ID=NAME, as often as you like.")],
    as_json: JsonOption = False,
) -> None:
    """Name classes by their ids."""
    with client_of(context) as client:
        made = client.rename_classes(buffer, dict(map(_id_and_name, names)))
        text = "\n".join(f"{class_id}: {name}" for class_id, name in made.class_names.items())
        display.as_json(made) if as_json else display.say(text)


def _id_and_name(text: str) -> tuple[int, str]:
    class_id, equals, name = text.partition("=")
    if not equals or not (class_id.isascii() and class_id.isdigit()):
        raise ValueError(f"{text!r} is not ID=NAME, like 3=cat")
    return int(class_id), name


@commands.command()
def delete(
    context: typer.Context,
    buffer: BufferArgument,
    task: Annotated[int | None, typer.Option(min=0, help="Delete this task only.")] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Delete a buffer, or one of its tasks."""
    what = f"buffer {buffer}" if task is None else f"task {task} of buffer {buffer}"
    if not yes:
        typer.confirm(f"Delete {what} and its exemplars?", abort=True, err=as_json)
    with client_of(context) as client:
        if task is None:
            client.delete_buffer(buffer)
        else:
            client.delete_task(buffer, task)
        display.as_json({"deleted": {"buffer": buffer, "task": task}}) if as_json else display.say(f"{what} is deleted")
