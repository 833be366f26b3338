"""The longer windows, gold.price_5m, price_1h and price_1d: each from the one before it, seconds after the minutes.

They are written beside the stream, some ten seconds after the first change, or once the stream has been quiet for a
moment, by a clock that nobody sets. The longest window is written last, for a micro-batch that all other tables have:
its commit names the micro-batch as of which batch/prove.py reads every table.
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
    """Minutes that the longer windows lack, as of a micro-batch.

    minutes: source, asset, start. rows: of gold.price_1m, all that the changed windows need.
    """

    batch: Batch
    minutes: pl.DataFrame
    rows: pl.DataFrame
    metadata: Mapping[str, Any]


class RollUp:
    """The longer windows between micro-batches."""

    def __init__(self, lake: LakeWriter, minutes: Slices, sink: Sink | None = None) -> None:
        """minutes: gold.price_1m."""
        self._lake, self._minutes = lake, minutes
        self._longer = [Slices(lake, table, sink) for table in LONGER]
        # Minutes that have changed since; None: also what an earlier writer has left.
        self._changed: pl.DataFrame | None = None
        self._left = True

    @property
    def pending(self) -> bool:
        """Whether the longer windows may lack something."""
        return self._left or self._changed is not None

    def note(self, minutes: pl.DataFrame) -> None:
        """Minutes have changed: source, asset, start."""
        if minutes.height:
            self._changed = minutes if self._changed is None else pl.concat([self._changed, minutes]).unique()

    def due(self, batch: Batch) -> Due | None:
        """What is to be written, as of a micro-batch that all tables have; call it between micro-batches."""
        parts = [part for part in (self._changed, self._left_minutes() if self._left else None) if part is not None]
        minutes = pl.concat(parts).unique() if parts else None
        # Which version of the minutes the longer windows will have.
        metadata = {"up_to": batch.at.isoformat(), "minutes_version": self._lake.version(GOLD_PRICE_1M)}
        if minutes is None or minutes.is_empty():
            self._changed, self._left = None, False
            return None
        rows = _parts(self._minutes, minutes, LONGER[0])
        self._changed, self._left = None, False
        return Due(batch, minutes, rows, metadata)

    def write(self, due: Due) -> None:
        """Write the windows, beside micro-batches. Raises Fenced, StoreError; then `retry` what is due."""
        rows, changed = due.rows, due.minutes
        for slices, (table, longer) in zip(self._longer, pairwise([*LONGER, None]), strict=True):
            assert table is not None
            written = _windows(table, rows, due.batch.at)

            def change(_: pl.DataFrame, written: pl.DataFrame = written) -> Changes:
                return written, None

            slices.update(due.batch, slices.spans_of(written), change, **due.metadata)
            slices.forget_unused()
            if longer:
                changed = changed.select(*PAIR, pl.col("start") // table.window_micros * table.window_micros).unique()
                rows = _parts(slices, changed, longer)

    def retry(self, due: Due) -> None:
        """Have what could not be written written later."""
        self.note(due.minutes)

    def _left_minutes(self) -> pl.DataFrame:
        """The minutes that gold.price_1m has got since the last time that the longest window was written."""
        kept = self._lake.metadata(LAST)
        up_to = datetime.fromisoformat(kept["up_to"]) if "up_to" in kept else EPOCH
        files = self._lake.added_since(GOLD_PRICE_1M, kept.get("minutes_version", -1))
        rows = self._minutes.rows_of(files).filter(pl.col("updated_at") > up_to)
        return rows.select(*PAIR, pl.col("window_start").cast(pl.Int64).alias("start"))


def _parts(finer: Slices, changed: pl.DataFrame, table: Table) -> pl.DataFrame:
    """The rows of a finer table that windows of `table` are made of, all of each window with a changed one."""
    length, step = table.window_micros, finer.table.window_micros
    windows = changed.select(*PAIR, window=pl.col("start") // length * length).unique()
    starts = [start for window in windows["window"].unique() for start in range(window, window + length, step)]
    rows = finer.load([finer.table.span(start) for start in starts])
    window = pl.col("window_start").cast(pl.Int64) // length * length
    return rows.with_columns(window=window).join(windows, on=[*PAIR, "window"], how="semi").drop("window")


def _windows(table: Table, parts: pl.DataFrame, at: datetime) -> pl.DataFrame:
    """Rows of a table, of all the rows of the finer one that its windows are made of."""
    length = table.window_micros
    rows = derive.price_rows(table, derive.windows(derive.summaries_of(parts), length), at)
    window = (pl.col("window_start").cast(pl.Int64) // length * length).cast(derive.TIME)
    updated = parts.group_by(*PAIR, window_start=window).agg(pl.col("updated_at").max())
    return rows.drop("updated_at").join(updated, on=[*PAIR, "window_start"]).select(table.column_names)
