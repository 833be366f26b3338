"""The longer windows, gold.price_5m, price_1h and price_1d: each is derived from the one before it.

They are written beside the stream, some ten seconds after the first change, or once the stream has been quiet for two
seconds, by a monotonic clock. The longest window is written last, for a micro-batch that all other tables have: its
commit names the micro-batch as of which batch/prove.py reads every table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import polars as pl

from lake.delta.slices import Batch, Changes, Sink, Slices
from lake.delta.writer import LakeWriter
from lake.gold import derive
from lake.gold.summary import PAIR
from lake.tables import GOLD_PRICE_1M, GOLD_PRICES, Table
from lake.times import EPOCH

LONGER = GOLD_PRICES[GOLD_PRICES.index(GOLD_PRICE_1M) + 1 :]
LAST = LONGER[-1]


@dataclass(frozen=True)
class Due:
    """Minutes that the longer windows do not include yet, as of a micro-batch.

    minutes: source, asset, start. rows: the rows of gold.price_1m that the changed windows need.
    """

    batch: Batch
    minutes: pl.DataFrame
    rows: pl.DataFrame
    metadata: Mapping[str, Any]


class RollUp:
    """The state of the longer windows between micro-batches."""

    def __init__(self, lake: LakeWriter, minutes: Slices, sink: Sink | None = None) -> None:
        """minutes: gold.price_1m."""
        self._lake, self._minutes = lake, minutes
        self.slices = [Slices(lake, table, sink) for table in LONGER]
        # Minutes changed since the last write; None: also those that an earlier writer did not write.
        self._changed: pl.DataFrame | None = None
        self._left = True

    @property
    def pending(self) -> bool:
        """Whether the longer windows may be out of date."""
        return self._left or self._changed is not None

    def note(self, minutes: pl.DataFrame) -> None:
        """Note changed minutes: source, asset, start."""
        if minutes.height:
            self._changed = minutes if self._changed is None else pl.concat([self._changed, minutes]).unique()

    def due(self, batch: Batch) -> Due | None:
        """The changes to write, as of a micro-batch that all tables have; call this between micro-batches."""
        parts = [part for part in (self._changed, self._left_minutes() if self._left else None) if part is not None]
        minutes = pl.concat(parts).unique() if parts else None
        # The version of gold.price_1m that the longer windows will include.
        metadata = {"up_to": batch.at.isoformat(), "minutes_version": self._lake.version(GOLD_PRICE_1M)}
        if minutes is None or minutes.is_empty():
            self._changed, self._left = None, False
            return None
        rows = _parts(self._minutes, minutes, LONGER[0])
        self._changed, self._left = None, False
        return Due(batch, minutes, rows, metadata)

    def write(self, due: Due) -> None:
        """Write the windows; micro-batches may go on. Raises Fenced, StoreError; then call `retry`."""
        rows, changed = due.rows, due.minutes
        for slices, (table, longer) in zip(self.slices, pairwise([*LONGER, None]), strict=True):
            assert table is not None
            new_rows = _windows(table, rows, due.batch.at)

            def change(_: pl.DataFrame, new_rows: pl.DataFrame = new_rows) -> Changes:
                return new_rows, None

            slices.update(due.batch, slices.spans_of(new_rows), change, **due.metadata)
            slices.forget_unused()
            if longer:
                changed = changed.select(*PAIR, pl.col("start") // table.window_micros * table.window_micros).unique()
                rows = _parts(slices, changed, longer)

    def retry(self, due: Due) -> None:
        """Keep the changes of a failed write for the next one."""
        self.note(due.minutes)

    def _left_minutes(self) -> pl.DataFrame:
        """The minutes that were added to gold.price_1m since the longest window was last written."""
        metadata = self._lake.metadata(LAST)
        up_to = datetime.fromisoformat(metadata["up_to"]) if "up_to" in metadata else EPOCH
        files = self._lake.added_since(GOLD_PRICE_1M, metadata.get("minutes_version", -1))
        newer = [file for file in files if not file.ends_before("updated_at", up_to)]
        rows = self._minutes.rows_of(newer).filter(pl.col("updated_at") > up_to)
        return rows.select(*PAIR, pl.col("window_start").cast(pl.Int64).alias("start"))


def _parts(finer: Slices, changed: pl.DataFrame, table: Table) -> pl.DataFrame:
    """All rows of a finer table in those windows of `table` that contain a changed row."""
    length, step = table.window_micros, finer.table.window_micros
    windows = changed.select(*PAIR, window=pl.col("start") // length * length).unique()
    starts = [start for window in windows["window"].unique() for start in range(window, window + length, step)]
    rows = finer.load([finer.table.span(start) for start in starts])
    window = pl.col("window_start").cast(pl.Int64) // length * length
    return rows.with_columns(window=window).join(windows, on=[*PAIR, "window"], how="semi").drop("window")


def _windows(table: Table, parts: pl.DataFrame, at: datetime) -> pl.DataFrame:
    """Rows of a table, from the finer table's rows of its windows."""
    length = table.window_micros
    rows = derive.price_rows(table, derive.windows(derive.summaries_of(parts), length), at)
    window = (pl.col("window_start").cast(pl.Int64) // length * length).cast(derive.TIME)
    updated = parts.group_by(*PAIR, window_start=window).agg(pl.col("updated_at").max())
    return rows.drop("updated_at").join(updated, on=[*PAIR, "window_start"]).select(table.column_names)
