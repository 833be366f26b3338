"""A few rows, between the driver and a Parquet file with the statistics that Delta keeps of it: without a Spark job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date, datetime
from io import BytesIO
from typing import Any

import pyarrow as pa
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


def arrow_type(name: str) -> pa.DataType:
    """The Arrow type of a column type of lake.tables."""
    if name.startswith("DECIMAL("):
        precision, scale = name.removeprefix("DECIMAL(").removesuffix(")").split(",")
        return pa.decimal128(int(precision), int(scale))
    if name.startswith("STRUCT<"):
        parts = [part.split(": ") for part in name.removeprefix("STRUCT<").removesuffix(">").split(", ")]
        return pa.struct([pa.field(part, arrow_type(kind)) for part, kind in parts])
    return _TYPES[name]


def arrow_table(table: Table, rows: Sequence[tuple[object, ...]]) -> pa.Table:
    """Rows in the order of the table's columns."""
    schema = pa.schema([pa.field(column.name, arrow_type(column.type)) for column in table.columns])
    columns = list(zip(*rows, strict=True)) or [()] * len(table.columns)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    for column, values in zip(table.columns, arrays, strict=True):
        if values.null_count and not column.nullable:
            raise ValueError(f"{table.qualified_name}.{column.name} is null, which it must not be")
    return pa.Table.from_arrays(arrays, schema=schema)


def encoded(rows: pa.Table) -> bytes:
    """A Parquet file of the rows."""
    out = BytesIO()
    pq.write_table(rows, out, compression="snappy")
    return out.getvalue()


def stored(spark: SparkSession, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a table's Parquet file, without a Spark job. Raises FileNotFoundError."""
    told = content(spark, path)
    if told is None:
        raise FileNotFoundError(f"{path} is in its table's log, and is gone: batch/prove.py tells what is missing")
    return pq.read_table(BytesIO(told), columns=None if columns is None else list(columns))


def statistics(table: Table, rows: pa.Table) -> str:
    """What Delta's log tells of a file: how many rows, lowest and highest of the columns of table.statistics."""
    lowest, highest, nulls = {}, {}, {}
    for name in table.statistics:
        nulls[name] = rows[name].null_count
        values = [value for value in rows[name].to_pylist() if value is not None]
        if values:
            lowest[name], highest[name] = _told(min(values)), _told(max(values))
    return json.dumps({"numRecords": rows.num_rows, "minValues": lowest, "maxValues": highest, "nullCount": nulls})


def _told(value: Any) -> Any:
    if isinstance(value, datetime):
        # To milliseconds, as Delta does, whose readers know it.
        return f"{value:%Y-%m-%dT%H:%M:%S}.{value.microsecond // 1000:03d}Z"
    return value.isoformat() if isinstance(value, date) else value
