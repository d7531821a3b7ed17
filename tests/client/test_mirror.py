import shutil
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engram
from engram import Batch, Client, Mirror, batch, pack
from engram.draw import STRATEGIES, Request
from tests.client.conftest import Filled, Make, send
from tests.client.faults import faulty
from tests.contents import pictures


def same(one: Batch, other: Batch) -> bool:
    pairs = ((getattr(one, name), getattr(other, name)) for name in ("images", "class_ids", "tasks", "rows"))
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def mirror(filled: Filled, tmp_path_factory: pytest.TempPathFactory) -> Mirror:
    """Of the read-only buffer."""
    return Mirror(filled.client, filled.name, tmp_path_factory.mktemp("mirror"))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_mirrored_draws_equal_the_services(filled: Filled, mirror: Mirror, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, 4))
    arguments: dict[str, Any] = {
        "seed": data.draw(st.integers(0, 2**63 - 1)),
        "step": data.draw(st.integers(0, 2**40)),
        "strategy": data.draw(st.sampled_from(STRATEGIES)),
        "tasks": data.draw(st.none() | st.lists(st.integers(1, 2), min_size=1, unique=True)),
        "exclude_tasks": data.draw(st.sampled_from([(), (0,), (7,)])),
        "rank": data.draw(st.integers(0, world_size - 1)),
        "world_size": world_size,
    }
    size = data.draw(st.integers(1, 100))
    try:
        expected = filled.client.draw(filled.name, size, **arguments)
    except engram.EngramError as error:
        with pytest.raises(type(error)):
            mirror.draw(size, **arguments)
    else:
        assert same(mirror.draw(size, **arguments), expected)


def test_a_rank_beyond_the_end_of_an_epoch_gets_an_empty_batch(filled: Filled, mirror: Mirror) -> None:
    for draw in (mirror.draw, partial(filled.client.draw, filled.name)):
        assert len(draw(72, strategy="epoch", rank=0, world_size=2)) == 72
        assert len(draw(72, strategy="epoch", rank=1, world_size=2)) == 0


def test_mirrored_draws_equal_the_services_byte_for_byte(filled: Filled, mirror: Mirror) -> None:
    for strategy in STRATEGIES:
        parts = mirror.snapshot().parts(Request(30, 1, 2, strategy))
        url = f"{filled.client.url}/v1/buffers/{filled.name}/draw?size=30&seed=1&step=2&strategy={strategy}"
        assert batch.assemble(parts) == httpx.get(url).content


def test_a_mirror_downloads_what_is_new_and_drops_what_is_gone(
    engram_client: Client, connect: Make, name: str, tmp_path: Path
) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    send(engram_client, name, 0, [0, 0, 1, 1])
    with faulty(engram_client.url) as proxy:
        mirror = Mirror(connect(proxy.url), name, tmp_path)
        first = {entry.digest for entry in mirror.manifest.packs}
        before = proxy.requests
        assert not mirror.refresh()
        assert proxy.requests == before + 1, "the manifest, which has not changed"
        send(engram_client, name, 1, [2, 3])
        before = proxy.requests
        assert mirror.refresh()
        assert proxy.requests == before + 2, "the manifest, one pack"
    assert first < {entry.digest for entry in mirror.manifest.packs}
    engram_client.delete_task(name, 0)
    mirror = Mirror(engram_client, name, tmp_path)
    digests = {entry.digest for entry in mirror.manifest.packs}
    assert {path.name for path in (tmp_path / "packs").iterdir()} == digests | {f"{name}.index" for name in digests}
    assert set(mirror.draw(9).tasks.tolist()) == {1}


def test_a_second_mirror_of_the_folder_downloads_nothing(filled: Filled, connect: Make, tmp_path: Path) -> None:
    first = Mirror(filled.client, filled.name, tmp_path)
    with faulty(filled.client.url) as proxy:
        second = Mirror(connect(proxy.url), filled.name, tmp_path)
        assert proxy.requests == 1
    assert same(first.draw(20), second.draw(20))


def test_a_pack_of_version_1_in_the_folder_is_fetched_again(filled: Filled, tmp_path: Path) -> None:
    expected = Mirror(filled.client, filled.name, tmp_path).draw(20)
    old = (Path(__file__).parents[1] / "golden" / "version_1.strip.jpg").read_bytes()
    saved = tmp_path / "manifest.json"
    current = next(path.name for path in sorted((tmp_path / "packs").iterdir()) if not path.suffix)
    (tmp_path / "packs" / pack.digest(old)).write_bytes(old)
    saved.write_text(saved.read_text().replace(current, pack.digest(old)))
    assert same(Mirror(filled.client, filled.name, tmp_path).draw(20), expected)


