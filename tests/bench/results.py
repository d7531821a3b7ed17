"""Results of runs that nobody made."""

from __future__ import annotations

import json
from pathlib import Path

import kept


def put(job: kept.Job, result: kept.Result, folder: Path) -> None:
    """The job is done."""
    path = job.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
