"""Where the resources of the HTTP API are, below a service's URL."""

from __future__ import annotations

from collections.abc import Sequence
from reprlib import repr as shortened
from urllib.parse import quote, urlencode

from engram.errors import InvalidRequest
from engram.labelled import task_number


def of_buffer(name: str) -> str:
    """A buffer.

    Raises:
        ValueError: the name is no text.
    """
    if not isinstance(name, str):
        raise ValueError(
            f"a buffer is named by a text, as in 'cifar', not by the {type(name).__name__} {shortened(name)}"
        )
    return f"/v1/buffers/{quote(name, safe='')}"


def of_task(buffer: str, task: int) -> str:
    """A task of a buffer.

    Raises:
        ValueError: the task is no integer.
    """
    return f"{of_buffer(buffer)}/tasks/{task_number(task)}"


def of_exemplar(buffer: str, pack: str, row: int) -> str:
    """One exemplar of a buffer."""
    return f"{of_buffer(buffer)}/exemplars/{quote(pack, safe='')}/{row:d}"


def of_exemplars(
    buffer: str,
    task: int | None,
    class_id: int | None,
    keys: Sequence[str] | None,
    exemplar: tuple[str, int] | None,
) -> str:
    """What a change of exemplars is sent to.

    Raises:
        InvalidRequest: one exemplar is named in two ways.
    """
    given = {"task": task, "class_id": class_id, "key": keys}
    query = {name: value for name, value in given.items() if value is not None}
    if exemplar is None:
        return f"{of_buffer(buffer)}/exemplars?{urlencode(query, doseq=True)}"
    if query:
        raise InvalidRequest(f"one exemplar is named by its pack and row, not by {', '.join(query)} as well")
    return of_exemplar(buffer, *exemplar)


def if_match(generation: int | None) -> list[tuple[str, str]]:
    """The header of a change that is meant for one generation, None being any."""
    return [] if generation is None else [("If-Match", f'"{generation}"')]


def of_ingest(number: str) -> str:
    """An ingest."""
    return f"/v1/ingests/{quote(number, safe='')}"


def of_pack(digest: str) -> str:
    """A pack."""
    return f"/v1/packs/{quote(digest, safe='')}"


def of_extractor(sha256: str) -> str:
    """An extractor."""
    return f"/v1/extractors/{quote(sha256, safe='')}"
