"""Load images from files, folders or the Hugging Face Hub into one `Dataset` of uint8 arrays.

`load(source)` understands:

    sample            a sample of Fashion-MNIST (700 train + 150 test images of each class)
    digits            scikit-learn's 8x8 digits
    FOLDER            with IDX files (MNIST, Fashion-MNIST, gzipped or not), with train/CLASS/*.png and
                      test/CLASS/*.png, or with a saved Hugging Face data set (`save_to_disk`, or parquet files)
    NAME, hub:NAME    a data set of the Hugging Face Hub with an image and a label column, e.g. uoft-cs/cifar100

Images are uint8 `[N, H, W, C]` with C = 1 or 3, RGB; class ids are int64 `[N]`, the data set's own numbers. All images
of a data set have one shape; `resize` makes it so where the source has several.

The sample is in the repository and not in its wheel, of which it would be most: there it is fetched once and kept in
the user's cache. It is cut from Fashion-MNIST (MIT, see data/fashion-mnist/LICENSE; here from the Debian package
dataset-fashion-mnist): the first images of each class, in file order. This line reproduces it byte for byte:

    python -c "from engram_trainer import datasets as d; d.write_idx(d.load('/usr/share/datasets/fashion-mnist').first(
        train=700, test=150), 'trainer/engram_trainer/data/fashion-mnist')"
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from engram.errors import BadUpload, NotFound, Unavailable
from engram.folder import classes
from engram_trainer.examples import ClassIds, Examples, Images, Shape

SAMPLE = Path(__file__).parent / "data" / "fashion-mnist"
SAMPLE_SHA256 = "9fb99ddd581d12fbba27005cda473423a2fa3f9426dca24b5a71b53be43c09ba"
"""Of the pixels and labels of the sample's four files, one after the other."""
FASHION_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"
IDX_STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm"})
TEST_SPLITS = ("test", "validation", "valid", "val")

# The IDX header is a magic number, 0x0800 | number of dimensions for uint8, then one big-endian uint32 per dimension.
IDX_UINT8 = 0x0800


@dataclass(frozen=True, eq=False)
class Dataset:
    """Train and test images of one problem, wherever they lie.

    Raises:
        ValueError: a split's images are no RGB or grey images, or those of the splits differ in shape.
    """

    name: str
    train: Examples
    test: Examples
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.train.shape != self.test.shape:
            raise ValueError(f"{self.name}: train images are {self.train.shape}, test images are {self.test.shape}")
        if self.shape[2] not in (1, 3):
            raise ValueError(f"{self.name}: images have 1 or 3 channels, not {self.shape[2]}")

    @property
    def shape(self) -> Shape:
        """Height, width and channels of every image."""
        return self.train.shape

    @property
    def classes(self) -> tuple[int, ...]:
        """The class ids of the training images, ascending."""
        return self.train.classes

    def first(self, *, train: int | None = None, test: int | None = None) -> Dataset:
        """The first `train` and `test` images of each class, in the order of the source; None keeps all."""
        return replace(
            self,
            train=self.train.select(first_rows(self.train.class_ids, train)),
            test=self.test.select(first_rows(self.test.class_ids, test)),
        )


def first_rows(class_ids: ClassIds, count: int | None) -> npt.NDArray[np.int64]:
    """Rows of the first `count` images of each class, ascending; all rows when `count` is None."""
    if count is None:
        return np.arange(len(class_ids))
    rows = [np.flatnonzero(class_ids == class_id)[:count] for class_id in np.unique(class_ids)]
    return np.sort(np.concatenate(rows)) if rows else np.arange(0)


