"""Answer every error as `application/problem+json` (RFC 9457), never with a stack trace."""

from __future__ import annotations

import json
import logging
import math
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match

from engram.errors import BadUpload, EngramError, InvalidRequest, NotFound, RateLimited, Unauthorized, Unavailable
from engram.files import disk_errors

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

RETRY_AFTER_S = 1
"""What `Retry-After` says when the error does not know better."""


class Problem(BaseModel):
    """An error (RFC 9457). Further members carry the numbers of `detail`."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None


def problem_response(error: EngramError, instance: str) -> Response:
    """The response for an error of the tree."""
    headers = {}
    if isinstance(error, Unavailable | RateLimited):
        headers["Retry-After"] = str(math.ceil(error.details.get("retry_after_s", RETRY_AFTER_S)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="engram"'
    return _response(error.to_problem(instance), headers)


def install(app: FastAPI) -> None:
    """Every error that a route or the framework raises becomes a problem."""

    @app.exception_handler(EngramError)
    def known(request: Request, error: EngramError) -> Response:
        return problem_response(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        return problem_response(_invalid_request(request, error), request.url.path)

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404:
            return problem_response(NotFound(f"there is nothing at {path}; /docs lists what is where"), path)
        if error.status_code == 400:
            return problem_response(InvalidRequest(str(error.detail)), path)
        title = HTTPStatus(error.status_code).phrase
        detail = f"{request.method} is not possible here" if error.status_code == 405 else str(error.detail)
        problem = {"type": "about:blank", "title": title, "status": error.status_code, "detail": detail}
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(app, request))
        return _response(problem | {"instance": path}, headers)

    # What is read and written is translated where that happens; files are also looked at, renamed and removed.
    @app.exception_handler(OSError)
    def disk(request: Request, error: OSError) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem_response(_of_disk(error), request.url.path)

    # Nobody reads this answer; without it, every cancelled upload would be logged as a defect.
    @app.exception_handler(ClientDisconnect)
    def gone(request: Request, error: ClientDisconnect) -> Response:
        return problem_response(BadUpload("the connection ended before the body did"), request.url.path)


def _methods(app: FastAPI, request: Request) -> list[str]:
    """What is possible at the path; the framework names the first route's methods only."""
    possible = [
        method
        for method in ("DELETE", "GET", "PATCH", "POST", "PUT")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in app.routes)
    ]
    return sorted([*possible, "HEAD"]) if "GET" in possible else possible


def _of_disk(error: OSError) -> EngramError:
    """An error of the system that nobody translated, as one of the tree."""
    try:
        with disk_errors(Path(error.filename or "."), 0):
            raise error
    except EngramError as translated:
        return translated


def _invalid_request(request: Request, error: RequestValidationError) -> InvalidRequest:
    """One sentence per offending parameter, in the words of the validator."""
    faults = [{"where": ".".join(str(part) for part in fault["loc"]), "what": fault["msg"]} for fault in error.errors()]
    message = "; ".join(f"{fault['where']}: {fault['what']}" for fault in faults)
    if faults[0]["where"] == "body" and "json" not in request.headers.get("content-type", ""):
        # What `curl -d` sends is declared as a form, and then the validator's words help nobody.
        message += "; send it with the header Content-Type: application/json"
    return InvalidRequest(message, faults=faults)


def _response(problem: dict[str, Any], headers: dict[str, str]) -> Response:
    # Strings of a request come back in messages; half of a surrogate pair among them cannot be encoded as UTF-8.
    body = json.dumps(problem, ensure_ascii=True, default=str).encode()
    return Response(body, status_code=problem["status"], headers=headers, media_type=MEDIA_TYPE)
