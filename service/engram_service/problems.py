"""This file is how errors leave the service: each as `application/problem+json` (RFC 9457), never a stack trace."""

from __future__ import annotations

import json
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from engram.errors import BadUpload, EngramError, InvalidRequest, NotFound, RateLimited, Unauthorized, Unavailable

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
    """Every error that a route, the framework or a bug raises becomes a problem."""

    @app.exception_handler(EngramError)
    def known(request: Request, error: EngramError) -> Response:
        return problem_response(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        return problem_response(_invalid_request(error), request.url.path)

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404:
            return problem_response(NotFound(f"there is nothing at {path}; /docs lists what is where"), path)
        title = HTTPStatus(error.status_code).phrase
        detail = f"{request.method} is not possible here" if error.status_code == 405 else str(error.detail)
        problem = {"type": "about:blank", "title": title, "status": error.status_code, "detail": detail}
        return _response(problem | {"instance": path}, dict(error.headers or {}))

    # Nobody reads this answer; without it, every cancelled upload would be logged as a defect.
    @app.exception_handler(ClientDisconnect)
    def gone(request: Request, error: ClientDisconnect) -> Response:
        return problem_response(BadUpload("the connection ended before the body did"), request.url.path)

    # The server logs the exception with its stack: the framework raises it again after this response.
    @app.exception_handler(Exception)
    def bug(request: Request, error: Exception) -> Response:
        return problem_response(
            EngramError(f"{type(error).__name__} inside the service: this is a defect; its log has the details"),
            request.url.path,
        )


def _invalid_request(error: RequestValidationError) -> InvalidRequest:
    """One sentence per offending parameter, in the words of the validator."""
    faults = [{"where": ".".join(str(part) for part in fault["loc"]), "what": fault["msg"]} for fault in error.errors()]
    return InvalidRequest("; ".join(f"{fault['where']}: {fault['what']}" for fault in faults), faults=faults)


def _response(problem: dict[str, Any], headers: dict[str, str]) -> Response:
    # Strings of a request come back in messages; half of a surrogate pair among them cannot be encoded as UTF-8.
    body = json.dumps(problem, ensure_ascii=True, default=str).encode()
    return Response(body, status_code=problem["status"], headers=headers, media_type=MEDIA_TYPE)
