"""Encode a table's rows as a Parquet file with its `add` action for Delta's log, without Spark."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cache
from io import BytesIO
from typing import Any, BinaryIO
from uuid import uuid4

import polars as pl
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
WHOLE_FILE = 4 << 20
"""A file of up to so many bytes is read whole, a larger one in parts."""
_SEED = 20_241_125
"""Of the rows' hashes, which are compared within one process only."""


class ContentsDiffer(RuntimeError):
    """A file that was written to replace others does not have their rows."""


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
    names = _with_dictionary(rows.schema, unique)
    pq.write_table(rows, output, compression="snappy", use_dictionary=names, row_group_size=ROWS_PER_GROUP)
    return output.getvalue()


def _with_dictionary(schema: pa.Schema, unique: Collection[str]) -> list[str]:
    return [field.name for field in schema if pa.types.is_string(field.type) and field.name not in unique]


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
    return EncodedFile(name, content, _add_action(name, partition, len(content), statistics(table, rows)))


def _add_action(name: str, partition: Mapping[str, str], size: int, stats: str) -> dict[str, Any]:
    return {
        "path": name,
        "partitionValues": dict(partition),
        "size": size,
        "modificationTime": time.time_ns() // 1_000_000,
        "dataChange": True,
        "stats": stats,
    }


class Contents:
    """What a file contains, added up over parts of its rows: statistics for Delta's log, and a checksum of the rows.

    Two files with equal contents have the same rows; their order may differ.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self.rows = 0
        # The sum of a hash of each row, modulo 2^64.
        self.checksum = 0
        self._lowest: dict[str, Any] = {}
        self._highest: dict[str, Any] = {}
        self._nulls = dict.fromkeys(table.statistics, 0)

    def add(self, rows: pa.Table) -> None:
        """Add rows from `as_stored`."""
        frame = pl.from_arrow(rows)
        assert isinstance(frame, pl.DataFrame)
        self.checksum = (self.checksum + int(frame.hash_rows(seed=_SEED).sum() or 0)) % 2**64
        self.add_statistics(rows)

    def add_statistics(self, rows: pa.Table) -> None:
        """As `add`, without the checksum."""
        self.rows += rows.num_rows
        for name in self._table.statistics:
            self._nulls[name] += rows[name].null_count
            if rows[name].null_count < rows.num_rows:
                lowest, highest = (end.as_py() for end in pc.min_max(rows[name]).values())
                self._lowest[name] = min(self._lowest.get(name, lowest), lowest)
                self._highest[name] = max(self._highest.get(name, highest), highest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contents) and vars(self) == vars(other)

    def __str__(self) -> str:
        return f"{self.rows} rows with checksum {self.checksum:016x} from {self._lowest} to {self._highest}"

    def statistics(self) -> str:
        """The file's statistics for Delta's log, as JSON: row count; of table.statistics lowest, highest and nulls.

        Times are truncated to milliseconds, as in Delta: a row may be up to a millisecond above the highest time.
        """
        ends = ({name: _json_value(value) for name, value in end.items()} for end in (self._lowest, self._highest))
        lowest, highest = ends
        return json.dumps(
            {"numRecords": self.rows, "minValues": lowest, "maxValues": highest, "nullCount": self._nulls}
        )


def statistics(table: Table, rows: pa.Table) -> str:
    """The statistics of a file of these rows; see Contents.statistics."""
    contents = Contents(table)
    contents.add_statistics(rows)
    return contents.statistics()


def parts_of(files: Files, table: Table, path: str, size: int, partition: Mapping[str, str]) -> Iterator[pa.Table]:
    """The rows of a table's data file, as in `as_stored`, in parts of ROWS_PER_GROUP.

    size: in bytes. partition: the partition columns' values. A column that is newer than the file is null.
    Raises FileNotFoundError and StoreError.
    """
    source = BytesIO(files.read(path)) if size <= WHOLE_FILE else files.open(path, size)
    yield from _parts(table, source, partition)


def _parts(table: Table, source: BinaryIO, partition: Mapping[str, str]) -> Iterator[pa.Table]:
    schema = arrow_schema(table)
    for batch in pq.ParquetFile(source).iter_batches(ROWS_PER_GROUP, use_threads=False):
        rows = pa.Table.from_batches([batch])
        # Spark may have written the partition columns into the file too.
        for name in set(table.column_names) - (set(rows.column_names) - partition.keys()):
            value = date.fromisoformat(partition[name]) if name in partition else None
            column = pa.repeat(pa.scalar(value, schema.field(name).type), rows.num_rows)
            index = rows.schema.get_field_index(name)
            rows = rows.append_column(name, column) if index < 0 else rows.set_column(index, name, column)
        yield as_stored(table, rows)


def joined_file(table: Table, parts: Iterable[pa.Table], partition: Mapping[str, str]) -> tuple[EncodedFile, Contents]:
    """One file of all these rows, from `parts_of`, and its contents. Raises ContentsDiffer if they do not read back."""
    contents, output = Contents(table), BytesIO()
    kept = [name for name in table.column_names if name not in partition]
    schema = pa.schema([field for field in arrow_schema(table) if field.name in kept])
    unique = table.key if len(table.key) == 1 else ()
    with pq.ParquetWriter(output, schema, compression="zstd", use_dictionary=_with_dictionary(schema, unique)) as file:
        for rows in _in_groups(parts):
            contents.add(rows)
            file.write_table(rows.select(kept), row_group_size=ROWS_PER_GROUP)
    written = Contents(table)
    output.seek(0)
    for rows in _parts(table, output, partition):
        written.add(rows)
    if written != contents:
        raise ContentsDiffer(f"{table.qualified_name}: a joined file has {written} instead of {contents}")
    name = "".join(f"{name}={value}/" for name, value in partition.items()) + f"part-{uuid4()}.zstd.parquet"
    action = _add_action(name, partition, output.getbuffer().nbytes, contents.statistics())
    return EncodedFile(name, output.getvalue(), action), contents


def _in_groups(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The parts, those of few rows concatenated up to ROWS_PER_GROUP."""
    waiting: list[pa.Table] = []
    count = 0
    for part in parts:
        if waiting and count + part.num_rows > ROWS_PER_GROUP:
            yield pa.concat_tables(waiting)
            waiting, count = [], 0
        waiting.append(part)
        count += part.num_rows
    if count:
        yield pa.concat_tables(waiting)


def _json_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%dT%H:%M:%S}.{value.microsecond // 1000:03d}Z"
    return value.isoformat() if isinstance(value, date) else value
