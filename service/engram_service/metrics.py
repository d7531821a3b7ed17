"""Metrics in the formats of Prometheus: what this process counts, and what the database tells of all others.

The service is one process; workers are others, possibly on other machines. Requests, latencies and draws are counted
in memory, in plain dictionaries, for draws come by the thousand a second. What workers do is counted in the database,
in the transactions in which it happens (`tallies`), and read when Prometheus asks. prometheus-client's own way, files
that every process maps and that live in a folder of one machine, would lose the workers elsewhere and costs more than a
dictionary; it would be needed only if several processes answered requests. Where several services share a database,
each reports all of what the database knows: take the maximum over them, not the sum.

No label is taken from a request: routes are templates, statuses classes, buffers those that exist, at most
`MAX_BUFFERS` of them.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import Text, cast, func, select
from sqlalchemy.orm import Session
from starlette.types import Scope

from engram import shares
from engram.errors import ERRORS, EngramError
from engram.packs import PackCache
from engram.schemas import Decision

from . import __version__, buffers, disk, health, tallies
from .database import Database
from .ingest import ACTIVE, FINAL
from .liveness import Liveness
from .served import Served
from .settings import Settings
from .tables import BufferRow, IngestRow, PackRow, TaskRow, WorkerRow

logger = logging.getLogger(__name__)

BUCKETS_S = (0.0003, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Upper bounds: a draw takes 0.3 ms and more, an export minutes."""

MAX_BUFFERS = 1000
"""Buffers with series of their own, the first by name: more would be a burden to Prometheus."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

OTHER = "other"
"""The route of requests for which there is none, and the method of requests that HTTP does not know."""

_CLASSES = {status: f"{status}xx" for status in range(1, 6)}


class Requests:
    """The requests of one process, counted by its event loop alone."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.series: dict[tuple[str, str, int], list[float]] = {}
        """By route, method and class of status: how many took at most each of `BUCKETS_S` and no less, how many longer,
        seconds in all."""

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """The request of this scope has been answered with this status (0: not at all), after so many seconds."""
        route = scope.get("route")
        key = OTHER if route is None else route.path, scope["method"], status // 100
        numbers = self.series.get(key)
        if numbers is None:
            numbers = self.series[key] = [0.0] * (len(BUCKETS_S) + 2)
        numbers[bisect_left(BUCKETS_S, seconds)] += 1
        numbers[-1] += seconds


