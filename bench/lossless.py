"""Keep exemplars without any loss in as few bytes as common codecs can: what compression gives for nothing.

Each class of a task is kept in the form that holds most of its ranking in its share:

    png      one PNG file each, optimised
    webp     one lossless WebP file each
    sheet    all images of the class below one another, as one lossless WebP: a solid archive, whose images share what
             the codec knows of them

Counted are the bytes of the files with their containers, one byte for the form, and 2 bytes for each image's class id.
On photographs and on Fashion-MNIST the sheet holds most: it takes 6 to 17 % fewer bytes than single WebP files, and
single PNG files take more. Sheets as PNG or lossless JPEG 2000, and the residuals of a median edge predictor under
LZMA, are all larger than as WebP, so they are not tried here.

Images are uint8 `[N, H, W, C]`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from engram.errors import BudgetExceeded
from engram_trainer.examples import Images
from engram_trainer.memory import Learned
from engram_trainer.plain_memory import CLASS_ID_BYTES, Kept, PlainMemory, kept_classes

FORM_BYTES = 1
LEAST_PART = 8
"""An archive takes more than an eighth of the pixels, so no ranking is looked at deeper."""
_EFFORTS = ({"method": 4, "quality": 100}, {"method": 6, "quality": 99})
"""Which is smaller differs by image. Method 6 at quality 100 takes forty times as long and gains nothing."""

Form = Callable[[Images], list[bytes]]


def png(images_NHWC: Images) -> list[bytes]:
    """One file each."""
    return [_file(image, "PNG", optimize=True) for image in images_NHWC]


def webp(images_NHWC: Images) -> list[bytes]:
    """One file each."""
    return [_webp(image) for image in images_NHWC]


def sheet(images_NHWC: Images) -> list[bytes]:
    """One file of all."""
    count, height, width, channels = images_NHWC.shape
    return [_webp(images_NHWC.reshape(count * height, width, channels))] if count else []


FORMS: Mapping[str, Form] = {"png": png, "webp": webp, "sheet": sheet}


def size(files: Sequence[bytes], count: int) -> int:
    """All bytes of `count` images of one class in these files; none for no images."""
    return sum(map(len, files)) + FORM_BYTES + CLASS_ID_BYTES * count if count else 0


def read(files: Sequence[bytes], shape: tuple[int, int, int]) -> Images:
    """The images that are in files of any form, which are as high as `shape` or a multiple of it."""
    mode = "L" if shape[2] == 1 else "RGB"
    return np.concatenate(
        [np.asarray(Image.open(io.BytesIO(file)).convert(mode)).reshape(-1, *shape) for file in files]
    )


def fitting(images_NHWC: Images, share: int) -> tuple[int, str]:
    """How many of these images, best first, a share holds in the form that holds most, and that form."""
    counts = {form: _files(form, images_NHWC, share) for form in ("png", "webp")}
    counts["sheet"] = _sheet(images_NHWC, share, counts["webp"])
    best = max(counts, key=lambda form: counts[form])
    return counts[best], best


def _files(form: str, images_NHWC: Images, share: int) -> int:
    spent = FORM_BYTES
    for place in range(len(images_NHWC)):
        [file] = FORMS[form](images_NHWC[place : place + 1])
        spent += len(file) + CLASS_ID_BYTES
        if spent > share:
            return place
    return len(images_NHWC)


def _sheet(images_NHWC: Images, share: int, guess: int) -> int:
    """The longest prefix that fits as a sheet, whose size grows with every image."""

    def fits(count: int) -> bool:
        return size(sheet(images_NHWC[:count]), count) <= share

    most = len(images_NHWC)
    low = guess if fits(guess) else 0
    high = min(most, low + max(2, low // 4))
    while high < most and fits(high):
        low, high = high, min(most, high + max(2, high // 4))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _webp(image_HWC: Images) -> bytes:
    return min((_file(image_HWC, "WEBP", lossless=True, exact=True, **effort) for effort in _EFFORTS), key=len)


def _file(image_HWC: Images, codec: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC).save(out, codec, **options)
    return out.getvalue()


class LosslessMemory(PlainMemory):
    """Images in lossless archives, one for each class of a task; at hand they are pixels."""

    forms: dict[tuple[int, int], str]
    """Of each class of each task."""

    def add(self, learned: Learned) -> None:
        """As `LocalMemory.add`, for examples without fields."""
        examples, task = learned.examples, learned.task
        shares = self._shares(task, examples.class_ids)
        reach = {class_id: LEAST_PART * share for class_id, share in shares[task].items()}
        parts = [
            self._encoded(examples.images.read(ranked), examples.class_ids[ranked], {})
            for _, ranked in self._ranked(learned, reach)
        ]
        self._keep({**self._kept, task: parts[0].joined(*parts[1:])}, shares)

    def _keep(self, kept: dict[int, Kept], shares: Mapping[int, Mapping[int, int]] | None = None) -> None:
        """The longest prefix of each class that its share holds is kept, and counts as its archive."""
        self.forms = {}
        self._kept, tasks = {}, []
        for task, held in sorted(kept.items()):
            rows, runs, spent = [], [], 0
            for class_id in kept_classes(held.class_ids):
                assert shares is not None, "what is kept has shares"
                own = np.flatnonzero(held.class_ids == class_id)
                images = held.coded.images[own]
                count, form = fitting(images, shares[task][class_id])
                if not count:
                    raise BudgetExceeded(f"no image of class {class_id} fits {shares[task][class_id]} bytes")
                archive = FORMS[form](images[:count])
                assert np.array_equal(read(archive, images.shape[1:]), images[:count]), f"{form} is not lossless"
                rows.append(own[:count])
                runs.append((class_id, count))
                spent += size(archive, count)
                self.forms[task, class_id] = form
            self._kept[task] = held.select(np.concatenate(rows))
            tasks.append((task, spent, runs))
        self._hold(tasks)
