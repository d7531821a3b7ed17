"""Show recipes, finished runs and comparisons on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from engram_trainer import compare
from engram_trainer.recipes import MEASURES, Recipe
from engram_trainer.report import Report


def metrics(console: Console, report: Report) -> None:
    """The numbers of a finished run as a table, and those of the paper where it is of a recipe."""
    found = report.metrics
    if found is None:
        return
    table = Table("measure", "value", title=f"{report.config['method']}, {report.config['stream']['scenario']}")
    for name, value in (
        ("accuracy on all classes after the last task", found.last),
        ("average incremental accuracy", found.average_incremental),
        ("... without the first task", found.average_incremental_without_base),
        ("ACC, mean over tasks", found.acc),
        ("BWT, backward transfer", found.bwt),
        ("FWT, forward transfer", found.fwt),
        ("forgetting", found.forgetting),
    ):
        table.add_row(name, _percent(value, is_signed="WT" in name))
    console.print(table)
    if report.paper:
        console.print(_paper(report.paper, title=f"recipe {report.config['recipe']}"))


def _paper(numbers: Iterable[Mapping[str, Any]], *, title: str) -> Table:
    table = Table("measure", "ours", "paper", "where the paper's was read", title=title, box=box.SIMPLE_HEAD)
    for number in numbers:
        is_signed = number["measure"] == "bwt"
        published = _percent(number["value"], is_signed=is_signed)
        if number["spread"] is not None:
            published += f" ± {100 * number['spread']:.1f}"
        table.add_row(
            MEASURES[number["measure"]], _percent(number.get("ours"), is_signed=is_signed), published, number["source"]
        )
    return table


def recipe(console: Console, found: Recipe, *, cores: int) -> None:
    """What a recipe does and needs, and the numbers of its paper."""
    config, memory = found.config, found.config.memory
    console.print(f"[bold]{found.name}[/bold]: {found.title}", highlight=False)
    lines = {
        "method": f"{config.method} with {config.network}; " + _settings(config.options),
        "data": f"{found.data.title}: {found.data.where}; about {found.data.disk_gb:g} GB",
        "memory": f"{found.exemplars:,} exemplars {_of(memory.per)} "
        + (
            f"as JPEG of quality {memory.quality}; bytes are measured on the data"
            if memory.kind == "files"
            else f"of raw pixels, {memory.budget_bytes:,} bytes {_of(memory.per)}"
        )
        + "; another --memory gets the same bytes",
        "time": f"{found.images:,} images through the network: about {duration(found.hours(is_gpu=True))} on a GPU, "
        f"{duration(found.hours(is_gpu=False, cores=cores))} on {cores} CPU cores (estimated)",
    }
    for departure in found.departures:
        lines[f"departure {len(lines) - 3}"] = departure
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    for name, text in lines.items():
        table.add_row(name, text)
    console.print(table)
    numbers = [{**vars(number), "ours": None} for number in found.numbers]
    console.print(_paper(numbers, title="published"))


def recipes(console: Console, found: Iterable[Recipe]) -> None:
    """All recipes, one a line."""
    table = Table("recipe", "experiment", "data", "on a GPU", "paper", box=box.SIMPLE_HEAD)
    for each in found:
        first = each.numbers[0]
        table.add_row(
            each.name,
            each.title,
            each.data.title,
            duration(each.hours(is_gpu=True)),
            f"{_percent(first.value)} {first.measure.replace('_', ' ')}",
        )
    console.print(table)
    console.print("engram-train recipes NAME says what one needs; engram-train --recipe NAME --data ... runs it.")


def comparison(console: Console, summary: Mapping[str, Any]) -> None:
    """The table of a comparison."""
    table = Table("", "seeds", "average", "at the end", "difference", "bytes", "seconds", box=box.SIMPLE_HEAD)
    for place, row in enumerate(summary["rows"]):
        table.add_row(
            row["row"],
            str(len(row["seeds"])),
            *(compare.percent(row["measures"][name]) for name in compare.COMPARED),
            "" if place == 0 else compare.percent(row["difference"]["last"], sign=True),
            f"{row['used_bytes']:,.0f}",
            f"{row['seconds']:,.0f}",
        )
    console.print(table)


def duration(hours: float) -> str:
    """About how long, in the unit that suits it."""
    if hours < 1 / 6:
        return "10 minutes"
    if hours < 1:
        return f"{60 * hours:.0f} minutes"
    if hours < 1.5:
        return "1 hour"
    return f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:.0f} days"


def _settings(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_setting(value)}" for name, value in options.items())


def _setting(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(_setting(each) for each in value) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _of(per: str) -> str:
    return "of each class" if per == "class" else "in all"


def _percent(value: float | None, *, is_signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{100 * value:+.1f} %" if is_signed else f"{100 * value:.1f} %"
