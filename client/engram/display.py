"""How the `engram` command shows what a service answers: tables and sentences for people, JSON for programs.

What is read from a pipe has no width: there nothing is folded and no name is cut short.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from engram.oversight import AuditEntry, Disk, Forecast, Histogram, Served, Token, WhatIf, WhoAmI
from engram.schemas import Answer, Buffer, Candidate, Decision, Definition, Exemplar, Extractor, Health, Ingest, Task

_NAMES_SHOWN = 8
_NO_WIDTH = 100_000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def say(text: str) -> None:
    """A line on standard output."""
    typer.echo(_plain(text))


def as_json(found: Answer | Sequence[Answer] | Mapping[str, Any]) -> None:
    """What the service said, as it said it; or what a command did."""
    if isinstance(found, Mapping):
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    elif isinstance(found, Answer):
        typer.echo(found.model_dump_json(indent=2))
    else:
        typer.echo(json.dumps([each.model_dump(mode="json") for each in found], indent=2, ensure_ascii=False))


def fail(message: str) -> NoReturn:
    """One line on standard error, and exit code 1."""
    typer.echo(_plain(f"error: {message}"), err=True)
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
        table.add_row(*(f"{value:,}" for value in numbers), *([_cell(row.name or "-")] if is_named else []))
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
    for problem in found.failures:
        say(f"before that: {problem.get('detail', '')}")
    if found.can_retry:
        say(f"its upload is kept: engram retry {found.id}")


def ingests(found: Sequence[Ingest]) -> None:
    """A line for each ingest."""
    table = _table("ingest", "buffer", left=2)
    for heading in ("task", "state", "images", "bytes", "created"):
        table.add_column(heading, justify="right")
    for each in found:
        images = f"{each.images_done:,} of {each.images_total:,}"
        created = _time(each.created_at)
        table.add_row(each.id, each.buffer, str(each.task), each.state, images, f"{each.body_bytes:,}", created)
    _print(table)


def extractors(found: Sequence[Extractor]) -> None:
    """A line for each extractor."""
    table = _table("extractor", left=1)
    for heading in ("input", "dimensions", "bytes", "created"):
        table.add_column(heading, justify="right")
    for each in found:
        shape = "x".join("any" if side is None else str(side) for side in each.input_shape)
        created = _time(each.created_at)
        table.add_row(each.sha256, shape, str(each.dimensions), f"{each.bytes:,}", created)
    _print(table)


def exemplars(found: Sequence[Exemplar]) -> None:
    """A line for each exemplar."""
    table = _table("pack", left=1)
    for heading in ("row", "task", "class", "rank", "bytes", "quality"):
        table.add_column(heading, justify="right")
    if has_keys := any(each.key is not None for each in found):
        table.add_column("key")
    for each in found:
        numbers = (each.row, each.task, each.class_id, each.rank, each.bytes, each.quality)
        table.add_row(each.pack, *map(str, numbers), *([_cell(each.key or "-")] if has_keys else []))
    _print(table)


def histogram(found: Histogram) -> None:
    """A line and a bar for each bin."""
    table = _table(found.of, "exemplars")
    table.add_column("")
    most = max((each.exemplars for each in found.bins), default=1)
    for each in found.bins:
        value = f"{each.low:g} to {each.high:g}" if each.low is not None and each.high is not None else str(each.value)
        table.add_row(_cell(value), f"{each.exemplars:,}", "#" * round(40 * each.exemplars / max(1, most)))
    _print(table)
    say(f"{found.counted:,} of {found.exemplars:,} exemplars are counted, {found.others:,} of them in no line")


def forecast(found: Forecast) -> None:
    """What a change would leave, and of which classes it would take something."""
    say(
        f"{found.buffer}: {found.exemplars_then:,} of {found.exemplars:,} exemplars would stay, "
        f"{found.used_bytes_then:,} of {found.used_bytes:,} bytes, under a limit of {found.limit_bytes:,}"
    )
    table = _table("task", "class", "exemplars", "then", "bytes", "then")
    for each in found.classes:
        numbers = (each.task, each.class_id, each.exemplars, each.exemplars_then, each.bytes, each.bytes_then)
        table.add_row(*(f"{number:,}" for number in numbers))
    _print(table)


def what_if(found: WhatIf) -> None:
    """What selection would choose, from what."""
    say(found.says)
    say(
        f"R {found.definition}, rule {found.rule}, epsilon {found.epsilon:g}, {found.share_bytes:,} of "
        f"{found.budget_bytes:,} bytes for this task"
    )
    table = _table("quality", "R", "R of all tasks", "passes", "N", "N then", "bytes", "")
    for each in found.candidates:
        ratios = ("-" if ratio is None else f"{ratio:.3f}" for ratio in (each.ratio, each.pooled_ratio))
        passes = "-" if each.pooled_ratio is None else "yes" if each.passes else "no"
        numbers = (f"{number:,}" for number in (each.exemplars, each.exemplars_then, each.bytes))
        table.add_row(str(each.quality), *ratios, passes, *numbers, "<-" if each.quality == found.quality else "")
    _print(table)


def disk(found: Disk) -> None:
    """What takes how much."""
    table = _table("", "bytes", left=1)
    for name, size in found.model_dump().items():
        table.add_row(name.removesuffix("_bytes").replace("_", " "), f"{size:,}")
    _print(table)


def who(found: WhoAmI) -> str:
    """Whose token it is and what it allows, in words."""
    return f"{found.who}, {_allowed(found.scope, found.prefix)}"


def allows(found: Token) -> str:
    """What a token allows and for how long, in words."""
    until = "" if found.expires_at is None else f", until {_time(found.expires_at)}"
    return f"{_allowed(found.scope, found.prefix)}{until}"


def tokens(found: Sequence[Token]) -> None:
    """A line for each token."""
    table = _table("id", "name", "scope", "buffers", "created", "by", "last used", "state", left=8)
    now = datetime.now(UTC)
    for each in found:
        used = "never" if each.last_used_at is None else _time(each.last_used_at)
        state = "good"
        if each.expires_at is not None:
            state = "expired" if each.expires_at <= now else f"until {_time(each.expires_at)}"
        if each.revoked_at is not None:
            state = f"revoked {_time(each.revoked_at)}"
        buffers = f"{each.prefix}*" if each.prefix else "all"
        created = (_time(each.created_at), _cell(each.created_by))
        table.add_row(each.id, _cell(each.name), each.scope, buffers, *created, used, state)
    _print(table)


def audit(found: Sequence[AuditEntry]) -> None:
    """A line for each change."""
    table = _table("when", "who", "action", "buffer", "what", "request", left=6)
    for each in found:
        words = (each.who, each.action, each.buffer or "-", each.subject or "-", each.request_id or "-")
        table.add_row(_time(each.at), *map(_cell, words))
    _print(table)


def draws(found: Sequence[Served]) -> None:
    """A line for each class of a task and whoever drew from it."""
    table = _table("buffer", "who", left=2)
    for heading in ("task", "class", "exemplars", "bytes", "last"):
        table.add_column(heading, justify="right")
    for each in found:
        numbers = (f"{number:,}" for number in (each.task, each.class_id, each.exemplars, each.bytes))
        table.add_row(each.buffer, _cell(each.who), *numbers, _time(each.last_at))
    _print(table)


def _allowed(scope: str | None, prefix: str) -> str:
    return f"{scope or 'nothing'} on {f'buffers named {prefix}*' if prefix else 'all buffers'}"


def _time(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


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
    return _cell(", ".join(shown) + (f" and {more:,} more" if more else ""))


def _cell(text: str) -> str:
    """A text in a table: what others have uploaded is no markup, and nothing that a terminal obeys."""
    return escape(_plain(text).replace("\n", "\\n"))


def _plain(text: str) -> str:
    """The text, its control characters but the ends of lines written as escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _table(*headings: str, left: int = 0) -> Table:
    """A table with these columns, all but the first `left` of them set to the right."""
    table = Table(box=None)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < left else "right")
    return table


def _print(table: Table) -> None:
    # Made for each use, so that standard output is the one of now.
    Console(highlight=False, width=None if sys.stdout.isatty() else _NO_WIDTH).print(table)
