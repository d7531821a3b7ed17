"""The `engram-train` command: runs methods on streams of tasks and prints what they remember at the end.

`engram-train OPTIONS` is `engram-train train OPTIONS`; `compare` starts many of those; `recipes` lists published
experiments for `--recipe`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import torch
import typer
from rich.console import Console
from rich.markup import escape

from engram import __version__, amounts
from engram.errors import EngramError
from engram.schemas import Definition, Per, Ranking, Rule, ShareBy, Subsampling
from engram_trainer import compare as comparing
from engram_trainer import datasets, display, loop, methods, networks, recipes
from engram_trainer.configuration import (
    MEMORY_KINDS,
    MemoryConfig,
    MemoryKind,
    Normalise,
    Precision,
    PrepareConfig,
    ReplayVia,
    RunConfig,
    RuntimeConfig,
)
from engram_trainer.progress import Bars
from engram_trainer.report import Report
from engram_trainer.scalars import Log, open_log
from engram_trainer.stream import Scenario, Stream, StreamConfig, Task

RECIPE, STREAM, METHOD, MEMORY, RUNTIME, RUN = "Recipe", "Stream", "Method", "Memory", "Runtime", "Run"
SELECTION = "Selection (service and strips)"
# fmt: off
BESIDE_A_RECIPE = frozenset({
    "recipe", "dry_run", "yes", "data", "memory", "budget", "quality", "url", "buffer", "replay", "patience",
    "seed", "out", "resume", "log", "device", "precision", "processes", "workers", "threads", "checkpoint",
})
# fmt: on
"""The options that leave a recipe the published experiment that it is."""

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
        int | None, typer.Option(help="CPU threads; without it PyTorch decides.", rich_help_panel=RUNTIME)
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
            config = _configuration(context.params)
        else:
            found = _startable(context, recipe, console)
            if dry_run:
                return
            config = _configured(found, context.params, named)
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
        rows = comparing.cells(
            [word.strip() for word in methods.split(",")],
            [_memory_kind(word.strip()) for word in memories.split(",")],
            [amounts.parse(word) for word in budgets.split(",")],
        )
        runs = comparing.plan(rows, [_seed(word) for word in seeds.split(",")], context.args, out, configure=_meant)
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


def _meant(arguments: Sequence[str]) -> RunConfig:
    """The configuration that arguments of `engram-train train` mean.

    Raises:
        ValueError: they mean none, or one that `compare` cannot make of them.
    """
    command: Any = typer.main.get_command(app)
    try:
        with command.commands["train"].make_context("train", list(arguments)) as context:
            wrong = sorted(_named(context) & {"recipe", "out", "resume", "buffer", "log", "dry_run", "yes"})
            if wrong:
                raise ValueError(f"{_option(context, wrong[0])} is not for a comparison")
            return _configuration(context.params)
    except UsageError as error:
        raise ValueError(error.format_message()) from error


def _memory_kind(word: str) -> MemoryKind:
    if word not in MEMORY_KINDS:
        raise ValueError(f"memory kind {word!r} is not one of {_names(MEMORY_KINDS)}")
    return word


def _seed(word: str) -> int:
    try:
        return int(word)
    except ValueError as error:
        raise ValueError(f"a seed is a whole number, not {word!r}") from error


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


def _configured(found: recipes.Recipe, given: Mapping[str, Any], named: Set[str]) -> RunConfig:
    """A recipe's configuration for these data, with what was given beside it.

    Raises:
        ValueError: the data are not those of the recipe.
        EngramError: they cannot be read.
    """
    dataset = datasets.load(given["data"], resize=found.config.resize)
    found.check(dataset)
    memory = found.config.memory
    budget = amounts.parse(given["budget"]) if "budget" in named else found.budget(dataset)
    quality = parse_quality(given["quality"]) if "quality" in named else memory.quality
    kind = given["memory"] if "memory" in named else memory.kind
    return replace(
        found.config,
        data=given["data"],
        stream=replace(found.config.stream, seed=given["seed"]),
        memory=replace(
            memory,
            kind=kind,
            budget_bytes=budget,
            quality=quality,
            url=given["url"],
            buffer=given["buffer"],
            replay=given["replay"],
            patience_s=given["patience"],
        ),
        seed=given["seed"],
        runtime=_runtime(given),
    )


def _runtime(given: Mapping[str, Any]) -> RuntimeConfig:
    return RuntimeConfig(
        given["device"], given["precision"], given["processes"], given["workers"], checkpoint_s=given["checkpoint"]
    )


def _configuration(given: Mapping[str, Any]) -> RunConfig:
    """What the options of `train` mean where they are not about a recipe.

    Raises:
        ValueError: they contradict each other or themselves.
    """
    return RunConfig(
        data=given["data"],
        resize=given["resize"],
        prepare=PrepareConfig(given["crop"], given["normalise"]),
        stream=StreamConfig(
            scenario=given["scenario"],
            tasks=given["tasks"],
            base_classes=given["base_classes"],
            seed=given["seed"],
            train_per_class=given["train_per_class"],
            train_per_task=given["train_per_task"],
            test_per_class=given["test_per_class"],
            validation_ratio=given["validation"],
            visits=parse_visits(given["visits"]),
        ),
        method=given["method"],
        options=parse_options(given["method"], given["settings"] or [], given["epochs"]),
        network=given["network"],
        memory=MemoryConfig(
            kind=given["memory"],
            budget_bytes=amounts.parse(given["budget"]),
            per=given["per"],
            share_by=given["share_by"],
            quality=parse_quality(given["quality"]),
            subsampling=given["subsampling"],
            ranking=given["ranking"],
            definition=given["definition"],
            rule=given["rule"],
            epsilon=given["epsilon"],
            block=given["block"],
            url=given["url"],
            buffer=given["buffer"],
            replay=given["replay"],
            patience_s=given["patience"],
        ),
        seed=given["seed"],
        runtime=_runtime(given),
    )


class Watches:
    """Several `loop.Watch`es as one."""

    def __init__(self, watches: Sequence[loop.Watch]) -> None:
        self._watches = watches

    def task(self, task: Task, stream: Stream) -> None:
        """A task begins."""
        for watch in self._watches:
            watch.task(task, stream)

    def phase(self, name: str, done: int, total: int, *, note: str = "") -> None:
        """So much of a phase of the task is done."""
        for watch in self._watches:
            watch.phase(name, done, total, note=note)

    def finished(self, report: Report) -> None:
        """A task is evaluated."""
        for watch in self._watches:
            watch.finished(report)


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


def parse_visits(text: str | None) -> tuple[int, ...] | None:
    """The tasks that `0,1,0` names.

    Raises:
        ValueError: one is no number.
    """
    if text is None:
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise ValueError(f"visits are numbers of tasks, as in 0,1,0, not {text!r}") from error


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


def _fail(console: Console, message: str, status: int) -> NoReturn:
    console.file.flush()
    Console(stderr=True).print(f"[red]engram-train:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(status)
