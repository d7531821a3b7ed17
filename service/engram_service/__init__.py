"""The Engram service: `create_app(settings)` returns the whole application."""

from engram import __version__ as __version__
