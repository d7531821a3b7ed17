"""Leases are counters instead of times of day, and workers report that they are alive."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    # Never batches: see 0002. A lease that is held now counts as new: workers watch it from here on.
    op.drop_index(op.f("ix_ingests_state_lease_expires_at"), table_name="ingests")
    op.drop_column("ingests", "lease_expires_at")
    op.add_column("ingests", sa.Column("beat", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("ingests", sa.Column("pause_s", sa.Float(), nullable=True))
    op.create_index(op.f("ix_ingests_state"), "ingests", ["state"], unique=False)
    op.create_table(
        "workers",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("beat", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_workers")),
    )


def downgrade() -> None:
    op.drop_table("workers")
    op.drop_index(op.f("ix_ingests_state"), table_name="ingests")
    op.drop_column("ingests", "pause_s")
    op.drop_column("ingests", "beat")
    op.add_column("ingests", sa.Column("lease_expires_at", sa.Float(), nullable=True))
    op.create_index(op.f("ix_ingests_state_lease_expires_at"), "ingests", ["state", "lease_expires_at"], unique=False)
