"""A-GEM: GEM (see `gem`) with one constraint, on the mean loss of a random batch of all exemplars."""

from __future__ import annotations

from dataclasses import dataclass

from engram_trainer.methods import gem
from engram_trainer.methods.gem import Gem as Agem

__all__ = ["Agem", "Config"]


@dataclass(frozen=True)
class Config(gem.Config):
    """As of `gem`."""

    average: bool = True
