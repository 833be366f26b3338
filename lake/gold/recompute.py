"""Gold once more, from all ticks at once: what the batch jobs compare the tables with, and put in their place.

The same pure functions make the rows as in the stream, with nothing folded into older rows, corrected or remembered.
Spark only distributes: it sorts the ticks that feed gold by venue, asset and tick order, and each task makes all rows
of its pairs. Alerts come from the rule itself, applied to every tick; the stream applies it only where prices move.

A task holds the five-second summaries of one pair, or of some small ones, over the whole period (7 MB a busy day),
and no more ticks than it reads together.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cached_property
from typing import NamedTuple

import polars as pl
import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lake.contract import CURRENT_ORDER, TICK_ORDER, Pair
from lake.delta.files import Files
from lake.delta.log import LogIncomplete, TableLog
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

# Ticks that are read together: more of them at a time are quicker.
TICKS_A_LOOK = 50_000
# After so many ticks a task makes the rows of the pairs that it has, before it goes on to the next pair.
TICKS_A_GROUP = 200_000
# Rows of gold.rolling_price that are made together; each looks back on a dozen summaries.
LOOKS_TOGETHER = 100_000
# Gold rows that come back to the driver in one piece.
ROWS_A_PIECE = 5_000
# More partitions than cores, so that a task has few pairs.
PARTITIONS_A_CORE = 4

# A tick that feeds gold, on its way to the task of its pair; times in microseconds since 1970.
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
_FROM_SILVER = [name for name in _FEED if name not in ("gold_time", "notional")] + ["symbol"]
_PIECE = "table STRING, day BIGINT, rows BINARY"


class Period(NamedTuple):
    """Gold times from one to before another, in microseconds since 1970."""

    begin: int
    end: int

    def days(self) -> Period:
        """The whole days of UTC that it touches."""
        return Period(self.begin // DAY * DAY, -(-self.end // DAY) * DAY)

    def has(self, micros: int) -> bool:
        """Whether a time lies in it."""
        return self.begin <= micros < self.end


ALWAYS = Period(0, 2**62)


def period_of(begin: datetime | None, end: datetime | None) -> Period:
    """From one time to before another; None: without that limit. Times without a zone are UTC."""

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
        """As of the last micro-batch that all tables have: the longest window is written after all else."""
        logs = {table.qualified_name: TableLog(files, table.path(root)) for table in TABLES if table != QUALITY_RESULTS}
        _, batch = _version_of(logs[GOLD_PRICE_1D.qualified_name])
        return cls(spark, files, root, batch, {name: _version_of(log, batch)[0] for name, log in logs.items()})

    def read(self, table: Table) -> DataFrame:
        """The table's rows."""
        version = self.versions[table.qualified_name]
        return self.spark.read.format("delta").option("versionAsOf", version).load(table.path(self.root))

    def rewrite(self, table: Table, spans: Collection[int], rows: pl.DataFrame) -> list[int]:
        """Let `rows` be all rows of these spans. Returns those that were left, written by others since."""
        known = TableLog(self.files, table.path(self.root)).files(self.versions[table.qualified_name])
        return rewrite(self.files, table, self.root, known, spans, rows)


def _version_of(log: TableLog, limit: int | None = None) -> tuple[int, int]:
    """(the newest version of a table that is of no later micro-batch than `limit`, its micro-batch or -1)."""
    version = log.newest()
    for number in range(version, -1, -1):
        try:
            batch = log.metadata(number).get("batch")
        except LogIncomplete:
            # The log has been cleaned up to here: what came before is a day old.
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
    """The rows that gold's tables must have, on the executors' disks; `forget` lets go of them.

    A row is of the day (when it begins, in microseconds since 1970) of its window_start or as_of. Rows of gold.alerts
    and gold.current_price are of day 0.
    """

    _pieces: DataFrame

    @cached_property
    def days(self) -> list[int]:
        """The days that have rows, ascending."""
        rows = self._pieces.where(~F.col("table").isin(*(table.qualified_name for table in _OF_NO_DAY)))
        return sorted(row["day"] for row in rows.select("day").distinct().collect())

    def rows(self, table: Table, day: int = 0) -> pl.DataFrame:
        """A table's rows of a day, in the driver's memory; columns and types as stored."""
        chosen = self._pieces.where((F.col("table") == table.qualified_name) & (F.col("day") == day))
        pieces = [pl.read_ipc(io.BytesIO(piece["rows"])) for piece in chosen.select("rows").collect()]
        rows = pl.concat(pieces) if pieces else pl.DataFrame(schema=_schema(table))
        return _newest(rows) if table == GOLD_CURRENT_PRICE else rows

    def forget(self) -> None:
        """Free the disk."""
        self._pieces.unpersist()


_OF_NO_DAY = (GOLD_ALERTS, GOLD_CURRENT_PRICE)


def _newest(rows: pl.DataFrame) -> pl.DataFrame:
    """Of each asset the venue with the newest tick."""
    order = [pl.col("current_order").struct.field(name) for name in CURRENT_ORDER]
    return rows.sort(order, descending=True, nulls_last=True).unique("asset", keep="first", maintain_order=True)


