"""A strip is an ordinary JPEG whose images can be dropped, reordered and drawn without re-encoding."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import engram
from engram import strip
from engram.errors import InvalidRequest, StripCorrupt, TooLarge
from engram.form import MAX_STRIP_PIXELS, Form
from engram.schemas import MAX_CLASS_ID, Subsampling

GOLDEN = Path(__file__).parents[1] / "golden"


def pictures(count: int, height: int, width: int, channels: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth gradients with some noise: compressible, and no two alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    slope = rng.uniform(-3, 3, (count, 1, 1, channels))
    plane = 128 + slope * (y - height / 2)[None, :, :, None] - slope * (x - width / 2)[None, :, :, None]
    noisy = plane + rng.normal(0, 12, (count, height, width, channels))
    return np.asarray(noisy.clip(0, 255), dtype=np.uint8)


def decoded(file: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Pixels of a file by itself, chroma repeated."""
    return np.asarray(simplejpeg.decode_jpeg(file, "RGB" if shape[-1] == 3 else "GRAY", fastupsample=True)).reshape(
        shape
    )


sides = st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 32]))
shapes = st.tuples(st.integers(1, 6), sides, sides, st.sampled_from([1, 3]))
samplings: st.SearchStrategy[Subsampling] = st.sampled_from(["4:2:0", "4:4:4"])


def own_file(image: npt.NDArray[np.uint8], quality: int, sampling: Subsampling) -> bytes:
    """The image as the encoder that `encode` takes for it writes it by itself."""
    height, width, channels = image.shape
    sampling = sampling if channels == 3 else "4:4:4"
    if height % (16 if sampling == "4:2:0" else 8) or height * width > strip.STACKED_PIXELS:
        colours = "RGB" if channels == 3 else "GRAY"
        return bytes(simplejpeg.encode_jpeg(image, quality, colours, sampling.replace(":", "")))
    file = io.BytesIO()
    Image.fromarray(image if channels == 3 else image[..., 0]).save(file, "JPEG", quality=quality, subsampling=sampling)
    return file.getvalue()


@settings(max_examples=150, deadline=None)
@given(shape=shapes, quality=st.integers(1, 100), sampling=samplings, seed=st.integers(0, 99))
def test_every_image_has_the_bytes_and_pixels_of_its_own_file(
    shape: tuple[int, int, int, int], quality: int, sampling: Subsampling, seed: int
) -> None:
    images = pictures(*shape, seed)
    exemplars = strip.encode(images, np.arange(shape[0]), quality=quality, subsampling=sampling)
    for row, (image, pixels) in enumerate(zip(images, exemplars.decode(), strict=True)):
        file = own_file(image, quality, sampling)
        assert exemplars.jpeg(row) == file
        assert np.array_equal(pixels, decoded(file, image.shape))


def test_images_stacked_for_the_encoder_are_independent_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(90, 16, 48, 3)
    whole = strip.encode(images, np.zeros(90, int), quality=70)
    monkeypatch.setattr(strip, "_CHUNK_PIXELS", 16 * 48 * 7)
    assert strip.encode(images, np.zeros(90, int), quality=70).segments() == whole.segments()
    monkeypatch.setattr(strip, "STACKED_PIXELS", 0)
    apart = strip.encode(images, np.zeros(90, int), quality=100)
    monkeypatch.undo()
    # Both encoders have the accurate DCT from quality 96 on.
    assert strip.encode(images, np.zeros(90, int), quality=100).segments() == apart.segments()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=shapes, sampling=samplings)
def test_any_rows_in_any_order_are_again_a_strip_with_the_pixels_of_its_parts(
    data: st.DataObject, shape: tuple[int, int, int, int], sampling: Subsampling
) -> None:
    exemplars = strip.encode(pictures(*shape), np.arange(shape[0]), quality=60, subsampling=sampling)
    rows = data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=20))
    tasks = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(rows), max_size=len(rows)))
    (written,) = exemplars.select(rows).loose().to_strips(tasks=tasks, rows=rows)
    read = strip.parse(written)
    assert read.end == len(written)
    assert read.tasks is not None
    assert read.tasks.tolist() == tasks
    assert read.rows is not None
    assert read.rows.tolist() == rows
    assert read.exemplars.class_ids.tolist() == rows
    assert np.array_equal(read.exemplars.decode(), exemplars.decode()[rows])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.tuples(st.integers(1, 24), st.integers(1, 24)), sampling=samplings)
