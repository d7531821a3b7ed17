"""The database schema: one row per buffer, task, pack, ingest, worker, extractor, token, change; none per exemplar.

A pack row is live in generations `since` <= g < `until` (`until` NULL: still live), so a manifest of an older
generation can be answered until the grace period has passed and the row is deleted together with its object.
Times are UTC seconds since the epoch, as floats.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from engram.oversight import TokenScope
from engram.schemas import Per, QualityState, ShareBy, State, Subsampling


class Base(DeclarativeBase):
    """Carries the naming convention that migrations rely on."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class BufferRow(Base):
    """The bounded memory of one learner. Commits compare and set `generation`."""

    __tablename__ = "buffers"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    budget_bytes: Mapped[int] = mapped_column(BigInteger)
    per: Mapped[Per] = mapped_column(String(16))
    share_by: Mapped[ShareBy] = mapped_column(String(16))
    subsampling: Mapped[Subsampling] = mapped_column(String(8))
    quality: Mapped[int | None] = mapped_column(Integer, default=None)
    # The default is what buffers had that were made before there was this column.
    quality_is: Mapped[QualityState] = mapped_column(String(16), server_default="provisional")
    generation: Mapped[int] = mapped_column(Integer, default=0)
    # Older generations no longer answer: the collector raises this to the highest `until` of the rows it deletes.
    oldest_generation: Mapped[int] = mapped_column(Integer, default=0)
    # The shape of every image, set by the first committed ingest: a draw is one array.
    height: Mapped[int | None] = mapped_column(Integer, default=None)
    width: Mapped[int | None] = mapped_column(Integer, default=None)
    channels: Mapped[int | None] = mapped_column(Integer, default=None)
    # The columns of every exemplar beside its image, by name: see `engram.fields`.
    fields: Mapped[dict[str, str]] = mapped_column(JSON, server_default="{}", default=dict)
    # Class id (a string: JSON) to name.
    class_names: Mapped[dict[str, str]] = mapped_column(JSON, server_default="{}", default=dict)
    # Above every class id ever seen or named: what the next new name gets.
    next_class_id: Mapped[int] = mapped_column(BigInteger, server_default="0", default=0)
    is_frozen: Mapped[bool] = mapped_column(Boolean, server_default=false(), default=False)
    # Which buffer at which generation this one was forked from; that one may be gone.
    forked_from: Mapped[str | None] = mapped_column(String(63), default=None)
    forked_generation: Mapped[int | None] = mapped_column(Integer, default=None)
    created_at: Mapped[float] = mapped_column(Float)


class TaskRow(Base):
    """One step of a buffer's stream. `seen` maps class id (a string: JSON) to images uploaded so far.

    `means` is what herding goes toward, as `engram.content.Means.to_bytes` writes it. `sample` names the originals that
    are kept for a map: see `samples`.
    """

    __tablename__ = "tasks"

    buffer: Mapped[str] = mapped_column(ForeignKey("buffers.name", ondelete="CASCADE"), primary_key=True)
    task: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    seen: Mapped[dict[str, int]] = mapped_column(JSON)
    decision: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)
    means: Mapped[bytes | None] = mapped_column(LargeBinary, default=None)
    sample: Mapped[str | None] = mapped_column(String(64), default=None)


class PackRow(Base):
    """One pack in the generations it was live. At most one live pack per task; `runs` as in `PackEntry`."""

    __tablename__ = "packs"
    __table_args__ = (Index(None, "buffer", "until"), Index(None, "digest"))

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    buffer: Mapped[str] = mapped_column(ForeignKey("buffers.name", ondelete="CASCADE"))
    task: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    exemplars: Mapped[int] = mapped_column(Integer)
    quality: Mapped[int] = mapped_column(Integer)
    runs: Mapped[list[list[int]]] = mapped_column(JSON)
    # entropy-coded bytes of each class (with its markers and checksums), beside `runs`
    class_bytes: Mapped[list[int]] = mapped_column(JSON)
    since: Mapped[int] = mapped_column(Integer)
    until: Mapped[int | None] = mapped_column(Integer, default=None)
    retired_at: Mapped[float | None] = mapped_column(Float, default=None)


