"""Augment batches of training images with random crops (after padding) and random horizontal flips.

Images are float32 `[N, C, H, W]`; the flip reverses W. Every image of a batch draws its own crop and flip, all from the
generator that the caller hands in.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def augment(images_NCHW: torch.Tensor, *, padding: int, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """Shift every image by up to `padding` pixels each way, filled with zeros, and flip every second one.

    Args:
        images_NCHW: the batch; it is not changed.
        padding: largest shift in pixels; 0 shifts nothing.
        flip: whether to flip horizontally with probability 1/2.
        generator: draws shifts and flips, on the CPU.
    """
    count, _, height, width = images_NCHW.shape
    device = images_NCHW.device
    if padding:
        top, left = torch.randint(0, 2 * padding + 1, (2, count), generator=generator).to(device)
        # Windows of the padded batch, [N, C, 2p+1, 2p+1, H, W], are a view; indexing copies the chosen ones.
        windows = functional.pad(images_NCHW, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        images_NCHW = windows[torch.arange(count, device=device), :, top, left]
    if flip:
        is_flipped = (torch.rand(count, generator=generator) < 0.5).to(device)
        images_NCHW = torch.where(is_flipped.view(-1, 1, 1, 1), images_NCHW.flip(3), images_NCHW)
    return images_NCHW
