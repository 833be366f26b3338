"""The one way in which Delta tables are created and written by the stream: exactly once, by one writer at a time.

- **Replays.** Each commit carries in its metadata the query and the micro-batch that it is of. A micro-batch writes a
  table at most once, so a table whose newest such commit is of this micro-batch, or a later one, has it already: the
  write is dropped. Only the first micro-batch after a start can be a replay, so the log is read once, at the start.
- **One writer.** Who claims a lake commits an epoch, one above the last, to every table. A writer commits the version
  after the last one that it knows; where another one has that already, it looks at it, and ends with Fenced if it is
  of a newer epoch. A driver that was paused and woken, wherever it was, writes nothing, whatever its checkpoint.
- **Maintenance** (OPTIMIZE, VACUUM, a repair) may commit too: appended files follow it, and a replacement of files
  that it has removed raises Changed, so that it is computed again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from lake.delta.files import Files
from lake.delta.live import LiveFiles
from lake.delta.log import Action, CannotWrite, DataFile, TableLog, added_by, metadata_of, removed_by
from lake.delta.parquet import delta_schema, encoded_file
from lake.delta.version import PROPERTY as VERSION_PROPERTY
from lake.tables import VERSION, Table

logger = logging.getLogger(__name__)

APPLICATION = "tickhouse.writer"
# A start reads the commits after the last checkpoint of the log, some 3 ms each. It is written beside the stream.
CHECKPOINT_EVERY = 50
# A day of the log is kept: nobody travels back further, and it is a hundred thousand files a table.
PROPERTIES = {
    "delta.checkpointInterval": "1000000000",
    "delta.logRetentionDuration": "interval 1 day",
    "delta.deletedFileRetentionDuration": "interval 1 day",
}
THREADS = 8


class Fenced(RuntimeError):
    """Another writer has taken over the lake since this one opened it."""


class Changed(RuntimeError):
    """Maintenance has replaced files of a table since its rows were read: compute the change again."""


def create_table(files: Files, table: Table, root: str, properties: Mapping[str, str] | None = None) -> None:
    """Create the table under root if it is absent, with its comments, partitions and properties."""
    log = TableLog(files, table.path(root))
    if log.newest() >= 0:
        return
    log.create(
        table.comment, delta_schema(table), table.partitioned_by, {**table_properties(table), **(properties or {})}
    )


def table_properties(table: Table) -> dict[str, str]:
    """The properties that a table of the lake has, whoever creates it."""
    properties = {**table.properties, "tickhouse.key": ",".join(table.key), VERSION_PROPERTY: str(VERSION)}
    if table.statistics:
        properties["delta.dataSkippingStatsColumns"] = ",".join(table.statistics)
    return {**properties, **(PROPERTIES if table.kind == "streamed" else {})}


@dataclass
class _Written:
    """What a writer knows of a table: its log, its newest version, its last micro-batch, and its live files."""

    table: Table
    log: TableLog
    version: int = -1
    batch: int = -1
    # Of the newest commit with a micro-batch: what its writer kept there.
    metadata: dict[str, Any] = field(default_factory=dict)
    # None: not read yet.
    live: LiveFiles | None = None


class LakeWriter:
    """The writer of the lake at root, whose tables exist. It may write once it has claimed it."""

    def __init__(self, files: Files, root: str, tables: Iterable[Table]) -> None:
        self.root = root
        self.files = files
        self.epoch = 0
        self._tables = {table.qualified_name: _Written(table, TableLog(files, table.path(root))) for table in tables}
        self._look()
        # One thing at a time, and never more than a few in wait: a table asks at every CHECKPOINT_EVERY-th commit.
        self._upkeep = ThreadPoolExecutor(1, "upkeep")

    def close(self) -> None:
        """Wait until what goes on in the background is done."""
        self._upkeep.shutdown()

    def in_background(self, task: Callable[[], None]) -> None:
        """Run a task beside the stream, after those that wait."""
        self._upkeep.submit(task)

    def _look(self) -> None:
        def look(written: _Written) -> None:
            written.version = written.log.newest()
            written.metadata = _newest(written.log, written.version)
            written.batch = written.metadata.get("batch", -1)
            written.live = None

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(look, self._tables.values()))

    def claim(self) -> None:
        """Fence every earlier writer, and see what the last one left.

        Raises Fenced if another one claims it too, and CannotWrite.
        """
        logs = [written.log for written in self._tables.values()]
        newest = [written.version for written in self._tables.values()]
        # All tables are looked at before one is claimed.
        with ThreadPoolExecutor(THREADS) as threads:
            self.epoch = 1 + max(threads.map(_last_epoch, logs, newest))
            list(threads.map(self._claim, logs, newest))
        self._look()

    def _claim(self, log: TableLog, newest: int) -> None:
        version = newest + 1
        # With the metadata of the last micro-batch, which is then never further back than the log goes.
        while not log.put(version, self._claim_of(log, version), application=(APPLICATION, self.epoch)):
            # The last commits of the writer before, or another one that claims the lake.
            actions = log.actions(version)
            epoch = metadata_of(actions).get("epoch", 0)
            if epoch >= self.epoch:
                raise Fenced(f"{log.path} has been taken over by another writer (epoch {epoch})")
            log.check_writable(actions)
            version += 1

    def _claim_of(self, log: TableLog, version: int) -> dict[str, Any]:
        return {**_newest(log, version - 1), "epoch": self.epoch}

    def empty(self, table: Table) -> None:
        """Remove all rows, and forget which micro-batches the table had. Raises Fenced."""
        self._catch_up(table)
        written = self._tables[table.qualified_name]
        self._commit(table, [], written.log.files(written.version), {"batch": -1, "emptied": True})
        written.live = LiveFiles(table, [])

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

    def add(self, actions: Iterable[Action], table: Table, query: str, batch: int, **metadata: Any) -> list[DataFile]:
        """Append a micro-batch's staged files, unless the table has it. The files. Raises Fenced."""
        if batch <= self.batch(table):
            return []
        added = self.files_at(table, actions)
        self._commit(table, added, [], {"query": query, "batch": batch, **metadata})
        return added

    def files_at(self, table: Table, actions: Iterable[Action]) -> list[DataFile]:
        """The files that these actions add."""
        return [self._tables[table.qualified_name].log.file(action) for action in actions]

    def replace(
        self,
        table: Table,
        pieces: Iterable[pa.Table],
        replaced: Sequence[DataFile],
        query: str,
        batch: int,
        **more: Any,
    ) -> list[DataFile]:
        """Put files of these rows in the place of live ones. The files; `live` does not have them yet.

        Raises Fenced; and Changed if one of those replaced is live no longer.
        """
        written = self._tables[table.qualified_name]
        with ThreadPoolExecutor(THREADS) as threads:
            added = list(threads.map(lambda rows: written.log.add(encoded_file(table, rows)), pieces))
        self._commit(table, added, replaced, {"query": query, "batch": batch, **more})
        return added

    def live(self, table: Table) -> LiveFiles:
        """The table's live files, as far as this writer knows. Raises Fenced."""
        written = self._tables[table.qualified_name]
        if written.live is None:
            self._catch_up(table)
            written.live = LiveFiles(table, written.log.files(written.version))
        return written.live

    def newest_files(self, table: Table) -> list[DataFile]:
        """The data files of the table's newest version, read in the log."""
        return self._tables[table.qualified_name].log.files()

    def added_since(self, table: Table, version: int) -> list[DataFile]:
        """The live data files that the table has got after a version, and perhaps others."""
        written = self._tables[table.qualified_name]
        added: dict[str, DataFile] = {}
        for number in range(version + 1, written.version + 1):
            if not written.log.has(number):
                # The log has been cleaned since.
                return written.log.files(written.version)
            actions = written.log.actions(number)
            for path in removed_by(actions):
                added.pop(path, None)
            added.update({add["path"]: written.log.file(add) for add in added_by(actions)})
        return list(added.values())

    def files_of(self, table: Table, batch: int) -> list[DataFile]:
        """The data files that a micro-batch, one of the last, has added to the table."""
        written = self._tables[table.qualified_name]
        added: list[DataFile] = []
        for number in range(written.version, -1, -1):
            actions = written.log.actions(number)
            of = metadata_of(actions).get("batch")
            if of == batch:
                added += [written.log.file(action) for action in added_by(actions)]
            elif of is not None and of < batch:
                break
        return added

    def metadata_since(self, table: Table, version: int) -> Iterator[dict[str, Any]]:
        """The metadata of the commits after a version, oldest first. Raises FileNotFoundError if one is gone."""
        written = self._tables[table.qualified_name]
        with ThreadPoolExecutor(THREADS) as threads:
            yield from threads.map(written.log.metadata, range(version + 1, written.version + 1))

    def _catch_up(self, table: Table) -> None:
        """See what others have committed since this writer looked last. Raises Fenced, CannotWrite."""
        written = self._tables[table.qualified_name]
        while written.log.has(written.version + 1):
            actions = written.log.actions(written.version + 1)
            epoch = metadata_of(actions).get("epoch", 0)
            if epoch > self.epoch:
                raise Fenced(f"{written.log.path} has been taken over by a newer writer (epoch {epoch})")
            written.log.check_writable(actions)
            if written.live is not None:
                written.live.replace(removed_by(actions), [written.log.file(action) for action in added_by(actions)])
            written.version += 1

    def catch_up(self, table: Table) -> None:
        """See what maintenance has committed. Raises Fenced."""
        self._catch_up(table)

    def _commit(
        self, table: Table, added: Sequence[DataFile], removed: Sequence[DataFile], metadata: dict[str, Any]
    ) -> None:
        """Commit a version of the table. Raises Fenced, and Changed if a file that is to be removed is gone."""
        written = self._tables[table.qualified_name]
        metadata = {"epoch": self.epoch, **metadata}
        while not written.log.put(written.version + 1, metadata, added, removed, (APPLICATION, self.epoch)):
            if written.log.metadata(written.version + 1) == json.loads(json.dumps(metadata)):
                # It is this very commit, of which only the answer was lost.
                break
            self._catch_up(table)
            if removed and written.live is not None and not written.live.has(removed):
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
        except (OSError, CannotWrite):
            logger.exception("%s: no checkpoint of the log, until %d commits later", log.path, CHECKPOINT_EVERY)


def _newest(log: TableLog, version: int) -> dict[str, Any]:
    """The metadata of the newest commit of a micro-batch, up to a version; empty if there is none."""
    for number in range(version, -1, -1):
        try:
            metadata = log.metadata(number)
        except FileNotFoundError:
            # The log has been cleaned up to here.
            return {}
        if "batch" in metadata:
            return metadata
    return {}


def _last_epoch(log: TableLog, version: int) -> int:
    """The epoch of the table's newest writer; 0 if it had none.

    Raises CannotWrite if the table asks of its writers what this one does not do. That stands in the commit that
    changed it last; and whoever has committed with an epoch has looked before.
    """
    checked = False
    for number in range(version, -1, -1):
        actions = log.actions(number)
        checked = checked or log.check_writable(actions)
        metadata = metadata_of(actions)
        if "epoch" in metadata:
            return int(metadata["epoch"])
    return 0
