"""What all trainer tests share: one thread, so that sums are made in one order."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
