"""Start an Engram service of your own for the length of a `with` block, for the demo, benchmarks and tests.

It is a process of its own, with its workers, on a free port of the loopback address; it sees the packages of this
process, and no `ENGRAM_` setting of this environment but those that are given.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engram.errors import Unavailable

START_S = 180.0
"""How long a service may take to start: a second or two, but longer on a machine that does many other things."""
STOP_S = 60.0


class LocalService:
    """`engram-service serve` on a free loopback port, its workers included.

    Args:
        folder: gets its data, its log and the file that names its port.
        arguments: further arguments of the command.
        settings: of the service, named as in `engram_service.settings`.
    """

    def __init__(self, folder: str | Path, *arguments: str, **settings: object) -> None:
        folder = Path(folder)
        self.data_dir, self.log = folder / "data", folder / "service.log"
        self.given = {"data_dir": self.data_dir, **settings}
        self.url = ""
        """Its address; another one each time that it starts."""
        self.process: subprocess.Popen[bytes]
        self._arguments, self._port_file = arguments, folder / "port"

    def start(self) -> None:
        """The service accepts connections.

        Raises:
            Unavailable: it is not installed, or does not start; the message has the end of its log.
        """
        if importlib.util.find_spec("engram_service") is None:
            raise Unavailable("the service is not installed beside the trainer: pip install 'engram[service]'")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "engram_service.cli", "serve", "--port", "0"]
        command += ["--port-file", str(self._port_file), *self._arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment(**self.given), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_S
        while not self._port_file.is_file():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                tail = self.log.read_text(errors="replace")[-2000:]
                raise Unavailable(
                    f"the service did not start (status {self.process.returncode}); the end of {self.log}:\n{tail}"
                )
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self._port_file.read_text().strip()}"

    def stop(self) -> int:
        """The service was asked to end, or killed where that took too long; returns its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode

    def kill(self) -> None:
        """The service was ended with SIGKILL, without a chance to tidy up."""
        self.process.kill()
        self.process.wait()


@contextmanager
def local_service(folder: str | Path, *arguments: str, **settings: object) -> Iterator[LocalService]:
    """A running service whose data and log are in `folder`; it is stopped at the end, whatever happens.

    Raises:
        Unavailable: it does not start; the message has the end of its log.
    """
    service = LocalService(folder, *arguments, **settings)
    service.start()
    try:
        yield service
    finally:
        service.stop()


def environment(**settings: object) -> dict[str, str]:
    """The environment in which a Python process finds the packages of this one and exactly these settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ENGRAM_")}
    given = {f"ENGRAM_{name.upper()}": str(value) for name, value in settings.items()}
    paths = os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path)
    return inherited | given | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
