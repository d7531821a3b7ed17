import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from engram import Client, tar
from engram.cli import app
from tests.client.conftest import Filled, Make
from tests.contents import pictures
from tests.models import model
from tests.servers import ServiceThread


def run(url: str, *arguments: object) -> Result:
    # Wide enough that no table is folded.
    return CliRunner().invoke(app, [str(part) for part in arguments], env={"ENGRAM_URL": url, "COLUMNS": "200"})


@pytest.fixture
def url(engram_client: Client) -> str:
    return engram_client.url


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


def test_a_buffer_is_created_listed_shown_and_deleted(url: str, name: str) -> None:
    made = run(url, "create", name, "--budget", "1.5kB", "--per", "class", "--share-by", "task")
    assert made.exit_code == 0, made.stderr
    assert made.stdout == f"buffer {name}: 1,500 bytes for each class, shared by task\n"
    assert name in run(url, "buffers").stdout
    shown = run(url, "show", name).stdout
    assert "budget 1,500 bytes for each class, shared by task, 4:2:0" in shown
    assert "no exemplars yet" in shown
    assert run(url, "create", name, "--budget", "1500").exit_code == 1
    again = run(url, "create", name, "--budget", "1500", "--per", "class", "--share-by", "task", "--exist-ok")
    assert again.exit_code == 0
    assert CliRunner().invoke(app, ["delete", name], input="n\n", env={"ENGRAM_URL": url}).exit_code == 1
    assert run(url, "delete", name, "--yes").stdout == f"buffer {name} is deleted\n"
    assert name not in run(url, "buffers").stdout


def test_a_buffer_of_another_quality_is_not_equal(filled: Filled) -> None:
    create = ("create", filled.name, "--budget", "1MB", "--exist-ok", "--quality")
    assert run(filled.client.url, *create, 60).exit_code == 0
    other = run(filled.client.url, *create, 61)
    assert other.exit_code == 1
    assert "quality 60 (asked: 61)" in other.stderr


