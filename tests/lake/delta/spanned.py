"""A table whose rows change, for tests of storage: counts at times, and a lake that holds only it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl

from lake.delta.files import LocalDisk
from lake.delta.log import DataFile, TableLog
from lake.delta.parquet import as_stored, encoded_file
from lake.delta.slices import Batch, Changes, Slices
from lake.delta.writer import LakeWriter, create_table
from lake.tables import Column, Table

DAY = datetime(2024, 8, 9, tzinfo=UTC)
SPANNED = Table(
    "test",
    "spanned",
    "How many of each at a time",
    ("at", "name"),
    (
        Column("at", "TIMESTAMP", "when"),
        Column("name", "STRING", "what"),
        Column("n", "BIGINT", "many", nullable=True),
        Column("day", "DATE", "date of at"),
    ),
    partitioned_by=("day",),
    statistics=("at",),
    file_time="at",
    file_span=timedelta(minutes=10),
)
Key = tuple[int, str]
"""minutes after DAY, name"""


def lake_in(root: str, *tables: Table) -> LakeWriter:
    """A writer of a new lake."""
    for table in tables:
        create_table(LocalDisk(), table, root)
    return claimed(root, *tables)


def claimed(root: str, *tables: Table) -> LakeWriter:
    writer = LakeWriter(LocalDisk(), root, tables)
    writer.claim()
    return writer


def at(minute: int) -> datetime:
    return DAY + timedelta(minutes=minute)


def rows(counts: dict[Key, int]) -> pl.DataFrame:
    """Rows of SPANNED."""
    schema: Any = {"at": pl.Datetime("us", "UTC"), "name": pl.String, "n": pl.Int64, "day": pl.Date}
    values = [(at(minute), name, n, at(minute).date()) for (minute, name), n in counts.items()]
    return pl.DataFrame(values, schema=schema, orient="row")


def counts_of(frame: pl.DataFrame) -> dict[Key, int]:
    """The rows by their key; two rows of one key fail."""
    found = {
        ((time - DAY) // timedelta(minutes=1), name): n for time, name, n in frame.select("at", "name", "n").rows()
    }
    assert len(found) == frame.height, "a key is there twice"
    return found


def span(minute: int) -> int:
    return SPANNED.span(int(at(minute).timestamp()) * 1_000_000)


def batch(number: int) -> Batch:
    return Batch("q", number, DAY)


def upsert(slices: Slices, number: int, counts: dict[Key, int], gone: Iterable[Key] = ()) -> None:
    """A micro-batch that puts these rows in the place of those with the same key, and deletes others."""
    upserts, deleted = rows(counts), rows(dict.fromkeys(gone, 0))

    def change(_: pl.DataFrame) -> Changes:
        return upserts, deleted

    slices.update(batch(number), slices.spans_of(pl.concat([upserts, deleted])), change)


def log_of(writer: LakeWriter, table: Table = SPANNED) -> TableLog:
    return TableLog(LocalDisk(), table.path(writer.root))


def rows_of_file(file: DataFile) -> pl.DataFrame:
    frame = pl.read_parquet(file.path.removeprefix("file:"))
    return frame.with_columns(day=pl.lit(date.fromisoformat(file.add["partitionValues"]["day"])))


def stored(writer: LakeWriter) -> dict[Key, int]:
    """What the table holds, by its log alone."""
    frames = [rows_of_file(file) for file in log_of(writer).files()]
    return counts_of(pl.concat(frames).select(SPANNED.column_names)) if frames else {}


def layout(writer: LakeWriter) -> list[list[int]]:
    """The spans of each file, counted from DAY's first, in the order of the first."""
    spans = [
        sorted({(time - DAY) // timedelta(minutes=10) for time in rows_of_file(file)["at"]})
        for file in log_of(writer).files()
    ]
    return sorted(spans)


def compact(writer: LakeWriter, statistics: bool = True) -> None:
    """Maintenance, as OPTIMIZE does it: put the files of each day into one."""
    log = log_of(writer)
    files = log.files()
    for day in {file.add["partitionValues"]["day"] for file in files}:
        old = [file for file in files if file.add["partitionValues"]["day"] == day]
        together = pl.concat([rows_of_file(file) for file in old]).select(SPANNED.column_names)
        made = log.add(encoded_file(SPANNED, as_stored(SPANNED, together.to_arrow())))
        if not statistics:
            made = DataFile({name: value for name, value in made.add.items() if name != "stats"}, made.path)
        assert log.put(log.newest() + 1, {}, [made], old, data_change=False)
