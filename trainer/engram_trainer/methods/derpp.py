"""DER++: dark experience replay (see `der`) that looks at the labels of exemplars, too."""

from __future__ import annotations

from dataclasses import dataclass

from engram_trainer.methods import der
from engram_trainer.methods.der import Der as DerPlusPlus

__all__ = ["Config", "DerPlusPlus"]


@dataclass(frozen=True)
class Config(der.Config):
    """As of `der`; in brackets the published settings where they differ, for 200 / 500 / 5,120 exemplars."""

    lr: float = 0.1
    """[0.03]"""
    alpha: float = 0.5
    """Weight of the distance to the stored logits [0.1 / 0.2 / 0.1]."""
    beta: float = 0.5
    """Weight of the exemplars' cross-entropy [0.5 / 0.5 / 1.0]."""
