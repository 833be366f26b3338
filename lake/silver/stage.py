"""Stage a micro-batch: executors read its records from Kafka and write data files that no table contains yet.

One pass over the records, in columns, makes bronze's file, silver's file of the valid ticks, quarantine's file of the
other records, the runs of trade ids (lake.silver.deduplicate) and a summary of each five seconds of each instrument
(lake.gold.summary). The driver gets only the runs, the summaries and the files' names, and decides which files to
commit. Files of a failed task belong to no table; upkeep removes them.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession

from lake.contract import RECORD, UNREADABLE, TickRules
from lake.delta.files import Files, LocalDisk, StoreError, StoreUnavailable
from lake.delta.log import Action
from lake.delta.parquet import arrow_schema, as_stored, encoded_file
from lake.gold.summary import of_ticks
from lake.silver.deduplicate import Numbers, Repeats, distinct, numbers, without
from lake.silver.gaps import Gap
from lake.silver.judge import InstrumentId
from lake.silver.read import Contents, read, unreadable, with_notional
from lake.tables import BRONZE_TICKS, SILVER_QUARANTINE, SILVER_TICKS, Table
from lake.times import EPOCH, MINUTE, SECOND, to_micros

logger = logging.getLogger(__name__)

# Records per task. Several tasks per Kafka partition keep all cores busy until the end.
RECORDS_A_TASK = 100_000
# A task starts a new file at so many records or bytes, which bounds its memory.
RECORDS_A_FILE = 200_000
BYTES_A_FILE = 128 << 20
# Records are read in chunks of this size: faster than few at a time.
RECORDS_A_LOOK = 10_000
BYTES_A_LOOK = 16 << 20
# Up to so many rows the driver reads files again itself: faster than a Spark job.
FEW = 20_000
# A time of Kafka's before or after these is stored as the first or the last of them; microseconds since 1970.
KAFKA_TIMES = (to_micros(datetime(1900, 1, 1, tzinfo=UTC)), to_micros(datetime(9999, 12, 31, tzinfo=UTC)))
_TIMES = ("event_time", "received_at")
# What may be raised because of what a record contains. Polars' own is no Exception.
RECORD_ERRORS = (Exception, pl.exceptions.PanicException)
# So many unreadable records of a micro-batch are in the log, and all in quarantine.
LOGGED = 20


@dataclass(frozen=True)
class Plan:
    """What executors need to stage a micro-batch's records."""

    files: Files
    root: str
    # Of bronze.ticks, silver.ticks and silver.quarantine, the tables that lack the micro-batch.
    tables: tuple[Table, ...]
    # When the micro-batch began.
    at: datetime
    rules: TickRules
    # source, asset, newest: the newest minute in gold, in seconds since 1970.
    minutes: pl.DataFrame


@dataclass(frozen=True)
class TickFiles:
    """The distinct ticks of one part of the records: one file per date, and the ticks' numbers and summaries.

    actions: the files' `add` actions; empty if silver has the files. summaries: source, symbol, asset,
    quote, start, and the columns of lake.gold.summary.of_ticks.
    """

    actions: list[Action]
    numbers: Numbers
    summaries: pl.DataFrame


@dataclass
class Staged:
    """The result of staging: files by table name, ticks separately, rejected trades and gap reports."""

    records: int = 0
    files: dict[str, list[Action]] = field(default_factory=dict)
    ticks: list[TickFiles] = field(default_factory=list)
    # The trades that records in quarantine name.
    rejected: list[InstrumentId] = field(default_factory=list)
    # By partition and offset.
    reports: list[Gap] = field(default_factory=list)
    # By topic and partition: the first and the last offset.
    offsets: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    # The records that could not be read, in words.
    unreadable: list[str] = field(default_factory=list)

    def add(self, other: Staged) -> None:
        """Add the result of other records."""
        self.records += other.records
        for name, files in other.files.items():
            self.files[name] = self.files.get(name, []) + files
        self.ticks += other.ticks
        self.rejected += other.rejected
        self.reports += other.reports
        self.unreadable += other.unreadable
        for place, (first, last) in other.offsets.items():
            lowest, highest = self.offsets.get(place, (first, last))
            self.offsets[place] = (min(first, lowest), max(last, highest))

    def offsets_to_json(self) -> list[list[str | int]]:
        """topic, partition, first and last offset, sorted."""
        return [[*place, *ends] for place, ends in sorted(self.offsets.items())]

    def of(self, table: Table) -> list[Action]:
        """The files of a table."""
        if table == SILVER_TICKS:
            return [action for part in self.ticks for action in part.actions]
        return self.files.get(table.qualified_name, [])


