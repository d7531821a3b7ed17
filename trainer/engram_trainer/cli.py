"""The `engram-train` command: runs methods on streams of tasks and prints what they remember at the end.

`engram-train OPTIONS` is `engram-train train OPTIONS`; `compare` starts many of those; `recipes` lists published
experiments for `--recipe`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import torch
import typer
from rich.console import Console
from rich.markup import escape

from engram import __version__, amounts
from engram.errors import EngramError
from engram.schemas import Definition, Per, Ranking, Rule, ShareBy, Subsampling
from engram_trainer import arguments, display, loop, methods, networks, recipes
from engram_trainer import compare as comparing
from engram_trainer.configuration import (
    MemoryConfig,
    MemoryKind,
    Normalise,
    Precision,
    PrepareConfig,
    ReplayVia,
    RunConfig,
    RuntimeConfig,
)
from engram_trainer.progress import Bars, Watches
from engram_trainer.scalars import Log, open_log
from engram_trainer.stream import Scenario, StreamConfig

RECIPE, STREAM, METHOD, MEMORY, RUNTIME, RUN = "Recipe", "Stream", "Method", "Memory", "Runtime", "Run"
SELECTION = "Selection (service and strips)"
# fmt: off
BESIDE_A_RECIPE = frozenset({
    "recipe", "dry_run", "yes", "data", "memory", "budget", "quality", "url", "buffer", "replay", "patience",
    "seed", "out", "resume", "log", "device", "precision", "processes", "workers", "threads", "checkpoint",
})
# fmt: on
"""The options that leave a recipe the published experiment that it is."""

OF_A_ROW = {"method": "--methods", "memory": "--memories", "budget": "--budgets", "seed": "--seeds"}
"""What `compare` gives each run, and the option that names all of them."""

UsageError: Any = typer.BadParameter.__bases__[0]
"""Of the click that typer stands on, which is one of its own in later versions."""

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


@app.command("train", rich_help_panel="Commands")
@app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A published experiment with all its settings; [bold]engram-train recipes[/bold] lists them.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what the recipe does and needs.", rich_help_panel=RECIPE)
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Start, however long it takes.", rich_help_panel=RECIPE)
    ] = False,
    data: Annotated[
        str,
        typer.Option(
            help="'sample' (850 images of each class of Fashion-MNIST), 'digits', a folder (IDX files, CIFAR's own, "
            "train/CLASS/*.png, train-*.tar, a saved Hugging Face data set), CIFAR's .tar.gz or the name of a data set "
            "on the Hugging Face Hub, e.g. uoft-cs/cifar100.",
            rich_help_panel=STREAM,
        ),
    ] = "sample",
    resize: Annotated[
        int | None, typer.Option(help="Shorter side of every image, then its square centre.", rich_help_panel=STREAM)
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
    visits: Annotated[
        str | None,
        typer.Option(
            metavar="N,N", help="Order in which tasks come and return, as in 0,1,2,0,1.", rich_help_panel=STREAM
        ),
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
    replay: Annotated[
        ReplayVia, typer.Option(help="Where exemplars of a service are drawn.", rich_help_panel=MEMORY)
    ] = MemoryConfig.replay,
    patience: Annotated[
        float, typer.Option(help="Seconds to wait for a service that is away.", rich_help_panel=MEMORY)
    ] = MemoryConfig.patience_s,
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
        int | None, typer.Option(min=1, help="CPU threads; without it PyTorch decides.", rich_help_panel=RUNTIME)
    ] = None,
    checkpoint: Annotated[
        float, typer.Option(help="Seconds between checkpoints within a task.", rich_help_panel=RUNTIME)
    ] = RuntimeConfig.checkpoint_s,
    log: Annotated[
        Log | None,
        typer.Option(
            help="Write the course of the run there, too; the package has to be installed.", rich_help_panel=RUN
        ),
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
    named = _named(context)
    if context.invoked_subcommand is not None:
        if named:
            options = ", ".join(_option(context, name) for name in sorted(named))
            _fail(console, f"{options} comes after '{context.invoked_subcommand}', not before it", 2)
        return
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if recipe is None:
            if dry_run or yes:
                raise ValueError("--dry-run and --yes are about a recipe: give --recipe NAME")
            config = arguments.configuration(context.params)
        else:
            found = _startable(context, recipe, console)
            if dry_run:
                return
            config = arguments.of_recipe(found, context.params, named)
        with ExitStack() as stack:
            watches: list[loop.Watch] = [stack.enter_context(Bars(console))]
            if log is not None:
                watches.append(stack.enter_context(open_log(log, out)))
            report = loop.run(config, out, resume=resume, watch=Watches(watches))
    except KeyboardInterrupt:
        _fail(console, f"interrupted; the same command with --resume goes on from the last checkpoint in {out}", 130)
    except (EngramError, ValueError, FloatingPointError, OSError) as error:
        _fail(console, str(error), 1)
    display.metrics(console, report)
    console.print(f"{out}: report.json, accuracy.png, matrix.png", highlight=False)


@app.command("recipes", rich_help_panel="Commands")
def list_recipes(
    name: Annotated[str | None, typer.Argument(help="Say all about this one.")] = None,
) -> None:
    """List the published experiments that --recipe knows, with their papers' numbers."""
    console = Console()
    if name is None:
        display.recipes(console, recipes.RECIPES.values())
        return
    try:
        display.recipe(console, recipes.find(name), cores=os.cpu_count() or 1)
    except ValueError as error:
        _fail(console, str(error), 1)


