"""Losses of replay and distillation: one value for each image, so that processes and weights can average them.

Letters: N images, C competing classes. Logits are scores before softmax or sigmoid. Nothing here knows a network.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def logit_distance(logits_NC: torch.Tensor, stored_NC: torch.Tensor) -> torch.Tensor:
    """|z' - h(x')|^2 / C of each image: 0 for equal logits.

    Source: Buzzega et al., Dark Experience for General Continual Learning (NeurIPS 2020), section 3. Departure:
    divided by C, as in its code (a mean squared error), for which its weights were found.
    """
    return (logits_NC - stored_NC).square().mean(dim=1)


def distillation(logits_NC: torch.Tensor, old_logits_NC: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """KL(old || new) of the softened outputs of each image: 0 for logits that are equal up to a constant.

    Published as the cross-entropy between the two, which is larger by the entropy of the old outputs: another value,
    the same gradient.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (2015), section 2. Whoever wants gradients that
    do not shrink with the temperature multiplies by its square.
    """
    new_NC = functional.log_softmax(logits_NC / temperature, dim=1)
    old_NC = functional.log_softmax(old_logits_NC / temperature, dim=1)
    return (old_NC.exp() * (old_NC - new_NC)).sum(dim=1)


def binary_cross_entropy(logits_NC: torch.Tensor, targets_NC: torch.Tensor) -> torch.Tensor:
    """The binary cross-entropies between the sigmoids of each image and its targets in 0..1, summed over classes.

    Source: Rebuffi et al., iCaRL (CVPR 2017), the loss of Algorithm 3.
    """
    return functional.binary_cross_entropy_with_logits(logits_NC, targets_NC, reduction="none").sum(dim=1)