def expected(
    ticks: DataFrame, rules: GoldRules, period: Period, at: datetime, tables: Collection[Table] = GOLD
) -> Expected:
    """The rows of these gold tables whose time lies in the period; gold.current_price only where that is ALWAYS.

    ticks: columns of silver.ticks (is_late may lack), distinct; `notional` is made where it lacks. at: updated_at.
    A price row is there if its window has a part in the period, and is made of whole windows; a row's time is as_of
    or opened_at otherwise. An episode that opened more than an hour before the period's first day, and lasts into it,
    is not known to be open.
    """
    days = period if period == ALWAYS else period.days()
    begin, end = days.begin - HOUR, days.end if period == ALWAYS else days.end + HOUR
    if begin > 0:
        # A gold time is one of the two. There is no upper limit: a later tick says that time went on.
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
    """About so many rows at a time; none where there are none."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(part.num_rows for part in waiting) >= rows:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if any(batch.num_rows for batch in waiting):
        yield pa.Table.from_batches(waiting)


def _feed(rows: pa.Table, rules: GoldRules, period: Period) -> pl.DataFrame:
    """The ticks of the period that feed gold, with gold_time and notional; of each pair two later ones.

    The first of the later ticks may close an episode, the last says how far the pair's time has gone.
    """
    ticks = pl.from_arrow(rows if "notional" in rows.column_names else with_notional(rows))
    assert isinstance(ticks, pl.DataFrame)
    time = pl.when("is_future").then("received_at").otherwise("event_time")
    ticks = feeding(ticks, rules.symbols).with_columns(pl.col("event_time", "received_at").cast(pl.Int64))
    ticks = ticks.with_columns(time.alias("gold_time")).filter(pl.col("gold_time") >= period.begin)
    later = ticks.filter(pl.col("gold_time") >= period.end).sort(TICK_ORDER)
    ends = (later.unique(PAIR, keep="first"), later.unique(PAIR, keep="last"))
    return pl.concat([ticks.filter(pl.col("gold_time") < period.end), pl.concat(ends).unique("event_id")])


_Rows = tuple[Table, int, pl.DataFrame]
"""A table, a day, and rows of it that are of that day."""


def _rows_of_part(
    parts: Iterable[pa.Table], rules: GoldRules, period: Period, at: datetime, tables: Collection[Table]
) -> Iterator[_Rows]:
    """The rows of a task's ticks, which come by pair and in tick order."""
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
    """What the rows of some pairs are made of."""

    def __init__(self, rules: GoldRules, tables: Collection[Table]) -> None:
        self._rules, self._tables = rules, tables
        self._summaries: list[pl.DataFrame] = []
        self._episodes: dict[Pair, Episodes] = {}
        self._alerts: dict[str, Alert] = {}
        # Of each pair the last minutes' ticks, since one of them is the price a minute before the newest.
        self._last_ticks: pl.DataFrame | None = None
        self.last: Pair = ("", "")
        self.ticks = 0

    def add(self, ticks: pl.DataFrame) -> None:
        """More ticks, at least one: of the last pair, or of pairs that are new."""
        self.ticks += ticks.height
        self.last = ticks.select(PAIR).row(-1)
        self._summaries.append(of_ticks(ticks, *PAIR))
        if GOLD_ALERTS in self._tables:
            self._watch(ticks)
        if GOLD_CURRENT_PRICE in self._tables:
            # The newest tick's gold time may be the tolerance before the highest one.
            kept = OLDEST_COMPARED + round(self._rules.future_tolerance_seconds * SECOND)
            known = ticks.select(*PAIR, "gold_time", "price_usd")
            known = known if self._last_ticks is None else pl.concat([self._last_ticks, known])
            self._last_ticks = known.filter(pl.col("gold_time") >= pl.col("gold_time").max().over(PAIR) - kept)

    def _watch(self, ticks: pl.DataFrame) -> None:
        for (source, asset), of_pair in ticks.group_by(PAIR, maintain_order=True):
            pair = (str(source), str(asset))
            watch = self._episodes.setdefault(pair, Episodes(pair, self._rules.alerts))
            for tick in of_pair.select("gold_time", "price_usd", "event_id").iter_rows():
                if changed := watch.add(AlertTick(*tick)):
                    self._alerts[changed.alert_id] = changed

    def rows(self, period: Period, at: datetime) -> Iterator[_Rows]:
        """The rows, once all ticks of all pairs are there."""
        five = merged(pl.concat(self._summaries), *PAIR, "start")
        newest = five.group_by(PAIR).agg(pl.col("start").max().alias("newest"))
        # The minute after a bucket looks back on it, and may be of the next day.
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
            wanted = derive.looks(near.select(*PAIR, "start"), newest, ROLLED)
            as_of = pl.col("as_of")
            wanted = wanted.filter(as_of.is_between(max(day, period.begin), min(day + DAY, period.end), closed="left"))
            for looks in wanted.iter_slices(LOOKS_TOGETHER):
                yield GOLD_ROLLING_PRICE, day, derive.rolling_rows(looks, near, self._rules, at)

    def _current(self, five: pl.DataFrame, at: datetime) -> pl.DataFrame:
        """Rows of gold.current_price as if there were one venue, whose summaries these are."""
        assert self._last_ticks is not None
        newest = derive.newest_ticks(five)
        wanted = newest.select("asset", pl.col("newest_source").alias("source"), "newest_time")
        before = (
            self._last_ticks.join(wanted, on=PAIR, maintain_order="left")
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
    """Make all rows of gold.price_5s from silver.ticks, a day at a time; each day, and how many rows it has.

    gold.price_5s exists, and nothing else writes the lake. A day that is there already is replaced, so that this may
    be run again. The commits name no micro-batch.
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
