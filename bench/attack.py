"""Does an honest client notice an attack? Times of its draws, and the memory of the service, idle and under attack.

A service with two workers is started as a user starts it. An honest client draws 256 exemplars of 32x32 over one
connection, with a short pause after each draw, first alone and then while all of this goes on at once:

    heads      a head that never ends, heads of 1 MB, heads of 100,000 lines, 200 connections that send a byte a second
    blanks     uploads of a PPM whose header is 60 MB of blanks
    draws      40 clients that ask for the largest draws of noisy 1024x1024 exemplars; half of them never read
    retired    packs that were retired cannot be deleted: directories lie in their places
    slow       uploads of images of 4096x4096 in 49 KB each, every other one cancelled

Attackers are processes of the lowest priority, as they would be on machines of their own: what is measured is what they
make the service do. On a machine with four cores or more the service has two to itself. Memory is the proportional set
size (PSS) of the service and all its children, summed, sampled four times a second: pages that they share count once.
"""

from __future__ import annotations

import http.client
import io
import json
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import numpy as np
import psutil
from PIL import Image
from report import finish, parse_args, print_table

from engram import Client, IngestOptions, tar
from engram.errors import EngramError
from engram_trainer.local_service import local_service

PAUSE_S = 0.005
SAMPLE_S = 0.25
WORKERS = 2
BIG, NOISY, HONEST = 4096, 1024, 32
BLANK_BYTES = 60 * 10**6
DRAWERS, DRIPPERS = 40, 200
RETIRED = "retired"
UPLOAD_S = 30.0


def main() -> None:
    args = parse_args("does an honest client notice an attack, and how much memory does it take?")
    seconds = 8.0 if args.quick else 60.0
    settings = {"workers": WORKERS, "grace_s": 0, "retired_bytes": 0}
    with tempfile.TemporaryDirectory() as folder, on_two_cores(), local_service(folder, **settings) as served:
        off_two_cores()
        service = psutil.Process(served.process.pid)
        with Client(served.url) as client:
            fill(client)
            block_retired(client, Path(folder) / "data" / "packs")
            idle = measured(served.url, service, seconds)
            with attackers(served.url):
                time.sleep(2.0)
                attacked = measured(served.url, service, seconds)
                upload_s = honest_upload_s(client)
            ready = client_status(served.url, "/readyz")
    rows = [
        (name, found.draws, found.failed, found.p50_ms, found.p99_ms, found.most_ms, found.peak_mb)
        for name, found in (("idle", idle), ("attacked", attacked))
    ]
    columns = ("", "draws", "failed", "median ms", "p99 ms", "most ms", "peak PSS, MB")
    print_table("An honest client's draws of 256", columns, rows)
    finish(
        args,
        {
            "p99_under_attack_to_idle": attacked.p99_ms / idle.p99_ms,
            "p99_idle_ms": idle.p99_ms,
            "p99_under_attack_ms": attacked.p99_ms,
            "failed_draws": attacked.failed,
            "peak_pss_mb": attacked.peak_mb,
            "honest_upload_s": upload_s,
            "readyz_afterwards": ready,
        },
    )


CORES = sorted(os.sched_getaffinity(0))


@contextmanager
def on_two_cores() -> Iterator[None]:
    """What is started here runs on two cores, until `off_two_cores`; this process is where it was afterwards."""
    if len(CORES) >= 4:
        os.sched_setaffinity(0, CORES[:2])
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)


def off_two_cores() -> None:
    """This process and those that it starts leave these cores to the service."""
    if len(CORES) >= 4:
        os.sched_setaffinity(0, CORES[2:])


class Measured:
    """What an honest client saw, and what the service's processes had in memory meanwhile."""

    def __init__(self, times_s: list[float], failed: int, peak_mb: float) -> None:
        self.draws, self.failed, self.peak_mb = len(times_s), failed, peak_mb
        self.p50_ms = 1000 * median(times_s)
        self.p99_ms = 1000 * float(np.percentile(times_s, 99))
        self.most_ms = 1000 * max(times_s)


