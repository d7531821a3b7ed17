"""Fixtures of the client's tests: clients of one real service, and buffers to read from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import pytest

from engram import Client, IngestOptions
from engram.schemas import Ranking
from tests.contents import UInt8Array, pictures

if TYPE_CHECKING:
    from tests.servers import ServiceProcess

_numbers = count()


@pytest.fixture(scope="session")
def engram_client(service: ServiceProcess) -> Iterator[Client]:
    """The library's client of the session's service."""
    with Client(service.url) as found:
        yield found


@pytest.fixture
def name() -> str:
    """A buffer name that no other test uses."""
    return f"buffer-{next(_numbers)}"


def send(
    client: Client,
    buffer: str,
    task: int,
    class_ids: list[int],
    *,
    ranking: Ranking = "ring",
) -> UInt8Array:
    """Upload one picture for each class id and wait; returns the pictures."""
    images = pictures(task, len(class_ids))
    options = IngestOptions(ranking=ranking)
    client.wait(client.upload(buffer, task, images, class_ids, options=options))
    return images


@dataclass(frozen=True)
class Filled:
    """A buffer of three tasks with two classes each, 24 exemplars a task; all uploaded images are kept."""

    client: Client
    name: str
    images: dict[int, UInt8Array]
    class_ids: dict[int, np.ndarray[tuple[int], np.dtype[np.int64]]]


@pytest.fixture(scope="session")
def filled(engram_client: Client) -> Filled:
    """Read-only: tests that change a buffer make their own."""
    name = "filled"
    engram_client.create_buffer(name, budget_bytes=10**6, quality=60)
    class_ids = {task: np.repeat([2 * task, 2 * task + 1], 12) for task in range(3)}
    images = {task: send(engram_client, name, task, class_ids[task].tolist()) for task in range(3)}
    return Filled(engram_client, name, images, class_ids)


Make = Callable[..., Client]


@pytest.fixture
def connect() -> Iterator[Make]:
    """Makes clients that are closed after the test."""
    made: list[Client] = []

    def make(url: str, **options: object) -> Client:
        made.append(Client(url, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for client in made:
        client.close()
