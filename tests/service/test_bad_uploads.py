"""Every bad upload fails with an error that says what is wrong, and changes nothing.

Each upload is processed against a buffer that holds a task already; afterwards its generation, its packs and its
tasks are what they were, and the upload is kept to be tried again.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engram.errors import (
    BadUpload,
    BudgetExceeded,
    Conflict,
    EngramError,
    NotFound,
    TooLarge,
    from_problem,
)
from engram.schemas import IngestOptions
from engram_service import buffers, ingest
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from tests.contents import create, fill, pictures
from tests.uploads import UInt8Array, encoded, final, pairs, queue, tar_of, tar_of_arrays, work_through

PICTURES = pictures(1, 8)
PNG = encoded(PICTURES[0])
GOOD = pairs(("png", encoded(image), number % 2) for number, image in enumerate(PICTURES))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def animated(format: str) -> bytes:
    frames = [Image.fromarray(image) for image in PICTURES[:3]]
    return saved(frames[0], format, save_all=True, append_images=frames[1:])


def sixteen_bit() -> bytes:
    return saved(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200), "PNG")


def ppm(image: UInt8Array) -> bytes:
    return b"P6\n%d %d\n255\n" % (image.shape[1], image.shape[0]) + image.tobytes()


def with_image(extension: str, content: bytes) -> bytes:
    """A tar of good pairs with this file as the last image but one."""
    members = list(GOOD)
    members[-4] = (members[-4][0].replace("png", extension), content)
    return tar_of(members)


def pax_header(size: int) -> bytes:
    """The header block of an extended header that claims a size, as GNU tar writes large and negative ones."""
    info = tarfile.TarInfo("h")
    info.type, info.size = tarfile.XHDTYPE, size
    return info.tobuf(tarfile.GNU_FORMAT)


def with_class(text: str) -> bytes:
    members = list(GOOD)
    members[-1] = (members[-1][0], text.encode())
    return tar_of(members)


@dataclass(frozen=True)
class Bad:
    """An upload, the class of its error, and words that its message must have."""

    body: Callable[[], bytes]
    error: type[EngramError]
    says: tuple[str, ...]
    options: IngestOptions = field(default_factory=IngestOptions)
    task: int = 5


CASES: dict[str, Bad] = {
    "cut in a header": Bad(lambda: tar_of(GOOD)[:1700], BadUpload, ("cut short", "1700")),
    "cut in an image": Bad(lambda: tar_of(GOOD)[:600], BadUpload, ("cut short", "bytes are missing")),
    "cut before the end marker": Bad(
        lambda: tar_of_arrays(PICTURES, [0] * 8)[:-1024], BadUpload, ("cut short", "after member")
    ),
    "not a tar": Bad(lambda: b"hello" * 300, BadUpload, ("no tar",)),
    "compressed": Bad(lambda: b"\x1f\x8b" + bytes(3000), BadUpload, ("gzip",)),
    "a damaged header": Bad(lambda: tar_of(GOOD)[:1024] + b"\x07" * 2048, BadUpload, ("byte 1536", "0000.png")),
    "an image without its class id": Bad(lambda: tar_of(GOOD[:-1]), BadUpload, ("0007.png", "no pair", "0007.cls")),
    "a class id without its image": Bad(lambda: tar_of(GOOD[1:]), BadUpload, ("0000.cls", "no pair")),
    "pairs that are not neighbours": Bad(lambda: tar_of(sorted(GOOD, key=lambda m: m[0][-3:])), BadUpload, ("pair",)),
    "the same key twice": Bad(lambda: tar_of([*GOOD, *GOOD[:2]]), BadUpload, ("'0000'", "twice")),
    "no images": Bad(lambda: tar_of([]), BadUpload, ("0 images",)),
    "no images among other files": Bad(lambda: tar_of([("README.txt", b"hello")]), BadUpload, ("0 images",)),
    "a name among class ids": Bad(lambda: with_class("cat"), BadUpload, ("0000.cls", "0007.cls", "'cat'", "integer")),
    "a class id that is a fraction": Bad(lambda: with_class("1.5"), BadUpload, ("b'1.5'", "integer")),
    "a class id below 0": Bad(lambda: with_class("-1"), BadUpload, ("b'-1'", "integer")),
    "a class id beyond 31 bits": Bad(lambda: with_class(str(2**31)), BadUpload, ("2147483648", "2147483647")),
    "an empty class id": Bad(lambda: with_class(""), BadUpload, ("integer",)),
    "not an image": Bad(lambda: with_image("jpg", b"This is text."), BadUpload, ("0006.jpg", "not a readable")),
    "an empty image": Bad(lambda: with_image("png", b""), BadUpload, ("0006.png", "not a readable")),
    "a cut PNG": Bad(lambda: with_image("png", PNG[: len(PNG) // 2]), BadUpload, ("0006.png", "not a readable")),
    "a cut JPEG": Bad(
        lambda: with_image("jpg", encoded(PICTURES[0], "JPEG")[:-40]), BadUpload, ("0006.jpg", "not a readable")
    ),
    "a PPM with too few pixels": Bad(lambda: with_image("ppm", ppm(PICTURES[0])[:-1]), BadUpload, ("768", "767")),
    "CMYK": Bad(lambda: with_image("jpg", saved(Image.new("CMYK", (16, 16)), "JPEG")), BadUpload, ("0006.jpg", "CMYK")),
    "16 bits": Bad(lambda: with_image("png", sixteen_bit()), BadUpload, ("0006.png", "16 bit")),
    "16 bits in a PPM": Bad(
        lambda: with_image("ppm", b"P6\n16 16\n65535\n" + bytes(1536)), BadUpload, ("65535", "8 bits")
    ),
    "an animated GIF": Bad(lambda: with_image("png", animated("GIF")), BadUpload, ("0006.png", "not a readable")),
    "an animated WebP": Bad(lambda: with_image("webp", animated("WEBP")), BadUpload, ("0006.webp", "3 frames")),
    "an animated PNG": Bad(lambda: with_image("png", animated("PNG")), BadUpload, ("3 frames",)),
    "transparency": Bad(
        lambda: with_image("png", saved(Image.new("RGBA", (16, 16), (1, 2, 3, 100)), "PNG")),
        BadUpload,
        ("transparent",),
    ),
    "one pixel": Bad(lambda: with_image("png", encoded(PICTURES[0][:1, :1])), BadUpload, ("1 x 1", "at least 2")),
    "60,000 pixels wide": Bad(
        lambda: with_image("png", saved(Image.new("L", (60_000, 2)), "PNG")), TooLarge, ("60000 x 2", "16384")
    ),
    "60,000 pixels wide in a header alone": Bad(
        lambda: with_image("ppm", b"P6\n60000 60000\n255\n" + bytes(100)), TooLarge, ("60000 x 60000",)
    ),
    "mixed sizes": Bad(
        lambda: with_image("png", encoded(PICTURES[0][:8])), BadUpload, ("0006.png", "8x16x3", "16x16x3")
    ),
    "colour and grey": Bad(lambda: with_image("png", encoded(PICTURES[0][..., :1])), BadUpload, ("16x16x1", "16x16x3")),
    "another size than the buffer's": Bad(
        lambda: tar_of_arrays(pictures(1, 4, (24, 16, 3)), [0] * 4), Conflict, ("24x16x3", "16x16x3")
    ),
    "grey for a colour buffer": Bad(
        lambda: tar_of_arrays(pictures(1, 4, (16, 16, 1)), [0] * 4), Conflict, ("16x16x1", "16x16x3")
    ),
    "an extractor that is not registered": Bad(
        lambda: tar_of(GOOD), NotFound, ("no extractor", "ab" * 32), IngestOptions(extractor="ab" * 32)
    ),
    "blanks without end in a PPM": Bad(
        lambda: with_image("ppm", b"P6" + b" " * 10_000 + ppm(PICTURES[0])[2:]), BadUpload, ("0006.ppm", "4096")
    ),
    "a size below zero in a PAX header": Bad(
        lambda: pax_header(size=-1) + tar_of(GOOD), BadUpload, ("declares the size", "xff")
    ),
    "a name that is a path": Bad(
        lambda: tar_of([("../../../x.cls", b"1"), *GOOD]), BadUpload, ("../../../x.cls", "no pair")
    ),
}


@pytest.fixture
def filled(database: Database, settings: Settings) -> Database:
    """The database with a buffer "b" of one task."""
    create(database, budget_bytes=20_000)
    fill(database, settings, 0, {0: 5, 1: 5})
    return database


def state(database: Database, store: PackStore) -> tuple[object, ...]:
    """All that an upload could change."""
    with database.reading() as session:
        found = buffers.read(session, "b"), buffers.manifest(session, "b"), buffers.task(session, "b", 0)
    return *found, sorted(digest for digest, _ in store.digests())


@pytest.fixture(scope="module")
def shared(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Database, Settings]]:
    """One such database for all uploads that change nothing."""
    settings = Settings(data_dir=shutil.copytree(migrated, tmp_path_factory.mktemp("shared") / "data"))
    database = Database(settings)
    create(database, budget_bytes=20_000)
    fill(database, settings, 0, {0: 5, 1: 5})
    yield database, settings
    database.close()


@pytest.mark.parametrize("name", CASES)
def test_a_bad_upload_fails_with_a_clear_problem_and_changes_nothing(
    name: str, shared: tuple[Database, Settings]
) -> None:
    case, (database, settings) = CASES[name], shared
    store = PackStore(settings.packs_dir)
    before = state(database, store)
    queued = queue(database, settings, case.body(), task=case.task, options=case.options)
    work_through(database, store, settings)
    ended = final(database, queued)
    assert ended.state == "failed"
    assert ended.attempts == 1
    assert ended.problem is not None
    error = from_problem(ended.problem)
    assert type(error) is case.error
    assert [words for words in case.says if words not in error.message] == [], error.message
    assert state(database, store) == before
    assert ended.can_retry
    assert ingest.spool_path(settings.spool_dir, queued.id).exists()


def test_the_uploads_that_the_bad_ones_are_made_of_are_good(
    filled: Database, store: PackStore, settings: Settings
) -> None:
    assert len(CASES) > 35
    for number, body in enumerate([tar_of(GOOD), with_image("ppm", ppm(PICTURES[6])), with_class("+12\n")]):
        queued = queue(filled, settings, body, task=number + 1)
        work_through(filled, store, settings)
        assert final(filled, queued).state == "committed"


def test_one_class_is_enough(filled: Database, store: PackStore, settings: Settings) -> None:
    queued = queue(filled, settings, tar_of_arrays(PICTURES, [7] * 8), task=1)
    work_through(filled, store, settings)
    ended = final(filled, queued)
    assert (ended.state, ended.images_done, ended.images_total, ended.generation) == ("committed", 8, 8, 2)


def test_one_image_is_enough(database: Database, store: PackStore, settings: Settings) -> None:
    create(database)
    queued = queue(database, settings, tar_of_arrays(PICTURES[:1], [7]))
    work_through(database, store, settings)
    assert final(database, queued).state == "committed"


def test_a_budget_below_one_exemplar_is_refused_with_both_numbers(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database, budget_bytes=200)
    queued = queue(database, settings, tar_of(GOOD))
    work_through(database, store, settings)
    ended = final(database, queued)
    assert ended.problem is not None
    error = from_problem(ended.problem)
    assert type(error) is BudgetExceeded
    assert error.details["budget_bytes"] <= 200 < error.details["needed_bytes"]
    assert "200" in error.message
    assert str(error.details["needed_bytes"]) in error.message
    with database.reading() as session:
        assert buffers.read(session, "b").generation == 0
    assert list(store.digests()) == []


def test_more_images_or_classes_than_allowed_are_refused(
    filled: Database, store: PackStore, settings: Settings
) -> None:
    for change, says in (({"max_images": 7}, "more than 7 images"), ({"max_classes": 1}, "more than 1 classes")):
        queued = queue(filled, settings, tar_of(GOOD), task=3)
        work_through(filled, store, settings.model_copy(update=change))
        ended = final(filled, queued)
        assert ended.problem is not None
        error = from_problem(ended.problem)
        assert type(error) is TooLarge
        assert says in error.message


def test_large_images_are_refused_by_their_header(filled: Database, store: PackStore, settings: Settings) -> None:
    queued = queue(filled, settings, tar_of(GOOD), task=3)
    work_through(filled, store, settings.model_copy(update={"max_pixels": 255}))
    ended = final(filled, queued)
    assert ended.problem is not None
    assert "16 x 16 pixels; at most 255" in ended.problem["detail"]
