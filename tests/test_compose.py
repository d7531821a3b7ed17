"""Checks Dockerfile and docker-compose.yml without a Docker engine, and runs their topology as processes.

It reads both files, compares them with the settings, the routes and the folders they speak of, then starts what the
compose file starts (a service with a token, a client that has it) with the same commands and the same environment.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from engram.client import Client
from engram.errors import Unauthorized
from engram_service import cli
from engram_service.access import OPEN_PATHS
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


BUILDS = ("service-build", "trainer-build")


def copied_into(stages: dict[str, Stage], name: str) -> set[str]:
    return {word for stage in lineage(stages, name) for line in stage.all("COPY") for word in line.split()[:-1]}


@pytest.mark.parametrize("build", BUILDS)
def test_the_build_has_every_file_that_the_distribution_names(stages: dict[str, Stage], build: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {
        project["project"]["readme"],
        *project["project"]["license-files"],
        *(name.split("/")[0] for name in wheel["packages"]),
        *wheel["force-include"],
    }
    assert needed <= copied_into(stages, build)


@pytest.mark.parametrize("build", BUILDS)
def test_an_edit_of_the_source_installs_nothing_anew(stages: dict[str, Stage], build: str) -> None:
    """What comes from an index is installed in a stage that the source is not copied into."""
    (installing,) = stages[build].all("RUN")
    assert "pip install --no-cache-dir --no-deps ." in installing
    before = stages[build].base
    assert copied_into(stages, before) == {"pyproject.toml", "constraints.txt"}
    installs = [line for line in stages[before].all("RUN") if "pip install" in line]
    assert installs
    assert all(
        part.startswith(" --no-cache-dir --constraint constraints.txt")
        for line in installs
        for part in line.split("pip install")[1:]
    )


@pytest.mark.parametrize(
    ("image", "extras"), [("service", ["cli", "service", "postgres"]), ("trainer", ["cli", "trainer"])]
)
def test_an_image_installs_what_its_extras_need(
    stages: dict[str, Stage], image: str, extras: list[str], tmp_path: Path
) -> None:
    """The commands of the Dockerfile, less pip's, make the list of requirements."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (write,) = [line for line in stages["requirements"].all("RUN") if "requirements.py" in line]
    (run,) = stages[f"{image}-requirements"].all("RUN")
    listing = re.search(r"python requirements\.py [\w ]+> requirements\.txt", run)
    assert listing is not None
    commands = f"{write}\n{listing[0].replace('python', sys.executable, 1)}"
    subprocess.run(["sh", "-euc", commands], cwd=tmp_path, check=True, capture_output=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(each for name in extras for each in project["optional-dependencies"][name])]
    listed = (tmp_path / "requirements.txt").read_text().splitlines()
    assert listed == [each for each in needed if not each.startswith("engram[")]


def test_every_requirement_of_an_image_but_torch_is_pinned_to_a_version_that_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    extras = ("cli", "service", "postgres", "trainer")
    texts = [*project["dependencies"], *(each for name in extras for each in project["optional-dependencies"][name])]
    needed = [requirement for requirement in map(Requirement, texts) if requirement.name != "engram"]
    assert len(needed) > 20
    wrong = [
        str(requirement)
        for requirement in needed
        if requirement.name != "torch"
        and pinned.get(canonicalize_name(requirement.name), "0") not in requirement.specifier
    ]
    assert not wrong, "make constraints.txt anew: its first lines say how"
    assert "torch" not in pinned


