"""Bound the bodies of requests and of answers, whatever route they belong to.

The framework reads a JSON body whole before it calls a route. This middleware reads it first, up to the limit, and
hands it on; a longer one is refused without being kept. Routes that take uploads read their bodies themselves, in
pieces, each with a limit of its own. A large answer is sent in slices, if there is room for it (`answers`).
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engram.errors import TooLarge, Unavailable

from .answers import LARGE_BYTES, Answers
from .problems import problem_response
from .settings import Settings

SLICE_BYTES = 2**18
"""The server waits after each until the kernel has taken most of it, so no more than this lies in a connection."""

_UPLOADS = re.compile(r"/v1/(?:buffers/[^/]+/tasks/[^/]+/ingests|extractors/[^/]+)")


class Bodies:
    """Passes requests with bodies of at most `max_json_bytes` on to `app`, uploads as they are."""

    def __init__(self, app: ASGIApp, settings: Settings, answers: Answers) -> None:
        self.app = app
        self.max_bytes = settings.max_json_bytes
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; bodies of GET and HEAD are not read by anybody."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD") and not _UPLOADS.fullmatch(scope["path"]):
            whole = await self._read(scope, receive, send)
            if whole is None:
                return
            receive = _replayed(whole, receive)
        try:
            await self.app(scope, receive, _Sent(self.answers, scope, receive, send))
        finally:
            self.answers.give_back(scope)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> Message | None:
        """The whole body; None if it was refused, or the client is gone."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                error = TooLarge(
                    f"the body has more than {self.max_bytes} bytes, the most that ENGRAM_MAX_JSON_BYTES allows",
                    max_json_bytes=self.max_bytes,
                )
                await problem_response(error, scope["path"])(scope, receive, send)
                return None
            if not message.get("more_body", False):
                return {"type": "http.request", "body": bytes(body), "more_body": False}


def _replayed(whole: Message, receive: Receive) -> Receive:
    left = [whole]

    async def replayed() -> Message:
        return left.pop() if left else await receive()

    return replayed


class _Sent:
    """Passes an answer's messages on: `send` of one request."""

    __slots__ = ("_answers", "_is_refused", "_receive", "_scope", "_send", "_start")

    def __init__(self, answers: Answers, scope: Scope, receive: Receive, send: Send) -> None:
        self._answers, self._scope, self._receive, self._send = answers, scope, receive, send
        self._start: Message | None = None
        self._is_refused = False

    async def __call__(self, message: Message) -> None:
        """The answer's start waits for what comes first of its body: that may have to give way to a problem."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._is_refused:
            return
        body = message.get("body", b"")
        if len(body) <= LARGE_BYTES:
            if self._start is not None:
                start, self._start = self._start, None
                await self._send(start)
            await self._send(message)
            return
        if self._start is not None and not self._answers.has_taken(self._scope):
            try:
                self._answers.take_now(self._scope, len(body))
            except Unavailable as error:
                self._is_refused, self._start = True, None
                await problem_response(error, self._scope["path"])(self._scope, self._receive, self._send)
                return
        if self._start is not None:
            start, self._start = self._start, None
            await self._send(start)
        more = message.get("more_body", False)
        for at in range(0, len(body), SLICE_BYTES):
            # A copy: a slice that is on its way must not keep the whole alive.
            part = bytes(body[at : at + SLICE_BYTES])
            await self._send({**message, "body": part, "more_body": more or at + SLICE_BYTES < len(body)})
