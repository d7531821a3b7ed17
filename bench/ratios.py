"""Measure R of pixels at every quality, of photographs at several sizes, and which quality it chooses.

Squares are cut out of photographs at random, of a quarter to four fifths of the shorter side, and scaled to one size. A
class is a random half of them, so that it shows many scenes, as the classes of a data set do. The photographs are those
of a folder, searched with its subfolders (pictures of one size in bytes are taken once), else scikit-learn's two, which
show two scenes only and so say little.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from report import Cell, finish, parse_args, print_table
from sklearn.datasets import load_sample_images

from engram.selection.embedding import BUILTIN_BLOCK, BuiltinEmbedder
from engram.selection.images import ArrayImages, Pool
from engram.selection.volume import Comparison, ratios

QUALITIES = (5, 10, 25, 50, 75, 90)
SIDES = (32, 64, 96, 224)
EPSILON = 0.3
SMALLEST_FILE_BYTES = 100_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

UInt8Array = npt.NDArray[np.uint8]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, help="photographs, 1000 pixels a side or more")


def main() -> None:
    args = parse_args("does R fall with the quality, at every size?", add_arguments)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    photographs = list(pictures(args.folder))
    of_each = max(2, (256 if args.quick else 1024) // len(photographs))
    flat: dict[str, Cell] = {"photographs": len(photographs)}
    rows: list[tuple[Cell, ...]] = []
    for side in SIDES:
        images = crops(photographs, side, of_each)
        class_ids = np.random.default_rng(1).permutation(len(images)) % 2
        numbers = {class_id: np.flatnonzero(class_ids == class_id) for class_id in (0, 1)}
        depths = {class_id: len(found) for class_id, found in numbers.items()}
        pool = Pool(None, ArrayImages(images, class_ids), "4:2:0")
        embedder = BuiltinEmbedder(pool.shape)
        comparison = Comparison(pool, numbers, depths, block=BUILTIN_BLOCK, embedder=embedder)
        found = {q: ratios(list(comparison.volumes(q).values()), comparison.block)["raw"] or 0.0 for q in QUALITIES}
        chosen = min((q for q, ratio in found.items() if q > 5 and abs(ratio - 1) < EPSILON), default=max(QUALITIES))
        rows.append((side, *found.values(), chosen))
        flat |= {f"ratio_{side}_q{q}": ratio for q, ratio in found.items()} | {f"chosen_{side}": chosen}
    print_table("R of pixels", ("side", *(f"R({q})" for q in QUALITIES), "chosen"), rows)
    finish(args, flat)


def pictures(folder: Path | None) -> Iterator[Image.Image]:
    """The photographs, RGB."""
    if folder is None:
        yield from map(Image.fromarray, load_sample_images().images)
        return
    files = {path.stat().st_size: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES}
    for size, path in sorted(files.items()):
        if size >= SMALLEST_FILE_BYTES:
            with Image.open(path) as picture:
                yield picture.convert("RGB")


def crops(photographs: list[Image.Image], side: int, of_each: int) -> UInt8Array:
    """Squares of the photographs, scaled, [N, side, side, 3]."""
    rng = np.random.default_rng(0)
    squares = []
    for photograph in photographs:
        width, height = photograph.size
        for _ in range(of_each):
            cut = max(side, int(min(width, height) * rng.uniform(0.25, 0.8)))
            x, y = rng.integers(0, [width - cut, height - cut], endpoint=True).tolist()
            box = (x, y, x + cut, y + cut)
            squares.append(np.asarray(photograph.resize((side, side), Image.Resampling.LANCZOS, box)))
    return np.stack(squares)


if __name__ == "__main__":
    main()
