"""What every method is told, spelt out, so that results keep their meaning whatever becomes the trainer's default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arms import FILES_50, JOINTLY, LOSSLESS, NONE, RAW, STRIPS_50, Arm

from engram.schemas import CANDIDATE_QUALITIES

TUNED_ARMS = (RAW, LOSSLESS, FILES_50, STRIPS_50)
"""What stands for every arm of its kind when learning rates are tuned."""

LUCIR: dict[str, Any] = {
    "epochs": 8,
    "batch_size": 128,
    "milestones": (0.5, 0.75),
    "decay": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 5e-4,
    "flip": True,
    "padding": 2,
    "resized_crop": False,
    "eta": 1.0,
    "less_forget_weight": 2.0,
    "margin": 0.5,
    "margin_classes": 2,
    "margin_weight": 1.0,
    "replay_ratio": 0.4,
    "codec_ratio": 0.5,
    "codec_qualities": CANDIDATE_QUALITIES,
    "balance_epochs": 10,
    "balance_lr": 0.001,
    "balance_milestones": (0.5,),
    "classify": "cosine",
}
ER: dict[str, Any] = {
    "epochs": 8,
    "batch_size": 32,
    "replay_batch": 32,
    "milestones": (),
    "decay": 0.1,
    "momentum": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
    "flip": True,
    "padding": 2,
    "resized_crop": False,
    "codec_ratio": 0.5,
    "codec_qualities": CANDIDATE_QUALITIES,
    "fill": "task",
    "slots": None,
    "flush": 64,
    "compete": "all",
}
JOINT: dict[str, Any] = {
    "epochs": 10,
    "batch_size": 128,
    "milestones": (2 / 3,),
    "decay": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 5e-4,
    "flip": True,
    "padding": 2,
    "resized_crop": False,
}
SELECTION: dict[str, Any] = {"definition": "raw", "rule": "any", "epsilon": 0.3}
UNSEEN_QUALITY = 50
"""At which test images are coded for arms whose memory has no quality."""
STREAM: dict[str, Any] = {"tasks": 5, "train_per_class": 1_500}
TUNING_STREAM: dict[str, Any] = {"tasks": 5, "train_per_class": 500, "validation_ratio": 0.1}


Items = tuple[tuple[str, Any], ...]
"""A mapping whose `repr` says all."""


@dataclass(frozen=True)
class Learning:
    """A method with all settings but the learning rate."""

    name: str
    method: str
    settings: Items
    tuned_arms: tuple[Arm, ...] = TUNED_ARMS


def items(settings: Mapping[str, Any]) -> Items:
    """Sorted, so that the order in which they are written means nothing."""
    return tuple(sorted(settings.items()))


LEARNINGS = {
    each.name: each
    for each in (
        Learning("lucir", "lucir", items(LUCIR)),
        Learning("lucir-uncoded", "lucir", items({**LUCIR, "codec_ratio": 0.0})),
        Learning("lucir-own-codec", "lucir", items({**LUCIR, "codec_qualities": (50,)}), (Arm("strips", 50),)),
        Learning("lucir-without", "lucir", items(LUCIR), (NONE,)),
        Learning("er", "er", items(ER)),
        Learning("joint", "joint", items(JOINT), (JOINTLY,)),
    )
}
