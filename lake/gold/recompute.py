"""Recompute gold from all ticks at once. The batch jobs compare the tables with the result, or write it.

The stream's pure functions make the rows, but from all ticks: no row is updated, and no state is kept. Spark only
distributes the work: it sorts the ticks that feed gold by venue, asset and tick order, and a task makes all rows of
its pairs. Alerts come from the rule itself, applied to every tick; the stream applies it only where prices move.

A task holds the five-second summaries of one pair, or of some small pairs, over the whole period (7 MB per busy day),
and one chunk of ticks.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cached_property
from typing import NamedTuple

import polars as pl
import pyarrow as pa
from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lake.contract import CURRENT_ORDER, TICK_ORDER, Pair
from lake.delta.drop import dropped_before
from lake.delta.files import Files
from lake.delta.log import LogIncomplete, TableLog
from lake.delta.overtaken import explained, overtaken
from lake.delta.parquet import arrow_schema, arrow_type
from lake.delta.rewrite import rewrite
from lake.gold import derive
from lake.gold.alerts import Alert, AlertTick, Episodes, alert_row
from lake.gold.derive import OLDEST_COMPARED, ROLLED
from lake.gold.summary import PAIR, merged, of_ticks
from lake.gold.update import feeding
from lake.rules import GoldRules
from lake.silver.read import with_notional
from lake.tables import (
    GOLD,
    GOLD_ALERTS,
    GOLD_CURRENT_PRICE,
    GOLD_PRICE_1D,
    GOLD_PRICE_5S,
    GOLD_PRICES,
    GOLD_ROLLING_PRICE,
    PRICE,
    QUALITY_RESULTS,
    SILVER_TICKS,
    TABLES,
    Table,
)
from lake.times import BUCKET, DAY, HOUR, MINUTE, SECOND, to_micros

# Ticks per chunk. Larger chunks are faster.
TICKS_A_LOOK = 50_000
# After so many ticks a task makes the rows of its pairs before it reads the next pair.
TICKS_A_GROUP = 200_000
# Rows of gold.rolling_price made at once; each looks back on a dozen summaries.
LOOKS_TOGETHER = 100_000
# Gold rows per Arrow batch on their way to the driver.
ROWS_A_PIECE = 5_000
# More partitions than cores: a task has few pairs.
PARTITIONS_A_CORE = 4

LOOKS_BACK = 2 * HOUR
"""Rows of a day need no ticks from so long before it, with an hour for clocks that differ."""

# A tick that feeds gold, as the shuffle carries it; times in microseconds since 1970.
_FEED = {
    "source": "STRING",
    "asset": "STRING",
    "gold_time": "BIGINT",
    "trade_epoch": "BIGINT",
    "trade_id": "BIGINT",
    "producer": "STRING",
    "sequence": "BIGINT",
    "event_id": "STRING",
    "price_usd": PRICE,
    "quantity": PRICE,
    "notional": "DECIMAL(38,18)",
    "event_time": "BIGINT",
    "received_at": "BIGINT",
    "is_future": "BOOLEAN",
}
_FEED_ARROW = pa.schema([(name, arrow_type(kind)) for name, kind in _FEED.items()])
_FROM_SILVER = [name for name in _FEED if name not in ("gold_time", "notional")] + ["symbol", "quote"]
_PIECE = "table STRING, day BIGINT, rows BINARY"


class Period(NamedTuple):
    """Gold times from one to before another, in microseconds since 1970."""

    begin: int
    end: int

    def days(self) -> Period:
        """The whole days of UTC that it overlaps."""
        return Period(self.begin // DAY * DAY, -(-self.end // DAY) * DAY)

    def has(self, micros: int) -> bool:
        """Whether a time lies in it."""
        return self.begin <= micros < self.end


ALWAYS = Period(0, 2**62)


def period_of(begin: datetime | None, end: datetime | None) -> Period:
    """The period from begin to before end; None: no limit. Times without a zone are UTC."""

    def micros(time: datetime | None, default: int) -> int:
        return default if time is None else to_micros(time if time.tzinfo else time.replace(tzinfo=UTC))

    return Period(micros(begin, ALWAYS.begin), micros(end, ALWAYS.end))


# --- the tables as of one micro-batch


@dataclass(frozen=True)
class Snapshot:
    """The tables of a lake as of one micro-batch; versions: by the table's qualified name."""

    spark: SparkSession
    files: Files
    root: str
    batch: int
    versions: dict[str, int]

    @classmethod
    def newest(cls, spark: SparkSession, root: str, files: Files) -> Snapshot:
        """As of the last micro-batch that all tables have: the one of the longest window, which is written last."""
        logs = {table.qualified_name: TableLog(files, table.path(root)) for table in TABLES if table != QUALITY_RESULTS}
        _, batch = _version_of(logs[GOLD_PRICE_1D.qualified_name])
        return cls(spark, files, root, batch, {name: _version_of(log, batch)[0] for name, log in logs.items()})

    def read(self, table: Table) -> DataFrame:
        """The table's rows."""
        version = self.versions[table.qualified_name]
        return self.spark.read.format("delta").option("versionAsOf", version).load(table.path(self.root))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raises Overtaken if reading fails since the tables' history has passed, and FileLost if a file is missing."""
        try:
            yield
        except (PySparkException, Py4JJavaError, OSError) as error:
            for name, version in self.versions.items():
                if cause := self._cause(name, version, str(error)):
                    raise cause from error
            raise

    def _cause(self, name: str, version: int, text: str) -> Exception | None:
        log = TableLog(self.files, f"{self.root}/{name.replace('.', '/')}")
        newest = log.state()
        try:
            read = log.state(version)
        except LogIncomplete:
            return overtaken(name, version, newest.configuration)
        return explained(text, name, version, read.files, newest.files, newest.configuration)

    def dropped_before(self, table: Table) -> datetime | None:
        """The time before which the table's rows may have been dropped because of their age; None if none were."""
        try:
            definition = TableLog(self.files, table.path(self.root)).definition()
        except LogIncomplete:
            # A lake of an earlier version lacks tables.
            return None
        return dropped_before(definition.get("configuration") or {})

    def rewrite(self, table: Table, spans: Collection[int], rows: pl.DataFrame) -> list[int]:
        """Replace all rows of these spans by `rows`. Returns the spans not replaced: others wrote them meanwhile."""
        files = TableLog(self.files, table.path(self.root)).files(self.versions[table.qualified_name])
        return rewrite(self.files, table, self.root, files, spans, rows)


