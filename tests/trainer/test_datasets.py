"""Every source of images is read into the same arrays, and a broken one is refused with a clear message."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engram.errors import BadUpload, NotFound, Unavailable
from engram_trainer.datasets import SAMPLE, Dataset, first_rows, load, read_idx, read_sample, write_idx

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def test_the_shipped_sample_is_small_balanced_and_licensed() -> None:
    sample = load("sample")
    assert sample.shape == (28, 28, 1)
    assert np.bincount(sample.train_class_ids).tolist() == [700] * 10
    assert np.bincount(sample.test_class_ids).tolist() == [150] * 10
    assert len(sample.class_names) == 10
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) <= 4_000_000
    assert "MIT" in (SAMPLE / "LICENSE").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_shipped_sample_is_the_first_images_of_each_class_of_the_whole(tmp_path: Path) -> None:
    whole = load(str(DEBIAN))
    assert len(whole.train_images) == 60_000
    write_idx(whole.first(train=700, test=150), tmp_path)
    for path in tmp_path.iterdir():
        assert gzip.decompress(path.read_bytes()) == gzip.decompress((SAMPLE / path.name).read_bytes())


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def serve_folder() -> Iterator[Callable[[Path], tuple[str, Callable[[], None]]]]:
    """Serves a folder over HTTP: its URL, and what ends that."""
    servers: list[ThreadingHTTPServer] = []

    def serve(folder: Path) -> tuple[str, Callable[[], None]]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", server.shutdown

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_where_the_sample_is_not_at_hand_it_is_fetched_once(
    tmp_path: Path, serve_folder: Callable[[Path], tuple[str, Callable[[], None]]]
) -> None:
    """Of the sample, the first images of each class are the sample: it stands for all of Fashion-MNIST."""
    url, stop = serve_folder(SAMPLE)
    read = partial(read_sample, tmp_path / "not here", cache=tmp_path / "cache", url=url)
    first = read()
    stop()
    for found in (first, read()):
        assert np.array_equal(found.train_images, load("sample").train_images)
        assert np.array_equal(found.test_class_ids, load("sample").test_class_ids)


def test_what_is_fetched_in_place_of_the_sample_is_refused_and_not_kept(
    tmp_path: Path, serve_folder: Callable[[Path], tuple[str, Callable[[], None]]]
) -> None:
    write_idx(load("sample").first(train=20), tmp_path / "other")
    url, _ = serve_folder(tmp_path / "other")
    with pytest.raises(BadUpload, match="other images than those of Fashion-MNIST"):
        read_sample(tmp_path / "not here", cache=tmp_path / "cache", url=url)
    with pytest.raises(Unavailable, match="404"):
        read_sample(tmp_path / "not here", cache=tmp_path / "cache", url=f"{url}/nowhere")
    assert not (tmp_path / "cache").exists()


def tiny(channels: int = 1) -> Dataset:
    """Two classes, 3 train and 2 test images each, of 5x4 pixels."""
    generator = np.random.default_rng(0)
    train, test = (generator.integers(0, 256, (count, 5, 4, channels), dtype=np.uint8) for count in (6, 4))
    return Dataset("tiny", train, np.array([0, 1, 0, 1, 0, 1]), test, np.array([1, 0, 1, 0]), ("cat", "dog"))


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_files_are_read_back_as_written(tmp_path: Path, compressed: bool) -> None:
    expected = tiny()
    write_idx(expected, tmp_path)
    if not compressed:
        for path in list(tmp_path.iterdir()):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    found = load(str(tmp_path))
    np.testing.assert_array_equal(found.train_images, expected.train_images)
    np.testing.assert_array_equal(found.train_class_ids, expected.train_class_ids)
    np.testing.assert_array_equal(found.test_images, expected.test_images)
    np.testing.assert_array_equal(found.test_class_ids, expected.test_class_ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\x01\0", "not an IDX file"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "11 bytes, its header announces 13"),
        (b"\0\0\x08\x04\0\0", "not an IDX file"),
        (b"\0\0\x08\x02\xff\xff\xff\xff\xff\xff\xff\xff", "announces"),
    ],
)
def test_a_damaged_idx_file_says_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(BadUpload, match=message):
        read_idx(path)


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    write_idx(tiny(), tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadUpload, match="cannot be decompressed"):
        load(str(tmp_path))


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    write_idx(tiny(), tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(NotFound, match="t10k-labels-idx1-ubyte"):
        load(str(tmp_path))


def test_the_digits_are_split_the_same_way_every_time() -> None:
    digits = load("digits")
    assert digits.shape == (8, 8, 1)
    assert len(digits.train_images) + len(digits.test_images) == 1797
    assert digits.train_images.max() == 255
    assert np.bincount(digits.test_class_ids).min() >= 34
    np.testing.assert_array_equal(digits.test_images, load("digits").test_images)


def write_folder(folder: Path, dataset: Dataset, *, suffix: str = "png", test: str = "test") -> None:
    for split, images, class_ids in (
        ("train", dataset.train_images, dataset.train_class_ids),
        (test, dataset.test_images, dataset.test_class_ids),
    ):
        for number, (image, class_id) in enumerate(zip(images, class_ids, strict=True)):
            path = folder / split / dataset.class_names[class_id] / f"{number:03}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(path)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_of_class_folders_is_read_with_its_names(tmp_path: Path, channels: int, test: str) -> None:
    expected = tiny(channels)
    write_folder(tmp_path, expected, test=test)
    found = load(str(tmp_path))
    assert found.class_names == ("cat", "dog")
    assert found.shape == (5, 4, channels)
    by_class = np.argsort(expected.train_class_ids, kind="stable")
    np.testing.assert_array_equal(found.train_images, expected.train_images[by_class])
    np.testing.assert_array_equal(found.train_class_ids, expected.train_class_ids[by_class])
    assert len(found.test_images) == 4


def test_integer_folders_are_their_class_ids_in_numeric_order(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 1), dtype=np.uint8)
    for split in ("train", "test"):
        for name, image in zip(("10", "9", "2"), images, strict=True):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(image[..., 0]).save(tmp_path / split / name / "0.png")
    found = load(str(tmp_path))
    assert (found.classes, found.class_names) == ((2, 9, 10), ())
    assert found.train_class_ids.tolist() == found.test_class_ids.tolist() == [2, 9, 10]
    np.testing.assert_array_equal(found.train_images, images[::-1])
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(BadUpload, match="'10' and 'cat'"):
        load(str(tmp_path))


def test_grey_pictures_among_coloured_ones_become_rgb(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny(1))
    Image.new("RGB", (4, 5), (1, 2, 3)).save(tmp_path / "train" / "cat" / "colour.png")
    found = load(str(tmp_path))
    assert found.shape == (5, 4, 3)
    assert found.train_images[3].reshape(-1, 3).tolist() == [[1, 2, 3]] * 20


def test_pictures_of_several_sizes_ask_for_a_size(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny())
    Image.new("L", (9, 9)).save(tmp_path / "train" / "cat" / "large.png")
    with pytest.raises(BadUpload, match=r"2 sizes, e.g. \(4, 5\) and \(9, 9\); give --resize"):
        load(str(tmp_path))
    assert load(str(tmp_path), resize=8).shape == (8, 8, 1)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny())
    (tmp_path / "test" / "dog" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(BadUpload, match=r"broken\.png"):
        load(str(tmp_path))


def test_a_class_that_only_the_test_images_have_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny())
    (tmp_path / "test" / "bird").mkdir()
    with pytest.raises(NotFound, match="bird"):
        load(str(tmp_path))


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "~/nowhere-at-all"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(source: str) -> None:
    with pytest.raises(NotFound, match="is not a folder"):
        load(source)


def test_a_folder_without_a_data_set_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="CLASS"):
        load(str(tmp_path))


def hub_splits(dataset: Dataset, *, image: str, label: str) -> object:
    import datasets

    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=["cat", "dog"])})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {image: [Image.fromarray(each[..., 0]) for each in images], label: class_ids.tolist()},
                features=features,
            )
            for split, images, class_ids in (
                ("train", dataset.train_images, dataset.train_class_ids),
                ("test", dataset.test_images, dataset.test_class_ids),
            )
        }
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("picture", "kind")])
@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_a_local_hugging_face_data_set_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, label: str, kind: str
) -> None:
    import datasets

    # Parquet files are converted into a cache, which is not to be the developer's own.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    expected = tiny()
    splits = hub_splits(expected, image=image, label=label)
    if kind == "saved":
        splits.save_to_disk(str(tmp_path / "set"))  # type: ignore[attr-defined]
    else:
        (tmp_path / "set").mkdir()
        for split in ("train", "test"):
            splits[split].to_parquet(str(tmp_path / "set" / f"{split}-00000-of-00001.parquet"))  # type: ignore[index]
    found = load(str(tmp_path / "set"))
    np.testing.assert_array_equal(found.train_images, expected.train_images)
    np.testing.assert_array_equal(found.train_class_ids, expected.train_class_ids)
    np.testing.assert_array_equal(found.test_images, expected.test_images)
    assert found.class_names == ("cat", "dog")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_hugging_face_data_set_without_test_images_lists_its_splits(tmp_path: Path) -> None:
    import datasets

    splits = hub_splits(tiny(), image="image", label="label")
    datasets.DatasetDict({"train": splits["train"]}).save_to_disk(str(tmp_path))  # type: ignore[index]
    with pytest.raises(NotFound, match=r"splits \['train'\]"):
        load(str(tmp_path))


def test_without_the_datasets_package_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(NotFound, match=r"pip install 'engram\[hub\]'"):
        load("uoft-cs/cifar100")


def test_images_and_class_ids_must_be_as_many() -> None:
    whole = tiny()
    with pytest.raises(ValueError, match="6 train images but 5 class ids"):
        Dataset("x", whole.train_images, whole.train_class_ids[:5], whole.test_images, whole.test_class_ids)


def test_the_first_rows_of_each_class_keep_their_order() -> None:
    class_ids = np.array([5, 2, 5, 2, 5, 7])
    assert first_rows(class_ids, 1).tolist() == [0, 1, 5]
    assert first_rows(class_ids, 2).tolist() == [0, 1, 2, 3, 5]
    assert first_rows(class_ids, None).tolist() == [0, 1, 2, 3, 4, 5]
