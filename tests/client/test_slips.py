"""A caller's slip in Python: the error says what was given and what to write instead, and what can be taken is."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from engram import BadUpload, Client, Conflict, InvalidRequest, LocalBuffer, Mirror, ReplayLoader
from engram.draw import Request
from engram.labelled import labelled
from engram.torch import ReplayDataset
from tests.contents import UInt8Array, pictures

IMAGES, CLASS_IDS = pictures(0, 6, (8, 12, 3)), [3, 1, 4, 1, 5, 9]
FLOATS = IMAGES.astype(np.float32) / 255


class Endless(Dataset[Any]):
    """A PyTorch data set that does not say where it ends, but how long it is."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.fromarray(IMAGES[number % 6]), CLASS_IDS[number % 6]


def generated() -> Iterator[tuple[UInt8Array, int]]:
    yield from zip(IMAGES, CLASS_IDS, strict=True)


@pytest.mark.parametrize(
    "given",
    [
        (IMAGES, CLASS_IDS),
        (torch.from_numpy(IMAGES), torch.tensor(CLASS_IDS)),
        (list(IMAGES), tuple(CLASS_IDS)),
        ([Image.fromarray(image) for image in IMAGES], CLASS_IDS),
        (generated(),),
        (Endless(),),
        (TensorDataset(torch.from_numpy(IMAGES), torch.tensor(CLASS_IDS)),),
        (DataLoader(TensorDataset(torch.from_numpy(IMAGES), torch.tensor(CLASS_IDS)), batch_size=4),),
        (
            [
                {"img": Image.fromarray(i), "fine_label": c, "coarse_label": 0}
                for i, c in zip(IMAGES, CLASS_IDS, strict=True)
            ],
        ),
    ],
    ids=["arrays", "tensors", "lists", "PIL", "pairs", "dataset", "tensor dataset", "loader", "rows"],
)
def test_whatever_gives_images_and_classes_is_taken(given: tuple[Any, ...]) -> None:
    images, class_ids, names = labelled(*given)
    assert np.array_equal(images, IMAGES)
    assert (class_ids.tolist(), names) == (CLASS_IDS, None)


def test_a_data_set_of_hugging_face_is_taken() -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [Image.fromarray(image) for image in IMAGES], "label": CLASS_IDS}
    found = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    images, class_ids, _ = labelled(found)
    assert np.array_equal(images, IMAGES)
    assert class_ids.tolist() == CLASS_IDS
    with pytest.raises(ValueError, match=r"choose one of the parts 'train': give source\['train'\]"):
        labelled(datasets.DatasetDict({"train": found}))


def test_names_may_come_in_pairs() -> None:
    _, places, names = labelled((image, "dog" if number else "cat") for number, image in enumerate(IMAGES))
    assert (places.tolist(), names) == ([0, 1, 1, 1, 1, 1], ("cat", "dog"))


def test_pairs_are_uploaded_and_added(engram_client: Client, name: str, tmp_path: Path) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6, quality=90)
    engram_client.wait(engram_client.upload(name, 0, Endless()))
    memory = LocalBuffer(tmp_path / "memory", budget_bytes=10**6, quality=90)
    memory.add(0, generated())
    assert engram_client.manifest(name).packs == memory.manifest.packs
    assert [row.class_id for row in memory.task(0).classes] == [1, 3, 4, 5, 9]


MENDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "floats to 1": (
        (FLOATS, CLASS_IDS),
        r"float32 \[6, 8, 12, 3\]; give \(images \* 255\).round\(\).astype\(numpy.uint8\)",
    ),
    "floats to 255": ((FLOATS * 255, CLASS_IDS), r"give images.round\(\).astype\(numpy.uint8\)"),
    "black and white": ((IMAGES > 99, CLASS_IDS), r"give \(images \* 255\).astype\(numpy.uint8\)"),
    "16 bits": ((IMAGES.astype(np.uint16) << 8, CLASS_IDS), "uint16 .* give images whose values go from 0 to 255$"),
    "names of files": ((["a.png", "b.png"], [0, 1]), "give their pixels"),
    "none": (([], []), "^there are no images$"),
    "none of a generator": ((iter(()),), "^there are no images$"),
    "normalised": ((FLOATS * 4 - 2, CLASS_IDS), "from -2 to 2; give the images as they were before"),
    "wide integers": ((IMAGES.astype(np.int64), CLASS_IDS), r"int64 .*; give images.astype\(numpy.uint8\)"),
    "channels first": (
        (IMAGES.transpose(0, 3, 1, 2), CLASS_IDS),
        r"give images.transpose\(0, 2, 3, 1\): channels go last$",
    ),
    "a tensor as networks take it": (
        (torch.from_numpy(FLOATS).permute(0, 3, 1, 2), CLASS_IDS),
        r"give \(numpy.asarray\(images\).transpose\(0, 2, 3, 1\) \* 255\).round\(\).astype\(numpy.uint8\): channels",
    ),
    "a tensor that learns": ((torch.zeros(2, 8, 8, 3, requires_grad=True), [0, 1]), "detach"),
    "an alpha channel": ((np.zeros((2, 8, 8, 4), np.uint8), [0, 1]), r"give images\[..., :3\]"),
    "several sizes": (([IMAGES[0], IMAGES[1], IMAGES[2][:4]], [0, 1, 2]), "image 2 is 4x12x3 and image 0 8x12x3"),
    "one image": ((IMAGES[0], [7]), r"one image is given as images\[None\] and \[class_id\]"),
    "swapped": ((CLASS_IDS, IMAGES), "are images and class ids swapped"),
    "class ids as floats": ((IMAGES, np.zeros(6)), r"class_ids.astype\(int\)"),
    "one-hot classes": ((IMAGES, np.eye(6)), r"class_ids.argmax\(1\)"),
    "a column of classes": ((IMAGES, np.array(CLASS_IDS)[:, None]), r"class_ids\[:, 0\]$"),
    "bytes for names": ((IMAGES, [b"cat"] * 6), r"class_ids.astype\(str\)$"),
    "classes that are not there": ((IMAGES, [None] * 6), r"got object \[6\]$"),
    "one image with a list of its class": (([(IMAGES[0], [3])],), r"array \[8, 12, 3\] and 1 classes: of one image"),
    "batches that only together are right": (
        ([(IMAGES[:2], CLASS_IDS[:3]), (IMAGES[2:], CLASS_IDS[3:])],),
        r"array \[2, 8, 12, 3\] and 3 classes: .* of a batch as many images as classes",
    ),
    "no classes": ((IMAGES,), "there are no class ids: give images and class ids, or an iterable of"),
    "no pairs": ((list(IMAGES),), "a row is one ndarray, not a pair of an image and its class"),
    "triples": (([(IMAGES[0], 0, 1)],), "a row is 3 values"),
    "other columns": (([{"pixels": IMAGES[0], "label": 0}],), "rows have the columns 'pixels', 'label'"),
    "a transformed data set": (
        (TensorDataset(torch.from_numpy(FLOATS).permute(0, 3, 1, 2), torch.tensor(CLASS_IDS)),),
        "leave out ToTensor",
    ),
    "a palette": (([(Image.new("P", (8, 8)), 0)],), r"mode 'P', neither 'L' nor 'RGB': give image.convert\('RGB'\)"),
    "a palette in a list": (([Image.new("P", (8, 8))], [0]), "mode 'P', neither 'L' nor 'RGB'"),
    "sizes in pairs": (([(IMAGES[0], 0), (IMAGES[1][:4], 1)],), "image 1 is 4x12x3 and image 0 8x12x3"),
}


@pytest.mark.parametrize("slip", MENDS)
def test_the_error_says_what_to_write_instead(slip: str) -> None:
    given, mend = MENDS[slip]
    with pytest.raises(ValueError, match=mend):
        labelled(*given)


