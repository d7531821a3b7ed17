import gc
import threading
from pathlib import Path

import numpy as np
import pytest

import engram
from engram import Batch, Client, Mirror, ReplayLoader
from tests.client.conftest import Filled, Make, send
from tests.client.faults import faulty

Source = Mirror | tuple[Client, str]


@pytest.fixture(params=["service", "mirror"])
def source(request: pytest.FixtureRequest, filled: Filled, tmp_path: Path) -> Source:
    """Both kinds of source: every test of the loader runs on each."""
    return (filled.client, filled.name) if request.param == "service" else Mirror(filled.client, filled.name, tmp_path)


def rows(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.tasks.tolist(), batch.rows.tolist(), strict=True))


def replay_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("engram-replay")]


@pytest.mark.parametrize(("prefetch", "threads"), [(7, 5), (1, 1), (4, 1), (4, 0), (1, 0)])
def test_batches_come_in_the_order_of_their_steps(filled: Filled, source: Source, prefetch: int, threads: int) -> None:
    loader = ReplayLoader(source, 8, seed=3, start_step=5, steps=30, prefetch=prefetch, threads=threads)
    batches = list(loader)
    assert len(batches) == 30
    for step, batch in enumerate(batches, start=5):
        expected = filled.client.draw(filled.name, 8, seed=3, step=step)
        assert np.array_equal(batch.images, expected.images)
        assert rows(batch) == rows(expected)
    assert replay_threads() == []
    assert list(loader) == []


def test_all_arguments_reach_the_draw(filled: Filled, source: Source) -> None:
    loader = ReplayLoader(
        source, 4, strategy="class_balanced", exclude_tasks=[0], tasks=[0, 1], rank=1, world_size=2, steps=3
    )
    expected = [
        filled.client.draw(
            filled.name,
            4,
            step=step,
            strategy="class_balanced",
            exclude_tasks=[0],
            tasks=[0, 1],
            rank=1,
            world_size=2,
        )
        for step in range(3)
    ]
    assert [rows(batch) for batch in loader] == [rows(batch) for batch in expected]


@pytest.mark.parametrize("threads", [0, 2])
def test_leaving_a_loop_ends_the_threads_and_loses_no_step(source: Source, threads: int) -> None:
    whole = [rows(batch) for batch in ReplayLoader(source, 4, steps=10)]
    loader = ReplayLoader(source, 4, steps=10, threads=threads)
    found = []
    for batch in loader:
        found.append(rows(batch))
        if len(found) == 3:
            break
    assert replay_threads() == []
    found += [rows(batch) for batch in loader]
    assert found == whole


def test_a_with_block_ends_the_threads(source: Source) -> None:
    with ReplayLoader(source, 4) as loader:
        first = next(loader)
        assert len(replay_threads()) == 2
    assert replay_threads() == []
    assert len(first) == 4


def test_a_forgotten_loader_ends_its_threads(source: Source) -> None:
    loader = ReplayLoader(source, 4)
    next(loader)
    del loader
    gc.collect()
    assert replay_threads() == []


def test_no_thread_starts_before_the_first_batch_is_asked_for(source: Source) -> None:
    loader = ReplayLoader(source, 4)
    assert replay_threads() == []
    loader.close()


@pytest.mark.parametrize("threads", [0, 1])
def test_an_error_surfaces_at_its_step_and_the_loader_can_go_on(filled: Filled, connect: Make, threads: int) -> None:
    whole = [rows(batch) for batch in ReplayLoader((filled.client, filled.name), 4, steps=4)]
    # One request tells the generation, two draw; the third draw fails.
    with faulty(filled.client.url, None, None, None, "busy") as proxy:
        loader = ReplayLoader((connect(proxy.url, retries=0), filled.name), 4, steps=4, threads=threads, prefetch=1)
        found = [rows(next(loader)), rows(next(loader))]
        with pytest.raises(engram.Unavailable):
            next(loader)
        assert replay_threads() == []
        found += [rows(batch) for batch in loader]
    assert found == whole


