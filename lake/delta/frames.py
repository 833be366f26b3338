"""A table's rows as Polars frames: cast to its types, read from its files, grouped by span, split into files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from datetime import date

import polars as pl
import pyarrow.parquet as pq

from lake.delta.files import Files
from lake.delta.log import DataFile
from lake.delta.parquet import arrow_schema
from lake.tables import Table

# A file with so many rows gets no further span. So a change of one row rewrites about so many rows.
ROWS_A_FILE = 1_000


def schema_of(table: Table) -> pl.Schema:
    """The table's columns and their Polars types."""
    return pl.DataFrame(arrow_schema(table).empty_table()).schema


def typed(table: Table, rows: pl.DataFrame) -> pl.DataFrame:
    """The rows with the table's columns and types; columns newer than the rows are null."""
    schema = schema_of(table)
    absent = [pl.lit(None, kind).alias(name) for name, kind in schema.items() if name not in rows.columns]
    return rows.with_columns(absent).select(schema.names()).cast(schema)


def read_rows(files: Files, table: Table, file: DataFile) -> pl.DataFrame:
    """All rows of a data file. Raises FileNotFoundError, StoreError."""
    rows = pl.from_arrow(pq.ParquetFile(io.BytesIO(files.read(file.path))).read())
    assert isinstance(rows, pl.DataFrame)
    # Spark may have written the partition columns into the file too.
    partition = {name: pl.lit(date.fromisoformat(day)) for name, day in file.add["partitionValues"].items()}
    return typed(table, rows.with_columns(**partition))


def span_of(table: Table, column: str = "") -> pl.Expr:
    """A row's span. column: its time; default: the table's file_time."""
    if table.file_span is None:
        return pl.lit(0, pl.Int64)
    return pl.col(column or table.file_time).cast(pl.Int64) // table.span_micros


def cut(
    table: Table, rows: pl.DataFrame, is_interrupted: Callable[[int, int], bool], replaced: Iterable[DataFile] = ()
) -> list[pl.DataFrame]:
    """Split rows into files: each has consecutive whole spans of one partition, until it has ROWS_A_FILE rows.

    is_interrupted(first, end): whether a file that stays may hold a span from `first` to before `end`. replaced: the
    files that these rows replace; if one of them is larger, as joined files are, the new files may be as large.
    """
    rows_a_file = max([ROWS_A_FILE, *(file.rows for file in replaced)])
    if rows.is_empty():
        return []
    if table.file_span is None:
        return [rows]
    partition = list(table.partitioned_by)
    first, last = rows.select(span_of(table).min().alias("first"), span_of(table).max().alias("last")).row(0)
    one_partition = not partition or rows.select(partition).n_unique() == 1
    if rows.height <= rows_a_file and one_partition and not is_interrupted(first, last + 1):
        return [rows]
    rows = rows.with_columns(span_of(table).alias("_span")).sort("_span", *partition)
    pieces: list[pl.DataFrame] = []
    begin, filled = 0, 0
    before: list[object] = []
    end = 0
    for span, *of, count in rows.group_by("_span", *partition, maintain_order=True).len().rows():
        if filled and (filled >= rows_a_file or of != before or is_interrupted(end, span)):
            pieces.append(rows.slice(begin, filled))
            begin, filled = begin + filled, 0
        filled, before, end = filled + count, of, span + 1
    pieces.append(rows.slice(begin, filled))
    return [piece.drop("_span") for piece in pieces]