@pytest.mark.parametrize(
    "images",
    [
        torch.from_numpy(FLOATS).permute(0, 3, 1, 2),
        torch.from_numpy(FLOATS),
        list(torch.from_numpy(FLOATS)),
        FLOATS * 255,
        IMAGES.transpose(0, 3, 1, 2).astype(np.int64),
    ],
    ids=["tensor, channels first", "tensor", "list of tensors", "floats to 255", "channels first"],
)
def test_the_expression_that_an_error_gives_is_right(images: Any) -> None:
    with pytest.raises(ValueError) as slip:
        labelled(images, CLASS_IDS)
    expression = str(slip.value).partition("; give ")[2].partition(": ")[0]
    mended = eval(expression, {"images": images, "numpy": np})
    assert np.array_equal(labelled(mended, CLASS_IDS)[0], IMAGES)


def test_of_a_folder_the_file_is_named_that_cannot_be_taken(engram_client: Client, name: str, tmp_path: Path) -> None:
    for number, path in enumerate(["cat/plain.png", "cat/two words.v2.png", f"dog/{'long' * 30}.png"]):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.fromarray(IMAGES[number]).save(tmp_path / path)
    engram_client.create_buffer(name, budget_bytes=10**6)
    assert engram_client.wait(engram_client.upload_folder(name, 0, tmp_path)).images_done == 3
    Image.fromarray(IMAGES[0][:4]).save(tmp_path / "cat" / "two words.v2.png")
    with pytest.raises(BadUpload, match=r"cat/two_words\.v2\.png"):
        engram_client.wait(engram_client.upload_folder(name, 1, tmp_path))
    (tmp_path / "cat" / "two words.v2.png").write_text("no image")
    with pytest.raises(BadUpload, match=r"cat/two_words\.v2\.png"):
        engram_client.wait(engram_client.upload_folder(name, 1, tmp_path))


def test_a_task_that_is_no_integer_is_named(engram_client: Client, tmp_path: Path) -> None:
    said = "a task is an integer, the first one usually 0, not the str '0'"
    task: Any = "0"
    for call in (
        lambda: engram_client.upload("any", task, IMAGES, CLASS_IDS),
        lambda: engram_client.upload_folder("any", task, tmp_path),
        lambda: engram_client.upload_tar("any", task, tmp_path / "a.tar"),
        lambda: engram_client.task("any", task),
        lambda: LocalBuffer(tmp_path / "memory", budget_bytes=1000).add(task, IMAGES, CLASS_IDS),
        lambda: LocalBuffer(tmp_path / "memory").task(task),
        lambda: LocalBuffer(tmp_path / "memory").delete_task(task),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(ValueError) as swapped:
        engram_client.upload("any", IMAGES, CLASS_IDS, 0)  # type: ignore[arg-type]
    assert len(str(swapped.value)) < 200


def test_a_buffer_that_is_no_text_is_named(engram_client: Client) -> None:
    for slip in (0, None, IMAGES):
        with pytest.raises(ValueError, match="a buffer is named by a text, as in 'cifar', not by the"):
            engram_client.upload(slip, 0, IMAGES, CLASS_IDS)  # type: ignore[arg-type]


def test_a_budget_out_of_range_is_one_error_everywhere(engram_client: Client, name: str, tmp_path: Path) -> None:
    engram_client.create_buffer(name, budget_bytes=1000)
    memory = LocalBuffer(tmp_path / "memory", budget_bytes=1000)
    slip: Any
    for slip, said in ((-1, "greater than or equal to 1"), ("1MB", "a valid integer")):
        with pytest.raises(InvalidRequest, match=f"budget_bytes: Input should be .*{said}"):
            engram_client.change_budget(name, slip)
        with pytest.raises(InvalidRequest, match=f"budget_bytes: Input should be .*{said}"):
            memory.change_budget(slip)


def test_a_draw_is_the_same_or_refused_alike_wherever_it_is_asked_for(
    engram_client: Client, name: str, tmp_path: Path
) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6, quality=90)
    memory = LocalBuffer(tmp_path / "memory", budget_bytes=10**6, quality=90)
    for task in (0, 1):
        engram_client.wait(engram_client.upload(name, task, IMAGES, CLASS_IDS))
        memory.add(task, IMAGES, CLASS_IDS)
    taken: list[dict[str, Any]] = [
        {"exclude_tasks": np.array([0])},
        {"exclude_tasks": np.array([0, 7])},
        {"tasks": np.array([1]), "seed": np.int64(3)},
        {"tasks": (np.int64(1),), "size": np.int32(4)},
    ]
    for given in taken:
        whole = {"size": 5, **given}
        assert engram_client.draw(name, **whole).tasks.tolist() == [1] * whole["size"]
        assert memory.draw(**whole).tasks.tolist() == [1] * whole["size"]
    refused: list[dict[str, Any]] = [
        {"size": "8"},
        {"size": 8.0},
        {"seed": None},
        {"seed": 1.5},
        {"world_size": 2.0},
        {"tasks": 0},
        {"tasks": ("0",)},
        {"exclude_tasks": [0.5]},
        {"strategy": None},
    ]
    for given in refused:
        (slip,) = given
        for draw in (partial(engram_client.draw, name), memory.draw):
            with pytest.raises(InvalidRequest, match=slip):
                draw(**{"size": 5, **given})


