"""The quality is the buffer's; tasks keep the means that herding goes toward. Packs of version 1 are refused."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from engram.errors import Conflict

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    packs = _packs()
    if packs:
        raise Conflict(
            f"this data folder holds {packs} packs of format version 1, which Engram 0.1 wrote and this version does "
            "not read: export its buffers with Engram 0.1 (`engram export`), start with an empty folder, upload them"
        )
    # Never batches: on SQLite they copy the table and drop the old one, and every row that refers to it goes along.
    op.add_column("buffers", sa.Column("quality", sa.Integer(), nullable=True))
    op.add_column(
        "buffers", sa.Column("quality_is", sa.String(length=16), nullable=False, server_default="provisional")
    )
    # Tasks without a pack hold nothing but what they have seen; their decisions were of another shape.
    op.execute("UPDATE tasks SET decision = NULL")
    op.add_column("tasks", sa.Column("means", sa.LargeBinary(), nullable=True))
    op.drop_column("tasks", "quality")
    op.drop_column("tasks", "ranking")
    _drop_option("quality")


def downgrade() -> None:
    packs = _packs()
    if packs:
        raise Conflict(f"this data folder holds {packs} packs of format version 2, which Engram 0.1 does not read")
    op.execute("UPDATE tasks SET decision = NULL")
    op.add_column("tasks", sa.Column("ranking", sa.String(length=16), nullable=False, server_default="herding"))
    op.add_column("tasks", sa.Column("quality", sa.Integer(), nullable=False, server_default="50"))
    op.drop_column("tasks", "means")
    op.drop_column("buffers", "quality_is")
    op.drop_column("buffers", "quality")


def _packs() -> int:
    return int(op.get_bind().scalar(sa.text("SELECT count(*) FROM packs")) or 0)


def _drop_option(name: str) -> None:
    """No ingest has an option of this name, which would be refused when it is read."""
    ingests = sa.table("ingests", sa.column("id", sa.String()), sa.column("options", sa.JSON()))
    for ingest, options in op.get_bind().execute(sa.select(ingests.c.id, ingests.c.options)).all():
        kept = {key: value for key, value in options.items() if key != name}
        op.execute(sa.update(ingests).where(ingests.c.id == ingest).values(options=kept))
