import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader

import engram
from engram import Client, Mirror
from engram.draw import Request
from engram.sources import Source
from engram.torch import ReplayDataset, TensorBatch
from tests.client.conftest import Filled, send
from tests.client.drawers import in_child

# Python 3.12 warns of every fork of a process with threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture
def mirror(filled: Filled, tmp_path: Path) -> Mirror:
    return Mirror(filled.client, filled.name, tmp_path / "mirror")


@pytest.fixture(params=["service", "mirror"])
def source(request: pytest.FixtureRequest, filled: Filled, mirror: Mirror) -> Source:
    """Both kinds of source."""
    return (filled.client, filled.name) if request.param == "service" else mirror


def assert_right(found: list[TensorBatch], mirror: Mirror, steps: range, **request: Any) -> None:
    """These are the batches of the pure function, in the order of steps."""
    assert [batch.step for batch in found] == list(steps)
    for batch in found:
        expected = mirror.snapshot().draw(Request(16, step=batch.step, **request))
        assert np.array_equal(batch.images.numpy(), expected.images)
        for name in ("class_ids", "tasks", "rows"):
            assert np.array_equal(getattr(batch, name).numpy(), getattr(expected, name))


def loader(dataset: ReplayDataset, workers: int = 0, method: str | None = None) -> DataLoader[TensorBatch]:
    # The type of a DataLoader's items without automatic batching is the data set's, which its stubs do not know.
    return DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=method)


def test_batches_are_tensors_in_the_order_of_steps(source: Source, mirror: Mirror) -> None:
    found = list(ReplayDataset(source, 16, seed=5, start_step=3, steps=6))
    assert_right(found, mirror, range(3, 9), seed=5)
    first = found[0]
    assert (first.images.dtype, first.class_ids.dtype, len(first)) == (torch.uint8, torch.int64, 16)


@pytest.mark.parametrize(
    ("at_hand", "method"),
    [
        (False, "fork"),
        (True, "fork"),
        pytest.param(False, "spawn", marks=pytest.mark.slow),
        pytest.param(True, "forkserver", marks=pytest.mark.slow),
    ],
)
def test_workers_of_every_start_method_share_the_steps_out_and_keep_their_order(
    filled: Filled, mirror: Mirror, at_hand: bool, method: str
) -> None:
    source = mirror if at_hand else (filled.client, filled.name)
    dataset = ReplayDataset(source, 16, seed=5, start_step=3, steps=11)
    assert_right(list(loader(dataset, 2, method)), mirror, range(3, 14), seed=5)


def test_more_workers_than_steps_are_no_harm(filled: Filled, mirror: Mirror) -> None:
    dataset = ReplayDataset((filled.client, filled.name), 16, steps=1)
    assert_right(list(loader(dataset, 2, "fork")), mirror, range(1))
    assert list(loader(ReplayDataset(mirror, 16, steps=0))) == []


def test_a_run_that_stopped_goes_on_with_another_number_of_workers(filled: Filled, mirror: Mirror) -> None:
    source = (filled.client, filled.name)
    found = []
    for batch in loader(ReplayDataset(source, 16), 2, "fork"):
        found.append(batch)
        if batch.step == 4:
            break
    found += loader(ReplayDataset(source, 16, start_step=found[-1].step + 1, steps=4), 1, "fork")
    assert_right(found, mirror, range(9))


def test_an_epoch_ends_where_it_ends_on_every_rank(source: Source) -> None:
    # 72 exemplars, of 2 ranks 10 each a step: three steps of 20, one of 12.
    for start in (0, 4, 6):
        ranks = [
            list(ReplayDataset(source, 10, strategy="epoch", start_step=start, rank=rank, world_size=2))
            for rank in (0, 1)
        ]
        assert [[len(batch) for batch in rank] for rank in ranks] == [
            [10, 10, 10, 10][start % 4 :],
            [10, 10, 10, 2][start % 4 :],
        ]
        pairs = [
            pair
            for rank in ranks
            for batch in rank
            for pair in zip(batch.tasks.tolist(), batch.rows.tolist(), strict=True)
        ]
        assert len(set(pairs)) == len(pairs) == 72 - 20 * (start % 4)
    only = list(ReplayDataset(source, 10, strategy="epoch", tasks=[1, 2], exclude_tasks=[2]))
    assert [len(batch) for batch in only] == [10, 10, 4]
    assert [batch.step for batch in ReplayDataset(source, 40, strategy="epoch", steps=5)] == [0, 1, 2, 3, 4]


