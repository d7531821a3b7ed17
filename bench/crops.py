"""Measure what it costs that a buffer has one image shape: random crops of stored 256x256 centre crops, beside random
crops of the originals.

Photographs are cut into originals of 500x375 pixels, ImageNet's usual size, half of them (a checkerboard) to train on
and half to test on. A network of 64 or 96 px learns which photograph an image is from, out of random resized crops (8
to 100 % of the area, as the recipes for ImageNet crop) of

    originals     the whole image
    stored        its 256x256 centre crop, as `--resize 256` makes it (shorter side to 256, centre)
    stored, q50   the same after JPEG at quality 50, as exemplars are kept

All arms see crops at the same relative places, are tested on the same centre crops of the originals, and start from
the same weights; differences are paired over seeds. A run over originals has all of each image, one over centre crops
three quarters of it, at two thirds of its resolution.

Photographs: `--photos FOLDER`, e.g. of Debian's packages of wallpapers (mate-backgrounds, plasma-workspace-wallpapers,
lomiri-wallpapers, ukui-wallpapers, gnome-backgrounds). With `--quick` scikit-learn's two serve, at a quarter of all
sizes, which shows that the script runs and nothing else.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import report
import torch
from intervals import half_width
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn import functional

from engram_trainer import networks
from engram_trainer.examples import Images
from engram_trainer.sources.pictures import centre_crop

GRID = (5, 4)
"""Originals that a photograph is cut into, across and down."""
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
QUALITY = 50
BATCH = 32
ARMS = ("originals", "stored", f"stored, q{QUALITY}")


@dataclass(frozen=True)
class Sizes:
    """In pixels."""

    original: tuple[int, int] = (500, 375)
    stored: int = 256
    networks: tuple[int, ...] = (64, 96)


@dataclass(frozen=True)
class Cut:
    """Originals and the photograph of each."""

    images: list[Image.Image]
    classes: torch.Tensor


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--photos", type=Path, help="folder of photographs, searched through")
        parser.add_argument("--seeds", type=int, default=5)
        parser.add_argument("--epochs", type=int, default=20)

    args = report.parse_args("what do random crops of stored centre crops cost against those of the originals?", more)
    if not args.quick and args.photos is None:
        raise SystemExit("give --photos FOLDER, or --quick")
    torch.set_num_threads(1)
    sizes = Sizes((125, 93), 64, (16, 24)) if args.quick else Sizes()
    seeds, epochs = (2, 30) if args.quick else (args.seeds, args.epochs)
    train, test = cut(photographs(None if args.quick else args.photos, sizes), sizes)
    stored = [centre_crop(image, sizes.stored) for image in train.images]
    files = [encoded(image) for image in stored]
    sources: dict[str, Sequence[Image.Image]] = dict(
        zip(ARMS, (train.images, stored, [Image.open(io.BytesIO(file)) for file in files]), strict=True)
    )
    flat: dict[str, report.Cell] = {
        "photographs": int(train.classes.max()) + 1,
        "originals_train": len(train.images),
        "seeds": seeds,
        "epochs": epochs,
        "stored_bytes": fmean(map(len, files)),
    }
    for side in sizes.networks:
        accuracies = {
            arm: [learned(images, train.classes, test, side, epochs, seed) for seed in range(seeds)]
            for arm, images in sources.items()
        }
        flat |= compare(side, accuracies)
    report.finish(args, flat)


def photographs(folder: Path | None, sizes: Sizes) -> list[Image.Image]:
    """Those of the folder that are large enough, brought to the size of the grid."""
    wanted = (GRID[0] * sizes.original[0], GRID[1] * sizes.original[1])
    if folder is None:
        found = [Image.fromarray(image) for image in load_sample_images().images]
    else:
        found = []
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
                with Image.open(path) as image:
                    if image.width >= wanted[0] and image.height >= wanted[1]:
                        found.append(image.convert("RGB"))
    return [covering(image, wanted) for image in found]


def covering(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The centre of an image, as much as has this shape, scaled to it."""
    scale = min(image.width / size[0], image.height / size[1])
    width, height = int(scale * size[0]), int(scale * size[1])
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))


