"""A researcher's logits and boxes, as a user's process meets them: declared, uploaded, replayed, mirrored, removed."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from typer.testing import CliRunner

from engram import BadUpload, Client, Conflict, InvalidRequest, Mirror, NotFound, ReplayLoader
from engram.cli import app
from tests.contents import pictures
from tests.servers import ServiceProcess


def test_a_field_named_logits_touches_no_file_of_the_library(service: ServiceProcess, tmp_path: Path) -> None:
    name = f"logits-{uuid4().hex[:8]}"
    images, class_ids = pictures(5, 40), np.arange(40) % 4
    logits = np.random.default_rng(1).normal(size=(40, 10)).astype(np.float16)
    with Client(service.url) as client:
        client.create_buffer(name, budget_bytes=10**6, fields={"logits": "float16 [10]", "key": "utf8"})
        fields = {"logits": logits, "key": [f"image {row}" for row in range(40)]}
        client.wait(client.upload(name, 0, images, class_ids, fields=fields))
        batch = client.draw(name, 64, seed=1)
        rows = [int(str(key).split()[1]) for key in batch.fields["key"]]
        assert np.array_equal(batch.fields["logits"], logits[rows])

        mirror = Mirror(client, name, tmp_path / "mirror")
        assert np.array_equal(mirror.draw(64, seed=1).fields["logits"], batch.fields["logits"])
        with ReplayLoader(mirror, 64, seed=1, start_step=0, steps=1) as loader:
            assert np.array_equal(next(loader).fields["logits"], batch.fields["logits"])

        tar = tmp_path / "all.tar"
        client.export(name, tar)
        client.create_buffer(f"{name}-2", budget_bytes=10**6, fields={"logits": "float16 [10]", "key": "utf8"})
        client.wait(client.upload_tar(f"{name}-2", 0, tar))
        copies = client.draw(f"{name}-2", 64)
        rows = [int(str(key).split()[1]) for key in copies.fields["key"]]
        assert np.array_equal(copies.fields["logits"], logits[rows])


def test_exemplars_leave_draws_and_mirrors_with_the_generation_that_removes_them(
    service: ServiceProcess, tmp_path: Path
) -> None:
    name = f"remove-{uuid4().hex[:8]}"
    with Client(service.url) as client:
        client.create_buffer(name, budget_bytes=10**6, fields={"key": "utf8", "weight": "float32 finite"})
        fields = {"key": [f"k{row}" for row in range(20)], "weight": np.arange(20)}
        client.wait(client.upload(name, 0, pictures(5, 20), np.arange(20) % 2, fields=fields))
        mirror = Mirror(client, name, tmp_path / "mirror")
        assert client.remove(name, key="k3").exemplars == 19
        (found,) = [each for each in client.exemplars(name) if each.key == "k4"]
        assert client.exemplar_fields(name, found.pack, found.row) == {"key": "k4", "weight": 4}
        assert client.relabel(name, 7, exemplar=(found.pack, found.row)).classes == [0, 1, 7]
        assert mirror.refresh()
        for batch in (client.draw(name, 200), mirror.draw(200)):
            assert {*map(str, batch.fields["key"])} == {f"k{row}" for row in range(20)} - {"k3"}
            assert {str(key) for key, c in zip(batch.fields["key"], batch.class_ids, strict=True) if c == 7} == {"k4"}
        with pytest.raises(NotFound, match="'k3'"):
            client.remove(name, key="k3")
        with pytest.raises(InvalidRequest, match="class id or key"):
            client.remove(name, task=0)
        with pytest.raises(InvalidRequest, match="by its pack and row"):
            client.remove(name, task=0, exemplar=(found.pack, 0))
        with pytest.raises(InvalidRequest, match="class id -1"):
            client.relabel(name, -1, key="k4")
        with pytest.raises(Conflict, match="generation 3"):
            client.relabel(name, 1, key="k4", generation=2)


def test_many_keys_are_removed_in_few_requests_and_those_that_nothing_has_are_passed_over(
    service: ServiceProcess,
) -> None:
    name = f"keys-{uuid4().hex[:8]}"
    keys = [f"t3-e07-r{row:06d}/\N{SNOWMAN}" for row in range(900)]
    with Client(service.url) as client:
        client.create_buffer(name, budget_bytes=10**7, fields={"key": "utf8"})
        client.wait(
            client.upload(name, 0, pictures(5, 450).repeat(2, axis=0), np.arange(900) % 2, fields={"key": keys})
        )
        assert client.remove(name, keys=["gone", keys[5], keys[7]], generation=1).generation == 2
        left = client.remove(name, keys=[*keys[:800], "gone", *keys[:3]])
        assert (left.exemplars, left.generation - 2) == (100, 4)
        assert {found.key for found in client.exemplars(name)} == {*keys[800:]}
        assert client.remove(name, key=keys[800], keys=[keys[801]], generation=left.generation).exemplars == 98
        with pytest.raises(NotFound, match="any of 2 keys"):
            client.remove(name, keys=keys[:2])
        for wrong, says in (([], "there are no keys"), (keys[900:], "name at least one")):
            with pytest.raises(InvalidRequest, match=says):
                client.remove(name, keys=wrong)
        with pytest.raises(ValueError, match=r"as in keys=\['k'\]; one is given as key='k'"):
            client.remove(name, keys="k")


def test_what_is_wrong_with_fields_is_said_where_it_is_noticed(service: ServiceProcess) -> None:
    name = f"wrong-{uuid4().hex[:8]}"
    images, class_ids = pictures(5, 4), [0, 1, 0, 1]
    with Client(service.url) as client:
        with pytest.raises(InvalidRequest, match="float17"):
            client.create_buffer(name, budget_bytes=10**6, fields={"logits": "float17"})
        client.create_buffer(name, budget_bytes=10**6, fields={"logits": "float16 [3]"})
        client.create_buffer(name, budget_bytes=10**6, fields={"logits": "float16[3]"}, exist_ok=True)
        with pytest.raises(Conflict, match="fields"):
            client.create_buffer(name, budget_bytes=10**6, exist_ok=True)
        with pytest.raises(ValueError, match="3 values for 4 images"):
            client.upload(name, 0, images, class_ids, fields={"logits": np.zeros((3, 3))})
        for fields, says in (
            (None, "no field 'logits'"),
            ({"logits": np.zeros((4, 2))}, r"float64 \[2\], the buffer declares float16 \[3\]"),
            ({"logits": np.zeros((4, 3)), "more": [1] * 4}, "'more', the buffer declares logits"),
        ):
            with pytest.raises(BadUpload, match=says):
                client.wait(client.upload(name, 0, images, class_ids, fields=fields))


def test_the_command_declares_fields_and_removes_and_relabels(service: ServiceProcess) -> None:
    name = f"command-{uuid4().hex[:8]}"

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["--url", service.url, *arguments])
        return f"{result.exit_code} {result.output}"

    assert run("create", name, "--budget", "1MB", "--field", "key=utf8", "--field", "w = float32 finite").startswith(
        "0 "
    )
    assert "field w: float32 finite" in run("show", name)
    assert "NAME=TYPE" in run("create", f"{name}-2", "--budget", "1MB", "--field", "utf8")
    with Client(service.url) as client:
        fields = {"key": list("abcdef"), "w": [0.5] * 6}
        client.wait(client.upload(name, 0, pictures(5, 6), [0, 1] * 3, fields=fields))
        assert "holds 5 exemplars as generation 2" in run("remove", name, "--key", "b", "--yes")
        assert "holds 5 exemplars as generation 3" in run("relabel", name, "4", "--class", "0", "--task", "0")
        (first, *_) = client.exemplars(name)
        assert "holds 4 exemplars" in run("remove", name, "--pack", first.pack, "--row", "0", "-y")
        assert run("remove", name, "--row", "0", "-y").startswith("1 error: one exemplar is named by --pack and --row")
        assert run("remove", name, "--key", "b", "-y").startswith("1 error: there is no exemplar of key 'b'")
        assert client.buffer(name).classes == [1, 4]
