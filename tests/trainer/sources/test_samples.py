"""The sample and the digits are the same everywhere, and what is fetched in place of the sample is refused."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from engram.errors import BadUpload, Unavailable
from engram_trainer.datasets import load
from engram_trainer.sources.idx import write_idx
from engram_trainer.sources.samples import SAMPLE, read_digits, read_sample
from tests.trainer.tiny import assert_same

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def test_the_shipped_sample_is_small_balanced_and_licensed() -> None:
    sample = load("sample")
    assert sample.shape == (28, 28, 1)
    assert np.bincount(sample.train.class_ids).tolist() == [700] * 10
    assert np.bincount(sample.test.class_ids).tolist() == [150] * 10
    assert len(sample.class_names) == 10
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) <= 4_000_000
    assert "MIT" in (SAMPLE / "LICENSE").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_shipped_sample_is_the_first_images_of_each_class_of_the_whole(tmp_path: Path) -> None:
    whole = load(str(DEBIAN))
    assert len(whole.train) == 60_000
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
        assert_same(found, load("sample"))


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


def test_the_digits_are_split_the_same_way_every_time() -> None:
    digits = load("digits")
    assert digits.shape == (8, 8, 1)
    assert len(digits.train) + len(digits.test) == 1797
    assert digits.train.read().max() == 255
    assert np.bincount(digits.test.class_ids).min() >= 34
    assert_same(digits, read_digits())