@pytest.mark.parametrize(
    "what", ["flipped", "cut", "missing", "no index", "bad index", "no manifest", "bad manifest", "empty manifest"]
)
def test_a_folder_that_was_damaged_heals(filled: Filled, tmp_path: Path, what: str) -> None:
    expected = Mirror(filled.client, filled.name, tmp_path).draw(20)
    victim = next(path for path in sorted((tmp_path / "packs").iterdir()) if not path.suffix)
    content = victim.read_bytes()
    match what:
        case "flipped":
            victim.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        case "cut":
            victim.write_bytes(content[:100])
        case "missing":
            victim.unlink()
        case "no index":
            victim.with_name(f"{victim.name}.index").unlink()
        case "bad index":
            victim.with_name(f"{victim.name}.index").write_bytes(b"ENGRIDX1 and nothing of it")
        case "no manifest":
            (tmp_path / "manifest.json").unlink()
        case "bad manifest":
            (tmp_path / "manifest.json").write_text('{"created_at": "2020-')
        case "empty manifest":
            (tmp_path / "manifest.json").write_bytes(b"")
    assert same(Mirror(filled.client, filled.name, tmp_path).draw(20), expected)
    assert victim.read_bytes() == content


def test_a_buffer_made_anew_under_the_same_name_is_not_mistaken_for_the_old_one(
    engram_client: Client, name: str, tmp_path: Path
) -> None:
    for class_id in (1, 2):
        engram_client.create_buffer(name, budget_bytes=10**6)
        send(engram_client, name, 0, [class_id])
        mirror = Mirror(engram_client, name, tmp_path)
        assert mirror.generation == 1
        assert mirror.draw(1).class_ids.tolist() == [class_id]
        engram_client.delete_buffer(name)


def test_a_pack_that_arrives_damaged_leaves_the_mirror_as_it_was(
    engram_client: Client, connect: Make, name: str, tmp_path: Path
) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    send(engram_client, name, 0, [0, 1])
    with faulty(engram_client.url) as proxy:
        mirror = Mirror(connect(proxy.url, retries=0), name, tmp_path)
        expected = mirror.draw(2)
        send(engram_client, name, 1, [2, 3])
        proxy.faults += [None, "cut the answer"]
        with pytest.raises(engram.Unavailable):
            mirror.refresh()
        assert (mirror.generation, same(mirror.draw(2), expected)) == (1, True)
        assert mirror.refresh()
        assert mirror.generation == 2


def test_a_mirror_of_an_empty_buffer_waits_for_exemplars(engram_client: Client, name: str, tmp_path: Path) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    mirror = Mirror(engram_client, name, tmp_path)
    with pytest.raises(engram.Conflict):
        mirror.draw(4)
    send(engram_client, name, 0, [5])
    assert mirror.refresh()
    assert mirror.draw(1).class_ids.tolist() == [5]


def test_a_snapshot_stays_while_the_mirror_goes_on(engram_client: Client, name: str, tmp_path: Path) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    send(engram_client, name, 0, [0, 1])
    mirror = Mirror(engram_client, name, tmp_path / "deep" / "folder")
    snapshot = mirror.snapshot()
    before = snapshot.draw(Request(2))
    send(engram_client, name, 1, [2, 3])
    mirror.refresh()
    shutil.rmtree(tmp_path)
    assert same(snapshot.draw(Request(2)), before)
    assert len(mirror.draw(4, strategy="epoch")) == 4


