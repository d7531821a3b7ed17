"""Every setting of the service, read once from `ENGRAM_*` environment variables (or given by the caller).

Nothing is read at import: `Settings()` reads the environment when it is called, and the result is frozen. The docstring
under each field is its documentation; units are in the names, and bytes may be given as `64KiB` or `1TB`. Limits exist
because requests come from a network: each says what it stops.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from engram.amounts import Bytes
from engram.files import disk_errors

from .logs import LogFormat

SAMPLES = "samples"
"""The folder of originals, beside that of the packs."""


class Settings(BaseSettings):
    """Where the service keeps things, where it listens, and what it refuses."""

    model_config = SettingsConfigDict(
        env_prefix="ENGRAM_", frozen=True, env_ignore_empty=True, use_attribute_docstrings=True, extra="ignore"
    )

    data_dir: Path = Path("engram-data")
    """The folder of packs, extractors, spooled uploads and, without `database_url`, the SQLite database."""

    database_url: str | None = None
    """An SQLAlchemy URL (`postgresql+psycopg://...`, with the extra `postgres`); without one, `engram.sqlite` in
    `data_dir`."""

    host: str = "127.0.0.1"
    """The address to listen on. Anything but loopback needs `admin_token`."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8077
    """The port to listen on; 0 takes a free one."""

    admin_token: SecretStr | None = None
    """The first bearer token, which may do everything and makes the others. Without one the service only listens on
    loopback, where whoever names no token may do everything."""

    requests_per_s: Annotated[float | None, Field(ge=1e-6)] = None
    """How many requests a second each token may make that has no rate of its own, in each service process; twice as
    many at once. None: any number."""

    session_s: Annotated[float, Field(gt=0)] = 12 * 3600.0
    """How long a login at the console lasts. It ends sooner with its token."""

    audit_s: Annotated[float, Field(gt=0)] = 400 * 86400.0
    """How long the audit keeps what it says."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe messages that are logged (to standard error)."""

    log_format: LogFormat = "text"
    """How log messages are written: `text` for people, `json` for programs, an object per line."""

    access_log: bool = False
    """Log a line per request. Off: at replay rates it would cost more than the replay."""

    max_body_bytes: Annotated[Bytes, Field(ge=1)] = 8 * 2**30
    """The largest upload of one ingest; it stops a full disk. 8 GiB hold 1.6 million 32x32 images as PPM in a tar."""

    max_images: Annotated[int, Field(ge=1)] = 2_000_000
    """Images of one ingest; it bounds the worker's index in memory (about 100 bytes an image)."""

    max_pixels: Annotated[int, Field(ge=1)] = 2**24
    """Pixels of one image, read from its header before it is decoded; it stops decompression bombs."""

    max_decoded_pixels: Annotated[int, Field(ge=1)] = 2**34
    """Pixels of all images of one ingest together; it stops many small files that each decode to a large image. 2^34
    are 1,024 images of 4096x4096, or 16 million of 32x32."""

    min_side_pixels: Annotated[int, Field(ge=1)] = 2
    """The smallest height and width of an uploaded image: one pixel is a mistake in a folder, not training data."""

    max_classes: Annotated[int, Field(ge=1)] = 10_000
    """Classes of one ingest; it bounds the runs of a pack, which every manifest repeats."""

    max_json_bytes: Annotated[Bytes, Field(ge=1)] = 2**16
    """The largest JSON body (a buffer's definition is some 150 bytes)."""

    max_head_bytes: Annotated[Bytes, Field(ge=1024)] = 2**16
    """The largest head of a request, its line and headers together; it stops heads that never end. A draw that names
    10,000 tasks has 50 KB."""

    head_timeout_s: Annotated[float, Field(gt=0)] = 15.0
    """How long a client may take to send a head, from its first byte on (the first head of a connection: from the
    connection on); it stops connections that are opened and not used."""

    min_body_bytes_per_s: Annotated[int, Field(ge=1)] = 8192
    """The least speed of an upload, and of a client that reads an answer; it stops those that hold a connection, a file
    or an answer's memory for nothing."""

    max_stall_s: Annotated[float, Field(gt=0)] = 30.0
    """How long an upload or a reader may stay below that speed, silence included."""

    max_connections: Annotated[int, Field(ge=1)] = 1000
    """Connections at one time, and at most half of the files that the process may open; it stops a flood of them from
    taking memory and handles. Those beyond it are answered 503."""

    max_draw: Annotated[int, Field(ge=1)] = 8192
    """The largest `size` of a draw; `max_answer_bytes` bounds it in bytes."""

    max_answer_bytes: Annotated[Bytes, Field(ge=1)] = 64 * 2**20
    """The largest answer that is made in memory: a draw in any form, a pack as a picture. Exports and packs are sent in
    pieces and need no such bound."""

    answer_memory_bytes: Annotated[Bytes, Field(ge=1)] = 128 * 2**20
    """Memory for all answers above 1 MiB that are on their way; requests wait for it, then get 503. One answer is
    always let through when there is no other."""

    max_global_draw: Annotated[int, Field(ge=1)] = 2**20
    """The largest global batch, `size` times `world_size`: every rank plans all of it before it takes its slice."""

    max_page: Annotated[int, Field(ge=1)] = 1000
    """The largest `limit` of a page of exemplars."""

    max_wait_s: Annotated[float, Field(ge=0)] = 60.0
    """The longest that a long poll of an ingest waits; proxies cut connections that are silent for longer."""

    max_extractor_bytes: Annotated[Bytes, Field(ge=1)] = 512 * 2**20
    """The largest ONNX model."""

    extractor_memory_bytes: Annotated[Bytes, Field(ge=2**20)] = 4 * 2**30
    """The memory that the process running an extractor may use; it stops models that allocate without end."""

    extractor_batch_s: Annotated[float, Field(gt=0)] = 120.0
    """How long an extractor may take to load, and for one batch of images; it stops models that never return."""

    max_extractor_checks: Annotated[int, Field(ge=1)] = 2
    """Extractors that are checked at a time, before they are registered; it stops a crowd of models from taking all
    cores and memory. Further ones are answered 429 after a few seconds."""

    extractor_grace_s: Annotated[float, Field(ge=0)] = 7 * 86400.0
    """How long an extractor stays after it was last registered if no decision and no waiting ingest names it; it stops
    models of each task from filling the disk."""

    cache_bytes: Annotated[Bytes | None, Field(ge=0)] = None
    """Packs kept in memory by each service process; draws from what does not fit read the disk. None: 1 GiB, or a
    quarter of the memory that the process may use if that is less."""

    workers: Annotated[int | None, Field(ge=0)] = None
    """Worker processes beside the service, each at one ingest at a time and of another buffer; 0 leaves the work to
    `engram-service worker` elsewhere. None: one per core that the process may use, at least 2 and at most 4."""

    worker_niceness: Annotated[int, Field(ge=0, le=19)] = 10
    """How far workers and their extractors stand back on a processor that others want, as `nice` counts it: draws and
    requests come first. 0 is for a machine that serves nothing."""

    worker_poll_s: Annotated[float, Field(gt=0, le=2)] = 0.2
    """How often an idle worker looks for a new ingest."""

    worker_silent_s: Annotated[float, Field(ge=4)] = 30.0
    """How long a worker may show no sign of life: then its process is ended and another one starts, and without any
    other that is alive `/readyz` answers 503. It stops a worker that hangs from keeping its place for ever."""

    lease_s: Annotated[float, Field(gt=0)] = 30.0
    """How long an ingest stays claimed without a heartbeat; then another worker takes over."""

    max_ingest_s: Annotated[float, Field(gt=0)] = 3600.0
    """How long the work on one ingest may take; it stops an upload that is slow on purpose from keeping a worker."""

    failed_s: Annotated[float, Field(ge=0)] = 86400.0
    """How long the upload of an ingest that failed or was cancelled stays, so that it can be tried again."""

    failed_bytes: Annotated[Bytes, Field(ge=0)] = 2**30
    """What such uploads may take together, and never more than is free on the disk besides; the oldest go first."""

    max_attempts: Annotated[int, Field(ge=1)] = 5
    """How often an ingest is started before it fails: an upload that kills its worker must not do so for ever."""

    sample_originals: Annotated[int, Field(ge=0, le=1000)] = 16
    """Originals of each class of a task that are kept, losslessly and beside the budget, so that its map can show them
    with the exemplars; 0 keeps none of uploads to come. They go with their task or class, or when their key is removed.
    A task keeps 64 MiB of pixels at most."""

    grace_s: Annotated[float, Field(ge=0)] = 600.0
    """How long packs and manifests of older generations stay readable, so that a slow client can finish its draw."""

    retired_bytes: Annotated[Bytes, Field(ge=0)] = 2**30
    """Packs that only older generations name. Beyond it the oldest generations go before `grace_s` is over; the last
    one before the current stays for all of it."""

    reserve_bytes: Annotated[Bytes, Field(ge=2**16)] = 8 * 2**20
    """A file of this size that is given up when the disk is full, so that deleting and shrinking still work there. With
    fewer bytes than this free besides, the service is not ready."""

    @field_validator("admin_token")
    @classmethod
    def _sendable(cls, token: SecretStr | None) -> SecretStr | None:
        """A token must survive an HTTP header unchanged."""
        if token is not None and not (token.get_secret_value().isascii() and token.get_secret_value().isprintable()):
            raise ValueError("a token holds printable ASCII characters only, as it travels in an HTTP header")
        if token is not None and " " in token.get_secret_value():
            raise ValueError("a token holds no spaces: a space ends it in the Authorization header")
        return token

    @field_validator("database_url")
    @classmethod
    def _has_a_driver(cls, url: str | None) -> str | None:
        """The driver of another database than SQLite is an extra."""
        try:
            if url is not None:
                make_url(url).get_dialect().import_dbapi()
        except ArgumentError as error:
            raise ValueError(f"not the URL of a database, like postgresql+psycopg://user@host/name: {error}") from error
        except ModuleNotFoundError as error:
            raise ValueError(
                f"it needs {error.name}, which is not installed; for postgresql+psycopg://: pip install "
                "'engram[service,postgres]'"
            ) from error
        return url

    @property
    def worker_count(self) -> int:
        """How many workers run beside the service. Two, so that a slow upload never holds up all others; more than
        four are for whoever has the memory, some 100 MB each."""
        if self.workers is not None:
            return self.workers
        return min(4, max(2, len(os.sched_getaffinity(0))))

    @property
    def packs_dir(self) -> Path:
        """One file per pack: `ab/abcd...`."""
        return self.data_dir / "packs"

    @property
    def spool_dir(self) -> Path:
        """Uploads that wait for a worker."""
        return self.data_dir / "spool"

    @property
    def extractors_dir(self) -> Path:
        """ONNX models under their digests."""
        return self.data_dir / "extractors"

    @property
    def samples_dir(self) -> Path:
        """Originals that are kept for maps, a file for each task."""
        return self.data_dir / SAMPLES

    @property
    def reserve_path(self) -> Path:
        """See `reserve_bytes`."""
        return self.data_dir / "reserve"

    @property
    def folders(self) -> tuple[Path, ...]:
        """The data folder and its parts."""
        return self.data_dir, self.packs_dir, self.spool_dir, self.extractors_dir, self.samples_dir

    @property
    def sqlalchemy_url(self) -> str:
        """`database_url`, or the embedded SQLite database in the data folder."""
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'engram.sqlite'}"

    @property
    def is_embedded(self) -> bool:
        """True if the database is SQLite: nobody else administers it, so an empty one is migrated without asking."""
        return make_url(self.sqlalchemy_url).get_backend_name() == "sqlite"

    def make_folders(self) -> None:
        """The data folder and its parts exist afterwards, readable by this user only where they are new.

        Raises:
            StorageFull, Unavailable: the disk does not take them.
        """
        for folder in self.folders:
            with disk_errors(folder, 0):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
