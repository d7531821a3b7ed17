"""Measure which memory of equal bytes forgets least: raw pixels, single JPEG files, or Engram's strips.

Fashion-MNIST in 5 tasks of 2 classes, class-incremental, learned by LUCIR. The arms differ in the memory:

    none                nothing is kept
    raw                 pixels, 784 bytes and a class id of 2 bytes each
    files, selected     one JPEG file each, at the quality that selection chooses
    strips, 10 .. 90    Engram's packs at one fixed quality for all tasks
    strips, selected    Engram's packs at the quality that selection chooses for the buffer
    joint               training from scratch on all images so far: no memory, the ceiling

Every byte of a memory counts: tables, markers, class ids and checksums. Strips are made by `engram.memory`, as in a
service, with the learner's exported extractor in its own process; `service_path_identical` says
that a real service, asked over HTTP, kept the same exemplars.

Where exemplars are JPEG, LUCIR shows half of a task's own images as JPEG gives them back (`codec_ratio`). Where they
are raw it does not, because that would cost raw pixels accuracy (4 points on a held-out seed).

The first task is learned before there is any memory, so it is learned once per seed and shared by the arms that learn
it alike.
Each finished run is one JSON file in `--out`, named by its configuration and by the code that it depends on: run the
same command again to go on after an interruption. Test images are the data set's 10,000; hyper-parameters were tuned
on held-out training images with seeds that are not among those here.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch

import engram.strip
import engram_trainer
from engram import Client
from engram.content import Policy
from engram.schemas import CANDIDATE_QUALITIES, Decision, IngestOptions
from engram.selection.images import ArrayImages
from engram.selection.quality import choose
from engram_service.embedder import OnnxEmbedder
from engram_trainer import datasets, evaluation, stream
from engram_trainer.configuration import RuntimeConfig
from engram_trainer.extractor import to_onnx
from engram_trainer.local_memory import LocalConfig, StripMemory
from engram_trainer.local_service import local_service
from engram_trainer.memory import Learned, Memory, NoMemory
from engram_trainer.methods import Learner, joint, lucir
from engram_trainer.plain_memory import PlainMemory
from engram_trainer.runtime import Runtime
from engram_trainer.service_memory import ServiceMemory

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""

SEEDS = (0, 1, 2)
BUDGETS = (4_000, 16_000)
"""Bytes per class; the total grows with the classes."""
NETWORK = "conv"

LUCIR = lucir.Config()
JOINT = joint.Config(epochs=10, batch_size=128, lr=0.05, flip=True, padding=2)
STREAM = stream.StreamConfig(tasks=5, train_per_class=1_500)
OPTIONS = IngestOptions()


@dataclass(frozen=True)
class Arm:
    """One kind of memory; `quality` None is the one that selection chooses."""

    name: str
    kind: str
    quality: int | None = None

    @property
    def has_memory(self) -> bool:
        """Whether the budget means anything to it."""
        return self.kind not in ("none", "joint")

    @property
    def is_jpeg(self) -> bool:
        """Whether its exemplars have been through JPEG."""
        return self.kind in ("strips", "files")

    @property
    def selects(self) -> bool:
        """Whether its quality is selected for each task."""
        return self.is_jpeg and self.quality is None


NONE, RAW, JOINTLY = Arm("none", "none"), Arm("raw", "raw"), Arm("joint", "joint")
FILES, SELECTED = Arm("files, selected", "files"), Arm("strips, selected", "strips")
FIXED = tuple(Arm(f"strips, {quality}", "strips", quality) for quality in CANDIDATE_QUALITIES)


ARMS = (NONE, RAW, FILES, *FIXED, SELECTED, JOINTLY)


@dataclass(frozen=True)
class Plan:
    """What a whole invocation runs."""

    data: str
    stream: stream.StreamConfig
    lucir: lucir.Config
    joint: joint.Config
    options: IngestOptions
    seeds: tuple[int, ...]
    budgets: tuple[int, ...]
    arms: tuple[Arm, ...]


FULL = Plan(
    str(FASHION_MNIST), STREAM, LUCIR, JOINT, OPTIONS, SEEDS, BUDGETS, (NONE, RAW, FILES, *FIXED, SELECTED, JOINTLY)
)


def quick(full: Plan) -> Plan:
    """A look at the same table in well under a minute: one seed, one budget, few images and epochs."""
    return replace(
        full,
        stream=replace(full.stream, train_per_class=200, test_per_class=200),
        lucir=replace(full.lucir, batch_size=32),
        seeds=(0,),
        budgets=full.budgets[:1],
        arms=(RAW, *[arm for arm in FIXED if arm.quality in (10, 50, 75)], SELECTED),
    )


@dataclass(frozen=True)
class Run:
    """One arm with one seed at one budget; `budget` is 0 where it has no meaning."""

    arm: Arm
    budget: int
    seed: int


class SelectedStrips(StripMemory):
    """Strips as a service makes them, extractor process and all, in this process."""

    def add(self, learned: Learned) -> None:
        """Keep what a service would keep."""
        model = learned.extractor
        assert model is not None
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            file.write(model)
            file.flush()
            with OnnxEmbedder(Path(file.name), hashlib.sha256(model).hexdigest()) as embedder:
                images = ArrayImages(learned.examples.read(), learned.examples.class_ids)
                self.put(learned.task, images, embedder, seed=learned.seed)


class SelectedFiles(PlainMemory):
    """One JPEG file for each exemplar, at the quality that selection chooses for strips in the same bytes."""

    def __init__(self, config: LocalConfig, strips: SelectedStrips) -> None:
        super().__init__(config)
        self.strips = strips

    def add(self, learned: Learned) -> None:
        """Choose the quality, then keep as many files as fit."""
        self.strips.add(learned)
        self.config = replace(self.config, quality=self.strips.quality)
        super().add(learned)


def memory_of(run: Run, plan: Plan) -> Memory:
    """The memory of an arm."""
    arm = run.arm
    if not arm.has_memory:
        return NoMemory()
    strips = SelectedStrips(Policy(run.budget, "class", quality=arm.quality), plan.options)
    if arm.kind == "strips":
        return strips
    config = LocalConfig(kind="raw" if arm.kind == "raw" else "files", budget_bytes=run.budget, per="class")
    return PlainMemory(config) if arm.kind == "raw" else SelectedFiles(config, strips)


def stream_of(plan: Plan, seed: int) -> stream.Stream:
    """The tasks of a seed: it draws their order and their training images."""
    return stream.build(datasets.load(plan.data), replace(plan.stream, seed=seed))


def learner_of(run: Run, plan: Plan, tasks: stream.Stream) -> Learner:
    """A fresh learner; its initial weights depend on the seed alone."""
    runtime = Runtime(RuntimeConfig(), tasks, seed=run.seed)
    if run.arm.kind == "joint":
        return joint.Joint(runtime, plan.joint, network=NETWORK)
    return lucir.Lucir(runtime, plan.lucir, network=NETWORK)


def ignore(done: int, total: int, *, loss: torch.Tensor) -> None:
    """Show no progress."""


def learn_base(run: Run, plan: Plan, path: Path) -> None:
    """The state of a run's LUCIR after its first task is at `path`."""
    torch.set_num_threads(1)
    if path.exists():
        return
    tasks = stream_of(plan, run.seed)
    learner = learner_of(run, plan, tasks)
    learner.learn(tasks.tasks[0], memory_of(run, plan), ignore)
    write(path, lambda temporary: torch.save(learner.state_dict(), temporary))


