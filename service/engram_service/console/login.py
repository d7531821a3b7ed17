"""Log in at the console with a token, and out again."""

from __future__ import annotations

import re
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Form, Query, Request, Response

from engram.errors import RateLimited, Unauthorized

from ..gate import set_cookie
from ..sessions import Sessions
from .page import redirect, render, up

router = APIRouter()

_PAGE = re.compile(r"/console(/(?!(?:\.|%2[eE]){1,2}(?:/|\?|$))[\w.~%!$&'()*+,;=:@-]*)*(\?[^\s#\\]*)?", re.ASCII)

Next = Annotated[str, Query(max_length=4000)]


@router.get("/login")
def login_page(request: Request, next: Next = "") -> Response:
    """The form that asks for a token."""
    return render(request, "login.html", next=_page(next))


@router.post("/login")
async def login(request: Request, token: Annotated[str, Form()] = "", next: Annotated[str, Form()] = "") -> Response:
    """A session has begun if the token is good, in a new cookie."""
    sessions: Sessions = request.app.state.sessions
    address = request.client.host if request.client else ""
    try:
        cookie = await run_sync(_begin, sessions, token.strip(), request.scope["engram.cookie"], address)
    except (Unauthorized, RateLimited) as error:
        return render(request, "login.html", problem=error, next=_page(next))
    wanted = _page(next)
    answer = redirect(request)
    if wanted:
        answer.headers["Location"] = up(request) + wanted.removeprefix("/")
    answer.headers["Set-Cookie"] = set_cookie(request.scope, cookie, max_age_s=sessions.session_s)
    return answer


@router.post("/logout")
def logout(request: Request) -> Response:
    """The session is over, and so is its cookie."""
    sessions: Sessions = request.app.state.sessions
    sessions.end(request.scope["engram.cookie"])
    answer = redirect(request, "login")
    answer.headers["Set-Cookie"] = set_cookie(request.scope, "", max_age_s=0)
    return answer


def _begin(sessions: Sessions, secret: str, cookie: str, address: str) -> str:
    return sessions.begin(secret, before=cookie, address=address)


def _page(wanted: str) -> str:
    """The page of the console that somebody wanted to see; "" if it is none: a link leads nowhere else."""
    return wanted if _PAGE.fullmatch(wanted) else ""
