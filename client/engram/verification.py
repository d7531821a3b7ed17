"""Checks everything that a service holds, byte by byte: digests, checksums, counts, budgets."""

from __future__ import annotations

from collections.abc import Callable

from engram import pack
from engram.client import Client
from engram.errors import EngramError, NotFound
from engram.schemas import Manifest, PackEntry
from engram.strip import runs_of

Progress = Callable[[int, int], None]
"""Told how many packs of how many are checked."""


def of_buffer(client: Client, buffer: str, *, progress: Progress = lambda done, of: None) -> tuple[Manifest, list[str]]:
    """The newest generation of a buffer, and what is wrong with it, as sentences.

    Every pack is fetched and every checksum in it compared; only one is in memory at a time. If the buffer changes so
    often meanwhile that a pack is gone, it is begun again.

    Raises:
        NotFound: no such buffer, or it changed too often.
        Unavailable: the service does not answer.
    """
    for _ in range(3):
        manifest = client.manifest(buffer)
        try:
            return manifest, _faults(client, manifest, progress)
        except NotFound:
            continue
    raise NotFound(f"packs of buffer {buffer!r} were replaced before they could be read, three times; try again")


def _faults(client: Client, manifest: Manifest, progress: Progress) -> list[str]:
    faults = []
    for number, entry in enumerate(manifest.packs):
        progress(number, len(manifest.packs))
        faults += [f"{manifest.buffer} task {entry.task}, pack {entry.digest}: {what}" for what in _of(client, entry)]
    progress(len(manifest.packs), len(manifest.packs))
    used_bytes = sum(entry.bytes for entry in manifest.packs)
    if used_bytes != manifest.used_bytes:
        faults.append(f"{manifest.buffer}: its packs have {used_bytes} bytes, it says {manifest.used_bytes}")
    if used_bytes > manifest.limit_bytes:
        faults.append(
            f"{manifest.buffer}: its packs have {used_bytes} bytes, at most {manifest.limit_bytes} are allowed"
        )
    if len({entry.quality for entry in manifest.packs}) > 1:
        faults.append(f"{manifest.buffer}: its packs have several qualities")
    return faults


def _of(client: Client, entry: PackEntry) -> list[str]:
    try:
        data = client.pack(entry.digest)
        exemplars = pack.parse(data)
    except NotFound:
        raise
    except EngramError as error:
        return [error.message]
    found = {
        "bytes": (len(data), entry.bytes),
        "exemplars": (len(exemplars), entry.exemplars),
        "quality": (exemplars.form.quality, entry.quality),
        "runs of classes": (runs_of(exemplars.class_ids), [tuple(run) for run in entry.runs]),
    }
    return [f"{name} {held}, the manifest says {said}" for name, (held, said) in found.items() if held != said]
