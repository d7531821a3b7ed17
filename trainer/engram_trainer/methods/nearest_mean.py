"""Classification by the nearest mean of exemplars: no classifier to be biased towards the classes seen last.

mu_c is the mean of the unit features of class c's exemplars, made a unit vector again; an image belongs to the class
whose mean its own unit feature is nearest to. |f - mu|^2 = 2 - 2 <f, mu> for unit vectors, so a score is a cosine.

Letters: N images, C labels of the stream, D dimensions of a feature.

Source: Rebuffi et al., iCaRL (CVPR 2017), Algorithm 1. Departure: its code averages each exemplar with its mirror image
(for CIFAR-100), the text does not, nor do we. A class whose share of the memory holds no exemplar is never the answer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import functional

from engram.batch import Batch
from engram_trainer.memory import Embed
from engram_trainer.stream import Stream

NEVER = -2.0
"""The score of a class without a mean: below every cosine."""


def class_means(stream: Stream, embed: Embed, exemplars: Iterable[Batch]) -> torch.Tensor:
    """The unit mean of each label's exemplars, float32 `[C, D]`; zeros where there are none.

    Args:
        stream: gives class ids their labels.
        embed: features of images.
        exemplars: all of the memory, batch by batch.

    Raises:
        ValueError: there is not one exemplar.
    """
    sums_CD: torch.Tensor | None = None
    for batch in exemplars:
        features_ND = functional.normalize(torch.from_numpy(embed(batch.images)).double(), dim=1)
        if sums_CD is None:
            sums_CD = features_ND.new_zeros(len(stream.class_order), features_ND.shape[1])
        sums_CD.index_add_(0, torch.from_numpy(stream.labels(batch.class_ids)), features_ND)
    if sums_CD is None:
        raise ValueError("the nearest mean of exemplars needs a memory that keeps some; this one is empty")
    return functional.normalize(sums_CD, dim=1).float()


def nearest_mean_scores(features_ND: torch.Tensor, means_CD: torch.Tensor) -> torch.Tensor:
    """The cosine of each feature with each mean, `[N, C]`, whatever the lengths of the features."""
    cosines_NC = functional.normalize(features_ND, dim=1) @ means_CD.T
    return cosines_NC.masked_fill(~means_CD.any(dim=1), NEVER)
