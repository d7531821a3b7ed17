"""This file is the HTTP client: every resource of the API as a method, the service's errors as exceptions.

    with Client("http://127.0.0.1:8077") as client:
        client.create_buffer("cifar", budget_bytes=1_000_000)
        client.wait(client.upload("cifar", 0, images_NHWC, class_ids_N))
        batch = client.draw("cifar", 256, seed=7, step=0)

A client may be shared by threads. Connections are kept alive. What fails in transit is tried again, with growing pauses
and jitter, where trying twice is the same as trying once: reads, registering an extractor, and uploads, which carry an
idempotency key of their own (unless their body can be read only once). `Retry-After` is obeyed. Other calls are tried
again only if no connection was made, because then nothing was sent.

Requests go straight to a transport: cookies, redirects, authentication flows and hooks of `httpx.Client` are not used
here, and would cost a third of a draw. See `engram.transport` for what draws do instead.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, Self
from urllib.parse import quote, urlencode, urlsplit

import httpx
import numpy as np
import numpy.typing as npt
import pydantic

from engram import batch, tar
from engram import folder as folders
from engram.batch import Batch
from engram.errors import (
    BadUpload,
    Cancelled,
    Conflict,
    EngramError,
    Forbidden,
    InvalidRequest,
    NotFound,
    RateLimited,
    StripCorrupt,
    TooLarge,
    Unauthorized,
    Unavailable,
    from_problem,
)
from engram.fields import Schema
from engram.schemas import (
    Buffer,
    BufferChange,
    BufferCreate,
    Exemplar,
    ExemplarPage,
    Extractor,
    ForkCreate,
    Health,
    Ingest,
    IngestOptions,
    Manifest,
    Per,
    Relabel,
    ShareBy,
    Strategy,
    Subsampling,
    Task,
    first_fault,
)
from engram.transport import KEEPALIVE_S, Connections, Started, Unsupported

DEFAULT_URL: Final = "http://127.0.0.1:8077"

# Pauses of about 0.1, 0.2, 0.4, ... seconds: four retries outlast a restart of the service's process.
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 30.0
_POLL_S: Final = 30.0
_RETRIED_STATUSES: Final = frozenset({429, 502, 503, 504})
_WITHOUT_PROBLEM: Final[dict[int, type[EngramError]]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    413: TooLarge,
    429: RateLimited,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}

Progress = Callable[[Ingest], None]


@dataclass(frozen=True)
class _Upload:
    """A tar stream. `chunks` gives it from its beginning, each time it is called if it is `replayable`."""

    chunks: Callable[[], Iterator[bytes]]
    replayable: bool = True


@dataclass(frozen=True)
class _Body:
    """What a request carries; `content` is called for each attempt."""

    content: Callable[[], bytes | Iterable[bytes]]
    media_type: str


class Client:
    """A connection to one Engram service.

    Args:
        url: where the service listens; None reads `ENGRAM_URL`, else http://127.0.0.1:8077.
        token: the bearer token; None reads `ENGRAM_TOKEN`, else none is sent.
        connect_timeout_s: for a connection, and for a place in the pool.
        read_timeout_s: between two pieces of an answer (a draw or a read; long polls allow for their wait).
        write_timeout_s: between two pieces of an upload.
        retries: how often a failed idempotent call is tried again.
        transport: another httpx transport (a proxy, client certificates, an application in this process).
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 60.0,
        write_timeout_s: float = 60.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = (url or os.environ.get("ENGRAM_URL") or DEFAULT_URL).rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.url!r} is not the URL of a service, like {DEFAULT_URL}")
        token = (token or os.environ.get("ENGRAM_TOKEN") or "").strip()
        if not (token.isascii() and token.isprintable()):
            raise ValueError("the token must be printable ASCII, as it travels in an HTTP header")
        self._headers = [("Host", parts.netloc.rpartition("@")[2]), ("User-Agent", "engram"), ("Accept", "*/*")]
        if token:
            self._headers.append(("Authorization", f"Bearer {token}"))
        self._timeouts = {
            "connect": connect_timeout_s,
            "pool": connect_timeout_s,
            "read": read_timeout_s,
            "write": write_timeout_s,
        }
        self._retries = retries
        # Draws take the short way where nothing lies between: no TLS, no transport of the caller's own.
        self._connections = None
        if transport is None and parts.scheme == "http":
            self._connections = Connections(
                parts.hostname, parts.port or 80, connect_timeout_s=connect_timeout_s, read_timeout_s=read_timeout_s
            )
        fields = "".join(f"\r\n{name}: {value}" for name, value in self._headers)
        self._short_start = f"GET {quote(parts.path)}".encode("ascii")
        self._short_head = f" HTTP/1.1{fields}\r\n\r\n".encode("ascii")
        self._transport = transport or httpx.HTTPTransport(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=KEEPALIVE_S)
        )
        # Its own generator: a program that seeds the global one must not see its draws change with the network.
        self._random = random.Random()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; the client cannot be used afterwards."""
        if self._connections is not None:
            self._connections.close()
        self._transport.close()

    # Buffers and tasks

    def create_buffer(
        self,
        name: str,
        *,
        budget_bytes: int,
        per: Per = "buffer",
        share_by: ShareBy = "class",
        subsampling: Subsampling = "4:2:0",
        quality: int | None = None,
        fields: Mapping[str, str] | None = None,
        exist_ok: bool = False,
    ) -> Buffer:
        """A new, empty buffer; with `exist_ok`, the buffer of that name if it was created with the same definition.

        Args:
            name: lower-case letters, digits, dots, dashes, underscores.
            budget_bytes: of the whole buffer, or of each class.
            per: which of the two.
            share_by: what gets equal shares: classes or tasks.
            subsampling: of the colour planes.
            quality: JPEG quality of all exemplars, for good; None lets selection find it.
            fields: what every exemplar has beside its image, types by name: `{"logits": "float16 [100]"}`; see
                `engram.fields`.
            exist_ok: whether the buffer may exist.

        Raises:
            Conflict: the name is taken (with `exist_ok`: by a buffer with another definition).
            InvalidRequest: a name or a number out of range.
        """
        declared = Schema.declare(fields or {}).declared
        try:
            wanted = BufferCreate(
                name=name,
                budget_bytes=budget_bytes,
                per=per,
                share_by=share_by,
                subsampling=subsampling,
                quality=quality,
                fields=declared,
            )
        except pydantic.ValidationError as error:
            raise InvalidRequest(first_fault(error)) from error
        try:
            return Buffer.model_validate_json(self._send("POST", "/v1/buffers", body=_json(wanted)))
        except Conflict:
            if not exist_ok:
                raise
            found = self.buffer(name)
            given = found.model_copy(update={"quality": found.quality if found.quality_is == "fixed" else None})
            differing = [
                f"{field} {getattr(given, field)} (asked: {getattr(wanted, field)})"
                for field in ("budget_bytes", "per", "share_by", "subsampling", "quality", "fields")
                if getattr(given, field) != getattr(wanted, field)
            ]
            if differing:
                raise Conflict(f"buffer {name!r} exists with another definition: {', '.join(differing)}") from None
            return found

    def buffers(self) -> list[Buffer]:
        """All buffers of the service."""
        return [Buffer.model_validate(item) for item in json.loads(self._send("GET", "/v1/buffers"))["buffers"]]

    def buffer(self, name: str) -> Buffer:
        """A buffer as it stands.

        Raises:
            NotFound: no such buffer.
        """
        return Buffer.model_validate_json(self._send("GET", _buffer_path(name)))

    def change_budget(self, name: str, budget_bytes: int, *, generation: int | None = None) -> Buffer:
        """The buffer with another budget; a smaller one drops the tails of every class.

        Args:
            name: of the buffer.
            budget_bytes: the new budget.
            generation: the generation this change was decided on; None changes any.

        Raises:
            Conflict: the buffer is at another generation.
        """
        body = _json(BufferChange(budget_bytes=budget_bytes))
        headers = _if_match(generation)
        return Buffer.model_validate_json(self._send("PATCH", _buffer_path(name), headers=headers, body=body))

    def rename_classes(self, name: str, class_names: Mapping[int, str]) -> Buffer:
        """The buffer with these names of classes, by their ids; the other classes keep theirs.

        Raises:
            Conflict: a name belongs to another class, or the buffer is frozen.
            InvalidRequest: a name is empty, a number, not printable, or has more than 200 characters.
        """
        try:
            change = BufferChange(class_names=dict(class_names))
        except pydantic.ValidationError as error:
            raise InvalidRequest(first_fault(error)) from error
        return Buffer.model_validate_json(self._send("PATCH", _buffer_path(name), body=_json(change)))

    def class_names(self, name: str) -> dict[int, str]:
        """The names of a buffer's classes, by their ids.

        Raises:
            NotFound: no such buffer.
        """
        return self.buffer(name).class_names

    def fork(
        self,
        source: str,
        name: str,
        *,
        generation: int | None = None,
        budget_bytes: int | None = None,
        frozen: bool = False,
    ) -> Buffer:
        """A new buffer that begins with the content of another one, whose packs it shares; later each goes its own way.

        Args:
            source: the buffer to fork; uploads to it may go on.
            name: of the new buffer.
            generation: the generation that the source must be at; None takes the newest.
            budget_bytes: of the new buffer; None takes the source's.
            frozen: whether the new buffer is a snapshot, which takes no change but can be forked again.

        Raises:
            NotFound: no such buffer.
            Conflict: the name is taken, or the source is at another generation.
        """
        try:
            wanted = ForkCreate(name=name, generation=generation, budget_bytes=budget_bytes, frozen=frozen)
        except pydantic.ValidationError as error:
            raise InvalidRequest(first_fault(error)) from error
        return Buffer.model_validate_json(self._send("POST", f"{_buffer_path(source)}/forks", body=_json(wanted)))

    def delete_buffer(self, name: str) -> None:
        """The buffer and all its exemplars are gone.

        Raises:
            NotFound: no such buffer.
        """
        self._send("DELETE", _buffer_path(name))

    def task(self, buffer: str, task: int) -> Task:
        """A task as it is stored: classes, counts, bytes and the decision on its quality.

        Raises:
            NotFound: no such buffer or task.
        """
        return Task.model_validate_json(self._send("GET", _task_path(buffer, task)))

    def delete_task(self, buffer: str, task: int) -> None:
        """The task's exemplars are gone, in a new generation.

        Raises:
            NotFound: no such buffer or task.
        """
        self._send("DELETE", _task_path(buffer, task))

    # Uploads

    def upload(
        self,
        buffer: str,
        task: int,
        images_NHWC: npt.NDArray[np.uint8],
        class_ids_N: npt.ArrayLike,
        *,
        fields: Mapping[str, Sequence[Any] | npt.NDArray[Any]] | None = None,
        options: IngestOptions | None = None,
        idempotency_key: str | None = None,
    ) -> Ingest:
        """Hand over the images of a task, uint8 `[N, H, W, C]`; they are safe with the service when this returns.

        Selection and encoding follow in the background: `wait` for them.

        Args:
            buffer: a buffer's name.
            task: the task's number.
            images_NHWC: uint8 RGB or grey; `[N, H, W]` is grey.
            class_ids_N: N integers, which are class ids, or N strings, which are names: those that the buffer knows
                stand for the ids that they have there, new ones get new ids (see `class_names`).
            fields: the columns that the buffer declares, by name: arrays `[N, ...]`, lists of N arrays where they are
                ragged, lists of N texts.
            options: how images are ranked and measured.
            idempotency_key: the same key makes a repeated upload the same ingest; None makes a new one.

        Raises:
            ValueError: arrays of another type or shape, or of no images; a string that is no name.
            NotFound: no such buffer.
            Conflict: the buffer is frozen or has images of another shape, the key another body.

        Fields that are not what the buffer declares end the ingest: `wait` raises `BadUpload`.
        """
        if not len(images_NHWC):
            raise ValueError("there are no images to upload")
        # Arrays become the same bytes twice at some 200,000 images/s, so the service can check before it accepts.
        digest = hashlib.sha256()
        for chunk in tar.write(images_NHWC, class_ids_N, fields=fields):
            digest.update(chunk)
        body = _Upload(lambda: tar.write(images_NHWC, class_ids_N, fields=fields))
        return self._upload(buffer, task, body, options, idempotency_key, digest.digest())

    def upload_folder(
        self,
        buffer: str,
        task: int,
        folder: str | Path,
        *,
        resize: tuple[int, int] | None = None,
        options: IngestOptions | None = None,
        idempotency_key: str | None = None,
    ) -> Ingest:
        """Hand over a folder of class folders: `cat/x.png` is of the class named cat, `7/x.png` of class 7.

        Args:
            buffer: a buffer's name.
            task: the task's number.
            folder: holds one folder per class.
            resize: (height, width) to bring all images to; None sends the files as they are, which must be of one size.
            options: as in `upload`.
            idempotency_key: as in `upload`.

        Raises:
            BadUpload: no class folders, names and integers side by side, no images, or an image to resize is damaged.
        """
        files = folders.images(Path(folder))
        body = _Upload(lambda: folders.chunks(files, resize=resize))
        return self._upload(buffer, task, body, options, idempotency_key, None)

    def upload_tar(
        self,
        buffer: str,
        task: int,
        source: str | Path | BinaryIO,
        *,
        options: IngestOptions | None = None,
        idempotency_key: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Ingest:
        """Hand over a WebDataset tar (`KEY.png` + `KEY.cls`): a file's path, or a stream, which is sent once.

        `progress` is told the bytes sent so far.
        """
        if isinstance(source, (str, Path)):
            path = Path(source)
            body = _Upload(lambda: _file_chunks(path.open("rb"), progress))
        else:
            stream = source
            body = _Upload(lambda: _stream_chunks(stream, progress), replayable=False)
        return self._upload(buffer, task, body, options, idempotency_key, None)

    def _upload(
        self,
        buffer: str,
        task: int,
        body: _Upload,
        options: IngestOptions | None,
        idempotency_key: str | None,
        digest: bytes | None,
    ) -> Ingest:
        query = (options or IngestOptions()).model_dump(mode="json", exclude_none=True)
        query["candidates"] = ",".join(map(str, query["candidates"]))
        headers = [("Idempotency-Key", idempotency_key or str(uuid.uuid4()))]
        if digest is not None:
            headers.append(("Content-Digest", f"sha-256=:{base64.b64encode(digest).decode()}:"))
        sent = hashlib.sha256()

        def hashed() -> Iterator[bytes]:
            nonlocal sent
            sent = hashlib.sha256()
            for chunk in body.chunks():
                sent.update(chunk)
                yield chunk

        answer = self._send(
            "POST",
            f"{_task_path(buffer, task)}/ingests?{urlencode(query)}",
            headers=headers,
            body=_Body(hashed, "application/x-tar"),
            retry=body.replayable,
        )
        ingest = Ingest.model_validate_json(answer)
        if ingest.body_sha256 != sent.hexdigest():
            self.cancel(ingest.id)
            raise BadUpload(
                f"the service received other bytes (SHA-256 {ingest.body_sha256}) than were sent ({sent.hexdigest()}); "
                "the ingest was cancelled, upload again"
            )
        return ingest

    def ingest(self, ingest: str | Ingest, *, wait_s: float = 0.0) -> Ingest:
        """An ingest as it stands, after at most `wait_s` seconds of waiting for its end.

        Raises:
            NotFound: no such ingest.
        """
        path = f"/v1/ingests/{quote(_ingest_id(ingest), safe='')}" + (f"?wait={wait_s:g}" if wait_s else "")
        return Ingest.model_validate_json(self._send("GET", path, wait_s=wait_s))

    def wait(self, ingest: str | Ingest, *, progress: Progress | None = None, timeout_s: float | None = None) -> Ingest:
        """The ingest once it is committed.

        Args:
            ingest: what `upload` returned, or its id.
            progress: called with the ingest about once a second, and at its end.
            timeout_s: None waits for ever.

        Raises:
            EngramError: the ingest failed, as the class that its problem names (BudgetExceeded, BadUpload, ...).
            Cancelled: it was cancelled.
            TimeoutError: it is still at work after `timeout_s`; it goes on.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pause_s = _POLL_S if progress is None else 1.0
        while True:
            left_s = pause_s if deadline is None else min(pause_s, max(0.0, deadline - time.monotonic()))
            current = self.ingest(ingest, wait_s=left_s)
            if progress is not None:
                progress(current)
            if current.state == "committed":
                return current
            if current.state == "failed":
                raise from_problem(current.problem or {})
            if current.state == "cancelled":
                raise Cancelled(f"ingest {current.id} was cancelled", ingest=current.id)
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"ingest {current.id} is still {current.state} after {timeout_s:g} s")

    def cancel(self, ingest: str | Ingest) -> Ingest:
        """The ingest, cancelled unless it had already committed or failed.

        Raises:
            NotFound: no such ingest.
        """
        path = f"/v1/ingests/{quote(_ingest_id(ingest), safe='')}"
        return Ingest.model_validate_json(self._send("DELETE", path))

    # Replay

    def draw(
        self,
        buffer: str,
        size: int,
        *,
        seed: int = 0,
        step: int = 0,
        strategy: Strategy = "uniform",
        tasks: Sequence[int] | None = None,
        exclude_tasks: Sequence[int] = (),
        rank: int = 0,
        world_size: int = 1,
        generation: int | None = None,
    ) -> Batch:
        """A replay minibatch: a pure function of its arguments and the generation (None: the newest).

        It may be smaller than `size`, even empty, only at the last step of an `epoch`.

        Raises:
            NotFound: no such buffer, task or generation.
            Conflict: the buffer is empty, or has nothing but the excluded tasks.
            InvalidRequest: `size` is 0 or above the service's limit, or `rank` is not in the world.
        """
        return self.ask(
            buffer,
            size,
            seed=seed,
            step=step,
            strategy=strategy,
            tasks=tasks,
            exclude_tasks=exclude_tasks,
            rank=rank,
            world_size=world_size,
            generation=generation,
        ).finish()

    def ask(
        self,
        buffer: str,
        size: int,
        *,
        seed: int = 0,
        step: int = 0,
        strategy: Strategy = "uniform",
        tasks: Sequence[int] | None = None,
        exclude_tasks: Sequence[int] = (),
        rank: int = 0,
        world_size: int = 1,
        generation: int | None = None,
    ) -> Asked:
        """As `draw`, but only the question; `finish` of what is returned fetches and decodes the answer."""
        # Every value is an integer or one of the strategies, so nothing needs quoting but a caller's mistake.
        query = (
            f"size={size:d}&seed={seed:d}&step={step:d}&strategy={quote(strategy)}"
            f"&rank={rank:d}&world_size={world_size:d}"
        )
        if tasks is not None:
            query += f"&tasks={','.join(f'{task:d}' for task in tasks)}"
        if exclude_tasks:
            query += f"&exclude_tasks={','.join(f'{task:d}' for task in exclude_tasks)}"
        if generation is not None:
            query += f"&generation={generation:d}"
        path = f"{_buffer_path(buffer)}/draw?{query}"
        if self._connections is None:
            return Asked(self, path, None)
        return Asked(self, path, self._connections.start(self._short_start + path.encode("ascii") + self._short_head))

    def manifest(self, buffer: str, *, generation: int | None = None) -> Manifest:
        """The packs of a generation (None: the newest).

        Raises:
            NotFound: no such buffer, or a generation that is no longer kept.
        """
        query = "" if generation is None else f"?generation={generation}"
        return Manifest.model_validate_json(self._send("GET", f"{_buffer_path(buffer)}/manifest{query}"))

    def manifest_after(self, buffer: str, generation: int) -> Manifest | None:
        """The newest manifest, or None if the buffer is still at this generation."""
        headers = [("If-None-Match", f'"{generation}"')]
        answer = self._send("GET", f"{_buffer_path(buffer)}/manifest", headers=headers)
        return Manifest.model_validate_json(answer) if answer else None

    def pack(self, digest: str) -> bytes:
        """A pack's bytes, which match its digest.

        Raises:
            NotFound: no such pack.
            StripCorrupt: the bytes do not match the digest.
        """
        content = self._send("GET", f"/v1/packs/{quote(digest, safe='')}")
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise StripCorrupt(f"pack {digest} came with SHA-256 {found}; it was damaged on the way or on the disk")
        return content

    def exemplars(
        self, buffer: str, *, task: int | None = None, class_id: int | None = None, page_size: int = 500
    ) -> Iterator[Exemplar]:
        """All exemplars of a buffer, task or class, page after page."""
        query: dict[str, Any] = {"task": task, "class_id": class_id, "limit": page_size}
        query = {key: value for key, value in query.items() if value is not None}
        while True:
            answer = self._send("GET", f"{_buffer_path(buffer)}/exemplars?{urlencode(query)}")
            page = ExemplarPage.model_validate_json(answer)
            yield from page.exemplars
            if page.next is None:
                return
            query["cursor"] = page.next

    def exemplar_jpeg(self, buffer: str, pack: str, row: int) -> bytes:
        """One exemplar as a JPEG file.

        Raises:
            NotFound: no such pack or row in the buffer.
        """
        return self._send("GET", f"{_buffer_path(buffer)}/exemplars/{quote(pack, safe='')}/{row:d}")

    def exemplar_fields(self, buffer: str, pack: str, row: int) -> dict[str, Any]:
        """The fields of one exemplar as numbers, lists and texts; None stands for NaN and infinities.

        Raises:
            NotFound: no such pack or row in the buffer.
        """
        path = f"{_buffer_path(buffer)}/exemplars/{quote(pack, safe='')}/{row:d}/fields"
        fields: dict[str, Any] = json.loads(self._send("GET", path))
        return fields

    def remove(
        self,
        buffer: str,
        *,
        task: int | None = None,
        class_id: int | None = None,
        key: str | None = None,
        exemplar: tuple[str, int] | None = None,
        generation: int | None = None,
    ) -> Buffer:
        """The buffer without some exemplars, in a new generation, as if they had never come.

        Args:
            buffer: a buffer's name.
            task: only of this task; `delete_task` deletes a whole one.
            class_id: of this class.
            key: with this value of the field `key`.
            exemplar: one exemplar, as (pack, row) of the current generation, and nothing else.
            generation: the generation this change was decided on; None changes any.

        Raises:
            NotFound: no such buffer, or nothing in it that is named so.
            InvalidRequest: neither a class, a key nor an exemplar is named.
            Conflict: the buffer is at another generation.
        """
        path = _exemplars_path(buffer, task, class_id, key, exemplar)
        return Buffer.model_validate_json(self._send("DELETE", path, headers=_if_match(generation)))

    def relabel(
        self,
        buffer: str,
        to_class_id: int,
        *,
        task: int | None = None,
        class_id: int | None = None,
        key: str | None = None,
        exemplar: tuple[str, int] | None = None,
        generation: int | None = None,
    ) -> Buffer:
        """The buffer with some exemplars, named as in `remove`, in another class of their tasks.

        Raises:
            NotFound, InvalidRequest, Conflict: as `remove`.
        """
        path = _exemplars_path(buffer, task, class_id, key, exemplar)
        try:
            change = Relabel(class_id=to_class_id)
        except pydantic.ValidationError as error:
            raise InvalidRequest(f"there can be no class id {to_class_id}") from error
        headers = _if_match(generation)
        return Buffer.model_validate_json(self._send("PATCH", path, headers=headers, body=_json(change)))

    def export(self, buffer: str, file: str | Path | BinaryIO, *, generation: int | None = None) -> int:
        """Write all exemplars to `file` as a WebDataset tar of JPEGs; returns its bytes.

        A file named by its path appears only when it is complete.
        """
        if not isinstance(file, (str, Path)):
            return self._export(buffer, file, generation)
        path = Path(file)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            with part.open("wb") as stream:
                size = self._export(buffer, stream, generation)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return size

    def _export(self, buffer: str, stream: BinaryIO, generation: int | None) -> int:
        query = "" if generation is None else f"?generation={generation}"
        url = f"{self.url}{_buffer_path(buffer)}/export{query}"
        size = 0
        with self._translated(url), self._exchange(self._request("GET", url)) as response:
            _raise_for_problem(response, url)
            for chunk in response.iter_bytes():
                size += stream.write(chunk)
        return size

    # Extractors and health

    def register_extractor(self, model: bytes | str | Path) -> Extractor:
        """Register an ONNX model (its bytes or its file) for `IngestOptions.extractor`; again is harmless.

        Raises:
            BadExtractor: the model cannot serve.
        """
        content = model if isinstance(model, bytes) else Path(model).read_bytes()
        path = f"/v1/extractors/{hashlib.sha256(content).hexdigest()}"
        body = _Body(lambda: content, "application/octet-stream")
        return Extractor.model_validate_json(self._send("PUT", path, body=body, retry=True))

    def extractor(self, sha256: str) -> Extractor:
        """A registered extractor.

        Raises:
            NotFound: no such extractor.
        """
        return Extractor.model_validate_json(self._send("GET", f"/v1/extractors/{quote(sha256, safe='')}"))

    def health(self) -> Health:
        """Whether the service can work.

        Raises:
            Unavailable: no service answers.
        """
        return Health.model_validate_json(self._send("GET", "/healthz"))

    # Transport

    def _send(
        self,
        method: str,
        path: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: _Body | None = None,
        retry: bool | None = None,
        wait_s: float = 0.0,
        started: Started | None = None,
    ) -> bytes:
        """The body of a successful answer; empty for 204 and 304. `retry` None retries reads only."""
        url = self.url + path
        retry = method == "GET" if retry is None else retry
        attempt = 0
        while True:
            try:
                if started is not None:
                    under_way, started = started, None
                    with suppress(Unsupported):
                        return self._short_answer(under_way, url)
                request = self._request(method, url, headers, body, wait_s)
                with self._translated(url), self._exchange(request) as response:
                    content = response.read()
                    if response.status_code < 300 or response.status_code == 304:
                        return content
                    _raise_for_problem(response, url)
            except (Unavailable, RateLimited) as error:
                unsent = isinstance(error.__cause__, (httpx.ConnectError, httpx.ConnectTimeout))
                pause_s = self._pause_s(attempt, error)
                if attempt == self._retries or pause_s > _LONGEST_PAUSE_S or not (retry or unsent):
                    raise
            attempt += 1
            time.sleep(pause_s)

    def _short_answer(self, started: Started, url: str) -> bytes:
        with self._translated(url):
            status, headers, body = started.finish()
        if status != 200:
            _raise_for_problem(httpx.Response(status, headers=headers, content=body), url)
        return body

    def _pause_s(self, attempt: int, error: EngramError) -> float:
        """How long to wait before trying again: what the service asked for, or longer each time, never in step."""
        pause_s = _FIRST_PAUSE_S * 2.0**attempt * self._random.uniform(0.5, 1.5)
        asked_s = error.details.get("retry_after_s")
        return max(pause_s, asked_s) if isinstance(asked_s, (int, float)) else pause_s

    def _request(
        self,
        method: str,
        url: str,
        headers: Sequence[tuple[str, str]] = (),
        body: _Body | None = None,
        wait_s: float = 0.0,
    ) -> httpx.Request:
        timeouts = self._timeouts | {"read": self._timeouts["read"] + wait_s} if wait_s else self._timeouts
        own = self._headers if not headers else [*self._headers, *headers]
        if body is None:
            return httpx.Request(method, url, headers=own, extensions={"timeout": timeouts})
        own = [*own, ("Content-Type", body.media_type)]
        return httpx.Request(method, url, headers=own, content=body.content(), extensions={"timeout": timeouts})

    @contextmanager
    def _exchange(self, request: httpx.Request) -> Iterator[httpx.Response]:
        response = self._transport.handle_request(request)
        try:
            yield response
        finally:
            response.close()

    @contextmanager
    def _translated(self, url: str) -> Iterator[None]:
        """httpx's exceptions become `Unavailable`, with what to do about them."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unavailable(
                f"no service answers at {self.url} ({error or 'timed out'}): is it running? "
                "start it with `engram-service serve`, or set ENGRAM_URL"
            ) from error
        except httpx.TimeoutException as error:
            raise Unavailable(f"{url} did not answer in time ({type(error).__name__}); try again later") from error
        except httpx.TransportError as error:
            raise Unavailable(f"the connection to {url} broke ({type(error).__name__}: {error}); try again") from error


class Asked:
    """A draw under way. Exactly one of `finish` and `abandon` must be called."""

    def __init__(self, client: Client, path: str, started: Started | None) -> None:
        self._client = client
        self._path = path
        self._started = started

    def finish(self) -> Batch:
        """The minibatch; what goes wrong on the way is tried again, as in every read.

        Raises:
            EngramError: as `Client.draw`.
        """
        body = self._client._send("GET", self._path, started=self._started)
        return batch.decode(body) if body else batch.empty()

    def abandon(self) -> None:
        """Nobody wants it any more."""
        if self._started is not None:
            self._started.abandon()


def _raise_for_problem(response: httpx.Response, url: str) -> None:
    """The error that an answer carries is raised; problem+json as the class it names."""
    status = response.status_code
    if status < 300:
        return
    content = response.read()
    if 300 <= status < 400:
        target = response.headers.get("Location", "nowhere")
        raise Unavailable(f"{url} redirects to {target}, which is not followed; use that service's URL")
    retry_after_s = _retry_after_s(response.headers.get("Retry-After"))
    details = {} if retry_after_s is None else {"retry_after_s": retry_after_s}
    if response.headers.get("Content-Type", "").startswith("application/problem+json"):
        try:
            problem = json.loads(content)
        except ValueError:
            problem = None
        if isinstance(problem, dict):
            raise from_problem(details | problem)
    text = content[:200].decode("utf-8", "replace").strip()
    kind = _WITHOUT_PROBLEM.get(status, EngramError)
    raise kind(f"{url} answered {status}: {text or 'no explanation'}; is it an Engram service?", **details)


def _retry_after_s(text: str | None) -> float | None:
    """The seconds of a Retry-After header, which may also be a date."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _json(model: pydantic.BaseModel) -> _Body:
    content = model.model_dump_json().encode()
    return _Body(lambda: content, "application/json")


