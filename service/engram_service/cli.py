"""The `engram-service` command: serve, worker, migrate, backup, restore.

`serve` runs the service and its workers without any configuration, on loopback. Options win over `ENGRAM_*` variables.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from engram.errors import EngramError

from . import __version__, backup, logs
from . import restore as restoring
from .app import create_app, open_database
from .database import Database
from .edge import Server, listen
from .settings import Settings
from .supervisor import Supervisor

app = typer.Typer(
    help="A compressed replay memory for continual learning.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DataDir = Annotated[Path | None, typer.Option(help="Folder of packs, uploads and the SQLite database.")]
Workers = Annotated[int | None, typer.Option(help="Worker processes; by default one per core, from 2 to 4.")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.")]


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"engram {__version__}")
        raise typer.Exit


@app.callback()
def _command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address; anything but loopback needs ENGRAM_ADMIN_TOKEN.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    data_dir: DataDir = None,
    port_file: Annotated[Path | None, typer.Option(help="Write the port here once requests are accepted.")] = None,
    workers: Workers = None,
    log_level: LogLevel = None,
) -> None:
    """Serve the API, with workers beside it."""
    settings = _settings(host=host, port=port, data_dir=data_dir, workers=workers, log_level=log_level)
    _stop_on_sigterm()
    try:
        application = create_app(settings)
        listener = listen(settings.host, settings.port)
    except EngramError as error:
        _die(error.message)
    except OSError as error:
        _die(f"cannot serve on {settings.host} port {settings.port} with data in {settings.data_dir}: {error}")
    supervisor = Supervisor(settings)
    supervisor.start()
    try:
        Server(application, settings, port_file).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        supervisor.stop()


@app.command(name="worker")
def work(data_dir: DataDir = None, workers: Workers = None, log_level: LogLevel = None) -> None:
    """Work on ingests without serving: for machines beside the one that serves."""
    settings = _settings(data_dir=data_dir, workers=workers, log_level=log_level)
    if settings.worker_count == 0:
        _die("0 workers do no work; give --workers 1 or more, or none for one per core")
    _stop_on_sigterm()
    try:
        open_database(settings).close()
    except EngramError as error:
        _die(error.message)
    supervisor = Supervisor(settings)
    supervisor.start()
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        supervisor.stop()


@app.command()
def migrate(data_dir: DataDir = None, log_level: LogLevel = None) -> None:
    """Bring the database to the schema of this version."""
    settings = _settings(data_dir=data_dir, log_level=log_level)
    database = None
    try:
        settings.make_folders()
        database = Database(settings)
        before = database.schema_state()
        if before == "unknown":
            _die(
                "the database has a schema that this version does not know: made by a newer one, or by another program"
            )
        database.migrate()
    except EngramError as error:
        _die(error.message)
    finally:
        if database is not None:
            database.close()
    typer.echo(
        "the schema was current already" if before == "current" else f"the schema was {before} and is current now"
    )


@app.command(name="backup")
def back_up(
    folder: Annotated[Path, typer.Argument(help="Where the copies are; another disk than the data folder's.")],
    keep: Annotated[int, typer.Option(min=1, help="So many copies stay, the newest.")] = 7,
    data_dir: DataDir = None,
    log_level: LogLevel = None,
) -> None:
    """Copy all that the service holds, while it runs; of packs only those that are new since the last time."""
    settings = _settings(data_dir=data_dir, log_level=log_level)
    database = None
    try:
        if settings.is_embedded and not (settings.data_dir / "engram.sqlite").exists():
            _die(f"there is no service in {settings.data_dir}")
        database = Database(settings)
        with _progress("files") as progress:
            name, made = backup.back_up(database, settings, folder, keep=keep, progress=progress)
    except EngramError as error:
        _die(error.message)
    except OSError as error:
        _die(f"the backup is not complete: {error}")
    finally:
        if database is not None:
            database.close()
    counts = f"{len(made.extractors)} extractors, {len(made.uploads)} waiting uploads"
    typer.echo(f"backup {name}: {len(made.packs)} packs of {sum(made.packs.values())} bytes, {counts}")
    _tell_left_out(made.damaged)


@app.command()
def restore(
    folder: Annotated[Path, typer.Argument(help="Where the copies are.")],
    name: Annotated[
        str | None, typer.Option(help="Which copy, as in 2026-11-22T03-15-00.123Z; else the newest.")
    ] = None,
    leave_out_damaged: Annotated[
        bool, typer.Option("--leave-out-damaged", help="Go on without the files that are damaged or missing.")
    ] = False,
    data_dir: DataDir = None,
    log_level: LogLevel = None,
) -> None:
    """Make a data folder of a backup: it has to be empty, and so has the database of ENGRAM_DATABASE_URL."""
    settings = _settings(data_dir=data_dir, log_level=log_level)
    try:
        with _progress("files") as progress:
            found = restoring.restore(
                settings, folder, name=name, leave_out_damaged=leave_out_damaged, progress=progress
            )
    except EngramError as error:
        _die(error.message)
    except OSError as error:
        _die(f"nothing was restored: {error}")
    typer.echo(f"backup {found.name} is restored to {settings.data_dir}: {len(found.made.packs)} packs")
    if found.was_outdated:
        typer.echo(f"it was made by engram {found.made.version}; its schema is this version's now")
    if found.tokens:
        typer.echo(
            f"{found.tokens} tokens hold as they did at {found.made.made_at:%Y-%m-%d %H:%M:%S} UTC: revoke again those "
            "that were revoked since"
        )
    _tell_left_out(found.left_out)


def _tell_left_out(names: Sequence[str]) -> None:
    for name in names:
        typer.echo(f"damaged, left out: {name}", err=True)
    if names:
        raise typer.Exit(1)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, if that is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task(what)
        yield lambda done, of: bar.update(line, completed=done, total=of)


def _settings(**given: Any) -> Settings:
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        _die("\n".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()))
    token = settings.admin_token
    logs.set_up(settings.log_level, settings.log_format, secret="" if token is None else token.get_secret_value())
    return settings


def _stop_on_sigterm() -> None:
    """SIGTERM unwinds the stack, so that the workers are stopped and files are closed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def _die(message: str) -> NoReturn:
    typer.echo(f"engram-service: {message}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