def _version_of(log: TableLog, limit: int | None = None) -> tuple[int, int]:
    """(the newest version of a table that is of no later micro-batch than `limit`, its micro-batch or -1)."""
    version = log.newest()
    for number in range(version, -1, -1):
        try:
            batch = log.metadata(number).get("batch")
        except LogIncomplete:
            # The log has been cleaned up to here; earlier commits are a day old.
            return version, -1
        if batch is None:
            continue
        if limit is None or batch <= limit:
            return version, batch
        version = number - 1
    return max(0, version), -1


# --- gold of all ticks


@dataclass(frozen=True)
class Expected:
    """The rows that gold's tables must have, on the executors' disks until `forget`.

    A row belongs to the day of its window_start or as_of; a day is its start in microseconds since 1970. Rows of
    gold.alerts and gold.current_price belong to day 0.
    """

    _pieces: DataFrame

    @cached_property
    def days(self) -> list[int]:
        """The days that have rows, ascending."""
        rows = self._pieces.where(~F.col("table").isin(*(table.qualified_name for table in _OF_NO_DAY)))
        return sorted(row["day"] for row in rows.select("day").distinct().collect())

    def rows(self, table: Table, day: int = 0) -> pl.DataFrame:
        """A table's rows of a day, collected to the driver; columns and types as stored."""
        chosen = self._pieces.where((F.col("table") == table.qualified_name) & (F.col("day") == day))
        pieces = [pl.read_ipc(io.BytesIO(piece["rows"])) for piece in chosen.select("rows").collect()]
        rows = pl.concat(pieces) if pieces else pl.DataFrame(schema=_schema(table))
        return _newest(rows) if table == GOLD_CURRENT_PRICE else rows

    def forget(self) -> None:
        """Free the disk."""
        self._pieces.unpersist()


