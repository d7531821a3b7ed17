"""What deploy/ asks Prometheus for are series that a service has, with labels that they have."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from engram_service.settings import Settings
from tests.contents import create, pictures
from tests.servers import ServiceThread
from tests.uploads import queue, tar_of_arrays, work_through

DEPLOY = Path(__file__).parent.parent / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/engram.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]

FUNCTIONS = {"rate", "increase", "histogram_quantile", "predict_linear", "topk", "sum", "min", "max"}
WORDS = {"and", "or", "unless", "on", "by"}
OF_PROMETHEUS = {"up": {"job", "instance"}}
TARGET_LABELS = {"job", "instance"}
"""What Prometheus adds to every series."""

SELECTOR = re.compile(r'([a-zA-Z_:][\w:]*)\s*(?:\{((?:[^{}"]|"[^"]*")*)\})?')
MATCHER = re.compile(r'\s*([a-z_]+)\s*(?:=~|!~|!=|=)\s*"[^"]*"\s*,?')


def expressions() -> list[str]:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return sorted({*queries, *(rule["expr"] for rule in RULES)})


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each series that an expression reads, and the labels that it is chosen by."""
    bare = re.sub(r"\[[^\]]*\]", "", expression)
    bare = re.sub(r"\b(by|on)\s*\([^)]*\)", "", bare)
    for match in SELECTOR.finditer(bare):
        name, labels = match[1], match[2] or ""
        if name in WORDS | FUNCTIONS or bare[: match.start()].endswith(tuple("0123456789.")):
            continue
        rest = MATCHER.sub("", labels)
        assert not rest.strip(), f"{expression}: {rest!r} is no matcher"
        yield name, set(re.findall(r'([a-z_]+)\s*(?:=~|!~|!=|=)\s*"', labels))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> dict[str, set[str]]:
    """The names of a service's series, each with its labels, after something has happened in it."""
    service = ServiceThread(Settings(data_dir=shutil.copytree(migrated, tmp_path_factory.mktemp("deploy") / "data")))
    try:
        create(service.state.database, quality=None)
        queue(service.state.database, service.settings, tar_of_arrays(pictures(3, 120), np.arange(120) % 2))
        queue(service.state.database, service.settings, b"no tar", task=1)
        work_through(service.state.database, service.state.store, service.settings)
        assert httpx.get(f"{service.url}/v1/buffers/b/draw?size=2").status_code == 200
        text = httpx.get(f"{service.url}/metrics").text
    finally:
        service.stop()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_reads_series_that_exist_by_labels_that_they_have(
    series: dict[str, set[str]], expression: str
) -> None:
    assert expression.count("(") == expression.count(")")
    read = [*selectors(expression)]
    assert read
    known: set[str] = set()
    for name, labels in read:
        has = OF_PROMETHEUS.get(name, series.get(name))
        assert has is not None, f"no service has {name}"
        assert labels <= has | TARGET_LABELS, f"{name} has the labels {sorted(has)}"
        known |= has | TARGET_LABELS
    for grouped in re.findall(r"\bby\s*\(([^)]*)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= known
    for function in re.findall(r"([a-z_]+)\s*\(", expression):
        assert function in FUNCTIONS | WORDS


def test_the_test_would_find_a_name_that_does_not_exist() -> None:
    found = dict(selectors('max by (le) (rate(engram_x{a="{b}",c=~"d"}[5m])) / 3e2 > up and on (x) y'))
    assert found == {"engram_x": {"a", "c"}, "up": set(), "y": set()}


def test_every_series_of_ours_but_the_details_is_on_the_dashboard(series: dict[str, set[str]]) -> None:
    shown = {name for expression in expressions() for name, _ in selectors(expression)}
    ours = {name for name in series if name.startswith("engram_")}
    assert ours - shown <= {
        *(name for name in ours if name.endswith(("_sum", "_count"))),
        "engram_scrape_seconds",
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_it_means(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert rule["annotations"]["summary"]
    used = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    aggregated = re.findall(r"\bby\s*\(([^)]*)\)", rule["expr"])
    if used and re.match(r"\s*(max|min|sum)\s*\(", rule["expr"]):
        raise AssertionError(f"{rule['alert']} aggregates away {used}")
    for label in used:
        assert all(label in grouped for grouped in aggregated)


def test_panels_have_names_of_their_own_places_of_their_own_and_the_data_source_that_is_provisioned() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/engram.yml").read_text())["providers"]
    compose = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())["services"]["grafana"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in compose["volumes"]
