"""This file is a folder of classes as an upload: `ROOT/CLASS/**/image.png`, one folder per class.

If every class folder is named by an integer, that integer is the class id; else ids follow the sorted names, from 0.
Hidden files and files that are no images (by extension) are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from engram import tar
from engram.errors import BadUpload, EngramError

# Files are the user's own, so only a decoder's own limit applies; the service has its own.
_MAX_PIXELS = 2**28


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image of a class folder."""

    path: Path
    class_id: int


def class_ids(root: Path) -> dict[str, int]:
    """The class id of every class folder, by its name.

    Raises:
        BadUpload: no class folder there, or two folders with the same integer (`1` and `01`).
    """
    names = sorted(child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not names:
        raise BadUpload(f"{root} has no class folders; expected {root}/CLASS/image.png")
    if not all(name.isascii() and name.isdigit() for name in names):
        return {name: number for number, name in enumerate(names)}
    ids = {name: int(name) for name in names}
    if len(set(ids.values())) != len(names):
        raise BadUpload(f"two class folders of {root} name the same integer: {', '.join(names)}")
    return ids


def images(root: Path) -> list[ImageFile]:
    """The images of every class folder, in the order of their paths.

    Raises:
        BadUpload: not a folder, no class folders, no images.
    """
    if not root.is_dir():
        raise BadUpload(f"{root} is not a folder")
    found = [
        ImageFile(path, class_id)
        for name, class_id in class_ids(root).items()
        for path in sorted((root / name).rglob("*"))
        if path.suffix[1:].lower() in tar.IMAGE_EXTENSIONS and not path.name.startswith(".") and path.is_file()
    ]
    if not found:
        raise BadUpload(f"no class folder of {root} has an image (.{', .'.join(tar.IMAGE_EXTENSIONS)})")
    return found


def chunks(files: list[ImageFile], *, resize: tuple[int, int] | None) -> Iterator[bytes]:
    """The images as a tar stream: files as they are, or resized to (H, W), RGB.

    Raises:
        BadUpload: a file to be resized is not a readable image; the message names it.
    """
    return tar.write_encoded(_entry(file, resize) for file in files)


def _entry(file: ImageFile, resize: tuple[int, int] | None) -> tuple[str, bytes, int]:
    content = file.path.read_bytes()
    if resize is None:
        return file.path.suffix[1:], content, file.class_id
    height, width = resize
    try:
        pixels = tar.decode_image(content, max_pixels=_MAX_PIXELS, min_side=1, max_side=2**16)
    except EngramError as error:
        raise BadUpload(f"{file.path}: {error}") from error
    picture = Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return "ppm", b"P6\n%d %d\n255\n" % (width, height) + resized.tobytes(), file.class_id
