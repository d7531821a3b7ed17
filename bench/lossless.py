"""Keep exemplars without any loss in as few bytes as common codecs can: what compression gives for nothing.

Each class of a task is kept in the form that holds most of its ranking in its share:

    png      one PNG file each, optimised
    webp     one lossless WebP file each
    sheet    all images of the class below one another, as one lossless WebP: a solid archive, whose images share what
             the codec knows of them

Counted are the bytes of the files with their containers, one byte for the form, and 2 bytes for each image's class id.
On photographs and on Fashion-MNIST the sheet holds most: it takes 4 to 20 % fewer bytes than single WebP files, and
single PNG files take more. Sheets as PNG or lossless JPEG 2000, and the residuals of a median edge predictor under
LZMA, are all larger than as WebP, so they are not tried here.

Images are uint8 `[N, H, W, C]`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from engram.errors import BudgetExceeded
from engram_trainer.examples import Images
from engram_trainer.memory import Learned
from engram_trainer.plain_memory import CLASS_ID_BYTES, Kept, PlainMemory, kept_classes

FORM_BYTES = 1
LEAST_PART = 8
"""No archive takes less than this part of the pixels, so no ranking is looked at deeper; checked."""
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


def size(form: str, images_NHWC: Images) -> int:
    """All bytes of images of one class in a form; none for no images."""
    files = FORMS[form](images_NHWC)
    return sum(map(len, files)) + FORM_BYTES + CLASS_ID_BYTES * len(images_NHWC) if files else 0


def read(files: list[bytes], shape: tuple[int, int, int]) -> Images:
    """The images that are in files of any form, which are as high as `shape` or a multiple of it."""
    mode = "L" if shape[2] == 1 else "RGB"
    return np.concatenate(
        [np.asarray(Image.open(io.BytesIO(file)).convert(mode)).reshape(-1, *shape) for file in files]
    )


def fitting(images_NHWC: Images, share: int) -> tuple[int, str]:
    """How many of these images, best first, a share holds in the form that holds most, and that form."""
    counts = {form: _count(form, images_NHWC, share) for form in FORMS}
    best = max(counts, key=lambda form: counts[form])
    return counts[best], best


def _count(form: str, images_NHWC: Images, share: int) -> int:
    """The length of the longest prefix that fits: sizes grow with every image, but for a few bytes of a sheet's."""

    def fits(count: int) -> bool:
        return size(form, images_NHWC[:count]) <= share

    if form != "sheet":
        sizes = np.cumsum([len(file) + CLASS_ID_BYTES for file in FORMS[form](images_NHWC)])
        return int((sizes + FORM_BYTES <= share).sum())
    most = len(images_NHWC)
    low, high = 0, min(most, 8)  # low fits; grow until high does not
    while high < most and fits(high):
        low, high = high, min(most, 2 * high)
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
                archive = FORMS[form](images[:count])
                if not count:
                    raise BudgetExceeded(f"no image of class {class_id} fits {shares[task][class_id]} bytes")
                assert np.array_equal(read(archive, images.shape[1:]), images[:count]), f"{form} is not lossless"
                rows.append(own[:count])
                runs.append((class_id, count))
                spent += size(form, images[:count])
                self.forms[task, class_id] = form
            self._kept[task] = held.select(np.concatenate(rows))
            tasks.append((task, spent, runs))
        self._hold(tasks)
