"""What operators do from a terminal: tokens, audit, disk, verification, retries, what would be otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner, Result

from engram import Client, amounts
from engram.cli import app
from engram.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unauthorized
from engram.schemas import Buffer, Ingest
from tests.client.conftest import Filled, Make
from tests.contents import create, fill, pictures
from tests.servers import ServiceThread, eventually
from tests.uploads import work_through

pytestmark = pytest.mark.slow

SECRET = "the-first-token"


def run(service: ServiceThread | str, *arguments: object, token: str | None = None, stdin: str | None = None) -> Result:
    url = service if isinstance(service, str) else service.url
    env = {"ENGRAM_URL": url, "ENGRAM_TOKEN": token, "COLUMNS": "200"}
    return CliRunner().invoke(app, [str(part) for part in arguments], env=env, input=stdin)


def ok(done: Result) -> str:
    assert done.exit_code == 0, (done.stdout, done.stderr, done.exception)
    return done.stdout


@pytest.fixture
def guarded(serve_thread: Callable[..., ServiceThread]) -> ServiceThread:
    """A service without worker that asks for tokens."""
    return serve_thread(admin_token=SECRET)


@pytest.fixture
def admin(guarded: ServiceThread) -> Iterator[Client]:
    with Client(guarded.url, token=SECRET) as client:
        yield client


def leaves(command: Any, *names: str) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, part in command.commands.items():
            yield from leaves(part, *names, name)
    else:
        yield " ".join(names), command


def test_every_command_answers_in_json_if_it_is_asked_to() -> None:
    found = dict(leaves(typer.main.get_command(app)))
    assert {"buffers", "verify", "token create", "login", "draw", "delete"} <= found.keys()
    assert not [name for name, part in found.items() if "--json" not in {o for p in part.params for o in p.opts}]
    # The token is in none of them: options are seen by every process of the machine.
    assert not [name for name, part in found.items() if any("--token" in p.opts for p in part.params)]


def test_without_a_token_one_is_told_where_to_put_it(guarded: ServiceThread) -> None:
    refused = run(guarded, "buffers")
    assert refused.exit_code == 1
    assert "ENGRAM_TOKEN" in refused.stderr
    assert "engram login" in refused.stderr


def test_the_secret_of_a_new_token_is_alone_on_standard_output(guarded: ServiceThread, admin: Client) -> None:
    made = run(
        guarded, "token", "create", "ci", "--scope", "write", "--prefix", "ci-", "--expires", "12h", token=SECRET
    )
    secret = ok(made).strip()
    assert (made.stdout, secret.startswith("engram_")) == (secret + "\n", True)
    assert "write on buffers named ci-*, until " in made.stderr
    assert secret not in made.stderr
    with Client(guarded.url, token=secret) as client:
        found = client.whoami()
        assert (found.who, found.scope, found.prefix) == ("ci", "write", "ci-")
        with pytest.raises(Forbidden):
            client.tokens()
    listed = ok(run(guarded, "token", "list", token=SECRET))
    assert secret not in listed
    (line,) = [line.split() for line in listed.splitlines() if " ci " in line]
    token_id = line[0]
    assert line[2:4] == ["write", "ci-*"]
    (known,) = admin.tokens()
    assert known.expires_at is not None
    assert 11 * 3600 < (known.expires_at - datetime.now(UTC)).total_seconds() < 13 * 3600
    assert run(guarded, "token", "revoke", token_id, token=SECRET, stdin="n\n").exit_code == 1
    assert (
        ok(run(guarded, "token", "revoke", token_id, "--yes", token=SECRET)) == f"token {token_id} of ci is revoked\n"
    )
    with Client(guarded.url, token=secret) as client, pytest.raises(Unauthorized):
        client.whoami()
    assert "revoked" in ok(run(guarded, "token", "list", token=SECRET))
    assert run(guarded, "token", "revoke", "nothing", "--yes", token=SECRET).exit_code == 1
    as_json = json.loads(ok(run(guarded, "token", "create", "j", "--json", token=SECRET)))
    assert as_json["token"].startswith("engram_")


def test_a_token_that_there_cannot_be_is_refused_before_anything_is_sent() -> None:
    client = Client("http://127.0.0.1:1", token="")
    with pytest.raises(InvalidRequest, match="name"):
        client.create_token("\n")
    with pytest.raises(InvalidRequest, match="prefix"):
        client.create_token("a", prefix="No Buffer")
    assert run("http://127.0.0.1:1", "token", "create", "a", "--expires", "soon").stderr == (
        "error: 'soon' is not a time like 90s, 15m, 12h, 30d or 4w\n"
    )


def test_times_have_units() -> None:
    assert [amounts.parse_s(text) for text in ("90s", "1.5m", "2h", "1d", "1w")] == [90, 90, 7200, 86400, 604800]
    for text in ("", "5", "d", "-1d", "1e3s", "1 month"):
        with pytest.raises(ValueError, match="is not a time"):
            amounts.parse_s(text)


def test_changes_are_listed_the_newest_first(guarded: ServiceThread, admin: Client) -> None:
    for name in ("one", "two"):
        admin.create_buffer(name, budget_bytes=1000)
    admin.delete_buffer("one")
    entries = list(admin.audit(page_size=1))
    assert [(each.action, each.buffer) for each in entries[:2]] == [("buffer.delete", "one"), ("buffer.create", "two")]
    assert [each.buffer for each in admin.audit(buffer="two")] == ["two"]
    assert list(admin.audit(who="nobody")) == []
    assert {each.action for each in admin.audit(action="buffer.create")} == {"buffer.create"}
    listed = ok(run(guarded, "audit", "--count", 1, token=SECRET)).splitlines()
    assert len(listed) == 2
    assert "buffer.delete" in listed[1]
    assert json.loads(ok(run(guarded, "audit", "--json", token=SECRET)))[0]["who"] == "admin"


def test_who_one_is_and_what_the_disk_holds_are_told(guarded: ServiceThread) -> None:
    assert ok(run(guarded, "whoami", token=SECRET)) == "admin, admin on all buffers\n"
    assert json.loads(ok(run(guarded, "whoami", "--json", token=SECRET)))["scope"] == "admin"
    assert "free" in ok(run(guarded, "disk", token=SECRET))
    assert json.loads(ok(run(guarded, "disk", "--json", token=SECRET)))["live_bytes"] == 0
    wrong = run(guarded, "whoami", token="engram_wrong")
    assert (wrong.exit_code, wrong.stderr.startswith("error: ")) == (1, True)


def test_what_was_drawn_is_listed(filled: Filled) -> None:
    filled.client.draw(filled.name, 8, seed=1)
    assert eventually(lambda: any(filled.client.draws(buffer=filled.name)))
    rows = [line.split() for line in ok(run(filled.client.url, "draws", filled.name)).splitlines()]
    assert rows[1][:2] == [filled.name, "local"]
    assert json.loads(ok(run(filled.client.url, "draws", filled.name, "--who", "nobody", "--json"))) == []


def test_everything_that_is_stored_is_verified(filled: Filled) -> None:
    assert ok(run(filled.client.url, "verify", filled.name)) == "3 packs of 72 exemplars, 0 faults\n"


def test_what_is_damaged_is_named_and_the_exit_code_says_so(served: ServiceThread) -> None:
    database = served.state.database
    for name in ("a", "b"):
        create(database, name)
    fill(database, served.settings, 0, {0: 12}, name="a")
    fill(database, served.settings, 1, {1: 12}, name="b")
    with Client(served.url) as client:
        (entry,) = client.manifest("b").packs
    path = served.state.store.path(entry.digest)
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    found = run(served, "verify")
    assert found.exit_code == 1
    assert f"b task 1, pack {entry.digest}: " in found.stdout
    assert found.stdout.endswith("2 packs of 24 exemplars, 1 faults\n")
    said = json.loads(run(served, "verify", "--json").stdout)
    assert (said["packs"], len(said["faults"])) == (2, 1)
    assert run(served, "verify", "a").exit_code == 0
    assert run(served, "verify", "none").exit_code == 1


def test_a_failed_ingest_is_tried_again(served: ServiceThread, connect: Make) -> None:
    client, state = connect(served.url), served.state
    client.create_buffer("b", budget_bytes=30, quality=50)
    sent = client.upload("b", 0, pictures(0, 4), [0, 1, 0, 1])
    work_through(state.database, state.store, served.settings)
    failed = client.ingest(sent)
    assert (failed.state, failed.can_retry) == ("failed", True)
    assert f"its upload is kept: engram retry {sent.id}" in ok(run(served, "ingest", sent.id))
    client.change_budget("b", 10_000)
    assert ok(run(served, "retry", sent.id)) == f"ingest {sent.id}: received\n"
    with pytest.raises(Conflict, match="is received"):
        client.retry(sent)
    work_through(state.database, state.store, served.settings)
    again = client.ingest(sent)
    assert (again.state, again.failures) == ("committed", [failed.problem])
    assert "before that: " in ok(run(served, "ingest", sent.id))
    with pytest.raises(NotFound):
        client.retry("none")


def test_an_older_service_says_nothing_of_retries() -> None:
    said = {
        "id": "i",
        "buffer": "b",
        "task": 0,
        "state": "failed",
        "images_total": 0,
        "images_done": 0,
        "attempts": 1,
        "body_bytes": 1,
        "body_sha256": "ab",
        "options": {},
        "problem": None,
        "generation": None,
        "created_at": "2026-01-01T00:00:00Z",
        "updated_at": "2026-01-01T00:00:00Z",
    }
    read = Ingest.model_validate(said)
    assert (read.can_retry, read.failures) == (False, [])


def test_exemplars_are_listed_and_counted_by_filters(filled: Filled) -> None:
    url = filled.client.url
    rows = [line.split() for line in ok(run(url, "exemplars", filled.name, "--task", 1, "--count", 30)).splitlines()]
    assert {row[2] for row in rows[1:]} == {"1"}
    assert len(rows) == 25
    found = list(filled.client.exemplars(filled.name, class_id=3, page_size=5))
    assert len(found) == 12
    middle = sorted(each.bytes for each in found)[6]
    large = list(filled.client.exemplars(filled.name, class_id=3, min_bytes=middle))
    assert {(each.pack, each.row) for each in large} == {(e.pack, e.row) for e in found if e.bytes >= middle}
    said = json.loads(ok(run(url, "exemplars", filled.name, "--class", 3, "--max-bytes", middle - 1, "--json")))
    assert len(said) == sum(each.bytes < middle for each in found)
    counted = filled.client.histogram(filled.name, "class", task=1)
    assert {bin.value: bin.exemplars for bin in counted.bins} == {2: 12, 3: 12}
    assert "24 of 24 exemplars" in ok(run(url, "histogram", filled.name, "class", "--task", 1))
    assert run(url, "exemplars", filled.name, "--where", "score:ge:1").exit_code == 1
    stored = filled.client.qualities(filled.name, found[0].pack, found[0].row)
    assert stored.stored.bytes == found[0].bytes
    lower = filled.client.exemplar_jpeg(filled.name, found[0].pack, found[0].row, quality=stored.lower[0].quality)
    assert lower.startswith(b"\xff\xd8")


def test_a_budget_is_tried_without_being_changed(filled: Filled) -> None:
    url, before = filled.client.url, filled.client.buffer(filled.name)
    half = before.used_bytes // 2
    then = filled.client.forecast(filled.name, budget_bytes=half)
    assert (then.exemplars, then.limit_bytes) == (72, half)
    assert 0 < then.exemplars_then < 72
    assert then.used_bytes_then <= half
    said = ok(run(url, "budget", filled.name, half, "--dry-run"))
    assert f"{then.exemplars_then} of 72 exemplars would stay" in said
    assert json.loads(ok(run(url, "forecast", filled.name, "--budget", half, "--json"))) == then.model_dump(mode="json")
    assert filled.client.buffer(filled.name) == before
    more = filled.client.forecast(filled.name, budget_bytes=before.used_bytes, new_classes=6)
    assert more.exemplars_then < 72


def test_another_decision_is_tried_without_being_made(engram_client: Client, name: str) -> None:
    engram_client.create_buffer(name, budget_bytes=20_000)
    images = pictures(0, 80)
    engram_client.wait(engram_client.upload(name, 0, images, [0] * 40 + [1] * 40))
    made = engram_client.task(name, 0).decision
    assert made is not None
    same = engram_client.decision(name, 0)
    assert (same.quality, same.epsilon, same.definition) == (made.quality, made.epsilon, made.definition)
    loose = engram_client.decision(name, 0, epsilon=100)
    assert loose.quality == min(each.quality for each in loose.candidates)
    said = ok(run(engram_client.url, "decision", name, 0, "--epsilon", 100))
    assert loose.says in said
    assert json.loads(ok(run(engram_client.url, "decision", name, 0, "--epsilon", 100, "--json")))["quality"] == 10
    mapped = engram_client.map(name, 0)
    assert (mapped.method, len(mapped.points)) == ("pca", min(2000, mapped.exemplars))


def test_snapshots_are_listed_apart(engram_client: Client, name: str) -> None:
    url = engram_client.url
    engram_client.create_buffer(name, budget_bytes=1000)
    ok(run(url, "fork", name, f"{name}-frozen", "--frozen"))
    names = [Buffer.model_validate(each).name for each in json.loads(ok(run(url, "snapshots", "--json")))]
    assert f"{name}-frozen" in names
    assert name not in names
    assert f"{name}-frozen" in ok(run(url, "snapshots", name))
    assert json.loads(ok(run(url, "snapshots", f"{name}-frozen", "--json"))) == []


def test_what_writes_files_or_deletes_says_so_in_json(engram_client: Client, filled: Filled, tmp_path: Path) -> None:
    url = engram_client.url
    drawn = json.loads(ok(run(url, "draw", filled.name, "--out", tmp_path / "d", "--size", 3, "--json")))
    assert sorted(drawn["files"]) == sorted(path.name for path in (tmp_path / "d").iterdir())
    exported = json.loads(ok(run(url, "export", filled.name, tmp_path / "all.tar", "--json")))
    assert exported["bytes"] == (tmp_path / "all.tar").stat().st_size
    engram_client.create_buffer("gone", budget_bytes=1000)
    gone = run(url, "delete", "gone", "--json", "--yes")
    assert json.loads(ok(gone)) == {"deleted": {"buffer": "gone", "task": None}}
    with pytest.raises(httpx.HTTPStatusError):
        httpx.get(f"{url}/v1/buffers/gone").raise_for_status()
