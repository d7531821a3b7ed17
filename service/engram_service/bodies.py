"""Refuse JSON bodies above the size limit before they are parsed, and stream the bodies of uploads.

The framework reads a JSON body whole before it calls a route. This middleware reads it first, up to the limit, and
hands it on; a longer one is refused without being kept. Routes that take uploads read their bodies themselves, in
pieces, each with a limit of its own.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engram.errors import TooLarge

from .problems import problem_response
from .settings import Settings

_UPLOADS = re.compile(r"/v1/(?:buffers/[^/]+/tasks/[^/]+/ingests|extractors/[^/]+)")


class BodyLimit:
    """Passes requests with bodies of at most `max_json_bytes` on to `app`, uploads as they are."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.max_bytes = settings.max_json_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; bodies of GET and HEAD are not read by anybody."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD") or _UPLOADS.fullmatch(scope["path"]):
            await self.app(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client is gone
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                error = TooLarge(
                    f"the body has more than {self.max_bytes} bytes, the most that ENGRAM_MAX_JSON_BYTES allows",
                    max_json_bytes=self.max_bytes,
                )
                await problem_response(error, scope["path"])(scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replayed, send)
