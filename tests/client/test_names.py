"""Names of classes: who gets which id, whatever comes in whatever order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram import memory, names
from engram.content import Content, Policy
from engram.errors import BadUpload, Conflict, InvalidRequest
from engram.folder import classes
from engram.schemas import IngestOptions
from engram.selection.embedding import BuiltinEmbedder
from engram.selection.images import ArrayImages
from tests.contents import pictures

EMPTY = Content(Policy(10**6, quality=50))


def add(content: Content, task: int, labels: list[str] | list[int]) -> Content:
    given = [label for label in labels if isinstance(label, str)]
    named = tuple(dict.fromkeys(given)) or None
    ids = labels if named is None else [named.index(name) for name in given]
    images = ArrayImages(pictures(task, len(labels)), np.array(ids, np.int64))
    upload = memory.Upload(task, images, IngestOptions(ranking="ring"), named)
    return memory.add(content, upload, BuiltinEmbedder(images.shape))


def test_cat_and_dog_then_ship_and_truck_are_four_classes() -> None:
    content = add(add(EMPTY, 0, ["cat", "dog"]), 1, ["ship", "truck"])
    assert content.class_names == {0: "cat", 1: "dog", 2: "ship", 3: "truck"}
    assert content.classes() == {0: [0, 1], 1: [2, 3]}


def test_a_known_name_is_the_class_that_it_was() -> None:
    content = add(add(EMPTY, 0, ["dog", "cat"]), 1, ["dog", "bird", "cat"])
    assert content.class_names == {0: "cat", 1: "dog", 2: "bird"}
    assert content.classes() == {0: [0, 1], 1: [0, 1, 2]}


def test_the_order_of_the_images_does_not_matter() -> None:
    one, other = (add(EMPTY, 0, labels) for labels in (["b", "a", "c", "a"], ["c", "a", "a", "b"]))
    assert one.class_names == other.class_names == {0: "a", 1: "b", 2: "c"}


def test_new_names_come_after_every_integer_ever_uploaded() -> None:
    content = memory.reshare(add(add(EMPTY, 0, [3, 41]), 1, [7]), without_task=0)
    assert add(content, 2, ["cat"]).class_names == {42: "cat"}


def test_names_survive_the_deletion_of_their_tasks() -> None:
    content = memory.reshare(add(EMPTY, 0, ["cat", "dog"]), without_task=0)
    assert content.tasks == {}
    assert add(content, 1, ["dog", "eel"]).class_names == {0: "cat", 1: "dog", 2: "eel"}


def test_an_integer_is_the_class_that_has_a_name() -> None:
    content = add(add(EMPTY, 0, ["cat", "dog"]), 0, [1, 1])
    assert content.tasks[0].seen == {0: 1, 1: 3}
    assert content.class_names == {0: "cat", 1: "dog"}


def test_an_id_may_be_named_before_its_first_image() -> None:
    content = memory.rename(EMPTY, {7: "cat"})
    assert add(content, 0, ["cat", "dog"]).class_names == {7: "cat", 8: "dog"}


def test_a_class_is_not_renamed_to_the_name_of_another() -> None:
    content = add(EMPTY, 0, ["cat", "dog"])
    with pytest.raises(Conflict, match="class 1 cannot be named 'cat': that is the name of class 0") as caught:
        memory.rename(content, {1: "cat"})
    assert caught.value.details == {"class_ids": [0, 1], "class_name": "cat"}
    with pytest.raises(Conflict, match="'eel'"):
        memory.rename(content, {0: "eel", 1: "eel"})
    assert memory.rename(content, {0: "dog", 1: "cat"}).class_names == {0: "dog", 1: "cat"}


@pytest.mark.parametrize("class_id", [-1, 2**31])
def test_only_a_class_id_is_given_a_name(class_id: int) -> None:
    with pytest.raises(InvalidRequest, match=str(class_id)):
        memory.rename(EMPTY, {class_id: "cat"})


@pytest.mark.parametrize("text", ["", " ", "x" * 201, "a\tb", "a\x00", "-1", "1.5", "1 2", "1e5", "٣", "007"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="class"):
        names.class_name(text)
    with pytest.raises(InvalidRequest):
        memory.rename(EMPTY, {0: text})


@pytest.mark.parametrize("text", ["e", "cat", "x" * 200, "T-shirt/top", "n01440764", "2007_000027", "長靴"])
def test_what_people_call_classes_is_a_name(text: str) -> None:
    assert names.class_name(f" {text}\n") == text


def test_a_folder_name_of_macos_is_the_name_that_was_typed() -> None:
    assert names.class_name("cafe\u0301") == names.class_name("caf\u00e9")


def test_no_id_is_left_above_the_largest() -> None:
    content = add(EMPTY, 0, [names.MAX_CLASS_ID])
    with pytest.raises(InvalidRequest, match="2147483647"):
        add(content, 1, ["cat"])


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4) | st.integers(0, 9), max_size=12))
def test_ids_and_names_stay_one_to_one(uploads: list[list[str] | int]) -> None:
    known: dict[int, str] = {}
    above = 0
    for upload in uploads:
        if isinstance(upload, int):
            above = max(above, upload + 1)
            continue
        ids = names.identify(known, upload, above)
        assert ids.keys() == set(upload)
        after = known | {class_id: name for name, class_id in ids.items()}
        assert len(after) == len(set(after.values()))
        assert {class_id: after[class_id] for class_id in known} == known
        assert min(after.keys() - known.keys(), default=above) >= above
        known, above = after, max(above, max(after) + 1)


def test_integer_folders_are_in_numeric_order_and_named_ones_in_that_of_their_names(tmp_path: Path) -> None:
    root = tmp_path
    for name in ("10", "9", "100"):
        (root / "numbers" / name).mkdir(parents=True)
    for name in ("dog", "Cat", "ant"):
        (root / "names" / name).mkdir(parents=True)
    assert list(classes(root / "numbers").values()) == [9, 10, 100]
    assert list(classes(root / "names").values()) == ["Cat", "ant", "dog"]
    (root / "names" / "7").mkdir()
    with pytest.raises(BadUpload, match="'7' and 'Cat'"):
        classes(root / "names")
