"""Memories that are filled while a method learns: who is kept, what is sent, and that a killed run loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.batch import Batch
from engram.client import Client
from engram.errors import BudgetExceeded, Conflict
from engram.schemas import IngestOptions, ShareBy
from engram_trainer import loop
from engram_trainer.configuration import MemoryConfig, RunConfig, RuntimeConfig
from engram_trainer.examples import ClassIds, Images
from engram_trainer.local_memory import Kind, LocalConfig, LocalMemory
from engram_trainer.memory import Memory, NoMemory
from engram_trainer.online import OnlineWriter, Policy, Reservoir, Ring
from engram_trainer.plain_memory import local_memory
from engram_trainer.service_memory import ServiceMemory
from engram_trainer.stream import StreamConfig
from tests.photos import photos
from tests.servers import ServiceProcess

pytestmark = pytest.mark.slow

KINDS = get_args(Kind)
PICTURES = photos(400, (8, 8, 1))
FIELDS = {"key": "utf8", "logits": "float16 [3]"}


# Who is kept


def test_a_reservoir_takes_the_first_ones_and_then_replaces_one_with_slots_over_offered() -> None:
    reservoir = Reservoir(10, seed=3)
    assert reservoir.place(0, 10) == [(0, slot) for slot in range(10)]
    places = [slot for _ in range(200) for slot in reservoir.place(0, 50)]
    taken = [slot for slot in places if slot is not None]
    assert {number for _, number in taken} == set(range(10))
    expected = sum(10 / (n + 1) for n in range(10, 10_010))
    assert abs(len(taken) - expected) < 4 * expected**0.5


def test_every_example_is_kept_with_equal_probability() -> None:
    """The eleventh, which A-GEM's code would always keep, among them."""
    kept = np.zeros(20)
    for seed in range(4000):
        slots = Reservoir(10, seed=seed).place(0, 20)
        kept[[*{slot: number for number, slot in enumerate(slots) if slot is not None}.values()]] += 1
    # Half of 4,000 each, with a standard deviation of 32.
    assert np.abs(kept - 2000).max() < 130


def test_a_reservoir_goes_on_after_a_checkpoint_as_it_would_have() -> None:
    whole, first = Reservoir(5, seed=1), Reservoir(5, seed=1)
    expected = [whole.place(0, 7) for _ in range(9)]
    found = [first.place(0, 7) for _ in range(4)]
    second = Reservoir(5, seed=1)
    second.load_state_dict(first.state_dict())
    assert found + [second.place(0, 7) for _ in range(5)] == expected


def test_a_ring_holds_the_last_of_each_task_and_loses_none_where_it_wraps() -> None:
    ring, held = Ring(9, tasks=2), dict[Any, int]()
    for number, (task, count) in enumerate([(0, 3), (0, 3), (1, 3), (0, 4), (1, 1), (0, 1)]):
        for place, slot in enumerate(ring.place(task, count)):
            held[slot] = number * 10 + place
    assert sorted(found for (task, _), found in held.items() if task == 0) == [31, 32, 33, 50]
    assert sorted(found for (task, _), found in held.items() if task == 1) == [20, 21, 22, 40]


def test_policies_need_a_slot() -> None:
    for make in (lambda: Reservoir(0, seed=1), lambda: Ring(-1, tasks=3)):
        with pytest.raises(ValueError, match="slots must be at least 1"):
            make()
    with pytest.raises(ValueError, match="flush must be at least 1"):
        OnlineWriter(local_memory(LocalConfig()), Reservoir(1, seed=0), flush=0)


# What is sent


def online(kind: Kind, **more: Any) -> LocalMemory:
    return local_memory(LocalConfig(kind=kind, **{"budget_bytes": 10**6, "share_by": "none", "fields": FIELDS, **more}))


