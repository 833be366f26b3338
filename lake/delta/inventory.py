"""The files of a table in columns, for maintenance and its report.

A table with 500,000 files takes some hundred megabytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime

import polars as pl

from lake.delta.checkpoint import ORDERED_BY
from lake.delta.log import DataFile, TableLog
from lake.tables import Table

FILES_A_CHUNK = 20_000
"""So many files are Python objects at once."""


class Inventory:
    """The files of a table's newest version. Raises as TableLog.state."""

    def __init__(self, log: TableLog, table: Table) -> None:
        self._log, self._table = log, table
        self._time = table.file_time or table.arrival_time
        self._times = {self._time, table.age_time} - {""}
        self.version, self.files, self.configuration = log.columns(table.partitioned_by, self._times)

    @property
    def newest(self) -> datetime | None:
        """The highest time of a row (file_time or arrival_time); None if no file has it in its statistics."""
        text = self.files[self._highest].max() if self._time else None
        return datetime.fromisoformat(str(text)) if text is not None else None

    @property
    def day(self) -> pl.Expr:
        """A file's day, as ISO text: of its partition, else of its highest time; empty if neither is known."""
        names = self._table.partitioned_by
        if not names and not self._time:
            return pl.lit("")
        return pl.col(names[0] if names else self._highest).str.slice(0, 10).fill_null("")

    @property
    def _highest(self) -> str:
        return f"highest {self._time}"

    def chunks(self) -> Iterator[tuple[tuple[str, ...], list[DataFile]]]:
        """Each partition and its files in the order of time, at most FILES_A_CHUNK at once.

        Files whose statistics lack the time are left out.
        """
        names = list(self._table.partitioned_by)
        timed = self.files.filter(pl.col(self._highest).is_not_null()).sort(*names, f"lowest {self._time}")
        parts = timed.partition_by(names, maintain_order=True) if names else [timed]
        for part in parts:
            for rows in part.iter_slices(FILES_A_CHUNK):
                if rows.height:
                    yield rows.select(names).row(0) if names else (), self.data_files(rows)

    def before(self, time: datetime) -> Iterator[list[DataFile]]:
        """The files that have rows from before a time (of Table.age_time), the oldest first, in chunks."""
        name = self._table.age_time
        lowest = pl.col(f"lowest {name}").str.to_datetime("%+", time_unit="us", time_zone="UTC", strict=False)
        for rows in self.files.filter(lowest < time).sort(f"lowest {name}").iter_slices(FILES_A_CHUNK):
            yield self.data_files(rows)

    def data_files(self, rows: pl.DataFrame) -> list[DataFile]:
        """Rows of `files` as data files. They have statistics of the times only."""
        return [self._log.file(self._action(row)) for row in rows.iter_rows(named=True)]

    def _action(self, row: dict[str, object]) -> dict[str, object]:
        lowest, highest = (
            {name: row[f"{end} {name}"] for name in self._times if row[f"{end} {name}"]}
            for end in ("lowest", "highest")
        )
        action = {
            "path": row["path"],
            "partitionValues": {name: row[name] for name in self._table.partitioned_by},
            "size": row["size"],
            "modificationTime": row["modified"],
            "stats": json.dumps({"numRecords": row["rows"] or 0, "minValues": lowest, "maxValues": highest}),
        }
        return {**action, "tags": {ORDERED_BY: row["order"]}} if row["order"] else action
