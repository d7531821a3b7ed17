"""Real services for tests: as processes, as a user starts them; as threads, which start in a moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from engram_service.app import create_app
from engram_service.cli import Server, listen, uvicorn_config
from engram_service.settings import Settings

ROOT = Path(__file__).parents[1]
START_S = 180.0
"""How long a process may take to start on a machine that does many other things."""


def environment(**settings: object) -> dict[str, str]:
    """The environment in which a process of this checkout runs with exactly these settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ENGRAM_")}
    given = {f"ENGRAM_{name.upper()}": str(value) for name, value in settings.items()}
    paths = os.pathsep.join(str(ROOT / part) for part in ("client", "service", "trainer"))
    return inherited | given | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}


class ServiceProcess:
    """`engram-service serve` on a free loopback port, its worker included."""

    def __init__(self, folder: Path, *arguments: str, **settings: object) -> None:
        self.data_dir = folder / "data"
        self.log = folder / "service.log"
        self.given = {"data_dir": self.data_dir, **settings}
        self._arguments = arguments
        self._port_file = folder / "port"
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        """It accepts connections."""
        self._port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "engram_service.cli", "serve", "--port", "0"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--port-file", str(self._port_file), *self._arguments],
                env=environment(**self.given),
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_S
        while not self._port_file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the service did not start:\n{self.log.read_text()}")
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self._port_file.read_text().strip()}"

    @property
    def settings(self) -> Settings:
        """What it was started with, to reach its database and packs directly."""
        return Settings(**self.given)  # type: ignore[arg-type]

    def stop(self) -> int:
        """It was asked to end and has ended; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(START_S)

    def kill(self) -> None:
        """It is dead without having had a chance to tidy up."""
        self.process.kill()
        self.process.wait(START_S)


class ServiceThread:
    """The same application and server in a thread of this process, without a worker."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.app: FastAPI = create_app(settings)
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = Server(uvicorn_config(self.app, settings))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the server did not start")
            time.sleep(0.002)

    @property
    def state(self) -> Any:
        """`database`, `store`, `cache`, `replay` of the running application."""
        return self.app.state

    def stop(self) -> None:
        """Its thread and its database connections are gone."""
        self._server.should_exit = True
        self._thread.join(START_S)


@contextmanager
def http(service: ServiceProcess | ServiceThread, token: str | None = None) -> Iterator[httpx.Client]:
    """A plain HTTP client of a service."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
        yield client