def fill(client: Client) -> None:
    """Buffers of small exemplars for the honest client, of large ones for the attacker, and one that forgets."""
    rng = np.random.default_rng(0)
    options = IngestOptions(ranking="random")
    client.create_buffer("honest", budget_bytes=10**7, quality=50)
    for task in range(5):
        coarse = rng.integers(0, 256, (1000, 8, 8, 3), np.uint8)
        images = coarse.repeat(4, axis=1).repeat(4, axis=2)
        client.wait(client.upload("honest", task, images, np.arange(1000) % 10 + 10 * task, options=options))
    client.create_buffer("noisy", budget_bytes=10**8, quality=90)
    noisy = rng.integers(0, 256, (4, NOISY, NOISY, 3), np.uint8)
    client.wait(client.upload("noisy", 0, noisy, np.zeros(4, np.int64), options=options))
    client.create_buffer(RETIRED, budget_bytes=10**5, quality=50)
    small = rng.integers(0, 256, (50, HONEST, HONEST, 3), np.uint8)
    client.wait(client.upload(RETIRED, 0, small, np.zeros(50, np.int64), options=options))
    for name in ("blanks", "slow", "uploaded"):
        client.create_buffer(name, budget_bytes=10**7, quality=50)


def block_retired(client: Client, packs: Path) -> None:
    """The pack that the next generation retires is a directory that is not empty."""
    digest = client.manifest(RETIRED).packs[0].digest
    (path,) = packs.rglob(digest)
    path.unlink()
    (path / "in the way").mkdir(parents=True)
    client.delete_task(RETIRED, 0)


def measured(url: str, service: psutil.Process, seconds: float) -> Measured:
    """Draws one after the other for so long."""
    connection = connected(url)
    times, failed, peak = [], 0, 0.0
    stop = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.wait(SAMPLE_S):
            peak = max(peak, pss_mb(service))

    sampler = threading.Thread(target=sample)
    sampler.start()
    began = time.perf_counter()
    step = 0
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        step += 1
        try:
            connection.request("GET", f"/v1/buffers/honest/draw?size=256&strategy=class_balanced&step={step}")
            answer = connection.getresponse()
            failed += answer.read()[:2] != b"\xff\xd8"
        except (OSError, http.client.HTTPException):
            failed += 1
            connection = connected(url)
        times.append(time.perf_counter() - start)
        time.sleep(PAUSE_S)
    stop.set()
    sampler.join()
    connection.close()
    return Measured(times, failed, peak)


