"""Write the tables of the documentation (settings, routes, errors, commands, decisions) from the code: `make docs`.

What stands between `<!-- table: NAME -->` and `<!-- end -->` is replaced; the prose around it is written by hand.
tests/test_docs.py fails while the files differ from what this script would write.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
import yaml
from prometheus_client.metrics_core import Metric
from pydantic import SecretStr

import engram.cli
import engram_service.cli
import engram_trainer.cli
from engram.errors import ERRORS
from engram_service.access import Access
from engram_service.app import create_app
from engram_service.settings import Settings

FOLDER = Path(__file__).parent
PAGES = tuple(FOLDER / name for name in ("settings.md", "api.md", "commands.md", "decisions.md", "operators.md"))
EVERYWHERE = {"help", "version", "install_completion", "show_completion"}
"""Options of every command, which their page tells once."""

COMMANDS = {"engram": engram.cli.app, "engram-service": engram_service.cli.app, "engram-train": engram_trainer.cli.app}


def settings_table() -> str:
    """Every setting as its environment variable, its default and its docstring."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
        shown = "none" if default is None else f"`{default}`"
        lines.append(f"| `ENGRAM_{name.upper()}` | {shown} | {one_line(field.description or '')} |")
    return "\n".join(lines)


def routes_table() -> str:
    """Every route of the OpenAPI schema: method and path, query parameters, what it does."""
    lines = ["| route | needs | query | does |", "|---|---|---|---|"]
    for method, path, operation in routes():
        query = [p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"]
        does = (operation.get("description") or operation.get("summary") or "").split("\n\n")[0]
        shown = " ".join(f"`{name}`" for name in query)
        lines.append(f"| `{method} {path}` | {needs(method, path)} | {shown} | {one_line(does)} |")
    return "\n".join(lines)


def errors_table() -> str:
    """Every class of the error tree with its status and the last part of its problem `type`."""
    lines = ["| class | status | `type` ends with | when |", "|---|---|---|---|"]
    for slug, error in ERRORS.items():
        does = one_line((inspect.getdoc(error) or "").split("\n\n")[0])
        lines.append(f"| `{error.__name__}` | {error.status} | `{slug}` | {does} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Said:
    """What a service without buffers says of itself: its interface (OpenAPI) and its metrics."""

    description: dict[str, Any]
    metrics: list[Metric]


@cache
def said() -> Said:
    """What the service of this checkout says."""
    with TemporaryDirectory() as folder:
        app = create_app(Settings(data_dir=Path(folder), database_url=None, host="127.0.0.1", admin_token=None))
        found = Said(app.openapi(), list(app.state.metrics.collect()))
        app.state.database.close()
    return found


def routes() -> list[tuple[str, str, dict[str, Any]]]:
    """(METHOD, path, operation) of every documented route, in the order in which the application has them."""
    paths = said().description["paths"]
    return [(method.upper(), path, operation) for path, item in paths.items() for method, operation in item.items()]


def needs(method: str, path: str) -> str:
    """Who may call an operation, in a few words."""
    row, _ = Access().find(method, path)
    if row is None:
        return "nobody may"
    if row.scope is None:
        return "-"
    return f"{row.scope}, all buffers" if row.everything else row.scope


def metrics() -> list[tuple[str, str, str, str]]:
    """(name, kind, labels, meaning) of every series of our own, as Prometheus names it."""
    endings = {"counter": "_total", "info": "_info"}
    return [
        (
            metric.name + endings.get(metric.type, ""),
            metric.type,
            " ".join(getattr(metric, "_labelnames", ())),
            metric.documentation,
        )
        for metric in said().metrics
    ]


def metrics_table() -> str:
    """Every metric with its labels."""
    lines = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for name, kind, labels, meaning in metrics():
        shown = " ".join(f"`{label}`" for label in labels.split())
        lines.append(f"| `{name}` | {kind} | {shown} | {one_line(meaning)} |")
    return "\n".join(lines)


def alerts() -> list[tuple[str, str, str, str]]:
    """(name, severity, expression, what it means and what to do) of every alert."""
    groups = yaml.safe_load((FOLDER.parent / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    rules = [rule for group in groups["groups"] for rule in group["rules"] if "alert" in rule]
    return [
        (rule["alert"], rule["labels"]["severity"], rule["expr"], rule["annotations"].get("description", ""))
        for rule in rules
    ]


def alerts_table() -> str:
    """Every alert, what it is raised for, and what to do."""
    lines = ["| alert | raised when | look at it | means |", "|---|---|---|---|"]
    soon = {"page": "now", "ticket": "today"}
    for name, how, when, what in alerts():
        lines.append(f"| `{name}` | `{one_line(when)}` | {soon[how]} | {one_line(what)} |")
    return "\n".join(lines)


def commands(name: str) -> list[tuple[str, Any]]:
    """Every command of one of our three programs as it is typed, without arguments; the program itself is the first.

    They are click's, or those of the click that typer brings along: what is read of them is the same.
    """

    def within(typed: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield typed, command
        for word, each in getattr(command, "commands", {}).items():
            if not each.hidden:
                yield from within(f"{typed} {word}", each)

    return list(within(name, typer.main.get_command(COMMANDS[name])))


def options(command: Any) -> list[Any]:
    """What is given to a command, arguments first; not what every command has."""
    shown = [each for each in command.params if not getattr(each, "hidden", False) and each.name not in EVERYWHERE]
    return sorted(shown, key=lambda each: bool(each.param_type_name == "option"))


def commands_text(name: str) -> str:
    """Every command of a program with its arguments and options."""
    (_, program), *others = commands(name)
    given = [option.name for option in options(program)]
    # `engram-train` alone is its own first command.
    shown = [(typed, each) for typed, each in others if not given or [option.name for option in options(each)] != given]
    return "\n".join(_command(typed, command) for typed, command in [(name, program), *shown])


def _command(typed: str, command: Any) -> str:
    given = options(command)
    words = [typed, *(_metavar(each) for each in given if each.param_type_name == "argument")]
    lines = [f"### `{' '.join(words)}`", "", one_line((command.help or "").split("\n\n")[0]), ""]
    hints = get_type_hints(command.callback) if command.callback else {}
    if given:
        lines += ["| given | meaning |", "|---|---|"]
        for each in given:
            is_option = each.param_type_name == "option"
            names = (*each.opts, *each.secondary_opts) if is_option else (_metavar(each),)
            meaning = [
                re.sub(r"\[/?bold\]", "`", one_line(each.help or "")),
                *_choices(hints.get(each.name)),
                *_default(each),
            ]
            lines.append(f"| {' '.join(f'`{name}`' for name in names)} | {' '.join(filter(None, meaning))} |")
        lines.append("")
    return "\n".join(lines)


def _metavar(argument: Any) -> str:
    name = f"{argument.name.upper()}{'...' if argument.nargs == -1 else ''}"
    return name if argument.required else f"[{name}]"


def _choices(hint: Any) -> Iterator[str]:
    for kind in (hint, *get_args(hint)):
        if get_origin(kind) is Literal:
            yield f"One of {', '.join(f'`{each}`' for each in get_args(kind))}."


def _default(parameter: Any) -> Iterator[str]:
    given = parameter.default
    if isinstance(given, str | int | float | Path) and not isinstance(given, bool) and given != "":
        yield f"Default: `{given}`."


def decisions_table() -> str:
    """Every decision record with its title."""
    lines = ["| | decision |", "|---|---|"]
    for path in sorted((FOLDER / "adr").glob("*.md")):
        number, _, title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").partition(". ")
        lines.append(f"| {number} | [{title}](adr/{path.name}) |")
    return "\n".join(lines)


def one_line(text: str) -> str:
    """Text as a table cell: no line breaks, no bars that would end the cell."""
    return " ".join(text.split()).replace("|", r"\|")


def render(text: str) -> str:
    """A page with its tables as the code has them now."""
    tables: dict[str, Callable[[], str]] = {
        "settings": settings_table,
        "routes": routes_table,
        "errors": errors_table,
        "decisions": decisions_table,
        "metrics": metrics_table,
        "alerts": alerts_table,
        **{name: partial(commands_text, name) for name in COMMANDS},
    }
    return re.sub(
        r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{tables[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
