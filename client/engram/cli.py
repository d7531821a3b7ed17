"""This file is the `engram` command: buffers, uploads, draws and decisions from a terminal.

The service is named by `--url` or `ENGRAM_URL`, the token by `ENGRAM_TOKEN` (an option would show it to every process).
Results go to standard output, errors to standard error in one line, with exit code 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, get_args

import pydantic
import typer
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from engram.batch import Batch
from engram.client import DEFAULT_URL, Client
from engram.errors import EngramError
from engram.schemas import (
    Buffer,
    Decision,
    Definition,
    Ingest,
    IngestOptions,
    Per,
    Ranking,
    Rule,
    ShareBy,
    Strategy,
    Subsampling,
    Task,
    first_fault,
)

app = typer.Typer(
    help="Compressed replay memory for continual learning: look after the buffers of an Engram service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_NAMES_SHOWN = 8
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)

BufferArgument = Annotated[str, typer.Argument(help="The buffer's name.")]
TaskArgument = Annotated[int, typer.Argument(min=0, help="The task's number.")]
IngestArgument = Annotated[str, typer.Argument(help="The id that `engram upload` printed.")]


@app.callback()
def _service(
    context: typer.Context,
    url: Annotated[
        str | None, typer.Option(envvar="ENGRAM_URL", help=f"The service; {DEFAULT_URL} if not given.")
    ] = None,
) -> None:
    context.obj = url


@app.command()
def health(context: typer.Context) -> None:
    """Say whether the service can work."""
    with _client(context) as client:
        found = client.health()
        _out().print(f"{found.status}, engram {found.version}")
        for problem in found.problems:
            _out().print(f"- {problem}", markup=False)
        for digest in found.damaged_packs:
            _out().print(f"- damaged pack {digest}")


@app.command()
def buffers(context: typer.Context) -> None:
    """List all buffers."""
    with _client(context) as client:
        table = Table("buffer", box=None)
        for heading in ("used", "limit", "exemplars", "tasks", "classes", "image", "generation"):
            table.add_column(heading, justify="right")
        for buffer in client.buffers():
            table.add_row(buffer.name, *_buffer_cells(buffer))
        _out().print(table)


def _buffer_cells(buffer: Buffer) -> tuple[str, ...]:
    shape = "-" if buffer.image_shape is None else "x".join(map(str, buffer.image_shape))
    counts = (buffer.exemplars, len(buffer.tasks), len(buffer.classes))
    return (
        f"{buffer.used_bytes:,} B",
        f"{buffer.limit_bytes:,} B",
        *(f"{count:,}" for count in counts),
        shape,
        str(buffer.generation),
    )


@app.command()
def create(
    context: typer.Context,
    buffer: BufferArgument,
    budget: Annotated[str, typer.Option(help="Bytes, as in 500000, 1.5MB or 64KiB.")],
    per: Annotated[Per, typer.Option(help="Whether the budget is of the whole buffer or of each class.")] = "buffer",
    share_by: Annotated[ShareBy, typer.Option(help="Who gets equal shares: classes or tasks.")] = "class",
    subsampling: Annotated[Subsampling, typer.Option(help="Chroma subsampling of all exemplars.")] = "4:2:0",
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Fix the JPEG quality of all exemplars; else it is selected.")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="NAME=TYPE of what exemplars have, as in 'logits=float16 [100]'; again.")
    ] = None,
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Be content with an equal buffer.")] = False,
) -> None:
    """Create a buffer."""
    with _client(context) as client:
        made = client.create_buffer(
            buffer,
            budget_bytes=_bytes(budget),
            per=per,
            share_by=share_by,
            subsampling=subsampling,
            quality=quality,
            fields=_declared(field or []),
            exist_ok=exist_ok,
        )
        each = " for each class" if made.per == "class" else ""
        _out().print(f"buffer {made.name}: {made.budget_bytes:,} bytes{each}, shared by {made.share_by}")


def _declared(fields: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in fields]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"fields are declared as NAME=TYPE, as in 'logits=float16 [100]', not {fields}")
    return {name.strip(): type_text for name, _, type_text in pairs}


@app.command()
def show(context: typer.Context, buffer: BufferArgument) -> None:
    """Show a buffer and its tasks."""
    with _client(context) as client:
        found = client.buffer(buffer)
        used = 100 * found.used_bytes / max(1, found.limit_bytes)
        each = " for each class" if found.per == "class" else ""
        _out().print(f"[bold]{found.name}[/bold]  generation {found.generation}, images {_buffer_cells(found)[5]}")
        _out().print(f"used {found.used_bytes:,} of {found.limit_bytes:,} bytes ({used:.1f} %)")
        _out().print(f"budget {found.budget_bytes:,} bytes{each}, shared by {found.share_by}, {found.subsampling}")
        _out().print("no exemplars yet" if found.quality is None else f"quality {found.quality}, {found.quality_is}")
        if found.is_frozen:
            _out().print("frozen: a snapshot that takes no change")
        for name, type_text in found.fields.items():
            _out().print(f"field {name}: {type_text}", markup=False)
        table = Table(box=None)
        for heading in ("task", "exemplars", "bytes", "classes"):
            table.add_column(heading, justify="right")
        if found.class_names:
            table.add_column("names")
        for number in found.tasks:
            task = client.task(buffer, number)
            numbers = (task.task, task.exemplars, task.bytes, len(task.classes))
            table.add_row(*(f"{value:,}" for value in numbers), *([_names_of(task)] if found.class_names else []))
        _out().print(table)


def _names_of(task: Task) -> str:
    """The classes of a task as a cell: their names, the ids of those that have none."""
    shown = [row.name or str(row.class_id) for row in task.classes[:_NAMES_SHOWN]]
    more = len(task.classes) - len(shown)
    return escape(", ".join(shown) + (f" and {more:,} more" if more else ""))


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
    wait: Annotated[bool, typer.Option(help="Wait until the exemplars are stored.")] = True,
) -> None:
    """Upload the images of a task and wait until its exemplars are stored."""
    with _client(context) as client:
        options = IngestOptions(
            ranking=ranking,
            definition=definition,
            rule=rule,
            epsilon=epsilon,
            extractor=extractor,
            seed=seed,
        )
        if path.is_dir():
            shape = None if resize is None else _size(resize)
            ingest = client.upload_folder(buffer, task, path, resize=shape, options=options)
        else:
            ingest = _send_tar(client, buffer, task, path, options)
        _out().print(f"ingest {ingest.id}: {ingest.body_bytes:,} bytes received")
        if wait:
            _follow(client, ingest)
            _print_task(client.task(buffer, task))


def _send_tar(client: Client, buffer: str, task: int, path: Path, options: IngestOptions) -> Ingest:
    with _progress() as bar:
        sending = bar.add_task("sending, bytes", total=path.stat().st_size)
        return client.upload_tar(
            buffer, task, path, options=options, progress=lambda sent: bar.update(sending, completed=sent)
        )


def _follow(client: Client, ingest: Ingest) -> Ingest:
    """Wait for an ingest with a progress bar on standard error."""
    with _progress() as bar:
        line = bar.add_task(ingest.state, total=ingest.images_total)
        done = client.wait(
            ingest,
            progress=lambda now: bar.update(
                line, description=now.state, completed=now.images_done, total=now.images_total
            ),
        )
    _out().print(f"committed as generation {done.generation}")
    return done


@app.command(name="task")
def show_task(context: typer.Context, buffer: BufferArgument, task: TaskArgument) -> None:
    """Show a task: its classes, and why it has its quality."""
    with _client(context) as client:
        _print_task(client.task(buffer, task))


def _print_task(task: Task) -> None:
    _out().print(
        f"[bold]{task.buffer}[/bold] task {task.task}: {task.exemplars:,} exemplars, "
        f"{task.bytes:,} bytes, quality {task.quality}"
    )
    table = Table(box=None)
    for heading in ("class", "seen", "exemplars", "bytes", "share"):
        table.add_column(heading, justify="right")
    is_named = any(row.name is not None for row in task.classes)
    if is_named:
        table.add_column("name")
    for row in task.classes:
        numbers = (row.class_id, row.seen, row.exemplars, row.bytes, row.share_bytes)
        table.add_row(*(f"{value:,}" for value in numbers), *([escape(row.name or "-")] if is_named else []))
    _out().print(table)
    if task.decision is not None:
        _print_decision(task.decision)


def _print_decision(decision: Decision) -> None:
    _out().print(
        f"\n{decision.reason}\n{decision.images:,} images ranked by {decision.ranking} on {decision.embedder[:16]}, "
        f"blocks of {decision.block}, {decision.seconds:.1f} s",
        markup=False,
    )
    table = Table(box=None)
    definitions = get_args(Definition)
    for heading in ("quality", "N", "bytes", *(f"R {name}" for name in definitions), "R of pixels", "passes", ""):
        table.add_column(heading, justify="right")
    for candidate in decision.candidates:
        ratios = [candidate.ratio.get(name) for name in definitions]
        ratios.append((candidate.pixel_ratio or {}).get(decision.definition))
        table.add_row(
            str(candidate.quality),
            f"{candidate.exemplars:,}",
            f"{candidate.bytes:,}",
            *("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
            "yes" if candidate.passes else "no",
            "<- chosen" if candidate.quality == decision.quality else "",
        )
    if decision.candidates:
        _out().print(table)


@app.command()
def ingest(
    context: typer.Context,
    ingest: IngestArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is committed.")] = False,
) -> None:
    """Show an ingest, or wait for it."""
    with _client(context) as client:
        found = client.ingest(ingest)
        if wait:
            found = _follow(client, found)
        _out().print(
            f"ingest {found.id} of {found.buffer} task {found.task}: {found.state}, "
            f"{found.images_done:,} of {found.images_total:,} images, attempt {found.attempts}"
        )
        if found.problem is not None:
            _out().print(str(found.problem.get("detail", "")), markup=False)


@app.command()
def cancel(context: typer.Context, ingest: IngestArgument) -> None:
    """Cancel an ingest that has not committed."""
    with _client(context) as client:
        found = client.cancel(ingest)
        _out().print(f"ingest {found.id}: {found.state}")


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
        _out().print(f"{len(batch)} images of {len(set(batch.class_ids.tolist()))} classes in {out}")


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
        _out().print(f"{size:,} bytes in {file}")


@app.command()
def fork(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="The buffer to begin with.")],
    name: Annotated[str, typer.Argument(help="The new buffer's name.")],
    budget: Annotated[str | None, typer.Option(help="Bytes of the new buffer; the source's if not given.")] = None,
    generation: Annotated[int | None, typer.Option(min=0, help="The one that the source must be at.")] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="Make a snapshot, which takes no change.")] = False,
) -> None:
    """Make a buffer that begins with the content of another one and shares its packs."""
    with _client(context) as client:
        budget_bytes = None if budget is None else _bytes(budget)
        made = client.fork(source, name, generation=generation, budget_bytes=budget_bytes, frozen=frozen)
        kind = "snapshot" if made.is_frozen else "buffer"
        _out().print(f"{kind} {made.name}: generation {made.generation} of {source}, {made.exemplars:,} exemplars")


@app.command()
def rename(
    context: typer.Context,
    buffer: BufferArgument,
    names: Annotated[list[str], typer.Argument(help="ID=NAME, as often as you like.")],
) -> None:
    """Name classes by their ids."""
    with _client(context) as client:
        made = client.rename_classes(buffer, dict(map(_id_and_name, names)))
        for class_id, name in made.class_names.items():
            _out().print(f"{class_id}: {name}", markup=False)


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
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
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
        _out().print(f"{what} is deleted")


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
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove the exemplars of a class, those with a key, or one of them."""
    if not yes:
        typer.confirm(f"Remove these exemplars of buffer {buffer}?", abort=True)
    with _client(context) as client:
        found = client.remove(buffer, task=task, class_id=class_id, key=key, exemplar=_exemplar(pack, row))
        _out().print(f"buffer {buffer} holds {found.exemplars:,} exemplars as generation {found.generation}")


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
) -> None:
    """Move the exemplars of a class, those with a key, or one of them to another class."""
    with _client(context) as client:
        exemplar = _exemplar(pack, row)
        found = client.relabel(buffer, to, task=task, class_id=class_id, key=key, exemplar=exemplar)
        _out().print(f"buffer {buffer} holds {found.exemplars:,} exemplars as generation {found.generation}")


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
        _fail(first_fault(error))
    except (EngramError, ValueError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"error: {message}", markup=False, highlight=False)
    raise typer.Exit(1)


def _out() -> Console:
    """Made for each use, so that standard output is the one of now."""
    return Console(highlight=False, soft_wrap=True)


def _progress() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _bytes(text: str) -> int:
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an amount of bytes like 500000, 1.5MB or 64KiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise ValueError(f"{text!r} is not HEIGHTxWIDTH, like 32x32")
    return int(match[1]), int(match[2])
