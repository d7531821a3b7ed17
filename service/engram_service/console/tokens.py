"""The page of tokens: who may do what, make one, revoke one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request, Response
from pydantic import ValidationError

from engram.errors import EngramError, InvalidRequest
from engram.oversight import Token, TokenCreate, TokenMade

from .. import tokens
from ..acting import SCOPES, principal
from ..database import Database
from ..room import Room
from ..routes.parts import DatabasePart, RoomPart
from ..tokens import Tokens
from .page import redirect, render

router = APIRouter(prefix="/tokens")

DAY_S = 86400.0

Text = Annotated[str, Form(max_length=200)]


@router.get("")
def list_tokens(request: Request, database: DatabasePart) -> Response:
    """Every token, and the form that makes one."""
    return _page(request, database)


@router.post("")
def create_token(
    request: Request,
    database: DatabasePart,
    name: Text = "",
    scope: Text = "read",
    prefix: Text = "",
    expires_in_days: Text = "",
    requests_per_s: Text = "",
) -> Response:
    """The page with the secret of the token that was made: it is shown this once, so nothing redirects to it."""
    given = {
        "name": name.strip(),
        "scope": scope,
        "prefix": prefix.strip(),
        "expires_in_days": expires_in_days.strip(),
        "requests_per_s": requests_per_s.strip(),
    }
    try:
        wanted = _wanted(given)
        with database.session() as session:
            made = tokens.create(session, wanted)
    except InvalidRequest as error:
        return _page(request, database, given=given, problem=error)
    return _page(request, database, status=201, made=made)


@router.post("/{token_id}/revoke")
def revoke_token(request: Request, token_id: str, database: DatabasePart, room: RoomPart) -> Response:
    """The token is worth nothing any more."""
    known: Tokens = request.app.state.tokens
    _revoke(database, room, known, token_id)
    return redirect(request, "tokens")


def _revoke(database: Database, room: Room, known: Tokens, token_id: str) -> None:
    def revoke() -> None:
        with database.session() as session:
            tokens.revoke(session, token_id)

    room.freeing(revoke)
    known.forget()


def _wanted(given: dict[str, str]) -> TokenCreate:
    """The token that a form asks for.

    Raises:
        InvalidRequest: some field is not what it should be.
    """
    asked: dict[str, Any] = {key: given[key] for key in ("name", "scope", "prefix")}
    days = _number("expires in days", given["expires_in_days"])
    asked["expires_in_s"] = None if days is None else days * DAY_S
    asked["requests_per_s"] = _number("requests a second", given["requests_per_s"])
    try:
        return TokenCreate.model_validate(asked)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise InvalidRequest("; ".join(faults)) from error


def _state(token: Token) -> str:
    if token.revoked_at is not None:
        return "revoked"
    has_expired = token.expires_at is not None and token.expires_at <= datetime.now(UTC)
    return "expired" if has_expired else "valid"


def _number(name: str, text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError as error:
        raise InvalidRequest(f"{name} must be a number, got {text!r}") from error


def _page(
    request: Request,
    database: Database,
    *,
    status: int = 200,
    given: dict[str, str] | None = None,
    made: TokenMade | None = None,
    problem: EngramError | None = None,
) -> Response:
    principal().need_everything("admin")
    with database.reading() as session:
        found = tokens.read_all(session)
    return render(
        request,
        "tokens.html",
        status=status,
        tokens=[(token, _state(token)) for token in found],
        scopes=SCOPES,
        given=given or {},
        made=made,
        problem=problem,
    )
