"""How many images a second reach a trainer, from the service and from a mirror?

A service process is started as a user starts it, and filled through real uploads: 32x32 patches of scikit-learn's two
photographs at quality 50, ten tasks of ten classes, one buffer of 10 thousand exemplars and one of a million (50
thousand with --quick). A draw is 256 exemplars, from URL to uint8 arrays. Rates are of `ReplayLoader`: "inline" is
`threads=0`, where only the service works ahead and the headline comes from, "2 threads" is the default. Times of
single draws are of `Client.draw`, which waits for each answer, in turn from the two buffers.

Everything is measured in rounds, and what is compared is measured in the same round; medians over rounds are reported.
Pillow decodes the exemplars of such draws as stand-alone JPEG files, one by one. CPU times are those of the
processes, so they hold on a busy machine too: the sum of both, over the number of cores, bounds the rate.

A first draw is that of a service process that has just started, its packs in the page cache, their indexes there: from
the request to the last byte of the answer, on a connection that is open, the median of some restarts.

Growth with tasks is measured without HTTP, which would hide it: the service's `Replay` makes a draw from its packs and
`batch.decode` reads it, in turn from 100,000 exemplars in 10 tasks and the same in 1,000, ten classes a task.
"""

from __future__ import annotations

import http.client
import io
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image
from report import Cell, finish, parse_args, print_table
from sklearn.datasets import load_sample_images

from engram import Client, IngestOptions, Mirror, ReplayLoader, batch, pack, strip
from engram.draw import Request
from engram.mirror import Snapshot
from engram.packs import PackCache
from engram.schemas import BufferCreate, Manifest, PackEntry, Strategy
from engram_service import buffers
from engram_service.database import Database
from engram_service.replay import Replay, View
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import PackRow
from engram_trainer.local_service import local_service

UInt8Array = npt.NDArray[np.uint8]

SIDE = 32
SIZE = 256
TASKS = 10
CLASSES_PER_TASK = 10
SMALL, LARGE, QUICK_LARGE = 10_000, 1_000_000, 50_000
FEW_TASKS, MANY_TASKS, POOLED = 10, 1000, 100_000
STRATEGIES: tuple[Strategy, ...] = ("uniform", "class_balanced")
MODES = {"inline": 0, "2 threads": 2}
Source = Mirror | tuple[Client, str]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    large: int
    rounds: int
    rate_s: float
    single_draws: int
    restarts: int


class Counted(Client):
    """A client that counts the bytes of the packs that it fetches."""

    fetched_bytes = 0

    def pack(self, digest: str) -> bytes:
        """As `Client.pack`."""
        content = super().pack(digest)
        self.fetched_bytes += len(content)
        return content


def main() -> None:
    args = parse_args("how many images a second reach a trainer, from the service and from a mirror?")
    plan = Plan(QUICK_LARGE, 3, 0.4, 60, 1) if args.quick else Plan(LARGE, 7, 3.0, 400, 5)
    with tempfile.TemporaryDirectory() as folder, local_service(folder) as served, Client(served.url) as client:
        url, service = served.url, psutil.Process(served.process.pid)
        sizes = {"small": SMALL, "large": plan.large}
        for name, count in sizes.items():
            fill(client, name, count)
        mirrors = {name: Mirror(client, name, Path(folder) / name) for name in sizes}
        rounds = [one_round(client, mirrors["small"], service, plan) for _ in range(plan.rounds)]
        print_rates(rounds)
        four = four_clients(url, Path(folder), plan)
        print_table(
            "Four client processes at once, 10 thousand exemplars, uniform",
            ("source", "images/s, all clients together"),
            list(four.items()),
        )
        growth = growths(client, mirrors, plan)
        firsts = {"first_draw_after_restart_ms": first_draw_ms(Path(folder), "large", plan)}
        with tempfile.TemporaryDirectory() as packs:
            by_tasks = growths_with_tasks(Path(packs), plan)
            keep_buffer(Path(packs), plan)
            firsts["first_draw_of_1000_packs_ms"] = first_draw_ms(Path(packs), "b", plan)
        print_table(f"First draw after a restart, {plan.large:,} exemplars", ("", "ms"), list(firsts.items()))
        refetched = refetch_ratio(url, Path(folder) / "large", plan)
    finish(
        args,
        {
            "remote_images_per_s": median(r["remote uniform inline"] for r in rounds),
            "remote_vs_pillow_decode": median(r["remote uniform inline"] / r["pillow"] for r in rounds),
            "mirror_images_per_s": median(r["mirror uniform inline"] for r in rounds),
            "growth_10k_to_1m": growth,
            "growth_is_to_exemplars": plan.large,
            **by_tasks,
            **firsts,
            "mirror_refetch_ratio": refetched,
            "pillow_images_per_s": median(r["pillow"] for r in rounds),
            "client_cpu_ms_per_draw": median(r["client cpu ms uniform inline"] for r in rounds),
            "service_cpu_ms_per_draw": median(r["service cpu ms uniform inline"] for r in rounds),
        },
    )


