"""The `engram` command: manage buffers, upload images, draw exemplars and read decisions from a terminal.

The service is named by `--url` or `ENGRAM_URL`, the token by `ENGRAM_TOKEN` (an option would show it to every process).
Results go to standard output, with `--json` as the service said them; errors go to standard error in one line, with
exit code 1.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated

import pydantic
import typer
from PIL import Image

from engram import __version__, amounts, display, folder
from engram.batch import Batch
from engram.client import Client
from engram.errors import EngramError
from engram.http import DEFAULT_URL
from engram.schemas import (
    Definition,
    Ingest,
    IngestOptions,
    Per,
    Ranking,
    Rule,
    ShareBy,
    Strategy,
    Subsampling,
    first_fault,
)

app = typer.Typer(
    help="Compressed replay memory for continual learning: look after the buffers of an Engram service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

BufferArgument = Annotated[str, typer.Argument(help="The buffer's name.")]
TaskArgument = Annotated[int, typer.Argument(min=0, help="The task's number.")]
IngestArgument = Annotated[str, typer.Argument(help="The id that `engram upload` printed.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print what the service says, as JSON.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def _version(is_asked: bool) -> None:
    if is_asked:
        display.say(f"engram {__version__}")
        raise typer.Exit


@app.callback()
def _service(
    context: typer.Context,
    url: Annotated[
        str | None, typer.Option(envvar="ENGRAM_URL", help=f"The service; {DEFAULT_URL} if not given.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    context.obj = url


@app.command()
def health(context: typer.Context, as_json: JsonOption = False) -> None:
    """Say whether the service can work."""
    with _client(context) as client:
        found = client.health()
        display.as_json(found) if as_json else display.health(found)


@app.command()
def buffers(context: typer.Context, as_json: JsonOption = False) -> None:
    """List all buffers."""
    with _client(context) as client:
        found = client.buffers()
        display.as_json(found) if as_json else display.buffers(found)


@app.command()
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
    with _client(context) as client:
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


@app.command(name="budget")
def change_budget(
    context: typer.Context,
    buffer: BufferArgument,
    budget: Annotated[str, typer.Argument(help="Bytes, as in 500000, 1.5MB or 64KiB.")],
    as_json: JsonOption = False,
) -> None:
    """Give a buffer another budget; a smaller one drops what was ranked last."""
    with _client(context) as client:
        found = client.change_budget(buffer, amounts.parse(budget))
        if as_json:
            display.as_json(found)
        else:
            display.say(f"buffer {found.name}: {display.budget(found)}, {found.exemplars:,} exemplars kept")


def _declared(fields: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in fields]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"fields are declared as NAME=TYPE, as in 'logits=float16 [100]', not {fields}")
    return {name.strip(): type_text for name, _, type_text in pairs}


@app.command()
def show(context: typer.Context, buffer: BufferArgument, as_json: JsonOption = False) -> None:
    """Show a buffer and its tasks."""
    with _client(context) as client:
        found = client.buffer(buffer)
        if as_json:
            display.as_json(found)
        else:
            display.buffer(found, [client.task(buffer, number) for number in found.tasks])


@app.command()
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
    with _client(context) as client:
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


@app.command(name="task")
def show_task(context: typer.Context, buffer: BufferArgument, task: TaskArgument, as_json: JsonOption = False) -> None:
    """Show a task: its classes, and why it has its quality."""
    with _client(context) as client:
        found = client.task(buffer, task)
        display.as_json(found) if as_json else display.task(found)


@app.command()
def ingest(
    context: typer.Context,
    ingest: IngestArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is committed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show an ingest, or wait for it."""
    with _client(context) as client:
        found = client.ingest(ingest)
        if wait:
            found = _follow(client, found)
        display.as_json(found) if as_json else display.ingest(found)