def test_segments_of_one_form_mix_whatever_they_were_encoded_with(
    data: st.DataObject, size: tuple[int, int], sampling: Subsampling
) -> None:
    uploads = [pictures(data.draw(st.integers(1, 5)), *size, 3, seed) for seed in range(3)]
    parts = [
        strip.encode(images, np.full(len(images), number), quality=40, subsampling=sampling)
        for number, images in enumerate(uploads)
    ]
    together = np.concatenate(uploads)
    joint = strip.encode(together, np.repeat(range(3), list(map(len, uploads))), quality=40, subsampling=sampling)
    assert strip.concat(parts).to_strips() == joint.to_strips()
    which = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))
    rows = [data.draw(st.integers(0, len(parts[index]) - 1)) for index in which]
    mixed = strip.gather(parts, which, rows, np.array(which))
    assert np.array_equal(
        mixed.decode(), np.stack([parts[i].decode()[row] for i, row in zip(which, rows, strict=True)])
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_strips_without_tables_pictures_and_files_open_in_an_ordinary_viewer(channels: int) -> None:
    exemplars = strip.encode(pictures(3, 28, 28, channels), np.arange(3), quality=75)
    (bare,), picture = exemplars.to_strips(), exemplars.loose().picture()
    assert b"\xff\xc4" not in bare
    side = exemplars.form.padded_height
    shown = []
    for data, height in [(bare, 2 * side + 28), (picture, 2 * side + 28), (exemplars.jpeg(1), 28)]:
        with Image.open(io.BytesIO(data)) as image:
            shown.append(np.asarray(image))
            assert (image.format, image.mode) == ("JPEG", "RGB" if channels == 3 else "L")
            assert image.size == (28, height)
    assert np.array_equal(shown[0], shown[1])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5000, 1, 1, 3), (3, 65_500, 8, 1), (2, 8, 65_500, 3), (3, 1, 700, 1)])
def test_extreme_shapes_survive_the_round_trip(shape: tuple[int, int, int, int]) -> None:
    exemplars = strip.encode(np.full(shape, 77, np.uint8), np.zeros(shape[0], int), quality=90)
    pixels = np.concatenate([strip.parse(data).exemplars.decode() for data in exemplars.to_strips()])
    assert pixels.shape == shape
    assert np.abs(pixels.astype(int) - 77).max() <= 2


def test_an_image_of_more_mcus_than_a_restart_interval_holds_is_a_strip_by_itself() -> None:
    exemplars = strip.encode(np.full((2, 2048, 2056, 1), 9, np.uint8), [0, 1], quality=5)
    assert exemplars.form.mcus > 65_535
    strips = exemplars.to_strips()
    assert [len(strip.parse(data).exemplars) for data in strips] == [1, 1]
    assert not any(b"\xff\xdd" in data for data in strips)
    assert np.array_equal(exemplars.decode()[1], decoded(exemplars.jpeg(1), (2048, 2056, 1)))


@pytest.mark.parametrize(("quality", "channels"), [(94, 3), (100, 3), (100, 1)])
def test_noise_at_high_quality_is_encoded(quality: int, channels: int) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (2, 300, 300, channels), dtype=np.uint8)
    pixels = strip.encode(noise, [0, 1], quality=quality, subsampling="4:4:4").decode()
    assert np.abs(pixels.astype(int) - noise).mean() < 12


def test_images_that_do_not_lie_in_one_piece_are_encoded() -> None:
    images = pictures(3, 20, 24, 3)
    exemplars = strip.encode(images, np.arange(3), quality=50)
    apart = np.zeros((3, 3, 20, 24), np.uint8).transpose(0, 2, 3, 1)
    apart[:] = images
    apart.setflags(write=False)
    assert strip.encode(apart, np.arange(3), quality=50).to_strips() == exemplars.to_strips()
    assert strip.encode(images[:, ::-1, ::2], np.arange(3), quality=50).decode().shape == (3, 20, 12, 3)


