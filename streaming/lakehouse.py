"""Write a micro-batch into every table, and keep the state between micro-batches."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import polars as pl
from pyspark.sql import DataFrame, SparkSession

from conf.settings import Settings
from lake.delta.files import files_of
from lake.delta.log import Action, DataFile
from lake.delta.slices import Batch, Changes, Sink, Slices
from lake.delta.version import check_version
from lake.delta.writer import Fenced, LakeWriter, create_table, horizon
from lake.gold.rollup import RollUp
from lake.gold.update import Gold, feeding
from lake.rules import PROPERTY, deciding, differences, gold_rules, tick_rules
from lake.silver import state
from lake.silver.deduplicate import Delta
from lake.silver.gaps import Gap, InstrumentChange, UnfilledGaps, instrument_changes
from lake.silver.stage import FEW, Plan, Staged, TickFiles, read_back, stage, without_repeats
from lake.silver.state import State
from lake.tables import (
    BRONZE_TICKS,
    SILVER_GAPS,
    SILVER_QUARANTINE,
    SILVER_TICKS,
    STREAMED,
    TABLES,
    Table,
)
from lake.times import MINUTE, SECOND
from streaming.checkpoint import REMEDY, CheckpointError, checkpoint_query, put_aside
from streaming.losses import Topics
from streaming.progress import Progress
from streaming.upkeep import Upkeep

logger = logging.getLogger(__name__)

# The longer windows are written so long after the first change, or after the last micro-batch.
ROLL_UP_SECONDS = 10.0
QUIET_SECONDS = 2.0


class SettingsChanged(RuntimeError):
    """Other settings made the lake's tables."""


