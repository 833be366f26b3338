"""Gold once more, from all ticks at once: what the batch jobs compare the tables with, and put in their place.

The same summaries and the same functions that make a row as in the stream; what differs is that nothing is folded,
corrected or remembered here. Memory holds the buckets of one pair at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lake.commits import TableLog
from lake.metrics import (
    MINUTE,
    ROLLED,
    GoldRules,
    Newest,
    Window,
    WindowKey,
    alert_row,
    bucket_from,
    change_pct,
    current_row,
    episodes,
    minute_before,
    newer,
    price_row,
    rolling_row,
)
from lake.silver import Silver
from lake.summaries import Pair, Summary, bucket_of, bucket_start, merge, to_micros
from lake.tables import (
    GOLD_ALERTS,
    GOLD_CURRENT_PRICE,
    GOLD_PRICE_1D,
    GOLD_PRICES,
    GOLD_ROLLING_PRICE,
    QUALITY_RESULTS,
    TABLES,
    Table,
)
from lake.writer import rewrite

DAY = 86_400_000_000
HOUR = DAY // 24

Row = tuple[object, ...]


class Period(NamedTuple):
    """Gold times from one to before another, in microseconds since 1970."""

    begin: int
    end: int

    def days(self) -> Period:
        return Period(self.begin // DAY * DAY, -(-self.end // DAY) * DAY)

    def has(self, micros: int) -> bool:
        return self.begin <= micros < self.end


ALWAYS = Period(0, 2**62)


def period_of(begin: datetime | None, end: datetime | None) -> Period:
    """Times without a zone are UTC."""

    def micros(time: datetime | None, default: int) -> int:
        return default if time is None else to_micros(time if time.tzinfo else time.replace(tzinfo=UTC))

    return Period(micros(begin, ALWAYS.begin), micros(end, ALWAYS.end))


def batch_of(log: TableLog, limit: int | None = None) -> tuple[int, int]:
    """(the newest version of a table that is of no later micro-batch than `limit`, its micro-batch or -1)."""
    found = log.newest()
    for version in range(found, -1, -1):
        batch = log.metadata(version).get("batch")
        if batch is None:
            continue
        if limit is None or batch <= limit:
            return found, batch
        found = version - 1
    return max(0, found), -1


@dataclass
class Snapshot:
    """The tables of a lake as of one micro-batch."""

    spark: SparkSession
    root: str
    batch: int
    versions: dict[str, int]

    @classmethod
    def newest(cls, spark: SparkSession, root: str) -> Snapshot:
        """As of the last micro-batch that all tables have: the longest window is written after all else."""
        logs = {table.qualified_name: TableLog(spark, table.path(root)) for table in TABLES if table != QUALITY_RESULTS}
        _, batch = batch_of(logs[GOLD_PRICE_1D.qualified_name])
        return cls(spark, root, batch, {name: batch_of(log, batch)[0] for name, log in logs.items()})

    def read(self, table: Table) -> DataFrame:
        version = self.versions[table.qualified_name]
        return self.spark.read.format("delta").option("versionAsOf", version).load(table.path(self.root))

    def rewrite(self, table: Table, spans: Mapping[int, Sequence[Row]]) -> list[int]:
        """Let these be all rows of the spans; the spans that were left, since somebody has written them meanwhile."""
        return rewrite(TableLog(self.spark, table.path(self.root)), table, self.read(table).inputFiles(), spans)


def gold_rows(silver: Silver, rules: GoldRules, period: Period, at: datetime) -> Iterator[tuple[Table, Row]]:
    """The rows of gold's tables whose time lies in the period; gold.current_price only where that is ALWAYS.

    A row's time is its window's begin, as_of, or opened_at. An episode that opened more than an hour before the
    period's first day and lasts into it is not known to be open.
    """
    days = period if period == ALWAYS else period.days()
    begin, end = max(0, days.begin - HOUR), days.end if period == ALWAYS else days.end + HOUR
    newest: dict[str, Newest] = {}
    closest: dict[Pair, dict[int, Summary]] = {}
    for pair, buckets, latest in _pairs(silver.summaries(begin, end)):
        yield from _rows_of(pair, buckets, silver, rules, period, days, at)
        newest[pair[1]] = newer(newest.get(pair[1]), latest)
        if newest[pair[1]] is latest:
            closest[pair] = {n: s for n, s in buckets.items() if n >= bucket_of(latest.time - 3 * MINUTE)}
    if period == ALWAYS:
        for asset, tick in newest.items():
            pair = (tick.newness[2], asset)
            before = minute_before(tick.time, pair, closest[pair], silver.bucket_ticks)
            change = None if before is None else change_pct(tick.price, before)
            yield GOLD_CURRENT_PRICE, current_row(asset, tick, change, at)


def _pairs(summaries: DataFrame) -> Iterator[tuple[Pair, dict[int, Summary], Newest]]:
    """Each pair with its buckets, and the newest tick."""
    pair: Pair | None = None
    buckets: dict[int, Summary] = {}
    newest: Newest | None = None
    for row in summaries.orderBy("source", "asset", "bucket").toLocalIterator():
        bucket = bucket_from(row)
        if bucket.pair != pair:
            if pair and newest:
                yield pair, buckets, newest
            pair, buckets, newest = bucket.pair, {}, None
        buckets[bucket.number] = bucket.summary
        newest = newer(newest, bucket.newest)
    if pair and newest:
        yield pair, buckets, newest


def _rows_of(
    pair: Pair,
    buckets: Mapping[int, Summary],
    silver: Silver,
    rules: GoldRules,
    period: Period,
    days: Period,
    at: datetime,
) -> Iterator[tuple[Table, Row]]:
    numbers = sorted(buckets)
    windows: dict[WindowKey, list[Summary]] = {
        (*pair, bucket_start(number)): [buckets[number]] for number in numbers if days.has(bucket_start(number))
    }
    for table in GOLD_PRICES:
        length = table.window_micros
        longer: dict[WindowKey, list[Summary]] = defaultdict(list)
        for (source, asset, micros), parts in windows.items():
            longer[source, asset, micros // length * length] += parts
        windows = {key: [merge(parts)] for key, parts in longer.items()}
        for key, (whole,) in windows.items():
            if key[2] < period.end and key[2] + length > period.begin:
                yield table, price_row(table, key, Window(whole, at))
    newest = bucket_of(buckets[numbers[-1]].last_time)
    looks = {look for number in numbers for look in range(number + 1, min(number + ROLLED, newest) + 1)}
    for look in sorted(looks):
        if period.has(bucket_start(look)) and (row := rolling_row(pair, look, buckets, rules, at)):
            yield GOLD_ROLLING_PRICE, row
    for _, _, alerts in episodes(pair, buckets, numbers, None, silver.pair_ticks, rules.alerts):
        for alert in alerts:
            if period.has(alert.opened_at):
                yield GOLD_ALERTS, alert_row(alert, rules.alerts, at)


def by_span(table: Table, rows: Iterable[Row], spans: Iterable[int]) -> dict[int, list[Row]]:
    """Of each of these spans the rows that are of it."""
    found: dict[int, list[Row]] = {span: [] for span in spans}
    for row in rows:
        span = table.span(_time_of(table, row))
        if span in found:
            found[span].append(row)
    return found


def _time_of(table: Table, row: Row) -> int:
    """The time that a row's span goes by, in microseconds since 1970; 0 where it is of none."""
    time = row[table.column_names.index(table.file_time)] if table.file_time else None
    return to_micros(time) if isinstance(time, datetime) else 0


def stored_rows(snapshot: Snapshot, table: Table, period: Period) -> DataFrame:
    """A gold table's rows of a period; times in microseconds since 1970, no columns for merging."""
    rows = snapshot.read(table)
    if table.file_time and period != ALWAYS:
        length = table.window_micros if table.window else 1
        start = F.unix_micros(table.file_time)
        rows = rows.where((start < period.end) & (start + length > period.begin))
    columns = [column for column in table.columns if not column.type.startswith("STRUCT")]
    return rows.select(
        *(
            F.unix_micros(column.name).alias(column.name) if column.type == "TIMESTAMP" else F.col(column.name)
            for column in columns
        )
    )
