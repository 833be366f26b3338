"""Encode a table's rows as a Parquet file with its `add` action for Delta's log, without Spark."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cache
from io import BytesIO
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lake.delta.files import Files
from lake.tables import Table

_ARROW_TYPES = {
    "STRING": pa.string(),
    "BINARY": pa.binary(),
    "INT": pa.int32(),
    "BIGINT": pa.int64(),
    "DOUBLE": pa.float64(),
    "BOOLEAN": pa.bool_(),
    "DATE": pa.date32(),
    "TIMESTAMP": pa.timestamp("us", "UTC"),
}
_DELTA_TYPES = {
    "STRING": "string",
    "BINARY": "binary",
    "INT": "integer",
    "BIGINT": "long",
    "DOUBLE": "double",
    "BOOLEAN": "boolean",
    "DATE": "date",
    "TIMESTAMP": "timestamp",
}
ROWS_PER_GROUP = 16_384
"""A lookup of a few seconds in a large file then reads one row group."""


def _fields(struct: str) -> list[tuple[str, str]]:
    """(name, type) of each field of a type STRUCT<name: TYPE, ...>; structs do not nest."""
    fields = struct.removeprefix("STRUCT<").removesuffix(">").split(", ")
    return [(name, kind) for name, _, kind in (field.partition(": ") for field in fields)]


@cache
def arrow_type(name: str) -> pa.DataType:
    """The Arrow type of a column type of lake.tables. Raises KeyError for a type that no table has."""
    if name.startswith("DECIMAL("):
        precision, scale = name.removeprefix("DECIMAL(").removesuffix(")").split(",")
        return pa.decimal128(int(precision), int(scale))
    if name.startswith("STRUCT<"):
        return pa.struct([pa.field(field, arrow_type(kind)) for field, kind in _fields(name)])
    return _ARROW_TYPES[name]


def arrow_schema(table: Table) -> pa.Schema:
    """The table's Arrow schema."""
    return pa.schema([pa.field(column.name, arrow_type(column.type)) for column in table.columns])


def delta_schema(table: Table) -> str:
    """The table's schema for Delta's log (`schemaString`): JSON, with comments and nullability."""
    fields = [
        _delta_field(column.name, column.type, column.nullable, {"comment": column.comment}) for column in table.columns
    ]
    return json.dumps({"type": "struct", "fields": fields})


def _delta_field(name: str, kind: str, nullable: bool, metadata: dict[str, str]) -> dict[str, Any]:
    return {"name": name, "type": _delta_type(kind), "nullable": nullable, "metadata": metadata}


def _delta_type(name: str) -> str | dict[str, Any]:
    if name.startswith("DECIMAL("):
        return name.lower()
    if name.startswith("STRUCT<"):
        return {"type": "struct", "fields": [_delta_field(field, kind, True, {}) for field, kind in _fields(name)]}
    return _DELTA_TYPES[name]


def arrow_table(table: Table, rows: Sequence[tuple[object, ...]]) -> pa.Table:
    """Rows, tuples in the order of the table's columns, as an Arrow table. Raises ValueError for a forbidden null."""
    schema = arrow_schema(table)
    columns = list(zip(*rows, strict=True)) or [()] * len(table.columns)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return _checked(table, pa.Table.from_arrays(arrays, schema=schema))


def as_stored(table: Table, rows: pa.Table) -> pa.Table:
    """The rows with exactly the table's columns, in its order and cast to its types.

    Raises KeyError for an absent column, ValueError for a forbidden null, and pyarrow.ArrowInvalid for a value that
    does not fit its type.
    """
    rows, schema = rows.select(list(table.column_names)), arrow_schema(table)
    return _checked(table, rows if rows.schema.equals(schema) else rows.cast(schema))


def _checked(table: Table, rows: pa.Table) -> pa.Table:
    """The same rows. Raises ValueError for a forbidden null."""
    for column, values in zip(table.columns, rows.columns, strict=True):
        if values.null_count and not column.nullable:
            raise ValueError(f"{table.qualified_name}.{column.name} is null, which it must not be")
    return rows


def encoded(rows: pa.Table, unique: Collection[str] = ()) -> bytes:
    """A Parquet file of the rows. unique: columns that seldom repeat a value.

    Only names get a dictionary. Numbers and times seldom repeat, and Snappy compresses those that do: dictionaries for
    all columns take 1.8 times the CPU, and make a larger file.
    """
    output = BytesIO()
    names = [field.name for field in rows.schema if pa.types.is_string(field.type) and field.name not in unique]
    pq.write_table(rows, output, compression="snappy", use_dictionary=names, row_group_size=ROWS_PER_GROUP)
    return output.getvalue()


@dataclass(frozen=True)
class EncodedFile:
    """A data file of a table: its name in the table's folder, its bytes, and its `add` action for Delta's log."""

    name: str
    content: bytes
    action: dict[str, Any]


def encoded_file(table: Table, rows: pa.Table) -> EncodedFile:
    """A file of one or more rows from `as_stored`, all of one partition; partitions are dates."""
    partition = {name: str(rows[name][0]) for name in table.partitioned_by}
    folder = "".join(f"{name}={value}/" for name, value in partition.items())
    name = f"{folder}part-{uuid4()}.snappy.parquet"
    unique = table.key if len(table.key) == 1 else ()
    content = encoded(rows.drop_columns(list(table.partitioned_by)), unique)
    action = {
        "path": name,
        "partitionValues": partition,
        "size": len(content),
        "modificationTime": time.time_ns() // 1_000_000,
        "dataChange": True,
        "stats": statistics(table, rows),
    }
    return EncodedFile(name, content, action)


def stored(files: Files, url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a table's Parquet file, without partition columns. Raises FileNotFoundError and StoreError."""
    try:
        content = files.read(url)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{url} is in its table's log, and is gone: batch/prove.py tells what is missing"
        ) from None
    return pq.ParquetFile(BytesIO(content)).read(None if columns is None else list(columns))


def statistics(table: Table, rows: pa.Table) -> str:
    """A file's statistics for Delta's log, as JSON: the row count; of table.statistics lowest, highest and nulls.

    Times are truncated to milliseconds, as in Delta: a row may be up to a millisecond above the highest time.
    """
    lowest, highest, nulls = {}, {}, {}
    for name in table.statistics:
        nulls[name] = rows[name].null_count
        if nulls[name] < rows.num_rows:
            lowest[name], highest[name] = (_json_value(end.as_py()) for end in pc.min_max(rows[name]).values())
    return json.dumps({"numRecords": rows.num_rows, "minValues": lowest, "maxValues": highest, "nullCount": nulls})


def _json_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%dT%H:%M:%S}.{value.microsecond // 1000:03d}Z"
    return value.isoformat() if isinstance(value, date) else value
