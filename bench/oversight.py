"""What do tokens, audit and metrics cost a draw?

Two services draw from one data folder, side by side. "on" is the application as it is, with tokens: each draw carries
one of scope read, with a prefix and a rate, is counted and timed, its classes are written down, and Prometheus asks
as often as `deploy/prometheus` has it. "off" is the same application, started the same way, without what stands around
it for operators: no tokens, no request ids, no metrics, no count of what is served, and nobody asks. What is left
around it states the API's number and answers what nobody foresaw.

Both are measured in every round, in the order on, off, off, on, so that a machine that slows down slows both; what is
compared is compared within a round, and medians over rounds are reported. Two processes of one program differ by some
percent, by where their memory happens to lie, so both are started anew several times.

A draw is 256 exemplars of 32x32 at quality 50 out of 10 thousand, and another one of 16, where whatever is done once
for a request weighs most. "draws/s" are those of one client on a kept connection that asks for the next draw when it
has read the last. CPU times are of the service's process, so that they hold on a busy machine, too.
"""

from __future__ import annotations

import http.client
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import httpx
import psutil
from draw import SMALL, cpu_s, fill
from pydantic import SecretStr
from report import finish, parse_args, print_table
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engram import Client
from engram.errors import EngramError
from engram_service.app import create_app
from engram_service.around import API, Around
from engram_service.edge import Server, listen
from engram_service.gate import Gate
from engram_service.problems import problem_response
from engram_service.settings import Settings
from engram_trainer.local_service import START_S, local_service

BUFFER = "small"
SIZES = (256, 16)
SCRAPE_S = 15.0
"""As `deploy/prometheus` does."""
ORDER = ("on", "off", "off", "on")
OVERSIGHT: tuple[object, ...] = (Gate, Around)
ADMIN = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    exemplars: int
    starts: int
    rounds: int
    """Of each start."""
    seconds: float


Round = tuple[dict[str, float], dict[str, float]]
"""Draws per second of each side, and CPU seconds per draw."""


@dataclass(frozen=True)
class Side:
    """A service that is measured."""

    url: str
    headers: dict[str, str]
    process: psutil.Process


def main() -> None:
    args = parse_args("what do tokens, audit and metrics cost a draw?")
    plan = Plan(SMALL // 5, 1, 3, 0.8) if args.quick else Plan(SMALL, 8, 4, 1.0)
    finish(args, measure(plan))


def measure(plan: Plan) -> dict[str, float]:
    """The headline numbers, with tables of how they came about."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with local_service(folder) as filling, Client(filling.url) as client:
            fill(client, BUFFER, plan.exemplars)
        found: dict[int, list[Round]] = {size: [] for size in SIZES}
        for _ in range(plan.starts):
            with watched(folder) as on, served(folder, is_watched=False) as off:
                for size, rounds in found.items():
                    rounds += [one_round({"on": on, "off": off}, size, plan.seconds) for _ in range(plan.rounds)]
    flat: dict[str, float] = {"starts": plan.starts, "rounds": plan.starts * plan.rounds}
    for size, rounds in found.items():
        rates, cpu = ([each[kind] for each in rounds] for kind in (0, 1))
        ratios = [each["on"] / each["off"] for each in rates]
        extra = [1000 * (each["on"] - each["off"]) for each in cpu]
        rows = [
            (side, median(each[side] for each in rates), 1000 * median(each[side] for each in cpu))
            for side in ("on", "off")
        ]
        print_table(f"Draws of {size}", ("operators' part", "draws/s", "CPU ms of the service"), rows)
        print_table(
            "On over off", ("", "median", "least", "most"), [("ratio", median(ratios), min(ratios), max(ratios))]
        )
        flat |= {
            f"draws_with_oversight_to_without_{size}": median(ratios),
            f"extra_cpu_us_per_draw_{size}": 1000 * median(extra),
        }
    return flat


def one_round(sides: dict[str, Side], size: int, seconds: float) -> Round:
    """Draws per second and CPU seconds of the service per draw, of both sides."""
    draws, took, busy = dict.fromkeys(sides, 0), dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0)
    for name in ORDER:
        side = sides[name]
        connection = http.client.HTTPConnection(side.url.removeprefix("http://"))
        draw(connection, side, size, 0)
        before, start = cpu_s(side.process), time.perf_counter()
        while time.perf_counter() - start < seconds:
            draws[name] += 1
            draw(connection, side, size, draws[name])
        took[name] += time.perf_counter() - start
        busy[name] += cpu_s(side.process) - before
        connection.close()
    return {name: draws[name] / took[name] for name in sides}, {name: busy[name] / draws[name] for name in sides}


def draw(connection: http.client.HTTPConnection, side: Side, size: int, step: int) -> None:
    connection.request("GET", f"/v1/buffers/{BUFFER}/draw?size={size}&step={step}", headers=side.headers)
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"a draw was answered with {answer.status}: {body.decode()}")


@contextmanager
def watched(folder: Path) -> Iterator[Side]:
    """The service with a token to draw with, asked for its metrics every few seconds."""
    with served(folder, is_watched=True) as side:
        wanted = {"name": "bench", "scope": "read", "prefix": BUFFER[:2], "requests_per_s": 1e6}
        admin = {"Authorization": f"Bearer {ADMIN}"}
        token = httpx.post(f"{side.url}/v1/tokens", json=wanted, headers=admin).raise_for_status().json()["token"]
        done = threading.Event()
        asking = threading.Thread(target=scrape, args=(side.url, done))
        asking.start()
        try:
            yield replace(side, headers={"Authorization": f"Bearer {token}"})
        finally:
            done.set()
            asking.join()


def scrape(url: str, done: threading.Event) -> None:
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    while not done.wait(SCRAPE_S):
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {ADMIN}"})
        connection.getresponse().read()
    connection.close()


@contextmanager
def served(folder: Path, *, is_watched: bool) -> Iterator[Side]:
    """The application in a process of its own."""
    port_file = folder / f"{is_watched}.port"
    port_file.unlink(missing_ok=True)
    child = multiprocessing.get_context("spawn").Process(target=serve, args=(folder / "data", port_file, is_watched))
    child.start()
    try:
        deadline = time.monotonic() + START_S
        while not port_file.exists():
            if not child.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the service did not start")
            time.sleep(0.02)
        assert child.pid is not None, "it has started"
        yield Side(f"http://127.0.0.1:{int(port_file.read_text())}", {}, psutil.Process(child.pid))
    finally:
        child.terminate()
        child.join()


class Boundary:
    """`Around` without id, count, time and log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            if not has_begun and message["type"] == "http.response.start":
                has_begun = True
                message["headers"] = [*message["headers"], API]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            await problem_response(EngramError(str(error)), scope["path"])(scope, receive, watched)


def serve(data_dir: Path, port_file: Path, is_watched: bool) -> None:
    settings = Settings(data_dir=data_dir, workers=0, admin_token=SecretStr(ADMIN) if is_watched else None)
    app = create_app(settings)
    if not is_watched:
        app.user_middleware = [each for each in app.user_middleware if each.cls not in OVERSIGHT]
        app.add_middleware(Boundary)
        app.state.replay.note = lambda view, runs, size, damaged: None
    Server(app, settings, port_file).run(sockets=[listen("127.0.0.1", 0)])


if __name__ == "__main__":
    main()
