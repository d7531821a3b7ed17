"""Buffers declare fields, keep the names of their classes, and can be frozen."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("buffers", sa.Column("fields", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("buffers", sa.Column("class_names", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("buffers", sa.Column("is_frozen", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    op.drop_column("buffers", "is_frozen")
    op.drop_column("buffers", "class_names")
    op.drop_column("buffers", "fields")
