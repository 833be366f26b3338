"""The one way in which Delta tables are created and written by the stream: exactly once, by one writer at a time.

- **Replays.** Each commit carries in its metadata the query and the micro-batch that it is of. A micro-batch writes a
  table at most once, so a table whose newest such commit is of this micro-batch, or a later one, has it already: the
  write is dropped. Only the first micro-batch after a start can be a replay, so the log is read once, at the start.
- **One writer.** Who claims a lake commits an epoch, one above the last, to every table. A writer commits the version
  after the last one that it knows; where another one has that already, it looks at it, and ends with Fenced if it is
  of a newer epoch. A driver that was paused and woken, wherever it was, writes nothing, whatever its checkpoint.
- **Maintenance** (OPTIMIZE, VACUUM, a repair) may commit too: rows that are appended follow it, and files that were to
  be replaced are looked up again.
- **Replacing.** A table whose rows change has them in files of one span of time each. What is changed is read, and
  replaced, by spans; no other files are touched.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from deltalake.exceptions import DeltaError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import StructField, StructType

from lake.commits import Action, DataFile, TableLog, added_by, metadata_of, redefines, removed_by
from lake.parquet import arrow_table, encoded_file, stored
from lake.summaries import to_micros
from lake.tables import Table

APPLICATION = "tickhouse.writer"
# Delta would write a checkpoint of the log in every tenth commit, which takes longer than a micro-batch: it is written
# beside the stream instead, and less often.
CHECKPOINT_EVERY = 100
# A day of the log is kept: nobody travels back further, and it is a hundred thousand files a table.
PROPERTIES = {
    "delta.checkpointInterval": "1000000000",
    "delta.logRetentionDuration": "interval 1 day",
    "delta.deletedFileRetentionDuration": "interval 1 day",
}


logger = logging.getLogger(__name__)


class Fenced(RuntimeError):
    """Another writer has taken over the lake since this one opened it."""


class Changed(RuntimeError):
    """Maintenance has changed the files of a table since its rows were read: read them again."""


def create_table(spark: SparkSession, table: Table, root: str, properties: Mapping[str, str] | None = None) -> None:
    """Create the table under root if it is absent, with its comments, partitions and properties."""
    log = TableLog(spark, table.path(root))
    if log.newest() >= 0:
        return
    told = {**table.properties, **(properties or {}), "tickhouse.key": ",".join(table.key)}
    if table.statistics:
        told["delta.dataSkippingStatsColumns"] = ",".join(table.statistics)
    log.create(table.comment, _schema(table), table.partitioned_by, told)


def _schema(table: Table) -> StructType:
    parsed = StructType.fromDDL(table.schema)
    assert isinstance(parsed, StructType)
    types = zip(table.columns, parsed, strict=True)
    return StructType([StructField(c.name, p.dataType, c.nullable, {"comment": c.comment}) for c, p in types])


def append(rows: DataFrame, table: Table, root: str) -> None:
    """Append rows to a table that the stream does not write."""
    rows.select(*table.column_names).write.format("delta").mode("append").save(table.path(root))


@dataclass
class _Written:
    """What a writer knows of a table: its log, its newest version, its last micro-batch, and its data files."""

    log: TableLog
    version: int = -1
    batch: int = -1
    # Of the newest commit with a micro-batch: what its writer kept there.
    metadata: dict[str, Any] = field(default_factory=dict)
    # By the spans that they are of; None: to be asked for.
    files: dict[int, list[DataFile]] | None = None


class LakeWriter:
    """The writer of the lake at root, whose tables exist. It may write once it has claimed it."""

    def __init__(self, spark: SparkSession, root: str, tables: Iterable[Table]) -> None:
        self.root = root
        self.epoch = 0
        self._tables = {table.qualified_name: _Written(TableLog(spark, table.path(root))) for table in tables}
        self._look()
        # One thing at a time, and never more than a few in wait: a table asks every hundredth commit.
        self._upkeep = ThreadPoolExecutor(1, "upkeep")

    def close(self) -> None:
        """Wait until what goes on in the background is done."""
        self._upkeep.shutdown()

    def _look(self) -> None:
        def look(written: _Written) -> None:
            written.version = written.log.newest()
            written.metadata = self._newest(written.log, written.version)
            written.batch = written.metadata.get("batch", -1)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(look, self._tables.values()))

    def claim(self) -> None:
        """Fence every earlier writer, and see what the last one left.

        Raises Fenced if another one claims it too, and CannotWrite.
        """
        logs = [written.log for written in self._tables.values()]
        newest = [log.newest() for log in logs]
        # Of all tables, before one is claimed.
        with ThreadPoolExecutor(4) as threads:
            self.epoch = 1 + max(threads.map(_last_epoch, logs, newest))
        for log, seen in zip(logs, newest, strict=True):
            version = seen + 1
            # With what was kept there last, which is then never further back than the log goes.
            while not log.put(version, self._claim_of(log, version), application=(APPLICATION, self.epoch)):
                # The last commits of the writer before, or another one that claims the lake.
                actions = log.actions(version)
                epoch = metadata_of(actions).get("epoch", 0)
                if epoch >= self.epoch:
                    raise Fenced(f"{log.path} has been taken over by another writer (epoch {epoch})")
                log.check_writable(actions)
                version += 1
        self._look()

    def _claim_of(self, log: TableLog, version: int) -> dict[str, Any]:
        return {**self._newest(log, version - 1), "epoch": self.epoch}

    @staticmethod
    def _newest(log: TableLog, version: int) -> dict[str, Any]:
        """The metadata of the newest commit of a micro-batch, up to a version; empty if there is none."""
        for number in range(version, -1, -1):
            metadata = log.metadata(number)
            if "batch" in metadata:
                return metadata
        return {}

    def empty(self, table: Table) -> None:
        """Remove all rows, and forget which micro-batches the table had. Raises Fenced."""
        self._catch_up(table)
        written = self._tables[table.qualified_name]
        self._commit(table, [], written.log.files(written.version), {"batch": -1}, as_known=True)
        written.files = {}

    def forget(self, table: Table) -> None:
        """Keep the rows, and what was kept with the last micro-batch, but not which one that was. Raises Fenced."""
        kept = {name: value for name, value in self.metadata(table).items() if name not in ("query", "epoch")}
        self._commit(table, [], [], {**kept, "batch": -1})

    def batch(self, table: Table) -> int:
        """The last micro-batch that the table has; -1 if none."""
        return self._tables[table.qualified_name].batch

    def version(self, table: Table) -> int:
        """The newest version of the table that this writer knows of."""
        return self._tables[table.qualified_name].version

    def property(self, table: Table, name: str) -> str | None:
        """A property of the table."""
        return self._tables[table.qualified_name].log.property(name)

    def metadata(self, table: Table) -> dict[str, Any]:
        """What was kept with the table's last micro-batch, `query` among it; empty if it has none."""
        return self._tables[table.qualified_name].metadata

    def append(self, rows: DataFrame, table: Table, query: str, batch: int, **metadata: Any) -> list[DataFile]:
        """Append the rows of a micro-batch, unless the table has it. The files added. Raises Fenced."""
        if batch <= self.batch(table):
            return []
        added = self._tables[table.qualified_name].log.write(rows.select(*table.column_names))
        self._commit(table, added, [], {"query": query, "batch": batch, **metadata})
        return added

    def add(self, files: Iterable[Action], table: Table, query: str, batch: int, **metadata: Any) -> list[DataFile]:
        """Append a micro-batch's staged files (lake.staging), unless the table has it. The files. Raises Fenced."""
        if batch <= self.batch(table):
            return []
        added = [self._tables[table.qualified_name].log.file(add) for add in files]
        self._commit(table, added, [], {"query": query, "batch": batch, **metadata})
        return added

    def stored(self, spark: SparkSession, table: Table, spans: Iterable[int]) -> tuple[list[int], list[dict[str, Any]]]:
        """(the spans, and those that share files with them; their rows).

        The rows are without the columns that the table is partitioned by. Raises Fenced.
        """
        self._catch_up(table)
        spans = self._widened(table, spans)
        return spans, [row for file in self._files_of(table, spans) for row in stored(spark, file.path).to_pylist()]

    def files(self, table: Table, times: Sequence[str], since: datetime) -> list[DataFile]:
        """The data files of the table, without those in which all of these `times` are before `since`."""
        written = self._tables[table.qualified_name]
        return written.log.files(written.version, times, since)

    def added_since(self, table: Table, version: int) -> list[DataFile]:
        """The data files that the table has got after a version, and perhaps others."""
        written = self._tables[table.qualified_name]
        found: dict[str, DataFile] = {}
        for number in range(version + 1, written.version + 1):
            if not written.log.has(number):
                # The log has been cleaned since.
                return written.log.files(written.version)
            actions = written.log.actions(number)
            for path in removed_by(actions):
                found.pop(path, None)
            found.update({add["path"]: written.log.file(add) for add in added_by(actions)})
        return list(found.values())

    def was_changed(self, table: Table) -> bool:
        """Whether maintenance has changed the table since its rows were read. Raises Fenced."""
        self._catch_up(table)
        return self._tables[table.qualified_name].files is None

    def replace(
        self,
        table: Table,
        spans: Mapping[int, Sequence[tuple[object, ...]]],
        query: str,
        batch: int,
        **metadata: Any,
    ) -> None:
        """Let these be all rows of the spans, unless the table has the micro-batch. Raises Fenced, Changed."""
        written = self._tables[table.qualified_name]
        if batch <= written.batch:
            return
        if written.files is None:
            raise Changed(f"{table.qualified_name} has other files than when its rows were read")
        added = [_file(written.log, table, rows) for rows in spans.values() if rows]
        replaced = self._files_of(table, spans)
        self._commit(table, added, replaced, {"query": query, "batch": batch, **metadata}, as_known=True)
        # From now on these spans have these files.
        for span in spans:
            written.files.pop(span, None)
        self._index(table, added)

    def _index(self, table: Table, files: Iterable[DataFile]) -> None:
        known = self._tables[table.qualified_name].files
        assert known is not None
        for file in files:
            for span in _spans_of(file, table):
                known.setdefault(span, []).append(file)

    def _widened(self, table: Table, spans: Iterable[int]) -> list[int]:
        """These spans and those that share files with them."""
        written = self._tables[table.qualified_name]
        if written.files is None:
            written.files = {}
            self._index(table, written.log.files(written.version))
        wanted = set(spans)
        return sorted(wanted.union(*(_spans_of(file, table) for file in self._files_of(table, wanted))))

    def _files_of(self, table: Table, spans: Iterable[int]) -> list[DataFile]:
        """The files that have rows of these spans, each once."""
        files = self._tables[table.qualified_name].files
        assert files is not None
        return list({file.path: file for span in spans for file in files.get(span, ())}.values())

    def _catch_up(self, table: Table) -> None:
        """See what others have committed since this writer looked last. Raises Fenced, CannotWrite."""
        written = self._tables[table.qualified_name]
        while written.log.has(written.version + 1):
            actions = written.log.actions(written.version + 1)
            epoch = metadata_of(actions).get("epoch", 0)
            if epoch > self.epoch:
                raise Fenced(f"{written.log.path} has been taken over by a newer writer (epoch {epoch})")
            written.log.check_writable(actions)
            # Maintenance, which moves rows to other files.
            written.files = None
            written.version += 1

    def _commit(
        self,
        table: Table,
        added: Sequence[DataFile],
        removed: Sequence[DataFile],
        metadata: dict[str, Any],
        *,
        as_known: bool = False,
    ) -> None:
        """Commit a version of the table. Raises Fenced; and Changed if it is to follow the version that is known, and
        maintenance has made another one."""
        written = self._tables[table.qualified_name]
        metadata = {"epoch": self.epoch, **metadata}
        while not written.log.put(written.version + 1, metadata, added, removed, (APPLICATION, self.epoch)):
            if written.log.metadata(written.version + 1) == json.loads(json.dumps(metadata)):
                # It is this very commit, of which only the answer was lost.
                break
            self._catch_up(table)
            if as_known:
                raise Changed(f"{table.qualified_name} was changed at the same time")
        written.version += 1
        written.batch, written.metadata = metadata["batch"], metadata
        # Not all tables in the same micro-batch.
        turn = list(self._tables).index(table.qualified_name) * (CHECKPOINT_EVERY // len(self._tables))
        if (written.version + turn) % CHECKPOINT_EVERY == 0:
            self._upkeep.submit(self._checkpoint, written.log)

    @staticmethod
    def _checkpoint(log: TableLog) -> None:
        try:
            log.checkpoint()
        except (DeltaError, TimeoutError):
            logger.exception("%s: no checkpoint of the log, until %d commits later", log.path, CHECKPOINT_EVERY)


def _last_epoch(log: TableLog, version: int) -> int:
    """The epoch of the table's newest writer; 0 if it had none.

    Raises CannotWrite if the table asks of its writers what this one does not do. That stands in the commit that
    changed it last; and whoever has committed with an epoch has looked before.
    """
    looked = False
    for number in range(version, -1, -1):
        actions = log.actions(number)
        looked = looked or log.check_writable(actions)
        metadata = metadata_of(actions)
        if "epoch" in metadata:
            return int(metadata["epoch"])
    return 0


def rewrite(
    log: TableLog, table: Table, known: Iterable[str], spans: Mapping[int, Sequence[tuple[object, ...]]]
) -> list[int]:
    """Maintenance beside the stream: let these be all rows of the spans. Returns the spans that could not be written.

    known: the files of the version that the rows were computed for; a span that has others by now is left alone, and
    so is one that shares a file with spans that are not given.
    """
    names = {path.rpartition("/")[2] for path in known}
    version = log.newest()
    removed, left = [], set()
    for file in log.files(version):
        there = _spans_of(file, table)
        if there & spans.keys():
            if file.path.rpartition("/")[2] in names and there <= spans.keys():
                removed.append(file)
            else:
                left |= there & spans.keys()
    removed = [file for file in removed if not _spans_of(file, table) & left]
    added = [_file(log, table, rows) for span, rows in spans.items() if rows and span not in left]
    if not added and not removed:
        return sorted(left)
    while not log.put(version + 1, {"maintenance": "rewrite"}, added, removed):
        version += 1
        actions = log.actions(version)
        gone = removed_by(actions) & {file.add["path"] for file in removed}
        come = any(_spans_of(log.file(add), table) & spans.keys() for add in added_by(actions))
        if gone or come or redefines(actions):
            return sorted(spans)
    return sorted(left)


def _file(log: TableLog, table: Table, rows: Sequence[tuple[object, ...]]) -> DataFile:
    return log.add(encoded_file(table, arrow_table(table, rows)))


def _spans_of(file: DataFile, table: Table) -> set[int]:
    if table.file_span is None:
        return {0}
    told = (values[table.file_time] for values in (file.lowest, file.highest))
    first, last = (table.span(to_micros(datetime.fromisoformat(text))) for text in told)
    return set(range(first, last + 1))
