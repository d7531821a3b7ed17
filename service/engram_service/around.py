"""What is around every request: its id, the count and the time of it, an answer to what nobody foresaw.

One layer does all of this because a draw takes some hundred microseconds, of which each layer costs several.
"""

from __future__ import annotations

import logging
import re
import time
from itertools import count
from secrets import token_hex

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engram.errors import EngramError
from engram.schemas import API_HEADER, API_NUMBER

from .acting import ACTING, NOBODY, Acting
from .console.page import CONSOLE, framed
from .logs import ACCESS
from .metrics import Requests
from .problems import problem_response
from .settings import Settings

logger = logging.getLogger(__name__)

API = (API_HEADER.lower().encode(), str(API_NUMBER).encode())
"""The header that every answer has."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Around:
    """Around everything: every answer states the API's number and the request's id, and what nobody foresaw is logged
    with its stack and answered without it. Requests are counted and timed, and logged if the settings say so.

    The id is that of the header `X-Request-ID`, or made here: `engram.request_id` in the scope. `acting.ACTING` is in
    the end what it was before, whatever the gate has made of it.
    """

    def __init__(self, app: ASGIApp, requests: Requests, settings: Settings) -> None:
        self.app = app
        self._requests = requests
        self._is_logged = settings.access_log
        self._ours = f"{token_hex(6)}-"
        self._count = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, from its head to the last piece of its answer. One that has begun is cut off, so that nobody
        takes it for whole."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        requests, began, status = self._requests, time.perf_counter(), 0
        requests.in_flight += 1
        if scope["path"].startswith(CONSOLE):
            send = framed(scope, receive, send)
        scope["engram.request_id"] = request_id = self._id(scope)

        async def watched(message: Message) -> None:
            nonlocal status
            if status == 0 and message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], API, (b"x-request-id", request_id.encode())]
            await send(message)

        outside = ACTING.get()
        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if status:
                raise
            if ACTING.get() is outside:
                ACTING.set(Acting(NOBODY, request_id))
            logger.exception("%s %s failed", scope["method"], scope["path"])
            defect = EngramError(f"{type(error).__name__} inside the service: a defect; its log has the details")
            await problem_response(defect, scope["path"])(scope, receive, watched)
        finally:
            ACTING.set(outside)
            requests.in_flight -= 1
            seconds = time.perf_counter() - began
            requests.count(scope, status, seconds)
            if self._is_logged:
                _log(scope, status, seconds)

    def _id(self, scope: Scope) -> str:
        """The id that the client has given the request, or one that no other request of any process has."""
        for name, value in scope["headers"]:
            if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                found: str = value.decode()
                return found
        return f"{self._ours}{next(self._count):x}"


def _log(scope: Scope, status: int, seconds: float) -> None:
    """One line for one request. Its query is left out: it is long, and clients have put secrets there."""
    client = scope.get("client") or ("-", 0)
    who = scope.get("engram.principal")
    extra = {
        "client": client[0],
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "ms": round(1000 * seconds, 3),
        "request_id": scope["engram.request_id"],
        "who": "" if who is None else who.who,
    }
    ACCESS.info("%(client)s %(method)s %(path)s %(status)s %(ms)s ms", extra, extra=extra)
