"""From stored images to what a network sees: cropped, flipped, scaled and normalised on the device.

A `Preparation` is what test images get, the centre crop and the normalisation of each channel; it is a part of the
network that is exported. Training images get an `Augment` first. What is drawn for an image depends on the key of the
step and on which image it is, not on its place in a batch, so several processes draw what one would.

Images are float32 `[N, C, H, W]` in 0..1 as long as they are not normalised; a flip reverses W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from engram_trainer.examples import Images, Shape

FloatArray = npt.NDArray[np.float64]
Identities = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Of a random resized crop: its part of the image, and its width over its height. Source: Szegedy et al., Going Deeper
with Convolutions (CVPR 2015), section 6."""


@dataclass(frozen=True)
class Augment:
    """How training images are varied."""

    padding: int = 0
    """A random window of the network's size is cut from the image with so many black pixels around it."""
    flip: bool = False
    """Every second image is flipped left to right."""
    resized_crop: bool = False
    """The window has a random area (8 to 100 %) and aspect ratio (3:4 to 4:3), and is scaled to the network's size."""


class Preparation(nn.Module):
    """Stored images, float32 `[N, C, H, W]` in 0..1, to what the network sees, `[N, C, crop, crop]`.

    Args:
        shape: height, width and channels as stored.
        crop: side of what the network sees; None is the whole image.
        mean: of each channel, subtracted; one value holds for all.
        std: of each channel, divided by.

    Raises:
        ValueError: the crop is larger than the images, or there is a mean for other channels than they have.
    """

    mean_1C11: torch.Tensor
    std_1C11: torch.Tensor

    def __init__(
        self,
        shape: Shape,
        *,
        crop: int | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        height, width, channels = shape
        if crop is not None and crop > min(height, width):
            raise ValueError(f"images of {height}x{width} pixels have no crop of {crop}x{crop}")
        if len(mean) not in (1, channels):
            raise ValueError(f"normalisation is for {len(mean)} channels, images have {channels}")
        self.shape: Shape = shape if crop is None else (crop, crop, channels)
        self.is_normalised = any(mean) or any(each != 1 for each in std)
        self.register_buffer("mean_1C11", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std_1C11", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """The centre of each image, normalised."""
        height, width, _ = self.shape
        top, left = (images_NCHW.shape[2] - height) // 2, (images_NCHW.shape[3] - width) // 2
        return self._normalised(images_NCHW[:, :, top : top + height, left : left + width])

    def vary(self, images_NCHW: torch.Tensor, augment: Augment, uniforms_NK: FloatArray) -> torch.Tensor:
        """Training images: a window of each, perhaps flipped, normalised.

        Args:
            images_NCHW: the batch as stored; it is not changed.
            augment: how.
            uniforms_NK: at least `DRAWS` numbers in 0..1 for each image.
        """
        height, width, _ = self.shape
        # One copy to the device for all that was drawn.
        drawn_NK = torch.from_numpy(uniforms_NK.astype(np.float32)).to(images_NCHW.device, non_blocking=True)
        if augment.resized_crop:
            images_NCHW = _resized(images_NCHW, (height, width), drawn_NK)
        elif augment.padding or images_NCHW.shape[2:] != (height, width):
            images_NCHW = _window(images_NCHW, (height, width), augment.padding, drawn_NK)
        if augment.flip:
            images_NCHW = torch.where(drawn_NK[:, 0].view(-1, 1, 1, 1) < 0.5, images_NCHW.flip(3), images_NCHW)
        return self._normalised(images_NCHW)

    def _normalised(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return (images_NCHW - self.mean_1C11) / self.std_1C11 if self.is_normalised else images_NCHW


DRAWS = 5
"""Random numbers that the variation of one image takes: flip, place (2), area, aspect ratio."""


def _window(images_NCHW: torch.Tensor, size: tuple[int, int], padding: int, drawn_NK: torch.Tensor) -> torch.Tensor:
    """A random window of each image, black where it reaches out of it."""
    height, width = size
    padded = functional.pad(images_NCHW, (padding,) * 4) if padding else images_NCHW
    spare = torch.tensor([padded.shape[2] - height, padded.shape[3] - width], device=drawn_NK.device)
    top_left = torch.minimum((drawn_NK[:, 1:3] * (spare + 1)).long(), spare)
    # Windows of the padded batch, [N, C, tops, lefts, H, W], are a view; indexing copies the chosen ones.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(padded), device=padded.device), :, top_left[:, 0], top_left[:, 1]]


def _resized(images_NCHW: torch.Tensor, size: tuple[int, int], drawn_NK: torch.Tensor) -> torch.Tensor:
    """A window of random area and aspect ratio of each image, scaled to `size`, bilinear.

    Where images are much larger than `size`, several points are averaged for each pixel, so that fine patterns do not
    turn into coarse ones. Departure from the usual procedure, which draws up to ten times until a window fits: one that
    does not fit is cut to the image's side, which changes its ratio.
    """
    height, width = images_NCHW.shape[2:]
    points = max(1, round(min(height / size[0], width / size[1])))
    area = (_AREA[0] + drawn_NK[:, 3] * (_AREA[1] - _AREA[0])) * (height * width)
    ratio = torch.exp(math.log(_RATIO[0]) + drawn_NK[:, 4] * math.log(_RATIO[1] / _RATIO[0]))
    across = (area * ratio).sqrt().clamp(max=width) / width
    down = (area / ratio).sqrt().clamp(max=height) / height
    zero = torch.zeros_like(across)
    # In the grid's coordinates the image is -1..1: a window of part s has its centre within 1 - s of 0.
    centre_x = (2 * drawn_NK[:, 2] - 1) * (1 - across)
    centre_y = (2 * drawn_NK[:, 1] - 1) * (1 - down)
    affine_N23 = torch.stack(
        [torch.stack([across, zero, centre_x], dim=1), torch.stack([zero, down, centre_y], dim=1)], dim=1
    )
    grid = functional.affine_grid(
        affine_N23, [len(images_NCHW), 1, *(points * side for side in size)], align_corners=False
    )
    sampled = functional.grid_sample(images_NCHW, grid, padding_mode="border", align_corners=False)
    return functional.avg_pool2d(sampled, points) if points > 1 else sampled


def uniforms(key: int, identities_N: Identities, count: int) -> FloatArray:
    """`count` numbers in 0..1 for each image, `[N, count]`: a function of the key and of which image it is.

    Source: Steele et al., Fast Splittable Pseudorandom Number Generators (OOPSLA 2014), SplitMix64's mixing function.
    """
    with np.errstate(over="ignore"):
        start_N = _mixed(identities_N * _GOLDEN + np.uint64(key % 2**64))
        words = _mixed(start_N[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def pixels(images_NHWC: Images, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 `[N, H, W, C]` as float32 `[N, C, H, W]` in 0..1; the bytes travel, the floats are made on the device."""
    images = torch.from_numpy(np.ascontiguousarray(images_NHWC))
    if torch.device(device).type == "cuda":
        images = images.pin_memory().to(device, non_blocking=True)
    return images.to(device).permute(0, 3, 1, 2).to(torch.float32).div_(255)