def honest_upload_s(client: Client) -> float | None:
    """Seconds from the first byte of a small upload to its commit; None if there was none within `UPLOAD_S`."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (200, HONEST, HONEST, 3), np.uint8)
    start = time.perf_counter()
    queued = client.upload("uploaded", 0, images, np.arange(200) % 10, options=IngestOptions(ranking="random"))
    try:
        client.wait(queued, timeout_s=UPLOAD_S)
    except (EngramError, TimeoutError):
        return None
    return time.perf_counter() - start


def pss_mb(service: psutil.Process) -> float:
    """Of the service and its children."""
    total = 0
    for process in [service, *service.children(recursive=True)]:
        with suppress(psutil.Error, OSError):
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024


def connected(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)


def client_status(url: str, path: str) -> int:
    connection = connected(url)
    connection.request("GET", path)
    return connection.getresponse().status


@contextmanager
def attackers(url: str) -> Iterator[None]:
    """All attacks are under way."""
    context = multiprocessing.get_context("spawn")
    attacks: list[Callable[[str], None]] = [endless_heads, long_heads, dripping_heads, blanks, draws, slow_uploads]
    processes = [context.Process(target=attack, args=(url,), daemon=True) for attack in attacks]
    for process in processes:
        process.start()
    try:
        yield
        dead = [process.name for process in processes if not process.is_alive()]
        if dead:
            raise RuntimeError(f"{len(dead)} of {len(processes)} attackers gave up")
    finally:
        for process in processes:
            process.kill()
            process.join()


def _socket(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((str(parts.hostname), int(parts.port or 80)), timeout=60)


def endless_heads(url: str) -> None:
    """Sends one header until the service has enough, and again."""
    os.nice(19)
    piece = b"a" * 2**16
    while True:
        with suppress(OSError), _socket(url) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nX: ")
            for _ in range(600 * 2**20 // len(piece)):
                connection.sendall(piece)
        time.sleep(0.05)


def long_heads(url: str) -> None:
    """Sends heads that end, but late."""
    os.nice(19)
    heads = [b"X: " + b"a" * 2**20 + b"\r\n", b"a:\r\n" * 100_000]
    while True:
        for head in heads:
            with suppress(OSError), _socket(url) as connection:
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n")
                connection.recv(2**16)
            time.sleep(0.05)


def dripping_heads(url: str) -> None:
    """Keeps connections open with a byte a second."""
    os.nice(19)
    connections: list[socket.socket] = []
    while True:
        while len(connections) < DRIPPERS:
            with suppress(OSError):
                connections.append(_socket(url))
        for connection in list(connections):
            try:
                connection.sendall(b"G")
            except OSError:
                connection.close()
                connections.remove(connection)
        time.sleep(1.0)


def blanks(url: str) -> None:
    """Uploads a portable pixmap that is nearly all header, again when the last one is done with."""
    os.nice(19)
    body = b"".join(tar.write_encoded([("ppm", b"P6" + b" " * BLANK_BYTES + b"2 2 255\n" + bytes(12), 0)]))
    upload_for_ever(url, "blanks", body, cancel=False)


def slow_uploads(url: str) -> None:
    """Uploads images that are small to send and large to decode."""
    os.nice(19)
    out = io.BytesIO()
    Image.new("RGB", (BIG, BIG), (10, 200, 30)).save(out, "PNG")
    upload_for_ever(url, "slow", b"".join(tar.write_encoded([("png", out.getvalue(), 0)] * 100)), cancel=True)


def upload_for_ever(url: str, buffer: str, body: bytes, *, cancel: bool) -> None:
    """Two uploads at a time wait for a worker or have one; with `cancel` every other one is cancelled after a while."""
    task = 0
    while True:
        with suppress(OSError, http.client.HTTPException, EngramError, KeyError):
            connection = connected(url)
            ids = []
            for _ in range(2):
                connection.request("POST", f"/v1/buffers/{buffer}/tasks/{task % 1000}/ingests", body=body)
                ids.append(json.loads(connection.getresponse().read())["id"])
                task += 1
            if cancel:
                time.sleep(1.0)
                connection.request("DELETE", f"/v1/ingests/{ids[0]}")
                connection.getresponse().read()
            for ingest in ids:
                state = ""
                while state not in ("committed", "failed", "cancelled"):
                    connection.request("GET", f"/v1/ingests/{ingest}?wait=30")
                    state = json.loads(connection.getresponse().read())["state"]
            connection.close()
        time.sleep(0.1)


def draws(url: str) -> None:
    """Clients that ask for as much as they get; every other one does not read it."""
    os.nice(19)
    threads = [threading.Thread(target=draw_for_ever, args=(url, n % 2 == 0)) for n in range(DRAWERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def draw_for_ever(url: str, reads: bool) -> None:
    """Asks for 8,192, then for what the problem says would fit."""
    step, size = 0, 8192
    while True:
        step += 1
        with suppress(OSError, http.client.HTTPException, ValueError):
            connection = connected(url)
            connection.request("GET", f"/v1/buffers/noisy/draw?size={size}&step={step}")
            answer = connection.getresponse()
            if answer.status == 422:
                size = max(1, int(json.loads(answer.read()).get("fits", 1024)))
            elif not reads:
                time.sleep(60)
            while reads and answer.read(2**16):
                pass
            connection.close()
        if step % 10 == 0:
            size = 8192
        time.sleep(0.05)


if __name__ == "__main__":
    main()
