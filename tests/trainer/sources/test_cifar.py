"""CIFAR's archives are read as their authors publish them, and a damaged or hostile one is one sentence."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram.errors import BadUpload, NotFound
from engram_trainer.datasets import load

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FINE = [f"fine {number}" for number in range(100)]
COARSE = [f"coarse {number}" for number in range(20)]


class Batch:
    """Random pixels as planes, with labels; every class occurs."""

    def __init__(self, count: int, classes: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.planes = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        self.labels = [place % classes for place in range(count)]
        self.coarse = [label % 20 for label in self.labels]

    @property
    def images(self) -> Any:
        """Pixel by pixel as the archives' page says: red first, rows from the top."""
        return np.stack([self.planes[:, plane * 1024 :][:, :1024] for plane in range(3)], 2).reshape(-1, 32, 32, 3)

    def ten(self) -> bytes:
        return b"".join(bytes([label]) + row.tobytes() for label, row in zip(self.labels, self.planes, strict=True))

    def hundred(self) -> bytes:
        rows = zip(self.coarse, self.labels, self.planes, strict=True)
        return b"".join(bytes([coarse, fine]) + row.tobytes() for coarse, fine, row in rows)


TRAIN = [Batch(10, 10, seed) for seed in range(5)]
TEST = Batch(20, 10, 9)
TRAIN_100, TEST_100 = Batch(200, 100, 7), Batch(100, 100, 8)


def python_2(value: object) -> bytes:
    """A pickle as Python 2 wrote it: its texts are bytes, and those of an array are a text.

    What protocol 2 of Python 3 writes differs in texts (unicode) and bytes (calls of `_codecs.encode`), so it is put
    together here for dictionaries of arrays, lists and texts.
    """

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    def put(value: object) -> bytes:
        if isinstance(value, dict):
            return b"}(" + b"".join(text(key.encode()) + put(each) for key, each in value.items()) + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(put, value)) + b"e"
        if isinstance(value, str):
            return text(value.encode())
        if isinstance(value, int):
            return b"J" + value.to_bytes(4, "little")
        assert isinstance(value, np.ndarray)
        dtype = (
            b"cnumpy\ndtype\n("
            + text(b"u1")
            + b"K\0K\1tR(K\3"
            + text(b"|")
            + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        )
        made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + text(b"b") + b"tR"
        shape = b"(" + b"".join(map(put, value.shape)) + b"t"
        return made + b"(K\1" + shape + dtype + b"\x89" + text(value.tobytes()) + b"tb"

    return b"\x80\x02" + put(value) + b"."


