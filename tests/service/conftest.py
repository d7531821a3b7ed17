"""A service with a token that the tests of access share: each finds it empty."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import delete

from engram_service import sessions, tokens
from engram_service.settings import Settings
from engram_service.tables import Base
from tests.servers import ADMIN_TOKEN, ServiceThread, http


@pytest.fixture(scope="session")
def once_guarded(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceThread]:
    """Use `guarded`: starting an application takes longer than most of its tests."""
    folder = shutil.copytree(migrated, tmp_path_factory.mktemp("guarded") / "data")
    service = ServiceThread(Settings(data_dir=folder, admin_token=SecretStr(ADMIN_TOKEN), workers=0, access_log=True))
    yield service
    service.stop()


@pytest.fixture
def guarded(once_guarded: ServiceThread, monkeypatch: pytest.MonkeyPatch) -> ServiceThread:
    """A service with a token, without worker, its database empty, which minds no tokens of earlier tests."""
    monkeypatch.setattr(tokens, "WRONG_BURST", 1e9)
    monkeypatch.setattr(sessions, "BEGUN_BURST", 1e9)
    with once_guarded.state.database.session() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(delete(table))
    once_guarded.state.tokens.forget()
    return once_guarded


@pytest.fixture
def admin(guarded: ServiceThread) -> Iterator[httpx.Client]:
    """Plain HTTP to `guarded` with the token of its environment."""
    with http(guarded, ADMIN_TOKEN) as found:
        yield found
