"""CIFAR-10 and CIFAR-100 as their authors publish them: a folder of one of four archives, its parent, or the .tar.gz.

    cifar-10-batches-bin    data_batch_1.bin ..., test_batch.bin: records of a label and the pixels; batches.meta.txt
    cifar-100-binary        train.bin, test.bin: records of a coarse label, a fine label and the pixels;
                            fine_label_names.txt, coarse_label_names.txt
    cifar-10-batches-py     data_batch_1 ..., test_batch, batches.meta: pickled dictionaries of `data` and `labels`
    cifar-100-python        train, test, meta: the same with `fine_labels` and `coarse_labels`

Pixels are the red, the green and the blue plane of 32 x 32 bytes, row by row; a label is a byte, the place of the
class's name in the list of names.

Source: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engram.errors import BadUpload, NotFound
from engram_trainer.examples import ClassIds, Examples, Images
from engram_trainer.sources.dataset import Dataset

Labels = Literal["fine", "coarse"]

_SIDE = 32
_PIXELS = 3 * _SIDE**2


@dataclass(frozen=True)
class _Archive:
    """Which files make one of the four."""

    folder: str
    name: str
    train: re.Pattern[str]
    test: str
    names: dict[Labels, str]
    is_pickled: bool

    def holds(self, files: Sequence[str]) -> bool:
        """Whether files of these names are such an archive, or what is left of one."""
        return any(self.train.fullmatch(file) for file in files) and self.names["fine"] in files


_ARCHIVES = (
    _Archive(
        "cifar-10-batches-bin",
        "cifar-10",
        re.compile(r"data_batch_\d+\.bin"),
        "test_batch.bin",
        {"fine": "batches.meta.txt"},
        is_pickled=False,
    ),
    _Archive(
        "cifar-10-batches-py",
        "cifar-10",
        re.compile(r"data_batch_\d+"),
        "test_batch",
        {"fine": "batches.meta"},
        is_pickled=True,
    ),
    _Archive(
        "cifar-100-binary",
        "cifar-100",
        re.compile(r"train\.bin"),
        "test.bin",
        {"fine": "fine_label_names.txt", "coarse": "coarse_label_names.txt"},
        is_pickled=False,
    ),
    _Archive(
        "cifar-100-python",
        "cifar-100",
        re.compile("train"),
        "test",
        {"fine": "meta", "coarse": "meta"},
        is_pickled=True,
    ),
)


def cifar_folder(folder: Path) -> Path | None:
    """This folder, or the one inside, if it is one of the four archives.

    Raises:
        NotFound: there are archives of both data sets inside.
    """
    if _archive(_files(folder)):
        return folder
    inside = [each for each in _ARCHIVES if _archive(_files(folder / each.folder))]
    if len({each.name for each in inside}) > 1:
        raise NotFound(f"{folder} holds {' and '.join(each.folder for each in inside)}; give one of them")
    return folder / inside[0].folder if inside else None


def read_cifar(path: Path, *, labels: Labels = "fine") -> Dataset:
    """The images of one of the four folders, or of a .tar.gz of one.

    Args:
        path: the folder or the archive.
        labels: of CIFAR-100: its 100 classes, or the 20 that these belong to.

    Raises:
        NotFound: a file is missing, or the data set has no such labels.
        BadUpload: a file is damaged, cut short, or of something else.
    """
    files = _from_tar(path) if path.is_file() else _from_folder(path)
    archive = _archive([*files])
    if archive is None:
        raise NotFound(f"{path} is no archive of CIFAR-10 or CIFAR-100")
    if labels not in archive.names:
        raise NotFound(f"{archive.name} has no {labels} labels")
    for needed in (archive.test, archive.names[labels]):
        if needed not in files:
            raise NotFound(f"{path} has no file {needed}")
    batches = sorted(filter(archive.train.fullmatch, files), key=lambda file: (len(file), file))
    if archive.name == "cifar-10":
        expected = [archive.test.replace("test_batch", f"data_batch_{1 + place}") for place in range(len(batches))]
        if batches != expected:
            raise NotFound(f"{path} has the files {', '.join(batches)}, but no {({*expected} - {*batches}).pop()}")
    read = _pickled if archive.is_pickled else _records
    names = _names(files[archive.names[labels]](), archive, labels, path)
    train, test = (
        _examples(
            [read(files[file](), archive.name, labels, f"{path}/{file}", len(names)) for file in split],
        )
        for split in (batches, [archive.test])
    )
    return Dataset(archive.name if labels == "fine" else f"{archive.name}-{labels}", train, test, names)


def _archive(files: Sequence[str]) -> _Archive | None:
    return next((each for each in _ARCHIVES if each.holds(files)), None)


_Files = dict[str, Callable[[], bytes]]


def _files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _from_folder(folder: Path) -> _Files:
    return {name: (folder / name).read_bytes for name in _files(folder)}


def _from_tar(path: Path) -> _Files:
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    contents[member.name.rpartition("/")[2]] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise BadUpload(f"{path} cannot be unpacked, it is damaged or cut short: {error}") from error
    return {name: io.BytesIO(content).getvalue for name, content in contents.items()}


def _examples(parts: Sequence[tuple[Images, ClassIds]]) -> Examples:
    planes, class_ids = (np.concatenate(each) for each in zip(*parts, strict=True))
    images = planes.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return Examples.of_arrays(np.ascontiguousarray(images), class_ids.astype(np.int64))


def _checked(pixels: Images, labels: Any, name: str, classes: int) -> tuple[Images, ClassIds]:
    """The rows of pixels and their labels.

    Raises:
        BadUpload: a label is no number of a class.
    """
    class_ids = np.asarray(labels)
    if class_ids.dtype.kind not in "iu" or class_ids.shape != (len(pixels),):
        raise BadUpload(f"{name} has {len(pixels)} images and labels of another kind or number: {class_ids.shape}")
    if len(class_ids) and not 0 <= class_ids.min() <= class_ids.max() < classes:
        outside = next(int(label) for label in class_ids if not 0 <= label < classes)
        raise BadUpload(f"{name} has the label {outside}; there are {classes} classes")
    return pixels, class_ids


def _records(data: bytes, kind: str, labels: Labels, name: str, classes: int) -> tuple[Images, ClassIds]:
    label_bytes = 1 if kind == "cifar-10" else 2
    size = label_bytes + _PIXELS
    if not data or len(data) % size:
        raise BadUpload(
            f"{name} has {len(data)} bytes, which is no whole number of records of {size} bytes: it is cut short, or "
            f"not {kind}"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    return _checked(records[:, label_bytes:], records[:, label_bytes - 1 if labels == "fine" else 0], name, classes)


def _names(data: bytes, archive: _Archive, labels: Labels, path: Path) -> tuple[str, ...]:
    """The names of the classes.

    Raises:
        BadUpload: there are none.
    """
    file = f"{path}/{archive.names[labels]}"
    if archive.is_pickled:
        names = _unpickled(data, file).get("label_names" if archive.name == "cifar-10" else f"{labels}_label_names")
    else:
        names = [line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BadUpload(f"{file} does not hold the names of the classes")
    return tuple(names)


def _pickled(data: bytes, kind: str, labels: Labels, name: str, classes: int) -> tuple[Images, ClassIds]:
    batch = _unpickled(data, name)
    pixels, found = batch.get("data"), batch.get("labels" if kind == "cifar-10" else f"{labels}_labels")
    if not isinstance(pixels, _Array) or not isinstance(found, list):
        raise BadUpload(f"{name} is no batch of {kind}: it has {', '.join(map(repr, sorted(batch)))}")
    return _checked(pixels.rows(name), found, name, classes)


def _unpickled(data: bytes, name: str) -> dict[str, Any]:
    """The dictionary that a batch or a list of names is.

    Raises:
        BadUpload: it is none, or is made of more than numbers, texts and arrays.
    """
    try:
        found = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except BadUpload as error:
        raise BadUpload(f"{name} {error.message}") from error
    except Exception as error:  # unpickling damaged bytes raises whatever the opcodes happen to run into
        raise BadUpload(f"{name} is cut short or no pickle: {error}") from error
    if not isinstance(found, dict):
        raise BadUpload(f"{name} holds a {type(found).__name__}, not a dictionary")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in found.items()}


class _Array:
    """Takes the place of a NumPy array: a pickle fills it in by `__setstate__`, and nothing of NumPy runs."""

    def __setstate__(self, state: Any) -> None:
        _, self._shape, dtype, self._is_fortran, data = state
        self._code = dtype.code
        self._data = data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))

    def rows(self, name: str) -> Images:
        """Rows of pixels.

        Raises:
            BadUpload: it is another array.
        """
        if (
            self._code not in ("u1", b"u1")
            or self._is_fortran
            or self._shape[1:] != (_PIXELS,)
            or len(self._data) != prod(self._shape)
        ):
            raise BadUpload(f"{name} holds an array {self._shape} of {self._code}, not bytes [N, {_PIXELS}]")
        return np.frombuffer(self._data, np.uint8).reshape(-1, _PIXELS)


class _Dtype:
    """Takes the place of a NumPy dtype."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes have not."""


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> _Array:
    """How a pickle of protocol 5 holds an array."""
    array = _Array()
    array.__setstate__((1, shape, dtype, order != "C", data))
    return array


def _encode(text: str, encoding: str) -> bytes:
    """How a pickle of protocol 2, written by Python 3, holds bytes."""
    if encoding != "latin1":
        raise BadUpload(f"holds bytes encoded as {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Knows what the batches need and nothing else: a pickle may name any function to be called."""

    def find_class(self, module: str, name: str, /) -> Any:
        known = {
            "numpy.core.multiarray._reconstruct": _reconstruct,
            "numpy._core.multiarray._reconstruct": _reconstruct,
            "numpy.core.numeric._frombuffer": _from_buffer,
            "numpy._core.numeric._frombuffer": _from_buffer,
            "numpy.ndarray": _Array,
            "numpy.dtype": _Dtype,
            "_codecs.encode": _encode,
        }
        if f"{module}.{name}" not in known:
            raise BadUpload(f"would call {module}.{name} when it is read, which no batch of CIFAR does; it was refused")
        return known[f"{module}.{name}"]
