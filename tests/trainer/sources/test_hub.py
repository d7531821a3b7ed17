"""Hugging Face data sets stay on disk, and their rows are decoded when they are read."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram.errors import BadUpload, NotFound
from engram_trainer.datasets import load
from engram_trainer.examples import Examples
from engram_trainer.sources.hub import HubFiles
from tests.trainer.tiny import assert_same, picture, tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def rows(examples: Examples, image: str = "image", label: str = "label", **more: Any) -> Any:
    import datasets

    columns = {image: [picture(each) for each in examples.read()], label: examples.class_ids.tolist()}
    kinds = {image: datasets.Image(), label: datasets.ClassLabel(names=["cat", "dog"])}
    kinds |= {name: datasets.Value("int64") for name in more}
    return datasets.Dataset.from_dict({**columns, **more}, features=datasets.Features(kinds))


def save(folder: Path, **splits: Any) -> None:
    import datasets

    datasets.DatasetDict(splits).save_to_disk(str(folder))


@pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("picture", "kind")])
@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_a_local_data_set_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, label: str, kind: str
) -> None:
    import datasets

    # Parquet files are converted into a cache, which is not to be the developer's own.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    train, test = (rows(examples, image, label) for examples in (tiny().train, tiny().test))
    if kind == "saved":
        save(tmp_path / "set", train=train, test=test)
    else:
        (tmp_path / "set").mkdir()
        for split, each in (("train", train), ("test", test)):
            each.to_parquet(str(tmp_path / "set" / f"{split}-00000-of-00001.parquet"))
    found = load(str(tmp_path / "set"))
    assert_same(found, tiny())
    assert found.class_names == ("cat", "dog")
    assert not found.train.images.is_at_hand


def test_rows_are_read_in_any_order_and_a_pickle_holds_no_images(tmp_path: Path) -> None:
    many = Examples.of_arrays(
        np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8), np.arange(300) % 2
    )
    save(tmp_path, train=rows(many), test=rows(many))
    images = load(str(tmp_path)).train.images
    pickled = pickle.dumps(images)
    assert len(pickled) < 20_000
    chosen = np.array([299, 0, 17, 17])
    for each in (images, pickle.loads(pickled)):
        np.testing.assert_array_equal(each.read(chosen), many.read()[chosen])


def test_another_label_column_can_be_had(tmp_path: Path) -> None:
    one, other = (rows(each, coarse=(each.class_ids + 7).tolist()) for each in (tiny().train, tiny().test))
    save(tmp_path, train=one, test=other)
    assert load(f"{tmp_path}#coarse").classes == (7, 8)
    with pytest.raises(NotFound, match=r"has no column \['medium'\]; its columns are \['coarse', 'image', 'label'\]"):
        load(f"{tmp_path}#medium")


def test_test_images_without_labels_are_not_what_is_tested_on(tmp_path: Path) -> None:
    unlabelled = Examples(tiny().test.images, np.full(4, -1))
    save(tmp_path, train=rows(tiny().train), test=rows(unlabelled), validation=rows(tiny().test))
    assert_same(load(str(tmp_path)), tiny())
    save(tmp_path / "other", train=rows(tiny().train), test=rows(unlabelled))
    with pytest.raises(NotFound, match=r"the test images of '.*other' have no labels"):
        load(str(tmp_path / "other"))


def test_a_data_set_without_test_images_lists_its_splits(tmp_path: Path) -> None:
    save(tmp_path, train=rows(tiny().train))
    with pytest.raises(NotFound, match=r"splits \['train'\]"):
        load(str(tmp_path))


def test_labels_that_are_texts_are_refused(tmp_path: Path) -> None:
    import datasets

    column = [picture(each) for each in tiny().test.read()]
    texts = datasets.Dataset.from_dict({"image": column, "label": ["a", "b", "a", "b"]})
    texts = texts.cast_column("image", datasets.Image())
    save(tmp_path, train=texts, test=texts)
    with pytest.raises(BadUpload, match=r"the column 'label' of .*/train holds .*, where a class id for each row"):
        load(str(tmp_path))


def test_a_row_that_is_empty_or_names_a_file_that_went_is_named(tmp_path: Path) -> None:
    import datasets

    pictures: list[Any] = [picture(each) for each in tiny().test.read()]
    gone = tmp_path / "gone.png"
    pictures[3].save(gone)
    for hole, message in (
        (None, "image 3 of x/test is missing"),
        (str(gone), r"image 3 of x/test .*gone\.png: No such"),
    ):
        column = datasets.Dataset.from_dict({"image": [*pictures[:3], hole]}).cast_column("image", datasets.Image())
        files = HubFiles(column.with_format("arrow"), "x/test")
        assert len([*files.read(np.arange(3))]) == 3
        gone.unlink(missing_ok=hole is None)
        with pytest.raises(BadUpload, match=message):
            list(files.read(np.array([3])))
        pictures[3].save(gone)


def test_without_the_package_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(NotFound, match=r"pip install 'engram\[hub\]'"):
        load("uoft-cs/cifar100")
