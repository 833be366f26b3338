"""From Kafka to the lake, exactly once: bronze, silver and gold in one query.

In:  Kafka topics of ticks, rejects and gaps.
Out: bronze.ticks, silver.ticks, silver.quarantine, silver.gaps, gold.price_1m, price_5m, price_1h, price_1d,
     rolling_price, current_price, alerts.

    ./spark-submit.sh streaming/ticks.py
    ./spark-submit.sh streaming/ticks.py --once        # what Kafka holds now, then end

A micro-batch appends its records to bronze, its new valid ticks to silver, the others to quarantine, and brings gold
up to date by its ticks' summaries. If the job dies in between, the next one replays the batch: what is there stays,
the rest is written. SIGTERM and SIGINT end it after the micro-batch in hand.

Exit codes: 0 ended as told, 1 the query failed, 2 a wrong setting, 3 the checkpoint is not that of the lake's tables,
4 another writer has the lake, or has taken it over.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial

from pyspark import inheritable_thread_target
from pyspark.errors import AnalysisException, StreamingQueryException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.streaming.query import StreamingQuery

from conf.settings import Settings, arguments, from_command_line
from lake.gaps import Gap, frame, newest, reconciled, unfilled
from lake.gold import Batch, Gold
from lake.intervals import holes
from lake.lease import LakeInUse, Lease
from lake.rules import gold_rules
from lake.seen import Found, Seen, overview, strays, summary
from lake.summaries import EPOCH
from lake.tables import (
    BRONZE_TICKS,
    GOLD,
    SILVER_GAPS,
    SILVER_QUARANTINE,
    SILVER_TICKS,
    TABLES,
)
from lake.ticks import bronze, gold_time, judged, quarantined, sorted_out, valid_ticks
from lake.writer import Fenced, LakeWriter, create_table

logger = logging.getLogger("streaming.ticks")

WRONG_CHECKPOINT, FENCED = 3, 4
STREAMED = (BRONZE_TICKS, SILVER_TICKS, SILVER_QUARANTINE, SILVER_GAPS, *GOLD)


class CheckpointError(RuntimeError):
    """The lake's tables were written from another checkpoint than the one given."""


