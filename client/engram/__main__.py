"""`engram`, also as `python -m engram`: see `engram.cli`."""

from engram.commands import start


def main() -> None:
    """Entry point of `engram`."""
    start("engram", "engram.cli", extra="cli")


if __name__ == "__main__":
    main()