def cut(photos: Sequence[Image.Image], sizes: Sizes) -> tuple[Cut, Cut]:
    """The originals to train on and to test on."""
    images: tuple[list[Image.Image], list[Image.Image]] = [], []
    classes: tuple[list[int], list[int]] = [], []
    width, height = sizes.original
    for number, photo in enumerate(photos):
        for column in range(GRID[0]):
            for row in range(GRID[1]):
                which = (column + row) % 2
                left, top = column * width, row * height
                images[which].append(photo.crop((left, top, left + width, top + height)))
                classes[which].append(number)
    train, test = (Cut(images[which], torch.tensor(classes[which])) for which in (0, 1))
    return train, test


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def resized_crop(image: Image.Image, side: int, drawn: np.ndarray) -> Image.Image:
    """A window of random area, ratio and place, scaled to side x side with antialiasing, perhaps flipped.

    The usual procedure but for windows that do not fit, which are cut to the image.
    """
    area = (AREA[0] + drawn[0] * (AREA[1] - AREA[0])) * image.width * image.height
    ratio = np.exp(np.log(RATIO[0]) + drawn[1] * np.log(RATIO[1] / RATIO[0]))
    width, height = min(image.width, np.sqrt(area * ratio)), min(image.height, np.sqrt(area / ratio))
    left, top = drawn[2] * (image.width - width), drawn[3] * (image.height - height)
    crop = image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if drawn[4] < 0.5 else crop


def learned(
    images: Sequence[Image.Image], classes: torch.Tensor, test: Cut, side: int, epochs: int, seed: int
) -> float:
    """The test accuracy of a network that learned from crops of these images."""
    network = networks.build("conv", (side, side, 3), seed=seed)
    head = networks.linear_head(network.dimensions, int(classes.max()) + 1, seed=seed)
    both = nn.Sequential(network, head)
    optimizer = torch.optim.SGD(both.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, total_steps=epochs * -(-len(images) // BATCH), pct_start=0.1
    )
    generator = np.random.default_rng([seed, side])
    for _ in range(epochs):
        order = generator.permutation(len(images))
        for start in range(0, len(images), BATCH):
            rows = order[start : start + BATCH]
            drawn = generator.random((len(rows), 5))
            crops = [resized_crop(images[row], side, each) for row, each in zip(rows, drawn, strict=True)]
            loss = functional.cross_entropy(both(pixels(crops)), classes[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    both.eval()
    centres = [centre_crop(centre_crop(image, round(side * 256 / 224)), side) for image in test.images]
    with torch.inference_mode():
        found = torch.cat([both(pixels(centres[at : at + 256])).argmax(1) for at in range(0, len(centres), 256)])
    return float((found == test.classes).float().mean())


def pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    stacked: Images = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def compare(side: int, accuracies: dict[str, list[float]]) -> dict[str, report.Cell]:
    """A table of the arms, and what each loses against the originals with its 95 % interval, paired over seeds."""
    flat: dict[str, report.Cell] = {}
    rows: list[list[report.Cell]] = []
    originals = np.array(accuracies[ARMS[0]])
    for arm, found in accuracies.items():
        lost = originals - np.array(found)
        half = half_width(lost.tolist()) if arm != ARMS[0] else 0.0
        rows.append([arm, fmean(found), float(lost.mean()), half])
        key = {ARMS[0]: "originals", ARMS[1]: "stored", ARMS[2]: f"stored_q{QUALITY}"}[arm]
        flat[f"accuracy_{key}_{side}px"] = fmean(found)
        if arm != ARMS[0]:
            flat |= {f"lost_{key}_{side}px": float(lost.mean()), f"lost_{key}_{side}px_ci": half}
    report.print_table(f"Network of {side} px", ("crops of", "accuracy", "lost", "+-"), rows)
    return flat


if __name__ == "__main__":
    main()
