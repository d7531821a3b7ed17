"""The quality is the buffer's; tasks keep the means that herding goes toward. Packs of version 1 are refused."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from engram.errors import Conflict

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    packs = op.get_bind().scalar(sa.text("SELECT count(*) FROM packs"))
    if packs:
        raise Conflict(
            f"this data folder holds {packs} packs of format version 1, which Engram 0.1 wrote and this version does "
            "not read: export its buffers with Engram 0.1 (`engram export`), start with an empty folder, upload them"
        )
    with op.batch_alter_table("buffers") as buffers:
        buffers.add_column(sa.Column("quality", sa.Integer(), nullable=True))
        buffers.add_column(sa.Column("quality_is", sa.String(length=16), nullable=False, server_default="provisional"))
    with op.batch_alter_table("buffers") as buffers:
        buffers.alter_column("quality_is", server_default=None)
    # Tasks without a pack hold nothing but what they have seen; their decisions were of another shape.
    op.execute("UPDATE tasks SET decision = NULL")
    with op.batch_alter_table("tasks") as tasks:
        tasks.add_column(sa.Column("means", sa.LargeBinary(), nullable=True))
        tasks.drop_column("quality")
        tasks.drop_column("ranking")


def downgrade() -> None:
    with op.batch_alter_table("tasks") as tasks:
        tasks.add_column(sa.Column("ranking", sa.String(length=16), nullable=False, server_default="herding"))
        tasks.add_column(sa.Column("quality", sa.Integer(), nullable=False, server_default="50"))
        tasks.drop_column("means")
    with op.batch_alter_table("buffers") as buffers:
        buffers.drop_column("quality_is")
        buffers.drop_column("quality")
