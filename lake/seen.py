"""Which ticks the lake has already: bounded deduplication.

The state is a handful of rows, however many ticks went by:

- per instrument (source, symbol, trade_epoch): the intervals of trade ids seen. A repeat lies inside one; the holes
  between them are ticks that have not come (yet).
- per producer and Kafka partition: the highest sequence seen of ticks that have no trade id. Kafka keeps a producer's
  order within a partition, so a repeat is not above it.
- per source and asset: the newest minute that gold has, by which a tick is called late.

It is small enough for the driver, and travels in the metadata of the very commit that appends the ticks to
silver.ticks, so that the two cannot disagree.

Nearly all micro-batches have nothing but new ticks. Their `Overview` shows it, and then nothing more is asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pyspark.sql import Column, DataFrame, Row, SparkSession, Window
from pyspark.sql import functions as F

from lake.gaps import Gap, reported
from lake.intervals import Instrument, Interval, add_interval, overlaps
from lake.metrics import Bucket, bucket_from
from lake.overview import Overview, Sequences
from lake.summaries import bucket_summaries
from lake.ticks import feeds, feeds_gold, gap_reports


@dataclass
class Found:
    """What a micro-batch adds to a Seen, to silver.gaps and to gold."""

    runs: list[tuple[Instrument, Interval]] = field(default_factory=list)
    sequences: list[tuple[tuple[str, int], int]] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    rejected: list[tuple[Instrument, Interval]] = field(default_factory=list)
    reports: list[Gap] = field(default_factory=list)

    @classmethod
    def of(cls, overview: Overview, gold_symbols: Mapping[str, str]) -> Found:
        """What ticks add that are all new."""
        return cls(
            list(overview.runs),
            [((part.producer, part.partition), part.last) for part in overview.sequences],
            [bucket for symbol, bucket in overview.buckets if feeds(gold_symbols, bucket.pair, symbol)],
        )

    def add(self, rows: Iterable[Row]) -> Found:
        """Rows of `summary` or `strays`."""
        reports = []
        for row in rows:
            if row.kind in ("run", "rejected"):
                known = self.runs if row.kind == "run" else self.rejected
                known.append(((row.source, row.symbol, row.trade_epoch), (row.first, row.last)))
            elif row.kind == "sequence":
                self.sequences.append(((row.producer, row.kafka_partition), row.last))
            elif row.kind == "bucket":
                self.buckets.append(bucket_from(row))
            elif row.kind == "report":
                reports.append(row)
        self.reports += reported(reports)
        return self

    @property
    def instruments(self) -> set[Instrument]:
        """Whose trade ids it has."""
        return {instrument for instrument, _ in (*self.runs, *self.rejected)}


@dataclass(frozen=True)
class Seen:
    """What has been seen: trade id intervals, highest sequences, and newest minutes (seconds since 1970)."""

    instruments: dict[Instrument, tuple[Interval, ...]] = field(default_factory=dict)
    producers: dict[tuple[str, int], int] = field(default_factory=dict)
    minutes: dict[tuple[str, str], int] = field(default_factory=dict)
    # Trade ids of records in quarantine: they are no ticks, but they are not missing either.
    rejected: dict[Instrument, tuple[Interval, ...]] = field(default_factory=dict)

    def highest(self, instrument: Instrument) -> int:
        """The highest trade id seen of an instrument; below all others if there is none."""
        intervals = self.instruments.get(instrument)
        return intervals[-1][1] if intervals else -(2**63)

    def to_json(self) -> dict[str, Any]:
        return {
            "instruments": [[*key, [list(interval) for interval in runs]] for key, runs in self.instruments.items()],
            "rejected": [[*key, [list(interval) for interval in runs]] for key, runs in self.rejected.items()],
            "producers": [[*key, highest] for key, highest in self.producers.items()],
            "minutes": [[*key, newest] for key, newest in self.minutes.items()],
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Seen:
        return cls(
            {(s, y, e): tuple((a, b) for a, b in runs) for s, y, e, runs in state["instruments"]},
            {(p, k): highest for p, k, highest in state["producers"]},
            {(s, a): newest for s, a, newest in state["minutes"]},
            {(s, y, e): tuple((a, b) for a, b in runs) for s, y, e, runs in state["rejected"]},
        )

    def with_found(self, found: Found) -> Seen:
        """This state and what a micro-batch has."""
        instruments, rejected = dict(self.instruments), dict(self.rejected)
        producers, minutes = dict(self.producers), dict(self.minutes)
        for known, added in ((instruments, found.runs), (rejected, found.rejected)):
            for instrument, run in added:
                known[instrument] = add_interval(known.get(instrument, ()), run)
        for place, highest in found.sequences:
            producers[place] = max(producers.get(place, highest), highest)
        for bucket in found.buckets:
            minutes[bucket.pair] = max(minutes.get(bucket.pair, bucket.minute), bucket.minute)
        return Seen(instruments, producers, minutes, rejected)

    def has_none_of(self, overview: Overview) -> bool:
        """Whether these ticks are all new ones, each there once."""
        if overview.repeated:
            return False
        runs: dict[Instrument, list[Interval]] = defaultdict(list)
        for instrument, run in overview.runs:
            runs[instrument].append(run)
        for instrument, intervals in runs.items():
            intervals.sort()
            if any(left[1] >= right[0] for left, right in pairwise(intervals)):
                return False
            if any(overlaps(self.instruments.get(instrument, ()), run) for run in intervals):
                return False
        places: dict[tuple[str, int], list[Sequences]] = defaultdict(list)
        for part in overview.sequences:
            places[part.producer, part.partition].append(part)
        for place, parts in places.items():
            parts.sort(key=lambda part: part.first_offset)
            if any(
                left.last_offset >= right.first_offset or left.last >= right.first for left, right in pairwise(parts)
            ):
                return False
            if place in self.producers and parts[0].first <= self.producers[place]:
                return False
        return True

    def _intervals(self, spark: SparkSession) -> DataFrame:
        rows = [
            f"{_names(source, symbol)}, {epoch}L, array({', '.join(f'({first}L, {last}L)' for first, last in runs)})"
            for (source, symbol, epoch), runs in self.instruments.items()
        ]
        return _values(spark, rows, "source", "symbol", "trade_epoch", "intervals")

    def _highest(self, spark: SparkSession) -> DataFrame:
        rows = [f"{_names(name)}, {partition}, {highest}L" for (name, partition), highest in self.producers.items()]
        return _values(spark, rows, "producer", "kafka_partition", "highest")

    def _newest_minutes(self, spark: SparkSession) -> DataFrame:
        rows = [f"{_names(source, asset)}, {newest}L" for (source, asset), newest in self.minutes.items()]
        return _values(spark, rows, "source", "asset", "newest_minute")

    def first_deliveries(self, ticks: DataFrame, gold_time: Column) -> DataFrame:
        """The valid ticks that were not seen before, each once (its lowest offset), with is_late."""
        spark = ticks.sparkSession
        instrument = ("source", "symbol", "trade_epoch")
        numbered = ticks.where(F.col("trade_id").isNotNull())
        if self.instruments:
            numbered = numbered.join(F.broadcast(self._intervals(spark)), [*instrument], "left").where(
                ~F.coalesce(
                    F.exists("intervals", lambda run: F.col("trade_id").between(run["col1"], run["col2"])),
                    F.lit(False),
                )
            )
        by_id = Window.partitionBy(*instrument).orderBy("trade_id", "kafka_partition", "kafka_offset")
        numbered = numbered.withColumn("previous", F.lag("trade_id").over(by_id)).where(
            F.col("previous").isNull() | (F.col("previous") != F.col("trade_id"))
        )

        sequenced = ticks.where(
            F.col("trade_id").isNull() & F.col("producer").isNotNull() & F.col("sequence").isNotNull()
        )
        before = (
            Window.partitionBy("producer", "kafka_partition")
            .orderBy("kafka_offset")
            .rowsBetween(Window.unboundedPreceding, -1)
        )
        sequenced = sequenced.withColumn("previous", F.max("sequence").over(before))
        if self.producers:
            sequenced = sequenced.join(
                F.broadcast(self._highest(spark)), ["producer", "kafka_partition"], "left"
            ).withColumn("previous", F.greatest("previous", "highest"))
        sequenced = sequenced.where(F.col("previous").isNull() | (F.col("sequence") > F.col("previous")))

        others = ticks.where(F.col("trade_id").isNull() & (F.col("producer").isNull() | F.col("sequence").isNull()))
        columns = ticks.columns
        new = numbered.select(columns).unionByName(sequenced.select(columns)).unionByName(others)
        if not self.minutes:
            return new.withColumn("is_late", F.lit(False))
        minute = F.unix_timestamp(F.date_trunc("minute", gold_time))
        return (
            new.join(F.broadcast(self._newest_minutes(spark)), ["source", "asset"], "left")
            .withColumn("is_late", F.coalesce(minute < F.col("newest_minute"), F.lit(False)))
            .select(*columns, "is_late")
        )


def _names(*names: str) -> str:
    """Names as SQL literals; they match [A-Za-z0-9/._-]{1,64}, or no tick would have them."""
    return ", ".join(f"'{name}'" for name in names)


def _values(spark: SparkSession, rows: Iterable[str], *columns: str) -> DataFrame:
    # Literal rows are planned as a local relation: no job, no Python worker.
    return spark.sql(f"SELECT * FROM VALUES ({'), ('.join(rows)}) AS state({', '.join(columns)})")


def runs(numbered: DataFrame) -> DataFrame:
    """first and last of each run of consecutive trade ids of an instrument."""
    by_id = Window.partitionBy("source", "symbol", "trade_epoch").orderBy("trade_id")
    return (
        numbered.where(F.col("trade_id").isNotNull())
        .withColumn("run", F.col("trade_id") - F.dense_rank().over(by_id))
        .groupBy("source", "symbol", "trade_epoch", "run")
        .agg(F.min("trade_id").alias("first"), F.max("trade_id").alias("last"))
        .drop("run")
    )


def summary(ticks: DataFrame, gold_symbols: Mapping[str, str]) -> DataFrame:
    """What new ticks add: a row for each run of trade ids, producer and partition, and bucket that feeds gold.

    Out: kind (run, sequence, bucket), source, symbol, trade_epoch, producer, kafka_partition, first, last, and the
    columns of `bucket_summaries`.
    """
    sequences = (
        ticks.where(F.col("trade_id").isNull() & F.col("producer").isNotNull() & F.col("sequence").isNotNull())
        .groupBy("producer", "kafka_partition")
        .agg(F.max("sequence").alias("last"))
    )
    buckets = bucket_summaries(ticks.where(feeds_gold(gold_symbols)))
    return _united(run=runs(ticks), sequence=sequences, bucket=buckets)


def strays(judged_records: DataFrame, gaps_topic: str) -> DataFrame:
    """What the records add that are no ticks: the runs of trade ids in quarantine, and the reports of gaps.

    Out: kind (rejected, report), source, symbol, trade_epoch, first, last, partition, offset, report.
    """
    rejected = judged_records.where(
        F.col("rule").isNotNull() & F.col("source").isNotNull() & F.col("symbol").isNotNull()
    ).select("source", "symbol", F.coalesce("trade_epoch", F.lit(0).cast("bigint")).alias("trade_epoch"), "trade_id")
    return _united(rejected=runs(rejected), report=gap_reports(judged_records, gaps_topic))


def _united(**kinds: DataFrame) -> DataFrame:
    first, *others = (rows.withColumn("kind", F.lit(kind)) for kind, rows in kinds.items())
    for rows in others:
        first = first.unionByName(rows, allowMissingColumns=True)
    return first
