"""Run jobs side by side and keep each result as a small JSON file, so that any interruption can go on.

    results/TABLE/seed-SEED/NAME-DIGEST.json

The digest is of the job's configuration: a job whose file is there is done. A result also says which code made it
(`code`), with which versions and in how many seconds, and tables tell how many kinds of code they are from. Code may
change without its results: what a change means for a table is a person's judgement, `stale` says which results it is
about, and deleting their files has them made anew.

Jobs run in fresh processes of one thread each, in the given order: list them seed by seed, and an interrupted table has
whole seeds.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import report
import torch

import engram
import engram_trainer

RESULTS = Path(__file__).parent / "results"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Result = dict[str, Any]


class Unfinished(Exception):
    """A run has used up its time. What it has done is kept elsewhere, and the next call goes on with it."""


@dataclass(frozen=True)
class Job:
    """One run."""

    table: str
    """The folder of its results: a script, and a data set if it has several."""
    name: str
    """What tells it from others of its table and seed, for people: `lucir strips-50 16000`."""
    seed: int
    config: Any
    """Everything else that its result depends on: a dataclass whose `repr` says all."""

    def path(self, folder: Path = RESULTS) -> Path:
        """Where its result is once it is done."""
        name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in self.name)
        return folder / self.table / f"seed-{self.seed}" / f"{name}-{digest(self.name, self.config)}.json"


def digest(*parts: object) -> str:
    """Names a configuration."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


def load(jobs: Iterable[Job], folder: Path = RESULTS) -> dict[Job, Result]:
    """The results of those jobs that are done."""
    return {job: json.loads(path.read_text()) for job in jobs if (path := job.path(folder)).exists()}


def complete_seeds(jobs: Iterable[Job], results: Mapping[Job, Result]) -> list[int]:
    """The seeds of which every job is done."""
    jobs = list(jobs)
    return sorted({job.seed for job in jobs} - {job.seed for job in jobs if job not in results})


def collect(
    jobs: Sequence[Job],
    execute: Callable[[Job], Result],
    *,
    folder: Path = RESULTS,
    processes: int = 2,
    minutes: float = float("inf"),
    tell: Callable[[Job, Result], str] = lambda job, result: "",
) -> dict[Job, Result]:
    """The results of all jobs; those that are not in `folder` yet are run, none started after `minutes`.

    Args:
        jobs: in the order in which they are run.
        execute: runs one in another process, so it is a function of a module; what it returns is kept as JSON. It may
            raise `Unfinished`, which leaves the job for the next time.
        folder: where results are.
        processes: so many at once.
        minutes: what is not begun by then is left for the next time.
        tell: a few words about a result for the log.
    """
    deadline = time.monotonic() + 60 * minutes
    results = load(jobs, folder)
    todo = [job for job in jobs if job not in results]
    unfinished = 0
    if not todo:
        return results
    with workers(processes) as pool:
        pending: dict[Future[Result], Job] = {}
        while todo or pending:
            while todo and len(pending) < processes and time.monotonic() < deadline:
                job = todo.pop(0)
                pending[pool.submit(_run, job, execute, folder)] = job
            if not pending:
                break
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                job = pending.pop(future)
                try:
                    results[job] = future.result()
                except Unfinished:
                    unfinished += 1
                    continue
                _log(f"{job.table} seed {job.seed} {job.name}", tell(job, results[job]), results[job]["seconds"])
    if todo or unfinished:
        missing = len(todo) + unfinished
        _log(f"{missing} runs are missing: {minutes:g} minutes are over; the same command goes on with them")
    return {job: results[job] for job in jobs if job in results}


@contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes, since a forked torch may hang, of one thread each, whichever library computes."""
    os.environ |= dict.fromkeys(THREADS, "1")
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin) as pool:
        yield pool


def _begin() -> None:
    # An interruption ends the parent, which ends the pool: two traces of it would say no more than one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # A parent that is killed says nothing: its workers would go on, beside those of the next one.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker"
    parent.join()
    os._exit(1)


def _run(job: Job, execute: Callable[[Job], Result], folder: Path) -> Result:
    start = time.perf_counter()
    result = execute(job)
    result |= {
        "table": job.table,
        "name": job.name,
        "seed": job.seed,
        "config": asdict(job.config) if is_dataclass(job.config) and not isinstance(job.config, type) else job.config,
        "seconds": round(time.perf_counter() - start, 1),
        "code": code_version(),
        "versions": report.versions(),
    }
    path = job.path(folder)
    write(path, lambda temporary: temporary.write_text(json.dumps(result, default=_plain, indent=None) + "\n"))
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    """What JSON has no form for."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "item"):
        return value.item()
    return str(value)


def write(path: Path, save: Callable[[Path], object]) -> None:
    """A file that is there is complete; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    save(temporary)
    temporary.replace(path)


def stale(results: Iterable[Result]) -> list[Result]:
    """Those that other code made than this."""
    return [result for result in results if result["code"] != code_version()]


@functools.cache
def code_version() -> str:
    """Changes with the client's and the trainer's code, not with its comments and docstrings.

    Looked at once: a process has loaded the code by then, whatever happens to the files afterwards.
    """
    made = hashlib.sha256()
    for package in (engram, engram_trainer):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*.py")):
            tree = ast.parse(file.read_text())
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                if isinstance(body, list):
                    node.body = [each for each in body if not _is_docstring(each)]  # type: ignore[attr-defined]
            made.update(f"{file.relative_to(root)}\0{ast.dump(tree)}".encode())
    return made.hexdigest()[:12]


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The switches of a script that keeps its runs."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of finished runs (default bench/results)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default 2)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many")


def _log(*words: object) -> None:
    """One line on standard error, so that `--json` stays one object."""
    os.write(2, f"{time.strftime('%H:%M:%S')} {' '.join(map(str, words))}\n".encode())