def test_tasks_of_a_draw_may_be_any_sequence_of_integers() -> None:
    request = Request(8, tasks=np.array([0, 2]), exclude_tasks=[1])  # type: ignore[arg-type]
    assert request == Request(8, tasks=(0, 2), exclude_tasks=(1,))
    assert pickle.loads(pickle.dumps(request)) == request
    for slip in ("02", 3, [None]):
        with pytest.raises(InvalidRequest, match=r"exclude_tasks are several integers, as in exclude_tasks=\[0, 2\]"):
            Request(8, exclude_tasks=slip)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [ReplayLoader, ReplayDataset])
def test_a_loader_says_what_it_draws_from(make: Callable[[Any, int], object], engram_client: Client) -> None:
    with pytest.raises(
        ValueError, match=r"a client and the name of a buffer as in \(client, 'm'\), not from the str 'm'"
    ):
        make("m", 8)
    for slip in (engram_client, ("m", engram_client), (engram_client, 3)):
        with pytest.raises(ValueError, match=r"as in \(client, 'cifar'\), not from the"):
            make(slip, 8)


def test_the_arguments_of_a_mirror_have_an_order(engram_client: Client, tmp_path: Path) -> None:
    swapped: Any
    for swapped in (
        ("m", engram_client, tmp_path / "m"),
        (engram_client, tmp_path / "m", "m"),
        (engram_client, "./m", "m"),
    ):
        with pytest.raises(ValueError, match=r"a mirror is Mirror\(client, buffer, folder\).*, not Mirror\("):
            Mirror(*swapped)
    assert not (tmp_path / "m").exists()


def test_a_file_in_place_of_a_folder_is_named(engram_client: Client, tmp_path: Path, name: str) -> None:
    engram_client.create_buffer(name, budget_bytes=1000)
    file = tmp_path / "memory"
    file.write_text("notes")
    for folder in (file, file / "below"):
        with pytest.raises(Conflict, match=f"{file} is a file; give the path of a folder"):
            LocalBuffer(folder, budget_bytes=1000)
        with pytest.raises(Conflict, match=f"{file} is a file; give the path of a folder"):
            Mirror(engram_client, name, folder)
    memory = LocalBuffer(tmp_path / "other", budget_bytes=1000)
    with pytest.raises(Conflict, match="is a file"):
        memory.fork(file)
    assert file.read_text() == "notes"
