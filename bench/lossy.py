"""Keep exemplars as lossy WebP or JPEG 2000, one file each: what other codecs do in the bytes of a strip.

Counted are 2 bytes for each image's class id, and of each file what a container of our own could not leave out, as
strips leave out the headers and tables of JPEG: of WebP all but the container (20 bytes), of JPEG 2000 all that follows
the main header. So these are lower bounds, which favours them.

    webp        quality 0 to 100, method 6
    jpeg2000    quality is the signal to noise ratio in dB; irreversible, with colour transform, 3 resolutions, which
                takes 40 % fewer bytes on 32x32 than the 6 that are the default

Images are uint8 `[N, H, W, C]`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from engram_trainer.examples import ClassIds, Images, Rows
from engram_trainer.local_memory import LocalConfig
from engram_trainer.plain_memory import Kept, PlainMemory, RawPixels

Codec = Literal["webp", "jpeg2000"]
CODECS: tuple[Codec, ...] = get_args(Codec)

WEBP_CONTAINER_BYTES = 20
_START_OF_TILE = b"\xff\x90"


def coded(image_HWC: Images, codec: Codec, quality: int) -> tuple[Images, int]:
    """The image as it comes back, and how many bytes of its file count."""
    picture, out = Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC), io.BytesIO()
    if codec == "webp":
        picture.save(out, "WEBP", quality=quality, method=6)
        count = len(out.getvalue()) - WEBP_CONTAINER_BYTES
    else:
        is_colour = int(image_HWC.shape[2] == 3)
        options: dict[str, Any] = {"quality_mode": "dB", "quality_layers": [quality], "num_resolutions": 3}
        picture.save(out, "JPEG2000", irreversible=True, no_jp2=True, mct=is_colour, **options)
        count = len(out.getvalue()) - out.getvalue().index(_START_OF_TILE)
    read = Image.open(io.BytesIO(out.getvalue())).convert(picture.mode)
    return np.asarray(read).reshape(image_HWC.shape), count


@dataclass(frozen=True, eq=False)
class Decoded(RawPixels):
    """Images as they come back from their files, and what these count."""

    counted: Rows

    @property
    def sizes(self) -> Rows:
        """Bytes of each."""
        return self.counted

    def select(self, rows: Rows) -> Decoded:
        """These, in this order."""
        return Decoded(self.images[rows], self.counted[rows])

    def joined(self, *others: RawPixels) -> Decoded:
        """These, then the others."""
        images = np.concatenate([self.images, *(other.images for other in others)])
        return Decoded(images, np.concatenate([self.counted, *(other.sizes for other in others)]))


class LossyMemory(PlainMemory):
    """Images as one lossy file each."""

    def __init__(self, config: LocalConfig, codec: Codec) -> None:
        self.codec = codec
        super().__init__(config)

    def _encoded(self, images_NHWC: Images, class_ids: ClassIds, fields: Mapping[str, Any]) -> Kept:
        assert self.config.quality is not None, "files have a quality"
        found = [coded(image, self.codec, self.config.quality) for image in images_NHWC]
        images, counts = np.stack([image for image, _ in found]), np.array([count for _, count in found], np.int64)
        return Kept(Decoded(images, counts), np.asarray(class_ids, np.int64))
