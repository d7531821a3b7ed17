"""Fuzz every route of a real service with schemathesis: `make fuzz`, or `python -m tests.fuzz --cases 5000`.

It ends with status 1 if an answer is a 5xx, if it has a status, a header or a body that the interface description does
not state, if the service takes what the description forbids or refuses what it allows, or if there were fewer cases.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from engram_trainer.local_service import environment, local_service
from tests.fuzz import memory

TOKEN = "of-the-fuzzer"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
SETTINGS = {
    "admin_token": TOKEN,
    "max_draw": memory.MAX_DRAW,
    "max_global_draw": memory.MAX_GLOBAL_DRAW,
    "max_wait_s": 0.05,
}

RULES = {
    "register_extractor": "the body is a model that can serve, and its digest is in the address",
    "create_buffer": "types of fields have a grammar, and sizes that a record can hold",
    "change_buffer": "something is changed; names of classes are printable and no numbers",
    "remove_exemplars": "a class or a key is named",
    "relabel_exemplars": "a class or a key is named",
    "list_exemplars": "filters name fields that there are, in a grammar",
    "read_histogram": "filters and what is counted name fields that there are",
    "read_exemplar": "the quality is below that of the exemplar",
    "read_map": "the method is one that is installed",
    "list_draws": "the cursor is `next` of a page",
    "create_token": "its name is not that of somebody without a token",
    "upload": "the body is a tar, of the digest that a header states",
}
"""Operations that may answer 422 to what their schema allows, and the rule that no schema can state."""

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
    "unsupported_method",
    "allow_header_conformance",
)


def main() -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fuzz every route of a service of our own.")
    parser.add_argument("--cases", type=int, default=20_000, help="requests, at least (default 20000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("more", nargs="*", help="passed on to schemathesis, after --")
    given = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        with local_service(folder / "service", **SETTINGS) as service:
            with httpx.Client(base_url=service.url, headers=HEADERS, timeout=60) as client:
                held = memory.fill(client)
            (folder / "schemathesis.toml").write_text(configuration(held))
            command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", "schemathesis.toml"]
            command += ["run", f"{service.url}/openapi.json", "--checks", ",".join(CHECKS), "--seed", str(given.seed)]
            command += ["--header", f"Authorization: {HEADERS['Authorization']}"]
            # A few routes have no parameters to vary; the phases of coverage and of sequences make 800 and more beside.
            with httpx.Client(base_url=service.url) as client:
                routes = sum(map(len, client.get("/openapi.json").json()["paths"].values()))
            per_route = -(-given.cases // (routes - 4))
            command += ["--max-examples", str(per_route), "--continue-on-failure", *given.more]
            tally = folder / "tally.json"
            ended = subprocess.run(
                command,
                cwd=folder,
                env=environment()
                | {
                    "FUZZ_URL": service.url,
                    "FUZZ_TOKEN": TOKEN,
                    "FUZZ_TALLY": str(tally),
                    "FUZZ_HELD": json.dumps(in_paths(held)),
                },
                check=False,
            )
            count = report(json.loads(tally.read_text())) if tally.exists() else 0
            if ended.returncode:
                print(f"the end of the service's log:\n{service.log.read_text(errors='replace')[-4000:]}")
    return ended.returncode or int(count < given.cases)


def in_paths(held: memory.Held) -> dict[str, list[str | int]]:
    """What there is, by the parameters of paths that name it."""
    return {
        "buffer": [memory.SOURCE, *memory.BUFFERS],
        "task": [*memory.TASKS],
        "pack": [*held.packs],
        "row": [0, 1, 2, 3],
        "sha256": [*held.packs, *held.extractors],
        "ingest_id": [*held.ingests],
    }


def configuration(held: memory.Held) -> str:
    """What schemathesis takes most values from, so that most requests name something that there is."""
    most, some, few = 0.9, 0.6, 0.3
    values: dict[str, tuple[list[str | int], float]] = {
        **{f"path.{name}": (known, most) for name, known in in_paths(held).items()},
        "query.buffer": ([memory.UPLOADED, *memory.BUFFERS], most),
        "query.size": ([1, 2, 7], some),
        "query.world_size": ([4, 8], some),
        "query.rank": ([0, 1, 3], some),
        "query.limit": ([1, 3, 100], some),
        "query.task": ([*memory.TASKS], some),
        "query.class_id": ([0, 1, 2, 3], some),
        "query.generation": ([1, 2], some),
        "query.of": (["class", "task", "bytes", "key"], most),
        "query.quality": ([1, 10, 25], most),
        "query.method": (["pca"], most),
        "query.extractor": ([*held.extractors], most),
        "query.cursor": (["0.0.0", "1.2.1"], some),
        "header.If-Match": (['"2"', "*", held.etag], few),
        "header.If-None-Match": (['"2"', "*", held.etag], few),
        "header.Accept": (["image/jpeg", "application/x-tar", "*/*"], some),
        "body.budget_bytes": ([5_000, 10**6], some),
    }
    lines = ['hooks = "tests.fuzz.hooks"', "[generation]", 'database = "none"', "no-shrink = true"]
    for name, (known, _) in values.items():
        lines += [f"[dictionaries.{json.dumps(name)}]", f"values = {json.dumps(known)}"]
    # Learning from answers takes longer than all the requests, and what there is to know stands here.
    lines += ["[phases.fuzzing]", "extra-data-sources = {responses = false}", "error-feedback = {enabled = false}"]
    lines.append("[parameters]")
    for name, (_, probability) in values.items():
        lines.append(f"{json.dumps(name)} = {{dictionary = {json.dumps(name)}, probability = {probability}}}")
    # 431 is the edge's, before any schema is looked at.
    refused = [400, 401, 403, 404, 405, 406, 409, 415, 422, 428, 429, 431, "5xx"]
    lines.append("[checks]")
    lines.append(f"negative_data_rejection.expected-statuses = {json.dumps([str(status) for status in refused])}")
    for operation in RULES:
        lines += ["[[operations]]", f"include-operation-id = {json.dumps(operation)}"]
        lines.append('checks.positive_data_acceptance.expected-statuses = ["2xx", "404", "409", "413", "422", "429"]')
    return "\n".join(lines) + "\n"


def report(tally: list[tuple[str, str, int, int]]) -> int:
    """Prints the answers of each route by status; returns how many there were."""
    rows: dict[tuple[str, str], Counter[int]] = {}
    for operation, mode, status, count in tally:
        rows.setdefault((operation, mode), Counter())[status] += count
    for (operation, mode), statuses in rows.items():
        print(
            f"{operation:62} {mode:9} " + "  ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
        )
    total = sum(count for *_, count in tally)
    print(f"{total} cases")
    return total


if __name__ == "__main__":
    sys.exit(main())
