"""The errors of Engram, one tree for both sides of the wire.

The service raises one of these, one handler turns it into `application/problem+json` (RFC 9457) with the class's
status, and the client raises the class that the problem's `type` names. So `except BudgetExceeded` reads the same in
a route, in a worker and in a trainer.

    EngramError                500   something in Engram itself is wrong
    +-- NotFound               404   no such buffer, task, pack, ingest, extractor
    +-- Conflict               409   the generation moved, the key was used for another body, the task has another form
    |   +-- BudgetExceeded     409   not even one exemplar fits the budget
    |   +-- Cancelled          409   the ingest was cancelled
    +-- InvalidRequest         422   a parameter is malformed or out of range
    +-- BadUpload              422   the bytes are not what they claim to be
    |   +-- StripCorrupt       422   a checksum, a marker or a declared size does not match
    +-- BadExtractor           422   the ONNX model cannot serve as an extractor
    +-- TooLarge               413   beyond a limit of this service
    +-- Unauthorized           401
    +-- Forbidden              403
    +-- RateLimited            429
    +-- Unavailable            503   worth retrying after `retry_after_s`
    +-- StorageFull            507   the disk is full; nothing was half-written

`details` carries the numbers of the message as JSON members (`budget_bytes`, `needed_bytes`, ...).
"""

from __future__ import annotations

from typing import Any, ClassVar

PROBLEM_BASE = "https://engram.dev/problems/"


class EngramError(Exception):
    """Something in Engram itself is wrong."""

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"

    def __init__(self, message: str, /, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def to_problem(self, instance: str | None = None) -> dict[str, Any]:
        """The problem+json document (RFC 9457) of this error."""
        problem: dict[str, Any] = {
            **self.details,
            "type": PROBLEM_BASE + self.slug,
            "title": self.title,
            "status": self.status,
            "detail": self.message,
        }
        if instance is not None:
            problem["instance"] = instance
        return problem


class NotFound(EngramError):
    """No such buffer, task, pack, ingest or extractor."""

    status, slug, title = 404, "not-found", "Not found"


class Conflict(EngramError):
    """The request contradicts what is already stored."""

    status, slug, title = 409, "conflict", "Conflict"


class BudgetExceeded(Conflict):
    """Not even one exemplar fits the budget."""

    slug, title = "budget-exceeded", "Budget exceeded"


class Cancelled(Conflict):
    """The ingest was cancelled before it committed."""

    slug, title = "cancelled", "Cancelled"


class InvalidRequest(EngramError):
    """A parameter is malformed or out of range."""

    status, slug, title = 422, "invalid-request", "Invalid request"


class BadUpload(EngramError):
    """The uploaded bytes are not what they claim to be."""

    status, slug, title = 422, "bad-upload", "Bad upload"


class StripCorrupt(BadUpload):
    """A checksum, a marker or a declared size does not match."""

    slug, title = "strip-corrupt", "Corrupt strip"


class BadExtractor(EngramError):
    """The ONNX model cannot serve as an extractor."""

    status, slug, title = 422, "bad-extractor", "Bad extractor"


class TooLarge(EngramError):
    """Beyond a limit of this service."""

    status, slug, title = 413, "too-large", "Too large"


class Unauthorized(EngramError):
    """A bearer token is missing or wrong."""

    status, slug, title = 401, "unauthorized", "Unauthorized"


class Forbidden(EngramError):
    """The token does not allow this."""

    status, slug, title = 403, "forbidden", "Forbidden"


class RateLimited(EngramError):
    """Too many requests; `details["retry_after_s"]` says when to come back."""

    status, slug, title = 429, "rate-limited", "Too many requests"


class Unavailable(EngramError):
    """The service cannot answer now; the same request may succeed later."""

    status, slug, title = 503, "unavailable", "Unavailable"


class StorageFull(EngramError):
    """The disk is full; nothing was half-written."""

    status, slug, title = 507, "storage-full", "Storage full"


def _walk(root: type[EngramError]) -> dict[str, type[EngramError]]:
    found = {root.slug: root}
    for child in root.__subclasses__():
        found |= _walk(child)
    return found


ERRORS: dict[str, type[EngramError]] = _walk(EngramError)
"""Every class by the last part of its problem `type`."""

_BY_STATUS: dict[int, type[EngramError]] = {kind.status: kind for kind in EngramError.__subclasses__()} | {
    422: InvalidRequest,
    502: Unavailable,
    504: Unavailable,
}
"""What a status says where no problem of ours does: gateways answer 502 and 504 when the service is down or slow."""

_RESERVED = frozenset({"type", "title", "status", "detail", "instance"})


def of_status(status: int) -> type[EngramError]:
    """The class that an answer's status alone stands for."""
    return _BY_STATUS.get(status, EngramError)


def from_problem(problem: dict[str, Any], status: int = 500) -> EngramError:
    """The error that a problem+json document describes.

    A type that this version does not know, because the service is newer, becomes the class of its status.

    Args:
        problem: the document.
        status: of the answer that it came with, if the document states none.
    """
    slug = str(problem.get("type", "")).removeprefix(PROBLEM_BASE)
    stated = problem.get("status")
    kind = ERRORS.get(slug) or of_status(stated if isinstance(stated, int) else status)
    details = {key: value for key, value in problem.items() if key not in _RESERVED}
    message = str(problem.get("detail") or problem.get("title") or "the service reported an error without a message")
    return kind(message, **details)