def test_an_impossible_draw_raises_what_the_draw_raises(source: Source) -> None:
    with pytest.raises(engram.NotFound, match="task 9"):
        next(ReplayLoader(source, 4, tasks=[9]))
    with pytest.raises(engram.InvalidRequest, match="rank"):
        ReplayLoader(source, 4, rank=2, world_size=2)
    with pytest.raises(engram.InvalidRequest, match="size"):
        ReplayLoader(source, 0)
    with pytest.raises(ValueError, match="prefetch"):
        ReplayLoader(source, 4, prefetch=0)
    with pytest.raises(ValueError, match="steps"):
        ReplayLoader(source, 4, steps=-1)
    assert replay_threads() == []


def test_a_restored_loader_continues_exactly(source: Source) -> None:
    whole = [rows(batch) for batch in ReplayLoader(source, 6, strategy="epoch", seed=9, steps=20)]
    first = ReplayLoader(source, 6, strategy="epoch", seed=9, steps=20, prefetch=8)
    found = [rows(next(first)) for _ in range(7)]
    state = first.state_dict()
    first.close()
    assert state == {"generation": 3, "seed": 9, "step": 7, "size": 6, "world_size": 1}
    second = ReplayLoader(source, 6, strategy="epoch", steps=20)
    second.load_state_dict(state)
    assert found + [rows(batch) for batch in second] == whole


def test_a_state_of_another_shape_is_refused(source: Source) -> None:
    state = ReplayLoader(source, 6).state_dict()
    with pytest.raises(ValueError, match="size 6, this loader 7"):
        ReplayLoader(source, 7).load_state_dict(state)
    with pytest.raises(ValueError, match="world_size 1, this loader 2"):
        ReplayLoader(source, 6, world_size=2).load_state_dict(state)


def test_the_generation_is_pinned_while_the_buffer_changes(engram_client: Client, name: str, tmp_path: Path) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    send(engram_client, name, 0, [0, 0, 1, 1])
    mirror = Mirror(engram_client, name, tmp_path)
    loaders = [ReplayLoader(source, 4, steps=20, prefetch=1) for source in ((engram_client, name), mirror)]
    before = [rows(next(loader)) for loader in loaders]
    send(engram_client, name, 1, [2, 2])
    mirror.refresh()
    assert all(set(batch.tasks.tolist()) == {0} for loader in loaders for batch in loader)
    fresh = [next(ReplayLoader(source, 6, strategy="epoch")) for source in ((engram_client, name), mirror)]
    assert all(set(batch.tasks.tolist()) == {0, 1} for batch in fresh)
    assert before[0] == before[1]


def test_a_mirror_that_moved_on_refuses_an_older_state(engram_client: Client, name: str, tmp_path: Path) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    send(engram_client, name, 0, [0, 1])
    mirror = Mirror(engram_client, name, tmp_path)
    state = ReplayLoader(mirror, 2).state_dict()
    send(engram_client, name, 1, [2])
    mirror.refresh()
    loader = ReplayLoader(mirror, 2)
    loader.load_state_dict(state)
    with pytest.raises(engram.Conflict, match="generation 1, its source at 2"):
        next(loader)
    remote = ReplayLoader((engram_client, name), 2)
    remote.load_state_dict(state)
    assert set(next(remote).tasks.tolist()) == {0}
    remote.close()


def test_no_more_is_drawn_ahead_than_asked_for(filled: Filled, connect: Make) -> None:
    with faulty(filled.client.url) as proxy:
        loader = ReplayLoader((connect(proxy.url), filled.name), 2, prefetch=3, threads=3)
        for _ in range(5):
            next(loader)
        loader.close()
        # One for the generation; five were taken, and at most three more begun.
        assert 6 <= proxy.requests <= 1 + 5 + 3