@app.command()
def ingests(
    context: typer.Context,
    buffer: Annotated[str | None, typer.Argument(help="Only those of this buffer.")] = None,
    count: Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List ingests, the newest first."""
    with _client(context) as client:
        found = list(islice(client.ingests(buffer), count))
        display.as_json(found) if as_json else display.ingests(found)


@app.command()
def cancel(context: typer.Context, ingest: IngestArgument, as_json: JsonOption = False) -> None:
    """Cancel an ingest that has not committed."""
    with _client(context) as client:
        found = client.cancel(ingest)
        display.as_json(found) if as_json else display.say(f"ingest {found.id}: {found.state}")


@app.command()
def extractors(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the registered extractors."""
    with _client(context) as client:
        found = client.extractors()
        display.as_json(found) if as_json else display.extractors(found)


@app.command()
def draw(
    context: typer.Context,
    buffer: BufferArgument,
    out: Annotated[Path, typer.Option(help="The folder that the images are written to, as PNG.")],
    size: Annotated[int, typer.Option(min=1, help="How many exemplars.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    step: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    strategy: Annotated[Strategy, typer.Option(help="How exemplars are drawn.")] = "uniform",
) -> None:
    """Draw exemplars and write them as pictures `TASK-CLASS-ROW.png`."""
    with _client(context) as client:
        batch = client.draw(buffer, size, seed=seed, step=step, strategy=strategy)
        out.mkdir(parents=True, exist_ok=True)
        for name, index in _names(batch):
            pixels = batch.images[index]
            Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(out / f"{name}.png")
        display.say(f"{len(batch)} images of {len(set(batch.class_ids.tolist()))} classes in {out}")


def _names(batch: Batch) -> Iterator[tuple[str, int]]:
    rows = zip(batch.tasks.tolist(), batch.class_ids.tolist(), batch.rows.tolist(), strict=True)
    for index, (task, class_id, row) in enumerate(rows):
        yield f"{task:03d}-{class_id:04d}-{row:06d}", index


@app.command()
def export(
    context: typer.Context,
    buffer: BufferArgument,
    file: Annotated[Path, typer.Argument(help="The tar to write.")],
) -> None:
    """Write all exemplars to a WebDataset tar of JPEG files."""
    with _client(context) as client:
        size = client.export(buffer, file)
        display.say(f"{size:,} bytes in {file}")


@app.command()
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
    with _client(context) as client:
        budget_bytes = None if budget is None else amounts.parse(budget)
        made = client.fork(source, name, generation=generation, budget_bytes=budget_bytes, frozen=frozen)
        kind = "snapshot" if made.is_frozen else "buffer"
        text = f"{kind} {made.name}: generation {made.generation} of {source}, {made.exemplars:,} exemplars"
        display.as_json(made) if as_json else display.say(text)


@app.command()
def rename(
    context: typer.Context,
    buffer: BufferArgument,
    names: Annotated[list[str], typer.Argument(help="ID=NAME, as often as you like.")],
    as_json: JsonOption = False,
) -> None:
    """Name classes by their ids."""
    with _client(context) as client:
        made = client.rename_classes(buffer, dict(map(_id_and_name, names)))
        text = "\n".join(f"{class_id}: {name}" for class_id, name in made.class_names.items())
        display.as_json(made) if as_json else display.say(text)


def _id_and_name(text: str) -> tuple[int, str]:
    class_id, equals, name = text.partition("=")
    if not equals or not (class_id.isascii() and class_id.isdigit()):
        raise ValueError(f"{text!r} is not ID=NAME, like 3=cat")
    return int(class_id), name


@app.command()
def delete(
    context: typer.Context,
    buffer: BufferArgument,
    task: Annotated[int | None, typer.Option(min=0, help="Delete this task only.")] = None,
    yes: YesOption = False,
) -> None:
    """Delete a buffer, or one of its tasks."""
    what = f"buffer {buffer}" if task is None else f"task {task} of buffer {buffer}"
    if not yes:
        typer.confirm(f"Delete {what} and its exemplars?", abort=True)
    with _client(context) as client:
        if task is None:
            client.delete_buffer(buffer)
        else:
            client.delete_task(buffer, task)
        display.say(f"{what} is deleted")


TaskOption = Annotated[int | None, typer.Option("--task", min=0, help="Only those of this task.")]
ClassOption = Annotated[int | None, typer.Option("--class", min=0, help="Those of this class.")]
KeyOption = Annotated[str | None, typer.Option("--key", help="Those with this value of the field `key`.")]
PackOption = Annotated[str | None, typer.Option("--pack", help="One exemplar: the pack it is in.")]
RowOption = Annotated[int | None, typer.Option("--row", min=0, help="One exemplar: its row in the pack.")]


@app.command()
def remove(
    context: typer.Context,
    buffer: BufferArgument,
    task: TaskOption = None,
    class_id: ClassOption = None,
    key: KeyOption = None,
    pack: PackOption = None,
    row: RowOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove the exemplars of a class, those with a key, or one of them."""
    if not yes:
        typer.confirm(f"Remove these exemplars of buffer {buffer}?", abort=True)
    with _client(context) as client:
        found = client.remove(buffer, task=task, class_id=class_id, key=key, exemplar=_exemplar(pack, row))
        text = f"buffer {buffer} holds {found.exemplars:,} exemplars as generation {found.generation}"
        display.as_json(found) if as_json else display.say(text)


@app.command()
def relabel(
    context: typer.Context,
    buffer: BufferArgument,
    to: Annotated[int, typer.Argument(min=0, help="The class id that the exemplars get.")],
    task: TaskOption = None,
    class_id: ClassOption = None,
    key: KeyOption = None,
    pack: PackOption = None,
    row: RowOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move the exemplars of a class, those with a key, or one of them to another class."""
    with _client(context) as client:
        exemplar = _exemplar(pack, row)
        found = client.relabel(buffer, to, task=task, class_id=class_id, key=key, exemplar=exemplar)
        text = f"buffer {buffer} holds {found.exemplars:,} exemplars as generation {found.generation}"
        display.as_json(found) if as_json else display.say(text)


def _exemplar(pack: str | None, row: int | None) -> tuple[str, int] | None:
    if pack is None and row is None:
        return None
    if pack is None or row is None:
        raise ValueError("one exemplar is named by --pack and --row together")
    return pack, row


@contextmanager
def _client(context: typer.Context) -> Iterator[Client]:
    """A client for one command. What can go wrong becomes one line and exit code 1."""
    try:
        with Client(context.obj) as client:
            yield client
    except pydantic.ValidationError as error:
        display.fail(first_fault(error))
    except (EngramError, ValueError, OSError) as error:
        display.fail(str(error))


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise ValueError(f"{text!r} is not HEIGHTxWIDTH, like 32x32")
    return int(match[1]), int(match[2])
