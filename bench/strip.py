"""What do strips save and cost against one JPEG file per image: bytes, and images a second?

Images are patches of scikit-learn's two photographs, 4:2:0, all arms from the same pixels. The arms of one line are run
in turn, several times over, and the median of each counts, so that a busy machine slows all alike: read the ratios.
Strips are decoded as a draw is: 256 random exemplars of a pack (fewer of large images) are put together and decoded
into a buffer that is used again. Files are decoded one by one into new arrays, as a data loader does.

With `--cifar10 DIR` the bytes of a pack of 1,000 images of CIFAR-10's test set are added.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image
from report import Cell, finish, parse_args, print_table
from sklearn.datasets import load_sample_images

from engram import pack, strip
from engram.schemas import Subsampling
from engram_trainer import datasets

UInt8Array = npt.NDArray[np.uint8]

QUALITIES = (10, 25, 50, 75, 90)
# Images of a pack and of a draw at each side; a pack of 32 px has to hold at least 1,000.
COUNTS = {32: (2000, 256), 96: (300, 256), 224: (60, 60)}


class Line(NamedTuple):
    """What was measured at one side and quality. Bytes are per image, speeds images/s by arm."""

    side: int
    quality: int
    strip_bytes: float
    overhead: float
    file_bytes: dict[str, float]
    encoded: dict[str, float]
    decoded: dict[str, float]


def main() -> None:
    args = parse_args("what does a strip save against one JPEG file per image, and what does it cost?", add_arguments)
    qualities = (10, 50, 90) if args.quick else QUALITIES
    repeats = 3 if args.quick else 9
    patches = {side: cut_patches(count, side) for side, (count, _) in COUNTS.items()}
    lines = [measure(side, quality, patches[side], repeats) for side in COUNTS for quality in qualities]
    print_table(
        "Bytes per image, 4:2:0",
        ("side", "quality", "strip", "of it overhead", "Pillow file", "optimized", "simplejpeg file", "strip / Pillow"),
        [
            (line.side, line.quality, line.strip_bytes, line.overhead, *line.file_bytes.values(), size_ratio(line))
            for line in lines
        ],
    )
    for title, speeds in (("Encode", [line.encoded for line in lines]), ("Decode", [line.decoded for line in lines])):
        arms = list(speeds[0])
        print_table(
            f"{title}, images/s",
            ("side", "quality", *arms, f"strip / {arms[1]}"),
            [
                (line.side, line.quality, *speed.values(), speed["strip"] / speed[arms[1]])
                for line, speed in zip(lines, speeds, strict=True)
            ],
        )
    by_place = {(line.side, line.quality): line for line in lines}
    small = by_place[32, 50]
    flat: dict[str, Cell] = {
        "strip_to_file_bytes_32_q50": size_ratio(small),
        "overhead_32_q50": small.overhead,
        "pixels_identical": all(are_pixels_identical(images[:200]) for images in patches.values()),
        "decode_speedup_vs_pillow_32": small.decoded["strip"] / small.decoded["Pillow"],
        "decode_speedup_vs_simplejpeg_32": small.decoded["strip"] / small.decoded["simplejpeg"],
        "encode_speedup_vs_pillow_32": small.encoded["strip"] / small.encoded["Pillow"],
        "strip_bytes_32_q50": small.strip_bytes,
        "strip_to_file_bytes_224_q50": size_ratio(by_place[224, 50]),
        "strip_decode_images_per_s_32": small.decoded["strip"],
        "pack_bytes_20_32_q50": pack_bytes(patches[32][:20], 50),
        **{
            f"encode_vs_pillow_{side}": by_place[side, 50].encoded["strip"] / by_place[side, 50].encoded["Pillow"]
            for side in (96, 224)
        },
    }
    if args.cifar10 is not None:
        images = datasets.load(str(args.cifar10)).test.images.read(np.arange(1000))
        files = one_by_one(partial(pillow_file, quality=50, optimize=False), images)
        flat["strip_to_file_bytes_cifar10_q50"] = pack_bytes(images, 50) / sum(map(len, files))
    finish(args, flat)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cifar10", type=Path, help="folder with CIFAR-10's binary files")


def pack_bytes(images: UInt8Array, quality: int) -> int:
    """Of a pack of these images in ten classes."""
    class_ids = np.arange(len(images)) * 10 // len(images)
    return len(pack.to_bytes(strip.encode(images, class_ids, quality=quality)))


def cut_patches(count: int, side: int) -> UInt8Array:
    """Square patches [N, side, side, 3] from random places of the photographs, half of them mirrored."""
    rng = np.random.default_rng(side)
    photographs = [np.asarray(photograph, np.uint8) for photograph in load_sample_images().images]
    patches = np.empty((count, side, side, 3), np.uint8)
    for patch in patches:
        photograph = photographs[rng.integers(len(photographs))]
        y, x = (rng.integers(room - side + 1) for room in photograph.shape[:2])
        patch[:] = photograph[y : y + side, x : x + side][:, :: rng.choice([-1, 1])]
    return patches


def measure(side: int, quality: int, images: UInt8Array, repeats: int) -> Line:
    """Bytes and speeds of every arm at one side and quality."""
    class_ids = np.arange(len(images)) * 10 // len(images)
    exemplars = strip.encode(images, class_ids, quality=quality)
    packed = pack.to_bytes(exemplars)
    encoders: dict[str, Callable[[UInt8Array], bytes]] = {
        "Pillow": partial(pillow_file, quality=quality, optimize=False),
        "Pillow optimized": partial(pillow_file, quality=quality, optimize=True),
        "simplejpeg": partial(simplejpeg.encode_jpeg, quality=quality, colorspace="RGB", colorsubsampling="420"),
    }
    files = {arm: one_by_one(encoder, images) for arm, encoder in encoders.items()}
    encode_arms: dict[str, Callable[[], object]] = {
        "strip": lambda: strip.encode(images, class_ids, quality=quality),
        **{arm: partial(one_by_one, encoder, images) for arm, encoder in encoders.items()},
    }
    drawn = COUNTS[side][1]
    rows = np.random.default_rng(quality).permutation(len(images))[:drawn]
    chosen = [files["Pillow"][row] for row in rows]
    buffer = strip.pixel_buffer(drawn * exemplars.form.image_bytes)
    decode_arms: dict[str, Callable[[], object]] = {
        "strip": lambda: exemplars.select(rows).decode(buffer),
        "Pillow": partial(one_by_one, pillow_pixels, chosen),
        "simplejpeg": partial(one_by_one, simplejpeg.decode_jpeg, chosen),
    }
    return Line(
        side,
        quality,
        len(packed) / len(images),
        1 - int(exemplars.lengths.sum()) / len(packed),
        {arm: sum(map(len, of_arm)) / len(images) for arm, of_arm in files.items()},
        {arm: len(images) / seconds for arm, seconds in median_seconds(encode_arms, repeats).items()},
        {arm: drawn / seconds for arm, seconds in median_seconds(decode_arms, 5 * repeats).items()},
    )


def median_seconds(arms: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median time of each arm, all arms run in turn."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm, work in arms.items():
            began = time.perf_counter()
            work()
            seconds[arm].append(time.perf_counter() - began)
    return {arm: median(of_arm) for arm, of_arm in seconds.items()}


def one_by_one(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    return [work(item) for item in items]


def size_ratio(line: Line) -> float:
    """Strip bytes over the bytes of Pillow's default files."""
    return line.strip_bytes / line.file_bytes["Pillow"]


def pillow_file(image: UInt8Array, quality: int, *, optimize: bool) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=2, optimize=optimize)
    return file.getvalue()


def pillow_pixels(file: bytes) -> UInt8Array:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image)


def are_pixels_identical(images: UInt8Array) -> bool:
    """Whether images decoded as strips equal each one decoded alone, at every quality and subsampling."""
    for quality in QUALITIES:
        for subsampling in get_args(Subsampling):
            exemplars = strip.encode(images, np.zeros(len(images), int), quality=quality, subsampling=subsampling)
            for row, pixels in enumerate(exemplars.decode()):
                alone = simplejpeg.decode_jpeg(exemplars.jpeg(row), "RGB", fastupsample=True)
                if not np.array_equal(pixels, alone):
                    return False
    return True


if __name__ == "__main__":
    main()
