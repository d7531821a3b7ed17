"""Real services for tests: as processes, as a user starts them; as threads, which start in a moment."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn.server
from fastapi import FastAPI

from engram_service.app import create_app
from engram_service.edge import Server, listen
from engram_service.settings import Settings
from engram_trainer.local_service import START_S, LocalService, environment

__all__ = ["ADMIN_TOKEN", "ServiceProcess", "ServiceThread", "environment", "eventually", "http"]

ADMIN_TOKEN = "the-token-of-the-environment"
"""Of services of tests that need one."""

PATIENCE_S = 60.0
"""Far longer than anything takes, on a machine that does many other things, too; less than pytest waits."""


class ServiceProcess(LocalService):
    """A service in a process of its own, started when it is made, with the settings that it has."""

    def __init__(self, folder: Path, *arguments: str, **settings: object) -> None:
        # One worker is enough for most, and another takes a second of a core to start. Tests wait for it.
        super().__init__(folder, *arguments, **{"workers": 1, "worker_niceness": 0, "worker_poll_s": 0.05, **settings})
        self.start()

    @property
    def settings(self) -> Settings:
        """What it was started with, to reach its database and packs directly."""
        return Settings(**self.given)  # type: ignore[arg-type]


async def _nap(delay_s: float) -> None:
    await asyncio.sleep(min(delay_s, 0.005))


# uvicorn looks every tenth of a second whether it is to end, and then whether its connections have: that is two tenths
# for each server of this process, and the tests stop hundreds.
vars(uvicorn.server)["asyncio"] = SimpleNamespace(**vars(asyncio) | {"sleep": _nap})


class ServiceThread:
    """The same application and server in a thread of this process, without a worker."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.app: FastAPI = create_app(settings)
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = Server(self.app, settings)
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


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true within the time in which anything does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def http(service: ServiceProcess | ServiceThread, token: str | None = None) -> Iterator[httpx.Client]:
    """A plain HTTP client of a service."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
        yield client
