"""Draw the pictures of the concepts page from a memory of Fashion-MNIST: `make pictures`.

`strip.jpg` is a strip as it is stored, with the tables that every viewer reads. `decision.png` is what one decision
recorded about every candidate quality. Pictures of the console are made by `make screenshots`.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from engram import LocalBuffer, strip
from engram.schemas import Decision
from engram_trainer import datasets

IMAGES = Path(__file__).parent / "images"
BUDGET_BYTES = 100_000
SHOWN = 10


def main() -> None:
    """Both pictures are as the code makes them now."""
    fashion = datasets.load("sample").train
    images, class_ids = fashion.read(), fashion.class_ids
    with TemporaryDirectory() as folder:
        memory = LocalBuffer(Path(folder) / "memory", budget_bytes=BUDGET_BYTES)
        first = np.flatnonzero(class_ids < 2)
        memory.add(0, images[first], class_ids[first])
        decision = memory.decisions[0]
    rows = [int(np.flatnonzero(class_ids == class_id)[0]) for class_id in range(SHOWN)]
    stored = strip.encode(images[rows], class_ids[rows], quality=decision.quality)
    (IMAGES / "strip.jpg").write_bytes(stored.loose().picture())
    plot(decision, IMAGES / "decision.png")


def plot(decision: Decision, path: Path) -> None:
    """R and the number of exemplars over the candidate qualities, with the band that R has to lie in."""
    figure = Figure(figsize=(7.2, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    qualities = [each.quality for each in decision.candidates]
    ratios = [each.ratio[decision.definition] for each in decision.candidates]
    left.axhspan(1 - decision.epsilon, 1 + decision.epsilon, alpha=0.2, label=f"within {decision.epsilon:g} of 1")
    left.plot(qualities, ratios, marker="o", label="R")
    left.set_ylabel("R, volume over that of the originals")
    left.set_ylim(bottom=0)
    right.plot(qualities, [each.exemplars for each in decision.candidates], marker="o", label="N")
    right.set_ylabel("exemplars that fit")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        _finish(axes, qualities, decision.quality)
    figure.savefig(path, metadata={"Software": None})


def _finish(axes: Any, qualities: list[int], chosen: int) -> None:
    axes.axvline(chosen, color="black", linestyle=":", label=f"chosen: {chosen}")
    axes.set_xticks(qualities)
    axes.set_xlabel("JPEG quality")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
