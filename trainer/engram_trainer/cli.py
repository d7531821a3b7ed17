"""The `engram-train` command: runs a method on a stream of tasks and prints what it remembers at the end."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram import __version__, amounts
from engram.errors import EngramError
from engram.schemas import Definition, Per, Ranking, Rule, ShareBy, Subsampling
from engram_trainer import loop, methods, networks
from engram_trainer.configuration import (
    MemoryConfig,
    MemoryKind,
    Normalise,
    Precision,
    PrepareConfig,
    RunConfig,
    RuntimeConfig,
)
from engram_trainer.progress import Bars
from engram_trainer.report import Report
from engram_trainer.stream import Scenario, StreamConfig

STREAM, METHOD, MEMORY, RUNTIME, RUN = "Stream", "Method", "Memory", "Runtime", "Run"
SELECTION = "Selection (service and strips)"

app = typer.Typer(
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"engram {__version__}")
        raise typer.Exit


def _names(names: Any) -> str:
    return ", ".join(names)


@app.command()
def train(
    data: Annotated[
        str,
        typer.Option(
            help="'sample' (850 images of each class of Fashion-MNIST), 'digits', a folder (IDX files, "
            "train/CLASS/*.png, a saved Hugging Face data set) or the name of a data set on the Hugging Face Hub, "
            "e.g. uoft-cs/cifar100.",
            rich_help_panel=STREAM,
        ),
    ] = "sample",
    resize: Annotated[
        int | None, typer.Option(help="Make every image so many pixels wide and high.", rich_help_panel=STREAM)
    ] = None,
    crop: Annotated[
        int | None, typer.Option(help="What the network sees: the centre, so many pixels wide.", rich_help_panel=STREAM)
    ] = None,
    normalise: Annotated[
        Normalise, typer.Option(help="Whose mean and deviation are taken from the pixels.", rich_help_panel=STREAM)
    ] = PrepareConfig.normalise,
    scenario: Annotated[Scenario, typer.Option(help="What a task is.", rich_help_panel=STREAM)] = StreamConfig.scenario,
    tasks: Annotated[
        int, typer.Option(help="Number of tasks, the first included.", rich_help_panel=STREAM)
    ] = StreamConfig.tasks,
    base_classes: Annotated[
        int | None,
        typer.Option(help="Classes of the first task; without it all tasks have equally many.", rich_help_panel=STREAM),
    ] = None,
    train_per_class: Annotated[
        int | None, typer.Option(help="At most so many training images of each class.", rich_help_panel=STREAM)
    ] = None,
    train_per_task: Annotated[
        int | None, typer.Option(help="At most so many training images of each task.", rich_help_panel=STREAM)
    ] = None,
    test_per_class: Annotated[
        int | None, typer.Option(help="At most so many test images of each class.", rich_help_panel=STREAM)
    ] = None,
    validation: Annotated[
        float,
        typer.Option(
            help="Hold out this part of the training images and score on it: for tuning.", rich_help_panel=STREAM
        ),
    ] = 0.0,
    method: Annotated[
        str, typer.Option(help=f"One of {_names(methods.METHODS)}.", rich_help_panel=METHOD)
    ] = RunConfig.method,
    network: Annotated[
        str, typer.Option(help=f"One of {_names(networks.NETWORKS)}.", rich_help_panel=METHOD)
    ] = RunConfig.network,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over each task; without it the method's own.", rich_help_panel=METHOD)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other setting of the method, e.g. --set lr=0.05; an unknown name lists them all. Repeatable.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    memory: Annotated[
        MemoryKind,
        typer.Option(
            help="'service' is an Engram service; the others are kept in the trainer, for comparison: "
            "raw pixels, JPEG files, strips.",
            rich_help_panel=MEMORY,
        ),
    ] = MemoryConfig.kind,
    budget: Annotated[
        str,
        typer.Option(
            metavar="BYTES", help="Bytes for all exemplars, as in 40000, 1.5MB or 64KiB.", rich_help_panel=MEMORY
        ),
    ] = str(MemoryConfig.budget_bytes),
    per: Annotated[
        Per, typer.Option(help="Whether the budget is the whole buffer's or each class's.", rich_help_panel=MEMORY)
    ] = MemoryConfig.per,
    share_by: Annotated[
        ShareBy, typer.Option(help="What gets equal shares of it.", rich_help_panel=MEMORY)
    ] = MemoryConfig.share_by,
    quality: Annotated[
        str,
        typer.Option(metavar="auto|1..100", help="JPEG quality; 'auto': selection chooses it.", rich_help_panel=MEMORY),
    ] = "auto",
    subsampling: Annotated[
        Subsampling, typer.Option(help="Of the colour planes.", rich_help_panel=MEMORY)
    ] = MemoryConfig.subsampling,
    ranking: Annotated[
        Ranking, typer.Option(help="Which images are kept.", rich_help_panel=MEMORY)
    ] = MemoryConfig.ranking,
    url: Annotated[
        str | None,
        typer.Option(
            help="The service; else ENGRAM_URL, else http://127.0.0.1:8077. Token: ENGRAM_TOKEN.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    buffer: Annotated[
        str | None, typer.Option(help="Name of a new buffer; else one of the run's own.", rich_help_panel=MEMORY)
    ] = None,
    definition: Annotated[
        Definition, typer.Option(help="How R is computed.", rich_help_panel=SELECTION)
    ] = MemoryConfig.definition,
    rule: Annotated[
        Rule, typer.Option(help="Whether every higher quality must pass, too.", rich_help_panel=SELECTION)
    ] = MemoryConfig.rule,
    epsilon: Annotated[
        float, typer.Option(help="A quality passes when |R - 1| is below this.", rich_help_panel=SELECTION)
    ] = MemoryConfig.epsilon,
    block: Annotated[
        int | None,
        typer.Option(help="Exemplars whose volume is compared at once.", rich_help_panel=SELECTION),
    ] = MemoryConfig.block,
    out: Annotated[
        Path, typer.Option(help="Folder of the run: configuration, checkpoint, report, pictures.", rich_help_panel=RUN)
    ] = Path("runs/last"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in that folder.", rich_help_panel=RUN)
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Of the order of classes, weights, batches and augmentation.", rich_help_panel=RUN)
    ] = 0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, mps.", rich_help_panel=RUNTIME)
    ] = RuntimeConfig.device,
    precision: Annotated[
        Precision, typer.Option(help="Of the network's passes.", rich_help_panel=RUNTIME)
    ] = RuntimeConfig.precision,
    processes: Annotated[
        int, typer.Option(help="Each computes its part of every batch.", rich_help_panel=RUNTIME)
    ] = RuntimeConfig.processes,
    workers: Annotated[
        int, typer.Option(help="Processes that decode images, for each training process.", rich_help_panel=RUNTIME)
    ] = RuntimeConfig.workers,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; without it PyTorch decides.", rich_help_panel=RUNTIME)
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Learn task after task, replay from a byte-bounded memory, and report how much was forgotten.

    With an Engram service running ([bold]engram-service serve[/bold]):

        engram-train --tasks 5 --budget 40000 --out runs/lucir

    and beside it, in the same bytes, uncompressed:

        engram-train --tasks 5 --budget 40000 --memory raw --out runs/raw
    """
    console = Console()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        options = parse_options(method, settings or [], epochs)
        config = RunConfig(
            data=data,
            resize=resize,
            prepare=PrepareConfig(crop, normalise),
            stream=StreamConfig(
                scenario=scenario,
                tasks=tasks,
                base_classes=base_classes,
                seed=seed,
                train_per_class=train_per_class,
                train_per_task=train_per_task,
                test_per_class=test_per_class,
                validation_ratio=validation,
            ),
            method=method,
            options=options,
            network=network,
            memory=MemoryConfig(
                kind=memory,
                budget_bytes=amounts.parse(budget),
                per=per,
                share_by=share_by,
                quality=parse_quality(quality),
                subsampling=subsampling,
                ranking=ranking,
                definition=definition,
                rule=rule,
                epsilon=epsilon,
                block=block,
                url=url,
                buffer=buffer,
            ),
            seed=seed,
            runtime=RuntimeConfig(device, precision, processes, workers),
        )
        with Bars(console) as bars:
            report = loop.run(config, out, resume=resume, watch=bars)
    except KeyboardInterrupt:
        _fail(console, f"interrupted; the same command with --resume goes on from the last checkpoint in {out}", 130)
    except (EngramError, ValueError, FloatingPointError, OSError) as error:
        _fail(console, str(error), 1)
    print_metrics(console, report)
    console.print(f"{out}: report.json, accuracy.png, matrix.png", highlight=False)


