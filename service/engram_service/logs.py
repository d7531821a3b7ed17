"""Write logs: one line per message, as text for people or as JSON for programs (`ENGRAM_LOG_FORMAT`).

    {"time": "2026-01-31T12:00:00.000Z", "level": "INFO", "logger": "engram_service.work", "message": "...",
     "process": 17, "worker": "host:ab12", "request_id": "...", "who": "...", "ingest": "...", "exception": "..."}

`request_id` and `who` are of the request on whose behalf something is done, `ingest` of the upload that a worker is at;
each is there where it is known. A line of an access log has the members `client`, `method`, `path`, `status`, `ms`.

What others chose, a path or a file's name, may hold line breaks and escape sequences: control characters are written as
escapes in both forms, so that nobody forges a line. What looks like a token is blotted out, wherever it comes from.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from .acting import ACTING

LogFormat = Literal["text", "json"]

ACCESS = logging.getLogger("engram_service.access")
"""A line per request, where the settings ask for it."""

INGEST: ContextVar[str] = ContextVar("ingest", default="")
"""The upload that this thread works on."""

BLOT = "engram_[hidden]"

# Of 256 bits: longer than any name of ours.
_TOKEN = re.compile(r"engram_[A-Za-z0-9_-]{40,}")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[^\s\"',]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_KNOWN = vars(logging.makeLogRecord({})).keys() | {"message", "asctime", "taskName", "color_message"}


@contextmanager
def about(ingest_id: str) -> Iterator[None]:
    """What is logged inside the block is about this upload."""
    token = INGEST.set(ingest_id)
    try:
        yield
    finally:
        INGEST.reset(token)


def set_up(level: str, form: LogFormat, *, worker: str = "", secret: str = "") -> None:
    """Messages of this level and above go to standard error, one line each.

    Args:
        level: debug, info, warning or error.
        form: text or json.
        worker: the name of the worker that this process is, if it is one.
        secret: never to be written, beside what looks like a token.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(worker, secret) if form == "json" else TextLines(worker, secret))
    # Nothing happens where whoever runs this code has set up logging in another way.
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # Alembic tells every step at INFO, and what matters is said by whoever asked for a migration.
    logging.getLogger("alembic").setLevel(logging.WARNING)


def blotted(text: str) -> str:
    """The text without the tokens that are in it."""
    return _TOKEN.sub(BLOT, text)


class _Lines(logging.Formatter):
    """What both forms do: say what is going on, and hide what looks like a token."""

    def __init__(self, worker: str, secret: str) -> None:
        super().__init__()
        self._worker, self._secret = worker, secret

    def context(self, record: logging.LogRecord) -> dict[str, Any]:
        """On whose behalf it is, and about what, as far as that is known."""
        acting = ACTING.get()
        found: dict[str, Any] = {
            "request_id": acting.request_id,
            "who": acting.principal.who if acting.request_id else "",
            "ingest": INGEST.get(),
        }
        found |= {name: value for name, value in vars(record).items() if name not in _KNOWN}
        return {name: value for name, value in found.items() if value != ""}

    def hidden(self, text: str) -> str:
        """The text without anything that looks like a token."""
        if self._secret:
            text = text.replace(self._secret, BLOT)
        return _BEARER.sub(rf"\1{BLOT}", blotted(text))

    def stack(self, record: logging.LogRecord) -> str:
        """The exception and where it was raised; nothing without one."""
        return "" if record.exc_info is None else self.formatException(record.exc_info)

    def time(self, record: logging.LogRecord) -> str:
        """When it was, UTC, to the millisecond."""
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


class JsonLines(_Lines):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        found: dict[str, Any] = {
            "time": self.time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        if self._worker:
            found["worker"] = self._worker
        found |= self.context(record)
        if stack := self.stack(record):
            found["exception"] = stack
        shown = {
            name: value if isinstance(value, int | float) or value is None else self.hidden(str(value))
            for name, value in found.items()
        }
        return json.dumps(shown, ensure_ascii=True)


class TextLines(_Lines):
    """Time, level, logger, message; the stack of an exception on the lines below, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line, or several if it has an exception."""
        where = f"worker {record.process}" if self._worker else record.name
        known = self.context(record)
        shown = " ".join(f"{name}={known[name]}" for name in ("request_id", "who", "ingest") if name in known)
        line = f"{self.time(record)} {record.levelname} {where}: {record.getMessage()}{f' [{shown}]' if shown else ''}"
        line = _CONTROL.sub(_escaped, self.hidden(line))
        stack = self.hidden(self.stack(record))
        return "\n    ".join([line, *(_CONTROL.sub(_escaped, part) for part in stack.splitlines())])


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