def execute(run: Run, plan: Plan, base: Path, path: Path) -> dict[str, Any]:
    """One complete run, from the state at `base`; its result is at `path` before this returns."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    tasks = stream_of(plan, run.seed)
    learner, memory = learner_of(run, plan, tasks), memory_of(run, plan)
    matrix: list[list[float]] = []
    for task in tasks.tasks:
        if task.index == 0 and run.arm.kind != "joint":
            learner.load_state_dict(torch.load(base, weights_only=True))
        else:
            learner.learn(task, memory, ignore)
        if run.arm.has_memory:
            model = to_onnx(learner.extractor(), tasks.shape)
            memory.add(Learned(task.index, task.train, model, learner.embed, seed=run.seed))
            learner.balance(task, memory, ignore)
        earlier = tasks.tasks[: task.index + 1]
        accuracies = [
            evaluation.accuracy(learner.scores, learner.runtime, each, learned=task.index) for each in earlier
        ]
        matrix.append([accuracy for accuracy in accuracies if accuracy is not None])
    metrics = evaluation.metrics(matrix, test_counts=[len(task.test) for task in tasks.tasks])
    selected = getattr(memory, "strips", memory) if run.arm.selects else None
    decisions: Mapping[int, Decision] = getattr(selected, "decisions", {})
    result = {
        "arm": run.arm.name,
        "budget_bytes_per_class": run.budget,
        "seed": run.seed,
        "last": 100 * metrics.last,
        "average_incremental": 100 * metrics.average_incremental,
        "incremental": [100 * accuracy for accuracy in metrics.incremental],
        "matrix": matrix,
        "used_bytes": memory.used_bytes,
        "exemplars": sum(sum(classes.values()) for classes in memory.counts().values()),
        "quality": getattr(memory, "quality", None),
        "qualities_alone": [choose([decision])[0] for _, decision in sorted(decisions.items())],
        "selection_seconds": sum(decision.seconds for decision in decisions.values()),
        "seconds": time.perf_counter() - start,
        "decisions": {str(task): decision.model_dump(mode="json") for task, decision in sorted(decisions.items())},
    }
    limit = run.budget * len(tasks.class_order)
    if memory.used_bytes > limit > 0:
        raise AssertionError(f"{run}: {memory.used_bytes} bytes used of {limit}")
    write(path, lambda temporary: temporary.write_text(json.dumps(result)))
    return result


@functools.cache
def code_version(arm: Arm) -> str:
    """Changes with the code that the results of an arm depend on, not with comments and docstrings.

    Looked at once: the worker processes have loaded the code by then, whatever happens to the files afterwards.
    """
    trainer, client = Path(engram_trainer.__file__).parent, Path(engram.strip.__file__).parent
    names = ["networks", "augment", "stream", "datasets", "evaluation", "methods/lucir"]
    if arm.kind == "joint":
        names += ["methods/joint", "methods/finetune", "methods/linear"]
    if arm.kind in ("raw", "files"):
        names.append("plain_memory")
    files = [trainer / f"{name}.py" for name in names] + [client / "strip.py", client / "shares.py"]
    if arm.is_jpeg:
        files += [trainer / "extractor.py", trainer / "local_memory.py", client / "pack.py", client / "memory.py"]
        files += sorted((client / "selection").glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [each for each in body if not _is_docstring(each)]  # type: ignore[attr-defined]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def base_path(run: Run, plan: Plan, folder: Path) -> Path:
    """Where the state after the first task is kept: the same for all arms that learn it alike."""
    return (
        folder / f"base-{run.seed}-{_key(replace(NONE, kind='base'), plan, plan.lucir, run.arm.is_jpeg, run.seed)}.pt"
    )


def run_path(run: Run, plan: Plan, folder: Path) -> Path:
    """Where the result of a run is kept."""
    method = plan.joint if run.arm.kind == "joint" else plan.lucir
    name = run.arm.name.replace(", ", "-")
    return folder / f"{name}-{run.budget}-{run.seed}-{_key(run.arm, plan, method, run.seed, run.budget)}.json"


def _key(arm: Arm, plan: Plan, *more: object) -> str:
    """A digest of everything that an arm's results depend on."""
    parts: list[object] = [
        code_version(arm),
        plan.data,
        plan.stream,
        NETWORK,
        *more,
    ]
    if arm.selects or arm.kind == "strips":
        parts.append(plan.options if arm.selects else (arm.quality, plan.options.ranking))
    return digest(parts)


