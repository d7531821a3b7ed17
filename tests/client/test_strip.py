"""A strip is an ordinary JPEG whose images can be dropped, reordered and drawn without re-encoding."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engram import strip
from engram.errors import StripCorrupt, TooLarge

GOLDEN = Path(__file__).parents[1] / "golden"
Sampling = Literal["4:2:0", "4:4:4"]


def pictures(count: int, height: int, width: int, channels: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth gradients with some noise: compressible, and no two alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    slope = rng.uniform(-3, 3, (count, 1, 1, channels))
    plane = 128 + slope * (y - height / 2)[None, :, :, None] - slope * (x - width / 2)[None, :, :, None]
    noisy = plane + rng.normal(0, 12, (count, height, width, channels))
    return np.asarray(noisy.clip(0, 255), dtype=np.uint8)


def alone(exemplars: strip.Exemplars, row: int) -> npt.NDArray[np.uint8]:
    colours = "RGB" if exemplars.form.channels == 3 else "GRAY"
    image = simplejpeg.decode_jpeg(exemplars.jpeg(row), colours, fastupsample=True)
    return np.asarray(image).reshape(exemplars.form.shape)


shapes = st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]))
samplings: st.SearchStrategy[Sampling] = st.sampled_from(["4:2:0", "4:4:4"])


@settings(max_examples=60, deadline=None)
@given(shape=shapes, quality=st.integers(1, 100), sampling=samplings, seed=st.integers(0, 99))
def test_every_image_decodes_as_it_would_alone(
    shape: tuple[int, int, int, int], quality: int, sampling: Sampling, seed: int
) -> None:
    exemplars = strip.encode(pictures(*shape, seed), np.arange(shape[0]), quality=quality, subsampling=sampling)
    pixels = exemplars.decode()
    assert pixels.shape == shape
    for row in range(shape[0]):
        assert np.array_equal(pixels[row], alone(exemplars, row))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), shape=shapes, sampling=samplings)
def test_any_rows_in_any_order_are_again_a_strip_with_the_pixels_of_its_parts(
    data: st.DataObject, shape: tuple[int, int, int, int], sampling: Sampling
) -> None:
    exemplars = strip.encode(pictures(*shape), np.arange(shape[0]), quality=60, subsampling=sampling)
    rows = data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=20))
    (written,) = exemplars.select(rows).to_strips(task=7, rows=rows)
    read = strip.parse(written)
    assert read.task == 7
    assert read.end == len(written)
    assert read.rows is not None
    assert read.rows.tolist() == rows
    assert read.exemplars.class_ids.tolist() == rows
    assert np.array_equal(read.exemplars.decode(), exemplars.decode()[rows])


def test_pixels_equal_those_of_pillows_own_file_when_no_padding_is_needed() -> None:
    images = pictures(5, 32, 48, 3)
    pixels = strip.encode(images, np.zeros(5, int), quality=50).decode()
    for image, decoded in zip(images, pixels, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=50, subsampling=2)
        assert np.array_equal(decoded, simplejpeg.decode_jpeg(file.getvalue(), "RGB", fastupsample=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strip_and_a_single_exemplar_open_in_an_ordinary_viewer(channels: int) -> None:
    exemplars = strip.encode(pictures(3, 28, 28, channels), np.arange(3), quality=75)
    for data, size in [(exemplars.to_strips()[0], (28, 2 * 32 + 28)), (exemplars.jpeg(1), (28, 28))]:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.format == "JPEG"
            assert image.mode == ("RGB" if channels == 3 else "L")
            assert image.size == size


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5000, 1, 1, 3), (3, 65_500, 8, 1), (2, 8, 65_500, 3), (3, 1, 700, 1)])
def test_extreme_shapes_survive_the_round_trip(shape: tuple[int, int, int, int]) -> None:
    exemplars = strip.encode(np.full(shape, 77, np.uint8), np.zeros(shape[0], int), quality=90)
    pixels = np.concatenate([strip.parse(data).exemplars.decode() for data in exemplars.to_strips()])
    assert pixels.shape == shape
    assert np.abs(pixels.astype(int) - 77).max() <= 2


@pytest.mark.parametrize(("quality", "channels"), [(94, 3), (100, 3), (100, 1)])
def test_noise_at_high_quality_outgrows_pillows_buffer_and_is_still_encoded(quality: int, channels: int) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (2, 300, 300, channels), dtype=np.uint8)
    pixels = strip.encode(noise, [0, 1], quality=quality, subsampling="4:4:4").decode()
    assert np.abs(pixels.astype(int) - noise).mean() < 12


def test_images_beyond_one_strip_go_into_several_under_the_same_tables() -> None:
    images = pictures(2500, 32, 32, 1)
    exemplars = strip.encode(images, np.arange(2500) // 100, quality=30)
    parts = [strip.parse(data).exemplars for data in exemplars.to_strips()]
    assert [len(part) for part in parts] == [2046, 454]
    assert {part.form for part in parts} == {exemplars.form}
    assert np.array_equal(strip.concat(parts).decode(), exemplars.decode())


def test_batches_encoded_in_chunks_share_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(90, 16, 16, 3)
    whole = strip.encode(images, np.arange(90), quality=50)
    monkeypatch.setattr(strip, "CHUNK_PIXELS", 16 * 16 * 20)
    chunked = strip.encode(images, np.arange(90), quality=50)
    assert np.array_equal(chunked.decode(), whole.decode())
    assert abs(int(chunked.lengths.sum()) - int(whole.lengths.sum())) <= 90


def test_the_overhead_is_what_the_bytes_say() -> None:
    for count, classes in [(1, 1), (7, 3), (2000, 40)]:
        exemplars = strip.encode(pictures(count, 8, 8, 1), np.arange(count) * classes // count, quality=50)
        (data,) = exemplars.to_strips()
        runs = strip.runs_of(exemplars.class_ids)
        assert len(data) == int(exemplars.sizes.sum()) + strip.strip_overhead(exemplars.form, runs)


def test_a_header_that_outgrows_one_segment_is_continued_in_the_next() -> None:
    count = 8000
    ids = np.random.default_rng(0).integers(0, strip.MAX_CLASS_ID, count)
    exemplars = strip.encode(np.zeros((count, 1, 1, 1), np.uint8), ids, quality=50)
    (data,) = exemplars.to_strips(task=1, rows=np.arange(count))
    assert data.count(b"\xff\xef") >= 2
    read = strip.parse(data)
    assert np.array_equal(read.exemplars.class_ids, ids)


@pytest.mark.parametrize(
    ("images", "ids", "quality", "message"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), [], 50, "at least one"),
        (np.zeros((1, 4, 4, 3), np.float32), [0], 50, "uint8"),
        (np.zeros((1, 4, 4, 4), np.uint8), [0], 50, "1 or 3"),
        (np.zeros((1, 0, 4, 3), np.uint8), [0], 50, "pixels a side"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0], 50, "2 integers"),
        (np.zeros((1, 4, 4, 3), np.uint8), [-1], 50, "class ids"),
        (np.zeros((1, 4, 4, 3), np.uint8), [2**31], 50, "class ids"),
        (np.zeros((1, 4, 4, 3), np.uint8), [0.5], 50, "integers"),
        (np.zeros((1, 4, 4, 3), np.uint8), [0], 0, "1..100"),
        (np.zeros((1, 4, 4, 3), np.uint8), [0], 101, "1..100"),
        (np.zeros((1, 4, 4, 3), np.uint8), [0], 50.5, "1..100"),
    ],
)
def test_a_slip_of_the_caller_is_named(
    images: npt.NDArray[np.uint8], ids: list[int], quality: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        strip.encode(images, np.array(ids) if ids else np.zeros(0, int), quality=quality)


def test_strips_of_different_tables_are_not_joined_by_accident() -> None:
    low, high = (strip.encode(pictures(2, 8, 8, 3), [0, 1], quality=quality) for quality in (20, 80))
    with pytest.raises(ValueError, match="different forms"):
        strip.concat([low, high])


def test_a_flipped_bit_anywhere_in_the_image_data_is_found_before_decoding() -> None:
    (data,) = strip.encode(pictures(6, 16, 16, 3), np.arange(6), quality=70).to_strips()
    start = data.index(b"\x00\x3f\x00") + 3
    for at in range(start, len(data)):
        with pytest.raises(StripCorrupt):
            strip.parse(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])


def test_a_strip_that_claims_huge_images_is_refused_before_memory_is_taken() -> None:
    (data,) = strip.encode(np.zeros((1, 64, 64, 1), np.uint8), [0], quality=50).to_strips()
    with pytest.raises(TooLarge, match="64x64"):
        strip.parse(data, limits=strip.Limits(max_pixels=64 * 63))


@pytest.mark.parametrize("name", ["grey_28x28_q50", "rgb_420_32x32_q50", "rgb_444_17x9_q90"])
def test_the_golden_files_pin_the_format(name: str) -> None:
    """The bytes on disk were written by version 1 of the format and must be read, and written again, unchanged."""
    data = (GOLDEN / f"{name}.strip.jpg").read_bytes()
    pixels = np.load(GOLDEN / f"{name}.pixels.npy")
    read = strip.parse(data)
    assert np.array_equal(read.exemplars.decode(), pixels)
    assert read.exemplars.to_strips(task=read.task, rows=read.rows) == [data]
