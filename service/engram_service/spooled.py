"""Reads the images of a spooled upload: once from end to end to check them, then by number in any order.

The first pass decodes every image (a PPM or PGM only needs its header) and keeps 25 bytes about each: where it is,
how long it is, its class, whether its pixels lie in the file as they are. So an upload is refused before any
work is done on it, and 100,000 images take 2.5 MB, whatever their size. Images are uint8 [N, H, W, C], C 1 or 3,
all of one shape. Names of classes are kept once each: `class_ids` are then places in `names`.

Fields are checked in the same pass and written, as records, to a file beside the upload that has no name, so that it
goes with the process; 8 bytes about each record stay in memory.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from engram import images, tar
from engram.errors import BadUpload, EngramError, TooLarge, Unavailable
from engram.fields import NO_FIELDS, Schema
from engram.files import disk_errors

from .settings import Settings

UInt8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
Shape = tuple[int, int, int]

# Decoded images that are kept: each candidate quality reads the same ones again. One of the largest fits.
DECODED_BYTES = 2**26


class SpooledImages:
    """The images of one upload. Enter it to keep the file open."""

    def __init__(
        self, path: Path, settings: Settings, report: Callable[[int], None], schema: Schema = NO_FIELDS
    ) -> None:
        """Every image has been decoded once.

        Args:
            path: the tar stream.
            settings: limits on images, classes, pixels and sides.
            report: called for each image, and often, with the number of images found so far; what it raises ends the
                pass.
            schema: the fields that every image must bring.

        Raises:
            BadUpload: the tar, an image or a field is not what it should be, shapes differ, ids and names are mixed, or
                there is no image.
            TooLarge: beyond a limit.
            StorageFull: the disk has no room for the fields.
            Unavailable: there is no such file.
        """
        self.schema = schema
        self._records: BinaryIO | None = None
        self._record_ends = array("q", [0])
        self._settings, self._path, self._file = settings, path, -1
        self._offsets, self._sizes, self._raw = array("q"), array("q"), bytearray()
        self._class_ids: array[int] = array("q")
        self._places: dict[int | str, int] = {}
        # In the order of their last use.
        self._kept: dict[int, UInt8Array] = {}
        self.shape: Shape = (0, 0, 0)
        try:
            self._read(report)
        except BaseException:
            self._close()
            raise
        self.class_ids: IntArray = np.frombuffer(self._class_ids, np.int64)
        self.names: tuple[str, ...] | None = tuple(name for name in self._places if isinstance(name, str)) or None

    def _read(self, report: Callable[[int], None]) -> None:
        # Large reads: a header, a label and a small image each would be a system call of its own.
        try:
            opened = self._path.open("rb", buffering=1 << 20)
        except FileNotFoundError:
            raise Unavailable(
                f"the upload {self._path.name} is not in the spool folder (a restore without it, or a worker with "
                "another data folder than the service's?); upload its images again"
            ) from None
        with opened as stream:
            for member in tar.read(stream, schema=self.schema, check=lambda: report(len(self))):
                self._add(member)
                report(len(self))
        if len(self) == 0:
            raise BadUpload(
                "the upload has 0 images; it must hold KEY.ppm|pgm|png|jpg|jpeg|webp + KEY.cls pairs", images=0
            )

    def __len__(self) -> int:
        return len(self._offsets)

    def __enter__(self) -> SpooledImages:
        self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        self._file = -1
        self._close()

    def read(self, indices: npt.ArrayLike) -> UInt8Array:
        """These images, uint8 [n, H, W, C], in this order.

        Raises:
            IndexError: there is no such image.
        """
        wanted = np.asarray(indices, dtype=np.int64).tolist()
        images = np.empty((len(wanted), *self.shape), np.uint8)
        image_bytes = images[0].nbytes if wanted else 0
        for image, number in zip(images, wanted, strict=True):
            offset, size = self._offsets[number], self._sizes[number]
            if self._raw[number]:
                if os.preadv(self._file, [image.data], offset + size - image_bytes) != image_bytes:
                    raise EngramError(f"the spooled upload {self._path.name} became shorter while it was read")
            else:
                image[:] = self._decoded(number)
        return images

    def records(self, indices: npt.ArrayLike) -> list[bytes]:
        """The fields of these images, in this order.

        Raises:
            IndexError: there is no such image.
        """
        assert self._records is not None, "images without fields are not asked for them"
        file, ends = self._records.fileno(), self._record_ends
        wanted = np.asarray(indices, dtype=np.int64).tolist()
        return [os.pread(file, ends[number + 1] - ends[number], ends[number]) for number in wanted]

    def _decoded(self, number: int) -> UInt8Array:
        """The pixels of an image that does not lie in the file as they are."""
        found = self._kept.pop(number, None)
        if found is None:
            found = self._decode(os.pread(self._file, self._sizes[number], self._offsets[number]), "")
            while self._kept and (len(self._kept) + 1) * found.nbytes > DECODED_BYTES:
                del self._kept[next(iter(self._kept))]
        self._kept[number] = found
        return found

    def _close(self) -> None:
        if self._records is not None:
            self._records.close()

    def _add(self, member: tar.Member) -> None:
        settings = self._settings
        pixels = (len(self) + 1) * self.shape[0] * self.shape[1]
        if pixels > settings.max_decoded_pixels:
            raise TooLarge(
                f"the images up to member {member.name!r} have {pixels} pixels together, at most "
                f"{settings.max_decoded_pixels} are decoded of one upload; split it, or make the images smaller",
                member=member.name,
                max_decoded_pixels=settings.max_decoded_pixels,
            )
        found = self._decode(member.image, member.name).shape
        if len(self) == 0:
            self.shape = found[0], found[1], found[2]
        if found != self.shape:
            raise BadUpload(
                f"member {member.name!r} is {_text(found)} (height x width x channels), those before it are "
                f"{_text(self.shape)}; all images of a buffer have one shape, resize them first",
                member=member.name,
            )
        if len(self) == settings.max_images:
            raise TooLarge(
                f"the upload has more than {settings.max_images} images; split it", max_images=settings.max_images
            )
        place = self._places.setdefault(member.class_id, len(self._places))
        if len(self._places) > settings.max_classes:
            raise TooLarge(
                f"the upload has more than {settings.max_classes} classes; are these class ids?",
                max_classes=settings.max_classes,
            )
        self._offsets.append(member.offset)
        self._sizes.append(member.size)
        self._class_ids.append(place if isinstance(member.class_id, str) else member.class_id)
        self._raw.append(member.image[:2] in (b"P5", b"P6"))
        if self.schema:
            self._add_record(self.schema.record(member.fields, f"image {member.key!r}"))

    def _add_record(self, record: bytes) -> None:
        with disk_errors(self._path, len(record)):
            if self._records is None:
                self._records = TemporaryFile(dir=self._path.parent, buffering=0)  # noqa: SIM115
            rest = memoryview(record)
            while rest:
                rest = rest[self._records.write(rest) :]
        self._record_ends.append(self._record_ends[-1] + len(record))

    def _decode(self, data: bytes, name: str) -> UInt8Array:
        try:
            return images.decode(data, max_pixels=self._settings.max_pixels, min_side=self._settings.min_side_pixels)
        except (BadUpload, TooLarge) as error:
            raise type(error)(f"member {name!r}: {error.message}", **error.details, member=name) from error


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