@dataclass
class Lakehouse:
    """The state between micro-batches: the lake's writer, and the state of silver and gold."""

    spark: SparkSession
    settings: Settings
    writer: LakeWriter
    gold: Gold
    rollup: RollUp
    gap_rows: Slices
    unfilled: UnfilledGaps
    state: State
    # A rebuild's records come from bronze, so bronze is not written.
    rebuilding: bool = False
    # What the lake knows of Kafka's topics; each commit of bronze carries it.
    topics: Topics = field(default_factory=Topics)
    # Set while no micro-batch is being written.
    idle: threading.Event = field(default_factory=threading.Event)
    last: Batch | None = None
    # The number of records in the last micro-batch.
    records: int = FEW
    # Set when another writer has fenced this one; Spark re-raises only the message.
    fenced: Fenced | None = None
    upkeep: Upkeep | None = None
    progress: Progress = field(default_factory=Progress)
    # Set when the job is about to end.
    ending: threading.Event = field(default_factory=threading.Event)
    # The error that ended the last micro-batch; Spark re-raises only its message.
    failure: BaseException | None = None
    # The version of silver.ticks that the newest snapshot of the state describes; a start writes one.
    _snapshot: int = field(init=False)
    _writing: threading.Lock = field(default_factory=threading.Lock)
    # Held while the longer windows are written.
    _rolling: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)
    _roller: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.idle.set()
        self._snapshot = self.writer.version(SILVER_TICKS)
        self._rolled_up_at = self._wrote_at = time.monotonic()

    def write_batch(self, records: DataFrame, batch: int) -> None:
        """Write one micro-batch of Kafka's records (lake.contract.RECORD) into every table."""
        self.idle.clear()
        try:
            query = self.spark.sparkContext.getLocalProperty("sql.streaming.queryId")
            assert query, "a micro-batch knows its query"
            with self._writing, self.progress.time("whole"):
                self._write(records, query, batch)
        except BaseException as error:
            self.failure = error
            if isinstance(error, Fenced):
                self.fenced = error
            raise
        finally:
            self.idle.set()
        if self.upkeep:
            self.upkeep.pause(self.ending)

    @property
    def is_settled(self) -> bool:
        """Whether all tables have the last micro-batch."""
        return self.last is not None and self.failure is None

    @contextmanager
    def between(self) -> Iterator[None]:
        """Hold back micro-batches and the longer windows, after those under way."""
        with self._rolling, self._writing:
            yield

    @property
    def slices(self) -> tuple[Slices, ...]:
        """The rows of the tables that change."""
        return (*self.gold.slices, *self.rollup.slices, self.gap_rows)

    def _write(self, records: DataFrame, query: str, number: int) -> None:
        started = time.monotonic()
        lake = self.writer
        batch = Batch(query, number, self._began(number))
        replayed = self._is_replay(batch)
        plan = self._plan(batch, replayed)
        # A small micro-batch is one task, and makes one file per table.
        with self.progress.time("stage"):
            staged = stage(records.coalesce(1) if self.records < FEW else records, plan)
        if replayed:
            # Silver has the micro-batch already, but some of gold's tables may lack it.
            self._check_offsets(batch, staged)
            ticks, delta = self._of_replay(number, plan), self.state.last
            self.gold.begin_at(delta.minutes_before(self.state.seen.minutes))
            after = self.state
        else:
            ticks = staged.ticks
            with self.progress.time("deduplicate"):
                if repeats := self.state.seen.repeats([part.numbers for part in ticks]):
                    ticks = staged.ticks = without_repeats(self.spark, ticks, repeats, plan)
                delta = self._delta(staged, ticks)
            after = State(self.state.seen.after(delta), self.state.early, batch.at, delta)
        # The accepted losses are rows of silver.gaps after a rebuild too.
        reports = [*staged.reports, *self.topics.losses]
        rejected = [((source, symbol, epoch), (number, number)) for source, symbol, epoch, number in staged.rejected]
        changes = instrument_changes(after.seen.instruments, after.seen.rejected, delta.runs, rejected, reports)
        if not replayed:
            after.early = self.state.early.after(changes, reports)
        summaries = pl.concat([part.summaries for part in ticks]) if ticks else None
        # gold's prices and alerts read these files too.
        self.gold.has(lake.files_at(SILVER_TICKS, staged.of(SILVER_TICKS)))
        with ThreadPoolExecutor(4) as threads:

            def start(step: Callable[..., object], *arguments: object, **options: object) -> None:
                running.append(threads.submit(partial(step, *arguments, **options)))

            running: list[Future[object]] = []
            metadata: dict[str, Any] = {"delta": delta.to_json(), "at": after.began.isoformat()}
            if after.early != self.state.early:
                metadata["early"] = after.early.to_json()
            if not self.rebuilding:
                metadata["offsets"] = staged.offsets_to_json()
                known = {"at": batch.at.isoformat(), "kafka": self.topics.to_json()}
                start(self._add, staged.of(BRONZE_TICKS), BRONZE_TICKS, batch, **known)
            start(self._add, staged.of(SILVER_TICKS), SILVER_TICKS, batch, **metadata)
            if quarantined := staged.of(SILVER_QUARANTINE):
                start(self._add, quarantined, SILVER_QUARANTINE, batch)
            start(self.progress.time("silver.gaps")(self._gaps), changes, [*after.early.due, *reports], batch)
            if summaries is not None:
                with self.progress.time("gold"):
                    changed_minutes = self.gold.write(summaries, batch)
                self.rollup.note(changed_minutes)
            for step in running:
                step.result()
        self.state, self.last, self.records = after, batch, staged.records
        self._keep_state(replayed)
        self._wrote_at = time.monotonic()
        self.progress.wrote(number, staged, ticks, lake, seconds=self._wrote_at - started, replayed=replayed)
        logger.info("batch %d: %d records in %.2f s", number, self.records, self._wrote_at - started)

    def _is_replay(self, batch: Batch) -> bool:
        """Whether silver has the micro-batch. Raises CheckpointError unless it has this one or the one before."""
        newest, location = self.writer.batch(SILVER_TICKS), self.settings.checkpoint_location
        written_by = self.writer.metadata(SILVER_TICKS).get("query")
        if newest >= 0 and written_by not in (None, batch.query):
            raise CheckpointError(
                f"{location} is the checkpoint of query {batch.query}, and query {written_by} wrote micro-batch "
                f"{newest} of {self.settings.lake_root}. {REMEDY}"
            )
        if batch.number not in (newest, newest + 1):
            raise CheckpointError(
                f"the micro-batch after {location} is {batch.number}, and the newest of {self.settings.lake_root} is "
                f"{newest}: the one or the other was brought back from a copy. {REMEDY}"
            )
        return batch.number == newest

    def _check_offsets(self, batch: Batch, staged: Staged) -> None:
        """Raises CheckpointError if a replay does not have the records of the micro-batch's first run."""
        before = self.writer.metadata(SILVER_TICKS).get("offsets")
        if before is not None and before != staged.offsets_to_json():
            raise CheckpointError(
                f"micro-batch {batch.number} of {self.settings.checkpoint_location} has the records "
                f"{staged.offsets_to_json()} (topic, partition, first and last offset), and in "
                f"{self.settings.lake_root} it has {before}: the checkpoint was changed. {REMEDY}"
            )

    def _began(self, number: int) -> datetime:
        """A micro-batch's begin: now, but after the last one's. A replay has the begin of its first run."""
        metadata = self.writer.metadata(BRONZE_TICKS)
        if number == self.writer.batch(BRONZE_TICKS) and "at" in metadata:
            return datetime.fromisoformat(metadata["at"])
        return max(datetime.now(UTC), self.state.began + timedelta(microseconds=1))

    def _plan(self, batch: Batch, replayed: bool) -> Plan:
        settings = self.settings
        tables = (
            (SILVER_TICKS, SILVER_QUARANTINE) if self.rebuilding else (BRONZE_TICKS, SILVER_TICKS, SILVER_QUARANTINE)
        )
        minutes = self.state.seen.minutes
        pairs = {"source": [s for s, _ in minutes], "asset": [a for _, a in minutes], "newest": list(minutes.values())}
        return Plan(
            files=self.writer.files,
            root=settings.lake_root,
            tables=tuple(table for table in tables if batch.number > self.writer.batch(table)),
            at=batch.at,
            rules=tick_rules(settings),
            minutes=pl.DataFrame(pairs, schema={"source": pl.String, "asset": pl.String, "newest": pl.Int64}),
        )

    def _of_replay(self, number: int, plan: Plan) -> list[TickFiles]:
        """The numbers and summaries of the ticks that silver has of a replayed micro-batch."""
        files = self.writer.files_of(SILVER_TICKS, number)
        rows = sum(file.rows for file in files)
        return read_back(self.spark, [file.add for file in files], rows, plan)

    def _delta(self, staged: Staged, ticks: Sequence[TickFiles]) -> Delta:
        minutes: dict[tuple[str, str], int] = {}
        for part in ticks:
            rows = feeding(part.summaries, gold_rules(self.settings)).group_by("source", "asset")
            for source, asset, newest in rows.agg(pl.col("start").max()).rows():
                second = newest // MINUTE * (MINUTE // SECOND)
                minutes[source, asset] = max(minutes.get((source, asset), second), second)
        return self.state.seen.delta([part.numbers for part in ticks], staged.rejected, minutes)

    def _add(self, actions: Sequence[Action], table: Table, batch: Batch, **metadata: Any) -> None:
        with self.progress.time(table.qualified_name):
            self.writer.add(actions, table, query=batch.query, batch=batch.number, **metadata)

    def accept(self, topics: Topics) -> None:
        """Go on by these topics: with the losses in silver.gaps, and with a new checkpoint.

        All tables must have the last micro-batch. If this is interrupted, run a rebuild. Raises Fenced, StoreError.
        """
        self.topics = topics
        written_by = self.writer.metadata(SILVER_TICKS).get("query", "")
        batch = Batch(written_by, self.writer.batch(SILVER_TICKS), datetime.now(UTC))
        self._gaps({}, topics.losses, batch, again=True)
        put_aside(self.writer.files, self.settings.checkpoint_location)
        self.forget_batches()

    def forget_batches(self) -> None:
        """Let a new checkpoint begin after the rows that the tables have."""
        for table in STREAMED:
            self.writer.forget(table, **({"kafka": self.topics.to_json()} if table == BRONZE_TICKS else {}))

    def _gaps(
        self,
        changes: Mapping[tuple[str, str, int], InstrumentChange],
        reports: Sequence[Gap],
        batch: Batch,
        *,
        again: bool = False,
    ) -> None:
        """Update silver.gaps by the ids seen and the ingester's reports."""
        rows = self.unfilled.changes(changes, reports, batch.at)
        if not rows:
            return
        changed = pl.DataFrame([asdict(gap) for gap in rows], schema=self.gap_rows.empty().schema)

        def change(_: pl.DataFrame) -> Changes:
            return changed, None

        # A report may move a row to another time, and so to another span.
        before = self.gap_rows.rows_of(self._gap_files(changed)).join(changed, on="gap_id", how="semi")
        self.gap_rows.update(batch, self.gap_rows.spans_of(pl.concat([before, changed])), change, again=again)
        self.gap_rows.forget_unused()
        self.unfilled.accept(rows)

    def _gap_files(self, changed: pl.DataFrame) -> list[DataFile]:
        """The files of silver.gaps that may have rows of these ids."""
        ids = sorted(changed["gap_id"])
        first, last = ids[0], ids[-1]

        def may_have(file: DataFile) -> bool:
            ends = file.lowest.get("gap_id"), file.highest.get("gap_id")
            return None in ends or bool(ends[0] <= last and ends[1] >= first)

        return [file for file in self.writer.live(SILVER_GAPS).all() if may_have(file)]

    def _keep_state(self, replayed: bool) -> None:
        version = self.writer.version(SILVER_TICKS)
        if not replayed and version >= self._snapshot + state.SNAPSHOT_EVERY:
            self._snapshot = version
            self.writer.in_background(partial(state.keep, self.writer, self.state, version))

    # --- the longer windows, beside the stream

    def start(self) -> None:
        """Start the threads that write the longer windows and keep the lake healthy, beside the stream."""
        if self.settings.upkeep:
            self.writer.deletes_data = True
            self.upkeep = Upkeep(self, self.settings)
            self.upkeep.start()
        self._roller = threading.Thread(target=self._roll_up_when_due, name="roll-up", daemon=True)
        self._roller.start()

    def _roll_up_when_due(self) -> None:
        while not self._ended.wait(0.5):
            now = time.monotonic()
            long_ago = now - self._rolled_up_at >= ROLL_UP_SECONDS
            quiet = self.last is not None and self.idle.is_set() and now - self._wrote_at >= QUIET_SECONDS
            if self.rollup.pending and (long_ago or quiet):
                try:
                    self.roll_up()
                except Fenced as error:
                    self.fenced = error
                    return
                except OSError:
                    logger.exception("the longer windows are not written; they are tried again")
                self._rolled_up_at = time.monotonic()

    def roll_up(self) -> None:
        """Write the longer windows that are out of date. Raises Fenced, StoreError."""
        with self._rolling:
            with self._writing:
                batch = self.last or self._last_written()
                due = self.rollup.due(batch) if batch else None
            if due:
                try:
                    self.rollup.write(due)
                except BaseException:
                    with self._writing:
                        self.rollup.retry(due)
                    raise

    def _last_written(self) -> Batch | None:
        """The previous writer's last micro-batch, if all tables have it: then Spark's checkpoint has committed it."""
        metadata, number = self.writer.metadata(SILVER_TICKS), self.writer.batch(SILVER_TICKS)
        if "query" not in metadata or not self.writer.files.exists(
            f"{self.settings.checkpoint_location}/commits/{number}"
        ):
            return None
        return Batch(metadata["query"], number, self.state.began)

    def finish(self) -> None:
        """After the last micro-batch: the longer windows as of now."""
        self._ended.set()
        if self.upkeep:
            self.upkeep.stop()
        if self._roller:
            self._roller.join()
        if not self.fenced:
            self.roll_up()
        if self.last and not self.fenced:
            state.keep(self.writer, self.state, self.writer.version(SILVER_TICKS))


