"""Where the resources of the HTTP API are, below a service's URL."""

from __future__ import annotations

from urllib.parse import quote


def of_buffer(name: str) -> str:
    """A buffer."""
    return f"/v1/buffers/{quote(name, safe='')}"


def of_task(buffer: str, task: int) -> str:
    """A task of a buffer."""
    return f"{of_buffer(buffer)}/tasks/{task:d}"


def of_ingest(number: str) -> str:
    """An ingest."""
    return f"/v1/ingests/{quote(number, safe='')}"


def of_pack(digest: str) -> str:
    """A pack."""
    return f"/v1/packs/{quote(digest, safe='')}"


def of_extractor(sha256: str) -> str:
    """An extractor."""
    return f"/v1/extractors/{quote(sha256, safe='')}"