def _buffer_path(name: str) -> str:
    return f"/v1/buffers/{quote(name, safe='')}"


def _exemplars_path(
    buffer: str, task: int | None, class_id: int | None, key: str | None, exemplar: tuple[str, int] | None
) -> str:
    """What a change of exemplars is sent to."""
    given = {"task": task, "class_id": class_id, "key": key}
    query = {name: value for name, value in given.items() if value is not None}
    if exemplar is None:
        return f"{_buffer_path(buffer)}/exemplars?{urlencode(query)}"
    if query:
        raise InvalidRequest(f"one exemplar is named by its pack and row, not by {', '.join(query)} as well")
    return f"{_buffer_path(buffer)}/exemplars/{quote(exemplar[0], safe='')}/{exemplar[1]:d}"


def _if_match(generation: int | None) -> list[tuple[str, str]]:
    return [] if generation is None else [("If-Match", f'"{generation}"')]


def _task_path(buffer: str, task: int) -> str:
    return f"{_buffer_path(buffer)}/tasks/{task:d}"


def _ingest_id(ingest: str | Ingest) -> str:
    return ingest if isinstance(ingest, str) else ingest.id


def _stream_chunks(stream: BinaryIO, progress: Callable[[int], None] | None) -> Iterator[bytes]:
    sent = 0
    while chunk := stream.read(1 << 20):
        yield chunk
        sent += len(chunk)
        if progress is not None:
            progress(sent)


def _file_chunks(stream: BinaryIO, progress: Callable[[int], None] | None) -> Iterator[bytes]:
    with stream:
        yield from _stream_chunks(stream, progress)
