"""Commands on uploads: send images, follow, cancel and retry what becomes of them, read what was decided."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from engram import amounts, display, folder
from engram.cli.connection import BufferArgument, CountOption, IngestArgument, JsonOption, TaskArgument, client_of
from engram.client import Client
from engram.schemas import Definition, Ingest, IngestOptions, Ranking, Rule

commands = typer.Typer()


@commands.command()
def upload(
    context: typer.Context,
    buffer: BufferArgument,
    task: TaskArgument,
    path: Annotated[Path, typer.Argument(exists=True, help="A folder of class folders, or a WebDataset tar.")],
    ranking: Annotated[Ranking, typer.Option(help="How exemplars are ranked within a class.")] = "herding",
    definition: Annotated[Definition, typer.Option(help="How R, the ratio of volumes, is defined.")] = "raw",
    rule: Annotated[Rule, typer.Option(help="Which candidates must pass.")] = "any",
    epsilon: Annotated[float, typer.Option(help="How far R may be from 1.")] = 0.3,
    extractor: Annotated[str | None, typer.Option(help="SHA-256 of a registered extractor.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random in the selection.")] = 0,
    resize: Annotated[str | None, typer.Option(help="Bring a folder's images to HEIGHTxWIDTH.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Add the images even if they were uploaded before.")] = False,
    wait: Annotated[bool, typer.Option(help="Wait until the exemplars are stored.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Upload the images of a task and wait until its exemplars are stored.

    The same images uploaded to the same task once more, with the same options, are the same upload: nothing is doubled.
    """
    with client_of(context) as client:
        options = IngestOptions(
            ranking=ranking,
            definition=definition,
            rule=rule,
            epsilon=epsilon,
            extractor=extractor,
            seed=seed,
        )
        shape = None if resize is None else _size(resize)
        key = None if again else _content_key(path, shape, task, options)
        if path.is_dir():
            ingest = client.upload_folder(buffer, task, path, resize=shape, options=options, idempotency_key=key)
        else:
            ingest = _send_tar(client, buffer, task, path, options, key)
        if ingest.state == "committed":
            typer.echo(f"these images were uploaded before, as ingest {ingest.id}; --again adds them again", err=True)
        elif not as_json:
            display.say(f"ingest {ingest.id}: {ingest.body_bytes:,} bytes received")
        if wait:
            ingest = _follow(client, ingest)
        if as_json:
            display.as_json(ingest)
        elif wait:
            display.say(f"committed as generation {ingest.generation}")
            display.task(client.task(buffer, task))


def _content_key(path: Path, resize: tuple[int, int] | None, task: int, options: IngestOptions) -> str:
    """The idempotency key of these images for this task, whenever and wherever they are uploaded."""
    digest = hashlib.sha256(json.dumps([task, resize, options.model_dump(mode="json")]).encode())
    if path.is_dir():
        for file in folder.images(path):
            content = hashlib.sha256(file.path.read_bytes()).hexdigest()
            digest.update(json.dumps([file.name, file.class_id, content]).encode())
    else:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"content-{digest.hexdigest()}"


def _send_tar(client: Client, buffer: str, task: int, path: Path, options: IngestOptions, key: str | None) -> Ingest:
    with display.progress() as bar:
        sending = bar.add_task("sending, bytes", total=path.stat().st_size)
        return client.upload_tar(
            buffer,
            task,
            path,
            options=options,
            idempotency_key=key,
            progress=lambda sent: bar.update(sending, completed=sent),
        )


def _follow(client: Client, ingest: Ingest) -> Ingest:
    """The ingest once it is committed, with a progress bar on standard error."""
    with display.progress() as bar:
        line = bar.add_task(ingest.state, total=ingest.images_total)
        return client.wait(
            ingest,
            progress=lambda now: bar.update(
                line, description=now.state, completed=now.images_done, total=now.images_total
            ),
        )


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise ValueError(f"{text!r} is not HEIGHTxWIDTH, like 32x32")
    return int(match[1]), int(match[2])


@commands.command(name="task")
def show_task(context: typer.Context, buffer: BufferArgument, task: TaskArgument, as_json: JsonOption = False) -> None:
    """Show a task: its classes, and why it has its quality."""
    with client_of(context) as client:
        found = client.task(buffer, task)
        display.as_json(found) if as_json else display.task(found)


@commands.command()
def decision(
    context: typer.Context,
    buffer: BufferArgument,
    task: TaskArgument,
    definition: Annotated[Definition | None, typer.Option(help="How R, the ratio of volumes, is defined.")] = None,
    rule: Annotated[Rule | None, typer.Option(help="Which candidates must pass.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="How far R may be from 1.")] = None,
    budget: Annotated[str | None, typer.Option(help="Bytes of the buffer, as in 500000 or 1.5MB.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what selection would choose for a task; without options, as things are."""
    with client_of(context) as client:
        budget_bytes = None if budget is None else amounts.parse(budget)
        found = client.decision(
            buffer, task, definition=definition, rule=rule, epsilon=epsilon, budget_bytes=budget_bytes
        )
        display.as_json(found) if as_json else display.what_if(found)


@commands.command()
def ingest(
    context: typer.Context,
    ingest: IngestArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is committed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show an ingest, or wait for it."""
    with client_of(context) as client:
        found = client.ingest(ingest)
        if wait:
            found = _follow(client, found)
        display.as_json(found) if as_json else display.ingest(found)


@commands.command()
def ingests(
    context: typer.Context,
    buffer: Annotated[str | None, typer.Argument(help="Only those of this buffer.")] = None,
    count: CountOption = 20,
    as_json: JsonOption = False,
) -> None:
    """List ingests, the newest first."""
    with client_of(context) as client:
        found = list(islice(client.ingests(buffer), count))
        display.as_json(found) if as_json else display.ingests(found)


@commands.command()
def cancel(context: typer.Context, ingest: IngestArgument, as_json: JsonOption = False) -> None:
    """Cancel an ingest that has not committed."""
    with client_of(context) as client:
        found = client.cancel(ingest)
        display.as_json(found) if as_json else display.say(f"ingest {found.id}: {found.state}")


@commands.command()
def retry(
    context: typer.Context,
    ingest: IngestArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is committed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Try an ingest again that failed or was cancelled, from the upload that the service has kept of it."""
    with client_of(context) as client:
        found = client.retry(ingest)
        if wait:
            found = _follow(client, found)
        display.as_json(found) if as_json else display.say(f"ingest {found.id}: {found.state}")