@dataclass
class Lakehouse:
    """The state between micro-batches: the lake's writer, what silver has seen, and gold's."""

    spark: SparkSession
    settings: Settings
    writer: LakeWriter
    gold: Gold
    seen: Seen = field(default_factory=Seen)
    # The rows of silver.gaps that are not filled, by gap_id.
    gaps: dict[str, Gap] = field(default_factory=dict)
    # Reports of numbers above the newest that silver has seen of their instrument: they count once it has.
    early: list[Gap] = field(default_factory=list)
    # When the last micro-batch began: the next one began later, whatever the clock says.
    began: datetime = EPOCH
    idle: threading.Event = field(default_factory=threading.Event)
    last: Batch | None = None
    # What ended the query, where another writer did: Spark hands on only its text.
    fenced: Fenced | None = None

    def __post_init__(self) -> None:
        self.idle.set()

    def write_batch(self, records: DataFrame, batch: int) -> None:
        """One micro-batch of Kafka records into every table."""
        self.idle.clear()
        try:
            query = self.spark.sparkContext.getLocalProperty("sql.streaming.queryId")
            assert query, "a micro-batch knows its query"
            self._write(records, query, batch)
        except Fenced as error:
            self.fenced = error
            raise
        finally:
            self.idle.set()

    def _write(self, records: DataFrame, query: str, number: int) -> None:
        started = time.monotonic()
        lake, settings = self.writer, self.settings
        batch = Batch(query, number, max(datetime.now(UTC), self.began + timedelta(microseconds=1)))
        at, told = batch.at, {"query": query, "batch": number}
        checked = judged(records, settings.rejects_topic, settings.gaps_topic).persist()
        with ThreadPoolExecutor(8) as threads:

            def start(step: Callable[..., None], *args: object, **options: object) -> Future[None]:
                running.append(threads.submit(inheritable_thread_target(self.spark)(partial(step, *args, **options))))
                return running[-1]

            running: list[Future[None]] = []
            start(lake.append, bronze(records, at), BRONZE_TICKS, **told)
            valid = valid_ticks(checked, settings.gaps_topic, settings.future_tolerance_seconds)
            kinds = sorted_out(checked, settings.gaps_topic, settings.future_tolerance_seconds)
            told_of = overview(kinds, settings.gold_symbols).collect()
            replayed = number <= lake.batch(SILVER_TICKS)
            found = None if replayed else self.seen.only_new(told_of)
            if found:
                ticks = valid.withColumn("is_late", F.lit(False))
            else:
                ticks = self._first_of(valid, replayed).persist()
                found = Found().add(summary(ticks, settings.gold_symbols).collect())
            strange = {row.kind for row in told_of} - {"tick"}
            if strange:
                found.add(strays(checked, settings.gaps_topic).collect())
            seen = self.seen.with_found(found)
            changed, early = self._gaps(found, seen, at)
            state = {"seen": seen.to_json(), "early": [gap.to_json() for gap in early], "at": at.isoformat()}
            silver = start(lake.append, ticks, SILVER_TICKS, **told, **state)
            if changed:
                start(lake.fold, frame(self.spark, changed), SILVER_GAPS, **told, spans=[0], folded=newest)
            buckets = found.buckets
            dirty = self.gold.take(buckets, counted=replayed)
            start(self.gold.prices, buckets, batch)
            start(self.gold.rolling, dirty, batch, silver.result)
            start(self.gold.current, buckets, batch, silver.result)
            start(self.gold.alerts, dirty, batch, silver.result)
            if "bad" in strange:
                start(lake.append, quarantined(checked, at), SILVER_QUARANTINE, **told)
            for step in running:
                step.result()
        self.gold.roll_up(batch)
        self.seen, self.early, self.began, self.last = seen, early, at, batch
        self.gaps = unfilled([*self.gaps.values(), *changed])
        for cached in (ticks, checked):
            cached.unpersist()
        logger.info("batch %d: %.2f s", number, time.monotonic() - started)

    def finish(self) -> None:
        """After the last micro-batch: the longer windows as of now."""
        if self.last:
            self.gold.roll_up(self.last, at_once=True)

    def _gaps(self, found: Found, seen: Seen, at: datetime) -> tuple[list[Gap], list[Gap]]:
        """(rows of silver.gaps that change, reports that are early)."""
        said = [*self.early, *found.reports]
        early = [
            gap
            for gap in said
            if gap.interval and gap.status != "filled" and gap.interval[1] > seen.highest(gap.instrument)
        ]
        instruments = found.instruments | {gap.instrument for gap in said if gap.interval}
        missing = {
            instrument: holes(seen.instruments.get(instrument, ()), seen.rejected.get(instrument, ()))
            for instrument in instruments
        }
        return reconciled(self.gaps, missing, said, at), early

    def _first_of(self, valid: DataFrame, replayed: bool) -> DataFrame:
        """The ticks that silver does not have yet, each once; of a replayed micro-batch, those that it has by it."""
        if not replayed:
            return self.seen.first_deliveries(valid, gold_time())
        silver = self.spark.read.format("delta").load(SILVER_TICKS.path(self.settings.lake_root))
        return silver.join(valid, ["kafka_partition", "kafka_offset"], "left_semi")


def checkpoint_query(spark: SparkSession, location: str) -> str | None:
    """The id of the query whose checkpoint is at location, or None if there is none."""
    try:
        rows = spark.read.text(f"{location}/metadata").select(F.get_json_object("value", "$.id").alias("id")).collect()
    except AnalysisException as error:
        if error.getCondition() != "PATH_NOT_FOUND":
            raise
        return None
    return str(rows[0]["id"]) if rows else None