def shrinking(client: Client, name: str, classes: list[list[int]], budget_bytes: int = 6000) -> None:
    """A full buffer: tasks of 30 pictures, of these classes; each one that comes makes those before it smaller."""
    client.create_buffer(name, budget_bytes=budget_bytes, quality=50)
    for task, held in enumerate(classes):
        send(client, name, task, sorted(held * (30 // len(held))))


def test_packs_that_only_shrink_are_made_here_and_only_the_new_one_is_fetched(
    engram_client: Client, connect: Make, name: str, tmp_path: Path
) -> None:
    shrinking(engram_client, name, [[0, 1, 2], [3], [4, 5]])
    with faulty(engram_client.url) as proxy:
        mirror = Mirror(connect(proxy.url), name, tmp_path)
        before = {entry.digest for entry in mirror.manifest.packs}
        send(engram_client, name, 3, [6] * 15 + [7] * 15)
        requests = proxy.requests
        assert mirror.refresh()
        assert proxy.requests == requests + 2, "its manifest, one pack"
    entries = mirror.manifest.packs
    assert len(entries) == 4
    assert not before & {entry.digest for entry in entries}, "every pack had to shrink"
    for entry in entries:
        assert (tmp_path / "packs" / entry.digest).read_bytes() == engram_client.pack(entry.digest)
    for step in range(5):
        assert same(mirror.draw(20, step=step), engram_client.draw(name, 20, step=step))


@pytest.mark.slow
def test_a_pack_that_lost_a_whole_class_is_made_here_too(
    engram_client: Client, connect: Make, name: str, tmp_path: Path
) -> None:
    shrinking(engram_client, name, [[0, 1], [2, 3]], budget_bytes=4000)
    with faulty(engram_client.url) as proxy:
        mirror = Mirror(connect(proxy.url), name, tmp_path)
        requests, changes = proxy.requests, 0
        for budget in range(2000, 0, -100):
            engram_client.change_budget(name, budget)
            changes += mirror.refresh()
            if any(len(entry.runs) == 1 for entry in mirror.manifest.packs):
                break
        assert any(len(entry.runs) == 1 for entry in mirror.manifest.packs)
        assert proxy.requests == requests + changes, "the manifest, each time"
    assert same(mirror.draw(3), engram_client.draw(name, 3))


def test_a_pack_that_grew_is_fetched(engram_client: Client, connect: Make, name: str, tmp_path: Path) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6, quality=50)
    send(engram_client, name, 0, [0, 1])
    with faulty(engram_client.url) as proxy:
        mirror = Mirror(connect(proxy.url), name, tmp_path)
        send(engram_client, name, 0, [0, 1, 2])
        requests = proxy.requests
        assert mirror.refresh()
        assert proxy.requests == requests + 2
    assert same(mirror.draw(5), engram_client.draw(name, 5))


@pytest.mark.slow
def test_of_several_packs_that_are_fetched_one_may_fail_and_the_mirror_is_as_it_was(
    engram_client: Client, connect: Make, name: str, tmp_path: Path
) -> None:
    engram_client.create_buffer(name, budget_bytes=10**6)
    send(engram_client, name, 0, [0, 1])
    with faulty(engram_client.url) as proxy:
        mirror = Mirror(connect(proxy.url, retries=0), name, tmp_path)
        expected = mirror.draw(2)
        for task in range(1, 8):
            send(engram_client, name, task, [2 * task, 2 * task + 1])
        proxy.faults += [None, None, "cut the answer", None]
        with pytest.raises(engram.Unavailable):
            mirror.refresh()
        assert (mirror.generation, same(mirror.draw(2), expected)) == (1, True)
        requests = proxy.requests
        assert mirror.refresh()
        assert proxy.requests <= requests + 1 + 6, "what arrived is not fetched again"
    assert len(mirror.draw(16, strategy="epoch")) == 16


def test_a_mirror_that_does_not_fit_in_memory_draws_the_same(filled: Filled, mirror: Mirror, tmp_path: Path) -> None:
    cramped = Mirror(filled.client, filled.name, tmp_path, cache_bytes=0)
    again = Mirror(filled.client, filled.name, tmp_path, cache_bytes=0)
    for step in range(5):
        assert same(cramped.draw(30, step=step), mirror.draw(30, step=step))
        assert same(again.draw(30, step=step), mirror.draw(30, step=step))


@pytest.mark.parametrize("what", ["flipped", "cut", "missing"])
def test_a_pack_on_disk_that_turns_out_to_be_damaged_is_fetched_again(
    filled: Filled, mirror: Mirror, tmp_path: Path, what: str
) -> None:
    cramped = Mirror(filled.client, filled.name, tmp_path, cache_bytes=0)
    snapshot = cramped.snapshot()
    for entry in cramped.manifest.packs:
        path = tmp_path / "packs" / entry.digest
        content = path.read_bytes()
        match what:
            case "flipped":
                path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
            case "cut":
                path.write_bytes(content[:100])
            case "missing":
                path.write_bytes(b"")
                path.unlink()
    assert same(cramped.draw(72, strategy="epoch"), mirror.draw(72, strategy="epoch"))
    assert same(snapshot.draw(Request(72, strategy="epoch")), mirror.draw(72, strategy="epoch"))
    assert all((tmp_path / "packs" / e.digest).stat().st_size == e.bytes for e in cramped.manifest.packs)


def test_two_mirrors_share_a_folder_and_one_may_be_ahead(
    engram_client: Client, connect: Make, name: str, tmp_path: Path
) -> None:
    shrinking(engram_client, name, [[0, 1], [2, 3]])
    ahead, behind = (Mirror(engram_client, name, tmp_path, cache_bytes=0) for _ in range(2))
    before = [behind.draw(20, step=step) for step in range(3)]
    send(engram_client, name, 2, [4] * 30)
    assert ahead.refresh()
    # Its files are gone: what it has open is read, the rest comes from the service.
    assert all(same(behind.draw(20, step=step), before[step]) for step in range(3))
    with faulty(engram_client.url) as proxy:
        late = Mirror(connect(proxy.url), name, tmp_path, cache_bytes=0)
        assert proxy.requests == 1, "the packs are here"
    assert behind.refresh()
    assert same(behind.draw(20), ahead.draw(20))
    assert same(late.draw(20), ahead.draw(20))


def test_no_such_buffer_is_not_mirrored(engram_client: Client, name: str, tmp_path: Path) -> None:
    with pytest.raises(engram.NotFound, match=name):
        Mirror(engram_client, name, tmp_path)


def test_pictures_of_a_mirror_are_those_uploaded(filled: Filled, mirror: Mirror) -> None:
    drawn = mirror.draw(24, strategy="epoch", tasks=[1])
    uploaded = pictures(1, 24)
    # Quality 60 leaves every picture nearest to the one it was made of.
    distance = np.abs(drawn.images[:, None].astype(int) - uploaded[None].astype(int)).mean(axis=(2, 3, 4))
    assert sorted(distance.argmin(axis=1)) == list(range(24))
