"""IDX files are read as they were written, and a damaged one says what is wrong."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from engram.errors import BadUpload, NotFound
from engram_trainer.datasets import load
from engram_trainer.sources.idx import read_idx, write_idx
from tests.trainer.tiny import assert_same, tiny


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_files_are_read_back_as_written(tmp_path: Path, compressed: bool) -> None:
    expected = tiny()
    write_idx(expected, tmp_path)
    if not compressed:
        for path in list(tmp_path.iterdir()):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    assert_same(load(str(tmp_path)), expected)


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