@app.command(
    "compare",
    rich_help_panel="Commands",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def compare(
    context: typer.Context,
    methods: Annotated[str, typer.Option(metavar="A,B", help="The first is what others are compared with.")],
    budgets: Annotated[str, typer.Option(metavar="BYTES,BYTES", help="As for --budget of a run.")] = str(
        MemoryConfig.budget_bytes
    ),
    memories: Annotated[
        str, typer.Option(metavar="KIND,KIND", help="As for --memory of a run; a service gets a buffer for each run.")
    ] = MemoryConfig.kind,
    seeds: Annotated[str, typer.Option(metavar="N,N", help="One run of each for every seed.")] = "0,1,2",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each; without it they share the cores.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs and the report.")] = Path("runs/compare"),
) -> None:
    """Run methods x memories x budgets x seeds, and compare them in one table.

    What follows is for every run:

        engram-train compare --methods lucir,gem --memories raw,strips --budgets 20000,40000 --tasks 5 --epochs 4

    A finished run is not run again and a killed one goes on, so the same command goes on with a comparison.
    """
    console = Console()
    try:
        _check_common(context.args)
        rows = comparing.cells(
            [word.strip() for word in methods.split(",")],
            [arguments.memory_kind(word.strip()) for word in memories.split(",")],
            [amounts.parse(word) for word in budgets.split(",")],
        )
        runs = comparing.plan(
            rows, [arguments.seed(word) for word in seeds.split(",")], context.args, out, configure=_meant
        )
        done = 0

        def tell(run: comparing.Run, sentence: str | None) -> None:
            nonlocal done
            done += 1
            what = sentence or f"accuracy at the end {_last(run):.1%}"
            console.print(
                f"{done}/{len(runs)} {run.cell.name}, seed {run.seed}: {escape(what)}", highlight=False, soft_wrap=True
            )

        failed = comparing.execute(runs, jobs=jobs, threads=threads, tell=tell)
        summary = comparing.summarize(runs)
        sentences = {run.folder.name: sentence for run, sentence in failed.items()}
        comparing.write(summary, out, title=f"{methods} with {memories}", failed=sentences)
    except KeyboardInterrupt:
        _fail(console, f"interrupted; the same command goes on with what is in {out}", 130)
    except (EngramError, ValueError, OSError) as error:
        _fail(console, str(error), 1)
    if summary["rows"]:
        display.comparison(console, summary)
        console.print(f"{out}: compare.md, compare.json, compare.png", highlight=False)
    if failed:
        _fail(console, f"{len(failed)} of {len(runs)} runs failed; what they said is in {out}/*.log", 1)


def _meant(words: Sequence[str]) -> RunConfig:
    """The configuration that arguments of `engram-train train` mean.

    Raises:
        ValueError: they mean none, or one that `compare` cannot make of them.
    """
    context = _parsed(words)
    wrong = sorted(_named(context) & {"recipe", "out", "resume", "buffer", "log", "dry_run", "yes"})
    if wrong:
        raise ValueError(f"{_option(context, wrong[0])} is not for a comparison")
    return arguments.configuration(context.params)


def _check_common(words: Sequence[str]) -> None:
    """What is said for all runs leaves open what tells them apart: a row would silently have its own.

    Raises:
        ValueError: it does not, or is nothing that `engram-train train` knows.
    """
    context = _parsed(words)
    for name in sorted(_named(context) & OF_A_ROW.keys()):
        raise ValueError(f"{_option(context, name)} is not for a comparison: give {OF_A_ROW[name]}")


def _parsed(words: Sequence[str]) -> typer.Context:
    """Arguments of `engram-train train`, read but not run.

    Raises:
        ValueError: it has no such options, or not such values.
    """
    command: Any = typer.main.get_command(app)
    try:
        with command.commands["train"].make_context("train", list(words)) as context:
            return cast(typer.Context, context)
    except UsageError as error:
        raise ValueError(error.format_message()) from error


def _last(run: comparing.Run) -> float:
    report = run.report
    return float(report["metrics"]["last"]) if report else float("nan")


def _named(context: typer.Context) -> Set[str]:
    """The parameters that were given."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _option(context: typer.Context, name: str) -> str:
    return next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)


def _startable(context: typer.Context, name: str, console: Console) -> recipes.Recipe:
    """The recipe, after it was said what it needs, when nothing that was given stands against it.

    Raises:
        ValueError: there is none, an option contradicts it, its data are missing or its time is not granted.
    """
    found, given = recipes.find(name), context.params
    wrong = [_option(context, each) for each in sorted(_named(context) - BESIDE_A_RECIPE)]
    if wrong:
        raise ValueError(f"recipe {name} has settings of its own, so it does not go with {', '.join(wrong)}")
    cores = given["threads"] or os.cpu_count() or 1
    display.recipe(console, found, cores=cores)
    if given["dry_run"]:
        return found
    if "data" not in _named(context):
        raise ValueError(f"recipe {name} needs {found.data.title}: give --data, {found.data.where}")
    hours = found.hours(is_gpu=False, cores=cores)
    if given["device"] == "cpu" and hours > recipes.PATIENCE_HOURS and not given["yes"]:
        raise ValueError(
            f"recipe {name} takes about {display.duration(hours)} on {cores} CPU cores; give --device cuda, or --yes"
        )
    return found


def _fail(console: Console, message: str, status: int) -> NoReturn:
    console.file.flush()
    Console(stderr=True).print(f"[red]engram-train:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(status)
