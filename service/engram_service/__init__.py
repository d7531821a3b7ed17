"""The Engram service: `create_app(settings)` returns the whole application."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("engram")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0"
