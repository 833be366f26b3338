"""A micro-batch's records into data files that no table has yet, by the executors that read them from Kafka.

One pass of Arrow over the records makes bronze's file, silver's file of the ticks that are in the ingester's form, a
file of the other records, and an `Overview` of the ticks. Only that and the files' names come back to the driver,
which decides whether the files become part of their tables. Files of a task that died belong to no table; VACUUM
removes them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame

from lake.canonical import canonical
from lake.overview import Overview, overview
from lake.parquet import as_stored, encoded, encoded_file
from lake.store import Store
from lake.summaries import Pair
from lake.tables import BRONZE_TICKS, SILVER_QUARANTINE, SILVER_TICKS, Table

# So many records of a Kafka partition are a task's: more of them keep all cores busy until the end.
RECORDS_A_TASK = 100_000
# A file has hardly more records, or bytes of them, whatever a task is given: so much memory it takes.
RECORDS_A_FILE = 200_000
BYTES_A_FILE = 128 << 20
# So many records are looked at together, which is quicker than a few at a time.
RECORDS_A_LOOK = 10_000
BYTES_A_LOOK = 16 << 20


@dataclass(frozen=True)
class Plan:
    """What executors must know to stage a micro-batch's records."""

    store: Store
    root: str
    # Those of bronze.ticks and silver.ticks that lack the micro-batch.
    tables: tuple[Table, ...]
    # When the micro-batch began.
    at: datetime
    # Whose records are no ticks.
    other_topics: tuple[str, ...]
    future_tolerance_seconds: float
    # Of a source and asset the newest minute that gold has, in seconds since 1970.
    newest_minutes: Mapping[Pair, int]


@dataclass
class Staged:
    """What became of records.

    files: by the table's name, what Delta's log would say of each. odd: files of the records that are not ticks in
    the ingester's form, with the columns of lake.ticks.RECORD.
    """

    records: int = 0
    files: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    overview: Overview = field(default_factory=Overview)

    def add(self, other: Staged) -> None:
        """Have what became of other records too."""
        self.records += other.records
        for name, files in other.files.items():
            self.files[name] = self.files.get(name, []) + files
        self.odd += other.odd
        self.overview.add(other.overview)

    def of(self, table: Table) -> list[dict[str, Any]]:
        """The files of a table."""
        return self.files.get(table.qualified_name, [])

    def urls(self, table: Table, root: str) -> list[str]:
        """Where the files of a table are."""
        return [f"{table.path(root)}/{action['path']}" for action in self.of(table)]


def stage(records: DataFrame, plan: Plan) -> Staged:
    """Stage records (lake.ticks.RECORD) on the executors; runs a Spark job."""

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return stage_part(batches, plan)

    staged = Staged()
    for row in records.mapInArrow(task, "staged BINARY").collect():
        staged.add(pickle.loads(row["staged"]))
    return staged


def stage_part(batches: Iterable[pa.RecordBatch], plan: Plan) -> Iterator[pa.RecordBatch]:
    """What one task does: its records in, one pickled Staged out."""
    # The other cores have tasks of their own.
    pa.set_cpu_count(1)
    staged, waiting = Staged(), _Parts(plan)
    with ThreadPoolExecutor(2) as threads:
        for records in _joined(batches):
            waiting.add(records)
            if waiting.records >= RECORDS_A_FILE or waiting.bytes >= BYTES_A_FILE:
                staged.add(waiting.written(threads))
                waiting = _Parts(plan)
        if waiting.records:
            staged.add(waiting.written(threads))
    yield pa.record_batch({"staged": pa.array([pickle.dumps(staged)], pa.binary())})


def _joined(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Some batches at a time, none without records."""
    joined: list[pa.RecordBatch] = []
    for batch in batches:
        joined.append(batch)
        if sum(b.num_rows for b in joined) >= RECORDS_A_LOOK or sum(b.nbytes for b in joined) >= BYTES_A_LOOK:
            yield pa.Table.from_batches(joined)
            joined = []
    if any(batch.num_rows for batch in joined):
        yield pa.Table.from_batches(joined)


class _Parts:
    """Records that are read, and not written yet."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._records: list[pa.Table] = []
        self._ticks: list[pa.Table] = []
        self._odd: list[pa.Table] = []
        self.records = self.bytes = 0

    def add(self, records: pa.Table) -> None:
        parsed = canonical(records, self._plan.other_topics, self._plan.future_tolerance_seconds)
        self._records.append(records)
        self._ticks.append(parsed.ticks)
        self._odd.append(parsed.odd)
        self.records += records.num_rows
        self.bytes += records.nbytes

    def written(self, threads: ThreadPoolExecutor) -> Staged:
        plan, staged = self._plan, Staged(self.records)
        # Beside what follows.
        bronze = threads.submit(self._write, BRONZE_TICKS, lambda: [_bronze(pa.concat_tables(self._records), plan.at)])
        ticks = pa.concat_tables(self._ticks)
        staged.overview, is_late = overview(ticks, plan.newest_minutes)
        silver = self._write(SILVER_TICKS, lambda: _by_date(ticks.append_column("is_late", is_late)))
        odd = pa.concat_tables(self._odd)
        if odd.num_rows:
            # There VACUUM looks, should the driver die before it has read them.
            staged.odd.append(f"{SILVER_QUARANTINE.path(plan.root)}/odd-{uuid4()}.parquet")
            plan.store.write(staged.odd[0], encoded(odd))
        staged.files = {**bronze.result(), **silver}
        return staged

    def _write(self, table: Table, rows: Callable[[], Sequence[pa.Table]]) -> dict[str, list[dict[str, Any]]]:
        """Write each of the parts that `rows` gives as a file of the table, if that lacks the micro-batch."""
        if table not in self._plan.tables:
            return {}
        files = [encoded_file(table, as_stored(table, part)) for part in rows() if part.num_rows]
        for file in files:
            self._plan.store.write(f"{table.path(self._plan.root)}/{file.name}", file.content)
        return {table.qualified_name: [file.action for file in files]}


def _bronze(records: pa.Table, at: datetime) -> pa.Table:
    always = {"ingested_at": pa.scalar(at, pa.timestamp("us", "UTC")), "ingest_date": pa.scalar(at.date(), pa.date32())}
    for name, value in always.items():
        records = records.append_column(name, pa.repeat(value, records.num_rows))
    return records


def _by_date(ticks: pa.Table) -> Sequence[pa.Table]:
    dates = pc.unique(ticks["event_date"])
    if len(dates) == 1:
        return [ticks]
    return [ticks.filter(pc.equal(ticks["event_date"], date)) for date in dates]
