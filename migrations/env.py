"""Run the migrations on the connection that `Database.migrate` passes in, all steps in one transaction."""

from __future__ import annotations

from alembic import context

from engram_service.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
