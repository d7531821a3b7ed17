"""Start an Engram service of your own for the length of a `with` block, for the demo, benchmarks and tests.

It runs as a process of its own, with its worker, on a free port of the loopback address; it sees the packages of this
process, and no `ENGRAM_` setting of its environment.
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

START_S = 60.0
STOP_S = 20.0


@contextmanager
def local_service(folder: str | Path) -> Iterator[str]:
    """The URL of a service whose data and log are in `folder`; it is stopped at the end, whatever happens.

    Raises:
        Unavailable: it does not start; the message has the end of its log.
    """
    if importlib.util.find_spec("engram_service") is None:
        raise Unavailable("the service is not installed beside the trainer: pip install 'engram[service]'")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log, port_file = folder / "service.log", folder / "port"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "engram_service.cli", "serve"]
    command += ["--port", "0", "--port-file", str(port_file), "--data-dir", str(folder / "data")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ENGRAM_")}
    clean["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=clean)
    try:
        yield f"http://127.0.0.1:{_port(process, port_file, log)}"
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(process: subprocess.Popen[bytes], port_file: Path, log: Path) -> int:
    """The port, once the service accepts requests on it."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        if port_file.is_file():
            return int(port_file.read_text())
        time.sleep(0.05)
    state = "did not start" if process.poll() is None else f"ended with status {process.returncode}"
    raise Unavailable(f"the service {state}; the end of {log}:\n{log.read_text(errors='replace')[-2000:]}")