def ten_bin(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, batch in enumerate(TRAIN, 1):
        (folder / f"data_batch_{number}.bin").write_bytes(batch.ten())
    (folder / "test_batch.bin").write_bytes(TEST.ten())
    (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    (folder / "readme.html").write_text("")


def ten_py(folder: Path, dump: Callable[[object], bytes] = python_2) -> None:
    folder.mkdir(parents=True)
    for name, batch in [
        *((f"data_batch_{number}", batch) for number, batch in enumerate(TRAIN, 1)),
        ("test_batch", TEST),
    ]:
        content = {"batch_label": name, "labels": batch.labels, "data": batch.planes}
        (folder / name).write_bytes(dump(content))
    (folder / "batches.meta").write_bytes(dump({"num_cases_per_batch": 10, "label_names": TEN}))


def hundred_bin(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "train.bin").write_bytes(TRAIN_100.hundred())
    (folder / "test.bin").write_bytes(TEST_100.hundred())
    (folder / "fine_label_names.txt").write_text("\n".join(FINE))
    (folder / "coarse_label_names.txt").write_text("\n".join(COARSE))


def hundred_py(folder: Path, dump: Callable[[object], bytes] = python_2) -> None:
    folder.mkdir(parents=True)
    for name, batch in (("train", TRAIN_100), ("test", TEST_100)):
        content = {"fine_labels": batch.labels, "coarse_labels": batch.coarse, "data": batch.planes}
        (folder / name).write_bytes(dump(content))
    (folder / "meta").write_bytes(dump({"fine_label_names": FINE, "coarse_label_names": COARSE}))


WRITERS = {
    "cifar-10-batches-bin": ten_bin,
    "cifar-10-batches-py": ten_py,
    "cifar-100-binary": hundred_bin,
    "cifar-100-python": hundred_py,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("place", ["folder", "parent", "archive"])
def test_every_archive_is_read_wherever_it_is(tmp_path: Path, kind: str, place: str) -> None:
    folder = tmp_path / "data" / kind
    WRITERS[kind](folder)
    source = {"folder": folder, "parent": folder.parent, "archive": tmp_path / "cifar.tar.gz"}[place]
    if place == "archive":
        with tarfile.open(source, "w:gz") as archive:
            archive.add(folder, kind)
    found = load(str(source))
    is_ten = "10-" in kind
    train, test = (TRAIN, TEST) if is_ten else ([TRAIN_100], TEST_100)
    assert found.name == ("cifar-10" if is_ten else "cifar-100")
    assert found.class_names == tuple(TEN if is_ten else FINE)
    np.testing.assert_array_equal(found.train.read(), np.concatenate([batch.images for batch in train]))
    assert found.train.class_ids.tolist() == [label for batch in train for label in batch.labels]
    np.testing.assert_array_equal(found.test.read(), test.images)
    assert found.test.class_ids.tolist() == test.labels


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_batches_that_were_written_anew_are_read_too(tmp_path: Path, protocol: int) -> None:
    ten_py(tmp_path / "x", lambda value: pickle.dumps(value, protocol))
    np.testing.assert_array_equal(load(str(tmp_path / "x")).test.read(), TEST.images)


@pytest.mark.parametrize("kind", ["cifar-100-binary", "cifar-100-python"])
def test_coarse_labels_can_be_had(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / kind)
    found = load(f"{tmp_path / kind}#coarse")
    assert (found.name, found.class_names) == ("cifar-100-coarse", tuple(COARSE))
    assert found.test.class_ids.tolist() == TEST_100.coarse
    with pytest.raises(NotFound, match="fine and coarse labels, not 'medium'"):
        load(f"{tmp_path / kind}#medium")


def test_ten_classes_have_no_coarse_labels(tmp_path: Path) -> None:
    ten_bin(tmp_path / "x")
    with pytest.raises(NotFound, match="cifar-10 has no coarse labels"):
        load(f"{tmp_path / 'x'}#coarse")


def test_of_both_data_sets_one_has_to_be_chosen(tmp_path: Path) -> None:
    ten_bin(tmp_path / "cifar-10-batches-bin")
    ten_py(tmp_path / "cifar-10-batches-py")
    assert load(str(tmp_path)).name == "cifar-10"
    hundred_bin(tmp_path / "cifar-100-binary")
    with pytest.raises(NotFound, match=r"cifar-10-batches-bin and .*cifar-100-binary; give one of them"):
        load(str(tmp_path))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / "x")
    for path in sorted((tmp_path / "x").glob("test*")):
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(BadUpload, match=rf"{path.name} (has \d+ bytes, which is no whole number|is cut short)"):
            load(str(tmp_path / "x"))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_missing_file_is_named(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / "x")
    test = next((tmp_path / "x").glob("test*"))
    content = test.read_bytes()
    test.unlink()
    with pytest.raises(NotFound, match=f"has no file {test.name}"):
        load(str(tmp_path / "x"))
    if "100" not in kind:
        test.write_bytes(content)
        gone = next((tmp_path / "x").glob("data_batch_2*"))
        gone.unlink()
        with pytest.raises(NotFound, match=f"but no {gone.name}"):
            load(str(tmp_path / "x"))


def test_a_label_without_a_class_is_refused(tmp_path: Path) -> None:
    ten_bin(tmp_path / "x")
    (tmp_path / "x" / "batches.meta.txt").write_text("\n".join(TEN[:9]))
    with pytest.raises(BadUpload, match=r"data_batch_1\.bin has the label 9; there are 9 classes"):
        load(str(tmp_path / "x"))


def test_a_class_that_is_not_tested_is_named(tmp_path: Path) -> None:
    ten_bin(tmp_path / "x")
    (tmp_path / "x" / "test_batch.bin").write_bytes(TEST.ten()[: 8 * 3073])
    with pytest.raises(NotFound, match="cifar-10 has no test images of the classes 'ship', 'truck'"):
        load(str(tmp_path / "x"))


def test_files_of_the_other_data_set_are_no_records_of_this_one(tmp_path: Path) -> None:
    ten_bin(tmp_path / "x")
    (tmp_path / "x" / "data_batch_1.bin").write_bytes(TRAIN_100.hundred())
    with pytest.raises(BadUpload, match="no whole number of records of 3073 bytes: it is cut short, or not cifar-10"):
        load(str(tmp_path / "x"))


@pytest.mark.parametrize("cut", [-5000, 2000, 30, 0])
def test_an_archive_that_is_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    ten_bin(tmp_path / "x")
    with tarfile.open(tmp_path / "whole.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "x", "cifar-10-batches-bin")
    (tmp_path / "part.tar.gz").write_bytes((tmp_path / "whole.tar.gz").read_bytes()[:cut])
    with pytest.raises(BadUpload, match=r"part\.tar\.gz cannot be unpacked, it is damaged or cut short"):
        load(str(tmp_path / "part.tar.gz"))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "notes.txt", "notes.txt")
    with pytest.raises(NotFound, match=r"other\.tar\.gz is no archive of CIFAR-10 or CIFAR-100"):
        load(str(tmp_path / "other.tar.gz"))
    with pytest.raises(BadUpload, match=r"notes\.txt cannot be unpacked"):
        load(str(tmp_path / "notes.txt"))


class Runs:
    """When unpickled, makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_a_pickle_does_not_run_what_it_names(tmp_path: Path, name: str) -> None:
    ten_py(tmp_path / "x")
    (tmp_path / "x" / name).write_bytes(pickle.dumps({"data": Runs(tmp_path / "made")}))
    with pytest.raises(BadUpload, match=rf"{name} would call \w+\.mkdir when it is read.*; it was refused"):
        load(str(tmp_path / "x"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is cut short or no pickle"),
        (b"\x80\x02}(", "is cut short or no pickle"),
        (b"garbage", "is cut short or no pickle"),
        (pickle.dumps([1, 2]), "holds a list, not a dictionary"),
        (pickle.dumps({"labels": [1]}), r"is no batch of cifar-10: it has 'labels'"),
        (pickle.dumps({"data": np.zeros((2, 3072)), "labels": [0, 1]}), r"an array \(2, 3072\) of f8, not bytes"),
        (pickle.dumps({"data": np.zeros((2, 3), np.uint8), "labels": [0, 1]}), r"an array \(2, 3\) of u1, not bytes"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "2 images and labels of another"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": ["a", "b"]}), "labels of another kind"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}), "has the label -1"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "would call __builtin__.eval|would call builtins.eval"),
    ],
)  # fmt: skip
def test_a_batch_that_is_something_else_says_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    ten_py(tmp_path / "x")
    (tmp_path / "x" / "data_batch_3").write_bytes(content)
    with pytest.raises(BadUpload, match=f"data_batch_3 .*({message})"):
        load(str(tmp_path / "x"))


@pytest.mark.parametrize("position", range(0, 400, 7))
def test_a_flipped_byte_never_gives_a_traceback(tmp_path: Path, position: int) -> None:
    ten_py(tmp_path / "x")
    path = tmp_path / "x" / "data_batch_1"
    content = bytearray(path.read_bytes())
    content[position] ^= 0x21
    path.write_bytes(bytes(content))
    with suppress(BadUpload, NotFound):
        load(str(tmp_path / "x"))