def digest(*parts: object) -> str:
    """Names a configuration."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def write(path: Path, save: Any) -> None:
    """A file that is there is complete."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    save(temporary)
    temporary.replace(path)


def all_runs(plan: Plan) -> Iterator[Run]:
    """Seed by seed, so that an interrupted benchmark has whole seeds."""
    for seed in plan.seeds:
        for budget in plan.budgets:
            yield from (Run(arm, budget, seed) for arm in plan.arms if arm.has_memory)
        yield from (Run(arm, 0, seed) for arm in plan.arms if not arm.has_memory)


def collect(plan: Plan, folder: Path, *, jobs: int, minutes: float) -> list[dict[str, Any]]:
    """The results of all runs; those that are not in `folder` yet are run, none started after `minutes`."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    results = [json.loads(path.read_text()) for run in all_runs(plan) if (path := run_path(run, plan, folder)).exists()]
    todo = [run for run in all_runs(plan) if not run_path(run, plan, folder).exists()]
    with workers(jobs) as pool:
        bases = {base_path(run, plan, folder): run for run in todo if run.arm.kind != "joint"}
        for done in [pool.submit(learn_base, run, plan, path) for path, run in bases.items()]:
            done.result()
        pending: set[Future[dict[str, Any]]] = set()
        while todo or pending:
            while todo and len(pending) < jobs and time.monotonic() < deadline:
                run = todo.pop(0)
                paths = base_path(run, plan, folder), run_path(run, plan, folder)
                pending.add(pool.submit(execute, run, plan, *paths))
            if not pending:
                break
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                results.append(future.result())
                tell(results[-1])
    if todo:
        print(
            f"{len(todo)} runs are missing: {minutes:g} minutes are over; the same command goes on with them",
            flush=True,
        )
    return results


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes, since a forked torch may hang, of one thread each, whichever library computes."""
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def tell(result: Mapping[str, Any]) -> None:
    """One line for the log, on standard error so that `--json` stays one object."""
    line = f"{time.strftime('%H:%M:%S')} seed {result['seed']} {result['budget_bytes_per_class']:6} {result['arm']:17}"
    line += (
        f" last {result['last']:5.1f} average {result['average_incremental']:5.1f} exemplars {result['exemplars']:5}"
    )
    os.write(2, f"{line} {result['seconds']:4.0f} s {result['quality'] or ''} {result['qualities_alone']}\n".encode())


