"""What the proof can compare in a lake whose old rows were dropped (keep_days, scripts/drop-older-than).

A table records the time before which rows may have been dropped. A row that is made of dropped ones cannot be
recomputed, and a dropped row cannot be compared; all others can. Kafka's, the ingester's and the venue's clocks differ,
so where one clock's time limits rows by another one's, an hour more is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import reduce

import polars as pl
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from lake.gold.recompute import LOOKS_BACK, Snapshot
from lake.intervals import Interval, minus
from lake.tables import BRONZE_TICKS, GOLD, SILVER_GAPS, SILVER_QUARANTINE, SILVER_TICKS, Table
from lake.times import SECOND

CLOCKS = timedelta(hours=1)
"""Clocks differ by less than this."""
_BEFORE_ALL_IDS = 2**63 - 1

Instrument = tuple[str, str, int]


@dataclass(frozen=True)
class Comparable:
    """times: by a table's qualified name, the time before which its rows may have been dropped."""

    times: Mapping[str, datetime]

    @classmethod
    def of(cls, snapshot: Snapshot) -> Comparable:
        """Of all tables of a lake."""
        tables = (BRONZE_TICKS, SILVER_TICKS, SILVER_QUARANTINE, SILVER_GAPS, *GOLD)
        times = {table.qualified_name: snapshot.dropped_before(table) for table in tables}
        return cls({name: time for name, time in times.items() if time})

    def words(self) -> Iterator[str]:
        """What is left out, a line a table."""
        for name, time in self.times.items():
            yield f"{name}: rows from before {time.isoformat()} were dropped; they are not compared, nor what they made"

    def was_dropped(self, table: Table) -> datetime | None:
        """The time before which rows of the table may have been dropped."""
        return self.times.get(table.qualified_name)

    def kept(self, rows: DataFrame, table: Table, column: str) -> DataFrame:
        """The rows that `table` has not dropped. column: that of `rows` with the time by which the table drops."""
        time = self.was_dropped(table)
        return rows if time is None else rows.where(F.col(column) >= F.lit(time))

    def recomputable(self, rows: DataFrame, bronze: DataFrame, topic: Column, partition: str, offset: str) -> DataFrame:
        """The rows that name a record after all dropped ones of its Kafka partition."""
        time = self.was_dropped(BRONZE_TICKS)
        if time is None:
            return rows
        left = bronze.where(F.col("kafka_timestamp") >= F.lit(time + CLOCKS))
        firsts = left.groupBy("topic", "partition").agg(F.min("offset").alias("first")).collect()
        conditions = [
            (topic == row["topic"]) & (F.col(partition) == row["partition"]) & (F.col(offset) >= row["first"])
            for row in firsts
        ]
        return rows.where(reduce(Column.__or__, conditions, F.lit(False)))

    def first_ids(self, ticks: DataFrame) -> dict[Instrument, int] | None:
        """Per instrument the trade id from which on silver.gaps can be compared; None: all of them can."""
        times = [time for table in (BRONZE_TICKS, SILVER_GAPS) if (time := self.was_dropped(table))]
        if not times:
            return None
        after = ticks.where((F.col("event_time") >= F.lit(max(times) + CLOCKS)) & F.col("trade_id").isNotNull())
        rows = after.groupBy("source", "symbol", "trade_epoch").agg(F.min("trade_id").alias("first")).collect()
        return {(row["source"], row["symbol"], row["trade_epoch"]): row["first"] for row in rows}

    def gold_since(self, table: Table) -> datetime | None:
        """The day from which on a gold table's rows can be compared; None: all can."""
        times = [time for time in (self.was_dropped(table),) if time]
        if bronze := self.was_dropped(BRONZE_TICKS):
            times.append(bronze + timedelta(seconds=LOOKS_BACK // SECOND))
        if not times:
            return None
        midnight = max(times).astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        return midnight if midnight == max(times) else midnight + timedelta(days=1)

    def of_gold(self, table: Table, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows of a gold table that can be compared."""
        since = self.gold_since(table)
        return rows if since is None else rows.filter(pl.col(table.age_time or "event_time") >= since)


def from_first(
    ids: list[Interval], first_ids: Mapping[Instrument, int] | None, instrument: Instrument
) -> list[Interval]:
    """The ids of an instrument that can be compared; see Comparable.first_ids."""
    if first_ids is None:
        return ids
    return minus(ids, [(0, first_ids.get(instrument, _BEFORE_ALL_IDS) - 1)])
