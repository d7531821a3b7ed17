import hashlib
import io
import json
import random
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

import engram
from engram import Client, Ingest, IngestOptions, errors, pack, strip, tar
from engram.images import decode
from tests import contents
from tests.client.conftest import Filled, Make, send
from tests.client.faults import faulty
from tests.contents import UInt8Array, pictures
from tests.servers import ServiceThread


def test_the_public_names_exist_and_are_sorted() -> None:
    assert sorted(engram.__all__) == engram.__all__
    assert all(hasattr(engram, name) for name in engram.__all__)
    assert all(getattr(engram, kind.__name__) is kind for kind in errors.ERRORS.values())


# Buffers and tasks


def test_a_buffer_lives_from_creation_to_deletion(engram_client: Client, name: str) -> None:
    made = engram_client.create_buffer(
        name, budget_bytes=5000, per="class", share_by="task", subsampling="4:4:4", quality=40
    )
    assert (made.budget_bytes, made.per, made.share_by, made.subsampling) == (5000, "class", "task", "4:4:4")
    assert (made.quality, made.quality_is) == (40, "fixed")
    assert engram_client.buffer(name) == made
    assert made in engram_client.buffers()
    assert engram_client.change_budget(name, 7000).budget_bytes == 7000
    engram_client.delete_buffer(name)
    with pytest.raises(engram.NotFound, match=name):
        engram_client.buffer(name)


def test_creating_a_buffer_again_is_a_conflict_unless_it_is_the_same_and_may_exist(
    engram_client: Client, name: str
) -> None:
    made = engram_client.create_buffer(name, budget_bytes=5000)
    with pytest.raises(engram.Conflict):
        engram_client.create_buffer(name, budget_bytes=5000)
    assert engram_client.create_buffer(name, budget_bytes=5000, exist_ok=True) == made
    with pytest.raises(engram.Conflict, match=r"budget_bytes 5000 \(asked: 6000\)"):
        engram_client.create_buffer(name, budget_bytes=6000, exist_ok=True)


@pytest.mark.parametrize(("quality", "other"), [(40, 41), (40, None), (None, 90)])
def test_a_buffer_that_may_exist_must_have_the_same_quality_fixed_or_open(
    engram_client: Client, name: str, quality: int | None, other: int | None
) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6, quality=quality)
    send(engram_client, name, 0, [0, 1])
    stored = engram_client.buffer(name)
    assert (stored.quality, stored.quality_is) == ((40, "fixed") if quality else (90, "provisional"))
    assert engram_client.create_buffer(name, budget_bytes=10**6, quality=quality, exist_ok=True) == stored
    with pytest.raises(engram.Conflict, match=rf"quality {quality} \(asked: {other}\)"):
        engram_client.create_buffer(name, budget_bytes=10**6, quality=other, exist_ok=True)


@pytest.mark.parametrize(
    ("name", "budget_bytes", "quality"),
    [("Upper", 1, 50), ("a/b", 1, 50), ("", 1, 50), ("ok", 0, 50), ("ok", 1, 0), ("ok", 1, 101)],
)
def test_a_bad_definition_is_refused(engram_client: Client, name: str, budget_bytes: int, quality: int) -> None:
    with pytest.raises(engram.InvalidRequest):
        engram_client.create_buffer(name, budget_bytes=budget_bytes, quality=quality)


def test_a_budget_decided_on_an_old_generation_is_a_conflict(engram_client: Client, name: str) -> None:
    engram_client.create_buffer(name, budget_bytes=100_000)
    send(engram_client, name, 0, [0, 1])
    with pytest.raises(engram.Conflict):
        engram_client.change_budget(name, 50_000, generation=0)
    generation = engram_client.buffer(name).generation
    assert engram_client.change_budget(name, 50_000, generation=generation).budget_bytes == 50_000


