import contextlib
import io
import itertools
import subprocess
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import tar
from engram.errors import BadUpload, EngramError, TooLarge
from engram.fields import Schema
from engram.images import decode as decode_image
from engram.labelled import labelled
from engram.tar.blocks import Archive
from engram.tar.reading import MAX_FIELD_BYTES

RNG = np.random.default_rng(7)
PPM = b"P6\n2 2\n255\n" + bytes(range(12))


def archive(*members: tuple[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar as Python's tarfile writes it, independent of the code under test."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def with_special(kind: bytes, name: str = "a.ppm") -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "/etc/passwd"
    return info.tobuf() + tar.END


def read(data: bytes) -> list[tar.Member]:
    return list(tar.read(io.BytesIO(data)))


def images(count: int, channels: int = 3) -> npt.NDArray[np.uint8]:
    return RNG.integers(0, 256, (count, 3, 5, channels), np.uint8)


def decode(data: bytes) -> npt.NDArray[np.uint8]:
    return decode_image(data, max_pixels=10_000, min_side=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_come_back_as_they_went(channels: int) -> None:
    sent = images(700, channels)
    class_ids = RNG.integers(0, 2**31, 700)
    members = read(b"".join(tar.write(sent, class_ids, start=5)))
    assert [member.class_id for member in members] == class_ids.tolist()
    assert np.array_equal(np.stack([decode(member.image) for member in members]), sent)
    assert members[0].key == "0000000005"


def test_a_written_stream_is_what_tarfile_reads() -> None:
    sent = images(20)
    data = b"".join(tar.write(sent, np.arange(20), start=999_999_990))
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        names = file.getnames()
        last = file.extractfile(names[-1])
    assert len(names) == 40
    assert names[:2] == ["0999999990.ppm", "0999999990.cls"]
    assert last is not None
    assert last.read() == b"19"


def test_offsets_lead_to_the_image_in_the_stream() -> None:
    data = archive(("a.cls", b"1"), ("a.ppm", PPM), ("b.ppm", PPM + b"xyz"), ("b.cls", b" 2\n"))
    for member in read(data):
        assert data[member.offset : member.offset + member.size] == member.image


def test_images_that_come_in_parts_are_the_bytes_of_those_that_come_at_once() -> None:
    images = RNG.integers(0, 256, (90, 40, 50, 3), dtype=np.uint8)
    class_ids = np.arange(90) % 7
    fields: dict[str, Any] = {"weight": np.arange(90, dtype=np.float32), "note": [f"n{n}" for n in range(90)]}
    cuts = [0, 1, 40, 40, 89, 90]
    parts = (
        (images[a:b], class_ids[a:b], {name: column[a:b] for name, column in fields.items()})
        for a, b in itertools.pairwise(cuts)
    )
    assert b"".join(tar.write_parts(parts)) == b"".join(tar.write(images, class_ids, fields=fields))


def test_a_grey_stack_without_channels_is_written_as_pgm() -> None:
    sent = images(3, 1)
    with tarfile.open(fileobj=io.BytesIO(b"".join(tar.write(sent[..., 0], [1, 2, 3])))) as file:
        assert file.getnames()[0] == "0000000000.pgm"


def test_no_images_make_an_empty_archive() -> None:
    assert b"".join(tar.write(images(0), [])) == tar.END
    assert read(tar.END) == []


@pytest.mark.parametrize(
    ("sent", "class_ids"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), [0, 1]),
        (np.zeros((2, 4, 4, 4), np.uint8), [0, 1]),
        (np.zeros((4, 4), np.uint8), [0, 1, 2, 3]),
        (np.zeros((2, 4, 4, 3), np.uint8), [0]),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, -1]),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, 2**31]),
        (np.zeros((2, 4, 4, 3), np.uint8), [0.5, 1.0]),
    ],
)
def test_arrays_that_are_no_labelled_images_are_refused(sent: npt.NDArray[np.uint8], class_ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"images|class ids"):
        list(tar.write(sent, class_ids))


def test_names_of_classes_are_written_and_read() -> None:
    names = ["cat", "Ärger", "cat", "長" * 190]
    written = b"".join(tar.write(images(4), names))
    assert [member.class_id for member in read(written)] == names
    with tarfile.open(fileobj=io.BytesIO(written)) as file:
        assert len(file.getmembers()) == 8
    assert [m.class_id for m in read(b"".join(tar.write_encoded([("ppm", PPM, "cat")])))] == ["cat"]


