"""Routes of tokens: who one is, make, list, revoke."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response

from engram.oversight import Token, TokenCreate, TokenList, TokenMade, WhoAmI

from .. import tokens
from ..acting import principal
from ..tokens import Tokens
from .parts import DatabasePart, RoomPart

router = APIRouter(prefix="/v1", tags=["tokens"])


async def _tokens(request: Request) -> Tokens:
    found: Tokens = request.app.state.tokens
    return found


TokensPart = Annotated[Tokens, Depends(_tokens)]
TokenPath = Annotated[str, Path(description="The token's id, which is not the token.")]


@router.get("/whoami")
def whoami() -> WhoAmI:
    """Tell whose token the request carries and what it allows."""
    found = principal()
    return WhoAmI(who=found.who, scope=found.scope, prefix=found.prefix)


@router.get("/tokens")
def list_tokens(database: DatabasePart) -> TokenList:
    """List all tokens, the newest first, also those that were revoked or have expired; never their secrets."""
    with database.reading() as session:
        return TokenList(tokens=tokens.read_all(session))


@router.post("/tokens", status_code=201)
def create_token(wanted: TokenCreate, response: Response, database: DatabasePart) -> TokenMade:
    """Make a token. The answer has its secret, which is told this once."""
    with database.session() as session:
        made = tokens.create(session, wanted)
    response.headers["Cache-Control"] = "no-store"
    return made


@router.delete("/tokens/{token_id}")
def revoke_token(token_id: TokenPath, database: DatabasePart, room: RoomPart, known: TokensPart) -> Token:
    """Revoke a token: from now on it is worth nothing, and neither are logins with it. It stays in the list."""

    def revoke() -> Token:
        with database.session() as session:
            return tokens.revoke(session, token_id)

    gone = room.freeing(revoke)
    known.forget()
    return gone
