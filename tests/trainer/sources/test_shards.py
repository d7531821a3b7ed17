"""WebDataset shards are indexed once and read at any place; what is wrong with one names the shard."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset

from engram import tar
from engram.errors import BadUpload, NotFound
from engram_trainer.datasets import Dataset, load
from engram_trainer.examples import Examples
from tests.trainer.tiny import assert_same, encoded, tiny


def write(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def members_of(examples: Examples, *, names: Sequence[str] = ()) -> list[tuple[str, bytes]]:
    found = list[tuple[str, bytes]]()
    for number, (image, class_id) in enumerate(zip(examples.read(), examples.class_ids.tolist(), strict=True)):
        found.append((f"{number:04}.png", encoded(image)))
        found.append((f"{number:04}.cls", (names[class_id] if names else str(class_id)).encode()))
    return found


def write_shards(folder: Path, dataset: Dataset, train: str, test: str, *, names: Sequence[str] = ()) -> None:
    """The training images in two shards, the test images in one."""
    members = members_of(dataset.train, names=names)
    write(folder / train.format(0), members[:4])
    write(folder / train.format(1), members[4:])
    write(folder / test.format(0), members_of(dataset.test, names=names))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-{}.tar", "test-{}.tar"),
        ("train-{}.tar", "val-{}.tar"),
        ("imagenet1k-train-000{}.tar", "imagenet1k-validation-0{}.tar"),
        ("train/{}.tar", "test/{}.tar"),
    ],
)
def test_shards_are_read_by_the_names_of_their_splits(tmp_path: Path, train: str, test: str) -> None:
    write_shards(tmp_path, tiny(), train, test)
    found = load(str(tmp_path))
    assert_same(found, tiny())
    assert found.class_names == ()
    assert not found.train.images.is_at_hand


def test_rows_are_read_in_any_order_and_after_a_pickle(tmp_path: Path) -> None:
    write_shards(tmp_path, tiny(3), "train-{}.tar", "test-{}.tar")
    images = load(str(tmp_path)).train.images
    rows = np.array([5, 0, 4, 5])
    for each in (images, pickle.loads(pickle.dumps(images))):
        np.testing.assert_array_equal(each.read(rows), tiny(3).train.read()[rows])


def test_names_of_classes_get_their_places(tmp_path: Path) -> None:
    write_shards(tmp_path, tiny(), "train-{}.tar", "test-{}.tar", names=["dog", "cat"])
    found = load(str(tmp_path))
    assert found.class_names == ("cat", "dog")
    assert found.train.class_ids.tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    expected = tiny(3)
    for split, examples in (("train", expected.train), ("test", expected.test)):
        with webdataset.TarWriter(str(tmp_path / f"{split}-0.tar")) as writer:
            for number, (image, label) in enumerate(zip(examples.read(), examples.class_ids.tolist(), strict=True)):
                writer.write({"__key__": f"{number:03}", "png": image, "json": {"label": label, "caption": "x"}})
    assert_same(load(str(tmp_path)), expected)


def test_what_engram_writes_is_read(tmp_path: Path) -> None:
    expected = tiny()
    for split, examples in (("train", expected.train), ("test", expected.test)):
        stream = tar.write(examples.read(), examples.class_ids, fields={"logits": np.zeros((len(examples), 2))})
        (tmp_path / f"{split}.tar").write_bytes(b"".join(stream))
    assert_same(load(str(tmp_path)), expected)


def test_other_members_and_second_images_of_a_key_are_passed_over(tmp_path: Path) -> None:
    image = encoded(tiny().train.read()[0])
    long = "a-folder-whose-name-is-long/" * 8
    write(
        tmp_path / "train-0.tar",
        [
            ("readme.txt", b"hello"),
            (f"{long}1.png", image),
            (f"{long}1.mask.png", image),
            (f"{long}1.json", json.dumps({"label": 0, "size": [5, 4]}).encode()),
            ("2.cls", b"1"),
            ("2.json", b'{"caption": "no class here"}'),
            ("2.PNG", image),
        ],
    )
    write(tmp_path / "test-0.tar", members_of(tiny().test))
    found = load(str(tmp_path))
    assert found.train.class_ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.png", b"x")], r"the image '1' has no class: there is no 1\.cls, nor a \.json with one"),
        ([("1.png", b"x"), ("1.json", b"{}")], "the image '1' has no class"),
        ([("1.png", b"x"), ("1.json", b"{")], "member '1.json' is not JSON"),
        ([("1.png", b"x"), ("1.cls", b" ")], "member '1.cls' is empty where a class was expected"),
        ([("1.png", b"x"), ("1.cls", b"-1")], "member '1.cls' says the class -1; ids are 0 to 2147483647"),
        ([("1.png", b"x"), ("1.json", b'{"label": -1}')], "member '1.json' says the class -1"),
        ([("1.png", b"x"), ("1.jpg", b"x")], "the key '1' has two images"),
        ([("1.png", b"x"), ("1.cls", b"0" * (2**20 + 1))], "member '1.cls' has 1048577 bytes, at most"),
        ([("1.png", b"x"), ("1.cls", b"bird")], "all integers or all names"),
    ],
)
def test_a_shard_with_something_wrong_is_one_sentence(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    write(tmp_path / "train-0.tar", members_of(tiny().train))
    write(tmp_path / "train-1.tar", members)
    write(tmp_path / "test-0.tar", members_of(tiny().test))
    with pytest.raises(BadUpload, match=rf"train-1\.tar.*{message}"):
        load(str(tmp_path))


def test_an_image_that_is_none_is_named_by_its_place(tmp_path: Path) -> None:
    write(tmp_path / "train-0.tar", [*members_of(tiny().train), ("9.png", b"nothing"), ("9.cls", b"1")])
    write(tmp_path / "test-0.tar", members_of(tiny().test))
    with pytest.raises(BadUpload, match=r"the image at byte \d+ of .*train-0\.tar cannot be read as an image"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("cut", "message"),
    [(600, "cut short: it has 600 bytes, and member '0002.png' ends at byte 1024"), (700, ""), (2048, ""), (0, "")],
)
def test_a_shard_that_is_cut_short_is_refused(tmp_path: Path, cut: int, message: str) -> None:
    write_shards(tmp_path, tiny(), "train-{}.tar", "test-{}.tar")
    shard = tmp_path / "train-1.tar"
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(BadUpload, match=rf"train-1\.tar: .*{message}"):
        load(str(tmp_path))


def test_a_compressed_shard_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, tiny(), "train-{}.tar", "test-{}.tar")
    shard = tmp_path / "train-1.tar"
    shard.write_bytes(gzip.compress(np.random.default_rng(0).bytes(2000)))
    with pytest.raises(BadUpload, match=r"train-1\.tar: .*gzip-compressed"):
        load(str(tmp_path))


def test_a_shard_that_shrank_or_went_after_the_start_is_one_sentence(tmp_path: Path) -> None:
    write_shards(tmp_path, tiny(), "train-{}.tar", "test-{}.tar")
    images = load(str(tmp_path)).train.images
    shard = tmp_path / "train-1.tar"
    shard.write_bytes(shard.read_bytes()[:520])
    with pytest.raises(BadUpload, match=r"train-1\.tar was changed: it ends before the \d+ bytes at byte 512"):
        images.read(np.array([2]))
    shard.unlink()
    with pytest.raises(BadUpload, match=r"train-1\.tar cannot be read: No such file"):
        images.read(np.array([2]))
    np.testing.assert_array_equal(images.read(np.array([1]))[0], tiny().train.read()[1])


def test_shards_without_test_images_say_which_there_are(tmp_path: Path) -> None:
    write(tmp_path / "train-0.tar", members_of(tiny().train))
    with pytest.raises(NotFound, match=r"has shards of train; needed are train-\*\.tar and test-\*\.tar"):
        load(str(tmp_path))