def test_the_service_image_installs_no_torch_and_the_trainer_image_no_fastapi(stages: dict[str, Stage]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not [name for name in extras["service"] if name.startswith("torch")]
    assert not [name for name in extras["trainer"] if name.startswith(("fastapi", "sqlalchemy"))]
    for stage in lineage(stages, "service-build"):
        assert [line for line in stage.all("RUN") if "torch" in line.lower()] == []
    assert stages["service"].all("COPY") == ["--from=service-build /opt/engram /opt/engram"]
    assert stages["trainer"].all("COPY") == ["--from=trainer-build /opt/engram /opt/engram"]


def test_the_trainer_image_pins_the_torch_that_the_makefile_pins(stages: dict[str, Stage]) -> None:
    pinned = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned is not None
    assert stages["trainer-requirements"].all("ARG") == [f"TORCH={pinned[1]}", "PIP_EXTRA_INDEX_URL="]


def test_a_trainer_for_cpus_and_one_for_gpus_can_be_chosen(
    stages: dict[str, Stage], services: dict[str, dict[str, Any]]
) -> None:
    """Both are the same container; they differ in the build of PyTorch, the profile and the reservation."""
    cpu, gpu = services["trainer"], services["trainer-gpu"]
    (pinned, _) = stages["trainer-requirements"].all("ARG")
    assert cpu["build"]["args"]["TORCH"] == f"{pinned.partition('=')[2]}+cpu"
    assert cpu["build"]["args"]["PIP_EXTRA_INDEX_URL"].endswith("/cpu")
    assert "args" not in gpu["build"]
    assert (cpu["profiles"], gpu["profiles"]) == (["trainer"], ["gpu"])
    assert cpu["image"] != gpu["image"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert {name: gpu[name] for name in ("environment", "volumes", "cap_drop")} == {
        name: cpu[name] for name in ("environment", "volumes", "cap_drop")
    }
    assert "${ENGRAM_DATASETS:-./datasets}:/datasets:ro" in cpu["volumes"]


def test_the_command_inside_the_services_container_has_the_token(services: dict[str, dict[str, Any]]) -> None:
    """`docker compose exec service engram ...`: the variable that the client reads, with the value of the service's."""
    environment = services["service"]["environment"]
    assert environment["ENGRAM_TOKEN"] == "${ENGRAM_ADMIN_TOKEN}"


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
    assert named | services["service"]["environment"].keys() - {"ENGRAM_TOKEN"} <= known


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
    assert {"engram-data", "engram-runs", "prometheus-data", "grafana-data"} == set(volumes)


def test_the_trainer_waits_under_its_profile_for_a_healthy_service(services: dict[str, dict[str, Any]]) -> None:
    assert "profiles" not in services["service"]
    assert services["trainer"]["profiles"] == ["trainer"]
    for name in ("trainer", "trainer-gpu"):
        assert services[name]["depends_on"] == {"service": {"condition": "service_healthy"}}


@pytest.mark.parametrize("name", ["service", "trainer", "trainer-gpu"])
def test_each_container_builds_its_own_target_without_privileges(
    stages: dict[str, Stage], services: dict[str, dict[str, Any]], name: str
) -> None:
    target = name.removesuffix("-gpu")
    assert (services[name]["build"]["context"], services[name]["build"]["target"]) == (".", target)
    assert target in stages
    assert services[name]["cap_drop"] == ["ALL"]
    assert services[name]["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_monitoring_is_pinned_without_privileges_and_for_this_machine_only(
    services: dict[str, dict[str, Any]], name: str
) -> None:
    container = services[name]
    assert container["profiles"] == ["monitoring"]
    assert re.search(r":v?\d+\.\d+\.\d+$", container["image"])
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert container["read_only"] is True
    assert all(port.startswith("127.0.0.1:") for port in container["ports"])
    mounted = [volume.split(":") for volume in container["volumes"] if volume.startswith("./")]
    assert mounted
    assert all((ROOT / source).exists() and mode == "ro" for source, _, mode in mounted)


def test_prometheus_scrapes_the_composed_service_with_a_token_that_is_not_in_the_repository(
    stages: dict[str, Stage], services: dict[str, dict[str, Any]]
) -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"service:{environment(stages, 'service')['ENGRAM_PORT']}"]
    (secret,) = services["prometheus"]["secrets"]
    assert job["authorization"] == {"type": "Bearer", "credentials_file": f"/run/secrets/{secret}"}
    composed = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    path = composed["secrets"][secret]["file"].removeprefix("./")
    assert path in (ROOT / ".gitignore").read_text().splitlines()
    (flag,) = [each for each in services["prometheus"]["command"] if each.startswith("--config.file=")]
    inside = {volume.split(":")[1]: volume.split(":")[0] for volume in services["prometheus"]["volumes"]}
    assert inside[flag.partition("=")[2]] == "./deploy/prometheus/prometheus.yml"
    folder = str(Path(flag.partition("=")[2]).parent)
    assert all(f"{folder}/{rules}" in inside for rules in config["rule_files"])


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
    ended = CliRunner().invoke(cli.app, command(stages)[3:], env=own)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("engram-service: ")
    assert "ENGRAM_ADMIN_TOKEN" in ended.stderr


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


@pytest.mark.slow
def test_the_healthcheck_finds_the_service_ready(stages: dict[str, Stage], address: str) -> None:
    check = yaml.safe_load(stages["service"].all("HEALTHCHECK")[0].partition("CMD ")[2])
    assert check[0] == "python"
    port = {"ENGRAM_PORT": address.rpartition(":")[2]}
    result = subprocess.run(
        [sys.executable, *check[1:]], env=os.environ | port, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_client_with_the_token_is_served_and_one_without_is_not(address: str) -> None:
    with Client(address, token=TOKEN) as client:
        assert client.create_buffer("composed", budget_bytes=100_000).used_bytes == 0
    with Client(address) as client, pytest.raises(Unauthorized):
        client.buffers()
