"""The two data sets that need nothing: a sample of Fashion-MNIST, and scikit-learn's digits.

The sample is in the repository and not in its wheel, of which it would be most: there it is fetched once and kept in
the user's cache. It is cut from Fashion-MNIST (MIT, see data/fashion-mnist/LICENSE; here from the Debian package
dataset-fashion-mnist): the first images of each class, in file order. This line reproduces it byte for byte:

    python -c "from engram_trainer.sources import idx; from pathlib import Path; idx.write_idx(
        idx.read_idx_folder(Path('/usr/share/datasets/fashion-mnist')).first(train=700, test=150),
        'trainer/engram_trainer/data/fashion-mnist')"
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np

from engram.errors import BadUpload, NotFound, Unavailable
from engram_trainer.examples import Examples
from engram_trainer.sources.dataset import Dataset
from engram_trainer.sources.idx import IDX_STEMS, read_idx_folder, write_idx

SAMPLE = Path(__file__).parent.parent / "data" / "fashion-mnist"
_SAMPLE_SHA256 = "9fb99ddd581d12fbba27005cda473423a2fa3f9426dca24b5a71b53be43c09ba"
"""Of the pixels and labels of the sample's four files, one after the other."""
_FASHION_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"


def read_sample(folder: Path = SAMPLE, *, cache: Path | None = None, url: str = _FASHION_URL) -> Dataset:
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
    return read_idx_folder(folder, name="fashion-mnist-sample")


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
        sample = read_idx_folder(Path(fetched)).first(train=700, test=150)
    digest = hashlib.sha256()
    for split in (sample.train, sample.test):
        digest.update(split.read().tobytes() + split.class_ids.astype(np.uint8).tobytes())
    if digest.hexdigest() != _SAMPLE_SHA256:
        raise BadUpload(f"{url} gave other images than those of Fashion-MNIST (SHA-256 {digest.hexdigest()})")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as part:
        write_idx(sample, Path(part) / "sample")
        try:
            (Path(part) / "sample").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


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
