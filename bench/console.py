"""How long do the pages of the console take, and does the grid of exemplars stay fast at 1 million?

Buffers of 16x16 patches of scikit-learn's two photographs, with a score and a key each, ten tasks of ten classes, are
put into the store as they would lie there after uploads: one of 10 thousand exemplars and one of a million (100
thousand with --quick). A service process is started on them. Pages are asked for over one connection, in turn from the
two buffers, and medians of the rounds are compared: so a busy machine slows both alike. Times are those of a client,
from the request to the last byte; CPU times are those of the service process, for one page.

Deep pages begin in the middle of the buffer. A common filter passes one exemplar in two, a rare one none: then a page
ends when 65,536 exemplars have been looked at, and has the cursor to go on from.
"""

from __future__ import annotations

import http.client
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import psutil
from report import Cell, finish, parse_args, print_table
from sklearn.datasets import load_sample_images

from engram import memory, pack, strip
from engram.content import Content, Policy
from engram.fields import Schema
from engram.schemas import BufferCreate, IngestOptions
from engram.selection.embedding import BuiltinEmbedder
from engram.selection.images import ArrayImages
from engram_service import buffers
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import PackRow, TaskRow
from engram_trainer.local_service import local_service

UInt8Array = npt.NDArray[np.uint8]

SIDE = 16
TASKS, CLASSES_PER_TASK = 10, 10
SMALL, LARGE, QUICK_LARGE = 10_000, 1_000_000, 100_000
POOL = 4000
FIELDS = {"key": "utf8", "score": "float32"}

GRID = "/console/buffers/{buffer}/exemplars"
API = "/v1/buffers/{buffer}/exemplars?limit=100"
PAGES = {
    "grid": GRID,
    "grid, deep": f"{GRID}?cursor=4.45.3",
    "grid of a class": f"{GRID}?class_id=77",
    "grid by bytes": f"{GRID}?min_bytes=60",
    "grid by a field": f"{GRID}?where={quote('score:ge:0.5')}",
    "API, deep": f"{API}&cursor=4.45.3",
    "API by a field": f"{API}&where={quote('score:ge:0.5')}",
}
"""Those that must not take longer of a large buffer."""

OTHERS = {
    "overview": "/console",
    "task": "/console/buffers/{buffer}/tasks/3",
    "exemplar": "/console/buffers/{buffer}/exemplars/{pack}/7",
    "map, made before": "/console/buffers/{buffer}/tasks/3/map",
    "histograms, counted before": "/console/buffers/{buffer}/histograms",
    "grid by a rare value": f"{GRID}?where={quote('key:eq:nobody has it')}",
}
FIRST = {"map": OTHERS["map, made before"], "histograms": OTHERS["histograms, counted before"]}
MOST_MS = 100.0


def main() -> None:
    args = parse_args("how long do the console's pages take, and does the grid stay fast at 1 million exemplars?")
    sizes = {"small": SMALL, "large": QUICK_LARGE if args.quick else LARGE}
    rounds = 15 if args.quick else 60
    with tempfile.TemporaryDirectory() as folder:
        digests = {name: keep(Path(folder), name, count) for name, count in sizes.items()}
        with local_service(folder, "--workers", "0") as served:
            process = psutil.Process(served.process.pid)
            connection = http.client.HTTPConnection("127.0.0.1", int(served.url.rpartition(":")[2]), timeout=120)
            paths = {name: {"buffer": name, "pack": digest} for name, digest in digests.items()}
            first = {
                what: {name: timed(connection, path.format(**given)) for name, given in paths.items()}
                for what, path in FIRST.items()
            }
            found = {
                what: measure(
                    connection, process, {name: path.format(**given) for name, given in paths.items()}, rounds
                )
                for what, path in {**PAGES, **OTHERS}.items()
            }
    columns = ("page", f"{sizes['small']:,} ms", f"{sizes['large']:,} ms", "large / small", "CPU ms", "CPU ms, large")
    rows = [(what, *each) for what, each in found.items()]
    print_table("Pages, from a client; medians", columns, rows)
    print_table(
        "The first time in a generation",
        ("page", f"{sizes['small']:,} ms", f"{sizes['large']:,} ms"),
        [(what, each["small"], each["large"]) for what, each in first.items()],
    )
    flat: dict[str, Cell] = {
        "grid_large_to_small": max(found[what][2] for what in PAGES),
        "slowest_page_ms": max(each[1] for each in found.values()),
        "slowest_page_cpu_ms": max(each[4] for each in found.values()),
        "first_map_ms": first["map"]["large"],
        "first_histograms_ms": first["histograms"]["large"],
        "exemplars": sizes["large"],
    }
    finish(args, flat)