def stage(records: DataFrame, plan: Plan) -> Staged:
    """Stage records (lake.contract.RECORD, and ingested_at where bronze has them) on the executors: one Spark job."""

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return stage_part(batches, plan)

    staged = Staged()
    for row in records.mapInArrow(task, "staged BINARY").collect():
        of_task = pickle.loads(row["staged"])
        if isinstance(of_task, StoreError):
            raise of_task
        staged.add(of_task)
    for text in staged.unreadable[:LOGGED]:
        logger.error("%s; it is in %s with rule %s", text, SILVER_QUARANTINE.qualified_name, UNREADABLE)
    return staged


def stage_part(batches: Iterable[pa.RecordBatch], plan: Plan) -> Iterator[pa.RecordBatch]:
    """One task: reads its records, and yields one pickled Staged, or the StoreError for which a retry is useless."""
    # The other cores run other tasks.
    pa.set_cpu_count(1)
    try:
        result: Staged | StoreError = _staged(batches, plan)
    except StoreError as error:
        # Spark would run a failed task again.
        if isinstance(error, StoreUnavailable):
            raise
        result = error
    yield pa.record_batch({"staged": pa.array([pickle.dumps(result)], pa.binary())})


def _staged(batches: Iterable[pa.RecordBatch], plan: Plan) -> Staged:
    staged, waiting = Staged(), _Part(plan)
    with ThreadPoolExecutor(2) as threads:
        for records in _joined(batches):
            try:
                waiting.add(records)
            except RECORD_ERRORS as error:
                staged.add(_in_halves(records, plan, threads, error))
            if waiting.records >= RECORDS_A_FILE or waiting.bytes >= BYTES_A_FILE:
                staged.add(_written(waiting, plan, threads))
                waiting = _Part(plan)
        if waiting.records:
            staged.add(_written(waiting, plan, threads))
    return staged


def _written(part: _Part, plan: Plan, threads: ThreadPoolExecutor) -> Staged:
    try:
        return part.write_files(threads)
    except RECORD_ERRORS as error:
        return _in_halves(part.all_records(), plan, threads, error)


def _in_halves(records: pa.Table, plan: Plan, threads: ThreadPoolExecutor, error: BaseException) -> Staged:
    """Stage records whose staging fails, half by half, so that only the record that fails alone is not read."""
    if isinstance(error, OSError | MemoryError):
        raise error
    if records.num_rows == 1:
        _require_that_a_tick_can_be_staged(plan, threads)
        part = _Part(plan)
        part.add_unreadable(records, error)
        return part.write_files(threads)
    staged, half = Staged(), records.num_rows // 2
    for rows in (records.slice(0, half), records.slice(half)):
        part = _Part(plan)
        try:
            part.add(rows)
            staged.add(part.write_files(threads))
        except RECORD_ERRORS as again:
            staged.add(_in_halves(rows, plan, threads, again))
    return staged


def _require_that_a_tick_can_be_staged(plan: Plan, threads: ThreadPoolExecutor) -> None:
    """Raises if staging fails whatever the record: then no record is to blame."""
    tick = b'{"timestamp":"1970-01-01T00:00:00Z","asset":"a","price_usd":"1"}'
    row = {"key": None, "value": tick, "topic": plan.rules.rejects_topic + plan.rules.gaps_topic}
    schema = pa.schema([field for field in arrow_schema(BRONZE_TICKS) if field.name in RECORD])
    places = {"partition": 0, "offset": 0, "kafka_timestamp": EPOCH}
    part = _Part(replace(plan, files=_Nowhere()))
    part.add(pa.Table.from_pylist([{**row, **places}], schema))
    part.write_files(threads)


class _Nowhere(LocalDisk):
    """Keeps nothing that is written."""

    def write(self, url: str, content: bytes) -> None:
        pass


