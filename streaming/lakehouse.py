"""A micro-batch into every table, and what is kept between micro-batches."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from pyspark import inheritable_thread_target
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.settings import Settings
from lake.files import content
from lake.gaps import Gap, frame, newest, reconciled, unfilled
from lake.gold import Gold
from lake.intervals import Instrument, holes
from lake.rows import Batch
from lake.rules import PROPERTY, deciding, differences, gold_rules
from lake.seen import Found, Seen, overview, strays, summary
from lake.sinks import Sink
from lake.summaries import EPOCH
from lake.tables import (
    BRONZE_TICKS,
    GOLD,
    SILVER_GAPS,
    SILVER_QUARANTINE,
    SILVER_TICKS,
    TABLES,
    Table,
)
from lake.ticks import RECORD, bronze, canonical, gold_time, judged, of_ticks, quarantined, sorted_out
from lake.writer import PROPERTIES, Fenced, LakeWriter, create_table

logger = logging.getLogger(__name__)

STREAMED = (BRONZE_TICKS, SILVER_TICKS, SILVER_QUARANTINE, SILVER_GAPS, *GOLD)


# A micro-batch of fewer records is faster done by one task.
FEW = 20_000


class CheckpointError(RuntimeError):
    """The lake's tables were written from another checkpoint than the one given."""


class SettingsChanged(RuntimeError):
    """The lake's tables were made by other settings."""


@dataclass
class Lakehouse:
    """The state between micro-batches: the lake's writer, what silver has seen, and gold's."""

    spark: SparkSession
    settings: Settings
    writer: LakeWriter
    gold: Gold
    # Its records come from bronze.
    rebuilding: bool = False
    seen: Seen = field(default_factory=Seen)
    # The rows of silver.gaps that are not filled, by gap_id; None: to be read.
    gaps: dict[str, Gap] | None = None
    # Reports of numbers above the newest that silver has seen of their instrument: they count once it has.
    early: list[Gap] = field(default_factory=list)
    # When the last micro-batch began: the next one began later, whatever the clock says.
    began: datetime = EPOCH
    idle: threading.Event = field(default_factory=threading.Event)
    last: Batch | None = None
    # How many the last micro-batch had.
    records: int = FEW
    # What ended the query, where another writer did: Spark hands on only its text.
    fenced: Fenced | None = None

    def __post_init__(self) -> None:
        self.idle.set()

    def canonical(self, records: DataFrame) -> DataFrame:
        """Kafka's records as `write_batch` takes them."""
        settings = self.settings
        return canonical(records, settings.rejects_topic, settings.gaps_topic, settings.future_tolerance_seconds)

    def write_batch(self, records: DataFrame, batch: int) -> None:
        """One micro-batch of `canonical` records into every table."""
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
        # One task and one file a table, where there is not much to do.
        records = (records.coalesce(1) if self.records < FEW else records).persist()
        cached = [records]
        replayed = number <= lake.batch(SILVER_TICKS)
        # What to keep with silver's rows if all records are new ticks; None if they are not.
        decision: Future[dict[str, Any] | None] = Future()
        with ThreadPoolExecutor(8) as threads:

            def start(step: Callable[..., None], *args: object, **options: object) -> Future[None]:
                running.append(threads.submit(inheritable_thread_target(self.spark)(partial(step, *args, **options))))
                return running[-1]

            running: list[Future[None]] = []
            try:
                if not self.rebuilding:
                    start(self._append, bronze(records, at), BRONZE_TICKS, **told)
                # They nearly always are: silver's files are written while that is looked into.
                ticks = _all_new(records)
                silver = start(self._append_ticks, ticks, decision.result, **told)
                kinds = overview(records, settings.gold_symbols).collect()
                strange = any(row.kind == "odd" for row in kinds)
                if strange:
                    odd = records.where(F.col("kind") == "odd").select(*RECORD)
                    checked = judged(odd, settings.rejects_topic, settings.gaps_topic).persist()
                    sorted_odd = sorted_out(checked, settings.gaps_topic, settings.future_tolerance_seconds)
                    records = records.select(*sorted_odd.columns).where(F.col("kind") == "tick").unionByName(sorted_odd)
                    cached.append(checked)
                    kinds = overview(records, settings.gold_symbols).collect()
                found = None if replayed else self.seen.only_new(kinds)
                as_tried = found is not None and not strange
                if not as_tried:
                    decision.set_result(None)
                    silver.result()
                if found is None:
                    ticks = self._first_of(of_ticks(records), replayed).persist()
                    cached.append(ticks)
                    found = Found().add(summary(ticks, settings.gold_symbols).collect())
                elif strange:
                    ticks = _all_new(records)
                if strange:
                    found.add(strays(checked, settings.gaps_topic).collect())
                seen = self.seen.with_found(found)
                said = [*self.early, *found.reports]
                early = _early(said, seen)
                state = {"seen": seen.to_json(), "early": [gap.to_json() for gap in early], "at": at.isoformat()}
                buckets = found.buckets
                dirty = self.gold.take(buckets, counted=replayed)
                start(self.gold.prices, buckets, batch)
                if as_tried:
                    decision.set_result(state)
                else:
                    silver = start(self._append_ticks, ticks, lambda: state, **told)
                start(self._gaps, found.instruments, said, seen, at, **told)
                start(self.gold.rolling, dirty, batch, silver.result)
                start(self.gold.current, buckets, batch, silver.result)
                start(self.gold.alerts, dirty, batch, silver.result)
                if any(row.kind == "bad" for row in kinds):
                    start(self._append, quarantined(checked, at), SILVER_QUARANTINE, **told)
            finally:
                # Nobody is to wait for it any more, whatever went wrong.
                decision.cancel()
            for step in running:
                step.result()
        self.gold.roll_up(batch)
        self.seen, self.early, self.began, self.last = seen, early, at, batch
        self.records = sum(row.records for row in kinds)
        for rows in cached:
            rows.unpersist()
        logger.info("batch %d: %d records in %.2f s", number, self.records, time.monotonic() - started)

    def _append(self, rows: DataFrame, table: Table, **told: Any) -> None:
        self.writer.append(rows, table, **told)

    def _append_ticks(self, ticks: DataFrame, decided: Callable[[], dict[str, Any] | None], **told: Any) -> None:
        self.gold.has(self.writer.append(ticks, SILVER_TICKS, decided=decided, **told) or [])

    def finish(self) -> None:
        """After the last micro-batch: the longer windows as of now."""
        if self.last:
            self.gold.roll_up(self.last, at_once=True)

    def _gaps(
        self, instruments: Collection[Instrument], said: Sequence[Gap], seen: Seen, at: datetime, **told: Any
    ) -> None:
        """Bring silver.gaps up to date with what was seen of these instruments, and was said of any."""
        instruments = {*instruments, *(gap.instrument for gap in said if gap.interval)}
        missing = {
            instrument: holes(seen.instruments.get(instrument, ()), seen.rejected.get(instrument, ()))
            for instrument in instruments
        }
        if self.gaps is None:
            self.gaps = self._stored_gaps()
        changed = reconciled(self.gaps, missing, said, at)
        if changed:
            self.writer.fold(frame(self.spark, changed), SILVER_GAPS, **told, spans=[0], folded=newest)
            self.gaps = unfilled([*self.gaps.values(), *changed])

    def _stored_gaps(self) -> dict[str, Gap]:
        table = self.spark.read.format("delta").load(SILVER_GAPS.path(self.settings.lake_root))
        rows = table.where(F.col("status") != "filled").select(*SILVER_GAPS.column_names).collect()
        return unfilled(Gap(*row) for row in rows)

    def _first_of(self, valid: DataFrame, replayed: bool) -> DataFrame:
        """The ticks that silver does not have yet, each once; of a replayed micro-batch, those that it has by it."""
        if not replayed:
            return self.seen.first_deliveries(valid, gold_time())
        silver = self.spark.read.format("delta").load(SILVER_TICKS.path(self.settings.lake_root))
        return silver.join(valid, ["kafka_partition", "kafka_offset"], "left_semi")


