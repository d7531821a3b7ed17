"""Reads a folder of classes, `ROOT/CLASS/**/image.png`, as an upload.

If every class folder is named by an integer, that integer is the class id, and folders come in the order of these
numbers. Else the folders' names are the names of classes, and the buffer finds their ids: `cat` is the same class in
every upload. Hidden files and files that are no images (by extension) are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from engram import tar
from engram.errors import BadUpload, EngramError
from engram.fields import array_key
from engram.images import IMAGE_EXTENSIONS, decode
from engram.names import class_name

# Files are the user's own, so only a decoder's own limit applies; the service has its own.
_MAX_PIXELS = 2**28

_CHUNK_BYTES = 1 << 20


# What of a path names the image in the upload, without spaces and all that a tar would need a longer header for.
_NAME_CHARACTERS = 60
_ODD = re.compile(r"[^A-Za-z0-9._/-]")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image of a class folder."""

    path: Path
    class_id: int | str
    name: str
    """Its path below the folder of class folders, or the end of it, by which errors name it."""


def classes(root: Path) -> dict[Path, int | str]:
    """The class of every class folder: integers in their order, or names in that of their characters.

    Raises:
        BadUpload: no class folder there, integers and names side by side, a folder whose name names no class, or two
            folders of one class (`1` and `01`).
    """
    folders = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not folders:
        raise BadUpload(f"{root} has no class folders; expected {root}/CLASS/image.png")
    numbered = [folder for folder in folders if folder.name.isascii() and folder.name.isdigit()]
    if 0 < len(numbered) < len(folders):
        named = next(folder for folder in folders if folder not in numbered)
        raise BadUpload(
            f"the class folders of {root} are integers and names: {numbered[0].name!r} and {named.name!r}; "
            "the classes of an upload are all integers or all names"
        )
    if numbered:
        found: dict[Path, int | str] = {folder: int(folder.name) for folder in folders}
        found = dict(sorted(found.items(), key=lambda item: item[1]))
    else:
        try:
            found = {folder: class_name(folder.name) for folder in folders}
        except ValueError as error:
            raise BadUpload(f"a class folder of {root} has a name that is none of a class: {error}") from error
    if len(set(found.values())) != len(folders):
        kind = "integer" if numbered else "name"
        raise BadUpload(f"two class folders of {root} have the same {kind}: {', '.join(path.name for path in folders)}")
    return found


def images(root: Path) -> list[ImageFile]:
    """The images of every class folder, in the order of the classes and then of their paths.

    Raises:
        BadUpload: not a folder, no images, or as `classes`.
    """
    if not root.is_dir():
        raise BadUpload(f"{root} is not a folder")
    found = [
        ImageFile(path, class_id, _ODD.sub("_", path.relative_to(root).as_posix())[-_NAME_CHARACTERS:])
        for folder, class_id in classes(root).items()
        for path in sorted(folder.rglob("*"))
        if path.suffix[1:].lower() in IMAGE_EXTENSIONS and not path.name.startswith(".") and path.is_file()
    ]
    if not found:
        raise BadUpload(f"no class folder of {root} has an image (.{', .'.join(IMAGE_EXTENSIONS)})")
    return found


def chunks(files: list[ImageFile], *, resize: tuple[int, int] | None) -> Iterator[bytes]:
    """The images as a tar stream: files as they are, or resized to (H, W), RGB.

    Raises:
        BadUpload: a file to be resized is not a readable image; the message names it.
    """
    members: list[bytes] = []
    size = 0
    for number, file in enumerate(files):
        key = f"{array_key(number)}-{file.name.rpartition('.')[0]}"
        extension, content = _encoded(file, resize)
        members += [tar.entry(f"{key}.{extension}", content), tar.entry(f"{key}.cls", str(file.class_id).encode())]
        size += len(members[-2]) + len(members[-1])
        if size >= _CHUNK_BYTES:
            yield b"".join(members)
            members, size = [], 0
    yield b"".join([*members, tar.END])


def _encoded(file: ImageFile, resize: tuple[int, int] | None) -> tuple[str, bytes]:
    content = file.path.read_bytes()
    if resize is None:
        return file.path.suffix[1:], content
    height, width = resize
    try:
        pixels = decode(content, max_pixels=_MAX_PIXELS, min_side=1, max_side=2**16)
    except EngramError as error:
        raise BadUpload(f"{file.path}: {error}") from error
    picture = Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return "ppm", b"P6\n%d %d\n255\n" % (width, height) + resized.tobytes()
