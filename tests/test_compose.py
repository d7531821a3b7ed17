"""Checks Dockerfile and docker-compose.yml without a Docker engine, and runs their topology as processes.

It reads both files, compares them with the settings, the routes and the folders they speak of, then starts what the
compose file starts (a service with a token, a client that has it) with the same commands and the same environment.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from engram.client import Client
from engram.errors import Unauthorized
from engram_service.auth import OPEN_PATHS
from engram_service.settings import Settings

ROOT = Path(__file__).parent.parent
TOKEN = "a-token-of-this-test"


@dataclass
class Stage:
    """One `FROM` of the Dockerfile with its instructions, in order."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        return [rest for instruction, rest in self.instructions if instruction == word]


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    found: dict[str, Stage] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found.setdefault(name, Stage(name, base))
        else:
            current.instructions.append((word, rest))
    return found


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return found


def lineage(stages: dict[str, Stage], name: str) -> list[Stage]:
    """A stage and those it is built from, outermost base first."""
    stage = stages[name]
    return [*(lineage(stages, stage.base) if stage.base in stages else []), stage]


def environment(stages: dict[str, Stage], name: str) -> dict[str, str]:
    pairs = [word for stage in lineage(stages, name) for line in stage.all("ENV") for word in shlex.split(line)]
    return dict(pair.split("=", 1) for pair in pairs)


def test_every_stage_starts_from_a_pinned_python_or_another_stage(stages: dict[str, Stage]) -> None:
    outside = {stage.base for stage in stages.values()} - stages.keys()
    assert len(outside) == 1
    (image,) = outside
    version = re.fullmatch(r"python:(\d+)\.(\d+)-slim", image)
    assert version is not None, image
    assert (int(version[1]), int(version[2])) >= (3, 11)


def test_what_is_copied_exists_and_the_ignore_file_lets_it_through(stages: dict[str, Stage]) -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word
        for stage in stages.values()
        for line in stage.all("COPY")
        if not line.startswith("--from=")
        for word in line.split()[:-1]
    }
    assert copied == let_through
    assert not [name for name in copied if not (ROOT / name).exists()]