def service_path_is_identical(plan: Plan, folder: Path) -> bool:
    """Whether a real service, over HTTP, keeps the exemplars of the first task that `SelectedStrips` keeps."""
    seed, budget = plan.seeds[0], plan.budgets[0]
    run, tasks = Run(SELECTED, budget, seed), stream_of(plan, seed)
    base = base_path(run, plan, folder)
    learn_base(run, plan, base)
    learner = learner_of(run, plan, tasks)
    learner.load_state_dict(torch.load(base, weights_only=True))
    here = SelectedStrips(Policy(budget, "class"), plan.options)
    task, extractor = tasks.tasks[0], to_onnx(learner.extractor(), tasks.shape)
    with (
        tempfile.TemporaryDirectory() as scratch,
        local_service(Path(scratch) / "service") as service,
        Client(service.url) as client,
    ):
        client.create_buffer("bench", budget_bytes=budget, per="class")
        there = ServiceMemory(client, "bench", options=plan.options, run="bench", folder=Path(scratch) / "mirror")
        for memory in (here, there):
            memory.add(Learned(0, task.train, extractor, learner.embed, seed=seed))
        [ours], [theirs] = here.walk(10**6), there.walk(10**6)
        return here.used_bytes == there.used_bytes and all(
            np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in ("images", "class_ids", "rows")
        )


def mean(results: Sequence[Mapping[str, Any]], key: str) -> float:
    """Over seeds."""
    return statistics.fmean(float(result[key]) for result in results)


def spread(results: Sequence[Mapping[str, Any]], key: str) -> float:
    """Sample standard deviation over seeds; 0 with a single seed."""
    return statistics.stdev(float(result[key]) for result in results) if len(results) > 1 else 0.0


def of(results: Sequence[Mapping[str, Any]], arm: Arm, budget: int) -> list[Mapping[str, Any]]:
    """The results of an arm at a budget, by seed."""
    wanted = budget if arm.has_memory else 0
    found = [each for each in results if each["arm"] == arm.name and each["budget_bytes_per_class"] == wanted]
    return sorted(found, key=lambda result: int(result["seed"]))