class IngestRow(Base):
    """An upload and the queue entry for its work, in one; see `ingest` for when it may be claimed."""

    __tablename__ = "ingests"
    __table_args__ = (UniqueConstraint("buffer", "idempotency_key"), Index(None, "state"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    buffer: Mapped[str] = mapped_column(ForeignKey("buffers.name", ondelete="CASCADE"))
    task: Mapped[int] = mapped_column(BigInteger)
    idempotency_key: Mapped[str | None] = mapped_column(String(200), default=None)
    state: Mapped[State] = mapped_column(String(16))
    body_sha256: Mapped[str] = mapped_column(String(64))
    body_bytes: Mapped[int] = mapped_column(BigInteger)
    options: Mapped[dict[str, Any]] = mapped_column(JSON)
    images_total: Mapped[int] = mapped_column(Integer, default=0)
    images_done: Mapped[int] = mapped_column(Integer, default=0)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    lease_owner: Mapped[str | None] = mapped_column(String(64), default=None)
    # Grows with every change of the lease, and each time that its worker shows that it is alive.
    beat: Mapped[int] = mapped_column(Integer, server_default="0", default=0)
    # How long a free ingest has to wait for its next attempt.
    pause_s: Mapped[float | None] = mapped_column(Float, default=None)
    problem: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)
    # What it failed with before it was last tried again, the oldest first.
    failures: Mapped[list[dict[str, Any]]] = mapped_column(JSON, server_default="[]", default=list)
    # It failed or was cancelled, and its upload is still in the spool.
    is_kept: Mapped[bool] = mapped_column(Boolean, server_default=false(), default=False)
    generation: Mapped[int | None] = mapped_column(Integer, default=None)
    # Who uploaded it, and the request that did: the change that its worker makes is theirs.
    who: Mapped[str | None] = mapped_column(String(100), default=None)
    token_id: Mapped[str | None] = mapped_column(String(32), default=None)
    request_id: Mapped[str | None] = mapped_column(String(64), default=None)
    # When a worker first took it.
    started_at: Mapped[float | None] = mapped_column(Float, default=None)
    created_at: Mapped[float] = mapped_column(Float)
    updated_at: Mapped[float] = mapped_column(Float)


class WorkerRow(Base):
    """A worker process. `beat` grows while it is alive; `seen_at`, by the clock of its machine, is for people."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    beat: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[float] = mapped_column(Float)
    seen_at: Mapped[float] = mapped_column(Float)


class ExtractorRow(Base):
    """A registered ONNX model; its bytes lie in the data folder under its digest."""

    __tablename__ = "extractors"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    input_shape: Mapped[list[int | None]] = mapped_column(JSON)
    dimensions: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[float] = mapped_column(Float)


class TokenRow(Base):
    """A bearer token, of which only the SHA-256 is kept: it is 256 random bits, which nobody guesses."""

    __tablename__ = "tokens"
    __table_args__ = (UniqueConstraint("secret_sha256"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    secret_sha256: Mapped[str] = mapped_column(String(64))
    scope: Mapped[TokenScope] = mapped_column(String(16))
    prefix: Mapped[str] = mapped_column(String(63), default="")
    requests_per_s: Mapped[float | None] = mapped_column(Float, default=None)
    created_at: Mapped[float] = mapped_column(Float)
    created_by: Mapped[str] = mapped_column(String(100))
    expires_at: Mapped[float | None] = mapped_column(Float, default=None)
    revoked_at: Mapped[float | None] = mapped_column(Float, default=None)
    last_used_at: Mapped[float | None] = mapped_column(Float, default=None)


class SessionRow(Base):
    """Somebody who is logged in at the console, with the token that `token_sha256` is the digest of.

    That may be a row of `tokens` or the token of the environment. The session ends when that token does.
    """

    __tablename__ = "sessions"

    id_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    token_sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float] = mapped_column(Float)


class AuditRow(Base):
    """One change, written in the transaction that makes it; see `engram.oversight.AuditEntry`."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "buffer", "id"), Index(None, "at"))

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    at: Mapped[float] = mapped_column(Float)
    who: Mapped[str] = mapped_column(String(100))
    token_id: Mapped[str | None] = mapped_column(String(32), default=None)
    request_id: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    # Not a foreign key: what was done to a buffer outlives it.
    buffer: Mapped[str | None] = mapped_column(String(63), default=None)
    subject: Mapped[str] = mapped_column(String(200))
    before: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)
    after: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)


class ServedRow(Base):
    """What somebody has drawn of one class of one task of a buffer so far."""

    __tablename__ = "served"

    buffer: Mapped[str] = mapped_column(ForeignKey("buffers.name", ondelete="CASCADE"), primary_key=True)
    who: Mapped[str] = mapped_column(String(100), primary_key=True)
    task: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    class_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    exemplars: Mapped[int] = mapped_column(BigInteger)
    bytes: Mapped[int] = mapped_column(BigInteger)
    last_at: Mapped[float] = mapped_column(Float)


class TallyRow(Base):
    """How often something has happened, or for how long, in whatever process; see `tallies`."""

    __tablename__ = "tallies"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    label: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[float] = mapped_column(Float)