def test_texts_that_are_one_name_are_one_class() -> None:
    _, places, names = labelled(images(3), ["caf\u00e9", " cafe\u0301 ", "bar"])
    assert names == ("bar", "caf\u00e9")
    assert places.tolist() == [1, 1, 0]


@pytest.mark.parametrize("class_ids", [["cat", ""], ["cat", "7"], [1, "cat"], ["cat", "a\nb"]])
def test_strings_that_name_no_class_are_refused(class_ids: list[str]) -> None:
    with pytest.raises(ValueError, match="class"):
        list(tar.write(images(2), class_ids))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_in_every_tar_format(format: int) -> None:
    deep = "/".join(["folder" * 5] * 6)
    names = ["a", "b.v2"] if format == tarfile.USTAR_FORMAT else [deep + "/x", deep + "/schön"]
    pairs = [(f"{name}.{kind}", content) for name in names for kind, content in (("PPM", PPM), ("cls", b"3"))]
    data = archive(*pairs, format=format)
    assert [(member.key, member.class_id) for member in read(data)] == [(name, 3) for name in names]


def test_what_gnu_tar_makes_of_a_folder_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "shard"
    (folder / "deeper").mkdir(parents=True)
    for number in range(4):
        (folder / "deeper" / f"{number}.ppm").write_bytes(PPM)
        (folder / "deeper" / f"{number}.cls").write_text(f"{number}\n")
        (folder / "deeper" / f"{number}.json").write_text("{}")
    done = subprocess.run(["tar", "c", "--sort=name", "-C", folder.parent, "shard"], capture_output=True, check=True)
    assert [member.class_id for member in read(done.stdout)] == [0, 1, 2, 3]


def test_names_that_climb_out_of_a_folder_are_only_names() -> None:
    assert read(archive(("../../etc/x.ppm", PPM), ("../../etc/x.cls", b"1")))[0].key == "../../etc/x"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_stream_cut_anywhere_is_refused(data: st.DataObject) -> None:
    whole = b"".join(tar.write(images(3), [0, 1, 2]))
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(BadUpload, match="ends at byte"):
        read(whole[:cut])


def test_a_cut_names_the_member_and_what_is_missing() -> None:
    whole = archive(("a.ppm", PPM), ("a.cls", b"1"))
    with pytest.raises(BadUpload, match=r"'a\.ppm'.* 4 bytes are missing"):
        read(whole[: tar.BLOCK + len(PPM) - 4])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 5 * tar.BLOCK - 1), st.integers(1, 255))
def test_a_flipped_byte_never_does_worse_than_a_problem(position: int, flip: int) -> None:
    whole = bytearray(archive(("a.ppm", PPM), ("a.cls", b"1"), ("b.ppm", PPM), format=tarfile.PAX_FORMAT))
    whole[position] ^= flip
    with contextlib.suppress(EngramError):
        read(bytes(whole))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2000))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(BadUpload):
        read(b"x" + noise)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends at byte 0"),
        (b"\x1f\x8b" + bytes(600), "gzip"),
        (b"<html>" * 100, "no tar stream"),
        (archive(("a.ppm", PPM)), r"'a\.ppm' has no pair: expected a\.cls"),
        (archive(("a.cls", b"1")), r"expected an image a\.\(ppm"),
        (archive(("a.ppm", PPM), ("b.cls", b"1")), r"'a\.ppm' has no pair.*'b\.cls' follows"),
        (archive(("a.ppm", PPM), ("a.png", PPM)), "has no pair"),
        (archive(("a.cls", b"1"), ("a.cls", b"1")), "has no pair"),
        (archive(*[("a.ppm", PPM), ("a.cls", b"1")] * 2), "key 'a' appears twice"),
        (
            archive(("a.ppm", PPM), ("a.cls", b"3"), ("b.ppm", PPM), ("b.cls", b"cat")),
            "'a.cls' holds 3 and member 'b.cls' holds 'cat'",
        ),
        (archive(("a.ppm", PPM), ("a.cls", b"c\0t")), "printable"),
        (archive(("a.ppm", PPM), ("a.cls", b"\xff\xfe")), "where a class id"),
        (archive(("a.ppm", PPM), ("a.cls", b"c" * 201)), "1 to 200 characters, got 201"),
        (archive(("a.ppm", PPM), ("a.cls", b"")), "b'' where a class id"),
        (archive(("a.ppm", PPM), ("a.cls", b"-1")), "where a class id"),
        (archive(("a.ppm", PPM), ("a.cls", b"1.5")), "where a class id"),
        (archive(("a.ppm", PPM), ("a.cls", b"1 2")), "where a class id"),
        (archive(("a.ppm", PPM), ("a.cls", "٣".encode())), "where a class id"),
        (archive(("a.ppm", PPM), ("a.cls", b"2147483648")), "above 2147483647"),
        (archive(("a.ppm", PPM), ("a.cls", b"1"))[: 4 * tar.BLOCK] + b"damaged" * 400, "no valid header at byte 2048"),
        (tar.END + archive(("a.ppm", PPM), ("a.cls", b"1")), "more bytes after the end"),
        (
            archive(("a.ppm", PPM), ("a.cls", b"1"))[: 4 * tar.BLOCK] + bytes(512) + b"x" * 512,
            "a single block of zeros",
        ),
        (with_special(tarfile.SYMTYPE), "link"),
        (with_special(tarfile.LNKTYPE), "link"),
        (with_special(tarfile.CHRTYPE), "device"),
        (with_special(tarfile.FIFOTYPE), "special"),
        (with_special(tarfile.GNUTYPE_SPARSE), "special"),
    ],
)
def test_a_stream_that_cannot_be_an_upload_is_refused_with_its_reason(data: bytes, message: str) -> None:
    with pytest.raises(BadUpload, match=message):
        read(data)


