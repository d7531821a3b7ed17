"""Pictures of any size and kind become images of one shape, the same way every time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from engram.errors import BadUpload, NotFound
from engram_trainer.examples import Images, Rows
from engram_trainer.sources.pictures import PictureSet, picture_sets


@dataclass(frozen=True)
class Contents:
    """Files that are in memory."""

    contents: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.contents)

    def read(self, rows: Rows) -> Iterator[tuple[str, bytes]]:
        return ((f"picture {row}", self.contents[row]) for row in rows.tolist())


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pictures(*contents: bytes, resize: int | None = None) -> PictureSet:
    return picture_sets([Contents(contents)], resize=resize, source="here")[0]


def all_of(images: PictureSet) -> Images:
    return images.read(np.arange(len(images)))


def gradient(width: int, height: int) -> Image.Image:
    """Red says the column and green the row, each from 0 to 1 of 255."""
    red = np.broadcast_to(np.linspace(0, 255, width)[None], (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=2).astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(60, 30), (30, 60), (30, 30)])
def test_resizing_keeps_the_aspect_ratio_and_takes_the_centre(width: int, height: int) -> None:
    image = all_of(pictures(encoded(gradient(width, height)), resize=10))[0].astype(int)
    assert image.shape == (10, 10, 3)
    columns, rows = image[5, :, 0], image[:, 5, 1]
    for side, values in ((width, columns), (height, rows)):
        share = 30 / side
        expected = 255 * (0.5 + share * (np.linspace(0.05, 0.95, 10) - 0.5))
        np.testing.assert_allclose(values, expected, atol=5)


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [((500, 375), (341, 256), (42, 0)), ((375, 500), (256, 341), (0, 42)), ((257, 256), (257, 256), (0, 0))],
)
def test_sizes_and_places_are_those_of_torchvision(
    size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    """Resize(256) gives int(256 * long / short), CenterCrop(256) starts at round((long - 256) / 2)."""
    whole = gradient(*size)
    left, top = corner
    expected = whole.resize(resized, Image.Resampling.BILINEAR).crop((left, top, left + 256, top + 256))
    np.testing.assert_array_equal(all_of(pictures(encoded(whole), resize=256))[0], np.asarray(expected))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"quality": 90}),
        ("RGB", {"quality": 30, "subsampling": 2}),
        ("RGB", {"quality": 75, "subsampling": 0, "progressive": True}),
        ("L", {"quality": 75}),
        ("CMYK", {"quality": 75}),
    ],
)
def test_jpegs_have_the_pixels_that_pillow_decodes(mode: str, options: dict[str, object]) -> None:
    rough = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(rough).resize((57, 43)).convert(mode), "JPEG", **options)
    found = all_of(PictureSet(Contents((content,)), (43, 57, 3)))
    np.testing.assert_array_equal(found[0], np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_a_jpeg_with_a_damage_that_pillow_overlooks_is_read() -> None:
    """Like those of ImageNet in which there are bytes that do not belong there."""
    whole = encoded(gradient(40, 40), "JPEG", quality=75)
    content = whole[:-2] + b"junk" * 10 + whole[-2:]
    found = all_of(PictureSet(Contents((content,)), (40, 40, 3)))
    np.testing.assert_array_equal(found[0], np.asarray(Image.open(io.BytesIO(whole))))


def test_a_small_picture_is_enlarged() -> None:
    assert all_of(pictures(encoded(gradient(4, 3)), resize=8)).shape == (1, 8, 8, 3)


def test_a_jpeg_that_is_decoded_smaller_first_hardly_differs() -> None:
    generator = np.random.default_rng(0)
    rough = Image.fromarray(generator.integers(0, 256, (50, 80, 3), dtype=np.uint8)).resize((800, 500))
    content = encoded(rough, "JPEG", quality=90)
    found = all_of(pictures(content, resize=32))[0].astype(int)
    in_full = Image.open(io.BytesIO(content)).resize((51, 32), Image.Resampling.BILINEAR).crop((10, 0, 42, 32))
    assert np.abs(found - np.asarray(in_full)).mean() < 1


def test_grey_pictures_among_coloured_ones_become_rgb() -> None:
    grey, colour = Image.new("L", (2, 2), 9), Image.new("RGB", (2, 2), (1, 2, 3))
    assert all_of(pictures(encoded(grey), encoded(grey))).shape == (2, 2, 2, 1)
    for resize in (None, 2):
        found = all_of(pictures(encoded(grey), encoded(colour), resize=resize))
        assert found[:, 0, 0].tolist() == [[9, 9, 9], [1, 2, 3]]


def test_splits_have_one_shape() -> None:
    grey, colour = Contents((encoded(Image.new("L", (2, 2))),)), Contents((encoded(Image.new("RGB", (2, 2))),))
    assert {each.shape for each in picture_sets([grey, colour], resize=None, source="here")} == {(2, 2, 3)}


def test_only_some_headers_are_looked_at_where_sizes_need_not_be_known() -> None:
    grey, colour = encoded(Image.new("L", (2, 2), 9)), encoded(Image.new("RGB", (2, 2), (0, 255, 0)))
    contents = [grey] * 3000
    contents[1] = b"not even a picture"
    contents[2] = colour
    images = pictures(*contents, resize=1)
    assert images.read(np.array([0, 2])).ravel().tolist() == [9, 150]
    with pytest.raises(BadUpload, match="picture 1 cannot be read as an image"):
        images.read(np.array([1]))
    with pytest.raises(BadUpload, match="picture 1 cannot be read as an image"):
        pictures(*contents)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("1", (255,)), ("L", (200,)), ("LA", (200,)), ("P", (204, 0, 51)), ("RGBA", (204, 0, 51))],
)
def test_pictures_of_other_modes_are_grey_or_rgb(mode: str, expected: tuple[int, ...]) -> None:
    whole = Image.new("RGB" if len(expected) == 3 else "L", (3, 2), expected if len(expected) == 3 else expected[0])
    found = all_of(pictures(encoded(whole.convert(mode))))
    assert found.shape == (1, 2, 3, len(expected))
    assert found[0, 0, 0].tolist() == list(expected)


def test_cmyk_jpegs_of_which_imagenet_has_some_are_read() -> None:
    found = all_of(pictures(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    assert found[0, 0, 0, 0] > 200 > 50 > found[0, 0, 0, 1]


def test_sixteen_bits_are_refused_and_not_clipped() -> None:
    deep = Image.fromarray(np.full((2, 2), 40_000, np.uint16))
    with pytest.raises(BadUpload, match=r"picture 0 has pixels of mode I;16; images need 8 bits per channel"):
        pictures(encoded(deep))


def test_pictures_of_several_sizes_ask_for_a_size() -> None:
    one, other = encoded(Image.new("L", (4, 5))), encoded(Image.new("L", (9, 9)))
    with pytest.raises(BadUpload, match="picture 0 is 4 x 5 pixels and picture 1 9 x 9; give --resize"):
        pictures(one, other)
    assert pictures(one, other, resize=8).shape == (8, 8, 1)


def test_a_picture_that_became_another_is_refused() -> None:
    small = PictureSet(Contents((encoded(Image.new("L", (4, 5))),)), (9, 9, 1))
    with pytest.raises(BadUpload, match="picture 0 is 4 x 5 pixels, the others 9 x 9"):
        small.read(np.array([0]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_picture_that_is_cut_short_is_one_sentence(kind: str) -> None:
    generator = np.random.default_rng(0)
    content = encoded(Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)), kind)
    images = PictureSet(Contents((content[: len(content) // 2],)), (40, 40, 3))
    with pytest.raises(BadUpload, match=r"^picture 0 cannot be read as an image"):
        all_of(images)


def test_a_postscript_program_is_not_started() -> None:
    with pytest.raises(BadUpload, match="or of a kind not known here"):
        pictures(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\nshowpage\n")


def test_no_pictures_and_no_size_are_refused() -> None:
    with pytest.raises(NotFound, match="here holds no images"):
        pictures()
    with pytest.raises(ValueError, match="at least 1 pixel, not 0"):
        pictures(encoded(Image.new("L", (2, 2))), resize=0)