def fill(client: Client, name: str, exemplars: int) -> None:
    """A buffer of this many exemplars, uploaded task by task."""
    client.create_buffer(name, budget_bytes=1000 * exemplars, quality=50)
    per_class = exemplars // (TASKS * CLASSES_PER_TASK)
    options = IngestOptions(ranking="random")
    for task in range(TASKS):
        classes = np.arange(task * CLASSES_PER_TASK, (task + 1) * CLASSES_PER_TASK)
        class_ids = np.repeat(classes, per_class)
        client.wait(client.upload(name, task, cut_patches(len(class_ids), seed=task), class_ids, options=options))
    found = client.buffer(name).exemplars
    if found != exemplars:
        raise RuntimeError(f"the buffer {name} holds {found} exemplars, {exemplars} were uploaded")


def cut_patches(count: int, seed: int) -> UInt8Array:
    """Patches of two photographs, from random places."""
    photographs = np.stack(load_sample_images().images)
    windows = np.lib.stride_tricks.sliding_window_view(photographs, (SIDE, SIDE), axis=(1, 2))
    generator = np.random.default_rng(seed)
    which, top, left = (generator.integers(0, limit, count) for limit in windows.shape[:3])
    return np.ascontiguousarray(windows[which, top, left].transpose(0, 2, 3, 1))


def one_round(client: Client, mirror: Mirror, service: psutil.Process, plan: Plan) -> dict[str, float]:
    """Images per second of everything that is compared, measured one after the other, and CPU milliseconds."""
    found: dict[str, float] = {"pillow": pillow_rate(mirror.snapshot(), plan.rate_s / 2)}
    sources: dict[str, Source] = {"remote": (client, "small"), "mirror": mirror}
    for (name, source), strategy, (mode, threads) in product(sources.items(), STRATEGIES, MODES.items()):
        before, own_before = cpu_s(service), time.process_time()
        draws, seconds = run(ReplayLoader(source, SIZE, strategy=strategy, threads=threads), plan.rate_s)
        found[f"{name} {strategy} {mode}"] = SIZE * draws / seconds
        if name == "remote":
            found[f"service cpu ms {strategy} {mode}"] = 1000 * (cpu_s(service) - before) / draws
            found[f"client cpu ms {strategy} {mode}"] = 1000 * (time.process_time() - own_before) / draws
    return found


def run(loader: ReplayLoader, seconds: float) -> tuple[int, float]:
    """Draws taken, and the seconds they took, once the prefetching is under way."""
    with loader:
        for _ in range(8):
            next(loader)
        draws, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            next(loader)
            draws += 1
        return draws, time.perf_counter() - start


def pillow_rate(snapshot: Snapshot, seconds: float) -> float:
    """Images per second that Pillow decodes from files in memory, one by one."""
    parts = [part for step in range(4) for part in snapshot.parts(Request(SIZE, step=step))]
    files = [file for part in parts for file in part.exemplars.files()]
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for file in files:
            np.asarray(Image.open(io.BytesIO(file)))
        images += len(files)
    return images / (time.perf_counter() - start)


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def print_rates(rounds: list[dict[str, float]]) -> None:
    rows = []
    for name in rounds[0]:
        if "cpu" not in name:
            values = [r[name] for r in rounds]
            per_pillow = median(r[name] / r["pillow"] for r in rounds)
            rows.append((name, median(values), median(values) / SIZE, min(values), max(values), per_pillow))
    columns = ("source, strategy, loader", "images/s", "draws/s", "least", "most", "times Pillow")
    print_table(f"One client, 10 thousand exemplars, {SIZE} of {SIDE}x{SIDE} a draw", columns, rows)
    cpu = [(name, median(r[name] for r in rounds)) for name in rounds[0] if "cpu" in name]
    print_table("CPU of a remote draw", ("process, strategy, loader", "ms"), cpu)


