"""Commands on exemplars: list, count, draw, export, verify, remove and relabel them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from engram import amounts, display, verification
from engram.batch import Batch
from engram.cli.connection import BufferArgument, JsonOption, YesOption, client_of
from engram.schemas import Strategy

commands = typer.Typer()

TaskOption = Annotated[int | None, typer.Option("--task", min=0, help="Only those of this task.")]
ClassOption = Annotated[int | None, typer.Option("--class", min=0, help="Those of this class.")]
KeyOption = Annotated[str | None, typer.Option("--key", help="Those with this value of the field `key`.")]
PackOption = Annotated[str | None, typer.Option("--pack", help="One exemplar: the pack it is in.")]
RowOption = Annotated[int | None, typer.Option("--row", min=0, help="One exemplar: its row in the pack.")]
MinBytesOption = Annotated[str | None, typer.Option("--min-bytes", help="At least so large, as in 500 or 2kB.")]
MaxBytesOption = Annotated[str | None, typer.Option("--max-bytes", help="At most so large.")]
WhereOption = Annotated[
    list[str] | None,
    typer.Option("--where", help="A condition on a field, as in score:ge:0.5 or key:prefix:train/; again."),
]


@commands.command()
def exemplars(
    context: typer.Context,
    buffer: BufferArgument,
    task: TaskOption = None,
    class_id: ClassOption = None,
    min_bytes: MinBytesOption = None,
    max_bytes: MaxBytesOption = None,
    where: WhereOption = None,
    count: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List exemplars, by task, class and rank."""
    with client_of(context) as client:
        filters = _filters(task, class_id, min_bytes, max_bytes, where)
        found = list(islice(client.exemplars(buffer, page_size=min(count, 500), **filters), count))
        display.as_json(found) if as_json else display.exemplars(found)


@commands.command()
def histogram(
    context: typer.Context,
    buffer: BufferArgument,
    of: Annotated[str, typer.Argument(help="class, task, bytes, or the name of a field.")] = "class",
    task: TaskOption = None,
    class_id: ClassOption = None,
    min_bytes: MinBytesOption = None,
    max_bytes: MaxBytesOption = None,
    where: WhereOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count exemplars by class, task, size or the values of a field."""
    with client_of(context) as client:
        found = client.histogram(buffer, of, **_filters(task, class_id, min_bytes, max_bytes, where))
        display.as_json(found) if as_json else display.histogram(found)


def _filters(
    task: int | None, class_id: int | None, min_bytes: str | None, max_bytes: str | None, where: list[str] | None
) -> dict[str, Any]:
    return {
        "task": task,
        "class_id": class_id,
        "min_bytes": None if min_bytes is None else amounts.parse(min_bytes),
        "max_bytes": None if max_bytes is None else amounts.parse(max_bytes),
        "where": where or (),
    }


@commands.command()
def verify(
    context: typer.Context,
    buffer: Annotated[str | None, typer.Argument(help="Only this buffer.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch everything that is stored and compare every digest, checksum and count; exit code 1 if one is wrong."""
    faults: list[str] = []
    packs = exemplars = 0
    with client_of(context) as client, display.progress() as bar:
        for name in [each.name for each in client.buffers()] if buffer is None else [buffer]:
            line = bar.add_task(f"{name}, packs", total=None)
            manifest, found = verification.of_buffer(
                client,
                name,
                progress=lambda done, of, line=line: bar.update(line, completed=done, total=of),  # type: ignore[misc]
            )
            faults += found
            packs += len(manifest.packs)
            exemplars += sum(entry.exemplars for entry in manifest.packs)
    if as_json:
        display.as_json({"packs": packs, "exemplars": exemplars, "faults": faults})
    else:
        for fault in faults:
            display.say(fault)
        display.say(f"{packs:,} packs of {exemplars:,} exemplars, {len(faults):,} faults")
    if faults:
        raise typer.Exit(1)


@commands.command()
def draw(
    context: typer.Context,
    buffer: BufferArgument,
    out: Annotated[Path, typer.Option(help="The folder that the images are written to, as PNG.")],
    size: Annotated[int, typer.Option(min=1, help="How many exemplars.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    step: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    strategy: Annotated[Strategy, typer.Option(help="How exemplars are drawn.")] = "uniform",
    as_json: JsonOption = False,
) -> None:
    """Draw exemplars and write them as pictures `TASK-CLASS-ROW.png`."""
    with client_of(context) as client:
        batch = client.draw(buffer, size, seed=seed, step=step, strategy=strategy)
        out.mkdir(parents=True, exist_ok=True)
        for name, index in _names(batch):
            pixels = batch.images[index]
            Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(out / f"{name}.png")
        names = [f"{name}.png" for name, _ in _names(batch)]
        text = f"{len(batch)} images of {len(set(batch.class_ids.tolist()))} classes in {out}"
        display.as_json({"folder": str(out), "files": names}) if as_json else display.say(text)


def _names(batch: Batch) -> Iterator[tuple[str, int]]:
    rows = zip(batch.tasks.tolist(), batch.class_ids.tolist(), batch.rows.tolist(), strict=True)
    for index, (task, class_id, row) in enumerate(rows):
        yield f"{task:03d}-{class_id:04d}-{row:06d}", index


@commands.command()
def export(
    context: typer.Context,
    buffer: BufferArgument,
    file: Annotated[Path, typer.Argument(help="The tar to write.")],
    as_json: JsonOption = False,
) -> None:
    """Write all exemplars to a WebDataset tar of JPEG files."""
    with client_of(context) as client:
        size = client.export(buffer, file)
        display.as_json({"file": str(file), "bytes": size}) if as_json else display.say(f"{size:,} bytes in {file}")


@commands.command()
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
    with client_of(context) as client:
        found = client.remove(buffer, task=task, class_id=class_id, key=key, exemplar=_exemplar(pack, row))
        text = f"buffer {buffer} holds {found.exemplars:,} exemplars as generation {found.generation}"
        display.as_json(found) if as_json else display.say(text)


@commands.command()
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
    with client_of(context) as client:
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