def test_a_task_is_read_and_deleted(engram_client: Client, name: str) -> None:
    engram_client.create_buffer(name, budget_bytes=100_000)
    send(engram_client, name, 3, [7, 7, 9])
    task = engram_client.task(name, 3)
    assert [(row.class_id, row.seen, row.exemplars) for row in task.classes] == [(7, 2, 2), (9, 1, 1)]
    engram_client.delete_task(name, 3)
    with pytest.raises(engram.NotFound):
        engram_client.task(name, 3)


# Uploads


def test_what_is_drawn_is_what_was_uploaded_at_its_quality(filled: Filled) -> None:
    batch = filled.client.draw(filled.name, 72, strategy="epoch")
    assert len({(int(task), int(row)) for task, row in zip(batch.tasks, batch.rows, strict=True)}) == 72
    for task, images in filled.images.items():
        expected = strip.encode(images, filled.class_ids[task], quality=60).decode()
        sent = zip(filled.class_ids[task].tolist(), expected, strict=True)
        of_task = batch.tasks == task
        found = zip(batch.class_ids[of_task].tolist(), batch.images[of_task], strict=True)
        assert sorted((c, image.tobytes()) for c, image in found) == sorted((c, image.tobytes()) for c, image in sent)


def test_progress_counts_up_to_all_images(engram_client: Client, name: str) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    seen: list[Ingest] = []
    ingest = engram_client.upload(name, 0, pictures(0, 40), np.arange(40) % 4)
    assert (ingest.buffer, ingest.task, ingest.images_total) == (name, 0, ingest.images_total)
    done = engram_client.wait(ingest, progress=seen.append)
    assert seen[-1] == done
    assert (done.state, done.images_done, done.images_total) == ("committed", 40, 40)
    counts = [now.images_done for now in seen]
    assert counts == sorted(counts)
    assert engram_client.task(name, 0).decision is not None


def test_the_same_key_makes_a_repeated_upload_the_same_ingest(engram_client: Client, name: str) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    images = pictures(0, 4)
    first = engram_client.upload(name, 0, images, [0, 0, 1, 1], idempotency_key=f"key of {name}")
    again = engram_client.upload(name, 0, images, [0, 0, 1, 1], idempotency_key=f"key of {name}")
    assert again.id == first.id
    with pytest.raises(engram.Conflict):
        engram_client.upload(name, 0, images, [0, 0, 1, 2], idempotency_key=f"key of {name}")
    engram_client.wait(first)
    assert engram_client.buffer(name).exemplars == 4


def test_options_reach_the_service(engram_client: Client, name: str) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    options = IngestOptions(candidates=(20, 40), ranking="greedy_dpp", definition="log_ratio", epsilon=0.25, seed=3)
    ingest = engram_client.upload(name, 0, pictures(0, 4), [0, 0, 1, 1], options=options)
    assert ingest.options == options
    engram_client.wait(ingest)


def test_arrays_that_are_no_images_are_refused_before_anything_is_sent(engram_client: Client, name: str) -> None:
    with pytest.raises(ValueError, match="no images"):
        engram_client.upload(name, 0, pictures(0, 0), [])
    with pytest.raises(ValueError, match="class ids"):
        engram_client.upload(name, 0, pictures(0, 2), [0])


def save(path: Path, seed: int, size: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pictures(seed, 1, (size, size, 3))[0]).save(path)


def test_class_folders_get_ids_in_order_of_their_names(engram_client: Client, name: str, tmp_path: Path) -> None:
    for number, file in enumerate(["dog/a.png", "cat/b.png", "cat/deep/c.png", "cat/.hidden.png", ".git/d.png"]):
        save(tmp_path / file, number)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    engram_client.create_buffer(name, budget_bytes=10**6)
    engram_client.wait(engram_client.upload_folder(name, 0, tmp_path))
    assert [(row.class_id, row.seen) for row in engram_client.task(name, 0).classes] == [(0, 2), (1, 1)]


def test_class_folders_named_by_integers_are_their_ids(engram_client: Client, name: str, tmp_path: Path) -> None:
    save(tmp_path / "10" / "a.png", 0)
    save(tmp_path / "9" / "b.png", 1)
    engram_client.create_buffer(name, budget_bytes=10**6)
    engram_client.wait(engram_client.upload_folder(name, 0, str(tmp_path)))
    assert engram_client.buffer(name).classes == [9, 10]