def growths(client: Client, mirrors: dict[str, Mirror], plan: Plan) -> float:
    """The median time of a single remote draw from the large buffer over that from the small one, uniform."""
    rows, answer = [], 0.0
    for strategy in STRATEGIES:
        for source in ("service", "mirror"):
            draws: dict[str, Callable[..., Any]] = {
                name: partial(mirror.draw, SIZE)
                if source == "mirror"
                else partial(client.draw, name, SIZE, generation=mirror.generation)
                for name, mirror in mirrors.items()
            }
            small, large = single_draw_s(draws, strategy, plan.single_draws)
            rows.append((source, strategy, 1000 * small, 1000 * large, large / small))
            if (source, strategy) == ("service", "uniform"):
                answer = large / small
    columns = ("source", "strategy", "10 thousand, ms", f"{plan.large:,}, ms", "growth")
    print_table("Median time of a single draw", columns, rows)
    return answer


def single_draw_s(draws: dict[str, Callable[..., Any]], strategy: Strategy, count: int) -> tuple[float, float]:
    """Median seconds of a draw from the small and the large buffer, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in draws}
    for step in range(count + 10):
        for name, draw in draws.items():
            start = time.perf_counter()
            draw(step=step, strategy=strategy)
            times[name].append(time.perf_counter() - start)
    return median(times["small"][10:]), median(times["large"][10:])


def first_draw_ms(folder: Path, buffer: str, plan: Plan) -> float:
    """Median milliseconds of the first draw of a service process that has just started on this data folder."""
    times = []
    for restart in range(plan.restarts):
        with local_service(folder, "--workers", "0") as served:
            connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
            connection.connect()
            start = time.perf_counter()
            connection.request("GET", f"/v1/buffers/{buffer}/draw?size={SIZE}&step={restart}")
            answer = connection.getresponse()
            body = answer.read()
            times.append(1000 * (time.perf_counter() - start))
            connection.close()
            if answer.status != 200:
                raise RuntimeError(f"the first draw was answered with {answer.status}: {body.decode()}")
    return median(times)


def keep_buffer(folder: Path, plan: Plan) -> None:
    """The data folder has a buffer "b" in 1,000 packs, as if they had been uploaded."""
    settings = Settings(data_dir=folder / "data")
    settings.make_folders()
    store, database = PackStore(settings.packs_dir), Database(settings)
    database.migrate()
    pool = strip.encode(cut_patches(2000, seed=0), np.zeros(2000, np.int64), quality=50)
    manifest = spread(pool, MANY_TASKS, store, plan.large)
    with database.session() as session:
        buffers.create(session, BufferCreate(name="b", budget_bytes=manifest.used_bytes, quality=50))
        session.flush()
        for entry in manifest.packs:
            store.write_index(entry.digest, pack.parse(store.get(entry.digest)))
            values = entry.model_dump(exclude={"runs"}) | {"runs": [list(run) for run in entry.runs]}
            session.add(PackRow(buffer="b", since=0, class_bytes=[0] * len(entry.runs), **values))
    database.close()


def refetch_ratio(url: str, folder: Path, plan: Plan) -> float:
    """Bytes that a mirror of the large buffer fetches after one more task, when it is full, over those of its pack."""
    with Counted(url) as client:
        client.change_budget("large", client.buffer("large").used_bytes)
        mirror = Mirror(client, "large", folder)
        client.fetched_bytes = 0
        per_class = plan.large // (TASKS * CLASSES_PER_TASK)
        class_ids = np.repeat(np.arange(TASKS * CLASSES_PER_TASK, (TASKS + 1) * CLASSES_PER_TASK), per_class)
        options = IngestOptions(ranking="random")
        client.wait(client.upload("large", TASKS, cut_patches(len(class_ids), seed=TASKS), class_ids, options=options))
        before, start = {entry.digest for entry in mirror.manifest.packs}, time.perf_counter()
        mirror.refresh()
        took = time.perf_counter() - start
        new = [entry for entry in mirror.manifest.packs if entry.digest not in before]
        news = next(entry.bytes for entry in new if entry.task == TASKS)
        columns = ("packs", "changed", "bytes in all", "of the new pack", "fetched", "seconds")
        used = mirror.manifest.used_bytes
        row = (len(mirror.manifest.packs), len(new), used, news, client.fetched_bytes, took)
        print_table("A mirror after one more task in a full buffer", columns, [row])
        return client.fetched_bytes / news


def growths_with_tasks(folder: Path, plan: Plan) -> dict[str, float]:
    """How much longer and larger draws are when the same exemplars lie in 1,000 tasks instead of 10."""
    settings = Settings(data_dir=folder)
    store = PackStore(settings.packs_dir)
    pool = strip.encode(cut_patches(2000, seed=0), np.zeros(2000, np.int64), quality=50)
    replay = Replay(Database(settings), PackCache(store, 10**9), settings)
    views = {tasks: View("b", tasks, 0.0, spread(pool, tasks, store).packs) for tasks in (FEW_TASKS, MANY_TASKS)}
    rows: list[tuple[Cell, ...]] = []
    ratios: dict[str, tuple[float, float]] = {}
    strategies: tuple[Strategy, ...] = ("uniform", "task_balanced", "class_balanced")
    for view in views.values():
        replay.cache.hold(view.digests)
        for digest, count in zip(view.digests, view.counts, strict=True):
            replay.cache.whole(digest, count)
    for strategy in strategies:
        seconds: dict[int, list[float]] = {tasks: [] for tasks in views}
        sizes: dict[int, list[int]] = {tasks: [] for tasks in views}
        for step in range(2 * plan.single_draws + 10):
            for tasks, view in views.items():
                start = time.perf_counter()
                drawn = replay.draw(view, Request(SIZE, step=step, strategy=strategy))
                assert drawn is not None, "packs may be loaded"
                batch.decode(drawn.body)
                seconds[tasks].append(time.perf_counter() - start)
                sizes[tasks].append(len(drawn.body))
        few, many = (median(seconds[tasks][10:]) for tasks in views)
        few_bytes, many_bytes = (median(sizes[tasks]) for tasks in views)
        # Of draws made one right after the other, so that a busy machine slows both alike.
        growth = median(b / a for a, b in zip(*seconds.values(), strict=True))
        ratios[strategy] = growth, many_bytes / few_bytes
        rows.append((strategy, 1000 * few, 1000 * many, growth, few_bytes, many_bytes, many_bytes / few_bytes))
    columns = (
        "strategy",
        "10 tasks, ms",
        "1,000 tasks, ms",
        "growth",
        "10 tasks, bytes",
        "1,000 tasks, bytes",
        "growth",
    )
    print_table(f"A draw from {POOLED:,} exemplars, made and decoded", columns, rows)
    time_growth, bytes_growth = zip(ratios["uniform"], ratios["task_balanced"], strict=True)
    return {
        "growth_10_to_1000_tasks": max(time_growth),
        "bytes_10_to_1000_tasks": max(bytes_growth),
        "growth_class_balanced_10000_classes": ratios["class_balanced"][0],
    }


def spread(pool: strip.Exemplars, tasks: int, store: PackStore, exemplars_in_all: int = POOLED) -> Manifest:
    """A generation of this many tasks, its packs made of exemplars of the pool."""
    count = exemplars_in_all // tasks
    rng = np.random.default_rng(tasks)
    entries = []
    for task in range(tasks):
        class_ids = np.repeat(
            np.arange(task * CLASSES_PER_TASK, (task + 1) * CLASSES_PER_TASK), count // CLASSES_PER_TASK
        )
        exemplars = replace(pool.select(rng.integers(0, len(pool), count)), class_ids=class_ids)
        content = pack.to_bytes(exemplars)
        digest = pack.digest(content)
        store.path(digest).parent.mkdir(parents=True, exist_ok=True)
        store.path(digest).write_bytes(content)  # `put` would wait for the disk a thousand times
        runs = strip.runs_of(class_ids)
        entries.append(PackEntry(digest=digest, task=task, bytes=len(content), exemplars=count, quality=50, runs=runs))
    used = sum(entry.bytes for entry in entries)
    shape = pool.form.shape
    return Manifest(buffer="b", generation=0, used_bytes=used, limit_bytes=used, image_shape=shape, packs=entries)


def four_clients(url: str, folder: Path, plan: Plan) -> dict[str, float]:
    """Images per second of four processes that draw at the same time."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for source in ("service", "mirror"):
        start = context.Barrier(4)
        answers: multiprocessing.Queue[float] = context.Queue()
        arguments = (url, source, folder, 2 * plan.rate_s, start, answers)
        processes = [context.Process(target=one_of_four, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        found[source] = sum(answers.get(timeout=120) for _ in processes)
        for process in processes:
            process.join()
    return found


def one_of_four(url: str, source: str, folder: Path, seconds: float, start: Any, answers: Any) -> None:
    with Client(url) as client:
        mirror = Mirror(client, "small", folder / "small") if source == "mirror" else None
        loader = ReplayLoader(mirror or (client, "small"), SIZE, threads=0)
        next(loader)
        start.wait()
        draws, took = run(loader, seconds)
        answers.put(SIZE * draws / took)


if __name__ == "__main__":
    main()