def _joined(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The batches joined into chunks; chunks have records."""
    joined: list[pa.RecordBatch] = []
    for batch in batches:
        joined.append(batch)
        if sum(b.num_rows for b in joined) >= RECORDS_A_LOOK or sum(b.nbytes for b in joined) >= BYTES_A_LOOK:
            yield pa.Table.from_batches(joined)
            joined = []
    if any(batch.num_rows for batch in joined):
        yield pa.Table.from_batches(joined)


class _Part:
    """Records that have been read but not written."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._records: list[pa.Table] = []
        self._ticks: list[pa.Table] = []
        self._quarantined: list[pa.Table] = []
        self._staged = Staged()
        self.records = self.bytes = 0

    def add(self, records: pa.Table) -> None:
        records = self._with_ingested_at(records)
        self._add(records, read(records, self._plan.rules))

    def add_unreadable(self, record: pa.Table, error: BaseException) -> None:
        """Add one record as one that cannot be read."""
        contents = unreadable(record, f"{type(error).__name__}: {error}")
        [row] = contents.quarantined.to_pylist()
        text = f"{row['topic']}:{row['partition']}:{row['offset']} cannot be read: {row['reason']}"
        self._staged.unreadable.append(text)
        self._add(self._with_ingested_at(record), contents)

    def _with_ingested_at(self, records: pa.Table) -> pa.Table:
        if "ingested_at" in records.column_names:
            return records
        at = pa.scalar(self._plan.at, pa.timestamp("us", "UTC"))
        return records.append_column("ingested_at", pa.repeat(at, records.num_rows))

    def all_records(self) -> pa.Table:
        return pa.concat_tables(self._records)

    def _add(self, records: pa.Table, contents: Contents) -> None:
        self._records.append(records)
        self._ticks.append(contents.ticks)
        self._quarantined.append(contents.quarantined)
        self._staged.rejected += contents.rejected_ids
        self._staged.reports += contents.reports
        ends = records.group_by(["topic", "partition"]).aggregate([("offset", "min"), ("offset", "max")])
        for topic, partition, first, last in zip(*(column.to_pylist() for column in ends.columns), strict=True):
            self._staged.add(Staged(offsets={(topic, partition): (first, last)}))
        self.records += records.num_rows
        self.bytes += records.nbytes

    def write_files(self, threads: ThreadPoolExecutor) -> Staged:
        plan, staged = self._plan, self._staged
        staged.records = self.records
        # In parallel with the ticks below.
        bronze = threads.submit(self._write, BRONZE_TICKS, lambda: _bronze(self.all_records()))
        quarantine = threads.submit(self._write, SILVER_QUARANTINE, self._quarantine)
        ticks = distinct(columns(pa.concat_tables(self._ticks)))
        staged.ticks = [_tick_files(with_is_late(ticks, plan.minutes), plan)] if ticks.height else []
        staged.files = {**bronze.result(), **quarantine.result()}
        return staged

    def _quarantine(self) -> pa.Table:
        records = pa.concat_tables(self._quarantined)
        at = pa.scalar(self._plan.at, pa.timestamp("us", "UTC"))
        return records.append_column("quarantined_at", pa.repeat(at, records.num_rows))

    def _write(self, table: Table, rows: Callable[[], pa.Table]) -> dict[str, list[Action]]:
        """Write these rows as a file, if the table lacks the micro-batch."""
        if table not in self._plan.tables or not (part := rows()).num_rows:
            return {}
        return {table.qualified_name: [_write_file(table, part, self._plan)]}


def columns(ticks: pa.Table) -> pl.DataFrame:
    """Rows of silver.ticks as Polars columns, with notional; times as Int64 in microseconds since 1970."""
    rows = pl.from_arrow(ticks if "notional" in ticks.column_names else with_notional(ticks))
    assert isinstance(rows, pl.DataFrame)
    return rows.with_columns(pl.col(_TIMES).cast(pl.Int64))


def with_is_late(ticks: pl.DataFrame, minutes: pl.DataFrame) -> pl.DataFrame:
    """Add is_late: whether gold had a later minute of the tick's source and asset before the tick came."""
    gold_time = pl.when("is_future").then("received_at").otherwise("event_time")
    is_late = gold_time // MINUTE * (MINUTE // SECOND) < pl.col("newest")
    joined = ticks.join(minutes, on=["source", "asset"], how="left", maintain_order="left")
    return joined.with_columns(is_late.fill_null(False).alias("is_late")).drop("newest")


def _tick_files(ticks: pl.DataFrame, plan: Plan) -> TickFiles:
    """Write distinct ticks as files of silver.ticks, unless it has the micro-batch."""
    actions: list[Action] = []
    if SILVER_TICKS in plan.tables:
        rows = ticks.with_columns(pl.col(_TIMES).cast(pl.Datetime("us", "UTC"))).drop("notional")
        actions = [_write_file(SILVER_TICKS, part.to_arrow(), plan) for part in rows.partition_by("event_date")]
    return TickFiles(actions, numbers(ticks), of_ticks(ticks, "source", "symbol", "asset", "quote"))


def _write_file(table: Table, rows: pa.Table, plan: Plan) -> Action:
    file = encoded_file(table, as_stored(table, rows))
    plan.files.write(f"{table.path(plan.root)}/{file.name}", file.content)
    return file.action


def _bronze(records: pa.Table) -> pa.Table:
    # Kafka takes times of any year; Spark and Python read only these.
    times = records["kafka_timestamp"].cast(pa.int64())
    times = pc.min_element_wise(pc.max_element_wise(times, KAFKA_TIMES[0]), KAFKA_TIMES[1] - 1)
    index = records.schema.get_field_index("kafka_timestamp")
    records = records.set_column(index, "kafka_timestamp", times.cast(pa.timestamp("us", "UTC")))
    date = records["ingested_at"].cast(pa.date32())
    return records.append_column("ingest_date", date).select(list(BRONZE_TICKS.column_names))


def without_repeats(
    spark: SparkSession, parts: Sequence[TickFiles], repeats: dict[int, Repeats], plan: Plan
) -> list[TickFiles]:
    """The parts without their repeats (by number of the part). New files replace those of changed parts."""
    changed = [(parts[number].actions, repeats[number]) for number in repeats]
    rows = sum(int(parts[number].summaries["tick_count"].sum()) for number in repeats)
    new_parts = _read_all(spark, changed, plan, rows)
    for actions, _ in changed:
        for action in actions:
            plan.files.delete(_url(action, plan))
    return [*(part for number, part in enumerate(parts) if number not in repeats), *new_parts]


def read_back(spark: SparkSession, actions: Sequence[Action], rows: int, plan: Plan) -> list[TickFiles]:
    """The numbers and summaries of files that silver.ticks has already. rows: their number of rows."""
    return _read_all(spark, [([action], None) for action in actions], plan, rows)


_Reading = tuple[list[Action], Repeats | None]
"""Files of silver.ticks to read again, and the repeats to leave out of new files; None: write no files."""


def _read_all(spark: SparkSession, readings: Sequence[_Reading], plan: Plan, rows: int) -> list[TickFiles]:
    if rows <= FEW:
        parts = [_read_again(reading, plan) for reading in readings]
    else:
        tasks = spark.sparkContext.parallelize(list(readings), len(readings))
        parts = [pickle.loads(part) for part in tasks.map(lambda task: pickle.dumps(_read_again(task, plan))).collect()]
    return [part for part in parts if part]


def _read_again(reading: _Reading, plan: Plan) -> TickFiles | None:
    """The files' ticks without the repeats; None if no tick is left."""
    actions, repeats = reading
    ticks = pl.concat([_read(action, plan) for action in actions])
    if repeats is None:
        return TickFiles([], numbers(ticks), of_ticks(ticks, "source", "symbol", "asset", "quote"))
    left = without(ticks, repeats)
    return _tick_files(left, plan) if left.height else None


def _read(action: Action, plan: Plan) -> pl.DataFrame:
    rows = pq.ParquetFile(io.BytesIO(plan.files.read(_url(action, plan)))).read()
    dates = (pl.lit(date.fromisoformat(value)).alias(name) for name, value in action["partitionValues"].items())
    return columns(rows).with_columns(dates)


def _url(action: Action, plan: Plan) -> str:
    return f"{SILVER_TICKS.path(plan.root)}/{unquote(action['path'])}"