def load(source: str = "sample", *, resize: int | None = None) -> Dataset:
    """Read a data set; the module's docstring lists what `source` may be.

    Args:
        source: which data set.
        resize: make every image `resize` x `resize` pixels (image folders and Hugging Face data sets only).

    Raises:
        NotFound: there is no such folder, split or column, or the package that reads it is not installed.
        BadUpload: a file is not what it claims to be.
        Unavailable: the sample has to be fetched, and cannot.
    """
    if source == "sample":
        return read_sample()
    if source == "digits":
        return read_digits()
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _read_folder(folder, resize)
    if source.startswith((".", "/", "~")) or folder.is_file():
        raise NotFound(f"{source} is not a folder; give a folder, 'sample', 'digits' or the name of a hub data set")
    return read_hub(source.removeprefix("hub:"), resize=resize)


def _read_folder(folder: Path, resize: int | None) -> Dataset:
    if any(folder.glob("*-idx[13]-ubyte*")):
        fashion = "fashion" in folder.name.lower()
        return read_idx_folder(folder, name=folder.name, class_names=FASHION_CLASSES if fashion else ())
    if (folder / "dataset_dict.json").is_file() or any(folder.rglob("*.parquet")):
        return read_hub(str(folder), resize=resize)
    if (folder / "train").is_dir():
        return read_image_folder(folder, resize=resize)
    raise NotFound(
        f"{folder} holds no data set that this program knows: expected *-idx3-ubyte[.gz] files, train/CLASS/ and "
        "test/CLASS/ folders of images, dataset_dict.json or *.parquet"
    )


def read_idx(path: Path) -> Images:
    """The array of one IDX file of bytes, gzipped or not.

    Raises:
        BadUpload: the header or the size is wrong.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise BadUpload(f"{path} cannot be decompressed: {error}") from error
    magic = int.from_bytes(data[:4], "big")
    dimensions = magic & 0xFF
    if magic & ~0xFF != IDX_UINT8 or not 1 <= dimensions <= 4 or len(data) < 4 + 4 * dimensions:
        raise BadUpload(f"{path} is not an IDX file of bytes: it starts with {data[:4].hex()}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, 4))
    expected = 4 + 4 * dimensions + math.prod(shape)
    if len(data) != expected:
        raise BadUpload(f"{path} has {len(data)} bytes, its header announces {expected} for shape {shape}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_idx_folder(folder: Path, *, name: str, class_names: tuple[str, ...] = ()) -> Dataset:
    """The four files of MNIST and Fashion-MNIST: {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz].

    Raises:
        NotFound: one of the four is missing.
        BadUpload: one of the four is damaged.
    """
    arrays: list[Images] = []
    for stem in IDX_STEMS:
        paths = [folder / f"{stem}-ubyte.gz", folder / f"{stem}-ubyte"]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise NotFound(f"{folder} has neither {paths[0].name} nor {paths[1].name}")
        arrays.append(read_idx(path))
    train, train_labels, test, test_labels = arrays
    for images, labels in ((train, train_labels), (test, test_labels)):
        if images.ndim != 3 or len(images) != len(labels):
            raise BadUpload(f"{folder} has images of the shape {images.shape} and {len(labels)} labels for them")
    return Dataset(
        name,
        Examples.of_arrays(train[..., None], train_labels.astype(np.int64)),
        Examples.of_arrays(test[..., None], test_labels.astype(np.int64)),
        class_names,
    )


def read_sample(folder: Path = SAMPLE, *, cache: Path | None = None, url: str = FASHION_URL) -> Dataset:
    """The sample from this folder if it is there, else from the cache, into which it is fetched first if need be.

    Args:
        folder: where it is in the repository.
        cache: None takes `engram` in `XDG_CACHE_HOME`, else in `~/.cache`.
        url: of the folder of Fashion-MNIST's four files, 30 MB.

    Raises:
        Unavailable: it cannot be fetched.
        BadUpload: what was fetched is something else.
    """
    if not folder.is_dir():
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = (cache or home / "engram") / "fashion-mnist-sample"
        if not folder.is_dir():
            _fetch_sample(folder, url)
    return read_idx_folder(folder, name="fashion-mnist-sample", class_names=FASHION_CLASSES)


def _fetch_sample(folder: Path, url: str) -> None:
    with TemporaryDirectory() as fetched:
        for stem in IDX_STEMS:
            try:
                answer = httpx.get(f"{url}/{stem}-ubyte.gz", follow_redirects=True, timeout=60)
                answer.raise_for_status()
            except httpx.HTTPError as error:
                raise Unavailable(
                    f"the sample has to be fetched once, and that failed ({error}); give another data set, or a folder "
                    "of Fashion-MNIST's four files"
                ) from error
            (Path(fetched) / f"{stem}-ubyte.gz").write_bytes(answer.content)
        sample = read_idx_folder(Path(fetched), name="fashion-mnist").first(train=700, test=150)
    digest = hashlib.sha256()
    for split in (sample.train, sample.test):
        digest.update(split.read().tobytes() + split.class_ids.astype(np.uint8).tobytes())
    if digest.hexdigest() != SAMPLE_SHA256:
        raise BadUpload(f"{url} gave other images than those of Fashion-MNIST (SHA-256 {digest.hexdigest()})")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as part:
        write_idx(sample, Path(part) / "sample")
        try:
            (Path(part) / "sample").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


def write_idx(dataset: Dataset, folder: str | Path) -> None:
    """Write a grey data set as the four gzipped IDX files, the same bytes every time."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for stem, array in (
        ("train-images-idx3", dataset.train.read()[..., 0]),
        ("train-labels-idx1", dataset.train.class_ids),
        ("t10k-images-idx3", dataset.test.read()[..., 0]),
        ("t10k-labels-idx1", dataset.test.class_ids),
    ):
        header = np.array([IDX_UINT8 | array.ndim, *array.shape], ">u4").tobytes()
        data = gzip.compress(header + array.astype(np.uint8).tobytes(), compresslevel=9, mtime=0)
        (Path(folder) / f"{stem}-ubyte.gz").write_bytes(data)


