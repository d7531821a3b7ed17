"""Fields are declared as text, given as arrays, stored as records, and come back as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import batch, index, pack, strip
from engram.draw import Plan
from engram.errors import BadUpload, InvalidRequest, StripCorrupt
from engram.fields import MAX_FIELDS, MAX_RECORD_BYTES, NO_FIELDS, Column, Schema
from tests.contents import pictures

DECLARED = {"boxes": "float32 [any, 5]", "key": "utf8", "logits": "float16 [3]", "weight": "float32 finite"}
SCHEMA = Schema.declare(DECLARED)


def given_for(count: int) -> dict[str, Any]:
    """Good columns of `SCHEMA`."""
    rng = np.random.default_rng(count)
    return {
        "boxes": [rng.normal(size=(row % 3, 5)) for row in range(count)],
        "key": [f"käse {row}" for row in range(count)],
        "logits": rng.normal(size=(count, 3)),
        "weight": list(range(count)),
    }


def records(schema: Schema, columns: dict[str, Any], count: int) -> list[bytes]:
    return schema.columns(columns, count).records(np.arange(count))


def assert_same(found: dict[str, Column], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, column in expected.items():
        assert len(found[name]) == len(column)
        for one, other in zip(found[name], column, strict=True):
            assert np.array_equal(one, other, equal_nan=not isinstance(one, str)), name


# Declared


def test_a_declaration_has_one_spelling_in_the_order_of_names() -> None:
    schema = Schema.declare(
        {"weight": " float32  finite ", "boxes": "float32[any,5]", "key": "utf8", "n": "int8 [2, 3]"}
    )
    assert schema.text == "boxes float32 [any, 5]; key utf8; n int8 [2, 3]; weight float32 finite"
    assert Schema.parse(schema.text) == schema
    assert Schema.declare(schema.declared) == schema
    assert [field.name for field in schema.ragged] == ["boxes", "key"]
    assert Schema.declare({}) is NO_FIELDS
    assert not NO_FIELDS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("logits", "float128"),
        ("logits", ""),
        ("logits", "float16 100"),
        ("logits", "float16 []"),
        ("logits", "float16 [0]"),
        ("logits", "float16 [-1]"),
        ("logits", "float16 [5, any]"),
        ("logits", "float16 [1e3]"),
        ("logits", "float16 [600000]"),
        ("logits", "float16 [1,1,1,1,1,1,1,1,1]"),
        ("logits", "int8 finite"),
        ("logits", "object"),
        ("key", "utf8 [3]"),
        ("key", "utf8 finite"),
        ("Logits", "float16"),
        ("a" * 33, "float16"),
        ("a.b", "float16"),
        ("", "float16"),
        ("cls", "uint8"),
        ("images", "uint8"),
        ("png", "uint8"),
    ],
)
def test_what_cannot_be_a_field_is_refused_when_it_is_declared(name: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match="field"):
        Schema.declare({name: text})


def test_a_buffer_has_a_bounded_number_of_fields_and_bytes_for_each_exemplar() -> None:
    Schema.declare({f"f{number}": "bool" for number in range(MAX_FIELDS)})
    with pytest.raises(InvalidRequest, match="65 fields"):
        Schema.declare({f"f{number}": "bool" for number in range(MAX_FIELDS + 1)})
    with pytest.raises(InvalidRequest, match="bytes for each exemplar"):
        Schema.declare(dict.fromkeys("ab", "float32 [200000]"))
    with pytest.raises(InvalidRequest, match="to say what they are"):
        Schema.declare({f"{number:a>32d}": f"float32 [{', '.join(['1'] * 8)}]" for number in range(10, 74)})


# By hand


def test_a_record_is_the_fixed_fields_and_then_each_ragged_one_behind_its_count() -> None:
    schema = Schema.declare({"a": "uint8 [any, 2]", "b": "bool", "c": "int16 [2]", "t": "utf8"})
    assert records(schema, {"a": [[[1, 2], [3, 4]]], "b": [True], "c": [[-2, 5]], "t": ["é"]}, 1) == [
        b"\x01" + b"\xfe\xff\x05\x00" + b"\x02\x00\x00\x00\x01\x02\x03\x04" + b"\x02\x00\x00\x00\xc3\xa9"
    ]
    assert schema.min_bytes == 1 + 4 + 4 + 4


def test_columns_come_back_as_arrays_of_their_own() -> None:
    columns = given_for(7)
    found = SCHEMA.decode(records(SCHEMA, columns, 7))
    logits = found["logits"]
    assert isinstance(logits, np.ndarray)
    assert logits.dtype == np.float16
    assert logits.shape == (7, 3)
    assert logits.flags.writeable
    assert logits.flags.aligned
    assert logits.flags.c_contiguous
    assert isinstance(found["boxes"], list)
    assert np.asarray(found["boxes"][2]).dtype == np.float32
    assert_same(
        found,
        {
            "boxes": [boxes.astype(np.float32) for boxes in columns["boxes"]],
            "key": columns["key"],
            "logits": columns["logits"].astype(np.float16),
            "weight": np.arange(7, dtype=np.float32),
        },
    )


def test_one_exemplar_alone_has_the_record_that_it_has_among_others() -> None:
    columns = given_for(5)
    together = records(SCHEMA, columns, 5)
    assert [
        SCHEMA.record({name: column[row] for name, column in columns.items()}, "it") for row in range(5)
    ] == together


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": np.zeros((4, 2))}, r"'logits' of exemplar 0 is float64 \[2\], the buffer declares float16 \[3\]"),
        ({"logits": np.zeros(4)}, r"'logits' of exemplar 0 is float64, the buffer declares float16 \[3\]"),
        ({"logits": [[1, 2, 3]] * 3 + [[1, 2]]}, r"'logits' of exemplar 3 is int64 \[2\]"),
        ({"logits": [[1, 2, 3]] * 3 + [None]}, "'logits' of exemplar 3 is of type NoneType"),
        ({"logits": [[1, 2, 3]] * 3 + [[[1], [2, 3]]]}, "'logits' of exemplar 3 is no rectangular array"),
        ({"logits": np.full((4, 3), 1e6)}, "'logits' of exemplar 0 is .* with values in 1000000.0"),
        ({"logits": [["a", "b", "c"]] * 4}, "'logits' of exemplar 0 is"),
        ({"logits": np.zeros((4, 3), np.complex64)}, "'logits' of exemplar 0 is complex64"),
        ({"weight": [1, 2, 3]}, "'weight' has 3 values for 4 exemplars"),
        ({"weight": 5}, "'weight' has one int for 4 exemplars"),
        ({"weight": np.array(5)}, "'weight' has one ndarray for 4 exemplars"),
        ({"key": "abcd"}, "'key' has one str for 4 exemplars"),
        ({"weight": [1, 2, float("nan"), 4]}, "'weight' of exemplar 2 is nan"),
        ({"weight": [1, float("inf"), 3, 4]}, "'weight' of exemplar 1 is inf"),
        ({"weight": ["1", "2", "3", "4"]}, "'weight' of exemplar 0 is"),
        ({"weight": [True] * 4}, "'weight' of exemplar 0 is bool"),
        ({"boxes": [np.zeros((2, 5))] * 3 + [np.zeros((2, 4))]}, r"'boxes' of exemplar 3 is float64 \[2, 4\]"),
        ({"boxes": [np.zeros((0, 5))] * 3 + [np.empty((10_000_000, 5))]}, "'boxes' of exemplar 3 has 10000000 rows"),
        ({"key": ["a", "b", "c", 4]}, "'key' of exemplar 3 is of type int, the buffer declares utf8"),
        ({"key": ["a", "b", "c", "\ud800"]}, "'key' of exemplar 3 is a text that UTF-8 cannot say"),
        ({"key": ["a", "b", "c", "x" * 2_000_000]}, "'key' of exemplar 3 has 2000000 bytes of text"),
        ({"more": [1, 2, 3, 4]}, "the upload has a field 'more', the buffer declares boxes float32"),
    ],
)
def test_a_column_that_is_not_what_was_declared_is_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BadUpload, match=message):
        SCHEMA.columns(given_for(4) | changed, 4)


def test_a_field_that_is_missing_is_refused_by_name() -> None:
    columns = given_for(4)
    del columns["weight"]
    with pytest.raises(BadUpload, match="no field 'weight'"):
        SCHEMA.columns(columns, 4)
    with pytest.raises(BadUpload, match="the buffer declares no fields"):
        NO_FIELDS.columns({"weight": [1]}, 1)


def test_a_key_that_is_not_given_is_the_number_of_the_image() -> None:
    columns = given_for(3)
    del columns["key"]
    assert SCHEMA.decode(records(SCHEMA, columns, 3))["key"] == ["0000000000", "0000000001", "0000000002"]


def test_fields_that_are_small_one_by_one_may_be_too_large_together() -> None:
    schema = Schema.declare({"a": "uint8 [any]", "t": "utf8"})
    half = MAX_RECORD_BYTES // 2
    assert len(records(schema, {"a": [np.zeros(half - 8, np.uint8)], "t": ["x" * half]}, 1)[0]) == MAX_RECORD_BYTES
    large = {"a": np.zeros(half, np.uint8), "t": "x" * half}
    with pytest.raises(BadUpload, match="exemplar 0"):
        schema.columns({name: [cell] for name, cell in large.items()}, 1)
    with pytest.raises(BadUpload, match="exemplar 0"):
        schema.record(large, "exemplar 0")


@pytest.mark.parametrize(
    ("declared", "value", "is_taken"),
    [
        ("float16", np.float64(0.1), True),
        ("float16", np.float64(7e4), False),
        ("float16", np.float64("inf"), True),
        ("float32", np.int64(2**40), True),
        ("float16", np.int64(70_000), False),
        ("float64", np.float16("nan"), True),
        ("float64 finite", np.float16("nan"), False),
        ("uint8", 255, True),
        ("uint8", 256, False),
        ("uint8", -1, False),
        ("int8", np.uint64(127), True),
        ("int64", np.uint64(2**63), False),
        ("uint64", np.uint64(2**64 - 1), True),
        ("int32", 1.0, False),
        ("int32", True, False),
        ("bool", np.bool_(True), True),
        ("bool", 1, False),
    ],
)
def test_values_are_cast_where_no_meaning_is_lost(declared: str, value: Any, is_taken: bool) -> None:
    schema = Schema.declare({"value": declared})
    if not is_taken:
        with pytest.raises(BadUpload, match="'value'"):
            records(schema, {"value": [value]}, 1)
        with pytest.raises(BadUpload, match="'value'"):
            schema.record({"value": value}, "it")
        return
    (record,) = records(schema, {"value": [value]}, 1)
    assert schema.record({"value": value}, "it") == record
    (found,) = np.asarray(schema.decode([record])["value"])
    assert found.dtype.name == declared.split()[0]
    assert found == value or np.isnan(value) or abs(found - value) < 1e-3 * abs(value)


def test_arrays_of_the_other_byte_order_are_turned() -> None:
    schema = Schema.declare({"value": "float32 [2]"})
    assert records(schema, {"value": np.array([[1, 2]], ">f4")}, 1) == [np.array([1, 2], "<f4").tobytes()]


@pytest.mark.parametrize("size", [0, 1, 9, 12])
def test_records_that_are_cut_or_too_long_are_refused(size: int) -> None:
    schema = Schema.declare({"a": "uint8 [any, 2]", "b": "int32"})
    (whole,) = records(schema, {"a": [[[1, 2]]], "b": [9]}, 1)
    assert len(whole) == 10
    with pytest.raises(StripCorrupt):
        schema.decode([(whole + b"\0\0")[:size]])


# Any schema, any values

DTYPES = ["bool", "uint8", "int16", "uint32", "int64", "float16", "float32", "float64"]
SHAPES = ["", " [1]", " [2, 3]", " [any]", " [any, 2]", " [any, 2, 2]"]
SCHEMAS = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True).filter(lambda name: name not in ("cls", "png", "rows")),
    st.one_of(st.just("utf8"), st.builds("".join, st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES)))),
    max_size=4,
).map(Schema.declare)


def any_column(schema: Schema, count: int, seed: int) -> dict[str, Any]:
    """Random columns of a schema, of the declared types."""
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {}
    for field in schema.fields:
        shapes = [((int(rng.integers(0, 4)), *field.shape) if field.is_ragged else field.shape) for _ in range(count)]
        if field.dtype == "utf8":
            columns[field.name] = ["".join(map(chr, rng.integers(1, 0xD000, 5))) for _ in range(count)]
        elif field.dtype == "bool":
            columns[field.name] = [rng.integers(0, 2, shape).astype(bool) for shape in shapes]
        else:
            columns[field.name] = [
                np.frombuffer(rng.bytes(field.stored.itemsize * int(np.prod(shape))), field.stored).reshape(shape)
                for shape in shapes
            ]
    return columns


def with_fields(schema: Schema, columns: dict[str, Any], count: int, *, quality: int = 30) -> strip.Exemplars:
    ids = np.arange(count) * 3 // count
    coded = schema.columns(columns, count).records(np.arange(count)) if schema else None
    return strip.encode(pictures(3, count, (9, 8, 1)), ids, quality=quality, schema=schema, records=coded)


def picked(columns: dict[str, Any], rows: npt.ArrayLike) -> dict[str, Any]:
    return {name: [column[row] for row in np.asarray(rows).tolist()] for name, column in columns.items()}


@settings(max_examples=25)
@given(schema=SCHEMAS, count=st.integers(1, 9), data=st.data())
def test_fields_survive_packs_selection_merging_prefixes_and_draws(
    schema: Schema, count: int, data: st.DataObject
) -> None:
    columns = any_column(schema, count, count)
    stored = with_fields(schema, columns, count)
    whole = pack.to_bytes(stored)
    read = pack.parse(whole)
    indexed = index.of(read, pack.digest(whole)).over(whole)
    for found in (read, indexed):
        assert_same(found.fields(), columns)
        assert found.schema == schema
    assert pack.size(read.form, strip.runs_of(read.class_ids), read.sizes) == len(pack.to_bytes(stored))

    rows = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=12))
    chosen = read.select(rows)
    assert_same(chosen.fields(), picked(columns, rows))
    merged = strip.concat([chosen, read])
    assert_same(merged.fields(), picked(columns, [*rows, *range(count)]))

    kept = {class_id: data.draw(st.integers(0, held)) for class_id, held in strip.runs_of(read.class_ids)}
    prefix = pack.prefix(read, kept)
    first = {class_id: read.class_ids.tolist().index(class_id) for class_id in kept}
    assert_same(prefix.fields(), picked(columns, [first[c] + rank for c, more in kept.items() for rank in range(more)]))

    ids = read.class_ids[np.array(rows)]
    plan = Plan(np.array([0, 1] * len(rows))[: len(rows)], np.array(rows), ids, ids)
    plan = Plan(np.sort(plan.packs), *plan[1:])
    parts = batch.collect([indexed, stored], plan)
    for got in (batch.decode(batch.assemble(parts)), batch.from_parts(parts)):
        assert_same(got.fields, picked(columns, rows))
        assert np.array_equal(got.images, stored.decode()[rows])


@settings(max_examples=30)
@given(schema=SCHEMAS.filter(bool), counts=st.lists(st.integers(1, 30), min_size=1, max_size=3), data=st.data())
def test_what_fits_counts_the_bytes_of_fields(schema: Schema, counts: list[int], data: st.DataObject) -> None:
    count = sum(counts)
    stored = with_fields(schema, any_column(schema, count, 5), count)
    shares = {class_id: data.draw(st.integers(0, 3000)) for class_id in range(3)}
    kept = pack.fit(stored, shares)
    assert (len(pack.to_bytes(kept)) if len(kept) else 0) <= sum(shares.values())


def test_strips_of_several_qualities_give_one_column_each() -> None:
    columns = given_for(6)
    packs = [with_fields(SCHEMA, columns, 6, quality=quality) for quality in (30, 60)]
    plan = Plan(np.array([0, 0, 1]), np.array([1, 5, 2]), np.zeros(3, np.int64), np.zeros(3, np.int64))
    parts = batch.collect(packs, plan)
    assert len(parts) == 2
    expected = SCHEMA.decode(records(SCHEMA, picked(columns, [1, 5, 2]), 3))
    for got in (batch.decode(batch.assemble(parts)), batch.from_parts(parts)):
        assert_same(got.fields, expected)
    other = with_fields(NO_FIELDS, {}, 6).loose().to_strips(tasks=[0] * 6, rows=range(6))
    with pytest.raises(StripCorrupt, match="different fields"):
        batch.decode(batch.assemble(parts) + other[0])


def test_exemplars_of_different_fields_share_no_strip() -> None:
    with pytest.raises(ValueError, match="different forms"):
        strip.concat([with_fields(SCHEMA, given_for(3), 3), with_fields(NO_FIELDS, {}, 3)])
    with pytest.raises(ValueError, match="as many records"):
        strip.encode(pictures(0, 2), [0, 0], quality=5, schema=SCHEMA)


def test_pictures_and_files_of_exemplars_with_fields_are_plain_jpegs() -> None:
    stored, plain = with_fields(SCHEMA, given_for(4), 4), with_fields(NO_FIELDS, {}, 4)
    assert stored.jpeg(2) == plain.jpeg(2)
    assert list(stored.loose().files()) == list(plain.loose().files())
    assert stored.loose().picture() == plain.loose().picture()
    assert np.array_equal(stored.decode(), plain.decode())
    assert [stored.segment(row) for row in range(4)] == [plain.segment(row) for row in range(4)]


def test_a_damaged_record_costs_its_exemplar() -> None:
    stored = with_fields(SCHEMA, given_for(6), 6)
    damaged = bytearray(pack.to_bytes(stored))
    damaged[-1] ^= 1
    rest, rows = pack.salvage(bytes(damaged), 6)
    assert rest is not None
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert rest.fields()["key"] == given_for(6)["key"][:5]
    with pytest.raises(StripCorrupt, match="exemplar 5"):
        pack.parse(bytes(damaged))
