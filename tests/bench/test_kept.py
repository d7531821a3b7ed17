"""Jobs whose results are kept: what is not finished is left for the next time, and workers end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import kept
import psutil
import pytest
from kept import Job, Result, Unfinished


def test_a_job_that_is_not_finished_is_left_for_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def threads(count: int) -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(count) as pool:
            yield pool

    monkeypatch.setattr(kept, "workers", threads)
    monkeypatch.setattr(kept, "code_version", str)
    jobs = [Job("table", name, 0, None) for name in ("one", "two")]

    def execute(job: Job) -> Result:
        if job.name == stopped:
            raise Unfinished("no time")
        return {"value": job.name}

    stopped = "one"
    assert {job.name for job in kept.collect(jobs, execute, folder=tmp_path)} == {"two"}
    stopped = ""
    assert {job.name for job in kept.collect(jobs, execute, folder=tmp_path)} == {"one", "two"}


WAITING = """
import time
import kept

def wait(folder):
    open(f"{folder}/begun", "w").close()
    time.sleep(600)

if __name__ == "__main__":
    import sys
    with kept.workers(1) as pool:
        pool.submit(wait, sys.argv[1]).result()
"""


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