def test_a_folder_is_uploaded_and_its_decision_shown(url: str, name: str, tmp_path: Path) -> None:
    for number, picture in enumerate(pictures(0, 12)):
        path = tmp_path / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)
    run(url, "create", name, "--budget", "100KB")
    done = run(url, "upload", name, 4, tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "committed as generation 1" in done.stdout
    assert "quality 90, provisional" in run(url, "show", name).stdout
    shown = run(url, "task", name, 4).stdout
    assert shown in done.stdout
    assert ["0", "6", "6"] in [line[:3] for line in words(shown)]
    rows = [line for line in words(shown) if line[0] in ("10", "25", "50", "75", "90") and line[1] == "12"]
    assert len(rows) == 5
    assert sum(line[-1] == "chosen" for line in rows) == 1


def test_a_tar_is_uploaded_without_waiting_and_then_waited_for(url: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(b"".join(tar.write(pictures(0, 6), [0, 1, 2] * 2)))
    run(url, "create", name, "--budget", "100KB", "--quality", 60)
    assert "quality 60, fixed" in run(url, "show", name).stdout
    sent = run(url, "upload", name, 0, tmp_path / "shard.tar", "--no-wait")
    assert sent.exit_code == 0, sent.stderr
    ingest = sent.stdout.split()[1].rstrip(":")
    assert "committed" in run(url, "ingest", ingest, "--wait").stdout
    assert "committed, 6 of 6 images, attempt 1" in run(url, "ingest", ingest).stdout
    assert "quality 60" in run(url, "task", name, 0).stdout
    assert run(url, "delete", name, "--task", 0, "--yes").exit_code == 0
    assert run(url, "task", name, 0).exit_code == 1


def test_a_folder_is_resized_on_the_way(url: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    Image.fromarray(pictures(0, 1)[0]).save(tmp_path / "only" / "a.png")
    run(url, "create", name, "--budget", "100KB")
    assert run(url, "upload", name, 0, tmp_path, "--resize", "8x24").exit_code == 0
    assert "images 8x24x3" in run(url, "show", name).stdout
    assert "'8' is not HEIGHTxWIDTH" in run(url, "upload", name, 0, tmp_path, "--resize", "8").stderr


def test_a_draw_is_written_as_pictures(filled: Filled, tmp_path: Path) -> None:
    done = run(filled.client.url, "draw", filled.name, "--out", tmp_path / "out", "--size", 6, "--seed", 3)
    assert done.exit_code == 0, done.stderr
    batch = filled.client.draw(filled.name, 6, seed=3)
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 6
    names = [f"{t:03d}-{c:04d}-{r:06d}.png" for t, c, r in zip(batch.tasks, batch.class_ids, batch.rows, strict=True)]
    assert [path.name for path in files] == sorted(names)
    with Image.open(tmp_path / "out" / names[0]) as picture:
        assert np.array_equal(np.asarray(picture), batch.images[0])


def test_an_export_is_written(filled: Filled, tmp_path: Path) -> None:
    assert run(filled.client.url, "export", filled.name, tmp_path / "all.tar").exit_code == 0
    with (tmp_path / "all.tar").open("rb") as stream:
        assert sum(1 for _ in tar.read(stream)) == 72


def test_an_ingest_is_cancelled(served: ServiceThread, connect: Make) -> None:
    client = connect(served.url)
    client.create_buffer("b", budget_bytes=1000)
    ingest = client.upload("b", 0, pictures(0, 2), [0, 1])
    assert run(served.url, "cancel", ingest.id).stdout == f"ingest {ingest.id}: cancelled\n"
    waited = run(served.url, "ingest", ingest.id, "--wait")
    assert (waited.exit_code, waited.stderr) == (1, f"error: ingest {ingest.id} was cancelled\n")


def test_a_budget_is_changed(url: str, name: str) -> None:
    run(url, "create", name, "--budget", "1TB")
    changed = run(url, "budget", name, "64KiB")
    assert changed.stdout == f"buffer {name}: 65,536 bytes, shared by class, 0 exemplars kept\n", changed.stderr
    assert "budget 65,536 bytes" in run(url, "show", name).stdout
    assert "'1,000' is not an amount of bytes" in run(url, "budget", name, "1,000").stderr


def test_ingests_are_listed_the_newest_first(served: ServiceThread, connect: Make) -> None:
    client = connect(served.url)
    for name in ("a", "b"):
        client.create_buffer(name, budget_bytes=1000)
    sent = [client.upload("ab"[number % 2], number, pictures(number, 1), [0]).id for number in range(5)]
    assert [each.id for each in client.ingests(page_size=2)] == sent[::-1]
    assert [each.id for each in client.ingests("b")] == [sent[3], sent[1]]
    rows = words(run(served.url, "ingests", "--count", 3).stdout)
    assert rows[0][:4] == ["ingest", "buffer", "task", "state"]
    assert [row[:4] for row in rows[1:]] == [[sent[n], "ab"[n % 2], str(n), "received"] for n in (4, 3, 2)]
    assert len(json.loads(run(served.url, "ingests", "a", "--json").stdout)) == 3
    assert "no buffer 'c'" in run(served.url, "ingests", "c").stderr


def test_extractors_are_listed(engram_client: Client, url: str) -> None:
    made = engram_client.register_extractor(model(seed=28))
    rows = words(run(url, "extractors").stdout)
    assert rows[0] == ["extractor", "input", "dimensions", "bytes", "created"]
    assert [made.sha256, "anyx3xanyxany"] in [row[:2] for row in rows]
    assert made.sha256 in [row["sha256"] for row in json.loads(run(url, "extractors", "--json").stdout)]


def test_what_is_piped_has_its_full_names(url: str) -> None:
    name = "n" * 63
    run(url, "create", name, "--budget", "1MB")
    piped = CliRunner().invoke(app, ["buffers"], env={"ENGRAM_URL": url, "COLUMNS": "40"})
    assert name in piped.stdout.split()
    run(url, "delete", name, "--yes")


def test_every_answer_is_json_too(filled: Filled, name: str) -> None:
    url, client = filled.client.url, filled.client

    def said(*arguments: object) -> Any:
        done = run(url, *arguments, "--json")
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    assert said("show", filled.name) == client.buffer(filled.name).model_dump(mode="json")
    assert said("task", filled.name, 1) == client.task(filled.name, 1).model_dump(mode="json")
    assert filled.name in [buffer["name"] for buffer in said("buffers")]
    assert said("health")["status"] == "ok"
    assert said("create", name, "--budget", "1MB")["budget_bytes"] == 10**6
    assert said("budget", name, "2MB")["budget_bytes"] == 2 * 10**6
    assert said("fork", name, f"{name}-s", "--frozen")["is_frozen"]
    assert said("rename", name, "3=cat")["class_names"] == {"3": "cat"}


def test_the_same_images_are_the_same_upload_until_something_is_new(url: str, name: str, tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    shard.write_bytes(b"".join(tar.write(pictures(0, 6), [0, 1, 2] * 2)))
    run(url, "create", name, "--budget", "100KB", "--quality", 60)

    def upload(*arguments: object) -> str:
        done = run(url, "upload", name, 0, *arguments)
        assert done.exit_code == 0, done.stderr
        rows = words(run(url, "show", name).stdout)
        return f"{rows[-1][1]} exemplars" + (", again" if "were uploaded before" in done.stderr else "")

    assert upload(shard) == "6 exemplars"
    assert upload(shard) == "6 exemplars, again"
    shutil.copy(shard, tmp_path / "copy.tar")
    assert upload(tmp_path / "copy.tar") == "6 exemplars, again"
    assert upload(shard, "--again") == "12 exemplars"
    assert upload(shard, "--seed", 1) == "18 exemplars"
    folder = tmp_path / "folder"
    (folder / "7").mkdir(parents=True)
    Image.fromarray(pictures(1, 1)[0]).save(folder / "7" / "a.png")
    assert upload(folder) == "19 exemplars"
    assert upload(folder) == "19 exemplars, again"
    assert run(url, "delete", name, "--task", 0, "--yes").exit_code == 0
    assert upload(shard) == "6 exemplars"


def test_an_upload_that_failed_is_tried_again_when_the_budget_was_raised(url: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(b"".join(tar.write(pictures(0, 6), [0] * 6)))
    run(url, "create", name, "--budget", "20")
    assert "not one exemplar fits" in run(url, "upload", name, 0, tmp_path / "shard.tar").stderr
    run(url, "budget", name, "100KB")
    assert run(url, "upload", name, 0, tmp_path / "shard.tar").exit_code == 0


def test_where_nothing_could_be_compared_no_candidate_failed(url: str, name: str, tmp_path: Path) -> None:
    """A class of one image has no block to compare."""
    (tmp_path / "shard.tar").write_bytes(b"".join(tar.write(pictures(0, 2), [0, 1])))
    run(url, "create", name, "--budget", "100KB")
    shown = words(run(url, "upload", name, 0, tmp_path / "shard.tar").stdout)
    rows = [line for line in shown if line[0] in ("10", "25", "50", "75", "90") and line[1] == "2"]
    assert [line[3:8] for line in rows] == [["-"] * 5] * 5


def test_a_fixed_quality_is_said_to_be_the_buffers(url: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(b"".join(tar.write(pictures(0, 6), [0, 1, 2] * 2)))
    run(url, "create", name, "--budget", "100KB", "--quality", 75)
    shown = run(url, "upload", name, 0, tmp_path / "shard.tar").stdout
    assert "this quality was fixed with the buffer" in shown
    assert "passes" not in shown


def test_health_is_told(url: str) -> None:
    assert run(url, "health").stdout.startswith("ok, engram ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "no-such-buffer"], "no-such-buffer"),
        (["create", "Upper", "--budget", "1"], "name"),
        (["create", "x", "--budget", "much"], "'much' is not an amount of bytes"),
        (["upload", "no-such-buffer", "0", ".", "--epsilon", "0"], "epsilon"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(url: str, arguments: list[str], message: str) -> None:
    failed = run(url, *arguments)
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    assert message in failed.stderr


def test_a_service_that_is_not_there_is_one_line_too() -> None:
    failed = run("http://127.0.0.1:1", "buffers")
    assert failed.exit_code == 1
    assert "is it running?" in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_names_are_shown_and_changed_and_a_buffer_is_forked(engram_client: Client, url: str, name: str) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    engram_client.wait(engram_client.upload(name, 0, pictures(0, 10), [f"kind {n}" for n in range(10)]))
    assert words(run(url, "show", name).stdout)[-1][4:] == (
        [
            "kind",
            "0,",
            "kind",
            "1,",
            "kind",
            "2,",
            "kind",
            "3,",
            "kind",
            "4,",
            "kind",
            "5,",
            "kind",
            "6,",
            "kind",
            "7",
            "and",
            "2",
            "more",
        ]
    )
    renamed = run(url, "rename", name, "0=[red]", "11=not yet seen")
    assert words(renamed.stdout)[0] == ["0:", "[red]"]
    assert words(renamed.stdout)[-1] == ["11:", "not", "yet", "seen"]
    assert words(run(url, "task", name, "0").stdout)[2][-1] == "[red]"
    taken = run(url, "rename", name, "3=kind 4")
    assert taken.exit_code == 1
    assert "class 3 cannot be named 'kind 4': that is the name of class 4" in taken.stderr
    assert "is not ID=NAME" in run(url, "rename", name, "cat").stderr
    made = run(url, "fork", name, f"{name}-s", "--budget", "5kB", "--frozen")
    assert made.stdout.startswith(f"snapshot {name}-s: generation 2 of {name}, "), made.stderr
    assert "frozen" in run(url, "show", f"{name}-s").stdout
    refused = run(url, "delete", f"{name}-s", "--task", "0", "--yes")
    assert refused.exit_code == 1
    assert "frozen" in refused.stderr
    assert run(url, "delete", f"{name}-s", "--yes").exit_code == 0
