"""The main job, as a user's process meets it: upload, wait, draw, mirror, resume, restart."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import engram
from engram import Client, Mirror, ReplayLoader
from tests.servers import ServiceProcess


def test_a_learner_uploads_three_tasks_replays_them_and_resumes_after_a_crash(
    make_service: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    from sklearn.datasets import load_digits  # two seconds of a core

    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    budget_bytes = 12_000
    service = make_service()
    with Client(service.url) as client:
        client.create_buffer("digits", budget_bytes=budget_bytes)
        mirror = Mirror(client, "digits", tmp_path / "mirror")
        for task, classes in enumerate([(0, 1, 2), (3, 4, 5), (6, 7)]):
            chosen = np.isin(digits.target, classes) & (np.arange(len(images)) % 2 == 0)
            done = client.wait(client.upload("digits", task, images[chosen], digits.target[chosen]))
            assert done.generation == task + 1
            buffer = client.buffer("digits")
            assert 0.8 * budget_bytes < buffer.used_bytes <= budget_bytes
            assert buffer.used_bytes == sum(path.stat().st_size for path in live_packs(service, client))
            assert client.task("digits", task).decision is not None
            assert {pack.quality for pack in client.manifest("digits").packs} == {buffer.quality}
            assert mirror.refresh()

        assert buffer.quality_is == "decided"

        batch = client.draw("digits", 64, strategy="class_balanced", seed=1)
        assert batch.images.shape == (64, 16, 16, 1)
        assert np.bincount(batch.class_ids).tolist() == [8] * 8
        mirrored = mirror.draw(64, strategy="class_balanced", seed=1)
        assert np.array_equal(mirrored.images, batch.images)
        assert nearest_class(batch, images, digits.target) > 0.9

        whole = [b.images.tobytes() for b in ReplayLoader((client, "digits"), 16, seed=2, steps=20)]
        with ReplayLoader((client, "digits"), 16, seed=2, steps=20) as loader:
            before = [next(loader).images.tobytes() for _ in range(9)]
            state = loader.state_dict()

    service.kill()
    service.given["workers"] = 0  # what follows only reads
    service.start()
    with Client(service.url) as client:
        resumed = ReplayLoader((client, "digits"), 16, steps=20)
        resumed.load_state_dict(state)
        assert before + [b.images.tobytes() for b in resumed] == whole
        assert client.buffer("digits") == buffer
        with pytest.raises(engram.Conflict):
            client.create_buffer("digits", budget_bytes=budget_bytes)


def live_packs(service: ServiceProcess, client: Client) -> list[Path]:
    return [service.settings.packs_dir / p.digest[:2] / p.digest for p in client.manifest("digits").packs]


def nearest_class(batch: engram.Batch, images: np.ndarray, targets: np.ndarray) -> float:
    """The share of replayed images whose nearest original has their class."""
    drawn = batch.images[..., 0].reshape(len(batch), -1).astype(float)
    originals = images.reshape(len(images), -1).astype(float)
    distances = (originals**2).sum(1)[None] - 2 * drawn @ originals.T
    return float((targets[distances.argmin(axis=1)] == batch.class_ids).mean())
