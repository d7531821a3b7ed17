"""`engram-service`, also as `python -m engram_service`: see `engram_service.cli`."""

from engram.commands import start


def main() -> None:
    """Entry point of `engram-service`."""
    start("engram-service", "engram_service.cli", extra="service")


if __name__ == "__main__":
    main()
