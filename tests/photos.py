"""Pictures for tests of selection: some that lose detail at low qualities, and some that lose nothing at any."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
Shape = tuple[int, int, int]

# The quantised DC terms of these levels are whole at 10, 25, 50, 75 and 90.
_LEVELS = np.array([8, 68, 128, 188, 248], np.uint8)
_TILE = 8


def photos(n: int, shape: Shape = (16, 16, 3), *, seed: int = 0, noise: int = 14) -> UInt8Array:
    """Waves with some grain [N, H, W, C]: like photographs, they lose detail at low qualities.

    At 16x16x3 and this noise R is 1.5 to 2.3 at quality 50 and 1 to 1.2 at 75, so 75 is what selection chooses; with a
    noise of 40 blur and noise cancel at 10, where R is 0.7 to 1.3, and it is below 0.5 from 50 on.
    """
    rng = np.random.default_rng(seed)
    height, width, channels = shape
    y, x = np.mgrid[0:height, 0:width]
    fy, fx, phase = rng.uniform(0.1, 0.7, (3, n, 1, 1, channels))
    waves = 110 * np.sin(fy * y[None, :, :, None] + fx * x[None, :, :, None] + 10 * phase) + 128
    grain = rng.integers(-noise, noise + 1, (n, height, width, channels))
    return np.asarray(np.clip(waves + grain, 0, 255), np.uint8)


def mosaics(n: int, side: int = 24, *, seed: int = 0) -> UInt8Array:
    """Flat tiles, one to a block of the DCT [N, side, side, 1]: every candidate quality keeps each pixel as it is."""
    tiles = _LEVELS[np.random.default_rng(seed).integers(0, len(_LEVELS), (n, side // _TILE, side // _TILE, 1))]
    return tiles.repeat(_TILE, axis=1).repeat(_TILE, axis=2)


def shades(first: int, count: int) -> UInt8Array:
    """Flat images [N, 8, 8, 1] of the grey levels from 192 + first on: exact at quality 100, all of one size."""
    levels = np.arange(192 + first, 192 + first + count)
    assert levels[-1] < 256, f"there are 64 shades, {first + count} were asked for"
    return levels.astype(np.uint8)[:, None, None, None].repeat(_TILE, axis=1).repeat(_TILE, axis=2)


def shades_of(images: UInt8Array) -> list[int]:
    """Which shades these are."""
    return [int(level) - 192 for level in images[:, 0, 0, 0]]
