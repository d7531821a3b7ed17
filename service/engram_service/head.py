"""Answer HEAD wherever GET is answered: the same status and headers, without the body."""

from __future__ import annotations

from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class _Answered(Exception):
    """The headers are out: whatever the body is, nobody reads it."""


class Head:
    """Passes HEAD on to `app` as GET, and ends it when its body begins: an export is not made to be thrown away."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        is_answered = False

        async def without_body(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                await send(message)
                return
            if is_answered:
                raise _Answered
            is_answered = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        inner = {**scope, "method": "GET"}
        try:
            with suppress(_Answered):
                await self.app(inner, receive, without_body)
        finally:
            # What was found out about the request is for those outside, too.
            scope.update(inner, method="HEAD")
