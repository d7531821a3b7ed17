"""What selection would have chosen, asked of a service, against choosing with the settings asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from engram.schemas import Decision, IngestOptions
from engram.selection.quality import choose
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from tests.contents import Filling, create, fill, pictures
from tests.servers import ServiceThread
from tests.uploads import final, queue, tar_of_arrays, work_through

BUDGET = 40_000


def two_decisions(database: Database, settings: Settings) -> None:
    """Buffer "b" with two tasks whose quality was chosen."""
    create(database, budget_bytes=BUDGET, quality=None)
    for task in (0, 1):
        class_ids = np.arange(320) % 4 + 4 * task
        body = tar_of_arrays(pictures(task, 320), class_ids)
        queued = queue(database, settings, body, task=task, options=IngestOptions(epsilon=0.2))
        work_through(database, PackStore(settings.packs_dir), settings)
        assert final(database, queued).state == "committed"


@pytest.fixture
def served(
    request: pytest.FixtureRequest, hold: Callable[[Filling], Any], serve_thread: Callable[..., ServiceThread]
) -> ServiceThread:
    """A service that holds from its start what `asked` says, where a test asks for that."""
    if "asked" in request.fixturenames:
        hold(two_decisions)
    return serve_thread()


@pytest.fixture
def asked(client: httpx.Client) -> Callable[..., dict[str, Any]]:
    """What is answered of one of `two_decisions`."""

    def ask(task: int = 1, **given: object) -> dict[str, Any]:
        answer = client.get(f"/v1/buffers/b/tasks/{task}/decision", params=given)  # type: ignore[arg-type]
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    return ask


def recorded(client: httpx.Client) -> list[Decision]:
    return [Decision.model_validate(client.get(f"/v1/buffers/b/tasks/{n}").json()["decision"]) for n in (0, 1)]


def test_what_is_asked_is_chosen_by_the_function_that_chooses(
    client: httpx.Client, asked: Callable[..., dict[str, Any]]
) -> None:
    first, last = recorded(client)
    seen = set()
    for epsilon in (0.001, 0.05, 0.2, 0.9, 50):
        for rule in ("any", "all_higher"):
            for definition in ("raw", "per_sample", "log_ratio"):
                given = {"epsilon": epsilon, "rule": rule, "definition": definition}
                found = asked(**given)
                quality, reason = choose([first, last.model_copy(update=given)])
                assert (found["quality"], found["says"]) == (quality, reason)
                assert {name: found[name] for name in given} == given
                seen.add(quality)
    assert len(seen) > 1, "the settings matter here"


def test_asking_for_nothing_repeats_what_was_measured_and_a_budget_changes_what_fits(
    client: httpx.Client, asked: Callable[..., dict[str, Any]]
) -> None:
    last, found = recorded(client)[1], asked()
    assert (found["epsilon"], found["budget_bytes"], found["now_is"]) == (0.2, BUDGET, "decided")
    assert found["is_now"] == client.get("/v1/buffers/b").json()["quality"]
    for candidate, again in zip(last.candidates, found["candidates"], strict=True):
        assert (again["exemplars"], again["bytes"]) == (candidate.exemplars, candidate.bytes)
        assert again["ratio"] == candidate.ratio["raw"]
    assert found["share_bytes"] == BUDGET // 2
    small, large, huge = (asked(budget_bytes=size) for size in (BUDGET // 4, BUDGET, 10**9))
    for less, more, all_ in zip(small["candidates"], large["candidates"], huge["candidates"], strict=True):
        assert less["exemplars_then"] < more["exemplars_then"] <= all_["exemplars_then"] == 320
    assert small["quality"] == large["quality"], "the choice rests on R"


def test_a_fixed_quality_was_not_measured(client: httpx.Client, served: ServiceThread) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 3})
    found = client.get("/v1/buffers/b/tasks/0/decision").json()
    assert (found["quality"], found["is_now"], found["candidates"]) == (None, 50, [])
    assert "was fixed with the buffer" in found["says"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("b/tasks/9/decision", 404),
        ("x/tasks/0/decision", 404),
        ("b/tasks/0/decision?epsilon=0", 422),
        ("b/tasks/0/decision?rule=none", 422),
        ("b/tasks/0/decision?definition=x", 422),
        ("b/tasks/0/decision?budget_bytes=0", 422),
    ],
)
def test_what_cannot_be_asked_is_a_problem(client: httpx.Client, served: ServiceThread, path: str, status: int) -> None:
    create(served.state.database)
    fill(served.state.database, served.settings, 0, {0: 3})
    assert client.get(f"/v1/buffers/{path}").status_code == status