_OF_NO_DAY = (GOLD_ALERTS, GOLD_CURRENT_PRICE)


def _newest(rows: pl.DataFrame) -> pl.DataFrame:
    """Each asset's row of the venue with the newest tick."""
    order = [pl.col("current_order").struct.field(name) for name in CURRENT_ORDER]
    return rows.sort(order, descending=True, nulls_last=True).unique("asset", keep="first", maintain_order=True)


def expected(
    ticks: DataFrame, rules: GoldRules, period: Period, at: datetime, tables: Collection[Table] = GOLD
) -> Expected:
    """The rows of these gold tables whose time lies in the period; gold.current_price only where that is ALWAYS.

    ticks: distinct ticks with silver.ticks' columns (is_late is optional); `notional` is computed if absent.
    at: updated_at. A price row is included if its window overlaps the period, and covers its whole window; other rows
    by as_of or opened_at. An episode that opened more than an hour before the period's first day is not found, even if
    it lasts into the period.
    """
    days = period if period == ALWAYS else period.days()
    begin, end = days.begin - HOUR, days.end if period == ALWAYS else days.end + HOUR
    if begin > 0:
        # Gold time is one of the two. There is no upper limit: a later tick shows that time went on.
        since = F.timestamp_micros(F.lit(begin))
        ticks = ticks.where((F.col("event_time") >= since) | (F.col("received_at") >= since))

    def feed(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for rows in _joined(batches, TICKS_A_LOOK):
            chosen = _feed(rows, rules, Period(begin, end)).select(list(_FEED))
            yield from chosen.to_arrow().cast(_FEED_ARROW).to_batches()

    def pieces(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for table, day, rows in _rows_of_part(_joined(batches, TICKS_A_LOOK), rules, period, at, tables):
            for piece in rows.cast(_schema(table)).iter_slices(ROWS_A_PIECE):
                yield _packed(table, day, piece)

    names = [*_FROM_SILVER, *(["notional"] if "notional" in ticks.columns else [])]
    fed = ticks.select(*names).mapInArrow(feed, ", ".join(f"{name} {kind}" for name, kind in _FEED.items()))
    partitions = PARTITIONS_A_CORE * ticks.sparkSession.sparkContext.defaultParallelism
    in_order = fed.repartition(partitions, *PAIR).sortWithinPartitions(*PAIR, *TICK_ORDER)
    return Expected(in_order.mapInArrow(pieces, _PIECE).persist(StorageLevel.DISK_ONLY))


def _joined(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Tables of about so many rows; nothing if there are no rows."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(part.num_rows for part in waiting) >= rows:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if any(batch.num_rows for batch in waiting):
        yield pa.Table.from_batches(waiting)


def _feed(rows: pa.Table, rules: GoldRules, period: Period) -> pl.DataFrame:
    """The period's ticks that feed gold, with gold_time and notional, and two later ticks of each pair.

    The first later tick may close an episode; the last shows how far the pair's time has advanced.
    """
    ticks = pl.from_arrow(rows if "notional" in rows.column_names else with_notional(rows))
    assert isinstance(ticks, pl.DataFrame)
    time = pl.when("is_future").then("received_at").otherwise("event_time")
    ticks = feeding(ticks, rules).with_columns(pl.col("event_time", "received_at").cast(pl.Int64))
    ticks = ticks.with_columns(time.alias("gold_time")).filter(pl.col("gold_time") >= period.begin)
    later = ticks.filter(pl.col("gold_time") >= period.end).sort(TICK_ORDER)
    ends = (later.unique(PAIR, keep="first"), later.unique(PAIR, keep="last"))
    return pl.concat([ticks.filter(pl.col("gold_time") < period.end), pl.concat(ends).unique("event_id")])


_Rows = tuple[Table, int, pl.DataFrame]
"""A table, a day, and the table's rows of that day."""


def _rows_of_part(
    parts: Iterable[pa.Table], rules: GoldRules, period: Period, at: datetime, tables: Collection[Table]
) -> Iterator[_Rows]:
    """Gold's rows from a task's ticks, which are sorted by pair and tick order."""
    pairs = _Pairs(rules, tables)
    for part in parts:
        ticks = pl.from_arrow(part)
        assert isinstance(ticks, pl.DataFrame)
        if pairs.ticks >= TICKS_A_GROUP:
            goes_on = (pl.col("source") == pairs.last[0]) & (pl.col("asset") == pairs.last[1])
            rest, ticks = ticks.filter(goes_on), ticks.filter(~goes_on)
            if rest.height:
                pairs.add(rest)
            if ticks.is_empty():
                continue
            yield from pairs.rows(period, at)
            pairs = _Pairs(rules, tables)
        pairs.add(ticks)
    if pairs.ticks:
        yield from pairs.rows(period, at)


class _Pairs:
    """Some pairs' summaries, alerts and last ticks, from which their rows are made."""

    def __init__(self, rules: GoldRules, tables: Collection[Table]) -> None:
        self._rules, self._tables = rules, tables
        self._summaries: list[pl.DataFrame] = []
        self._episodes: dict[Pair, Episodes] = {}
        self._alerts: dict[str, Alert] = {}
        # Each pair's ticks of the last minutes: one of them has the price a minute before the newest.
        self._last_ticks: pl.DataFrame | None = None
        self.last: Pair = ("", "")
        self.ticks = 0

    def add(self, ticks: pl.DataFrame) -> None:
        """Add one or more ticks, of the last pair or of new pairs."""
        self.ticks += ticks.height
        self.last = ticks.select(PAIR).row(-1)
        self._summaries.append(of_ticks(ticks, *PAIR))
        if GOLD_ALERTS in self._tables:
            self._watch(ticks)
        if GOLD_CURRENT_PRICE in self._tables:
            # The newest tick may have a gold time below the highest, by up to the tolerance.
            reach = OLDEST_COMPARED + round(self._rules.future_tolerance_seconds * SECOND)
            recent = ticks.select(*PAIR, "gold_time", "price_usd")
            recent = recent if self._last_ticks is None else pl.concat([self._last_ticks, recent])
            self._last_ticks = recent.filter(pl.col("gold_time") >= pl.col("gold_time").max().over(PAIR) - reach)

    def _watch(self, ticks: pl.DataFrame) -> None:
        for (source, asset), of_pair in ticks.group_by(PAIR, maintain_order=True):
            pair = (str(source), str(asset))
            watch = self._episodes.setdefault(pair, Episodes(pair, self._rules.alerts))
            for tick in of_pair.select("gold_time", "price_usd", "event_id").iter_rows():
                if changed := watch.add(AlertTick(*tick)):
                    self._alerts[changed.alert_id] = changed

    def rows(self, period: Period, at: datetime) -> Iterator[_Rows]:
        """The rows; call this after all ticks of the pairs have been added."""
        five = merged(pl.concat(self._summaries), *PAIR, "start")
        newest = five.group_by(PAIR).agg(pl.col("start").max().alias("newest"))
        # Rolling prices up to a minute after a bucket include it; they may belong to the next day.
        starts = pl.concat([five["start"], five["start"] + MINUTE])
        whole_days = period if period == ALWAYS else period.days()
        for day in (starts // DAY * DAY).unique().sort():
            if whole_days.has(day):
                yield from self._rows_of_day(five, newest, day, period, at)
        alerts = [
            alert_row(alert, self._rules.alerts, at) for alert in self._alerts.values() if period.has(alert.opened_at)
        ]
        if alerts:
            yield GOLD_ALERTS, 0, pl.DataFrame(alerts, schema=_schema(GOLD_ALERTS), orient="row")
        if GOLD_CURRENT_PRICE in self._tables and period == ALWAYS:
            for of_source in five.partition_by("source"):
                yield GOLD_CURRENT_PRICE, 0, self._current(of_source, at)

    def _rows_of_day(
        self, five: pl.DataFrame, newest: pl.DataFrame, day: int, period: Period, at: datetime
    ) -> Iterator[_Rows]:
        start = pl.col("start")
        of_day = five.filter(start.is_between(day, day + DAY, closed="left"))
        for table in GOLD_PRICES:
            if table in self._tables and of_day.height:
                length = table.window_micros
                windows = derive.windows(of_day, length)
                windows = windows.filter((start < period.end) & (start + length > period.begin))
                yield table, day, derive.price_rows(table, windows, at)
        if GOLD_ROLLING_PRICE in self._tables:
            reach = max(ROLLED, self._rules.volatility_buckets) * BUCKET
            near = five.filter(start.is_between(day - reach, day + DAY, closed="left"))
            keys = derive.looks(near.select(*PAIR, "start"), newest, ROLLED)
            as_of = pl.col("as_of")
            keys = keys.filter(as_of.is_between(max(day, period.begin), min(day + DAY, period.end), closed="left"))
            for looks in keys.iter_slices(LOOKS_TOGETHER):
                yield GOLD_ROLLING_PRICE, day, derive.rolling_rows(looks, near, self._rules, at)

    def _current(self, five: pl.DataFrame, at: datetime) -> pl.DataFrame:
        """Rows of gold.current_price as if there were no pairs but these."""
        assert self._last_ticks is not None
        newest = derive.newest_ticks(five)
        newest_pairs = newest.select("asset", pl.col("newest_source").alias("source"), "newest_time")
        before = (
            self._last_ticks.join(newest_pairs, on=PAIR, maintain_order="left")
            .filter((pl.col("newest_time") - pl.col("gold_time")).is_between(MINUTE, OLDEST_COMPARED))
            .unique("asset", keep="last", maintain_order=True)
        )
        return derive.current_rows(newest, before.select("asset", pl.col("price_usd").alias("price")), at)


def _schema(table: Table) -> pl.Schema:
    rows = pl.from_arrow(arrow_schema(table).empty_table())
    assert isinstance(rows, pl.DataFrame)
    return rows.schema


def _packed(table: Table, day: int, rows: pl.DataFrame) -> pa.RecordBatch:
    content = io.BytesIO()
    rows.write_ipc(content)
    return pa.record_batch(
        {
            "table": pa.array([table.qualified_name], pa.string()),
            "day": pa.array([day], pa.int64()),
            "rows": pa.array([content.getvalue()], pa.binary()),
        }
    )


# --- gold.price_5s of a lake that has none


def fill_price_5s(
    spark: SparkSession, root: str, files: Files, rules: GoldRules, at: datetime
) -> Iterator[tuple[date, int]]:
    """Make all rows of gold.price_5s from silver.ticks, day by day; yields each day and its number of rows.

    gold.price_5s must exist, and nothing else may write the lake. Existing days are replaced, so this can be run again.
    The commits name no micro-batch.
    """
    snapshot = Snapshot(
        *(spark, files, root, -1),
        {table.qualified_name: TableLog(files, table.path(root)).newest() for table in (SILVER_TICKS, GOLD_PRICE_5S)},
    )
    ticks = snapshot.read(SILVER_TICKS)
    times: Sequence[str] = ("event_time", "received_at")
    days = ticks.select(F.explode(F.array(*(F.to_date(name) for name in times))).alias("day")).distinct().collect()
    for day in sorted(row["day"] for row in days):
        begin, end = (F.timestamp_micros(F.lit(micros)) for micros in _ends_of(day))
        near = [(F.col(name) >= begin) & (F.col(name) < end) for name in times]
        of_day = expected(ticks.where(near[0] | near[1]), rules, _ends_of(day), at, [GOLD_PRICE_5S])
        rows = of_day.rows(GOLD_PRICE_5S, _ends_of(day).begin)
        of_day.forget()
        spans = range(GOLD_PRICE_5S.span(_ends_of(day).begin), GOLD_PRICE_5S.span(_ends_of(day).end))
        if left := snapshot.rewrite(GOLD_PRICE_5S, spans, rows):
            raise RuntimeError(f"gold.price_5s of {day}: {len(left)} spans were written by somebody else meanwhile")
        yield day, rows.height


def _ends_of(day: date) -> Period:
    begin = to_micros(datetime(day.year, day.month, day.day, tzinfo=UTC))
    return Period(begin, begin + DAY)
