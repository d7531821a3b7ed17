"""Buffers as operators have them, for the browser to look at: real uploads, ingested by the service's worker.

fashion        Fashion-MNIST, two classes a task, names, a budget that made selection choose
photographs    patches of scikit-learn's two sample photographs, with keys, scores and boxes
fashion-2      a frozen snapshot of fashion at its second task
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from engram import Client
from engram.errors import EngramError
from engram_trainer.sources.samples import read_sample

FASHION, PHOTOGRAPHS, SNAPSHOT = "fashion", "photographs", "fashion-2"
SIDE = 32


def fill(
    client: Client,
    *,
    per_class: int = 100,
    tasks: int = 3,
    budget_bytes: int = 60_000,
    photograph_quality: int | None = None,
) -> None:
    """The buffers of the module docstring are there, all ingests ended; one of them failed."""
    fill_fashion(client, per_class=per_class, tasks=tasks, budget_bytes=budget_bytes)
    fill_photographs(client, quality=photograph_quality)
    broken = client.upload_tar(FASHION, tasks, io.BytesIO(b"this is no tar" * 100))
    try:
        client.wait(broken)
    except EngramError:
        return
    raise AssertionError("an upload that is no tar was taken")


def fill_fashion(client: Client, *, per_class: int, tasks: int, budget_bytes: int) -> None:
    """`fashion` and its snapshot."""
    sample = read_sample()
    client.create_buffer(FASHION, budget_bytes=budget_bytes)
    images = sample.train.read()
    for task in range(tasks):
        rows = np.concatenate(
            [np.flatnonzero(sample.train.class_ids == c)[:per_class] for c in (2 * task, 2 * task + 1)]
        )
        named = [sample.class_names[c] for c in sample.train.class_ids[rows]]
        client.wait(client.upload(FASHION, task, images[rows], named))
        if task == 1:
            client.fork(FASHION, SNAPSHOT, frozen=True)


def fill_photographs(client: Client, *, count: int = 60, quality: int | None = None) -> None:
    """`photographs`, at this quality or one that selection chooses.

    Every exemplar has a key, a score and up to two boxes (x, y, width, height).
    """
    fields = {"key": "utf8", "score": "float32 finite", "boxes": "float32 [any, 4]"}
    client.create_buffer(PHOTOGRAPHS, budget_bytes=40_000, quality=quality, fields=fields)
    for task, (name, images) in enumerate(photographs(count).items()):
        rng = np.random.default_rng(task)
        corners = [rng.integers(1, SIDE // 2, (rng.integers(0, 3), 2)) for _ in images]
        boxes = [
            np.concatenate([at, rng.integers(4, SIDE // 2, at.shape)], axis=1).astype(np.float32) for at in corners
        ]
        columns = {
            "key": [f"{name}-{number:03d}" for number in range(len(images))],
            "score": rng.random(len(images), np.float32),
            "boxes": boxes,
        }
        client.wait(client.upload(PHOTOGRAPHS, task, images, [name] * len(images), fields=columns))


def photographs(count: int) -> dict[str, npt.NDArray[np.uint8]]:
    """So many patches `[N, 32, 32, 3]` of each of scikit-learn's photographs, by name."""
    from sklearn.datasets import load_sample_images

    found = {}
    for name, whole in zip(("temple", "flower"), load_sample_images().images, strict=True):
        # Every other pixel: patches show more of what is in the picture.
        picture = whole[::2, ::2]
        rng = np.random.default_rng(len(name))
        tops = rng.integers(0, picture.shape[0] - SIDE, count)
        lefts = rng.integers(0, picture.shape[1] - SIDE, count)
        found[name] = np.stack([picture[y : y + SIDE, x : x + SIDE] for y, x in zip(tops, lefts, strict=True)])
    return found


def use(client: Client, *, draws: int = 40) -> None:
    """Somebody has drawn from the buffers."""
    for step in range(draws):
        client.draw(FASHION, size=64, seed=1, step=step, strategy="class_balanced")
        client.draw(PHOTOGRAPHS, size=32, seed=1, step=step)
