"""Tune the learning rate of every kind of memory alike: on one grid, by accuracy on held-out training images.

Seeds are those of no table, and runs are smaller: 500 images a class. Where the best of any kind lies at an end of the
grid, the grid grows there for all, so no choice lies on the edge of what was tried (see `rates`). A run whose loss is
not finite counts as chance.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean

import kept
import report
from kept import Job
from learning import Place, execute, job_of, run_of, tell
from rates import RATES, START, best, wanted
from settings import LEARNINGS, TUNING_STREAM

SEEDS = (1000, 1001)

Key = tuple[str, str, int]
"""Learning, data set and bytes per class."""
Rates = Mapping[str, float]
"""The learning rate of each kind of memory."""
TUNED: dict[Key, Rates] = {}
"""What the grids found; `tests/bench/test_tuning.py` compares."""


class NotTuned(LookupError):
    """Nobody has tuned these learning rates."""


def rates_of(learning: str, data: str, budget: int, place: Place) -> Rates:
    """The tuned learning rates: those of this file, else what the kept results say.

    Raises:
        NotTuned: there are none.
    """
    key = (learning, data, budget)
    found = TUNED.get(key) or chosen(*key, place)
    if found is None:
        raise NotTuned(f"the learning rates of {learning} on {data} at {budget:,} bytes are not tuned: run --tune")
    return found


def tuning_jobs(learning: str, data: str, budget: int, rate: float, seed: int, device: str) -> list[Job]:
    """One learning rate for every kind of memory."""
    return [
        job_of(
            "budget-tuning",
            run_of(LEARNINGS[learning], data, arm, budget, rate, stream=TUNING_STREAM, device=device),
            seed,
            learning,
            f"lr-{rate:g}",
        )
        for arm in LEARNINGS[learning].tuned_arms
    ]


def tuned(learning: str, data: str, budget: int, place: Place) -> dict[str, dict[float, list[float]]]:
    """Last accuracies of each kind of memory by learning rate, where all of a rate's runs are done."""
    found: dict[str, dict[float, list[float]]] = {arm.kind: {} for arm in LEARNINGS[learning].tuned_arms}
    for rate in RATES:
        jobs = [job for seed in SEEDS for job in tuning_jobs(learning, data, budget, rate, seed, place.device)]
        results = kept.load(jobs, place.results)
        if len(results) == len(jobs):
            for job in jobs:
                found[job.config.arm.kind].setdefault(rate, []).append(results[job]["last"])
    return found


def chosen(learning: str, data: str, budget: int, place: Place) -> Rates | None:
    """The best learning rate of each kind; None as long as the grid has to grow."""
    found = tuned(learning, data, budget, place)
    if missing_rates(found):
        return None
    return {kind: best(means(by_rate)) for kind, by_rate in found.items()}


def missing_rates(found: Mapping[str, Mapping[float, Sequence[float]]]) -> list[float]:
    """Learning rates that are still to be tried: what any kind of memory wants, all have to try."""
    return sorted({rate for by_rate in found.values() for rate in wanted(means(by_rate), START)})


def means(by_rate: Mapping[float, Sequence[float]]) -> dict[float, float]:
    """Over seeds."""
    return {rate: fmean(values) for rate, values in by_rate.items()}


def tune(needed: Iterable[Key], place: Place, *, processes: int, minutes: float) -> None:
    """Run the grids, print what they say."""
    deadline = time.monotonic() + 60 * minutes
    grids = [key for key in dict.fromkeys(needed) if key[1] in place.data]
    while time.monotonic() < deadline:
        todo = [
            job
            for seed in SEEDS
            for key in grids
            for rate in missing_rates(tuned(*key, place))
            for job in tuning_jobs(*key, rate, seed, place.device)
        ]
        if not todo:
            break
        left = (deadline - time.monotonic()) / 60
        kept.collect(
            todo, partial(execute, place=place), folder=place.results, processes=processes, minutes=left, tell=tell
        )
    for key in grids:
        found = tuned(*key, place)
        tried = sorted({rate for by_rate in found.values() for rate in by_rate})
        rows = [[kind, *(fmean(of[rate]) if rate in of else None for rate in tried)] for kind, of in found.items()]
        name, data, budget = key
        report.print_table(
            f"Tuning {name}: {data}, {budget:,} bytes per class; last accuracy on held-out training images, mean of "
            f"{len(SEEDS)} seeds, by learning rate",
            ("memory", *(f"{rate:g}" for rate in tried)),
            rows,
        )
    rows = [[str(key), str(chosen(*key, place) or "the grid is not done")] for key in grids]
    report.print_table("Chosen, as `TUNED` has it", ("learning, data, bytes per class", "learning rates"), rows)
