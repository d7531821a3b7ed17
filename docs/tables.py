"""Write the tables of docs/settings.md and docs/api.md from the code: `make docs`.

What stands between `<!-- table: NAME -->` and `<!-- end -->` is replaced; the prose around it is written by hand.
tests/test_docs.py fails while the files differ from what this script would write.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import SecretStr

from engram.errors import ERRORS
from engram_service.app import create_app
from engram_service.settings import Settings

FOLDER = Path(__file__).parent
PAGES = (FOLDER / "settings.md", FOLDER / "api.md")


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
    lines = ["| route | query | does |", "|---|---|---|"]
    for method, path, operation in routes():
        query = [p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"]
        does = (operation.get("description") or operation.get("summary") or "").split("\n\n")[0]
        lines.append(f"| `{method} {path}` | {' '.join(f'`{name}`' for name in query)} | {one_line(does)} |")
    return "\n".join(lines)


def errors_table() -> str:
    """Every class of the error tree with its status and the last part of its problem `type`."""
    lines = ["| class | status | `type` ends with | when |", "|---|---|---|---|"]
    for slug, error in ERRORS.items():
        does = one_line((inspect.getdoc(error) or "").split("\n\n")[0])
        lines.append(f"| `{error.__name__}` | {error.status} | `{slug}` | {does} |")
    return "\n".join(lines)


def routes() -> list[tuple[str, str, dict[str, Any]]]:
    """(METHOD, path, operation) of every documented route, in the order in which the application has them."""
    with TemporaryDirectory() as folder:
        app = create_app(Settings(data_dir=Path(folder), database_url=None, host="127.0.0.1", admin_token=None))
        paths = app.openapi()["paths"]
        app.state.database.close()
    return [(method.upper(), path, operation) for path, item in paths.items() for method, operation in item.items()]


def one_line(text: str) -> str:
    """Text as a table cell: no line breaks, no bars that would end the cell."""
    return " ".join(text.split()).replace("|", r"\|")


def render(text: str) -> str:
    """A page with its tables as the code has them now."""
    tables = {"settings": settings_table, "routes": routes_table, "errors": errors_table}
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{tables[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