class Metrics(Collector):
    """Everything there is to tell about one service."""

    def __init__(
        self,
        requests: Requests,
        served: Served,
        database: Database,
        cache: PackCache,
        settings: Settings,
    ) -> None:
        self.requests = requests
        self.connections: Callable[[], int] = lambda: 0
        """How many are open: the server tells it once it runs."""
        self._served, self._database, self._cache, self._settings = served, database, cache, settings
        self._liveness = Liveness(settings)
        self._known: dict[str, tuple[tuple[float, int, int], float | None, int]] = {}
        self._beats: dict[str, tuple[int, float]] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def page(self, accept: str) -> tuple[bytes, str]:
        """Every metric now, and the media type that it is written in: OpenMetrics for who asks for it."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type

    def describe(self) -> Iterable[Metric]:
        """Nothing: what there is depends on what exists."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every metric; those from the database only if it answers."""
        began = time.perf_counter()
        build = InfoMetricFamily("engram_build", "The version of the service.")
        build.add_metric([], {"version": __version__, "python": platform.python_version()})
        yield build
        yield from _of_requests(self.requests, self.connections())
        yield _gauge("engram_cache_bytes", "Packs that are held in memory.", self._cache.bytes)
        problems = health.problems(self._database, self._settings, self._liveness)
        yield _gauge("engram_ready", "1 if /readyz says so, else 0.", 0 if problems else 1)
        try:
            with self._database.reading() as session:
                found = [*self._of_database(session)]
        except (EngramError, OSError) as error:
            logger.warning("metrics of the database are left out: %s", error)
            found = []
        yield from found
        yield from self._of_draws()
        yield from self._of_disk()
        yield _gauge("engram_scrape_seconds", "What making this page took.", time.perf_counter() - began)

    def _of_database(self, session: Session) -> Iterator[Metric]:
        rows = session.scalars(select(BufferRow).order_by(BufferRow.name)).all()
        self._served.forget_others({row.name for row in rows})
        yield _gauge("engram_buffers", "Buffers.", len(rows))
        yield from self._of_buffers(session, rows[:MAX_BUFFERS])
        yield from _of_ingests(session)
        yield from _of_tallies(tallies.read(session))
        yield _gauge("engram_workers", "Worker processes that are alive, on all machines.", self._alive(session))
        damaged = self._cache.damaged()
        named = buffers.named_packs(session, damaged) if damaged else set[str]()
        yield _gauge("engram_damaged_packs", "Packs on disk that were found damaged and are still named.", len(named))
        taken = _family(GaugeMetricFamily, "engram_disk_bytes", "What the service takes on its disk.", ["part"])
        used = disk.usage(session, self._settings)
        for part in _PARTS:
            taken.add_metric([part], getattr(used, f"{part}_bytes"))
        yield taken

    def _of_buffers(self, session: Session, rows: Sequence[BufferRow]) -> Iterator[Metric]:
        held = _held(session)
        details = self._details(session, rows)
        used = _of_buffer("used_bytes", "Bytes of the packs of the current generation.")
        limit = _of_buffer("limit_bytes", "What used_bytes never exceeds.")
        exemplars = _of_buffer("exemplars", "Exemplars.")
        tasks = _of_buffer("tasks", "Tasks with exemplars.")
        generation = _of_buffer("generation", "The current generation.")
        quality = _of_buffer("quality", "JPEG quality of all exemplars; absent before there is one.")
        ratio = _of_buffer("decision_ratio", "R of the quality that the last decision chose; 1 is lossless.")
        for row in rows:
            size, count, packs = held.get(row.name, (0, 0, 0))
            used.add_metric([row.name], size)
            chosen, limit_bytes = details[row.name]
            limit.add_metric([row.name], limit_bytes)
            exemplars.add_metric([row.name], count)
            tasks.add_metric([row.name], packs)
            generation.add_metric([row.name], row.generation)
            if row.quality is not None:
                quality.add_metric([row.name], row.quality)
            if chosen is not None:
                ratio.add_metric([row.name], chosen)
        yield from (used, limit, exemplars, tasks, generation, quality, ratio)

    def _details(self, session: Session, rows: Sequence[BufferRow]) -> dict[str, tuple[float | None, int]]:
        """R of the last choice in each buffer, and its limit; read once for each generation."""
        known, self._known = self._known, {}
        keys = {row.name: (row.created_at, row.generation, row.budget_bytes) for row in rows}
        changed = [row for row in rows if row.name not in known or known[row.name][0] != keys[row.name]]
        limits = _limits(session, changed)
        self._known = {name: known[name] for name in keys if name not in limits}
        for row in changed:
            self._known[row.name] = keys[row.name], _last_ratio(session, row.name), limits[row.name]
        return {name: (ratio, limit) for name, (_, ratio, limit) in self._known.items()}

    def _alive(self, session: Session) -> int:
        """Workers whose counters have moved of late, by the stopwatch of this process; all at the first look."""
        now, known = time.monotonic(), self._beats
        self._beats = {}
        for name, beat in session.execute(select(WorkerRow.name, WorkerRow.beat)):
            before, moved_at = known.get(name, (None, now))
            self._beats[name] = beat, moved_at if before == beat else now
        return sum(now - moved_at <= self._settings.worker_silent_s for _, moved_at in self._beats.values())

    def _of_draws(self) -> Iterator[Metric]:
        drawn = self._served.totals()
        for name, what in _DRAWN.items():
            family = _family(CounterMetricFamily, f"engram_{name}", what, ["buffer"])
            for buffer in sorted(drawn)[:MAX_BUFFERS]:
                totals = drawn[buffer]
                values = (totals.draws, totals.exemplars, totals.bytes, totals.damaged)
                family.add_metric([buffer], dict(zip(_DRAWN, values, strict=True))[name])
            yield family

    def _of_disk(self) -> Iterator[Metric]:
        try:
            found = os.statvfs(self._settings.data_dir)
        except OSError:
            return
        yield _gauge("engram_disk_free_bytes", "Free on the disk of the data folder.", found.f_bavail * found.f_frsize)
        yield _gauge("engram_disk_size_bytes", "The disk of the data folder.", found.f_blocks * found.f_frsize)


_PARTS = ("live", "retired", "spool", "sample", "extractor", "database")


_DRAWN = {
    "draws": "Draws that were answered.",
    "draw_exemplars": "Exemplars in the answers of draws.",
    "draw_bytes": "Bytes of the answers of draws.",
    "draw_damaged_exemplars": "Exemplars that draws left out because they are damaged on disk.",
}


def _of_requests(requests: Requests, connections: int) -> Iterator[Metric]:
    labels = ["route", "method", "status"]
    counted = _family(CounterMetricFamily, "engram_http_requests", "Requests that were answered.", labels)
    summed: dict[tuple[str, str, str], float] = {}
    latencies: dict[str, list[float]] = {}
    for (route, method, status), numbers in dict(requests.series).items():
        key = route, method if method in METHODS else OTHER, _CLASSES.get(status, "none")
        summed[key] = summed.get(key, 0) + sum(numbers[:-1])
        others = latencies.get(route, [0.0] * len(numbers))
        latencies[route] = [one + other for one, other in zip(numbers, others, strict=True)]
    for values, count in summed.items():
        counted.add_metric(values, count)
    yield counted
    latency = _family(
        HistogramMetricFamily, "engram_http_request_duration_seconds", "From head to last byte.", ["route"]
    )
    for route, (*counts, seconds) in latencies.items():
        latency.add_metric([route], _cumulative(BUCKETS_S, counts), seconds)
    yield latency
    yield _gauge("engram_http_requests_in_flight", "Requests that are being answered.", requests.in_flight)
    yield _gauge("engram_http_connections", "Connections that are open.", connections)


