"""Starts the three commands, and names the extra to install where one lacks its packages.

Every command is a console script of the one distribution, so all three are there whatever was installed with it.
"""

from __future__ import annotations

import sys
from importlib import import_module


def start(command: str, module: str, *, extra: str) -> None:
    """Run the typer application `app` of a module as this command; it ends the process.

    Args:
        command: its name, for its help and its completion.
        module: is imported only now: it needs the packages of the extra.
        extra: of the distribution.
    """
    try:
        app = import_module(module).app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("engram"):
            raise
        sys.exit(f"{command} needs {error.name}, which is not installed here: pip install 'engram[{extra}]'")
    app(prog_name=command)
