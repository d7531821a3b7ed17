"""How the `engram` command shows what a service answers: tables and sentences for people, JSON for programs.

What is read from a pipe has no width: there nothing is folded and no name is cut short.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import NoReturn, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from engram.schemas import Answer, Buffer, Candidate, Decision, Definition, Extractor, Health, Ingest, Task

_NAMES_SHOWN = 8
_NO_WIDTH = 100_000


def say(text: str) -> None:
    """A line on standard output."""
    typer.echo(text)


def as_json(found: Answer | Sequence[Answer]) -> None:
    """What the service said, as it said it."""
    if isinstance(found, Answer):
        typer.echo(found.model_dump_json(indent=2))
    else:
        typer.echo(json.dumps([each.model_dump(mode="json") for each in found], indent=2, ensure_ascii=False))


def fail(message: str) -> NoReturn:
    """One line on standard error, and exit code 1."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def progress() -> Progress:
    """A bar on standard error, if that is a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def health(found: Health) -> None:
    """Whether the service can work."""
    say(f"{found.status}, engram {found.version}")
    for problem in found.problems:
        say(f"- {problem}")
    for digest in found.damaged_packs:
        say(f"- damaged pack {digest}")


def buffers(found: Sequence[Buffer]) -> None:
    """A line for each buffer."""
    table = _table("buffer", left=1)
    for heading in ("used", "limit", "exemplars", "tasks", "classes", "image", "generation"):
        table.add_column(heading, justify="right")
    for each in found:
        counts = (each.exemplars, len(each.tasks), len(each.classes))
        sizes = (f"{each.used_bytes:,} B", f"{each.limit_bytes:,} B")
        table.add_row(each.name, *sizes, *(f"{count:,}" for count in counts), _shape(each), str(each.generation))
    _print(table)


def budget(found: Buffer) -> str:
    """A buffer's budget in words."""
    each = " for each class" if found.per == "class" else ""
    return f"{found.budget_bytes:,} bytes{each}, shared by {found.share_by}"


def buffer(found: Buffer, tasks: Sequence[Task]) -> None:
    """A buffer and its tasks."""
    used = 100 * found.used_bytes / max(1, found.limit_bytes)
    say(f"{found.name}  generation {found.generation}, images {_shape(found)}")
    say(f"used {found.used_bytes:,} of {found.limit_bytes:,} bytes ({used:.1f} %)")
    say(f"budget {budget(found)}, {found.subsampling}")
    say("no exemplars yet" if found.quality is None else f"quality {found.quality}, {found.quality_is}")
    if found.is_frozen:
        say("frozen: a snapshot that takes no change")
    for name, type_text in found.fields.items():
        say(f"field {name}: {type_text}")
    table = _table("task", "exemplars", "bytes", "classes")
    if found.class_names:
        table.add_column("names")
    for task in tasks:
        numbers = (task.task, task.exemplars, task.bytes, len(task.classes))
        table.add_row(*(f"{value:,}" for value in numbers), *([_names(task)] if found.class_names else []))
    _print(table)


def task(found: Task) -> None:
    """A task with its classes, and why it has its quality."""
    say(
        f"{found.buffer} task {found.task}: {found.exemplars:,} exemplars, {found.bytes:,} bytes, "
        f"quality {found.quality}"
    )
    table = _table("class", "seen", "exemplars", "bytes", "share")
    is_named = any(row.name is not None for row in found.classes)
    if is_named:
        table.add_column("name")
    for row in found.classes:
        numbers = (row.class_id, row.seen, row.exemplars, row.bytes, row.share_bytes)
        table.add_row(*(f"{value:,}" for value in numbers), *([escape(row.name or "-")] if is_named else []))
    _print(table)
    if found.decision is not None:
        _decision(found.decision)


def ingest(found: Ingest) -> None:
    """An ingest, and what it failed with."""
    say(
        f"ingest {found.id} of {found.buffer} task {found.task}: {found.state}, "
        f"{found.images_done:,} of {found.images_total:,} images, attempt {found.attempts}"
    )
    if found.problem is not None:
        say(str(found.problem.get("detail", "")))


def ingests(found: Sequence[Ingest]) -> None:
    """A line for each ingest."""
    table = _table("ingest", "buffer", left=2)
    for heading in ("task", "state", "images", "bytes", "created"):
        table.add_column(heading, justify="right")
    for each in found:
        images = f"{each.images_done:,} of {each.images_total:,}"
        created = each.created_at.strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(each.id, each.buffer, str(each.task), each.state, images, f"{each.body_bytes:,}", created)
    _print(table)


def extractors(found: Sequence[Extractor]) -> None:
    """A line for each extractor."""
    table = _table("extractor", left=1)
    for heading in ("input", "dimensions", "bytes", "created"):
        table.add_column(heading, justify="right")
    for each in found:
        shape = "x".join("any" if side is None else str(side) for side in each.input_shape)
        created = each.created_at.strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(each.sha256, shape, str(each.dimensions), f"{each.bytes:,}", created)
    _print(table)


def _decision(decision: Decision) -> None:
    say(
        f"\n{decision.reason}\n{decision.images:,} images ranked by {decision.ranking} on {decision.embedder[:16]}, "
        f"blocks of {decision.block}, {decision.seconds:.1f} s"
    )
    definitions = get_args(Definition)
    headings = ("quality", "N", "bytes", *(f"R {name}" for name in definitions), "R of pixels", "passes", "")
    table = _table(*headings)
    for candidate in decision.candidates:
        pixels = (candidate.pixel_ratio or {}).get(decision.definition)
        ratios = [*(candidate.ratio.get(name) for name in definitions), pixels]
        table.add_row(
            str(candidate.quality),
            f"{candidate.exemplars:,}",
            f"{candidate.bytes:,}",
            *("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
            _passes(candidate, decision),
            "<- chosen" if candidate.quality == decision.quality else "",
        )
    if decision.candidates:
        _print(table)


def _passes(candidate: Candidate, decision: Decision) -> str:
    """Where nothing could be compared, nothing failed either."""
    if (candidate.pixel_ratio or candidate.ratio).get(decision.definition) is None:
        return "-"
    return "yes" if candidate.passes else "no"


def _shape(found: Buffer) -> str:
    return "-" if found.image_shape is None else "x".join(map(str, found.image_shape))


def _names(found: Task) -> str:
    """The classes of a task as a cell: their names, the ids of those that have none."""
    shown = [row.name or str(row.class_id) for row in found.classes[:_NAMES_SHOWN]]
    more = len(found.classes) - len(shown)
    return escape(", ".join(shown) + (f" and {more:,} more" if more else ""))


def _table(*headings: str, left: int = 0) -> Table:
    """A table with these columns, all but the first `left` of them set to the right."""
    table = Table(box=None)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < left else "right")
    return table


def _print(table: Table) -> None:
    # Made for each use, so that standard output is the one of now.
    Console(highlight=False, width=None if sys.stdout.isatty() else _NO_WIDTH).print(table)
