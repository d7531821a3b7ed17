"""The demo: train one learner with three memories of equal bytes, on a sample of Fashion-MNIST.

LUCIR learns the Fashion-MNIST sample two classes at a time: without replay, with uncompressed replay, and with an
Engram service that is started for the purpose and stopped afterwards. It prints a table and leaves a picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram import amounts
from engram.errors import EngramError
from engram_trainer import loop
from engram_trainer.configuration import MemoryConfig, RunConfig
from engram_trainer.local_service import local_service
from engram_trainer.progress import Bars
from engram_trainer.report import Report, curves
from engram_trainer.stream import StreamConfig

NAMES = {"none": "no replay", "raw": "uncompressed replay", "service": "Engram service"}

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="A new folder for runs, log and picture; else runs/demo, runs/demo-2, ...")
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="BYTES", help="Bytes of replay memory for each class, as in 4000 or 4KB.")
    ] = "4000",
    epochs: Annotated[int, typer.Option(help="Passes over each task.")] = 15,
    train_per_class: Annotated[int | None, typer.Option(help="Training images of each class; else all 700.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of classes, the weights and everything else.")] = 0,
) -> None:
    """Learn Fashion-MNIST class by class three times and compare what is left of the first classes at the end."""
    console = Console()
    try:
        budget_bytes = amounts.parse(budget)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    out = out or _free_folder(Path("runs/demo"))
    console.print(
        f"LUCIR learns 10 classes of clothing, 2 at a time, with {budget_bytes:,} bytes of memory per class.",
        highlight=False,
    )
    try:
        with local_service(out / "server") as service:
            console.print(
                f"An Engram service runs at {service.url}, its data and log in {out / 'server'}.", highlight=False
            )
            reports = {}
            for kind, name in NAMES.items():
                console.rule(name, align="left")
                memory = MemoryConfig(kind=kind, budget_bytes=budget_bytes, per="class", url=service.url)  # type: ignore[arg-type]
                config = RunConfig(
                    stream=StreamConfig(tasks=5, seed=seed, train_per_class=train_per_class),
                    options={"epochs": epochs},
                    memory=memory,
                    seed=seed,
                )
                with Bars(console) as bars:
                    reports[name] = loop.run(config, out / kind, watch=bars)
    except (EngramError, OSError) as error:
        Console(stderr=True).print(f"[red]demo:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    console.rule("the same bytes, three memories", align="left")
    console.print(_table(reports))
    picture = out / "accuracy.png"
    curves(
        {name: [*report.metrics.incremental] for name, report in reports.items() if report.metrics},
        picture,
        ylabel="accuracy on all classes seen so far",
        title=f"Fashion-MNIST sample, LUCIR, {budget_bytes:,} bytes per class",
    )
    console.print(f"The curves: {picture}. Everything about the runs: {out}. The service is stopped.", highlight=False)


def _free_folder(wanted: Path) -> Path:
    """The folder itself if it is not there yet, else the first free `-2`, `-3`, ..."""
    number, folder = 1, wanted
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def _table(reports: dict[str, Report]) -> Table:
    # Narrow enough for a terminal of 80 columns.
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("\nmemory", no_wrap=True)
    headings = ("\nexemplars", "\nbytes", "\nquality", "accuracy:\naverage", "\nat end", "\ntask 1")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, report in reports.items():
        metrics, memory = report.metrics, report.memory[-1]
        if metrics is None:
            continue
        table.add_row(
            name,
            f"{memory['exemplars']:,}",
            f"{memory['used_bytes']:,}",
            str(memory.get("quality") or "-"),
            f"{metrics.average_incremental:.1%}",
            f"[bold]{metrics.last:.1%}[/bold]",
            f"{report.matrix[-1][0]:.1%}",
        )
    return table


def main() -> None:
    """Entry point of `python -m engram_trainer.demo`."""
    app(prog_name="python -m engram_trainer.demo")


if __name__ == "__main__":
    main()
