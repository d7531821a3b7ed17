"""Class folders are listed cheaply and read file by file; what is wrong with one is one sentence."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engram.errors import BadUpload, NotFound
from engram_trainer.datasets import load
from tests.trainer.tiny import assert_same, encoded, tiny, write_folder


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_of_class_folders_is_read_with_its_names(tmp_path: Path, channels: int, test: str) -> None:
    write_folder(tmp_path, tiny(channels), test=test)
    found = load(str(tmp_path))
    assert found.class_names == ("cat", "dog")
    assert found.shape == (5, 4, channels)
    assert not found.train.images.is_at_hand
    assert_same(found, tiny(channels))


def test_rows_are_read_in_any_order_here_and_after_a_pickle(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny())
    images = load(str(tmp_path)).train.images
    rows = np.array([4, 0, 5, 4])
    for each in (images, pickle.loads(pickle.dumps(images))):
        np.testing.assert_array_equal(each.read(rows), tiny().train.read()[rows])


def test_images_stay_where_they_are_until_they_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny())
    found = load(str(tmp_path))
    last = tmp_path / "train" / "dog" / "005.png"
    last.write_bytes(encoded(np.full((5, 4, 1), 7, np.uint8)))
    assert found.train.images.read(np.array([5])).tolist() == np.full((1, 5, 4, 1), 7).tolist()
    last.unlink()
    with pytest.raises(BadUpload, match=r"train/dog/005\.png cannot be read: No such file"):
        found.train.images.read(np.array([5]))


def test_an_image_is_a_name_and_four_bytes_in_memory_and_in_a_pickle(tmp_path: Path) -> None:
    for split, count in (("train", 3000), ("test", 1)):
        (tmp_path / split / "cat").mkdir(parents=True)
        content = encoded(np.zeros((1, 1, 1), np.uint8))
        for number in range(count):
            (tmp_path / split / "cat" / f"{number:06}.png").write_bytes(content)
    images = load(str(tmp_path), resize=1).train.images
    assert len(pickle.dumps(images)) < 3000 * (len("000000.png") + 4) + 2000


def test_integer_folders_are_their_class_ids_in_numeric_order(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 1), dtype=np.uint8)
    for split in ("train", "test"):
        for name, image in zip(("10", "9", "2"), images, strict=True):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(encoded(image))
    found = load(str(tmp_path))
    assert (found.classes, found.class_names) == ((2, 9, 10), ())
    assert found.train.class_ids.tolist() == found.test.class_ids.tolist() == [2, 9, 10]
    np.testing.assert_array_equal(found.train.read(), images[::-1])
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(BadUpload, match="'10' and 'cat'"):
        load(str(tmp_path))


def test_names_that_begin_with_a_letter_and_numbers_are_sorted_as_names(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("n10", "n9", "n2"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(encoded(np.zeros((1, 1, 1), np.uint8)))
    assert load(str(tmp_path)).class_names == ("n10", "n2", "n9")


def test_files_below_a_class_folder_count_hidden_and_other_ones_do_not(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny())
    cat = tmp_path / "train" / "cat"
    (cat / "more").mkdir()
    (cat / "001.png").rename(cat / "more" / "0.PNG")
    (cat / ".hidden.png").write_bytes(b"")
    (cat / "notes.txt").write_text("")
    (tmp_path / "train" / ".cache").mkdir()
    assert load(str(tmp_path)).train.class_ids.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_class_folder_may_be_a_link(tmp_path: Path) -> None:
    write_folder(tmp_path / "whole", tiny())
    for split in ("train", "test"):
        (tmp_path / "part" / split).mkdir(parents=True)
        (tmp_path / "part" / split / "dog").symlink_to(tmp_path / "whole" / split / "dog")
    assert load(str(tmp_path / "part")).train.class_ids.tolist() == [0, 0, 0]


def test_a_class_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny())
    empty = tmp_path / "train" / "bird"
    empty.mkdir()
    with pytest.raises(NotFound, match=r"train/bird has no image \(\.png, .*\)$"):
        load(str(tmp_path))
    for name in ("a.tif", "b.tif", "c.xyz"):
        (empty / name).write_bytes(b"")
    with pytest.raises(NotFound, match=r"it has 3 files of other kinds, most of them \.tif$"):
        load(str(tmp_path))


def test_a_class_of_one_split_only_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny())
    (tmp_path / "test" / "bird").mkdir()
    with pytest.raises(NotFound, match=r"test has the class folders \['bird'\], which train/ has not"):
        load(str(tmp_path))
    (tmp_path / "test" / "bird").rename(tmp_path / "train" / "bird")
    Image.new("L", (4, 5)).save(tmp_path / "train" / "bird" / "0.png")
    with pytest.raises(NotFound, match="has no test images of the class 'bird'"):
        load(str(tmp_path))


def test_a_folder_without_test_images_says_what_is_needed(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny())
    (tmp_path / "test").rename(tmp_path / "other")
    with pytest.raises(NotFound, match="needs train/CLASS/ and test/CLASS/"):
        load(str(tmp_path))
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(NotFound, match="needs train/CLASS/ and test/CLASS/"):
        load(str(tmp_path))


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny())
    (tmp_path / "test" / "dog" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(BadUpload, match=r"test/dog/broken\.png cannot be read as an image: it is none"):
        load(str(tmp_path))
