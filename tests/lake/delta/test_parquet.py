"""Rows as files: the columns, types and nulls of the table, whatever a library calls them; statistics as Delta's."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from decimal import Decimal
from io import BytesIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from pyspark.sql.types import StructField, StructType

from lake.delta.files import LocalDisk
from lake.delta.parquet import (
    arrow_schema,
    arrow_table,
    arrow_type,
    as_stored,
    delta_schema,
    encoded,
    encoded_file,
    parts_of,
    statistics,
)
from lake.tables import GOLD_CURRENT_PRICE, TABLES, Column, Table

READINGS = Table(
    "test",
    "readings",
    "A reading of a meter",
    key=("meter", "at"),
    columns=(
        Column("meter", "STRING", "which one"),
        Column("at", "TIMESTAMP", "when"),
        Column("value", "DECIMAL(28,12)", "what it showed", nullable=True),
        Column("raw", "BINARY", "as received", nullable=True),
        Column("place", "STRUCT<town: STRING, level: INT>", "where", nullable=True),
        Column("day", "DATE", "date of at"),
    ),
    partitioned_by=("day",),
    statistics=("meter", "at", "day"),
)
AT = datetime(2024, 8, 9, 23, 59, 59, 999_999, UTC)
DAY = date(2024, 8, 9)
ROWS: list[tuple[object, ...]] = [
    ("a", datetime(2024, 8, 9, tzinfo=UTC), Decimal("1.5"), b"1.5", {"town": "x", "level": 1}, DAY),
    ("b", AT, None, None, None, DAY),
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: str(table.qualified_name))
def test_the_schema_in_delta_s_log_is_the_one_that_spark_writes(spark: SparkSession, table: Table) -> None:
    # It parses SQL by a running session.
    assert spark.version
    parsed = StructType.fromDDL(table.schema)
    assert isinstance(parsed, StructType)
    fields = [
        StructField(column.name, field.dataType, column.nullable, {"comment": column.comment})
        for column, field in zip(table.columns, parsed, strict=True)
    ]
    assert json.loads(delta_schema(table)) == json.loads(StructType(fields).json())


def test_types_are_those_of_the_contract() -> None:
    assert arrow_type("DECIMAL(38,18)") == pa.decimal128(38, 18)
    assert arrow_type("TIMESTAMP") == pa.timestamp("us", "UTC")
    assert arrow_type("STRUCT<at: TIMESTAMP, n: DECIMAL(28,12)>") == pa.struct(
        [("at", pa.timestamp("us", "UTC")), ("n", pa.decimal128(28, 12))]
    )
    with pytest.raises(KeyError, match="MAP"):
        arrow_type("MAP<STRING, STRING>")
    for table in TABLES:
        assert arrow_schema(table).names == list(table.column_names)


def test_polars_columns_are_stored_as_the_table_s() -> None:
    rows = arrow_table(READINGS, ROWS)
    frame = pl.from_arrow(rows)
    assert isinstance(frame, pl.DataFrame)
    for level in (pl.CompatLevel.oldest(), pl.CompatLevel.newest()):
        given = frame.select("day", pl.lit(1).alias("more"), *READINGS.column_names[:-1]).to_arrow(compat_level=level)
        assert given.schema != rows.schema
        assert as_stored(READINGS, given).equals(rows)
    assert as_stored(READINGS, rows).equals(rows)
    assert as_stored(READINGS, rows.slice(0, 0)).schema == arrow_schema(READINGS)
    with pytest.raises(KeyError, match="meter"):
        as_stored(READINGS, rows.drop_columns(["meter"]))
    with pytest.raises(pa.ArrowInvalid):
        as_stored(READINGS, rows.set_column(2, "value", pa.array([Decimal(1).scaleb(20)] * 2, pa.decimal128(38, 0))))


@pytest.mark.parametrize("position", [0, 1, 5])
def test_a_null_that_must_not_be_is_refused_by_the_name_of_its_column(position: int) -> None:
    values = list(ROWS[0])
    values[position] = None
    name = READINGS.column_names[position]
    with pytest.raises(ValueError, match=rf"test\.readings\.{name} is null"):
        arrow_table(READINGS, [ROWS[1], tuple(values)])
    rows = pa.Table.from_pylist([dict(zip(READINGS.column_names, values, strict=True))], arrow_schema(READINGS))
    with pytest.raises(ValueError, match=rf"test\.readings\.{name} is null"):
        as_stored(READINGS, rows)


def test_a_file_has_its_partition_in_its_name_and_statistics_cut_to_milliseconds(tmp_path: object) -> None:
    file = encoded_file(READINGS, arrow_table(READINGS, ROWS))
    assert file.name.startswith("day=2024-08-09/part-")
    assert file.action["path"] == file.name
    assert file.action["partitionValues"] == {"day": "2024-08-09"}
    assert file.action["size"] == len(file.content)
    assert json.loads(file.action["stats"]) == {
        "numRecords": 2,
        "minValues": {"meter": "a", "at": "2024-08-09T00:00:00.000Z", "day": "2024-08-09"},
        "maxValues": {"meter": "b", "at": "2024-08-09T23:59:59.999Z", "day": "2024-08-09"},
        "nullCount": {"meter": 0, "at": 0, "day": 0},
    }
    url = f"file:{tmp_path}/{file.name}"
    LocalDisk().write(url, file.content)
    [rows] = parts_of(LocalDisk(), READINGS, url, len(file.content), file.action["partitionValues"])
    assert rows.equals(arrow_table(READINGS, ROWS))
    assert pq.ParquetFile(BytesIO(file.content)).schema_arrow.names == ["meter", "at", "value", "raw", "place"]


def test_a_column_of_nulls_has_no_lowest_value() -> None:
    table = Table("test", "nulls", "", ("a",), (Column("a", "BIGINT", "", nullable=True),), statistics=("a",))
    assert json.loads(statistics(table, arrow_table(table, [(None,), (None,)]))) == {
        "numRecords": 2,
        "minValues": {},
        "maxValues": {},
        "nullCount": {"a": 2},
    }


def test_names_that_repeat_have_a_dictionary_and_a_key_has_none() -> None:
    rows = pa.Table.from_pylist(
        [{"asset": "bitcoin", "source": "binance", "event_id": "binance:1"}],
        pa.schema([arrow_schema(GOLD_CURRENT_PRICE).field(name) for name in ("asset", "source", "event_id")]),
    )
    group = pq.ParquetFile(BytesIO(encoded(rows, unique=("event_id",)))).metadata.row_group(0)
    assert [group.column(number).has_dictionary_page for number in range(3)] == [True, True, False]