def opened(settings: Settings) -> LakeWriter:
    """Create absent tables, and return the lake's writer, before its claim. Raises OtherVersion."""
    files = files_of(settings.lake_root, str(settings.webhdfs_url))
    # A rebuild makes silver and gold by the current rules, so only bronze must have this version.
    check_version(files, settings.lake_root, BRONZE_TICKS if settings.rebuild else SILVER_TICKS)

    def create(table: Table) -> None:
        properties = horizon(timedelta(minutes=settings.history_minutes)) if table.kind == "streamed" else {}
        if table == SILVER_TICKS:
            properties[PROPERTY] = deciding(settings)
        create_table(files, table, settings.lake_root, properties)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(create, TABLES))
    return LakeWriter(files, settings.lake_root, STREAMED)


def resume(spark: SparkSession, settings: Settings, sink: Sink | None = None) -> Lakehouse:
    """Open the lake for writing, create absent tables, and restore the state after the last micro-batch.

    Raises CheckpointError if a query with another checkpoint wrote the tables, SettingsChanged if other settings (of
    those that decide their content) made them, OtherVersion if another version of the suite did.
    """
    lake = opened(settings)
    # Before the claim, which would end a running writer of the right checkpoint.
    check_origin(lake, settings)
    lake.claim()
    # Until the claim another first start may have written.
    check_origin(lake, settings)
    return lakehouse(spark, settings, lake, sink)


