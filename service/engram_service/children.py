"""How a Python process is started that finds the modules of this one."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def command(module: str, *arguments: str) -> list[str]:
    """Runs a module; what lies in the folder in which this process was started is none of its modules."""
    return [sys.executable, "-P", "-m", module, *arguments]


def search_path() -> dict[str, str]:
    """The variable of the environment that `command` needs."""
    return {"PYTHONPATH": os.pathsep.join(str(Path(part).absolute()) for part in sys.path if part)}
