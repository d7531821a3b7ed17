"""Who may use a service, who changed what, what it takes on its disk: the calls that concern all of it."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import pydantic

from engram.errors import InvalidRequest
from engram.http import Http, json_body
from engram.oversight import (
    AuditEntry,
    AuditPage,
    Disk,
    Served,
    ServedList,
    Token,
    TokenCreate,
    TokenList,
    TokenMade,
    TokenScope,
    WhoAmI,
)
from engram.schemas import first_fault


class Administration:
    """The methods of `Client` that concern a service as a whole. Most need a token with the scope `admin`."""

    _http: Http

    def whoami(self) -> WhoAmI:
        """Whose token this client has, and what it allows.

        Raises:
            Unauthorized: the token is not, or no longer, one of the service.
        """
        return self._http.fetch(WhoAmI, "GET", "/v1/whoami")

    def tokens(self) -> list[Token]:
        """Every token, the newest first, also those that are revoked or have expired; their secrets nobody knows.

        Raises:
            Forbidden: this client's token is not an administrator's of all buffers.
        """
        return self._http.fetch(TokenList, "GET", "/v1/tokens").tokens

    def create_token(
        self,
        name: str,
        *,
        scope: TokenScope = "read",
        prefix: str = "",
        expires_in_s: float | None = None,
        requests_per_s: float | None = None,
    ) -> TokenMade:
        """A new token. Its secret is in `token` of the answer, and never told again.

        Args:
            name: of whoever will use it, for the audit.
            scope: read, write or admin, each including those before it.
            prefix: bounds it to buffers whose names begin so.
            expires_in_s: None is never.
            requests_per_s: the most it may make; None is what the service allows everybody.

        Raises:
            InvalidRequest: a name or a number out of range.
            Forbidden: as `tokens`.
        """
        try:
            wanted = TokenCreate(
                name=name, scope=scope, prefix=prefix, expires_in_s=expires_in_s, requests_per_s=requests_per_s
            )
        except pydantic.ValidationError as error:
            raise InvalidRequest(first_fault(error)) from error
        return self._http.fetch(TokenMade, "POST", "/v1/tokens", body=json_body(wanted))

    def revoke_token(self, token_id: str) -> Token:
        """The token, which no request passes with any more; revoking it again changes nothing.

        Raises:
            NotFound: no such token.
            Forbidden: as `tokens`.
        """
        return self._http.fetch(Token, "DELETE", f"/v1/tokens/{quote(token_id, safe='')}", retry=True)

    def audit(
        self,
        *,
        buffer: str | None = None,
        who: str | None = None,
        action: str | None = None,
        page_size: int = 500,
    ) -> Iterator[AuditEntry]:
        """Every change that is remembered, the newest first, page after page.

        Args:
            buffer: only what was done to this one.
            who: only what was done with the token of this name.
            action: only this ("exemplars.remove"), or all of its kind ("exemplars").
            page_size: how many are asked for at a time.

        Raises:
            Forbidden: this client's token is not an administrator's.
        """
        query = {"buffer": buffer, "who": who, "action": action, "limit": page_size}
        for page in self._http.pages(AuditPage, "/v1/audit", **query):
            yield from page.entries

    def draws(
        self, *, buffer: str | None = None, who: str | None = None, task: int | None = None, page_size: int = 500
    ) -> Iterator[Served]:
        """What draws have served of each class of each task, to whom, page after page.

        Raises:
            NotFound: no such buffer.
        """
        query = {"buffer": buffer, "who": who, "task": task, "limit": page_size}
        for page in self._http.pages(ServedList, "/v1/draws", **query):
            yield from page.served

    def disk(self) -> Disk:
        """What the service takes on its disk, and what is free there.

        Raises:
            Forbidden: as `tokens`.
        """
        return self._http.fetch(Disk, "GET", "/v1/disk")
