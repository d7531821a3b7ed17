"""Answer every error as `application/problem+json` (RFC 9457), never with a stack trace."""

from __future__ import annotations

import json
import logging
import math
import re
from http import HTTPStatus
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engram.errors import BadUpload, EngramError, InvalidRequest, NotFound, RateLimited, Unauthorized, Unavailable
from engram.files import disk_errors
from engram.schemas import API_HEADER, API_NUMBER

from .acting import ACTING, NOBODY, Acting

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

STATUS = "engram.status"
"""Where the scope of a request has the status of its answer once that has begun."""

_API = (API_HEADER.lower().encode(), str(API_NUMBER).encode())

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


_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class LastResort:
    """Around everything: every answer states the API's number and the request's id, and what nobody foresaw is logged
    with its stack and answered without it.

    The id is that of the header `X-Request-ID`, or made here: `engram.request_id` in the scope, and in `acting.ACTING`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._ours = f"{token_hex(6)}-"
        self._count = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. An answer that has begun is cut off, so that nobody takes it for whole."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun = False
        request_id = self._id(scope)
        scope["engram.request_id"] = request_id
        its_id = (b"x-request-id", request_id.encode())

        async def watched(message: Message) -> None:
            nonlocal has_begun
            if not has_begun and message["type"] == "http.response.start":
                has_begun = True
                message["headers"] = [*message["headers"], _API, its_id]
                scope[STATUS] = message["status"]
            await send(message)

        outside = ACTING.set(Acting(NOBODY, request_id))
        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if has_begun:
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])
            defect = EngramError(f"{type(error).__name__} inside the service: a defect; its log has the details")
            await problem_response(defect, scope["path"])(scope, receive, watched)
        finally:
            ACTING.reset(outside)

    def _id(self, scope: Scope) -> str:
        """The id that the client has given the request, or one that no other request of any process has."""
        for name, value in scope["headers"]:
            if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                found: str = value.decode()
                return found
        return f"{self._ours}{next(self._count):x}"


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