def test_a_rank_without_a_part_of_the_last_step_gets_an_empty_batch(source: Source) -> None:
    batches = list(ReplayDataset(source, 48, strategy="epoch", rank=1, world_size=2, channels_first=True))
    assert [len(batch) for batch in batches] == [24]
    batches = list(ReplayDataset(source, 72, strategy="epoch", rank=1, world_size=2, channels_first=True))
    assert [(len(batch), batch.images.ndim) for batch in batches] == [(0, 4)]


def test_channels_first_is_a_view(mirror: Mirror) -> None:
    last, first = (
        next(iter(ReplayDataset(mirror, 16, channels_first=channels_first))) for channels_first in (False, True)
    )
    assert first.images.shape == (16, 3, 16, 16)
    assert torch.equal(first.images, last.images.permute(0, 3, 1, 2))
    assert first.images.is_contiguous(memory_format=torch.channels_last)


def test_tensors_move_together(mirror: Mirror) -> None:
    batch = next(iter(ReplayDataset(mirror, 4, start_step=2)))
    moved = batch.to("meta")
    assert (moved.images.device.type, moved.rows.device.type, moved.step) == ("meta", "meta", 2)


def test_rank_and_world_size_come_from_torch_distributed_if_it_runs(mirror: Mirror, tmp_path: Path) -> None:
    def work(rank: int) -> list[int]:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2)
        (batch,) = ReplayDataset(mirror, 16, steps=1)
        distributed.barrier()
        distributed.destroy_process_group()
        return batch.rows.tolist() + batch.tasks.tolist()

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda rank: in_child(partial(work, rank)), (0, 1)))
    expected = [mirror.draw(16, rank=rank, world_size=2) for rank in (0, 1)]
    assert found == [batch.rows.tolist() + batch.tasks.tolist() for batch in expected]


def test_the_generation_is_that_of_when_the_data_set_was_made(engram_client: Client, name: str, tmp_path: Path) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    send(engram_client, name, 0, [0, 0, 1, 1])
    mirror = Mirror(engram_client, name, tmp_path)
    datasets = [ReplayDataset(source, 4, steps=4) for source in ((engram_client, name), mirror)]
    send(engram_client, name, 1, [2, 2])
    mirror.refresh()
    for dataset in datasets:
        assert dataset.generation == 1
        assert all(set(batch.tasks.tolist()) == {0} for batch in dataset)
    assert all(set(batch.tasks.tolist()) == {0} for batch in loader(datasets[0], 2, "fork"))
    with pytest.raises(engram.Conflict, match="generation 1 are wanted"):
        ReplayDataset(mirror, 4, generation=1)


def test_what_cannot_be_drawn_is_refused_when_the_data_set_is_made(source: Source) -> None:
    with pytest.raises(engram.InvalidRequest, match="size"):
        ReplayDataset(source, 0)
    with pytest.raises(ValueError, match="prefetch"):
        ReplayDataset(source, 4, prefetch=0)
    with pytest.raises(ValueError, match="steps"):
        ReplayDataset(source, 4, steps=-1)
    with pytest.raises(ValueError, match="both or neither"):
        ReplayDataset(source, 4, rank=1)
    with pytest.raises(engram.Conflict):
        ReplayDataset(source, 4, strategy="epoch", exclude_tasks=[0, 1, 2])


def test_an_error_of_a_worker_says_what_was_wrong(source: Source) -> None:
    dataset = ReplayDataset(source, 4, tasks=[9], steps=2)
    with pytest.raises(engram.NotFound, match="task 9"):
        list(loader(dataset, 1, "fork"))


def test_without_torch_the_module_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('none here')")
    path = [str(tmp_path), str(Path(engram.__file__).parents[1])]
    program = f"import sys; sys.path[:0] = {path!r}; import engram; import engram.torch"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "engram.torch needs PyTorch: `pip install torch`" in result.stderr
