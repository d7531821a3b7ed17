"""Parse the switches of the bench scripts and print their results, as Markdown tables or as one JSON object.

Tables are Markdown, so that a full run can be pasted into `bench/RESULTS.md` as it is. With `--json` nothing but one
flat object with stable keys is printed; the machine and the versions are among its members.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Cell = str | int | float | bool | None

_VERSIONS = ("numpy", "pillow", "simplejpeg", "torch", "fastapi", "onnxruntime")

_silent = False
"""Set by `parse_args`: with `--json` the tables are left out."""


def parse_args(description: str, add: Callable[[argparse.ArgumentParser], None] | None = None) -> argparse.Namespace:
    """The command line with at least `quick` and `json`; prints the machine unless `--json` was given.

    Args:
        description: the question that the script answers.
        add: adds the script's own arguments.
    """
    global _silent
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller run, under 45 seconds")
    parser.add_argument("--json", action="store_true", help="print one flat JSON object instead of tables")
    if add is not None:
        add(parser)
    args = parser.parse_args()
    _silent = args.json
    if not _silent:
        print(f"`{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`: {description}\n\n{machine()}; {versions()}\n")
    return args


def machine() -> str:
    """The processor, the cores that this process may use and their load at this moment."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{_processor()}, {cores} cores{load}, {platform.system()} {platform.release()}"


def versions() -> str:
    """Python and the installed libraries that the numbers depend on."""
    found = [f"Python {platform.python_version()}"]
    for name in _VERSIONS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print a Markdown table (nothing with `--json`); numbers are rounded to what is worth reading."""
    if _silent:
        return
    lines = [list(columns), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    print(f"### {title}\n")
    for index, line in enumerate(lines):
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if index == 0:
            print("|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    print(flush=True)


def finish(args: argparse.Namespace, flat: Mapping[str, Cell]) -> None:
    """Print the script's headline numbers: one JSON object with `--json`, a table otherwise."""
    if args.json:
        print(json.dumps({**flat, "machine": machine(), "versions": versions()}))
    else:
        print_table("Headline", ("key", "value"), list(flat.items()))


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}" if abs(cell) < 100 else f"{cell:.1f}"
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return str(cell)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
