"""Which ticks the lake has already: bounded deduplication.

The state is a handful of rows, however many ticks went by:

- per instrument (source, symbol, trade_epoch): the intervals of trade ids seen. A repeat lies inside one; the holes
  between them are ticks that have not come (yet).
- per producer and Kafka partition: the highest sequence seen of ticks that have no trade id. Kafka keeps a producer's
  order within a partition, so a repeat is not above it.
- per source and asset: the newest minute that gold has, by which a tick is called late.

It is small enough for the driver, and travels in the metadata of the very commit that appends the ticks to
silver.ticks, so that the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from lake.intervals import Instrument, Interval, add_interval
from lake.summaries import BUCKET_SECONDS, bucket_summaries
from lake.ticks import feeding_gold


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

    def with_rows(self, rows: Iterable[Any]) -> Seen:
        """This state and the rows of `summary`."""
        instruments, rejected = dict(self.instruments), dict(self.rejected)
        producers, minutes = dict(self.producers), dict(self.minutes)
        for row in rows:
            if row.kind in ("run", "rejected"):
                key = (row.source, row.symbol, row.trade_epoch)
                known = instruments if row.kind == "run" else rejected
                known[key] = add_interval(known.get(key, ()), (row.first, row.last))
            elif row.kind == "sequence":
                place = (row.producer, row.kafka_partition)
                producers[place] = max(producers.get(place, row.last), row.last)
            elif row.kind == "bucket":
                pair, minute = (row.source, row.asset), row.bucket * BUCKET_SECONDS // 60 * 60
                minutes[pair] = max(minutes.get(pair, minute), minute)
        return Seen(instruments, producers, minutes, rejected)

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


def _runs(numbered: DataFrame) -> DataFrame:
    """first and last of each run of consecutive trade ids of an instrument."""
    by_id = Window.partitionBy("source", "symbol", "trade_epoch").orderBy("trade_id")
    return (
        numbered.where(F.col("trade_id").isNotNull())
        .withColumn("run", F.col("trade_id") - F.dense_rank().over(by_id))
        .groupBy("source", "symbol", "trade_epoch", "run")
        .agg(F.min("trade_id").alias("first"), F.max("trade_id").alias("last"))
        .drop("run")
    )


def summary(ticks: DataFrame, rejected: DataFrame, gold_symbols: Mapping[str, str]) -> DataFrame:
    """What to add to a Seen after these ticks and these records that went to quarantine.

    A row for each run of trade ids of either, each producer and partition, each bucket of the ticks that feed gold;
    and one with the number of records in quarantine. Out: kind (run, rejected, sequence, bucket, quarantined), source,
    symbol, trade_epoch, producer, kafka_partition, first, last, and the columns of `bucket_summaries`.
    """
    sequences = (
        ticks.where(F.col("trade_id").isNull() & F.col("producer").isNotNull() & F.col("sequence").isNotNull())
        .groupBy("producer", "kafka_partition")
        .agg(F.max("sequence").alias("last"))
    )
    numbered = rejected.where(F.col("source").isNotNull() & F.col("symbol").isNotNull()).select(
        "source", "symbol", F.coalesce("trade_epoch", F.lit(0).cast("bigint")).alias("trade_epoch"), "trade_id"
    )
    kinds = {
        "run": _runs(ticks),
        "rejected": _runs(numbered),
        "sequence": sequences,
        "bucket": bucket_summaries(feeding_gold(ticks, gold_symbols)),
        "quarantined": rejected.agg(F.count("*").alias("last")),
    }
    first, *others = (rows.withColumn("kind", F.lit(kind)) for kind, rows in kinds.items())
    for rows in others:
        first = first.unionByName(rows, allowMissingColumns=True)
    return first
