"""Makes arrays of the labelled images that a caller hands over: uint8 `[N, H, W, C]`, and a class for each.

What has `__array__` is taken as numpy takes it: arrays, lists of arrays or PIL images, PyTorch tensors on the CPU. In
place of images and classes there may be one object that gives both: a data set or any iterable of (image, class), rows
that name them (Hugging Face), or batches of either (a `DataLoader`). Values are never changed: for images of another
type or layout the error says the expression that converts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import index
from reprlib import repr as shortened
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engram.names import MAX_CLASS_ID, class_name

UInt8Array = npt.NDArray[np.uint8]


class Indexed(Protocol):
    """A PyTorch data set, which is not iterable by its type."""

    def __getitem__(self, number: int, /) -> Any:
        """A pair of an image and its class."""


Images = UInt8Array | Iterable[Any] | Indexed
"""Images, or what gives images and classes."""

# How data sets of images call their columns, the finer of two labels first.
_IMAGE_COLUMNS = ("image", "img", "images")
_CLASS_COLUMNS = ("fine_label", "label", "labels")


def labelled(
    images: Images, class_ids: npt.ArrayLike | None = None
) -> tuple[UInt8Array, npt.NDArray[np.int64], tuple[str, ...] | None]:
    """Images [N, H, W, C] and an int64 for each: its class id and None, or its place in the names that follow.

    Raises:
        ValueError: not uint8 `[N, H, W, C]` or `[N, H, W]`, C not 1 or 3, sizes or counts that differ, a class id out
            of range, a string that is no name of a class, a row that is no pair.
    """
    if class_ids is None:
        images, class_ids = _columns(images)
    images_NHWC = _images(images)
    ids = np.asarray(class_ids)
    if ids.dtype == object and all(isinstance(name, str) for name in ids.flat):
        ids = ids.astype(str)
    is_named = ids.dtype.kind == "U"
    if ids.shape != (len(images_NHWC),) or (ids.size and not is_named and not np.issubdtype(ids.dtype, np.integer)):
        raise _no_class_ids(images_NHWC, ids)
    if is_named:
        # Texts that differ may be one name: places of texts become places of names.
        texts, places = np.unique(ids, return_inverse=True)
        spelled = [class_name(text) for text in texts.tolist()]
        names = tuple(sorted({*spelled}))
        place_of = {name: place for place, name in enumerate(names)}
        return images_NHWC, np.array([place_of[name] for name in spelled], np.int64)[places], names
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= MAX_CLASS_ID:
        raise ValueError(f"class ids must be 0 to {MAX_CLASS_ID}, got {int(ids.min())} to {int(ids.max())}")
    return images_NHWC, ids.astype(np.int64), None


def task_number(task: int) -> int:
    """The task as an integer.

    Raises:
        ValueError: it is none.
    """
    try:
        return index(task)
    except TypeError:
        raise ValueError(
            f"a task is an integer, the first one usually 0, not the {type(task).__name__} {shortened(task)}"
        ) from None


def _images(images: Any) -> UInt8Array:
    if isinstance(images, list | tuple) and not images:
        raise ValueError("there are no images")
    try:
        array = np.asarray([*map(_pixels, images)] if isinstance(images, list | tuple) else images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(_of_several_sizes(images) or f"images cannot be made an array: {error}") from error
    if array.dtype == object:
        raise ValueError(
            _of_several_sizes(images)
            or f"images are an array of {type(array.flat[0]).__name__ if array.size else 'nothing'}: give uint8 "
            "[N, H, W, C] and class ids, or pairs (image, class) alone"
        )
    if array.ndim == 3:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
        given = "images" if isinstance(images, np.ndarray) else "numpy.asarray(images)"
        raise ValueError(
            f"images must be uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W], got {array.dtype} "
            f"{list(np.shape(images))}{_mend(array, given)}"
        )
    return array


def _mend(array: npt.NDArray[Any], images: str) -> str:
    """How such images, an expression for their array, become what is wanted, as the end of a sentence."""
    steps = []
    if array.dtype.kind not in "biuf":
        return "; give their pixels"
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
        images += ".transpose(0, 2, 3, 1)"
        steps.append("channels go last")
    elif array.ndim == 4 and array.shape[3] == 4:
        images += "[..., :3]"
        steps.append("without the alpha channel")
    elif array.ndim in (1, 2):
        return "; are images and class ids swapped?"
    elif array.ndim != 4 or array.shape[3] not in (1, 3):
        return ""
    if array.dtype != np.uint8 and array.size:
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 255):
            said = f" from {low:g} to {high:g}; give "
            if array.dtype.kind == "f":
                return said + "the images as they were before they were normalised"
            return said + "images whose values go from 0 to 255"
        if array.dtype.kind == "b":
            images = f"({images} * 255)"
            steps.append("black and white are 0 and 255")
        elif array.dtype.kind == "f" and high <= 1:
            images = f"({images} * 255).round()"
            steps.append("values from 0 to 1 times 255 (of a torchvision data set: leave out ToTensor)")
        elif array.dtype.kind == "f":
            images += ".round()"
        images += ".astype(numpy.uint8)"
    return f"; give {images}" + (f": {', '.join(steps)}" if steps else "")


def _no_class_ids(images_NHWC: UInt8Array, ids: npt.NDArray[Any]) -> ValueError:
    said = f"{len(images_NHWC)} images need as many integer class ids or names, got {ids.dtype} {list(ids.shape)}"
    if ids.shape == (len(images_NHWC),):
        said += {"f": "; give class_ids.astype(int)", "S": "; give class_ids.astype(str)"}.get(ids.dtype.kind, "")
    elif ids.shape == (len(images_NHWC), 1):
        said += "; give class_ids[:, 0]"
    elif ids.ndim == 2 and len(ids) == len(images_NHWC):
        said += "; give class_ids.argmax(1)"
    elif ids.size == 1 and images_NHWC.shape[2] in (1, 3):
        said += "; one image is given as images[None] and [class_id]"
    elif ids.ndim > 2:
        said += "; are images and class ids swapped?"
    return ValueError(said)


def _columns(source: Any) -> tuple[list[npt.NDArray[Any]], list[Any]]:
    """The images and the classes of something that gives both.

    Raises:
        ValueError: it does not.
    """
    if (
        isinstance(source, Mapping)
        and source
        and not any(name in source for name in (*_IMAGE_COLUMNS, *_CLASS_COLUMNS))
    ):
        raise ValueError(f"choose one of the parts {', '.join(map(repr, source))}: give source[{next(iter(source))!r}]")
    if isinstance(source, str | bytes | Mapping) or hasattr(source, "__array__") or not _is_iterable(source):
        raise ValueError(
            f"there are no class ids: give images and class ids, or an iterable of (image, class), not one "
            f"{type(source).__name__} alone"
        )
    images: list[npt.NDArray[Any]] = []
    classes: list[Any] = []
    for image, label in map(_pair, _rows(source)):
        array = _pixels(image)
        is_batch = not isinstance(label, str) and np.ndim(label) == 1
        if is_batch and array.shape[:1] != (len(label),):
            raise ValueError(
                f"a row has an array {list(array.shape)} and {len(label)} classes: of one image give one class, an "
                "integer or a name; of a batch as many images as classes"
            )
        if not images:
            _images(array if is_batch else array[None])  # of a large data set the first row says what is wrong
        images += list(array) if is_batch else [array]
        classes += list(np.asarray(label)) if is_batch else [label if isinstance(label, str) else np.asarray(label)]
    return images, [label if isinstance(label, str) else label.item() for label in classes]


def _is_iterable(source: Any) -> bool:
    return hasattr(source, "__iter__") or (hasattr(source, "__len__") and hasattr(source, "__getitem__"))


def _rows(source: Any) -> Iterator[Any]:
    """A PyTorch data set has a length and items, and may never say that it is at its end."""
    if hasattr(source, "__iter__"):
        return iter(source)
    return (source[number] for number in range(len(source)))


def _pair(row: Any) -> tuple[Any, Any]:
    if isinstance(row, Mapping):
        image, label = (
            next((name for name in names if name in row), None) for names in (_IMAGE_COLUMNS, _CLASS_COLUMNS)
        )
        if image is None or label is None:
            raise ValueError(
                f"rows have the columns {', '.join(map(repr, row))}: give ((row[image], row[class]) for row in ...)"
            )
        return row[image], row[label]
    if not isinstance(row, tuple | list) or len(row) != 2:
        what = f"{len(row)} values" if isinstance(row, tuple | list) else f"one {type(row).__name__}"
        raise ValueError(f"a row is {what}, not a pair of an image and its class")
    return row[0], row[1]


def _pixels(image: Any) -> npt.NDArray[Any]:
    """An image or a batch of them as an array.

    Raises:
        ValueError: one of PIL that is neither grey nor RGB.
    """
    mode = getattr(image, "mode", None)
    if isinstance(mode, str) and mode not in ("L", "RGB"):
        raise ValueError(f"a PIL image of mode {mode!r}, neither 'L' nor 'RGB': give image.convert('RGB')")
    return np.asarray(image)


def _of_several_sizes(images: Any) -> str | None:
    """What to say if that is what is wrong with these images."""
    shapes: dict[tuple[int, ...], int] = {}
    for number, image in enumerate(images if isinstance(images, Iterable) else ()):
        shapes.setdefault(np.shape(image), number)
        if len(shapes) > 1:
            (one, first), (other, second) = shapes.items()
            return (
                f"image {second} is {'x'.join(map(str, other))} and image {first} {'x'.join(map(str, one))}; all "
                "images of a buffer have one size and as many channels: resize or convert them first"
            )
    return None
