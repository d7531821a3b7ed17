"""The client of a service: every resource of the API as a method, the service's errors as exceptions.

    with Client("http://127.0.0.1:8077") as client:
        client.create_buffer("cifar", budget_bytes=1_000_000)
        client.wait(client.upload("cifar", 0, images_NHWC, class_ids_N))
        batch = client.draw("cifar", 256, seed=7, step=0)

A client may be shared by threads, and by processes that are forked from this one: each makes connections of its own. It
can be pickled, for processes that are spawned. Connections are kept alive. What fails in transit is tried again, with
growing pauses and jitter, where trying twice is the same as trying once: reads, registering an extractor, and uploads,
which carry an idempotency key of their own (unless their body can be read only once). `Retry-After` is obeyed. Other
calls are tried again only if no connection was made, because then nothing was sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

import httpx
import pydantic

from engram import paths, profiles
from engram.administration import Administration
from engram.draws import Draws
from engram.errors import Conflict, InvalidRequest, NotFound
from engram.fields import Schema, all_keys
from engram.http import Body, Http, json_body
from engram.inspection import Inspection
from engram.reading import Reading
from engram.schemas import (
    Buffer,
    BufferChange,
    BufferCreate,
    BufferList,
    Extractor,
    ExtractorList,
    ForkCreate,
    Health,
    Per,
    Relabel,
    ShareBy,
    Subsampling,
    Task,
    first_fault,
)
from engram.uploads import Uploads

_MOST_QUERY_BYTES: Final = 7000
"""Of the keys in a request's line: the service takes 64 KiB, proxies as they are installed 8 KB."""


