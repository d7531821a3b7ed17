"""`engram-train`, also as `python -m engram_trainer`: see `engram_trainer.cli`."""

from engram.commands import start


def main() -> None:
    """Entry point of `engram-train`."""
    start("engram-train", "engram_trainer.cli", extra="trainer")


if __name__ == "__main__":
    main()