def offered(step: int, count: int = 10) -> tuple[Images, ClassIds, list[str], dict[str, npt.NDArray[Any]]]:
    """What a step offers; everything about an example follows from its number."""
    numbers = np.arange(step * count, (step + 1) * count)
    logits = np.outer(numbers, [1, 2, 3]).astype(np.float32) / 8
    return PICTURES[numbers], numbers % 3, [f"r{number}" for number in numbers], {"logits": logits}


def offer(writer: OnlineWriter, steps: range, *, count: int = 10) -> None:
    for step in steps:
        images, class_ids, keys, fields = offered(step, count)
        writer.offer(step // 4, images, class_ids, keys, fields)


def whole(memory: Memory) -> dict[str, tuple[int, int, list[float], bytes]]:
    """Task, class, logits and pixels of each exemplar by its key."""
    return {key: rest for batch in memory.walk(7) for key, rest in rows(batch)}


def rows(batch: Batch) -> Iterator[tuple[str, tuple[int, int, list[float], bytes]]]:
    for number, key in enumerate(batch.fields["key"]):
        logits = np.asarray(batch.fields["logits"][number]).tolist()
        yield str(key), (int(batch.tasks[number]), int(batch.class_ids[number]), logits, batch.images[number].tobytes())


def kept_by(policy: Policy, steps: range, *, count: int = 10) -> set[str]:
    """The keys that a policy keeps, as one would write it down."""
    held = {}
    for step in steps:
        for number, slot in enumerate(policy.place(step // 4, count)):
            if slot is not None:
                held[slot] = f"r{step * count + number}"
    return {*held.values()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flush", [1, 16, 1000])
@pytest.mark.parametrize("policy", [lambda: Reservoir(25, seed=4), lambda: Ring(24, tasks=3)])
def test_the_memory_holds_what_the_policy_keeps_with_what_was_said_of_it_then(
    kind: Kind, flush: int, policy: Any
) -> None:
    memory = online(kind)
    writer = OnlineWriter(memory, policy(), flush=flush)
    offer(writer, range(12))
    writer.flush()
    found = whole(memory)
    assert found.keys() == memory.keys() == kept_by(policy(), range(12))
    for key, (task, class_id, logits, pixels) in found.items():
        number = int(key[1:])
        assert (task, class_id) == (number // 40, number % 3)
        assert logits == (np.outer([number], [1, 2, 3]) / 8).astype(np.float16)[0].tolist()
        if kind == "raw":
            assert pixels == PICTURES[number].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_draws_see_what_was_sent_and_nothing_that_waits(kind: Kind) -> None:
    memory = online(kind)
    writer = OnlineWriter(memory, Reservoir(1000, seed=4), flush=20)
    with memory.loader(200, seed=0) as loader:
        offer(writer, range(1))
        assert len(next(loader)) == 0
        offer(writer, range(1, 2))
        assert {str(key) for key in next(loader).fields["key"]} == {f"r{number}" for number in range(20)}
        offer(writer, range(2, 3))
        writer.flush()
        assert {str(key) for key in next(loader).fields["key"]} == {f"r{number}" for number in range(30)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share_by", get_args(ShareBy))
def test_slots_whose_exemplars_the_budget_does_not_hold_are_free(kind: Kind, share_by: Any) -> None:
    memory = online(kind, budget_bytes=2_000, share_by=share_by)
    writer = OnlineWriter(memory, Reservoir(60, seed=4), flush=8)
    for step in range(16):
        offer(writer, range(step, step + 1))
        writer.flush()
        assert 0 < memory.used_bytes <= 2_000
        assert memory.keys() == {*writer._held.values()}
    assert len(memory.keys()) < 60


def test_a_budget_in_bytes_becomes_slots_by_what_the_first_images_take() -> None:
    sizes = {"raw": 8 * 8 + 2 + 6}
    for kind in KINDS:
        memory = online(kind, budget_bytes=6_000)
        writer = OnlineWriter(memory, Reservoir(None, seed=4), flush=10)
        offer(writer, range(40))
        slots = writer.policy.slots
        assert slots is not None
        assert slots == (6_000 // sizes[kind] if kind in sizes else slots)
        assert 0.85 * 6_000 <= memory.used_bytes <= 6_000
        assert 0.85 * slots <= len(memory.keys()) <= slots


def test_a_budget_that_is_no_number_of_slots_is_refused_in_one_sentence() -> None:
    for config, says in (
        ({"per": "class"}, "a budget of each class holds no fixed number of exemplars"),
        ({"quality": None}, "how many exemplars fit depends on the quality; give a quality, or slots"),
    ):
        writer = OnlineWriter(online("strips", **config), Reservoir(None, seed=4), flush=10)
        with pytest.raises(ValueError, match=says):
            offer(writer, range(1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_below_one_example_is_refused_in_one_sentence(kind: Kind) -> None:
    writer = OnlineWriter(online(kind, budget_bytes=20), Reservoir(5, seed=4), flush=1)
    with pytest.raises(BudgetExceeded, match="not one exemplar"):
        offer(writer, range(1))


@pytest.mark.parametrize("slots", [None, 7])
def test_no_memory_can_be_filled_online_too_and_stays_empty(slots: int | None) -> None:
    memory = NoMemory()
    for policy in (Reservoir(slots, seed=1), Ring(slots, tasks=3)):
        writer = OnlineWriter(memory, policy, flush=3)
        offer(writer, range(6))
        writer.flush()
        assert not memory.keys()


def test_a_key_that_was_offered_before_is_refused() -> None:
    writer = OnlineWriter(online("raw"), Reservoir(100, seed=4), flush=10)
    offer(writer, range(1))
    with pytest.raises(ValueError, match="'r0' is kept already"):
        offer(writer, range(1))


# Checkpoints


@pytest.mark.parametrize("kind", KINDS)
@given(before=st.integers(0, 9), flush=st.sampled_from([1, 7, 30, 500]))
@settings(max_examples=8, deadline=None)
def test_a_run_that_is_killed_ends_as_one_that_was_not(kind: Kind, before: int, flush: int) -> None:
    def make() -> tuple[LocalMemory, OnlineWriter]:
        memory = online(kind, budget_bytes=3_000)
        return memory, OnlineWriter(memory, Reservoir(40, seed=4), flush=flush)

    memory, writer = make()
    offer(writer, range(10))
    writer.flush()
    first, interrupted = make()
    offer(interrupted, range(before))
    state = {"memory": first.state_dict(), "writer": interrupted.state_dict()}
    offer(interrupted, range(before, 10))
    again, resumed = make()
    again.load_state_dict(state["memory"])
    resumed.load_state_dict(state["writer"])
    offer(resumed, range(before, 10))
    resumed.flush()
    assert whole(again) == whole(memory)
    assert again.draw(9, seed=1, step=2).rows.tolist() == memory.draw(9, seed=1, step=2).rows.tolist()
    assert resumed.state_dict()["held"] == writer.state_dict()["held"]


def test_a_writers_state_is_tensors_and_plain_values(tmp_path: Path) -> None:
    writer = OnlineWriter(online("raw"), Reservoir(25, seed=4), flush=1000)
    offer(writer, range(6))
    torch.save(writer.state_dict(), tmp_path / "state.pt")
    other = OnlineWriter(online("raw"), Reservoir(25, seed=4), flush=1000)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.flush()
    assert other.memory.keys() == kept_by(Reservoir(25, seed=4), range(6))


# A service


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[Client]:
    with Client(service.url) as found:
        yield found


def remote(client: Client, name: str, folder: Path, **more: Any) -> ServiceMemory:
    return ServiceMemory(
        client,
        name,
        options=IngestOptions(),
        run="r",
        folder=folder,
        shape=(8, 8, 1),
        fields=FIELDS,
        is_written_online=True,
        **more,
    )


def buffer(client: Client, **more: Any) -> str:
    name = f"online-{uuid4().hex[:8]}"
    client.create_buffer(name, **{"budget_bytes": 10**6, "share_by": "none", "quality": 50, "fields": FIELDS, **more})
    return name


@pytest.mark.parametrize("via", [pytest.param("mirror", marks=pytest.mark.slow), "draw"])
def test_a_services_buffer_holds_what_strips_in_this_process_do(client: Client, tmp_path: Path, via: Any) -> None:
    memory = remote(client, buffer(client), tmp_path, via=via)
    local = online("strips")
    for each in (memory, local):
        writer = OnlineWriter(each, Reservoir(25, seed=4), flush=30)
        offer(writer, range(9))
        writer.flush()
    assert whole(memory) == whole(local)
    assert memory.keys() == local.keys()
    assert memory.used_bytes == local.used_bytes
    drawn = [each.draw(9, seed=1, step=2, strategy="class_balanced") for each in (memory, local)]
    assert [*rows(drawn[0])] == [*rows(drawn[1])]


def test_a_services_buffer_is_measured_like_strips_in_this_process(client: Client, tmp_path: Path) -> None:
    memory = remote(client, buffer(client, budget_bytes=6_000), tmp_path)
    images, class_ids, _, fields = offered(0)
    assert memory.slots(images, class_ids, fields) == online("strips", budget_bytes=6_000).slots(
        images, class_ids, fields
    )


def test_a_killed_runs_buffer_goes_back_to_its_checkpoint(client: Client, tmp_path: Path) -> None:
    name, keep = buffer(client), range(3)
    memory = remote(client, name, tmp_path)
    writer = OnlineWriter(memory, Reservoir(25, seed=4), flush=20)
    offer(writer, range(4))
    task_end = {"memory": memory.state_dict(), "writer": writer.state_dict()}
    for step in range(4, 7):
        offer(writer, range(step, step + 1))
        between = {"memory": memory.state_dict(), "writer": writer.state_dict()}
        then = whole(memory)
    offer(writer, range(7, 9))
    writer.flush()
    expected, generation = whole(memory), memory.generation
    assert expected != then
    # The run is killed; another process opens the buffer, and loads the last task's end, then the last epoch's.
    for _ in keep[:2]:
        memory = remote(client, name, tmp_path)
        memory.load_state_dict(task_end["memory"])
        memory.load_state_dict(between["memory"])
        writer = OnlineWriter(memory, Reservoir(25, seed=4), flush=20)
        writer.load_state_dict(between["writer"])
        assert whole(memory) == then
        memory.state_dict()
        offer(writer, range(7, 9))
        writer.flush()
        assert whole(memory) == expected
        assert memory.generation == generation
    memory.state_dict()
    assert len([each for each in client.buffers() if each.name.startswith(name)]) == 3
    memory.finish()
    assert [each.name for each in client.buffers() if each.name.startswith(name)] == [name]


def test_frozen_buffers_that_only_begin_like_a_runs_forks_stay(client: Client, tmp_path: Path) -> None:
    name = buffer(client)
    memory = remote(client, name, tmp_path)
    offer(OnlineWriter(memory, Reservoir(100, seed=4), flush=10), range(1))
    other = f"{name}-at-home-at-3"
    client.fork(name, other, frozen=True)
    memory.state_dict()
    memory.finish()
    assert [each.name for each in client.buffers() if each.name.startswith(name)] == [name, other]


def test_a_buffer_of_another_run_is_neither_emptied_nor_added_to_on_resume(
    service: ServiceProcess, tmp_path: Path
) -> None:
    config = RunConfig(
        data="digits",
        stream=StreamConfig(tasks=5, train_per_class=20, test_per_class=10),
        method="er",
        options={"epochs": 1, "fill": "online", "slots": 5},
        network="mlp",
        memory=MemoryConfig(budget_bytes=12_000, quality=60, url=service.url, buffer="of-another-run"),
    )
    with Client(service.url) as client:
        client.create_buffer("of-another-run", budget_bytes=12_000, share_by="none", quality=60, fields={"key": "utf8"})
        images, class_ids = photos(2), [0, 1]
        client.wait(client.upload("of-another-run", 0, images, class_ids, fields={"key": ["a", "b"]}))
        before = client.buffer("of-another-run")
        for resume in (False, True):
            with pytest.raises(Conflict, match="already holds 1 tasks"):
                loop.run(config, tmp_path / "run", pictures=False, resume=resume)
            assert client.buffer("of-another-run") == before


def test_an_upload_that_a_killed_run_left_is_not_taken(client: Client, tmp_path: Path) -> None:
    name = buffer(client)
    memory = remote(client, name, tmp_path)
    writer = OnlineWriter(memory, Reservoir(100, seed=4), flush=10)
    offer(writer, range(1))
    state = memory.state_dict()
    images, class_ids, keys, fields = offered(5)
    left = client.upload(name, 0, images, class_ids, fields={"key": keys, **fields})
    memory = remote(client, name, tmp_path)
    memory.load_state_dict(state)
    client.create_buffer(f"{name}-next", budget_bytes=10**6)
    client.wait(client.upload(f"{name}-next", 0, photos(2), [0, 1]))
    memory.refresh()
    assert memory.keys() == {f"r{number}" for number in range(10)}
    assert left.id not in [each.id for each in client.ingests(name)]


def test_a_checkpoint_that_cannot_be_gone_back_to_is_refused_before_anything_is_drawn(
    client: Client, tmp_path: Path
) -> None:
    memory = remote(client, buffer(client), tmp_path)
    writer = OnlineWriter(memory, Reservoir(100, seed=4), flush=10)
    offer(writer, range(1))
    state = memory.state_dict()
    memory.finish()
    memory.load_state_dict(state)
    offer(writer, range(1, 2))
    memory.load_state_dict(state)
    for use in (lambda: next(memory.loader(3, seed=1)), lambda: offer(writer, range(2, 3))):
        with pytest.raises(Conflict, match="has moved on since the checkpoint"):
            use()


class Stop(loop.Silent):
    """Raises in a task, once it is told of its second half."""

    def __init__(self, at: int) -> None:
        self.at, self.visit = at, -1

    def task(self, task: Any, stream: Any) -> None:
        self.visit = task.visit

    def phase(self, name: str, done: int, total: int, *, note: str = "") -> None:
        if (self.visit, name) == (self.at, "learn") and done > total / 2:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "checkpoint_s", "at"), [(1, 0.0, 0), (1, 1000.0, 0), (1, 0.0, 1), (1, 1000.0, 1), (2, 0.0, 1)]
)
def test_a_run_that_fills_a_services_buffer_online_goes_on_as_if_it_had_not_been_stopped(
    service: ServiceProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    checkpoint_s: float,
    at: int,
) -> None:
    monkeypatch.setattr(loop, "SHOW_EVERY_S", 0.0)
    config = RunConfig(
        data="digits",
        stream=StreamConfig(tasks=5, train_per_class=20, test_per_class=10),
        method="derpp",
        options={"epochs": 4, "batch_size": 16, "replay_batch": 8, "fill": "online", "slots": 30, "flush": 8},
        network="mlp",
        memory=MemoryConfig(budget_bytes=12_000, quality=60, url=service.url),
        runtime=RuntimeConfig(processes=processes, checkpoint_s=checkpoint_s),
    )
    whole = loop.run(config, tmp_path / "whole", pictures=False)
    with pytest.raises(KeyboardInterrupt):
        loop.run(config, tmp_path / "stopped", pictures=False, watch=Stop(at))
    again = loop.run(config, tmp_path / "stopped", pictures=False, resume=True)
    assert again.matrix == whole.matrix
    for found in (again, whole):
        for memory in found.memory:
            memory.pop("buffer")
            for decision in memory["decisions"].values():
                decision.pop("seconds")
    assert again.memory == whole.memory
    assert again.memory[-1]["exemplars"] == 30
    with Client(service.url) as client:
        assert not [each.name for each in client.buffers() if each.is_frozen and "run-" in each.name]