def parse_options(method: str, settings: list[str], epochs: int | None) -> dict[str, Any]:
    """The method's options from `NAME=VALUE` texts, each value of the type of the method's field.

    Raises:
        ValueError: not NAME=VALUE, no such setting, or a value of another type.
    """
    config = methods.config_class(method)
    types = get_type_hints(config)
    known = {field.name: types[field.name] for field in fields(config)}
    options: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, not {setting!r}")
        if name not in known:
            raise ValueError(f"method {method} has no setting {name!r}; it has {_names(sorted(known))}")
        options[name] = _value(name, text, known[name])
    return options


def _value(name: str, text: str, kind: Any) -> Any:
    choices = [choice for choice in get_args(kind) if choice is not type(None)]
    if get_origin(kind) is tuple:
        return tuple(_value(name, part, choices[0]) for part in text.split(",") if part)
    if get_origin(kind) is Literal:
        if text not in choices:
            raise ValueError(f"{name} is one of {_names(choices)}, not {text!r}")
        return text
    if len(choices) < len(get_args(kind)):
        if text.lower() == "none":
            return None
        kind = choices[0]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} is true or false, not {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{name} must be of type {kind.__name__}, got {text!r}") from error


def parse_quality(text: str) -> int | None:
    """None for `auto`.

    Raises:
        ValueError: neither `auto` nor a whole number.
    """
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"quality is 'auto' or a number from 1 to 100, not {text!r}") from error


def print_metrics(console: Console, report: Report) -> None:
    """The numbers of a finished run as a table."""
    metrics = report.metrics
    if metrics is None:
        return
    table = Table("measure", "value", title=f"{report.config['method']}, {report.config['stream']['scenario']}")
    for name, value in (
        ("accuracy on all classes after the last task", metrics.last),
        ("average incremental accuracy", metrics.average_incremental),
        ("... without the first task", metrics.average_incremental_without_base),
        ("ACC, mean over tasks", metrics.acc),
        ("BWT, backward transfer", metrics.bwt),
        ("FWT, forward transfer", metrics.fwt),
        ("forgetting", metrics.forgetting),
    ):
        table.add_row(
            name, "-" if value is None else f"{100 * value:+.1f} %" if "WT" in name else f"{100 * value:.1f} %"
        )
    console.print(table)


def _fail(console: Console, message: str, status: int) -> NoReturn:
    console.file.flush()
    Console(stderr=True).print(f"[red]engram-train:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(status)
