"""Rows of a table as a Parquet file, with what Delta's log says of it: without Spark, on the driver or an executor."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from io import BytesIO
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from lake.files import content
from lake.tables import Table

_TYPES = {
    "STRING": pa.string(),
    "BINARY": pa.binary(),
    "INT": pa.int32(),
    "BIGINT": pa.int64(),
    "DOUBLE": pa.float64(),
    "BOOLEAN": pa.bool_(),
    "DATE": pa.date32(),
    "TIMESTAMP": pa.timestamp("us", "UTC"),
}
# Who looks for a few seconds in a large file reads as many rows.
ROWS_A_GROUP = 16_384
_UNIQUE = {"value", "offset", "kafka_offset", "event_id", "price_usd", "quantity", "trade_id", "sequence"}
_UNIQUE |= {"kafka_timestamp", "event_time", "received_at"}


def arrow_type(name: str) -> pa.DataType:
    """The Arrow type of a column type of lake.tables."""
    if name.startswith("DECIMAL("):
        precision, scale = name.removeprefix("DECIMAL(").removesuffix(")").split(",")
        return pa.decimal128(int(precision), int(scale))
    if name.startswith("STRUCT<"):
        parts = [part.split(": ") for part in name.removeprefix("STRUCT<").removesuffix(">").split(", ")]
        return pa.struct([pa.field(part, arrow_type(kind)) for part, kind in parts])
    return _TYPES[name]


def _schema(table: Table) -> pa.Schema:
    return pa.schema([pa.field(column.name, arrow_type(column.type)) for column in table.columns])


def arrow_table(table: Table, rows: Sequence[tuple[object, ...]]) -> pa.Table:
    """Rows in the order of the table's columns."""
    schema = _schema(table)
    columns = list(zip(*rows, strict=True)) or [()] * len(table.columns)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    for column, values in zip(table.columns, arrays, strict=True):
        if values.null_count and not column.nullable:
            raise ValueError(f"{table.qualified_name}.{column.name} is null, which it must not be")
    return pa.Table.from_arrays(arrays, schema=schema)


def as_stored(table: Table, rows: pa.Table) -> pa.Table:
    """The rows with the table's columns, in its order and of its types."""
    return rows.select(list(table.column_names)).cast(_schema(table))


def encoded(rows: pa.Table) -> bytes:
    """A Parquet file of the rows."""
    out = BytesIO()
    # A column that has hardly a value twice is not worth a dictionary.
    dictionary = [name for name in rows.column_names if name not in _UNIQUE]
    pq.write_table(rows, out, compression="snappy", use_dictionary=dictionary, row_group_size=ROWS_A_GROUP)
    return out.getvalue()


@dataclass(frozen=True)
class EncodedFile:
    """A data file of a table: its name in the table's folder, its bytes, and what Delta's log says of it (`add`)."""

    name: str
    content: bytes
    action: dict[str, Any]


def encoded_file(table: Table, rows: pa.Table) -> EncodedFile:
    """A file of at least one row, all of the same partition."""
    partition = {name: str(rows[name][0]) for name in table.partitioned_by}
    folder = "".join(f"{name}={value}/" for name, value in partition.items())
    name = f"{folder}part-{uuid4()}.snappy.parquet"
    content = encoded(rows.drop_columns(list(table.partitioned_by)))
    action = {
        "path": name,
        "partitionValues": partition,
        "size": len(content),
        "modificationTime": time.time_ns() // 1_000_000,
        "dataChange": True,
        "stats": statistics(table, rows),
    }
    return EncodedFile(name, content, action)


def stored(spark: SparkSession, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a table's Parquet file, without a Spark job. Raises FileNotFoundError."""
    told = content(spark, path)
    if told is None:
        raise FileNotFoundError(f"{path} is in its table's log, and is gone: batch/prove.py tells what is missing")
    return pq.ParquetFile(BytesIO(told)).read(None if columns is None else list(columns))


def statistics(table: Table, rows: pa.Table) -> str:
    """What Delta's log tells of a file: how many rows, lowest and highest of the columns of table.statistics."""
    lowest, highest, nulls = {}, {}, {}
    for name in table.statistics:
        nulls[name] = rows[name].null_count
        if nulls[name] < rows.num_rows:
            lowest[name], highest[name] = (_told(end.as_py()) for end in pc.min_max(rows[name]).values())
    return json.dumps({"numRecords": rows.num_rows, "minValues": lowest, "maxValues": highest, "nullCount": nulls})


def _told(value: Any) -> Any:
    if isinstance(value, datetime):
        # To milliseconds, as Delta does, whose readers know it.
        return f"{value:%Y-%m-%dT%H:%M:%S}.{value.microsecond // 1000:03d}Z"
    return value.isoformat() if isinstance(value, date) else value
