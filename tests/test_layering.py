"""Imports obey the table of CONTRIBUTING.md.

Imports are read from the syntax tree, those inside functions and under TYPE_CHECKING included. Modules of the standard
library are free to all; every other import must be one of ours that the table allows, or belong to a distribution
that pyproject.toml asks for on behalf of that folder.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "engram": ROOT / "client" / "engram",
    "engram_service": ROOT / "service" / "engram_service",
    "engram_trainer": ROOT / "trainer" / "engram_trainer",
}
EXTRAS: dict[str, tuple[str, ...]] = {
    "engram": ("cli",),
    "engram_service": ("cli", "service", "postgres"),
    "engram_trainer": ("cli", "trainer", "hub", "log"),
}
"""The extras of pyproject.toml that a package may count on, beside the plain dependencies."""

COMMANDS = {
    "engram.cli",
    "engram.cli.buffers",
    "engram.cli.connection",
    "engram.cli.exemplars",
    "engram.cli.login",
    "engram.cli.operators",
    "engram.cli.uploads",
    "engram.display",
    "engram_service.cli",
    "engram_trainer.cli",
    "engram_trainer.demo",
    "engram_trainer.display",
    "engram_trainer.progress",
}
"""The modules that may import what only commands need: typer and rich."""

IMPORT_NAMES = {
    "jinja2": ["jinja2", "markupsafe"],
    "pillow": ["PIL"],
    "fastapi": ["fastapi", "starlette", "anyio"],
    "pydantic": ["pydantic", "pydantic_core"],
    "pydantic-settings": ["pydantic_settings"],
    "python-multipart": ["python_multipart"],
    "typer": ["typer", "click"],
    "scikit-learn": ["sklearn"],
}
"""Where a distribution's modules are not called as it is. FastAPI stands on starlette and anyio, typer on click."""

CLIENT = (
    "transport",
    "http",
    "uploads",
    "draws",
    "reading",
    "administration",
    "inspection",
    "profiles",
    "client",
    "verification",
    "folder",
    "state",
    "mirror",
    "local",
    "sources",
    "loader",
    "torch",
    "display",
    "cli",
    "__main__",
)
NOT_FOR_THE_SERVICE = {f"engram.{name}" for name in CLIENT}

WITH_TORCH = "engram.torch"
"""The one module of the library that imports torch, which only those have who install it."""

ORDER = {
    "engram": [
        "errors names schemas files forks commands amounts etags oversight",
        "fields images npy labelled paths",
        "form shares draw tar transport",
        "strip folder http",
        "pack batch index",
        "packs",
        "selection",
        "content",
        "memory state",
        "uploads draws reading administration inspection profiles",
        "client",
        "mirror sources verification",
        "local",
        "loader torch display",
        "cli",
        "__main__",
    ],
    "engram_service": [
        "acting",
        "logs",
        "settings tables children extractor_child answers receiving rates",
        "database storage embedder spooled pages problems liveness tallies filters samples disk",
        "audit",
        "buffers ingest extractors access tokens bodies edge head",
        "sessions",
        "gate",
        "commit replay heartbeat",
        "collect health served listing recoding decisions comparison forecast maps",
        "room work metrics backup",
        "routes interface",
        "console",
        "around",
        "worker app restore",
        "supervisor",
        "cli",
        "__main__",
    ],
    "engram_trainer": [
        "examples extractor networks local_service processes",
        "batches memory preparation sources",
        "datasets local_memory online",
        "plain_memory stream",
        "configuration steps",
        "recipes runtime service_memory",
        "evaluation methods",
        "opening report",
        "loop progress scalars arguments",
        "compare",
        "display",
        "demo cli",
        "__main__",
    ],
}
"""Tiers from the bottom up: a module may import its own tier and those below. One that is not named is free, within
the rule that no import goes round in a circle."""

PURE = ["engram.memory", "engram.content", "engram.selection"]
"""These, and all that they import of ours, work on arrays and bytes alone."""

