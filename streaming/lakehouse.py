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
from lake.commits import DataFile
from lake.files import content
from lake.gaps import Gap, reconciled, unfilled
from lake.gold import Gold
from lake.intervals import Instrument, holes
from lake.rows import Batch, Rows, gap_rows
from lake.rules import PROPERTY, deciding, differences, gold_rules
from lake.seen import Found, Seen, strays, summary
from lake.sinks import Sink
from lake.staging import Plan, Staged, stage
from lake.store import Store
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
from lake.ticks import RECORD, gold_time, judged, quarantined, sorted_out, valid_ticks
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
    store: Store
    gold: Gold
    gaps: Rows[Gap]
    # Its records come from bronze.
    rebuilding: bool = False
    seen: Seen = field(default_factory=Seen)
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

    def write_batch(self, records: DataFrame, batch: int) -> None:
        """One micro-batch of Kafka's records (lake.ticks.RECORD) into every table."""
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
        replayed = number <= lake.batch(SILVER_TICKS)
        # Silver has all its ticks in the ingester's form, and no others: nothing is to be found out again.
        known = replayed and bool(lake.metadata(SILVER_TICKS).get("as_staged"))
        staged = self._staged(records, at, number, but=(SILVER_TICKS,) if known else ())
        odd = self._judged(staged.odd) if staged.odd else None
        cached = [] if odd is None else [odd]
        kinds = {} if odd is None else self._kinds(odd)
        as_staged = known or (not replayed and "tick" not in kinds and self.seen.has_none_of(staged.overview))
        with ThreadPoolExecutor(8) as threads:

            def start(step: Callable[..., None], *args: object, **options: object) -> Future[None]:
                running.append(threads.submit(inheritable_thread_target(self.spark)(partial(step, *args, **options))))
                return running[-1]

            running: list[Future[None]] = []
            if not self.rebuilding:
                start(self._add, staged.of(BRONZE_TICKS), BRONZE_TICKS, **told)
            if as_staged:
                found = Found.of(staged.overview, settings.gold_symbols)
            else:
                ticks = self._first_of(self._valid(staged.urls(SILVER_TICKS, settings.lake_root), odd), replayed)
                cached.append(ticks.persist())
                found = Found().add(summary(ticks, settings.gold_symbols).collect())
            if odd is not None:
                found.add(strays(odd, settings.gaps_topic).collect())
            seen = self.seen.with_found(found)
            said = [*self.early, *found.reports]
            early = _early(said, seen)
            state = {
                "seen": seen.to_json(),
                "early": [gap.to_json() for gap in early],
                "at": at.isoformat(),
                "as_staged": as_staged,
            }
            buckets = found.buckets
            dirty = self.gold.take(buckets, counted=replayed)
            start(self.gold.prices, buckets, batch)
            if as_staged:
                silver = start(self._add, staged.of(SILVER_TICKS), SILVER_TICKS, **told, **state)
            else:
                silver = start(self._append, ticks, SILVER_TICKS, **told, **state)
            start(self._gaps, found.instruments, said, seen, batch)
            start(self.gold.rolling, dirty, batch, silver.result)
            start(self.gold.current, buckets, batch, silver.result)
            start(self.gold.alerts, dirty, batch, silver.result)
            if odd is not None and "bad" in kinds:
                start(self._append, quarantined(odd, at), SILVER_QUARANTINE, **told)
            for step in running:
                step.result()
        self.gold.roll_up(batch)
        self.seen, self.early, self.began, self.last = seen, early, at, batch
        self.records = staged.records
        for rows in cached:
            rows.unpersist()
        for url in (*staged.odd, *(() if as_staged else staged.urls(SILVER_TICKS, settings.lake_root))):
            self.store.delete(url)
        logger.info("batch %d: %d records in %.2f s", number, self.records, time.monotonic() - started)

    def _staged(self, records: DataFrame, at: datetime, number: int, but: Collection[Table]) -> Staged:
        """The records as files of bronze and silver, of those that lack the micro-batch, but not of these."""
        settings = self.settings
        tables = (SILVER_TICKS,) if self.rebuilding else (BRONZE_TICKS, SILVER_TICKS)
        plan = Plan(
            store=self.store,
            root=settings.lake_root,
            tables=tuple(t for t in tables if t not in but and (t == SILVER_TICKS or number > self.writer.batch(t))),
            at=at,
            other_topics=(settings.rejects_topic, settings.gaps_topic),
            future_tolerance_seconds=settings.future_tolerance_seconds,
            newest_minutes=self.seen.minutes,
        )
        records = records.select(*RECORD)
        # One task and one file a table, where there is not much to do.
        return stage(records.coalesce(1) if self.records < FEW else records, plan)

    def _judged(self, odd: Sequence[str]) -> DataFrame:
        """The records of these files, each with its tick or what is wrong with it."""
        settings = self.settings
        records = self.spark.read.schema(BRONZE_TICKS.schema_of(RECORD)).parquet(*odd)
        return judged(records, settings.rejects_topic, settings.gaps_topic).persist()

    def _kinds(self, judged_records: DataFrame) -> dict[str, int]:
        """How many of them are of each kind."""
        settings = self.settings
        kinds = sorted_out(judged_records, settings.gaps_topic, settings.future_tolerance_seconds).groupBy("kind")
        return {row["kind"]: row["count"] for row in kinds.count().collect()}

    def _valid(self, staged: Sequence[str], odd: DataFrame | None) -> DataFrame:
        """silver.ticks without is_late, repeats included: of silver's staged files, and of records that were judged."""
        settings = self.settings
        stored = SILVER_TICKS.schema_of([n for n in SILVER_TICKS.column_names if n not in ("event_date", "is_late")])
        ticks = self.spark.read.schema(stored).parquet(*staged) if staged else self.spark.createDataFrame([], stored)
        ticks = ticks.withColumn("event_date", F.to_date("event_time"))
        if odd is None:
            return ticks
        return ticks.unionByName(valid_ticks(odd, settings.gaps_topic, settings.future_tolerance_seconds))

    def _append(self, rows: DataFrame, table: Table, **told: Any) -> None:
        self._has(table, self.writer.append(rows, table, **told))

    def _add(self, files: Sequence[dict[str, Any]], table: Table, **told: Any) -> None:
        self._has(table, self.writer.add(files, table, **told))

    def _has(self, table: Table, files: Sequence[DataFile]) -> None:
        if table == SILVER_TICKS:
            self.gold.has(files)

    def finish(self) -> None:
        """After the last micro-batch: the longer windows as of now."""
        if self.last:
            self.gold.roll_up(self.last, at_once=True)

    def _gaps(self, instruments: Collection[Instrument], said: Sequence[Gap], seen: Seen, batch: Batch) -> None:
        """Bring silver.gaps up to date with what was seen of these instruments, and was said of any."""
        instruments = {*instruments, *(gap.instrument for gap in said if gap.interval)}
        missing = {
            instrument: holes(seen.instruments.get(instrument, ()), seen.rejected.get(instrument, ()))
            for instrument in instruments
        }
        known = unfilled(self.gaps.load([0])[0].values())
        changed = {gap.gap_id: gap for gap in reconciled(known, missing, said, batch.at)}
        if changed:
            self.gaps.update(batch, [0], lambda _, rows: rows.update(changed))

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

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(create, TABLES))
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
    store = Store.of(settings.lake_root, str(settings.webhdfs_url))
    return Lakehouse(
        *(spark, settings, lake, store),
        gaps=gap_rows(spark, lake),
        gold=Gold(spark, settings.lake_root, lake, store, gold_rules(settings), seen.minutes, sink=sink),
        seen=seen,
        early=[Gap.from_json(gap) for gap in kept.get("early", [])],
        began=datetime.fromisoformat(kept["at"]) if "at" in kept else EPOCH,
    )
