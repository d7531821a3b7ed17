"""Uploads over HTTP: a task's images as a tar stream, and the ingest that the service makes of it.

The service states the SHA-256 of what it received, and the client compares it with what it sent.
"""

from __future__ import annotations

import base64
import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt

from engram import folder as folders
from engram import paths, tar
from engram.errors import BadUpload, Cancelled, from_problem
from engram.http import Body, Http
from engram.labelled import Images, labelled
from engram.schemas import TAR_MEDIA_TYPE, Ingest, IngestOptions, IngestPage

_POLL_S: Final = 30.0


@dataclass(frozen=True)
class _TarStream:
    """A tar in pieces. `chunks` gives it from its beginning, each time it is called if it is `replayable`."""

    chunks: Callable[[], Iterator[bytes]]
    replayable: bool = True


class Uploads:
    """The methods of `Client` that hand over images, and follow what becomes of them."""

    _http: Http

    def upload(
        self,
        buffer: str,
        task: int,
        images_NHWC: Images,
        class_ids_N: npt.ArrayLike | None = None,
        *,
        fields: Mapping[str, Any] | None = None,
        options: IngestOptions | None = None,
        idempotency_key: str | None = None,
    ) -> Ingest:
        """Hand over the images of a task, uint8 `[N, H, W, C]`; they are safe with the service when this returns.

        Selection and encoding follow in the background: `wait` for them. Every upload is added to what the task has:
        the same images once more, without a key, are held twice.

        Args:
            buffer: a buffer's name.
            task: the task's number.
            images_NHWC: uint8 RGB or grey; `[N, H, W]` is grey. Or, alone, what gives images and classes: a PyTorch
                data set or loader, one of Hugging Face, any iterable of (image, class).
            class_ids_N: N integers, which are class ids, or N strings, which are names: those that the buffer knows
                stand for the ids that they have there, new ones get new ids (see `class_names`).
            fields: the columns that the buffer declares, by name: arrays `[N, ...]`, lists of N arrays where they are
                ragged, lists of N texts.
            options: how images are ranked and measured.
            idempotency_key: the same key makes a repeated upload the same ingest, also after the end of this process;
                None makes a new one, which only repeats within this call.

        Raises:
            ValueError: arrays of another type or shape, or of no images; a string that is no name. The message says
                what converts them.
            NotFound: no such buffer.
            Conflict: the buffer is frozen or has images of another shape, the key another body.

        Fields that are not what the buffer declares end the ingest: `wait` raises `BadUpload`.
        """
        path = _ingests(buffer, task)
        arrays_NHWC, ids_N, names = labelled(images_NHWC, class_ids_N)
        if not len(arrays_NHWC):
            raise ValueError("there are no images to upload")
        classes_N = ids_N if names is None else np.array(names)[ids_N]
        # Arrays become the same bytes twice at some 200,000 images/s, so the service can check before it accepts.
        digest = hashlib.sha256()
        for chunk in tar.write(arrays_NHWC, classes_N, fields=fields):
            digest.update(chunk)
        stream = _TarStream(lambda: tar.write(arrays_NHWC, classes_N, fields=fields))
        return self._upload(path, stream, options, idempotency_key, digest.digest())

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
        path, files = _ingests(buffer, task), folders.images(Path(folder))
        stream = _TarStream(lambda: folders.chunks(files, resize=resize))
        return self._upload(path, stream, options, idempotency_key, None)

    def upload_tar(
        self,
        buffer: str,
        task: int,
        source: str | Path | BinaryIO | Callable[[], Iterator[bytes]],
        *,
        options: IngestOptions | None = None,
        idempotency_key: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Ingest:
        """Hand over a WebDataset tar (`KEY.png` + `KEY.cls`) that is never held as a whole.

        Args:
            buffer: a buffer's name.
            task: the task's number.
            source: a file's path; a stream, which is sent once; or what gives the tar in pieces from its beginning,
                the same bytes each time that it is called (`engram.tar.write_parts` makes them of arrays).
            options: as in `upload`.
            idempotency_key: as in `upload`.
            progress: told the bytes sent so far.
        """
        path = _ingests(buffer, task)
        if isinstance(source, (str, Path)):
            named = Path(source)
            stream = _TarStream(lambda: _told(_file_chunks(named), progress))
        elif callable(source):
            made = source
            stream = _TarStream(lambda: _told(made(), progress))
        else:
            file = source
            stream = _TarStream(lambda: _told(_chunks(file), progress), replayable=False)
        return self._upload(path, stream, options, idempotency_key, None)

    def _upload(
        self,
        path: str,
        stream: _TarStream,
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
            for chunk in stream.chunks():
                sent.update(chunk)
                yield chunk

        ingest = self._http.fetch(
            Ingest,
            "POST",
            f"{path}?{urlencode(query)}",
            headers=headers,
            body=Body(hashed, TAR_MEDIA_TYPE),
            retry=stream.replayable,
        )
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
        path = _path(ingest) + (f"?wait={wait_s:g}" if wait_s else "")
        return self._http.fetch(Ingest, "GET", path, wait_s=wait_s)

    def ingests(self, buffer: str | None = None, *, page_size: int = 100) -> Iterator[Ingest]:
        """The ingests of a buffer, or of all, the newest first, page after page.

        Raises:
            NotFound: no such buffer.
        """
        for page in self._http.pages(IngestPage, "/v1/ingests", limit=page_size, buffer=buffer):
            yield from page.ingests

    def wait(
        self,
        ingest: str | Ingest,
        *,
        progress: Callable[[Ingest], None] | None = None,
        timeout_s: float | None = None,
    ) -> Ingest:
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
        return self._http.fetch(Ingest, "DELETE", _path(ingest))

    def retry(self, ingest: str | Ingest) -> Ingest:
        """The ingest, which failed or was cancelled, queued again from the upload that the service has kept of it.

        Raises:
            NotFound: no such ingest.
            Conflict: it has not ended or has committed, or its upload is not kept any more (see `can_retry`).
        """
        return self._http.fetch(Ingest, "POST", f"{_path(ingest)}/retry")


def _ingests(buffer: str, task: int) -> str:
    """What uploads are sent to; before anything is read, it says what is no task."""
    return f"{paths.of_task(buffer, task)}/ingests"


def _path(ingest: str | Ingest) -> str:
    return paths.of_ingest(ingest if isinstance(ingest, str) else ingest.id)


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(1 << 20):
        yield chunk


def _file_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        yield from _chunks(stream)


def _told(chunks: Iterator[bytes], progress: Callable[[int], None] | None) -> Iterator[bytes]:
    """The chunks; after each the bytes so far are told."""
    sent = 0
    for chunk in chunks:
        yield chunk
        sent += len(chunk)
        if progress is not None:
            progress(sent)