def print_budget(results: Sequence[Mapping[str, Any]], plan: Plan, budget: int) -> None:
    """The accuracies at one budget."""
    rows = []
    for arm in plan.arms:
        found = of(results, arm, budget)
        if not found:
            continue
        qualities = [
            f"{each['quality']} ({' '.join(map(str, each['qualities_alone']))})"
            for each in found
            if each["qualities_alone"]
        ]
        rows.append(
            [
                arm.name,
                f"{mean(found, 'average_incremental'):.1f} ± {spread(found, 'average_incremental'):.1f}",
                f"{mean(found, 'last'):.1f} ± {spread(found, 'last'):.1f}",
                f"{mean(found, 'exemplars') / 10:.1f}" if arm.has_memory else None,
                f"{mean(found, 'used_bytes'):,.0f}" if arm.has_memory else None,
                "; ".join(qualities) or None,
                len(found),
            ]
        )
    columns = (
        "memory",
        "average incremental",
        "last",
        "exemplars/class",
        "bytes",
        "quality (by each task alone); seed",
        "seeds",
    )
    report.print_table(f"{budget:,} bytes per class: accuracy in percent, mean ± sd over seeds", columns, rows)


def headline(results: Sequence[Mapping[str, Any]], plan: Plan, budget: int) -> dict[str, float | None]:
    """The claim in numbers, at one budget; positive gains are Engram's."""
    numbers: dict[str, float | None] = {}
    selected, raw, files = (of(results, arm, budget) for arm in (SELECTED, RAW, FILES))
    fixed = {arm.quality: found for arm in plan.arms if arm.quality is not None and (found := of(results, arm, budget))}
    for key, suffix in (("last", ""), ("average_incremental", "_average")):
        if selected and raw:
            numbers[f"gain_over_raw_points{suffix}"] = round(mean(selected, key) - mean(raw, key), 2)
        if selected and files:
            numbers[f"gain_over_files_points{suffix}"] = round(mean(selected, key) - mean(files, key), 2)
        if selected and fixed:
            best = max(fixed, key=lambda quality: mean(fixed[quality], key))
            numbers[f"best_fixed_quality{suffix}"] = best
            numbers[f"gap_to_best_fixed_quality_points{suffix}"] = round(
                mean(fixed[best], key) - mean(selected, key), 2
            )
    if selected and len(fixed) == len(CANDIDATE_QUALITIES):
        grid = sum(mean(found, "seconds") for found in fixed.values())
        numbers["selection_share_of_grid_search"] = round(mean(selected, "selection_seconds") / grid, 4)
    return numbers


def main() -> None:
    """Run what is missing, print the tables."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", default=str(FASHION_MNIST), help="folder with Fashion-MNIST's IDX files")
        parser.add_argument("--out", type=Path, default=Path("runs/budget"), help="folder of finished runs")
        names = [arm.name for arm in ARMS]
        parser.add_argument("--arms", nargs="+", choices=names, metavar="ARM", help=f"only these: {'; '.join(names)}")
        parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
        parser.add_argument("--minutes", type=float, default=120, help="start no run after so many")

    args = report.parse_args("at equal bytes, which memory forgets least?", add)
    torch.set_num_threads(1)
    chosen = tuple(arm for arm in ARMS if arm.name in args.arms) if args.arms else ARMS
    plan = replace(FULL, data=args.data, arms=chosen)
    if args.quick:
        plan = quick(plan)
    results = collect(plan, args.out, jobs=args.jobs, minutes=args.minutes)
    flat: dict[str, Any] = {}
    for budget in plan.budgets:
        print_budget(results, plan, budget)
        numbers = headline(results, plan, budget)
        if budget == plan.budgets[0]:
            flat |= numbers
        flat |= {f"{key}_{budget}": value for key, value in numbers.items()}
        for arm in (arm for arm in plan.arms if of(results, arm, budget)):
            found = of(results, arm, budget)
            slug = f"{arm.name.replace(', ', '_')}_{budget}"
            flat |= {f"last_{slug}": round(mean(found, "last"), 2)}
            flat |= {f"average_{slug}": round(mean(found, "average_incremental"), 2)}
    flat["runs"] = len(results)
    flat["service_path_identical"] = service_path_is_identical(plan, args.out)
    flat["epsilon"], flat["block"] = plan.options.epsilon, plan.options.block
    report.print_table("LUCIR", ("setting", "value"), [(key, str(value)) for key, value in asdict(plan.lucir).items()])
    report.finish(args, flat)


if __name__ == "__main__":
    main()