def test_the_build_has_every_file_that_the_distribution_names(stages: dict[str, Stage]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {
        project["project"]["readme"],
        *project["project"]["license-files"],
        *(name.split("/")[0] for name in wheel["packages"]),
        *wheel["force-include"],
    }
    copied = {word for line in stages["source"].all("COPY") for word in line.split()[:-1]}
    assert needed <= copied


def test_the_service_image_installs_no_torch_and_the_trainer_image_no_fastapi(stages: dict[str, Stage]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not [name for name in extras["service"] if name.startswith("torch")]
    assert not [name for name in extras["trainer"] if name.startswith(("fastapi", "sqlalchemy"))]
    assert [line for line in stages["service-build"].all("RUN") if "torch" in line.lower()] == []
    assert '".[service]"' in " ".join(stages["service-build"].all("RUN"))
    assert '".[trainer]"' in " ".join(stages["trainer-build"].all("RUN"))
    assert stages["service"].all("COPY") == ["--from=service-build /opt/engram /opt/engram"]
    assert stages["trainer"].all("COPY") == ["--from=trainer-build /opt/engram /opt/engram"]


def test_the_trainer_image_pins_the_torch_that_the_makefile_pins(stages: dict[str, Stage]) -> None:
    pinned = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned is not None
    assert stages["trainer-build"].all("ARG") == [f"TORCH={pinned[1]}"]


@pytest.mark.parametrize("name", ["service", "trainer"])
def test_no_image_runs_as_root(stages: dict[str, Stage], name: str) -> None:
    users = stages[name].all("USER")
    assert users
    assert users[-1] not in {"root", "0"}


def test_a_build_without_a_target_makes_the_service(stages: dict[str, Stage]) -> None:
    assert list(stages)[-1] == "service"


def test_the_healthcheck_asks_a_route_that_needs_no_token(stages: dict[str, Stage]) -> None:
    (line,) = stages["service"].all("HEALTHCHECK")
    path = re.search(r"\}(/\w+)", line)
    assert path is not None
    assert path[1] in OPEN_PATHS


def test_commands_are_scripts_of_the_distribution(stages: dict[str, Stage]) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name in ("service", "trainer"):
        (entry,) = stages[name].all("ENTRYPOINT")
        assert yaml.safe_load(entry)[0] in scripts


def test_environment_variables_of_the_service_are_settings(
    stages: dict[str, Stage], services: dict[str, dict[str, Any]]
) -> None:
    known = {f"ENGRAM_{name.upper()}" for name in Settings.model_fields}
    named = {key for key in environment(stages, "service") if key.startswith("ENGRAM_")}
    assert named | services["service"]["environment"].keys() <= known


def test_the_service_is_published_to_this_machine_only_and_demands_a_token(
    stages: dict[str, Stage], services: dict[str, dict[str, Any]]
) -> None:
    service = services["service"]
    port = environment(stages, "service")["ENGRAM_PORT"]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert service["environment"]["ENGRAM_ADMIN_TOKEN"].startswith("${ENGRAM_ADMIN_TOKEN:?")
    assert services["trainer"]["environment"]["ENGRAM_TOKEN"].startswith("${ENGRAM_ADMIN_TOKEN:?")
    assert services["trainer"]["environment"]["ENGRAM_URL"] == f"http://service:{port}"


def test_the_data_of_the_service_lies_in_a_volume(
    stages: dict[str, Stage], services: dict[str, dict[str, Any]]
) -> None:
    data = environment(stages, "service")["ENGRAM_DATA_DIR"]
    assert services["service"]["environment"]["ENGRAM_DATA_DIR"] == data
    assert services["service"]["volumes"] == [f"engram-data:{data}"]
    volumes = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["volumes"]
    assert {"engram-data", "engram-runs"} == set(volumes)


def test_the_trainer_waits_under_its_profile_for_a_healthy_service(services: dict[str, dict[str, Any]]) -> None:
    assert "profiles" not in services["service"]
    assert services["trainer"]["profiles"] == ["trainer"]
    assert services["trainer"]["depends_on"] == {"service": {"condition": "service_healthy"}}


@pytest.mark.parametrize("name", ["service", "trainer"])
def test_each_container_builds_its_own_target_without_privileges(
    stages: dict[str, Stage], services: dict[str, dict[str, Any]], name: str
) -> None:
    assert services[name]["build"] == {"context": ".", "target": name}
    assert name in stages
    assert services[name]["cap_drop"] == ["ALL"]
    assert services[name]["security_opt"] == ["no-new-privileges:true"]


def command(stages: dict[str, Stage]) -> list[str]:
    """The service's own entry point and command, by this interpreter."""
    assert yaml.safe_load(stages["service"].all("ENTRYPOINT")[0]) == ["engram-service"]
    return [sys.executable, "-m", "engram_service.cli", *yaml.safe_load(stages["service"].all("CMD")[0])]


def process_environment(stages: dict[str, Stage], services: dict[str, dict[str, Any]], **own: str) -> dict[str, str]:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("ENGRAM_")}
    composed = {**environment(stages, "service"), **services["service"]["environment"]}
    composed.pop("PATH", None)
    return {**plain, **composed, "PYTHONPATH": os.pathsep.join(sys.path), **own}


def test_on_the_composed_address_the_service_refuses_to_start_without_a_token(
    stages: dict[str, Stage], services: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    own = process_environment(stages, services, ENGRAM_DATA_DIR=str(tmp_path), ENGRAM_PORT="0", ENGRAM_ADMIN_TOKEN="")
    result = subprocess.run(
        command(stages), env=own, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode != 0
    assert "ENGRAM_ADMIN_TOKEN" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr


@pytest.fixture(scope="module")
def address(
    stages: dict[str, Stage], services: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The composed service as a process, with its token, on a free port of loopback instead of every address."""
    folder = tmp_path_factory.mktemp("composed")
    own = process_environment(
        stages,
        services,
        ENGRAM_HOST="127.0.0.1",
        ENGRAM_PORT="0",
        ENGRAM_DATA_DIR=str(folder / "data"),
        ENGRAM_ADMIN_TOKEN=TOKEN,
    )
    log = folder / "log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command(stages), env=own, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            # It says where it listens once it does; without a line it has ended.
            said = process.stdout.readline()
            assert said.startswith("Engram service on http://"), log.read_text()
            yield said.split()[-1]
        finally:
            process.terminate()


def test_the_healthcheck_finds_the_service_ready(stages: dict[str, Stage], address: str) -> None:
    check = yaml.safe_load(stages["service"].all("HEALTHCHECK")[0].partition("CMD ")[2])
    assert check[0] == "python"
    port = {"ENGRAM_PORT": address.rpartition(":")[2]}
    result = subprocess.run(
        [sys.executable, *check[1:]], env=os.environ | port, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_client_with_the_token_is_served_and_one_without_is_not(address: str) -> None:
    with Client(address, token=TOKEN) as client:
        assert client.create_buffer("composed", budget_bytes=100_000).used_bytes == 0
    with Client(address) as client, pytest.raises(Unauthorized):
        client.buffers()
