"""Create the first schema: buffers, tasks, packs, ingests, extractors."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "buffers",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("budget_bytes", sa.BigInteger(), nullable=False),
        sa.Column("per", sa.String(length=16), nullable=False),
        sa.Column("share_by", sa.String(length=16), nullable=False),
        sa.Column("subsampling", sa.String(length=8), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("oldest_generation", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("channels", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_buffers")),
    )
    op.create_table(
        "extractors",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("input_shape", sa.JSON(), nullable=False),
        sa.Column("dimensions", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_extractors")),
    )
    op.create_table(
        "ingests",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("buffer", sa.String(length=63), nullable=False),
        sa.Column("task", sa.BigInteger(), nullable=False),
        sa.Column("idempotency_key", sa.String(length=200), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("body_bytes", sa.BigInteger(), nullable=False),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("images_total", sa.Integer(), nullable=False),
        sa.Column("images_done", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(length=64), nullable=True),
        sa.Column("lease_expires_at", sa.Float(), nullable=True),
        sa.Column("problem", sa.JSON(), nullable=True),
        sa.Column("generation", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["buffer"], ["buffers.name"], name=op.f("fk_ingests_buffer"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ingests")),
        sa.UniqueConstraint("buffer", "idempotency_key", name=op.f("uq_ingests_buffer_idempotency_key")),
    )
    with op.batch_alter_table("ingests", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_ingests_state_lease_expires_at"), ["state", "lease_expires_at"], unique=False
        )

    op.create_table(
        "packs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("buffer", sa.String(length=63), nullable=False),
        sa.Column("task", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("exemplars", sa.Integer(), nullable=False),
        sa.Column("quality", sa.Integer(), nullable=False),
        sa.Column("runs", sa.JSON(), nullable=False),
        sa.Column("class_bytes", sa.JSON(), nullable=False),
        sa.Column("since", sa.Integer(), nullable=False),
        sa.Column("until", sa.Integer(), nullable=True),
        sa.Column("retired_at", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["buffer"], ["buffers.name"], name=op.f("fk_packs_buffer"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_packs")),
    )
    with op.batch_alter_table("packs", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_packs_buffer_until"), ["buffer", "until"], unique=False)
        batch_op.create_index(batch_op.f("ix_packs_digest"), ["digest"], unique=False)

    op.create_table(
        "tasks",
        sa.Column("buffer", sa.String(length=63), nullable=False),
        sa.Column("task", sa.BigInteger(), nullable=False),
        sa.Column("quality", sa.Integer(), nullable=False),
        sa.Column("ranking", sa.String(length=16), nullable=False),
        sa.Column("seen", sa.JSON(), nullable=False),
        sa.Column("decision", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["buffer"], ["buffers.name"], name=op.f("fk_tasks_buffer"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("buffer", "task", name=op.f("pk_tasks")),
    )


def downgrade() -> None:
    op.drop_table("tasks")
    with op.batch_alter_table("packs", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_packs_digest"))
        batch_op.drop_index(batch_op.f("ix_packs_buffer_until"))

    op.drop_table("packs")
    with op.batch_alter_table("ingests", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_ingests_state_lease_expires_at"))

    op.drop_table("ingests")
    op.drop_table("extractors")
    op.drop_table("buffers")
