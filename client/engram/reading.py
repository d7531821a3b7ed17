"""What a buffer holds, over HTTP: its manifest, its packs, its exemplars one by one, and all of them as a tar."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from engram import etags, paths
from engram.errors import StripCorrupt
from engram.http import Http
from engram.schemas import Exemplar, ExemplarPage, Manifest


class Reading:
    """The methods of `Client` that read what is stored."""

    _http: Http

    def manifest(self, buffer: str, *, generation: int | None = None) -> Manifest:
        """The packs of a generation (None: the newest).

        Raises:
            NotFound: no such buffer, or a generation that is no longer kept.
        """
        query = "" if generation is None else f"?generation={generation}"
        return self._http.fetch(Manifest, "GET", f"{paths.of_buffer(buffer)}/manifest{query}")

    def manifest_after(self, buffer: str, manifest: Manifest) -> Manifest | None:
        """The newest manifest, or None if that is this one: the same generation of the same buffer."""
        path = f"{paths.of_buffer(buffer)}/manifest"
        held = [] if manifest.created_at is None else [etags.of(manifest.generation, manifest.created_at)]
        answer = self._http.send("GET", path, headers=[("If-None-Match", f'"{tag}"') for tag in held])
        return self._http.read(Manifest, answer, path) if answer else None

    def pack(self, digest: str) -> bytes:
        """A pack's bytes, which match its digest.

        Raises:
            NotFound: no such pack.
            StripCorrupt: the bytes do not match the digest.
        """
        content = self._http.send("GET", paths.of_pack(digest))
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise StripCorrupt(f"pack {digest} came with SHA-256 {found}; it was damaged on the way or on the disk")
        return content

    def exemplars(
        self,
        buffer: str,
        *,
        task: int | None = None,
        class_id: int | None = None,
        min_bytes: int | None = None,
        max_bytes: int | None = None,
        where: Sequence[str] = (),
        page_size: int = 500,
    ) -> Iterator[Exemplar]:
        """All exemplars that pass these filters, page after page.

        Args:
            buffer: a buffer's name.
            task: only of this task.
            class_id: only of this class.
            min_bytes: only those that take at least so many, their fields included.
            max_bytes: only those that take at most so many.
            where: conditions on fields, NAME:OPERATION:VALUE, as in "score:ge:0.5" or "key:prefix:train/"; all must
                hold. Numbers have eq, ne, lt, le, gt, ge; texts eq, ne, prefix.
            page_size: how many are asked for at a time.

        Raises:
            NotFound: no such buffer.
            InvalidRequest: a condition on a field that is not there, or that it cannot have.
        """
        path = f"{paths.of_buffer(buffer)}/exemplars"
        filters = {"task": task, "class_id": class_id, "min_bytes": min_bytes, "max_bytes": max_bytes}
        asked = {**filters, "where": list(where) or None, "limit": page_size}
        for page in self._http.pages(ExemplarPage, path, **asked):
            yield from page.exemplars

    def exemplar_jpeg(self, buffer: str, pack: str, row: int, *, quality: int | None = None) -> bytes:
        """One exemplar as a JPEG file, as it is stored or encoded again at a lower quality.

        Raises:
            NotFound: no such pack or row in the buffer.
            InvalidRequest: the quality is not a lower one.
        """
        query = "" if quality is None else f"?quality={quality:d}"
        return self._http.send("GET", f"{paths.of_exemplar(buffer, pack, row)}{query}")

    def exemplar_fields(self, buffer: str, pack: str, row: int) -> dict[str, Any]:
        """The fields of one exemplar as numbers, lists and texts; None stands for NaN and infinities.

        Raises:
            NotFound: no such pack or row in the buffer.
        """
        fields: dict[str, Any] = json.loads(self._http.send("GET", f"{paths.of_exemplar(buffer, pack, row)}/fields"))
        return fields

    def export(self, buffer: str, file: str | Path | BinaryIO, *, generation: int | None = None) -> int:
        """Write all exemplars to `file` as a WebDataset tar of JPEGs; returns its bytes.

        A file named by its path appears only when it is complete. `engram.decode_jpeg` gives the pixels of its members
        as draws have them; of other decoders they differ by 1 on average where colour is subsampled.
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
        with self._http.download(f"{paths.of_buffer(buffer)}/export{query}") as chunks:
            return sum(stream.write(chunk) for chunk in chunks)
