"""Tokens, sessions, the audit, what draws have served, tallies, and who uploaded what."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    # Never batches: see 0002.
    op.add_column("buffers", sa.Column("forked_from", sa.String(length=63), nullable=True))
    op.add_column("buffers", sa.Column("forked_generation", sa.Integer(), nullable=True))
    op.add_column("ingests", sa.Column("who", sa.String(length=100), nullable=True))
    op.add_column("ingests", sa.Column("token_id", sa.String(length=32), nullable=True))
    op.add_column("ingests", sa.Column("request_id", sa.String(length=64), nullable=True))
    op.add_column("ingests", sa.Column("started_at", sa.Float(), nullable=True))
    op.add_column("ingests", sa.Column("is_kept", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("ingests", sa.Column("failures", sa.JSON(), server_default="[]", nullable=False))
    op.add_column("tasks", sa.Column("sample", sa.String(length=64), nullable=True))
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("prefix", sa.String(length=63), nullable=False),
        sa.Column("requests_per_s", sa.Float(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("created_by", sa.String(length=100), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.Column("revoked_at", sa.Float(), nullable=True),
        sa.Column("last_used_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("secret_sha256", name=op.f("uq_tokens_secret_sha256")),
    )
    op.create_table(
        "sessions",
        sa.Column("id_sha256", sa.String(length=64), nullable=False),
        sa.Column("token_sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id_sha256", name=op.f("pk_sessions")),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("who", sa.String(length=100), nullable=False),
        sa.Column("token_id", sa.String(length=32), nullable=True),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("buffer", sa.String(length=63), nullable=True),
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("before", sa.JSON(), nullable=True),
        sa.Column("after", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index(op.f("ix_audit_buffer_id"), "audit", ["buffer", "id"], unique=False)
    op.create_index(op.f("ix_audit_at"), "audit", ["at"], unique=False)
    op.create_table(
        "served",
        sa.Column("buffer", sa.String(length=63), nullable=False),
        sa.Column("who", sa.String(length=100), nullable=False),
        sa.Column("task", sa.BigInteger(), nullable=False),
        sa.Column("class_id", sa.BigInteger(), nullable=False),
        sa.Column("exemplars", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("last_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["buffer"], ["buffers.name"], name=op.f("fk_served_buffer"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("buffer", "who", "task", "class_id", name=op.f("pk_served")),
    )
    op.create_table(
        "tallies",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("label", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", "label", name=op.f("pk_tallies")),
    )


def downgrade() -> None:
    for table in "tallies", "served", "audit", "sessions", "tokens":
        op.drop_table(table)
    for column in "forked_generation", "forked_from":
        op.drop_column("buffers", column)
    for column in "failures", "is_kept", "started_at", "request_id", "token_id", "who":
        op.drop_column("ingests", column)
    op.drop_column("tasks", "sample")
