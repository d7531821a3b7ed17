"""The table of who may do what: for every route the scope that a token needs, in one place.

Whatever has no row here is refused, even to administrators: a route that is added tomorrow is closed until somebody has
thought about it. `{buffer}` in a path must lie within the token's prefix. What a path does not tell (the buffer of an
ingest or of a pack, names in a body, a budget) the rules check themselves, with `acting.principal()`.

The console is the exception: pages that only read need `read`, forms `write`, unless a row says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from engram.oversight import TokenScope

from .acting import Principal
from .pages import FILES


@dataclass(frozen=True)
class Row:
    """What a request needs.

    Args:
        method: of the request; HEAD needs what GET does.
        path: as the route has it. `{rest:path}` at its end is all that has no row of its own.
        scope: None if the route is open to everybody.
        everything: the route concerns all buffers, so that a token with a prefix is not enough.
    """

    method: str
    path: str
    scope: TokenScope | None
    everything: bool = False

    def check(self, principal: Principal, buffer: str | None) -> None:
        """Returns if the principal may do this.

        Raises:
            Forbidden: it may not.
        """
        if self.scope is None:
            return
        if self.everything:
            principal.need_everything(self.scope)
        else:
            principal.need(self.scope, buffer)


def _rows(scope: TokenScope | None, routes: str, *, everything: bool = False) -> list[Row]:
    lines = (line.split() for line in routes.strip().splitlines())
    return [Row(method, path, scope, everything) for method, path in lines]


TABLE: tuple[Row, ...] = (
    *_rows(
        None,
        f"""
        GET /healthz
        GET /readyz
        GET /docs
        GET /redoc
        GET /openapi.json
        GET /{FILES}/{{file}}
        GET /console/login
        POST /console/login
        GET /console/static/{{rest:path}}
        """,
    ),
    *_rows(
        "read",
        """
        GET /v1/whoami
        GET /v1/buffers
        GET /v1/buffers/{buffer}
        GET /v1/buffers/{buffer}/manifest
        GET /v1/buffers/{buffer}/forecast
        GET /v1/buffers/{buffer}/histogram
        GET /v1/buffers/{buffer}/draw
        GET /v1/buffers/{buffer}/export
        GET /v1/buffers/{buffer}/exemplars
        GET /v1/buffers/{buffer}/exemplars/{pack}/{row}
        GET /v1/buffers/{buffer}/exemplars/{pack}/{row}/fields
        GET /v1/buffers/{buffer}/exemplars/{pack}/{row}/qualities
        GET /v1/buffers/{buffer}/tasks/{task}
        GET /v1/buffers/{buffer}/tasks/{task}/decision
        GET /v1/buffers/{buffer}/tasks/{task}/map
        GET /v1/packs/{sha256}
        GET /v1/ingests
        GET /v1/ingests/{ingest_id}
        GET /v1/extractors
        GET /v1/extractors/{sha256}
        GET /v1/draws
        GET /console
        GET /console/{rest:path}
        GET /console/buffers/{buffer}
        GET /console/buffers/{buffer}/{rest:path}
        POST /console/logout
        """,
    ),
    *_rows("read", "GET /metrics", everything=True),
    *_rows(
        "write",
        """
        POST /v1/buffers/{buffer}/tasks/{task}/ingests
        DELETE /v1/buffers/{buffer}/tasks/{task}
        PATCH /v1/buffers/{buffer}
        DELETE /v1/buffers/{buffer}/exemplars
        PATCH /v1/buffers/{buffer}/exemplars
        DELETE /v1/buffers/{buffer}/exemplars/{pack}/{row}
        PATCH /v1/buffers/{buffer}/exemplars/{pack}/{row}
        DELETE /v1/ingests/{ingest_id}
        POST /v1/ingests/{ingest_id}/retry
        PUT /v1/extractors/{sha256}
        POST /console/{rest:path}
        POST /console/buffers/{buffer}/{rest:path}
        """,
    ),
    *_rows(
        "admin",
        """
        POST /v1/buffers
        POST /v1/buffers/{buffer}/forks
        DELETE /v1/buffers/{buffer}
        GET /v1/audit
        GET /console/audit
        POST /console/buffers
        POST /console/buffers/{buffer}/budget
        POST /console/buffers/{buffer}/forks
        POST /console/buffers/{buffer}/delete
        """,
    ),
    *_rows(
        "admin",
        """
        DELETE /v1/extractors/{sha256}
        GET /v1/tokens
        POST /v1/tokens
        DELETE /v1/tokens/{token_id}
        GET /v1/disk
        GET /console/tokens
        POST /console/tokens
        POST /console/tokens/{token_id}/revoke
        POST /console/extractors/{sha256}/delete
        """,
        everything=True,
    ),
)

OPEN_PATHS = frozenset(row.path for row in TABLE if row.scope is None)
"""What needs no token: whether the service lives, what its interface is, and where to log in."""


MAX_PATHS, MAX_PATH_CHARACTERS = 4096, 200
"""Of which the row is remembered: how many, and how long they may be."""


@dataclass
class _Node:
    """A place in the tree of all paths, one level per segment."""

    literals: dict[str, _Node] = field(default_factory=dict)
    parameter: _Node | None = None
    is_buffer: bool = False
    rows: dict[str, Row] = field(default_factory=dict)
    rest: dict[str, Row] = field(default_factory=dict)


class Access:
    """Finds the row of a request.

    Raises:
        ValueError: of a segment that is a word in one path and a parameter in another, it would not be certain which
            route the framework takes.
    """

    def __init__(self, table: Iterable[Row] = TABLE) -> None:
        # A trainer asks for one path by the thousand.
        self._found = lru_cache(MAX_PATHS)(self._find)
        self._root = _Node()
        for row in table:
            node, *segments = self._root, *row.path.split("/")[1:]
            for segment in segments:
                if segment == "{rest:path}":
                    node.rest[row.method] = row
                    break
                node = _child(node, segment, row)
            else:
                node.rows[row.method] = row

    def find(self, method: str, path: str) -> tuple[Row | None, str | None]:
        """The row, None if there is none, and the buffer that the path names."""
        return self._found(method, path) if len(path) <= MAX_PATH_CHARACTERS else self._find(method, path)

    def _find(self, method: str, path: str) -> tuple[Row | None, str | None]:
        node, buffer, rest = self._root, None, None
        for segment in path.split("/")[1:]:
            rest = node.rest.get(method, rest)
            child = node.literals.get(segment)
            if child is None:
                child = node.parameter
                if child is None or not segment:
                    return rest, buffer
                if node.is_buffer:
                    buffer = segment
            node = child
        return node.rows.get(method, rest), buffer


def _child(node: _Node, segment: str, row: Row) -> _Node:
    if not segment.startswith("{"):
        if node.parameter is not None:
            raise ValueError(f"{row.path}: another row has a parameter where this one has {segment!r}")
        return node.literals.setdefault(segment, _Node())
    if node.literals:
        raise ValueError(f"{row.path}: other rows have {', '.join(node.literals)} where this one has {segment}")
    node.parameter = node.parameter or _Node()
    node.is_buffer = segment == "{buffer}"
    return node.parameter
