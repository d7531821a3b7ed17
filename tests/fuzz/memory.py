"""What the fuzzed service holds: buffers with tasks, packs, keys, an ingest and an extractor, so that requests arrive.

`UPLOADED` has the uploads and is named by no request; `SOURCE` is a frozen fork of it. `BUFFERS` are forks of that one
which requests may change and delete: one that was changed is made anew before the next request that names it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import httpx
import numpy as np

from engram import tar
from tests.contents import pictures
from tests.models import model
from tests.servers import eventually

UPLOADED = "uploaded"
SOURCE = "source"
BUFFERS = ("b0", "b1", "b2", "b3")
KEYS = ("k0", "k1")
CONDITIONS = ("key:prefix:k", "key:ne:k1", "key:eq:k0")
MODELS = tuple(model(dimensions) for dimensions in (4, 6))
TASKS = (0, 1)

MAX_DRAW = 256
MAX_GLOBAL_DRAW = 4096
"""Settings of the service: small, so that requests meet them."""


@dataclass(frozen=True)
class Held:
    """Names that requests can use."""

    packs: list[str]
    ingests: list[str]
    extractors: list[str]
    etag: str


def fill(client: httpx.Client) -> Held:
    """The service holds it all afterwards."""
    fields = {"key": "utf8", "logits": "float16 [4]"}
    made = client.post("/v1/buffers", json={"name": UPLOADED, "budget_bytes": 10**6, "quality": 50, "fields": fields})
    made.raise_for_status()
    ingests = [_upload(client, task) for task in TASKS]
    client.post(f"/v1/buffers/{UPLOADED}/forks", json={"name": SOURCE, "frozen": True}).raise_for_status()
    register(client)
    for name in BUFFERS:
        renew(client, name)
    answer = client.get(f"/v1/buffers/{SOURCE}/manifest")
    return Held(
        packs=[pack["digest"] for pack in answer.json()["packs"]],
        ingests=ingests,
        extractors=[hashlib.sha256(content).hexdigest() for content in MODELS],
        etag=answer.headers["ETag"],
    )


def register(client: httpx.Client) -> None:
    """The extractors are there."""
    for content in MODELS:
        answer = client.put(f"/v1/extractors/{hashlib.sha256(content).hexdigest()}", content=content)
        assert answer.is_success, answer.text


def renew(client: httpx.Client, name: str) -> None:
    """The buffer is as it was at the start."""
    client.delete(f"/v1/buffers/{name}")
    client.post(f"/v1/buffers/{SOURCE}/forks", json={"name": name}).raise_for_status()


def body(task: int = 0, count: int = 6) -> bytes:
    """An upload that the buffers take."""
    fields = {
        "key": [f"k{number}" for number in range(count)],
        "logits": np.zeros((count, 4), np.float16),
    }
    images, class_ids = pictures(task, count), 2 * task + np.arange(count) % 2
    return b"".join(tar.write(images, class_ids, fields=fields))


def _upload(client: httpx.Client, task: int) -> str:
    answer = client.post(f"/v1/buffers/{UPLOADED}/tasks/{task}/ingests", content=body(task))
    answer.raise_for_status()
    location = answer.headers["Location"]
    if not eventually(lambda: client.get(location).json()["state"] == "committed"):
        raise RuntimeError(f"the upload to be fuzzed with was not stored: {client.get(location).text}")
    return str(answer.json()["id"])