def test_images_beyond_one_strip_go_into_several() -> None:
    images = pictures(2500, 32, 32, 1)
    exemplars = strip.encode(images, np.arange(2500) // 100, quality=30)
    parts = [strip.parse(data).exemplars for data in exemplars.to_strips()]
    assert [len(part) for part in parts] == [2046, 454]
    assert {part.form for part in parts} == {exemplars.form}
    assert np.array_equal(strip.concat(parts).decode(), exemplars.decode())
    with pytest.raises(InvalidRequest, match="1 to 2046 exemplars of 32x32, not 2500"):
        exemplars.loose().picture()


def test_the_overhead_is_what_the_bytes_say() -> None:
    for count, classes in [(1, 1), (7, 3), (2000, 40)]:
        exemplars = strip.encode(pictures(count, 8, 8, 1), np.arange(count) * classes // count, quality=50)
        (data,) = exemplars.to_strips()
        runs = strip.runs_of(exemplars.class_ids)
        assert len(data) == int(exemplars.sizes.sum()) + strip.strip_overhead(exemplars.form, runs)


def test_a_header_that_outgrows_one_segment_is_continued_in_the_next() -> None:
    count = 8000
    ids, tasks = np.random.default_rng(0).integers(0, MAX_CLASS_ID, (2, count))
    exemplars = strip.encode(np.zeros((count, 1, 1, 1), np.uint8), ids, quality=50)
    (data,) = exemplars.loose().to_strips(tasks=tasks, rows=np.arange(count))
    assert data.count(b"\xff\xef") >= 3
    read = strip.parse(data)
    assert np.array_equal(read.exemplars.class_ids, ids)
    assert read.tasks is not None
    assert np.array_equal(read.tasks, tasks)


@pytest.mark.parametrize(
    ("images", "ids", "quality", "message"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), [], 50, "at least one"),
        (np.zeros((1, 4, 4, 3), np.float32), [0], 50, "uint8"),
        (np.zeros((1, 4, 4, 4), np.uint8), [0], 50, "1 or 3"),
        (np.zeros((1, 0, 4, 3), np.uint8), [0], 50, "pixels a side"),
        (np.zeros((1, 1, 65_501, 1), np.uint8), [0], 50, "pixels a side"),
        (np.broadcast_to(np.uint8(0), (1, 8193, 8193, 1)), [0], 50, "exceeds"),
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


def test_tasks_and_rows_come_together_one_for_each_exemplar() -> None:
    loose = strip.encode(pictures(2, 8, 8, 3), [0, 1], quality=50).loose()
    for tasks, rows in (([1, 1], None), (None, [0, 1]), ([1], [0, 1]), ([1, 1], [0])):
        with pytest.raises(ValueError, match="as many tasks and row numbers"):
            loose.to_strips(tasks=tasks, rows=rows)


def test_strips_of_different_forms_are_not_joined_by_accident() -> None:
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
    form = Form(8193, 8193, 1, "4:4:4", 50)
    (data,) = strip.Loose(form, [b"\x12"], np.zeros(1, np.int64), np.zeros(1, np.uint32)).to_strips()
    with pytest.raises(TooLarge, match="8193x8193") as caught:
        strip.parse(data)
    assert caught.value.details == {"max_pixels": MAX_STRIP_PIXELS}


@pytest.mark.parametrize("name", ["grey_28x28_q50", "rgb_420_32x32_q50", "rgb_444_17x9_q90"])
def test_the_golden_files_pin_the_format(name: str) -> None:
    """The bytes on disk were written by version 2 of the format and must be read, and written again, unchanged."""
    data = (GOLDEN / f"{name}.strip.jpg").read_bytes()
    pixels = np.load(GOLDEN / f"{name}.pixels.npy")
    read = strip.parse(data)
    assert np.array_equal(read.exemplars.decode(), pixels)
    assert read.exemplars.loose().to_strips(tasks=read.tasks, rows=read.rows) == [data]


def test_a_strip_of_version_1_is_refused_with_what_to_do() -> None:
    data = (GOLDEN / "version_1.strip.jpg").read_bytes()
    with pytest.raises(
        StripCorrupt, match=r"version 1.* export its buffer with Engram 0\.1 and upload the export again"
    ):
        strip.parse(data)


@pytest.mark.parametrize(("channels", "subsampling"), [(3, "4:2:0"), (3, "4:4:4"), (1, "4:2:0")])
def test_a_file_is_decoded_to_the_pixels_of_a_draw_in_one_line(channels: int, subsampling: Subsampling) -> None:
    images = pictures(3, 19, 26, channels) // 2 + np.random.default_rng(0).integers(0, 128, (3, 19, 26, channels))
    exemplars = strip.encode(images.astype(np.uint8), [0, 1, 1], quality=50, subsampling=subsampling)
    drawn = exemplars.decode()
    files = [exemplars.jpeg(row) for row in range(3)]
    assert np.array_equal(np.stack([engram.decode_jpeg(file) for file in files]), drawn)
    by_pillow = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files]).reshape(drawn.shape)
    assert np.array_equal(by_pillow, drawn) == (channels == 1 or subsampling == "4:4:4")


def test_what_is_no_jpeg_is_not_decoded() -> None:
    with pytest.raises(ValueError):
        engram.decode_jpeg(b"P6 1 1 255 abc")