def measure(
    connection: http.client.HTTPConnection, process: psutil.Process, paths: Mapping[str, str], rounds: int
) -> tuple[float, float, float, float, float]:
    """Medians of milliseconds of both buffers, the median of the rounds' ratios, and CPU milliseconds of both."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    cpu = dict.fromkeys(paths, 0.0)
    for path in paths.values():
        timed(connection, path)
    for _ in range(rounds):
        for name, path in paths.items():
            before = cpu_s(process)
            times[name].append(timed(connection, path))
            cpu[name] += 1000 * (cpu_s(process) - before) / rounds
    small, large = (times[name] for name in paths)
    ratio = median(b / a for a, b in zip(small, large, strict=True))
    small_cpu, large_cpu = cpu.values()
    return median(small), median(large), ratio, small_cpu, large_cpu


def timed(connection: http.client.HTTPConnection, path: str) -> float:
    start = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{path} was answered with {answer.status}: {body[:300].decode()}")
    return 1000 * (time.perf_counter() - start)


def cpu_s(process: psutil.Process) -> float:
    found = process.cpu_times()
    return float(found.user + found.system)


def keep(folder: Path, name: str, count: int) -> str:
    """The data folder has a buffer of this name, as if it had been uploaded; the digest of one of its packs."""
    settings = Settings(data_dir=folder / "data")
    settings.make_folders()
    store, database = PackStore(settings.packs_dir), Database(settings)
    if database.schema_state() == "empty":
        database.migrate()
    schema, rng = Schema.declare(FIELDS), np.random.default_rng(0)
    patches = cut_patches(POOL)
    columns = schema.columns({"key": [f"{n:08d}" for n in range(POOL)], "score": rng.random(POOL, np.float32)}, POOL)
    records = columns.records(np.arange(POOL))
    pool = strip.encode(patches, np.zeros(POOL, np.int64), quality=50, schema=schema, records=records)
    chosen = memory.add(
        Content(Policy(10_000)),
        memory.Upload(0, ArrayImages(patches[:400], np.arange(400) % CLASSES_PER_TASK), IngestOptions()),
        BuiltinEmbedder((SIDE, SIDE, 3)),
    )
    decision = chosen.tasks[0].decision
    assert decision is not None, "an upload brings a decision"
    entries = []
    for task in range(TASKS):
        class_ids = np.repeat(np.arange(task, task + 1) * CLASSES_PER_TASK, count // TASKS) + np.repeat(
            np.arange(CLASSES_PER_TASK), count // TASKS // CLASSES_PER_TASK
        )
        exemplars = replace(pool.select(rng.integers(0, POOL, len(class_ids))), class_ids=class_ids)
        entries.append((store.keep(task, exemplars), pack.class_bytes(exemplars)))
    used = sum(entry.bytes for entry, _ in entries)
    with database.session() as session:
        buffers.create(session, BufferCreate(name=name, budget_bytes=used, quality=50, fields=FIELDS))
        row = buffers.find(session, name)
        row.height, row.width, row.channels = SIDE, SIDE, 3
        session.flush()
        for entry, class_bytes in entries:
            values = entry.model_dump(exclude={"runs"}) | {"runs": [list(run) for run in entry.runs]}
            session.add(PackRow(buffer=name, since=0, class_bytes=class_bytes, **values))
            seen = {str(class_id): held for class_id, held in entry.runs}
            made = decision.model_dump(mode="json")
            session.add(TaskRow(buffer=name, task=entry.task, seen=seen, decision=made))
    database.close()
    return entries[3][0].digest


def cut_patches(count: int) -> UInt8Array:
    """So many patches of scikit-learn's two photographs, in random order."""
    rng = np.random.default_rng(0)
    found = []
    for image in load_sample_images().images:
        tops, lefts = (rng.integers(0, side - SIDE, count // 2) for side in image.shape[:2])
        found.append(np.stack([image[y : y + SIDE, x : x + SIDE] for y, x in zip(tops, lefts, strict=True)]))
    patches: UInt8Array = np.concatenate(found)
    return patches[rng.permutation(len(patches))]


if __name__ == "__main__":
    main()
