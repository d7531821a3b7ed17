"""The networks that turn images into features, and the classifier heads that turn features into scores.

`build(name, shape, seed=...)` knows

    mlp               two hidden layers of 100 units: GEM's for MNIST (89,610 parameters with a head of 10 classes)
    mlp-256           two hidden layers of 256 units: A-GEM's for MNIST (269,322 with 10 classes)
    conv              four small convolutions, made for 28x28 and 32x32 images on a CPU
    resnet18-narrow   resnet18-cifar of 16 to 128 channels: 1.5 times as fast on a CPU as `resnet18-reduced` (measured)
    resnet18-reduced  resnet18-cifar of 20 to 160 channels: GEM's and A-GEM's for CIFAR (1,109,240 with 100 classes)
    resnet18-cifar    ResNet-18, 3x3 stem, for images up to 64 pixels: Mammoth's for CIFAR (11,173,962 with 10 classes)
    resnet18          ResNet-18, 7x7 stem and pooling, for photographs: LUCIR's for ImageNet
    resnet32          the CIFAR ResNet of 3 stages of 5 blocks: LUCIR's and iCaRL's for CIFAR-100

A network is called with float32 `[N, C, H, W]` in 0..1 and returns `[N, D]`; `dimensions` is D. `signed=True` leaves
out the last ReLU, so that features can be negative and a cosine uses the whole sphere, as LUCIR needs it.

Letters: N images, C channels or classes, D dimensions of a feature.

Source: He et al., Deep Residual Learning (CVPR 2016), sections 3.3 and 4.2. Departure: shortcuts that change shape are
1x1 convolutions in resnet32 too, as in LUCIR's code. Hou et al., LUCIR (CVPR 2019), sections 3.2 and 4.1. Widths: the
codes of GEM (`nf=20`), A-GEM and Mammoth (`nf=64`).

Initial weights: convolutions of the ResNets are normal, of He's variance by fan-out, as in LUCIR's code; all else is
PyTorch's default (uniform within 1/sqrt(fan-in)). GEM and Mammoth leave convolutions at PyTorch's default, too, and GEM
draws the layers of its MLP by Xavier's rule, with biases of 0; those are departures here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional

Shape = tuple[int, int, int]


class FeatureNetwork(nn.Module):
    """Images `[N, C, H, W]` to features `[N, D]`."""

    dimensions: int

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Features `[N, D]` of images in 0..1."""
        raise NotImplementedError

    def __call__(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Typed access to `forward`, which `nn.Module` leaves as Any."""
        features_ND: torch.Tensor = super().__call__(images_NCHW)
        return features_ND


class Mlp(FeatureNetwork):
    """Two fully connected hidden layers of equal width."""

    def __init__(self, shape: Shape, *, width: int = 100, signed: bool = False) -> None:
        super().__init__()
        height, width_pixels, channels = shape
        self.dimensions = width
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(height * width_pixels * channels, width),
            nn.ReLU(),
            nn.Linear(width, width),
            *([] if signed else [nn.ReLU()]),
        )

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Features `[N, D]`."""
        features_ND: torch.Tensor = self.layers(images_NCHW)
        return features_ND


class SmallConvNet(FeatureNetwork):
    """Four 3x3 convolutions, three of them pooled, then the mean over places and a linear map.

    Pooling comes before normalisation: a quarter of the elements to normalise, and a fifth faster for the whole network
    than the usual order (measured on one core at 28x28).
    """

    def __init__(self, shape: Shape, *, width: int = 16, dimensions: int = 128, signed: bool = False) -> None:
        super().__init__()
        self.dimensions = dimensions
        widths = (shape[2], width, 2 * width, 4 * width)
        pooled = [
            layer
            for before, after in itertools.pairwise(widths)
            for layer in (
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.MaxPool2d(2, ceil_mode=True),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            )
        ]
        self.layers = nn.Sequential(
            *pooled,
            nn.Conv2d(4 * width, 8 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(8 * width),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, dimensions),
            *([] if signed else [nn.ReLU()]),
        )

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Features `[N, D]`."""
        features_ND: torch.Tensor = self.layers(images_NCHW)
        return features_ND


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, before: int, after: int, *, stride: int, signed: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))
        self.signed = signed

    def forward(self, maps_NCHW: torch.Tensor) -> torch.Tensor:
        """Maps of the same or half the height and width."""
        summed: torch.Tensor = self.branch(maps_NCHW) + self.shortcut(maps_NCHW)
        return summed if self.signed else functional.relu(summed, inplace=True)


class ResNet(FeatureNetwork):
    """A stem, stages of basic blocks that halve the map, and the mean over places."""

    def __init__(
        self, stem: nn.Sequential, *, stem_width: int, widths: tuple[int, ...], blocks: int, signed: bool
    ) -> None:
        super().__init__()
        self.dimensions = widths[-1]
        self.stem = stem
        stages: list[nn.Module] = []
        before = stem_width
        for stage, after in enumerate(widths):
            for block in range(blocks):
                is_last = stage == len(widths) - 1 and block == blocks - 1
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(before, after, stride=stride, signed=signed and is_last))
                before = after
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Features `[N, D]`."""
        maps_NDHW = self.stages(self.stem(images_NCHW))
        features_ND: torch.Tensor = maps_NDHW.mean(dim=(2, 3))
        return features_ND


def resnet32(shape: Shape, *, signed: bool = False) -> ResNet:
    """The CIFAR ResNet of 6 * 5 + 2 layers, 64 dimensions."""
    return ResNet(_small_stem(shape[2], 16), stem_width=16, widths=(16, 32, 64), blocks=5, signed=signed)


def resnet18(shape: Shape, *, signed: bool = False) -> ResNet:
    """ResNet-18 with the stem for photographs, 512 dimensions."""
    stem = nn.Sequential(
        nn.Conv2d(shape[2], 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    return ResNet(stem, stem_width=64, widths=(64, 128, 256, 512), blocks=2, signed=signed)


def resnet18_cifar(shape: Shape, *, width: int = 64, signed: bool = False) -> ResNet:
    """ResNet-18 with a stem that keeps the resolution of small images, 8 * `width` dimensions."""
    widths = (width, 2 * width, 4 * width, 8 * width)
    return ResNet(_small_stem(shape[2], width), stem_width=width, widths=widths, blocks=2, signed=signed)


def _small_stem(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


NETWORKS: dict[str, Callable[..., FeatureNetwork]] = {
    "mlp": Mlp,
    "mlp-256": partial(Mlp, width=256),
    "conv": SmallConvNet,
    "resnet18-narrow": partial(resnet18_cifar, width=16),
    "resnet18-reduced": partial(resnet18_cifar, width=20),
    "resnet18-cifar": resnet18_cifar,
    "resnet18": resnet18,
    "resnet32": resnet32,
}


def build(name: str, shape: Shape, *, seed: int, signed: bool = False) -> FeatureNetwork:
    """A freshly initialised network for images of a shape.

    Args:
        name: a key of `NETWORKS`.
        shape: height, width and channels of the images.
        seed: draws the weights; PyTorch's global generator is left as it was.
        signed: leave out the last ReLU.

    Raises:
        ValueError: there is no such network.
    """
    if name not in NETWORKS:
        raise ValueError(f"network {name!r} is not one of {', '.join(NETWORKS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name](shape, signed=signed)
    # Channels last is 1.5 times faster for these convolutions on a CPU (measured), and what tensor cores want.
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def linear_head(dimensions: int, classes: int, *, seed: int) -> nn.Linear:
    """A linear classifier with bias; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(dimensions, classes)


def cosines(features_ND: torch.Tensor, embeddings_CD: torch.Tensor) -> torch.Tensor:
    """The cosine of every feature with every class embedding, `[N, C]`."""
    # Near 1 bfloat16 has steps of 1/256: cosines would be equal, and the first of equal ones wins.
    with torch.autocast(features_ND.device.type, enabled=False):
        return functional.linear(
            functional.normalize(features_ND.to(embeddings_CD.dtype), dim=1), functional.normalize(embeddings_CD, dim=1)
        )


class CosineClassifier(nn.Module):
    """Scores eta * cosine, no bias; eta is learned.

    A cosine alone lies in -1..1, where softmax over C classes cannot come near a one-hot target; eta opens the range.

    Source: Hou et al., LUCIR (CVPR 2019), equation 4.
    """

    def __init__(self, embeddings_CD: torch.Tensor, *, eta: float = 1.0) -> None:
        super().__init__()
        self.embeddings_CD = nn.Parameter(embeddings_CD)
        self.eta = nn.Parameter(torch.tensor(float(eta)))

    def forward(self, features_ND: torch.Tensor) -> torch.Tensor:
        """Scores `[N, C]`."""
        return self.eta * cosines(features_ND, self.embeddings_CD)