IMPURE = {"httpx", "os", "pathlib", "shutil", "socket", "sqlalchemy", "subprocess", "tempfile"}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    folder = PACKAGES[package]
    for path in sorted(folder.rglob("*.py")):
        parts = (package, *path.relative_to(folder).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


ALL = {name: path for package in PACKAGES for name, path in modules(package)}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(ALL[name].read_text(encoding="utf-8"))


@cache
def imports(name: str) -> frozenset[str]:
    """Every module that `name` imports; `from x import y` counts as x.y where that is a module of ours, else as x."""
    package = name if ALL[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
            whole = {f"{base}.{alias.name}" for alias in node.names}
            found.update(ours := whole & ALL.keys())
            if ours != whole:
                found.add(base)
    return frozenset(found)


def within(name: str, heads: Iterable[str]) -> bool:
    """Whether a module is one of these, or inside one."""
    return any(name == head or name.startswith(f"{head}.") for head in heads)


@cache
def declared(extras: tuple[str, ...]) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names: set[str] = set()
    for requirement in [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]:
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert match is not None, requirement
        names.update(IMPORT_NAMES.get(match[0], [match[0].replace("-", "_")]))
    return names


def test_every_package_has_modules_to_check() -> None:
    assert all(sum(name.split(".")[0] == package for name in ALL) > 3 for package in PACKAGES)


def test_no_source_root_is_itself_a_package() -> None:
    assert not [folder for folder in PACKAGES.values() if (folder.parent / "__init__.py").exists()]


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_module_imports_only_what_the_table_allows(name: str) -> None:
    package = name.split(".")[0]
    allowed = set(sys.stdlib_module_names) | declared(EXTRAS[package]) | {"engram", package}
    if name == WITH_TORCH:
        allowed |= {"torch"}
    found = imports(name)
    foreign = sorted(module for module in found if module.split(".")[0] not in allowed)
    assert not foreign, f"{name} imports {foreign}; see the table in CONTRIBUTING.md and the extras in pyproject.toml"
    if package == "engram_service":
        assert not found & NOT_FOR_THE_SERVICE, f"{name} would put the client into the service image"


def test_only_commands_import_what_only_commands_need() -> None:
    needed = declared(("cli",)) - declared(())
    assert {"rich", "typer"} <= needed
    assert not {name for name in ALL if {module.split(".")[0] for module in imports(name)} & needed} - COMMANDS


@pytest.mark.parametrize("package", sorted(ORDER))
def test_the_order_names_modules_that_exist_and_each_once(package: str) -> None:
    named = [f"{package}.{word}" for tier in ORDER[package] for word in tier.split()]
    assert sorted(named) == sorted({*named} & ALL.keys())


@pytest.mark.parametrize("package", sorted(ORDER))
def test_a_lower_tier_does_not_import_an_upper_one(package: str) -> None:
    above = set[str]()
    for tier in reversed(ORDER[package]):
        members = {name for name in ALL if within(name, [f"{package}.{word}" for word in tier.split()])}
        assert not {name: wrong for name in members if (wrong := imports(name) & above)}
        above |= members


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_no_import_goes_round_in_a_circle(package: str) -> None:
    graph = {
        name: {module for module in imports(name) if module in ALL and module != package} - {name}
        for name in ALL
        if name.startswith(f"{package}.")
    }
    TopologicalSorter(graph).prepare()


def test_only_modules_of_others_are_imported_inside_a_function() -> None:
    for name in ALL:
        functions = [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = [node for function in functions for node in ast.walk(function)]
        ours = [
            node.lineno
            for node in inside
            if (isinstance(node, ast.ImportFrom) and (node.level or within(node.module or "", PACKAGES)))
            or (isinstance(node, ast.Import) and any(within(alias.name, PACKAGES) for alias in node.names))
        ]
        assert not ours, f"{name} imports modules of ours inside functions, in lines {ours}"


def test_the_memory_and_its_selection_know_no_sql_no_http_and_no_files() -> None:
    reached, left = set[str](), [name for name in ALL if within(name, PURE)]
    assert len(left) > len(PURE)
    while left:
        name = left.pop()
        reached.add(name)
        left += [module for module in imports(name) if module in ALL and module not in reached]
    assert "engram.strip" in reached
    impure = {name: found for name in reached if (found := {module.split(".")[0] for module in imports(name)} & IMPURE)}
    assert not impure


def test_the_one_module_with_torch_is_imported_by_none_of_the_library() -> None:
    assert "torch" in imports(WITH_TORCH)
    assert not [name for name in ALL if name.startswith("engram.") and WITH_TORCH in imports(name)]


def test_the_packages_say_that_they_are_typed() -> None:
    assert (PACKAGES["engram"] / "py.typed").read_bytes() == b""


def test_routes_know_http_and_rules_know_sql() -> None:
    for name in ALL:
        if name.startswith("engram_service.routes"):
            assert not {m for m in imports(name) if m.split(".")[0] == "sqlalchemy"}, f"{name} holds SQL"
        if name.rpartition(".")[2] in {"buffers", "ingest", "replay", "commit", "worker"} and ".routes" not in name:
            assert not {m for m in imports(name) if m.split(".")[0] in {"fastapi", "starlette"}}, f"{name} knows HTTP"


def test_methods_never_see_a_url_a_session_or_a_file() -> None:
    methods = [name for name in ALL if name.startswith("engram_trainer.methods.")]
    assert methods
    for name in methods:
        found = imports(name)
        assert not {m for m in found if m.split(".")[0] in {"httpx", "pathlib", "os", "io", "sqlalchemy"}}, name
        assert not found & {"engram", "engram.client", "engram.local", "engram.mirror", "engram.loader"}, name


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import engram", {"torch", "fastapi", "sqlalchemy", "engram_service", "engram_trainer", "typer"}),
        pytest.param(
            "import engram.cli",
            {"torch", "fastapi", "sqlalchemy", "engram_service", "engram_trainer"},
            marks=pytest.mark.slow,
        ),
        ("import engram_service.app", {"torch", "engram_trainer", "onnxruntime", "typer"}),
        pytest.param("import engram_trainer.loop", {"fastapi", "sqlalchemy", "engram_service"}, marks=pytest.mark.slow),
    ],
)
def test_importing_pulls_in_nothing_from_across_the_table(statement: str, absent: set[str]) -> None:
    path = [str(folder.parent) for folder in PACKAGES.values()]
    program = f"import sys; sys.path[:0] = {path!r}; {statement}; print(*sorted({absent!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