def read_digits() -> Dataset:
    """scikit-learn's digits: 1,797 grey images of 8x8; every fifth of a class is a test image.

    Raises:
        NotFound: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise NotFound("the data set 'digits' needs scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    # Values are 0..16.
    images = np.rint(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)[..., None]
    class_ids = np.asarray(bunch.target, np.int64)
    is_test = np.zeros(len(class_ids), bool)
    for class_id in range(10):
        is_test[np.flatnonzero(class_ids == class_id)[4::5]] = True
    names = tuple(str(digit) for digit in range(10))
    train, test = (Examples.of_arrays(images[rows], class_ids[rows]) for rows in (~is_test, is_test))
    return Dataset("digits", train, test, names)


def read_image_folder(folder: Path, *, resize: int | None = None) -> Dataset:
    """`train/CLASS/*` and `test/CLASS/*` (or validation, valid, val); for class ids see `class_ids`.

    Raises:
        NotFound: a split or a class folder is missing or empty.
        BadUpload: a file is not an image, or sizes differ and `resize` was not given.
    """
    test_split = next((split for split in TEST_SPLITS if (folder / split).is_dir()), None)
    if test_split is None or not any(path.is_dir() for path in (folder / "train").iterdir()):
        raise NotFound(f"{folder} needs train/CLASS/ and test/CLASS/ folders of images")
    ids = class_ids(folder / "train")
    unknown = {path.name for path in (folder / test_split).iterdir() if path.is_dir()} - ids.keys()
    if unknown:
        raise NotFound(f"{folder / test_split} has the class folders {sorted(unknown)}, which train/ has not")
    arrays: list[Any] = []
    for split in ("train", test_split):
        files = [
            (path, class_id)
            for name, class_id in ids.items()
            for path in sorted((folder / split / name).glob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        arrays += [(_open(path) for path, _ in files), np.array([class_id for _, class_id in files], np.int64)]
    train, train_ids, test, test_ids = arrays
    both = _stack([*train, *test], resize=resize, source=str(folder))
    # Integers are their own names, and there may be gaps between them.
    names = () if any(name.isascii() and name.isdigit() for name in ids) else tuple(ids)
    return _split(folder.name, both, train_ids, test_ids, names)


def class_ids(folder: Path) -> dict[str, int]:
    """The class id of every class folder: the integers that they are, in order, or the places of their sorted names.

    Raises:
        BadUpload: as `engram.folder.classes`.
    """
    found = classes(folder)
    return {path.name: place if isinstance(label, str) else label for place, (path, label) in enumerate(found.items())}


def read_hub(name: str, *, resize: int | None = None, image: str | None = None, label: str | None = None) -> Dataset:
    """A Hugging Face data set by name, or a local folder of one.

    Args:
        name: name on the Hub, or a folder written by `save_to_disk`, or a folder of parquet files.
        resize: make every image `resize` x `resize` pixels.
        image: name of the image column; None takes the first column of images.
        label: name of the label column; None prefers `fine_label` and `label`, then the first column of class labels.

    Raises:
        NotFound: package, data set, split or column missing.
        BadUpload: sizes differ and `resize` was not given.
    """
    try:
        import datasets
    except ImportError as error:
        raise NotFound(
            f"'{name}' is no local source, and reading it from the Hugging Face Hub needs: pip install 'engram[hub]'"
        ) from error
    try:
        saved = (Path(name) / "dataset_dict.json").is_file()
        splits = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # the library raises a dozen unrelated classes for "not there"
        raise NotFound(f"the data set '{name}' could not be loaded: {error}") from error
    test_split = next((split for split in TEST_SPLITS if split in splits), None)
    if "train" not in splits or test_split is None:
        raise NotFound(
            f"'{name}' has the splits {sorted(splits)}; needed are train and one of {', '.join(TEST_SPLITS)}"
        )
    features = splits["train"].features
    image = image or _column(features, datasets.Image, ("image", "img"), name)
    label = label or _column(features, datasets.ClassLabel, ("fine_label", "label", "labels"), name)
    missing = {image, label} - set(features)
    if missing:
        raise NotFound(f"'{name}' has no column {sorted(missing)}; its columns are {sorted(features)}")
    train, test = splits["train"], splits[test_split]
    pictures = [*(_grey_or_rgb(row) for row in train[image]), *(_grey_or_rgb(row) for row in test[image])]
    both = _stack(pictures, resize=resize, source=name)
    train_ids, test_ids = (np.asarray(split[label][:], np.int64) for split in (train, test))
    names = tuple(getattr(features[label], "names", None) or ())
    return _split(Path(name).name, both, train_ids, test_ids, names)


def _column(features: Any, kind: type, preferred: Sequence[str], name: str) -> str:
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    # A column of plain integers called `label` serves as well as a declared ClassLabel.
    found += [column for column in preferred if column in features and column not in found and kind.__name__ != "Image"]
    if not found:
        raise NotFound(f"'{name}' has no {kind.__name__} column; its columns are {sorted(features)}")
    return next((column for column in preferred if column in found), found[0])


def _split(name: str, both: Images, train_ids: ClassIds, test_ids: ClassIds, names: tuple[str, ...]) -> Dataset:
    train, test = both[: len(train_ids)], both[len(train_ids) :]
    return Dataset(name, Examples.of_arrays(train, train_ids), Examples.of_arrays(test, test_ids), names)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _grey_or_rgb(image)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise BadUpload(f"{path} cannot be read as an image: {error}") from error


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _stack(images: Sequence[Image.Image], *, resize: int | None, source: str) -> Images:
    """All images as one array; grey ones become RGB where any is."""
    if not images:
        raise NotFound(f"{source} holds no images")
    if resize is not None:
        images = [image.resize((resize, resize), Image.Resampling.BILINEAR) for image in images]
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise BadUpload(f"{source} has images of {len(sizes)} sizes, e.g. {sizes[0]} and {sizes[-1]}; give --resize")
    mode = "RGB" if any(image.mode == "RGB" for image in images) else "L"
    stacked = np.stack([np.asarray(image.convert(mode)) for image in images])
    return stacked.reshape(*stacked.shape[:3], -1)
