"""Choose learning rates on a grid of factors of about three, by walking uphill on held-out training images.

A rate is chosen once it beats both of its neighbours, so no choice lies on the edge of what was tried, unless it is the
first or the last of the whole grid (`is_on_edge`). Equal scores go to the lower rate. Every case walks alike: at an
experiment's first number of exemplars from `START`, at the others from what was chosen at the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from kept import Job
from onepass import Case, Experiment, Run, Runs
from report import Cell, print_table

RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
START = 0.03

Choices = dict[Case, float]


def wanted(scores: Mapping[float, float], start: float) -> tuple[float, ...]:
    """The rates that are still to be scored before one is chosen; none once `best` is the choice.

    Args:
        scores: of the rates so far, higher is better.
        start: of `RATES`, where the walk begins.
    """
    missing = tuple(rate for rate in _around(start) if rate not in scores)
    return missing or tuple(rate for rate in _around(best(scores)) if rate not in scores)


def _around(rate: float) -> tuple[float, ...]:
    place = RATES.index(rate)
    return RATES[max(0, place - 1) : place + 2]


def best(scores: Mapping[float, float]) -> float:
    """The rate of the highest score."""
    return max(sorted(scores), key=lambda rate: scores[rate])


def is_on_edge(rate: float) -> bool:
    """Whether the grid has no rate beyond it, on one side."""
    return rate in (RATES[0], RATES[-1])


def tune(experiment: Experiment, exemplars: int, runs: Runs) -> Choices:
    """The learning rates that held-out images choose for a table, of all its lines for which there was time."""
    needed = [case for case in experiment.tuned if case.exemplars in (0, experiment.exemplars[0], exemplars)]
    choices, todo = chosen(experiment, needed, runs)
    while todo and runs.make(todo):
        choices, todo = chosen(experiment, needed, runs)
    return choices


def chosen(experiment: Experiment, cases: Sequence[Case], runs: Runs) -> tuple[Choices, list[Job]]:
    """What the runs so far have settled of these cases, and which runs are to be made next."""
    choices: Choices = {}
    todo: list[Job] = []
    for case in cases:
        start = START
        if case.exemplars not in (0, experiment.exemplars[0]):
            leader = replace(case, exemplars=experiment.exemplars[0])
            if leader not in choices:
                continue
            start = choices[leader]
        scores = tuning_scores(case, experiment.tuning_seeds, runs)
        rest = wanted(scores, start)
        todo += [job for rate in rest for job in tuning_jobs(case, rate, experiment.tuning_seeds)]
        if not rest:
            choices[case] = best(scores)
    return choices, todo


def tuning_jobs(case: Case, rate: float, seeds: Sequence[int]) -> list[Job]:
    """The runs that score a learning rate."""
    name = f"{case.arm.label} {case.exemplars} lr {rate:g}"
    return [Job(f"gem-{case.setting.name}-tuning", name, seed, Run(case, rate, is_tuning=True)) for seed in seeds]


def tuning_scores(case: Case, seeds: Sequence[int], runs: Runs) -> dict[float, float]:
    """The mean ACC of every learning rate that all seeds have been run with."""
    scores = {}
    for rate in RATES:
        results = runs.load(tuning_jobs(case, rate, seeds))
        if len(results) == len(seeds):
            scores[rate] = fmean(result["acc"] for result in results.values())
    return scores


def print_choices(experiment: Experiment, runs: Runs) -> None:
    """The scores of the grid as far as it was walked."""
    choices, _ = chosen(experiment, experiment.tuned, runs)
    rows: list[list[Cell]] = []
    for case in experiment.tuned:
        scores = {rate: 100 * acc for rate, acc in tuning_scores(case, experiment.tuning_seeds, runs).items()}
        choice = choices.get(case)
        edge = None if choice is None else is_on_edge(choice)
        rows.append([case.arm.label, case.exemplars or None, *map(scores.get, RATES), choice, edge])
    print_table(
        f"{experiment.setting.name}: ACC on held-out training images by learning rate, in percent, seeds "
        f"{', '.join(map(str, experiment.tuning_seeds))}",
        ["method", "exemplars", *(f"{rate:g}" for rate in RATES), "chosen", "on the edge"],
        rows,
    )