def test_cat_and_dog_then_ship_and_truck_are_four_classes(engram_client: Client, name: str, tmp_path: Path) -> None:
    for number, kind in enumerate(("cat", "dog", "ship", "truck")):
        save(tmp_path / str(number // 2) / kind / "a.png", number)
    engram_client.create_buffer(name, budget_bytes=10**6)
    for task in range(2):
        engram_client.wait(engram_client.upload_folder(name, task, tmp_path / str(task)))
    engram_client.wait(engram_client.upload(name, 2, pictures(9, 3), ["truck", "ant", "cat"]))
    expected = {0: "cat", 1: "dog", 2: "ship", 3: "truck", 4: "ant"}
    assert engram_client.class_names(name) == engram_client.manifest(name).class_names == expected
    assert [row.name for row in engram_client.task(name, 2).classes] == ["cat", "truck", "ant"]
    assert set(engram_client.draw(name, 7).class_ids.tolist()) == {0, 1, 2, 3, 4}
    assert engram_client.rename_classes(name, {0: "dog", 1: "cat"}).class_names == expected | {0: "dog", 1: "cat"}
    with pytest.raises(engram.Conflict, match="class 4 cannot be named 'ship'"):
        engram_client.rename_classes(name, {4: "ship"})
    with pytest.raises(engram.InvalidRequest, match="number"):
        engram_client.rename_classes(name, {4: "4"})


def test_a_fork_goes_its_own_way_and_a_snapshot_none(engram_client: Client, name: str) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    send(engram_client, name, 0, [0, 1])
    snapshot = engram_client.fork(name, f"{name}-s", generation=1, frozen=True)
    fork = engram_client.fork(name, f"{name}-f", budget_bytes=5000)
    assert (snapshot.is_frozen, fork.is_frozen, fork.budget_bytes) == (True, False, 5000)
    send(engram_client, f"{name}-f", 1, [2, 3])
    assert engram_client.buffer(name).tasks == [0]
    with pytest.raises(engram.Conflict, match="frozen"):
        send(engram_client, f"{name}-s", 1, [2, 3])
    with pytest.raises(engram.InvalidRequest, match="name"):
        engram_client.fork(name, "No Name")


def test_a_folder_of_mixed_sizes_is_refused_unless_it_is_resized(
    engram_client: Client, name: str, tmp_path: Path
) -> None:
    save(tmp_path / "a" / "small.png", 0, 16)
    save(tmp_path / "a" / "large.png", 1, 40)
    Image.fromarray(pictures(2, 1, (20, 20, 1))[0, ..., 0]).save(tmp_path / "a" / "grey.png")
    engram_client.create_buffer(name, budget_bytes=10**6)
    with pytest.raises(engram.BadUpload):
        engram_client.wait(engram_client.upload_folder(name, 0, tmp_path))
    engram_client.wait(engram_client.upload_folder(name, 0, tmp_path, resize=(12, 24)))
    assert engram_client.buffer(name).image_shape == (12, 24, 3)


def test_a_folder_that_holds_no_classes_or_images_is_refused(engram_client: Client, name: str, tmp_path: Path) -> None:
    with pytest.raises(engram.BadUpload, match="not a folder"):
        engram_client.upload_folder(name, 0, tmp_path / "nowhere")
    with pytest.raises(engram.BadUpload, match="no class folders"):
        engram_client.upload_folder(name, 0, tmp_path)
    (tmp_path / "1").mkdir()
    with pytest.raises(engram.BadUpload, match="no class folder of"):
        engram_client.upload_folder(name, 0, tmp_path)
    (tmp_path / "01").mkdir()
    with pytest.raises(engram.BadUpload, match="same integer"):
        engram_client.upload_folder(name, 0, tmp_path)
    (tmp_path / "01").rmdir()
    (tmp_path / "1" / "a.png").write_bytes(b"no picture")
    with pytest.raises(engram.BadUpload, match=r"a\.png"):
        engram_client.upload_folder(name, 0, tmp_path, resize=(8, 8))


def test_a_tar_is_uploaded_from_a_file_and_from_a_stream(engram_client: Client, name: str, tmp_path: Path) -> None:
    data = b"".join(tar.write(pictures(0, 300, (32, 32, 3)), np.arange(300) % 2))
    (tmp_path / "shard.tar").write_bytes(data)
    engram_client.create_buffer(name, budget_bytes=10**6)
    sent: list[int] = []
    options = IngestOptions(ranking="random")
    ingest = engram_client.upload_tar(name, 0, tmp_path / "shard.tar", options=options, progress=sent.append)
    assert sent[-1] == len(data) == ingest.body_bytes
    engram_client.wait(ingest)
    engram_client.wait(engram_client.upload_tar(name, 1, io.BytesIO(data), options=options))
    engram_client.wait(engram_client.upload_tar(name, 2, lambda: iter([data[:700], data[700:]]), options=options))
    assert engram_client.task(name, 0).exemplars == engram_client.task(name, 1).exemplars == 300


def test_a_failed_ingest_raises_the_class_of_its_problem(engram_client: Client, name: str) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    data = tar.entry("a.ppm", b"P6\n4 4\n255\n") + tar.entry("a.cls", b"0") + tar.END
    with pytest.raises(engram.BadUpload, match="needs 48 bytes of pixels"):
        engram_client.wait(engram_client.upload_tar(name, 0, io.BytesIO(data)))
    assert engram_client.buffer(name).generation == 0


def test_a_budget_below_one_exemplar_raises_with_both_numbers(engram_client: Client, name: str) -> None:
    engram_client.create_buffer(name, budget_bytes=100)
    ingest = engram_client.upload(name, 0, pictures(0, 2), [0, 1])
    with pytest.raises(engram.BudgetExceeded, match="100") as caught:
        engram_client.wait(ingest)
    assert isinstance(caught.value, engram.Conflict)
    assert caught.value.details


def test_waiting_ends_by_timeout_or_by_cancelling(served: ServiceThread, connect: Make) -> None:
    client = connect(served.url)
    client.create_buffer("b", budget_bytes=10**6)
    ingest = client.upload("b", 0, pictures(0, 2), [0, 1])
    with pytest.raises(TimeoutError, match="still received"):
        client.wait(ingest, timeout_s=0.1)
    assert client.cancel(ingest).state == "cancelled"
    with pytest.raises(engram.Cancelled):
        client.wait(ingest.id)


# Replay


def test_a_draw_repeats_at_its_generation_and_another_step_differs(filled: Filled) -> None:
    first, again, other = (filled.client.draw(filled.name, 10, seed=5, step=step) for step in (1, 1, 2))
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.rows, again.rows)
    assert not np.array_equal(first.images, other.images)
    generation = filled.client.buffer(filled.name).generation
    pinned = filled.client.draw(filled.name, 10, seed=5, step=1, generation=generation)
    assert np.array_equal(first.images, pinned.images)


def test_filters_strategies_and_ranks_reach_the_service(filled: Filled) -> None:
    draw = filled.client.draw
    assert set(draw(filled.name, 8, tasks=[1]).tasks.tolist()) == {1}
    assert set(draw(filled.name, 8, exclude_tasks=[0, 2]).tasks.tolist()) == {1}
    assert np.bincount(draw(filled.name, 12, strategy="class_balanced").class_ids).tolist() == [2] * 6
    assert np.bincount(draw(filled.name, 4, strategy="per_task").tasks).tolist() == [4] * 3
    ranks = [draw(filled.name, 6, seed=1, rank=rank, world_size=3) for rank in range(3)]
    rows = [(task, row) for batch in ranks for task, row in zip(batch.tasks.tolist(), batch.rows.tolist(), strict=True)]
    assert len(set(rows)) == 18


def test_a_bad_draw_raises_what_the_service_says(filled: Filled, name: str) -> None:
    with pytest.raises(engram.InvalidRequest, match="size"):
        filled.client.draw(filled.name, 0)
    with pytest.raises(engram.InvalidRequest):
        filled.client.draw(filled.name, 10**6)
    with pytest.raises(engram.NotFound, match="task 9"):
        filled.client.draw(filled.name, 4, tasks=[9])
    with pytest.raises(engram.InvalidRequest, match="strategy"):
        filled.client.draw(filled.name, 4, strategy="all&size=3")  # type: ignore[arg-type]
    with pytest.raises(engram.NotFound):
        filled.client.draw(name, 4)
    filled.client.create_buffer(name, budget_bytes=1000)
    with pytest.raises(engram.Conflict):
        filled.client.draw(name, 4)


def test_packs_are_what_the_manifest_names(filled: Filled) -> None:
    manifest = filled.client.manifest(filled.name)
    assert [entry.task for entry in manifest.packs] == [0, 1, 2]
    for entry in manifest.packs:
        content = filled.client.pack(entry.digest)
        assert (len(content), pack.digest(content)) == (entry.bytes, entry.digest)
        assert len(pack.parse(content)) == entry.exemplars
    assert filled.client.manifest(filled.name, generation=1).generation == 1
    assert filled.client.manifest_after(filled.name, manifest) is None
    assert filled.client.manifest_after(filled.name, manifest.model_copy(update={"generation": 0})) == manifest


def test_a_pack_damaged_on_disk_is_recognised(served: ServiceThread, connect: Make) -> None:
    contents.create(served.state.database)
    contents.fill(served.state.database, served.settings, 0, {0: 2, 1: 2})
    client = connect(served.url)
    digest = client.manifest("b").packs[0].digest
    path = served.state.store.path(digest)
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    with pytest.raises(engram.StripCorrupt, match=digest):
        client.pack(digest)
    assert len(client.draw("b", 4, strategy="epoch")) == 3
    assert client.health().damaged_packs == [digest]


def test_exemplars_come_page_after_page(filled: Filled) -> None:
    every = list(filled.client.exemplars(filled.name, page_size=7))
    assert len(every) == 72
    assert every == list(filled.client.exemplars(filled.name))
    some = list(filled.client.exemplars(filled.name, task=1, class_id=3, page_size=5))
    assert [(one.task, one.class_id, one.rank) for one in some] == [(1, 3, rank) for rank in range(12)]


def test_one_exemplar_is_a_jpeg_with_the_pixels_of_the_draw(filled: Filled) -> None:
    one = next(filled.client.exemplars(filled.name, task=2, class_id=5))
    data = filled.client.exemplar_jpeg(filled.name, one.pack, one.row)
    batch = filled.client.draw(filled.name, 24, strategy="epoch", tasks=[2])
    with Image.open(io.BytesIO(data)) as picture:
        # Pillow upsamples colour smoothly where the draw replicates it, so their grey agrees.
        grey = np.asarray(picture.convert("L"), int)
    drawn = np.asarray(Image.fromarray(batch.images[batch.rows == one.row][0]).convert("L"), int)
    assert abs(grey - drawn).mean() < 4


def test_an_export_holds_every_exemplar(filled: Filled, tmp_path: Path) -> None:
    size = filled.client.export(filled.name, tmp_path / "all.tar")
    stream = io.BytesIO()
    assert filled.client.export(filled.name, stream) == size == (tmp_path / "all.tar").stat().st_size
    members = list(tar.read(io.BytesIO(stream.getvalue())))
    assert sorted(member.class_id for member in members) == sorted(np.concatenate(list(filled.class_ids.values())))
    assert decode(members[0].image, max_pixels=10_000, min_side=2).shape == (16, 16, 3)


def test_an_export_that_fails_leaves_no_file(filled: Filled, name: str, tmp_path: Path) -> None:
    with pytest.raises(engram.NotFound):
        filled.client.export(name, tmp_path / "all.tar")
    assert list(tmp_path.iterdir()) == []


# Extractors


def colours() -> bytes:
    """An ONNX model that embeds an image as its mean and its brightest colour."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 6])
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("GlobalMaxPool", ["image"], ["most"]),
        helper.make_node("Concat", ["mean", "most"], ["both"], axis=1),
        helper.make_node("Flatten", ["both"], ["features"]),
    ]
    graph = helper.make_graph(nodes, "colours", [image], [features])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    serialised: bytes = model.SerializeToString()
    return serialised


def test_an_extractor_is_registered_once_and_used(engram_client: Client, name: str, tmp_path: Path) -> None:
    model = colours()
    (tmp_path / "model.onnx").write_bytes(model)
    found = engram_client.register_extractor(model)
    assert found.sha256 == hashlib.sha256(model).hexdigest()
    assert found.dimensions == 6
    assert engram_client.register_extractor(tmp_path / "model.onnx") == found == engram_client.extractor(found.sha256)
    engram_client.create_buffer(name, budget_bytes=10**6)
    options = IngestOptions(extractor=found.sha256)
    engram_client.wait(engram_client.upload(name, 0, pictures(0, 8), np.arange(8) % 2, options=options))
    assert engram_client.buffer(name).exemplars == 8


@pytest.mark.slow
def test_an_extractor_that_is_no_model_is_refused(engram_client: Client) -> None:
    with pytest.raises(engram.BadExtractor):
        engram_client.register_extractor(b"no model")


# The network


def test_no_service_is_unavailable_and_says_what_to_do(connect: Make) -> None:
    with socket.socket() as bound:  # and not listening, so that the port is nobody else's meanwhile
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(engram.Unavailable, match=rf"{url}.*engram-service serve"):
            connect(url, retries=0).health()


@pytest.mark.parametrize("url", ["localhost:8077", "ftp://x", "http://"])
def test_an_address_that_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="not the URL of a service"):
        Client(url)


def test_the_environment_names_the_service_and_the_token(
    serve_thread: Make, connect: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve_thread(admin_token="secret")
    with pytest.raises(engram.Unauthorized):
        connect(service.url).buffers()
    with pytest.raises(engram.Unauthorized):
        connect(service.url, token="wrong").buffers()
    monkeypatch.setenv("ENGRAM_URL", service.url + "/")
    monkeypatch.setenv("ENGRAM_TOKEN", "secret")
    with Client() as client:
        assert client.buffers() == []


def test_a_token_that_would_break_the_header_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="token"):
        Client(token="a\r\nb")


@pytest.mark.parametrize("fault", ["busy", "limited", "hang up", "lose the answer", "cut the answer", "gateway"])
def test_a_read_is_tried_again(filled: Filled, connect: Make, fault: str) -> None:
    with faulty(filled.client.url, fault, fault) as proxy:  # type: ignore[arg-type]
        batch = connect(proxy.url).draw(filled.name, 8, seed=3)
        assert proxy.requests == 3
    assert np.array_equal(batch.images, filled.client.draw(filled.name, 8, seed=3).images)


@pytest.mark.parametrize("fault", ["busy", "hang up", "lose the answer", "cut the answer"])
def test_an_upload_is_tried_again_and_stays_one_ingest(
    engram_client: Client, connect: Make, name: str, tmp_path: Path, fault: str
) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    images = pictures(0, 6)
    (tmp_path / "shard.tar").write_bytes(b"".join(tar.write(images, [0] * 6)))
    options = IngestOptions(ranking="ring")
    with faulty(engram_client.url, fault, None, fault) as proxy:  # type: ignore[arg-type]
        client = connect(proxy.url)
        first = client.upload(name, 0, images, [0] * 6, options=options)
        second = client.upload_tar(name, 1, tmp_path / "shard.tar", options=options)
        assert proxy.requests == 4
    engram_client.wait(first)
    engram_client.wait(second)
    assert [row.seen for task in (0, 1) for row in engram_client.task(name, task).classes] == [6, 6]


def test_a_stream_that_cannot_be_sent_twice_is_not(engram_client: Client, connect: Make, name: str) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    stream = io.BytesIO(b"".join(tar.write(pictures(0, 2), [0, 1])))
    with faulty(engram_client.url, "hang up") as proxy:
        with pytest.raises(engram.Unavailable):
            connect(proxy.url).upload_tar(name, 0, stream)
        assert proxy.requests == 1


def test_what_is_not_idempotent_is_not_tried_again(engram_client: Client, connect: Make, name: str) -> None:
    with faulty(engram_client.url, "lose the answer") as proxy:
        with pytest.raises(engram.Unavailable):
            connect(proxy.url).create_buffer(name, budget_bytes=1000)
        assert proxy.requests == 1
    assert engram_client.buffer(name).budget_bytes == 1000


def test_retries_come_to_an_end(filled: Filled, connect: Make) -> None:
    with faulty(filled.client.url, "hang up", "hang up", "hang up", "hang up") as proxy:
        with pytest.raises(engram.Unavailable, match="broke"):
            connect(proxy.url, retries=2).buffers()
        assert proxy.requests == 3


def test_a_retry_after_is_waited_for_unless_it_is_too_long(filled: Filled, connect: Make) -> None:
    with faulty(filled.client.url, "limited", retry_after="1") as proxy:
        client = connect(proxy.url)
        before = time.monotonic()
        client.buffers()
        assert time.monotonic() - before >= 1
    with faulty(filled.client.url, "busy", retry_after="Fri, 31 Dec 2099 23:59:59 GMT") as proxy:
        with pytest.raises(engram.Unavailable) as caught:
            connect(proxy.url).buffers()
        assert caught.value.details["retry_after_s"] > 10**8
        assert proxy.requests == 1


def test_retries_leave_the_global_random_numbers_alone(filled: Filled, connect: Make) -> None:
    random.seed(1)
    before = random.getstate()
    with faulty(filled.client.url, "busy") as proxy:
        connect(proxy.url).buffers()
    assert random.getstate() == before


def test_one_client_serves_many_threads(filled: Filled) -> None:
    expected = [filled.client.draw(filled.name, 16, step=step).images for step in range(40)]
    found: dict[int, UInt8Array] = {}

    def draw(first: int) -> None:
        for step in range(first, 40, 8):
            found[step] = filled.client.draw(filled.name, 16, step=step).images

    threads = [threading.Thread(target=draw, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[step], expected[step]) for step in range(40))


def test_a_header_that_cannot_be_sent_is_the_callers_mistake_and_not_tried_again(filled: Filled, connect: Make) -> None:
    with faulty(filled.client.url) as proxy:
        with pytest.raises(engram.InvalidRequest, match="cannot be asked for"):
            connect(proxy.url).upload(filled.name, 9, pictures(0, 1), [0], idempotency_key="two\nlines")
        assert proxy.requests == 0


# Other versions

CALLS = {"draw": lambda client, buffer: client.draw(buffer, 4), "read": lambda client, buffer: client.buffer(buffer)}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("number", "says"),
    [
        ("", r"no Engram service, or one older than this client.*pip install --upgrade 'engram\[service\]'"),
        ("1", r"older than this client: it speaks API 1, the client 2.*'engram\[service\]'` there"),
        ("3", r"newer than this client: it speaks API 3, the client 2.*pip install --upgrade engram` here"),
    ],
)
def test_a_service_of_another_api_says_in_one_sentence_what_to_install(
    filled: Filled, connect: Make, call: str, number: str, says: str
) -> None:
    with faulty(filled.client.url) as proxy:
        proxy.api_number = number
        with pytest.raises(engram.EngramError, match=says) as caught:
            CALLS[call](connect(proxy.url), filled.name)
        assert type(caught.value) is engram.EngramError
        assert proxy.requests == 1


@pytest.mark.parametrize("call", CALLS)
def test_the_api_is_looked_at_once(filled: Filled, connect: Make, call: str) -> None:
    with faulty(filled.client.url) as proxy:
        client = connect(proxy.url)
        CALLS[call](client, filled.name)
        proxy.api_number = ""
        CALLS[call](client, filled.name)


def test_a_refusal_of_a_newer_service_says_that_it_is_newer(filled: Filled, connect: Make, name: str) -> None:
    with faulty(filled.client.url) as proxy:
        proxy.api_number = "3"
        with pytest.raises(engram.EngramError, match="newer"):
            connect(proxy.url).draw(name, 4)
        proxy.api_number = ""
        with pytest.raises(engram.NotFound):
            connect(proxy.url).draw(name, 4)


@pytest.mark.parametrize("call", CALLS)
def test_a_gateway_in_front_of_a_service_that_is_down_is_unavailable(filled: Filled, connect: Make, call: str) -> None:
    with faulty(filled.client.url, "gateway") as proxy, pytest.raises(engram.Unavailable, match="502: bad gateway"):
        CALLS[call](connect(proxy.url, retries=0), filled.name)


MAPS = {"fields", "class_names", "ratio", "pixel_ratio", "gaps", "blocks", "problem"}
"""Members whose keys are not names of members."""

WORDS = {"quality_is": "guessed", "state": "resting", "ranking": "wreath", "definition": "cooked", "status": "dreaming"}


def newer(content: bytes) -> bytes:
    """The same JSON as a service might put it that knows more: a new member in every object, new words."""

    def more(value: Any, name: str) -> Any:
        if isinstance(value, list):
            return [more(item, name) for item in value]
        if not isinstance(value, dict) or name in MAPS:
            return value
        # Options are given back as they were given, so their words are the client's own.
        words = {} if name == "options" else WORDS
        known = {key: words.get(key, more(item, key)) for key, item in value.items()}
        return known | {"colour": {"is": "new"}}

    return json.dumps(more(json.loads(content), "")).encode()


def test_answers_of_a_newer_service_are_read(engram_client: Client, connect: Make, name: str) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6, quality=60)
    ingest = engram_client.upload(name, 0, pictures(0, 8), np.arange(8) % 2, options=IngestOptions(ranking="ring"))
    done = engram_client.wait(ingest)
    with faulty(engram_client.url) as proxy:
        proxy.change = newer
        client = connect(proxy.url)
        assert str(client.buffer(name).quality_is) == "guessed"
        assert [one.name for one in client.buffers()] == [one.name for one in engram_client.buffers()]
        assert client.manifest(name) == engram_client.manifest(name)
        assert str(client.health().status) == "dreaming"
        decision = client.task(name, 0).decision
        assert decision is not None
        assert [str(word) for word in (decision.ranking, decision.definition)] == ["wreath", "cooked"]
        assert client.ingest(ingest).options == done.options
        with pytest.raises(TimeoutError, match="still resting"):
            client.wait(ingest, timeout_s=0.0)


def test_an_answer_that_is_not_what_was_asked_for_says_so(filled: Filled, connect: Make) -> None:
    with faulty(filled.client.url) as proxy:
        proxy.change = lambda content: b'{"buffers": 7}'
        with pytest.raises(engram.EngramError, match=r"/v1/buffers answered what .* as BufferList \(buffers: "):
            connect(proxy.url).buffers()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, engram.Unauthorized),
        (404, engram.NotFound),
        (409, engram.Conflict),
        (422, engram.InvalidRequest),
        (429, engram.RateLimited),
        (503, engram.Unavailable),
        (504, engram.Unavailable),
        (507, engram.StorageFull),
        (418, engram.EngramError),
    ],
)
def test_a_problem_of_an_unknown_type_is_the_class_of_its_status(status: int, kind: type[Exception]) -> None:
    unknown = {"type": "https://engram.dev/problems/of-tomorrow", "detail": "no", "message": "too", "budget": 3}
    for found in (errors.from_problem(unknown, status), errors.from_problem(unknown | {"status": status})):
        assert type(found) is kind
        assert (str(found), found.details) == ("no", {"message": "too", "budget": 3})