def _of_ingests(session: Session) -> Iterator[Metric]:
    counts = dict.fromkeys(ACTIVE, 0)
    oldest = time.time()
    grouped = select(IngestRow.state, func.count(), func.min(IngestRow.created_at)).group_by(IngestRow.state)
    for state, count, created_at in session.execute(grouped.where(IngestRow.state.in_(ACTIVE))):
        counts[state], oldest = count, min(oldest, created_at)
    family = _family(GaugeMetricFamily, "engram_ingests", "Uploads that wait or are worked on.", ["state"])
    for state, count in counts.items():
        family.add_metric([state], count)
    yield family
    yield _gauge("engram_ingest_oldest_seconds", "Since when the oldest of them is here.", time.time() - oldest)


def _of_tallies(found: dict[str, dict[str, float]]) -> Iterator[Metric]:
    ended = _family(CounterMetricFamily, "engram_ingests_ended", "Uploads by how they ended.", ["state"])
    for state in FINAL:
        ended.add_metric([state], found.get("ingests", {}).get(state, 0.0))
    yield ended
    failed = _family(CounterMetricFamily, "engram_ingest_failures", "Failed uploads by their problem.", ["problem"])
    # All from the start: an increase is only seen of what was there before.
    for slug in ERRORS:
        failed.add_metric([slug], found.get("problems", {}).get(slug, 0.0))
    yield failed
    for name, what in ("waiting", "From an upload to the work on it."), ("working", "The work on an upload."):
        tally = found.get(f"{name}_s", {})
        counts = [tally.get(f"{bound:g}", 0.0) for bound in tallies.BOUNDS_S] + [tally.get(tallies.INFINITE, 0.0)]
        family = _family(HistogramMetricFamily, f"engram_ingest_{name}_seconds", what, [])
        family.add_metric([], _cumulative(tallies.BOUNDS_S, counts), tally.get(tallies.SUM, 0.0))
        yield family


def _held(session: Session) -> dict[str, tuple[int, int, int]]:
    """Bytes, exemplars and packs of the current generation of each buffer."""
    sums = func.sum(PackRow.bytes), func.sum(PackRow.exemplars), func.count()
    grouped = select(PackRow.buffer, *sums).where(PackRow.until.is_(None)).group_by(PackRow.buffer)
    rows = session.execute(grouped)
    return {name: (int(size), int(exemplars), packs) for name, size, exemplars, packs in rows}


def _limits(session: Session, rows: Iterable[BufferRow]) -> dict[str, int]:
    """What `used_bytes` of each buffer obeys."""
    by_class = [row.name for row in rows if row.per == "class"]
    classes: dict[str, set[str]] = {}
    if by_class:
        seen = select(TaskRow.buffer, TaskRow.seen).where(TaskRow.buffer.in_(by_class))
        for name, held in session.execute(seen):
            classes.setdefault(name, set()).update(held)
    return {
        row.name: shares.limit(row.budget_bytes, per=row.per, classes=len(classes.get(row.name, ()))) for row in rows
    }


def _last_ratio(session: Session, buffer: str) -> float | None:
    """R of the quality chosen in the last task that has a decision, under what decided."""
    made = func.coalesce(cast(TaskRow.decision, Text), "null") != "null"
    wanted = select(TaskRow.decision).where(TaskRow.buffer == buffer, made).order_by(TaskRow.task.desc()).limit(1)
    found = session.scalar(wanted)
    if found is None:
        return None
    decision = Decision.model_validate(found)
    for candidate in decision.candidates:
        if candidate.quality == decision.quality:
            ratios = candidate.ratio if candidate.pixel_ratio is None else candidate.pixel_ratio
            return ratios.get(decision.definition)
    return None


def _cumulative(bounds: Iterable[float], counts: Iterable[float]) -> list[tuple[str, float]]:
    """Buckets as Prometheus has them: how many were at most so long."""
    names = [f"{bound:g}" for bound in bounds] + ["+Inf"]
    total, found = 0.0, []
    for name, count in zip(names, counts, strict=True):
        total += count
        found.append((name, total))
    return found


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, value=value)


def _of_buffer(name: str, what: str) -> Any:
    return _family(GaugeMetricFamily, f"engram_buffer_{name}", what, ["buffer"])


def _family(kind: type[Metric], name: str, what: str, labels: list[str]) -> Any:
    return kind(name, what, labels=labels)  # type: ignore[call-arg]
