"""Fixtures of all tests: migrated data folders, stores, real services."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx
import hypothesis
import pytest
from httpx._config import DEFAULT_TIMEOUT_CONFIG
from hypothesis import HealthCheck
from sqlalchemy import create_engine, text

from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from tests.contents import Filling
from tests.servers import PATIENCE_S, ServiceProcess, ServiceThread, http

for name in [name for name in os.environ if name.startswith("ENGRAM_")]:
    # What the developer's shell sets must not decide what the tests see.
    del os.environ[name]

# Nor their profiles.
os.environ["XDG_CONFIG_HOME"] = "/nonexistent"

# httpx reads all certificate authorities for every client, 40 ms of CPU each, and no test speaks TLS: one will do.
os.environ["SSL_CERT_FILE"] = str(Path(__file__).parent / "authority.pem")

# Requests of tests that name no timeout would give up after 5 s, less than a busy machine may need.
for phase in ("connect", "read", "write", "pool"):
    setattr(DEFAULT_TIMEOUT_CONFIG, phase, PATIENCE_S)

# How long an example takes says nothing about it while other tests run beside it.
hypothesis.settings.register_profile("beside others", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis.settings.load_profile("beside others")

SLOW_TIMEOUT_S = 600


def pytest_collection_finish() -> None:
    """What was imported is never garbage; looking through it again and again took a twelfth of the time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests may take longer than the others (`timeout` in pyproject.toml)."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a migrated, empty database, to be copied: migrating takes longer than most tests."""
    folder = tmp_path_factory.mktemp("migrated") / "data"
    settings = Settings(data_dir=folder)
    settings.make_folders()
    database = Database(settings)
    database.migrate()
    database.close()
    return folder


@pytest.fixture(scope="session")
def once(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Filling], tuple[Path, Any]]:
    """A data folder that a function has filled, to be copied, and what the function returned: it is called once."""

    @cache
    def filled(fill: Filling) -> tuple[Path, Any]:
        settings = Settings(data_dir=shutil.copytree(migrated, tmp_path_factory.mktemp("filled") / "data"))
        database = Database(settings)
        found = fill(database, settings)
        database.close()
        return settings.data_dir, found

    return filled


@pytest.fixture
def hold(once: Callable[[Filling], tuple[Path, Any]], tmp_path: Path) -> Callable[[Filling], Any]:
    """The data folder of the test is filled by a function, before anything else asks for it: `hold(three_tasks)`."""

    def copy(fill: Filling) -> Any:
        folder, found = once(fill)
        shutil.copytree(folder, tmp_path / "data")
        return found

    return copy


@pytest.fixture
def settings(migrated: Path, tmp_path: Path) -> Settings:
    """Settings with a data folder of their own, its database migrated and empty."""
    return Settings(data_dir=shutil.copytree(migrated, tmp_path / "data"))


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """The empty database of `settings`."""
    found = Database(settings)
    yield found
    found.close()


@pytest.fixture
def store(settings: Settings) -> PackStore:
    """The empty store of `settings`."""
    return PackStore(settings.packs_dir)


@pytest.fixture
def serve_thread(migrated: Path, tmp_path: Path) -> Iterator[Callable[..., ServiceThread]]:
    """Starts services without worker in threads: `serve_thread(max_draw=10)`; the data folder is the test's own."""
    running: list[ServiceThread] = []

    def serve(**given: object) -> ServiceThread:
        folder = tmp_path / "data"
        if not folder.exists():
            shutil.copytree(migrated, folder)
        running.append(ServiceThread(Settings(**{"data_dir": folder, "workers": 0, **given})))  # type: ignore[arg-type]
        return running[-1]

    yield serve
    for service in running:
        service.stop()


@pytest.fixture
def served(serve_thread: Callable[..., ServiceThread]) -> ServiceThread:
    """A service without worker, in a thread, with an empty data folder."""
    return serve_thread()


@pytest.fixture
def client(served: ServiceThread) -> Iterator[httpx.Client]:
    """Plain HTTP to `served`."""
    with http(served) as found:
        yield found


@pytest.fixture
def make_service(tmp_path: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts real services as processes: `make_service(lease_s=1)`. Each has a data folder of its own."""
    running: list[ServiceProcess] = []

    def make(*arguments: str, **given: object) -> ServiceProcess:
        folder = tmp_path / f"service-{len(running)}"
        folder.mkdir()
        running.append(ServiceProcess(folder, *arguments, **given))
        return running[-1]

    yield make
    for service in running:
        if service.process.poll() is None:
            service.stop()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One real service with its worker for the whole run: use a buffer name of your own."""
    running = ServiceProcess(tmp_path_factory.mktemp("service"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, reached through a socket in its folder."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        pytest.skip("install Debian's postgresql package to run this")
    programs = found[-1].parent
    # PostgreSQL refuses to run as root, and its user cannot enter root's temporary folders.
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    made = subprocess.run([*as_user, "mktemp", "-d"], capture_output=True, text=True, check=True, cwd="/")
    folder = made.stdout.strip()
    control = [*as_user, str(programs / "pg_ctl"), "-D", f"{folder}/data", "-w"]
    subprocess.run([*control, "init", "-o", "-U engram -A trust"], check=True, capture_output=True, cwd="/")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    subprocess.run([*control, "start", "-o", options, "-l", f"{folder}/log"], check=True, capture_output=True, cwd="/")
    yield f"postgresql+psycopg://engram@/postgres?host={folder}"
    subprocess.run([*control, "stop", "-m", "immediate"], check=True, capture_output=True, cwd="/")
    shutil.rmtree(folder)


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """An empty database on that server."""
    name = f"test_{token_hex(4)}"
    engine = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return postgres_server.replace("/postgres?", f"/{name}?")
