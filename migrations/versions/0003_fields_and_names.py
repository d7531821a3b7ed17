"""Buffers declare fields, keep the names of their classes, and can be frozen."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("buffers", sa.Column("fields", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("buffers", sa.Column("class_names", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("buffers", sa.Column("next_class_id", sa.BigInteger(), nullable=False, server_default="0"))
    _count_class_ids()
    op.add_column("buffers", sa.Column("is_frozen", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    op.drop_column("buffers", "is_frozen")
    op.drop_column("buffers", "next_class_id")
    op.drop_column("buffers", "class_names")
    op.drop_column("buffers", "fields")


def _count_class_ids() -> None:
    """New names get ids above those that a buffer's tasks have seen."""
    buffers = sa.table("buffers", sa.column("name", sa.String()), sa.column("next_class_id", sa.BigInteger()))
    tasks = sa.table("tasks", sa.column("buffer", sa.String()), sa.column("seen", sa.JSON()))
    above: dict[str, int] = {}
    for buffer, seen in op.get_bind().execute(sa.select(tasks.c.buffer, tasks.c.seen)).all():
        above[buffer] = max(above.get(buffer, 0), 1 + max(map(int, seen), default=-1))
    for buffer, class_id in above.items():
        op.execute(sa.update(buffers).where(buffers.c.name == buffer).values(next_class_id=class_id))