def _early(said: Iterable[Gap], seen: Seen) -> list[Gap]:
    """Reports of numbers above the newest that was seen of their instrument."""
    return [
        gap
        for gap in said
        if gap.interval and gap.status != "filled" and gap.interval[1] > seen.highest(gap.instrument)
    ]


def _all_new(kinds: DataFrame) -> DataFrame:
    """silver.ticks, of rows with a kind whose ticks are all new ones, none of them late."""
    return of_ticks(kinds).withColumn("is_late", F.lit(False))


def checkpoint_query(spark: SparkSession, location: str) -> str | None:
    """The id of the query whose checkpoint is at location, or None if there is none."""
    told = content(spark, f"{location}/metadata")
    return None if told is None else str(json.loads(told)["id"])


def opened(spark: SparkSession, settings: Settings) -> LakeWriter:
    """The lake's writer, with tables that are absent created. It has not claimed the lake yet."""

    def create(table: Table) -> None:
        made_by = {PROPERTY: deciding(settings)} if table == SILVER_TICKS else {}
        streamed = PROPERTIES if table in STREAMED else {}
        create_table(spark, table, settings.lake_root, {**made_by, **streamed})

    # The first one alone: Spark learns there what it needs for the others.
    create(TABLES[0])
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(create, TABLES[1:]))
    return LakeWriter(spark, settings.lake_root, STREAMED)


def resume(spark: SparkSession, settings: Settings, sink: Sink | None = None) -> Lakehouse:
    """Open the lake for writing, with tables that are absent created, and take up what the last micro-batch left.

    Raises CheckpointError if the tables were written by the query of another checkpoint, SettingsChanged if by other
    settings of those that decide what they hold.
    """
    lake = opened(spark, settings)
    made_by = lake.property(SILVER_TICKS, PROPERTY)
    if made_by and (others := differences(made_by, settings)):
        raise SettingsChanged(
            f"the tables in {settings.lake_root} were made by other settings ({'; '.join(others)}): give those back, "
            "or let --rebuild make silver and gold anew from bronze, or use another lake_root."
        )
    written_by = {str(query) for table in STREAMED if (query := lake.metadata(table).get("query"))}
    if written_by and written_by != {checkpoint_query(spark, settings.checkpoint_location)}:
        raise CheckpointError(
            f"the tables in {settings.lake_root} were written from another checkpoint than "
            f"{settings.checkpoint_location}: going on would write records twice. "
            "Give back that checkpoint (setting checkpoint); or, where it is lost, let --rebuild make silver and gold "
            "anew from bronze and go on from there; or use another lake_root."
        )
    return lakehouse(spark, settings, lake, sink)


def lakehouse(spark: SparkSession, settings: Settings, lake: LakeWriter, sink: Sink | None = None) -> Lakehouse:
    """Claim the lake, and take up what the last micro-batch left."""
    lake.claim()
    kept = lake.metadata(SILVER_TICKS)
    seen = Seen.from_json(kept["seen"]) if "seen" in kept else Seen()
    return Lakehouse(
        *(spark, settings, lake),
        gold=Gold(spark, settings.lake_root, lake, gold_rules(settings), seen.minutes, sink=sink),
        seen=seen,
        early=[Gap.from_json(gap) for gap in kept.get("early", [])],
        began=datetime.fromisoformat(kept["at"]) if "at" in kept else EPOCH,
    )