class Client(Uploads, Draws, Reading, Inspection, Administration):
    """A connection to one Engram service.

    A pickled client holds its token, so it is as secret as that.

    Args:
        url: where the service listens; None reads `ENGRAM_URL`, else a profile, else http://127.0.0.1:8077.
        token: the bearer token; None reads `ENGRAM_TOKEN`, else the profile; "" is none.
        profile: the name of a profile that `engram login` made, which then beats the environment; None reads
            `ENGRAM_PROFILE`, else it is "default", which need not be there. See `engram.profiles`.
        connect_timeout_s: for a connection.
        read_timeout_s: between two pieces of an answer (a draw or a read; long polls allow for their wait).
        write_timeout_s: between two pieces of an upload.
        retries: how often a failed idempotent call is tried again.
        transport: another httpx transport (a proxy, client certificates, an application in this process). A client with
            one can be neither pickled nor used after a fork.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        profile: str | None = None,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 60.0,
        write_timeout_s: float = 60.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        url, token = profiles.resolve(url or None, token, profile)
        settings: dict[str, Any] = {
            "url": url,
            "token": token,
            "connect_timeout_s": connect_timeout_s,
            "read_timeout_s": read_timeout_s,
            "write_timeout_s": write_timeout_s,
            "retries": retries,
        }
        self._http = Http(**settings, transport=transport)
        self._settings = None if transport else settings
        self.url = self._http.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[], Client], tuple[()]]:
        if self._settings is None:
            raise TypeError("a client with a transport of its caller's own cannot be pickled; make it where it is used")
        return partial(type(self), **self._settings), ()

    def close(self) -> None:
        """Close all connections of this process; the client cannot be used here afterwards."""
        self._http.close()

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
            share_by: what gets equal shares: classes or tasks. "none": what is stored stays until it is removed, and an
                upload keeps what there is room for.
            subsampling: of the colour planes.
            quality: JPEG quality of all exemplars, for good; None lets selection find it.
            fields: the columns of every exemplar beside its image, their types by name, e.g. `{"logits": "float16
                [100]", "boxes": "float32 [any, 5]", "key": "utf8", "weight": "float32 finite"}`.
            exist_ok: whether the buffer may exist.

        Raises:
            Conflict: the name is taken (with `exist_ok`: by a buffer with another definition).
            InvalidRequest: a name or a number out of range, or a field that there cannot be.
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
            return self._http.fetch(Buffer, "POST", "/v1/buffers", body=json_body(wanted))
        except Conflict:
            if not exist_ok:
                raise
            existing = self.buffer(name)
            differences = _differences(existing, wanted)
            if differences:
                raise Conflict(f"buffer {name!r} exists with another definition: {differences}") from None
            return existing

    def buffers(self) -> list[Buffer]:
        """All buffers of the service."""
        return self._http.fetch(BufferList, "GET", "/v1/buffers").buffers

    def buffer(self, name: str) -> Buffer:
        """A buffer as it stands.

        Raises:
            NotFound: no such buffer.
        """
        return self._http.fetch(Buffer, "GET", paths.of_buffer(name))

    def change_budget(self, name: str, budget_bytes: int, *, generation: int | None = None) -> Buffer:
        """The buffer with another budget; a smaller one drops the tails of every class.

        Args:
            name: of the buffer.
            budget_bytes: the new budget.
            generation: the generation this change was decided on; None changes any.

        Raises:
            InvalidRequest: the budget is out of range.
            Conflict: the buffer is at another generation.
        """
        try:
            body = json_body(BufferChange(budget_bytes=budget_bytes))
        except pydantic.ValidationError as error:
            raise InvalidRequest(first_fault(error)) from error
        return self._http.fetch(Buffer, "PATCH", paths.of_buffer(name), headers=paths.if_match(generation), body=body)

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
        return self._http.fetch(Buffer, "PATCH", paths.of_buffer(name), body=json_body(change))

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
        return self._http.fetch(Buffer, "POST", f"{paths.of_buffer(source)}/forks", body=json_body(wanted))

    def delete_buffer(self, name: str, *, generation: int | None = None) -> None:
        """The buffer and all its exemplars are gone, if it was at `generation` (None: whatever it was at).

        Raises:
            NotFound: no such buffer.
            Conflict: the buffer is at another generation.
        """
        self._http.send("DELETE", paths.of_buffer(name), headers=paths.if_match(generation))

    def task(self, buffer: str, task: int) -> Task:
        """A task as it is stored: classes, counts, bytes and the decision on its quality.

        Raises:
            NotFound: no such buffer or task.
        """
        return self._http.fetch(Task, "GET", paths.of_task(buffer, task))

    def delete_task(self, buffer: str, task: int, *, generation: int | None = None) -> None:
        """The task's exemplars are gone, in a new generation, if the buffer was at `generation` (None: at any).

        Raises:
            NotFound: no such buffer or task.
            Conflict: the buffer is at another generation.
        """
        self._http.send("DELETE", paths.of_task(buffer, task), headers=paths.if_match(generation))

    # Uploads, draws, what is stored and why, tokens and audit are in the classes that this one inherits from.

    def remove(
        self,
        buffer: str,
        *,
        task: int | None = None,
        class_id: int | None = None,
        key: str | None = None,
        keys: Sequence[str] | None = None,
        exemplar: tuple[str, int] | None = None,
        generation: int | None = None,
    ) -> Buffer:
        """The buffer without some exemplars, in a new generation, as if they had never come.

        Args:
            buffer: a buffer's name.
            task: only of this task; `delete_task` deletes a whole one.
            class_id: of this class.
            key: with this value of the field `key`.
            keys: with one of these values; those that no exemplar has are passed over, unless none has any. Very many
                (some 400 short ones) go in several requests, a generation each.
            exemplar: one exemplar, as (pack, row) of the current generation, and nothing else.
            generation: the generation this change was decided on; None changes any.

        Raises:
            NotFound: no such buffer, or nothing in it that is named so.
            InvalidRequest: neither a class, a key nor an exemplar is named.
            Conflict: the buffer is at another generation.
        """
        found: Buffer | None = None
        missing: NotFound | None = None
        for part in _requests(all_keys(key, keys)):
            path = paths.of_exemplars(buffer, task, class_id, part, exemplar)
            try:
                found = self._http.fetch(Buffer, "DELETE", path, headers=paths.if_match(generation))
            except NotFound as error:
                missing = error
            else:
                generation = None if generation is None else found.generation
        if found is None:
            assert missing is not None, "something was asked for"
            raise missing
        return found

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
        path = paths.of_exemplars(buffer, task, class_id, all_keys(key, None), exemplar)
        try:
            change = Relabel(class_id=to_class_id)
        except pydantic.ValidationError as error:
            raise InvalidRequest(f"there can be no class id {to_class_id}") from error
        return self._http.fetch(Buffer, "PATCH", path, headers=paths.if_match(generation), body=json_body(change))

    # Extractors and health

    def register_extractor(self, model: bytes | str | Path) -> Extractor:
        """Register an ONNX model (its bytes or its file) for `IngestOptions.extractor`; again is harmless.

        The service deletes it some time (a week, unless it is set otherwise) after it was last registered, if no
        decision and no waiting ingest names it.

        Raises:
            BadExtractor: the model cannot serve.
            RateLimited: many others are being checked.
        """
        content = model if isinstance(model, bytes) else Path(model).read_bytes()
        path = paths.of_extractor(hashlib.sha256(content).hexdigest())
        body = Body(lambda: content, "application/octet-stream")
        return self._http.fetch(Extractor, "PUT", path, body=body, retry=True)

    def extractor(self, sha256: str) -> Extractor:
        """A registered extractor.

        Raises:
            NotFound: no such extractor.
        """
        return self._http.fetch(Extractor, "GET", paths.of_extractor(sha256))

    def extractors(self) -> list[Extractor]:
        """All registered extractors, the oldest first."""
        return self._http.fetch(ExtractorList, "GET", "/v1/extractors").extractors

    def delete_extractor(self, sha256: str) -> None:
        """The extractor is gone; decisions that name it stay as they are.

        Raises:
            NotFound: no such extractor.
            Conflict: an ingest that has not ended needs it.
        """
        self._http.send("DELETE", paths.of_extractor(sha256))

    def health(self) -> Health:
        """Whether the service can work.

        Raises:
            Unavailable: no service answers.
        """
        return self._http.fetch(Health, "GET", "/healthz")


def _requests(keys: Sequence[str] | None) -> Iterator[Sequence[str] | None]:
    """The keys in parts that fit the line of a request."""
    part: list[str] = []
    size = 0
    for key in keys or ():
        length = len(quote(key, safe="")) + len("&key=")
        if part and size + length > _MOST_QUERY_BYTES:
            yield part
            part, size = [], 0
        part.append(key)
        size += length
    yield part or None


def _differences(existing: Buffer, wanted: BufferCreate) -> str:
    """What a buffer's definition has otherwise than was asked for; nothing if it is the same."""
    given = existing.model_copy(update={"quality": existing.quality if existing.quality_is == "fixed" else None})
    return ", ".join(
        f"{name} {getattr(given, name)} (asked: {getattr(wanted, name)})"
        for name in BufferCreate.model_fields
        if getattr(given, name) != getattr(wanted, name)
    )
