"""The JSON of what operators see and do, as pydantic models: tokens, audit, disk, forecasts, draws served.

What trainers need is in `schemas`. All sizes are bytes, all times are UTC or seconds as the name says.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from engram.schemas import Answer, BudgetBytes, Definition, Model, QualityState, Rule, Word

TokenScope = Literal["read", "write", "admin"]
"""What a token allows, each including those before it. read: see what is stored, draw, mirror, export. write: change
what is in buffers: upload, cancel, remove, relabel, register extractors. admin: make, resize, fork and delete buffers;
without a prefix also tokens, audit and what concerns the whole service."""

MapMethod = Literal["pca", "tsne", "umap"]
"""How a map is laid out. pca is exact and always there; tsne and umap are for whoever installs their libraries."""

MAX_NEW_CLASSES = 10_000
"""Of one forecast."""

TokenName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9 ._@-]{0,98}[A-Za-z0-9._@-])?$")]
BufferPrefix = Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9._-]{0,62})?$")]


class WhoAmI(Answer):
    """Whose token a request carries: "admin" is that of the environment; "local" is none, where none is needed."""

    who: str
    scope: Word[TokenScope] | None
    prefix: str


class TokenCreate(Model):
    """A new token. `prefix` bounds it to buffers whose names begin so; "" is all. None in `expires_in_s`: never.

    `requests_per_s` None is the setting's.
    """

    name: TokenName
    scope: TokenScope = "read"
    prefix: BufferPrefix = ""
    expires_in_s: Annotated[float, Field(gt=0, le=10 * 365 * 86400)] | None = None
    requests_per_s: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None


class Token(Answer):
    """A token as it is known: its secret is not. `last_used_at` is exact to about a minute."""

    id: str
    name: str
    scope: Word[TokenScope]
    prefix: str
    requests_per_s: float | None
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class TokenMade(Token):
    """A token that was just made, with its secret, which is told this once."""

    token: str


class TokenList(Answer):
    """Every token, the newest first, also those that are revoked or have expired."""

    tokens: list[Token]


class AuditEntry(Answer):
    """One change: who made it, to what, what was there before and after.

    `action` is the kind of thing and what happened to it, as in "buffer.create", "exemplars.remove", "token.revoke".
    `subject` names it within its buffer, or among all if it belongs to none.
    """

    id: int
    at: datetime
    who: str
    token_id: str | None
    request_id: str
    action: str
    buffer: str | None
    subject: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class AuditPage(Answer):
    """A page of the audit, the newest first; pass `next` as `cursor` for the following one, None at the end."""

    entries: list[AuditEntry]
    next: str | None


class Disk(Answer):
    """What the service takes on its disk, in bytes, and what is free there.

    `live_bytes` are packs of current generations, each counted once; `retired_bytes` those that only older ones name;
    `spool_bytes` uploads that wait, or are kept to be tried again.
    """

    live_bytes: int
    retired_bytes: int
    spool_bytes: int
    sample_bytes: int = 0
    extractor_bytes: int
    database_bytes: int
    free_bytes: int
    total_bytes: int


class ForecastClass(Answer):
    """One class of one task, now and then."""

    task: int
    class_id: int
    exemplars: int
    bytes: int
    exemplars_then: int
    bytes_then: int


class Forecast(Answer):
    """What a change would leave: nothing was changed. Bytes are those of whole packs; `limit_bytes` is the one then.

    The quality changes where the first exemplars ever would have to go: until then it is open.
    """

    buffer: str
    generation: int
    limit_bytes: int
    quality: int | None
    quality_then: int | None
    exemplars: int
    used_bytes: int
    exemplars_then: int
    used_bytes_then: int
    classes: list[ForecastClass]


class Bin(Answer):
    """How many exemplars have this value, or one from `low` to below `high`."""

    value: bool | int | float | str | None = None
    low: float | None = None
    high: float | None = None
    exemplars: int


class Histogram(Answer):
    """How the exemplars that pass some filters are spread over classes, tasks, bytes or the values of a field.

    `exemplars` are those of the tasks and classes asked for. `counted` are those of them that were looked at and pass:
    of many, evenly spread ones where a field is counted. `others` of these are in no bin: NaN and infinities, rare
    texts, the smallest of very many classes.
    """

    of: str
    bins: list[Bin]
    exemplars: int
    counted: int
    others: int


class Recoded(Answer):
    """One exemplar at one quality: the bytes that it adds to a strip, with its fields."""

    quality: int
    bytes: int


class Qualities(Answer):
    """One exemplar as it is stored, and encoded again from that at each lower candidate quality."""

    pack: str
    row: int
    stored: Recoded
    lower: list[Recoded]


class WhatIfAsk(Model):
    """How a decision might have been made; what is None is as it was."""

    definition: Definition | None = None
    rule: Rule | None = None
    epsilon: Annotated[float, Field(gt=0, le=100)] | None = None
    budget_bytes: BudgetBytes | None = None


class WhatIfCandidate(Answer):
    """One candidate quality, looked at again.

    `ratio` is R of pixels of this task, `pooled_ratio` that over all tasks, which is what chooses; `passes` says if
    it is near enough to 1. `exemplars` fitted when the task was uploaded; `exemplars_then` would fit the task's share
    of the budget now, an estimate from the mean bytes of those.
    """

    quality: int
    ratio: float | None
    pooled_ratio: float | None
    passes: bool
    exemplars: int
    bytes: int
    exemplars_then: int


class WhatIf(Answer):
    """What selection would choose from what it measured, under other settings: nothing is changed.

    `quality` None: nothing was measured, because the quality was fixed with the buffer. `says` is one sentence on the
    choice. `is_now` is the buffer's quality and `now_is` how it came to have that; `share_bytes` is the task's part of
    the budget that was asked for.
    """

    buffer: str
    task: int
    definition: Word[Definition]
    rule: Word[Rule]
    epsilon: float
    budget_bytes: int
    share_bytes: int
    quality: int | None
    says: str
    is_now: int | None
    now_is: Word[QualityState]
    candidates: list[WhatIfCandidate]


class MapPoint(Answer):
    """An exemplar on a map, by its pack and row; or an original, by its number in the sample of its task."""

    x: float
    y: float
    class_id: int
    pack: str | None = None
    row: int | None = None
    original: int | None = None


class TaskMap(Answer):
    """Exemplars of a task, and the originals that were kept for comparison, laid out so that what looks alike is near.

    `points` are at most so many of the `exemplars`, drawn at random but always the same. `methods` are those that this
    service can use. `explained_ratio` is the part of the variance that the two axes of `pca` show.
    """

    buffer: str
    generation: int
    task: int
    method: Word[MapMethod]
    methods: list[Word[MapMethod]]
    explained_ratio: float | None
    exemplars: int
    points: list[MapPoint]
    originals: list[MapPoint]


class Served(Answer):
    """What was drawn of one class of one task by one principal.

    `bytes` counts each exemplar at the mean of its class in its pack. Mirrors fetch packs and exports send files: none
    of these are draws.
    """

    buffer: str
    task: int
    class_id: int
    who: str
    exemplars: int
    bytes: int
    last_at: datetime


class ServedList(Answer):
    """A page of what draws have served; pass `next` as `cursor` for the following one, None at the end.

    It is written down every few seconds, so a crash may lose the last of it.
    """

    served: list[Served]
    next: str | None