def check_origin(lake: LakeWriter, settings: Settings) -> None:
    """Raises SettingsChanged or CheckpointError if other settings or another checkpoint made the tables."""
    made_by = lake.property(SILVER_TICKS, PROPERTY)
    if made_by and (others := differences(made_by, settings)):
        raise SettingsChanged(
            f"the tables in {settings.lake_root} were made by other settings ({'; '.join(others)}): give those back, "
            "or let --rebuild make silver and gold anew from bronze, or use another lake_root."
        )
    written_by = {str(query) for table in STREAMED if (query := lake.metadata(table).get("query"))}
    query = checkpoint_query(lake.files, settings.checkpoint_location)
    if written_by and written_by != {query}:
        raise CheckpointError(
            f"the tables in {settings.lake_root} were written from another checkpoint than "
            f"{settings.checkpoint_location}: going on would write records twice. {REMEDY}"
        )


def lakehouse(spark: SparkSession, settings: Settings, lake: LakeWriter, sink: Sink | None = None) -> Lakehouse:
    """Restore the state of a claimed lake after the last micro-batch. Raises StateLost."""
    restored = state.restore(lake)
    gold = Gold(lake, gold_rules(settings), restored.seen.minutes, sink)
    gaps = Slices(lake, SILVER_GAPS)
    unfilled = [
        Gap(**row) for row in gaps.rows_of(lake.live(SILVER_GAPS).all()).to_dicts() if row["status"] != "filled"
    ]
    return Lakehouse(
        *(spark, settings, lake, gold, RollUp(lake, gold.minutes, sink), gaps),
        unfilled=UnfilledGaps(unfilled),
        state=restored,
        topics=Topics.from_json(lake.metadata(BRONZE_TICKS).get("kafka", {})),
    )