def test_a_member_above_the_limit_is_refused_before_it_is_read() -> None:
    info = tarfile.TarInfo("a.ppm")
    info.size = 10**12
    with pytest.raises(TooLarge, match="1000000000000 bytes, at most 100 "):
        list(tar.read(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT)), max_member_bytes=100))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_an_extended_header_of_a_gigabyte_is_refused_before_it_is_read(kind: bytes) -> None:
    info = tarfile.TarInfo("a.ppm")
    info.type, info.size = kind, 2**30
    with pytest.raises(BadUpload, match="extended header of 1073741824 bytes"):
        read(info.tobuf())


@pytest.mark.parametrize("record", [b"9 path=a", b"99 path=a\n", b"path=a\n", b"7 path\n", b"x"])
def test_a_damaged_pax_header_is_refused(record: bytes) -> None:
    info = tarfile.TarInfo("h")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    data = info.tobuf() + record.ljust(tar.BLOCK, b"\0") + archive(("a.ppm", PPM), ("a.cls", b"1"))
    with pytest.raises(BadUpload, match="damaged PAX header"):
        read(data)


def sized(size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header whose field for the size holds these bytes."""
    info = tarfile.TarInfo("a.ppm")
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=60),
    st.integers(0, 2**40),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT]),
    st.lists(st.tuples(st.sampled_from([*range(100), *range(124, 136), 156]), st.integers(0, 255)), max_size=3),
)
def test_a_header_says_what_the_standard_library_reads_or_is_refused(
    name: str, size: int, format: Literal[0, 1], flips: list[tuple[int, int]]
) -> None:
    info = tarfile.TarInfo("d/" * 60 + "x" if format == tarfile.USTAR_FORMAT else "x")
    info.name, info.size = f"{'d/' * 60}{name}"[-200:] if name.isascii() else name[:20], size % 8**11
    try:
        block = bytearray(info.tobuf(format)[-tar.BLOCK :])
    except ValueError:  # a name that has no place in this format
        return
    for place, flip in flips:
        block[place] ^= flip
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    try:
        found = Archive(io.BytesIO(block + bytes(2**16)), lambda: None).member()
    except BadUpload:
        return
    if found is None or block[156:157] in b"xgLK":
        return
    expected = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "replace")
    assert (found.name.rstrip("/"), found.size) == (expected.name.rstrip("/"), expected.size)
    assert found.is_directory == expected.isdir()


def pax(*records: tuple[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    body = b""
    for key, value in records:
        record = f" {key}={value}\n".encode()
        length = len(record) + len(str(len(record)))
        body += b"%d" % (length + (len(str(length)) > len(str(len(record))))) + record
    info = tarfile.TarInfo("h")
    info.type, info.size = kind, len(body)
    return info.tobuf() + body + bytes(-len(body) % tar.BLOCK)


def base_256(size: int) -> bytes:
    return (0x80 << 88 | size).to_bytes(12, "big") if size >= 0 else (size % 2**96).to_bytes(12, "big")


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, b"L", b"K"])
@pytest.mark.parametrize("size", [base_256(-1), base_256(-512), base_256(-(2**80)), b"-7"])
def test_a_size_below_zero_is_refused_before_anything_is_read_by_it(kind: bytes, size: bytes) -> None:
    class Forward(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert size is not None
            assert 0 <= size <= 2**20
            return super().read(size)

    data = sized(size, kind) + archive(("a.ppm", PPM), ("a.cls", b"1"))
    with pytest.raises(BadUpload, match="declares the size"):
        list(tar.read(Forward(data)))


@pytest.mark.parametrize("text", ["0" * 19 + "12", "9" * 20, "-1", "+5", "1_0", " 5", "", "\u0665", "9" * 5000])
def test_a_size_of_a_pax_header_that_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(BadUpload, match="declares the size"):
        read(pax(("size", text)) + archive(("a.ppm", PPM), ("a.cls", b"1")))


def test_a_size_of_a_pax_header_counts_before_that_of_the_member() -> None:
    header = sized(b"")
    data = pax(("size", str(len(PPM)))) + header + PPM.ljust(tar.BLOCK, b"\0") + archive(("a.cls", b"1"))
    assert read(data)[0].image == PPM


@pytest.mark.parametrize("record", [("size", "24"), ("path", "b.ppm")])
def test_a_global_header_with_a_name_or_a_size_for_all_members_is_refused(record: tuple[str, str]) -> None:
    pairs = archive(("a.ppm", PPM), ("a.cls", b"1"))
    assert len(read(pax(("comment", "of git archive"), kind=tarfile.XGLTYPE) + pairs)) == 1
    with pytest.raises(BadUpload, match="global PAX header"):
        read(pax(record, kind=tarfile.XGLTYPE) + pairs)


class Cancelled(Exception):
    """What a check raises."""


@pytest.mark.parametrize(
    "body",
    [
        b"".join(tar.entry(f"{number}.py", b"") for number in range(4000)),
        b"".join(tar.entry(f"{number}.note.txt", b"x") for number in range(2000)),
        tar.entry("large.bin", bytes(2**22)),
        sized(b"", tarfile.DIRTYPE) * 4000,
        pax(("comment", "c" * 60_000)) * 30,
        tar.END + bytes(2**22),
    ],
    ids=["other files", "no fields", "a large file", "directories", "extended headers", "zeros after the end"],
)
def test_reading_ends_when_it_is_asked_to_though_nothing_is_found(body: bytes) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Cancelled

    stream = io.BytesIO(body + tar.END)
    with pytest.raises(Cancelled):
        list(tar.read(stream, check=check))
    assert stream.tell() <= 3 * 2**20


def test_a_sparse_file_of_the_pax_format_is_refused() -> None:
    record = b"22 GNU.sparse.major=1\n"
    info = tarfile.TarInfo("h")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    with pytest.raises(BadUpload, match="special file"):
        read(info.tobuf() + record.ljust(tar.BLOCK, b"\0") + archive(("a.ppm", PPM), ("a.cls", b"1")))


def test_a_stream_that_comes_in_small_pieces_is_read_whole() -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 100))

    data = b"".join(tar.write(images(2), [4, 5]))
    assert [member.class_id for member in tar.read(Trickle(data))] == [4, 5]


def test_encoded_files_are_written_as_they_are() -> None:
    files = [("png", b"a PNG", 3), ("JPG", b"any bytes", 4)]
    assert [(m.image, m.class_id) for m in read(b"".join(tar.write_encoded(files)))] == [f[1:] for f in files]
    with pytest.raises(ValueError, match="extension 'gif'"):
        list(tar.write_encoded([("gif", b"", 0)]))


def test_an_entry_with_a_long_name_is_read_back() -> None:
    name = "n" * 150
    (member,) = read(tar.entry(f"{name}.ppm", PPM) + tar.entry(f"{name}.cls", b"1") + tar.END)
    assert member.key == name


# Fields

FIELDS = Schema.declare({"boxes": "float32 [any, 2]", "logits": "float16 [3]", "note": "utf8", "weight": "float32"})


def npy(values: object) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(values), allow_pickle=True)
    return out.getvalue()


def fields_of(*members: tuple[str, bytes], schema: Schema = FIELDS) -> list[dict[str, Any]]:
    return [member.fields for member in tar.read(io.BytesIO(archive(*members)), schema=schema)]


def test_columns_come_back_as_they_went_whatever_their_kind() -> None:
    sent = images(700)
    columns: dict[str, Any] = {
        "logits": RNG.normal(size=(700, 3)).astype(np.float16),
        "weight": RNG.normal(size=700).tolist(),
        "boxes": [RNG.normal(size=(row % 4, 2)) for row in range(700)],
        "note": [f"nöte {row}" for row in range(700)],
    }
    data = b"".join(tar.write(sent, np.arange(700), fields=columns, start=3))
    members = list(tar.read(io.BytesIO(data), schema=FIELDS))
    assert [member.key for member in members[:2]] == ["0000000003", "0000000004"]
    assert np.array_equal(np.stack([decode(member.image) for member in members]), sent)
    for name, column in columns.items():
        assert all(np.array_equal(member.fields[name], cell) for member, cell in zip(members, column, strict=True))
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        names = file.getnames()
        first = file.extractfile("0000000009.logits.npy")
        assert first is not None
        assert np.array_equal(np.load(io.BytesIO(first.read())), columns["logits"][6])
    assert sorted(names[:6]) == [
        f"0000000003.{rest}" for rest in ("boxes.npy", "cls", "logits.npy", "note.txt", "ppm", "weight.npy")
    ]


def test_columns_that_are_all_fixed_cost_no_member_made_one_by_one() -> None:
    fixed = {"logits": RNG.normal(size=(50, 3)), "flag": np.arange(50) % 2 == 0, "turned": np.arange(50, dtype=">u2")}
    names = Schema.declare({"logits": "float64 [3]", "flag": "bool", "turned": "uint16"})
    members = list(tar.read(io.BytesIO(b"".join(tar.write(images(50), [1] * 50, fields=fixed))), schema=names))
    for name, column in fixed.items():
        assert [member.fields[name].tolist() for member in members] == column.tolist()


def test_members_of_a_group_come_in_any_order() -> None:
    group = [("a.cls", b"1"), ("a.logits.npy", npy([1, 2, 3])), ("a.note.txt", b"x\n"), ("a.ppm", PPM)]
    for order in itertools.permutations(group):
        (fields, other) = fields_of(*order, ("b.ppm", PPM), ("b.cls", b"2"))
        assert fields.keys() == {"logits", "note"}
        assert fields["note"] == "x\n"
        assert other == {}


def test_json_and_text_say_numbers_too() -> None:
    (found,) = fields_of(
        ("a.boxes.json", b"[[1, 2], [3, 4.5]]"),
        ("a.weight.txt", b" 0.5\n"),
        ("a.note.json", b'"a \\u00e9"'),
        ("a.ppm", PPM),
        ("a.cls", b"1"),
    )
    assert found == {"boxes": [[1, 2], [3, 4.5]], "weight": 0.5, "note": "a é"}


def test_files_beside_an_image_that_have_no_name_of_a_field_are_passed_over() -> None:
    strays = [("a.json", b"{}"), ("a.txt", b""), ("docs.readme.txt", b""), ("README.md", b""), ("v1.Notes.txt", b"")]
    for at in range(3):
        members = [("img.v2.ppm", PPM), ("img.v2.cls", b"1")]
        for stray in [*strays, ("img.v2.json", b"{}"), ("img.v2.txt", b"")]:
            assert fields_of(*members[:at], stray, *members[at:]) == [{}]


def test_many_and_large_files_that_are_no_fields_are_passed_over_unread() -> None:
    strays = [(f"logs.a{number}.txt", b"") for number in range(300)]
    large = ("logs.all.txt", bytes(MAX_FIELD_BYTES + 1))
    assert fields_of(large, *strays, ("a.ppm", PPM), ("a.cls", b"1"), *strays, large) == [{}]


def test_a_key_is_what_a_member_is_called_unless_it_says_another() -> None:
    keyed = Schema.declare({"key": "utf8"})
    members = [("x/a.b.ppm", PPM), ("x/a.b.cls", b"1"), ("c.ppm", PPM), ("c.cls", b"1"), ("c.key.txt", b"mine")]
    assert fields_of(*members, schema=keyed) == [{"key": "x/a.b"}, {"key": "mine"}]
    number = Schema.declare({"key": "int32"})
    assert fields_of(*members[:2], schema=number) == [{}]


@pytest.mark.parametrize(
    ("member", "says"),
    [
        (("a.logit.npy", npy([1, 2, 3])), "would be a field 'logit', the buffer declares boxes float32"),
        (("a.logits.npy", b"hello"), "'a.logits.npy' is no array of numpy"),
        (("a.logits.npy", npy([1, 2, 3])[:-1]), "declared as an array of 24 bytes, 23 are there"),
        (("a.logits.npy", npy([1, 2, 3]) + b"x"), "declared as an array of 24 bytes, 25 are there"),
        (("a.logits.npy", npy([None, {}])), "declared as an array of object"),
        (("a.logits.npy", npy(np.zeros(3, "V0"))), "declared as an array of"),
        (("a.logits.npy", npy(np.zeros(3, [("x", "f4")]))), "declared as an array of"),
        (("a.logits.npy", npy([1]).replace(b"(1,)", b"(-1,)"[:4] + b")")), "numpy|bytes"),
        (("a.logits.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff"), "no array of numpy"),
        (("a.logits.npy", b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70_000), "no array of numpy"),
        (("a.logits.npy", b"\x93NUMPY\x01\x00\x05\x00{'a':"), "no array of numpy"),
        (("a.logits.json", b"[1, 2"), "is not JSON"),
        (("a.logits.json", b"[" * 100_000), "is not JSON"),
        (("a.logits.json", b"\xff"), "is not JSON"),
        (("a.note.txt", b"\xff"), "is not TXT"),
        (("a.weight.txt", b"heavy"), "is not TXT"),
    ],
)
def test_a_field_that_cannot_be_read_is_refused_by_name(member: tuple[str, bytes], says: str) -> None:
    for members in ([("a.ppm", PPM), ("a.cls", b"1"), member], [member, ("a.ppm", PPM), ("a.cls", b"1")]):
        with pytest.raises(BadUpload, match=says):
            fields_of(*members)


def test_a_field_twice_is_refused() -> None:
    with pytest.raises(BadUpload, match=r"'a\.note\.json' brings the field 'note' a second time"):
        fields_of(("a.ppm", PPM), ("a.cls", b"1"), ("a.note.txt", b"x"), ("a.note.json", b'"x"'))


def test_fields_of_one_image_are_bounded_before_they_are_kept() -> None:
    half = npy(np.zeros((MAX_FIELD_BYTES // 2, 1), np.uint8))
    with pytest.raises(TooLarge, match=r"'a\.boxes\.npy' has .* at most"):
        fields_of(("a.ppm", PPM), ("a.cls", b"1"), ("a.boxes.npy", npy(np.zeros((10_000_000, 2), np.float32))))
    two = [("a.boxes.npy", half), ("a.logits.npy", half)]
    for members in ([("a.ppm", PPM), ("a.cls", b"1"), *two], [*two, ("a.ppm", PPM), ("a.cls", b"1")]):
        with pytest.raises(TooLarge, match="fields of 'a' have"):
            fields_of(*members)
    with pytest.raises(TooLarge, match="fields of 'a' have"):
        fields_of(*([("a.note.txt", b"")] * 200), ("a.ppm", PPM), ("a.cls", b"1"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"logits": np.zeros((2, 3))}, "2 values for 3 images"),
        ({"logits": 3}, "one int for 3 images"),
        ({"note": "abc"}, "one str for 3 images"),
        ({"Logits": [1, 2, 3]}, "must match"),
        ({"logits": [None, None, None]}, "neither numbers nor a text"),
    ],
)
def test_columns_that_no_buffer_could_have_are_refused_before_anything_is_sent(
    fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        list(tar.write(images(3), [0, 1, 2], fields=fields))


def test_places_are_where_the_contents_of_members_lie(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (
            ("a.png", b"x" * 1000),
            ("folder/", b""),
            ("n" * 200 + ".png", b"y" * 3),
            ("a.cls", b"7"),
        ):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with path.open("rb") as file:
        found = list(tar.places(file, wanted=lambda name: name.endswith(".cls"), max_bytes=10))
    whole = path.read_bytes()
    assert [place.name for place in found] == ["a.png", "n" * 200 + ".png", "a.cls"]
    assert [whole[place.offset :][: place.size] for place in found] == [b"x" * 1000, b"yyy", b"7"]
    assert [place.content for place in found] == [None, None, b"7"]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (900, "the tar is cut short: it has 900 bytes, and member 'a.png' ends at byte 1536"),
        (1536, "the tar ends at byte 1536"),
        (2560, "the tar ends at byte 2560"),
    ],
)
def test_places_of_a_tar_that_is_cut_short_are_refused(tmp_path: Path, size: int, message: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes((tar.entry("a.png", b"x" * 1000) + tar.entry("a.cls", b"7") + tar.END)[:size])
    with path.open("rb") as file, pytest.raises(BadUpload, match=message):
        list(tar.places(file, wanted=lambda name: False, max_bytes=10))