def resume(spark: SparkSession, settings: Settings) -> Lakehouse:
    """Open the lake for writing, with tables that are absent created, and take up what the last micro-batch left.

    Raises CheckpointError if the tables were written by the query of another checkpoint.
    """
    for table in TABLES:
        create_table(spark, table, settings.lake_root)
    lake = LakeWriter(spark, settings.lake_root, STREAMED)
    written_by = {str(query) for table in STREAMED if (query := lake.metadata(table).get("query"))}
    if written_by and written_by != {checkpoint_query(spark, settings.checkpoint_location)}:
        raise CheckpointError(
            f"the tables in {settings.lake_root} were written from another checkpoint than "
            f"{settings.checkpoint_location}: going on would write records twice. "
            "Give back that checkpoint (setting checkpoint), or use another lake_root."
        )
    lake.claim()
    kept = lake.metadata(SILVER_TICKS)
    seen = Seen.from_json(kept["seen"]) if kept else Seen()
    gaps = spark.read.format("delta").load(SILVER_GAPS.path(settings.lake_root)).where(F.col("status") != "filled")
    return Lakehouse(
        *(spark, settings, lake),
        gold=Gold(spark, settings.lake_root, lake, gold_rules(settings), seen.minutes),
        seen=seen,
        gaps=unfilled(Gap(*row) for row in gaps.select(*SILVER_GAPS.column_names).collect()),
        early=[Gap.from_json(gap) for gap in kept.get("early", [])],
        began=datetime.fromisoformat(kept["at"]) if kept else EPOCH,
    )


def start(spark: SparkSession, settings: Settings, lakehouse: Lakehouse) -> StreamingQuery:
    """Start the query."""
    topics = (settings.ticks_topic, settings.rejects_topic, settings.gaps_topic)
    records = (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", settings.kafka_bootstrap_servers)
        # A pattern, so that a topic that does not exist yet is waited for.
        .option("subscribePattern", "|".join(re.escape(topic) for topic in topics))
        .option("startingOffsets", "earliest")
        .option("failOnDataLoss", "true")
        .option("maxOffsetsPerTrigger", str(settings.max_offsets_per_trigger))
        .load()
    )
    writing = (
        records.writeStream.queryName("ticks")
        .foreachBatch(lakehouse.write_batch)
        .option("checkpointLocation", settings.checkpoint_location)
    )
    if settings.once:
        return writing.trigger(availableNow=True).start()
    return writing.trigger(processingTime=f"{settings.trigger_seconds} seconds").start()


def run(query: StreamingQuery, lakehouse: Lakehouse, stop: threading.Event) -> None:
    """Wait until the query ends, or until it is told to stop and the micro-batch in hand is written."""
    while not query.awaitTermination(1):
        # Stopping a query while its callback runs fills the log with errors of the callback's own making.
        if stop.is_set() and lakehouse.idle.wait(60):
            query.stop()
            break
    lakehouse.finish()


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(
        __doc__,
        *(
            "kafka_bootstrap_servers",
            "ticks_topic",
            "rejects_topic",
            "gaps_topic",
            "lake_root",
            "checkpoint",
            "trigger_seconds",
        ),
        *("max_offsets_per_trigger", "once", "future_tolerance_seconds", "gold_symbols"),
    )
    settings, _ = from_command_line(parser, argv)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    spark = SparkSession.builder.appName("tickhouse ticks").getOrCreate()
    lease = Lease(spark, settings.lake_root)
    try:
        lease.acquire()
        lakehouse = resume(spark, settings)
        logger.info("%s -> %s", settings.kafka_bootstrap_servers, settings.lake_root)
        run(start(spark, settings, lakehouse), lakehouse, stop)
    except CheckpointError as error:
        logger.error("%s", error)
        return WRONG_CHECKPOINT
    except LakeInUse as error:
        logger.error("%s", error)
        return FENCED
    except Fenced as error:
        logger.error("%s; this one wrote nothing since", error)
        return FENCED
    except StreamingQueryException as error:
        if lakehouse.fenced:
            logger.error("%s; this one wrote nothing since", lakehouse.fenced)
            return FENCED
        logger.error("the query failed: %s", error)
        return 1
    finally:
        lease.release()
        spark.stop()
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("py4j").setLevel(logging.WARNING)
    sys.exit(main())
