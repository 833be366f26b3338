"""The stream's only way to create and write Delta tables: exactly once, by one writer at a time.

- **Replays.** A commit's metadata names its query and micro-batch. A micro-batch writes a table at most once, so if the
  table's newest commit of a micro-batch is of this one or a later one, the write is skipped. Only the first micro-batch
  after a start can be a replay, so the log is read once, at the start.
- **One writer.** To claim a lake, a writer commits an epoch, one above the last, to every table. It then commits the
  version after the last one that it knows. If that version exists, it reads that commit, and raises Fenced if its epoch
  is newer. So a driver that was paused and wakes up writes nothing.
- **Maintenance** (OPTIMIZE, VACUUM, a repair) may commit too. Appends simply follow its commit. A replacement of files
  that it has removed raises Changed, and the caller computes the replacement again.
"""

from __future__ import annotations

import json
import logging
import time
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
# A start reads the commits after the log's last checkpoint, some 3 ms each. Checkpoints are written in the background.
CHECKPOINT_EVERY = 50
# The log keeps one day: time travel needs no more, and a day has a hundred thousand files per table.
PROPERTIES = {
    "delta.checkpointInterval": "1000000000",
    "delta.logRetentionDuration": "interval 1 day",
    "delta.deletedFileRetentionDuration": "interval 1 day",
}
THREADS = 8


class Fenced(RuntimeError):
    """Another writer has claimed the lake since this one opened it."""


class Changed(RuntimeError):
    """Maintenance has replaced files since their rows were read: compute the change again."""


def create_table(files: Files, table: Table, root: str, properties: Mapping[str, str] | None = None) -> None:
    """Create the table in the lake at root if it is absent, with comments, partitions and properties."""
    log = TableLog(files, table.path(root))
    if log.newest() >= 0:
        return
    log.create(
        table.comment, delta_schema(table), table.partitioned_by, {**table_properties(table), **(properties or {})}
    )


def table_properties(table: Table) -> dict[str, str]:
    """The properties of a table of the lake."""
    properties = {**table.properties, "tickhouse.key": ",".join(table.key), VERSION_PROPERTY: str(VERSION)}
    if table.statistics:
        properties["delta.dataSkippingStatsColumns"] = ",".join(table.statistics)
    return {**properties, **(PROPERTIES if table.kind == "streamed" else {})}


@dataclass(frozen=True)
class TableFigures:
    """A table as its writer knows it.

    files: live data files. log_files: commits since the log's last checkpoint. Both are None before the first `count`.
    committed_at: when this writer last committed a micro-batch, in Unix seconds; None before that.
    """

    version: int
    files: int | None
    log_files: int | None
    committed_at: float | None


@dataclass
class _TableState:
    """A writer's view of a table: its log, newest version, last micro-batch and live files."""

    table: Table
    log: TableLog
    version: int = -1
    batch: int = -1
    # The metadata of the newest commit of a micro-batch.
    metadata: dict[str, Any] = field(default_factory=dict)
    # None: not read yet.
    live: LiveFiles | None = None
    # For `figures`: the version that the log was first read at, its files, and how many more there are since.
    first: int = -1
    first_files: int | None = None
    more_files: int = 0
    checkpointed: int | None = None
    committed_at: float | None = None


class LakeWriter:
    """The writer of the lake at root, whose tables exist. Call `claim` before writing."""

    def __init__(self, files: Files, root: str, tables: Iterable[Table]) -> None:
        self.root = root
        self.files = files
        self.epoch = 0
        self._tables = {table.qualified_name: _TableState(table, TableLog(files, table.path(root))) for table in tables}
        self._look()
        # One task at a time. The queue stays short: a table adds a task per CHECKPOINT_EVERY commits.
        self._upkeep = ThreadPoolExecutor(1, "upkeep")

    def close(self) -> None:
        """Wait for the background tasks."""
        self._upkeep.shutdown()

    def in_background(self, task: Callable[[], None]) -> None:
        """Queue a task to run beside the stream."""
        self._upkeep.submit(task)

    def _look(self) -> None:
        def look(state: _TableState) -> None:
            state.version = state.log.newest()
            state.metadata = _newest(state.log, state.version)
            state.batch = state.metadata.get("batch", -1)
            state.live = None
            state.first, state.first_files, state.more_files = state.version, None, 0

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(look, self._tables.values()))

    def claim(self) -> None:
        """Fence every earlier writer, and read the last one's commits.

        Raises CannotWrite, and Fenced if another writer claims the lake at the same time.
        """
        logs = [state.log for state in self._tables.values()]
        newest = [state.version for state in self._tables.values()]
        # Check all tables before claiming the first.
        with ThreadPoolExecutor(THREADS) as threads:
            self.epoch = 1 + max(threads.map(_last_epoch, logs, newest))
            list(threads.map(self._claim, logs, newest))
        self._look()

    def _claim(self, log: TableLog, newest: int) -> None:
        version = newest + 1
        # Repeat the last micro-batch's metadata: cleaning the log must not delete it.
        while not log.put(version, self._claim_of(log, version), application=(APPLICATION, self.epoch)):
            # A last commit of the previous writer, or another writer that claims the lake.
            actions = log.actions(version)
            epoch = metadata_of(actions).get("epoch", 0)
            if epoch >= self.epoch:
                raise Fenced(f"{log.path} has been taken over by another writer (epoch {epoch})")
            log.check_writable(actions)
            version += 1

    def _claim_of(self, log: TableLog, version: int) -> dict[str, Any]:
        return {**_newest(log, version - 1), "epoch": self.epoch}

    def empty(self, table: Table) -> None:
        """Remove all rows, and the record of micro-batches. Raises Fenced."""
        self._catch_up(table)
        state = self._tables[table.qualified_name]
        self._commit(table, [], state.log.files(state.version), {"batch": -1, "emptied": True})
        state.live = LiveFiles(table, [])

    def forget(self, table: Table) -> None:
        """Keep the rows and the last micro-batch's metadata, but not its number. Raises Fenced."""
        metadata = {name: value for name, value in self.metadata(table).items() if name not in ("query", "epoch")}
        self._commit(table, [], [], {**metadata, "batch": -1})

    def batch(self, table: Table) -> int:
        """The table's last micro-batch; -1 if it has none."""
        return self._tables[table.qualified_name].batch

    def version(self, table: Table) -> int:
        """The newest version of the table that this writer knows."""
        return self._tables[table.qualified_name].version

    def count(self, table: Table) -> None:
        """Look up what `figures` needs of the log; from any thread. Raises StoreError, LogIncomplete, CannotWrite."""
        state = self._tables[table.qualified_name]
        if state.first_files is None and state.live is None:
            first = state.first
            count = state.log.file_count(first)
            if first == state.first:
                state.first_files = count
        state.checkpointed = state.log.checkpointed()

    def figures(self, table: Table) -> TableFigures:
        """The table's figures; from any thread."""
        state = self._tables[table.qualified_name]
        files = len(state.live) if state.live is not None else state.first_files
        if files is not None and state.live is None:
            files += state.more_files
        log_files = None if state.checkpointed is None else state.version - state.checkpointed
        return TableFigures(state.version, files, log_files, state.committed_at)

    def property(self, table: Table, name: str) -> str | None:
        """A property of the table."""
        return self._tables[table.qualified_name].log.property(name)

    def metadata(self, table: Table) -> dict[str, Any]:
        """The metadata of the table's last micro-batch, with its `query`; empty if it has none."""
        return self._tables[table.qualified_name].metadata

    def add(self, actions: Iterable[Action], table: Table, query: str, batch: int, **metadata: Any) -> list[DataFile]:
        """Append a micro-batch's staged files, unless the table has it. Returns the appended files. Raises Fenced."""
        if batch <= self.batch(table):
            return []
        added = self.files_at(table, actions)
        self._commit(table, added, [], {"query": query, "batch": batch, **metadata})
        return added

    def files_at(self, table: Table, actions: Iterable[Action]) -> list[DataFile]:
        """The files of these `add` actions."""
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
        """Replace live files by files of these rows. Returns the new files, which `live` does not contain yet.

        Raises Fenced, and Changed if a replaced file is no longer live.
        """
        state = self._tables[table.qualified_name]
        with ThreadPoolExecutor(THREADS) as threads:
            added = list(threads.map(lambda rows: state.log.add(encoded_file(table, rows)), pieces))
        self._commit(table, added, replaced, {"query": query, "batch": batch, **more})
        return added

    def live(self, table: Table) -> LiveFiles:
        """The live files of the newest version that this writer knows. Raises Fenced."""
        state = self._tables[table.qualified_name]
        if state.live is None:
            self._catch_up(table)
            state.live = LiveFiles(table, state.log.files(state.version))
        return state.live

    def newest_files(self, table: Table) -> list[DataFile]:
        """The data files of the table's newest version, read from the log."""
        return self._tables[table.qualified_name].log.files()

    def added_since(self, table: Table, version: int) -> list[DataFile]:
        """The live data files added after a version, and perhaps others."""
        state = self._tables[table.qualified_name]
        added: dict[str, DataFile] = {}
        for number in range(version + 1, state.version + 1):
            if not state.log.has(number):
                # The commit has been cleaned up.
                return state.log.files(state.version)
            actions = state.log.actions(number)
            for path in removed_by(actions):
                added.pop(path, None)
            added.update({add["path"]: state.log.file(add) for add in added_by(actions)})
        return list(added.values())

    def files_of(self, table: Table, batch: int) -> list[DataFile]:
        """The data files that a recent micro-batch added to the table."""
        state = self._tables[table.qualified_name]
        added: list[DataFile] = []
        for number in range(state.version, -1, -1):
            actions = state.log.actions(number)
            of = metadata_of(actions).get("batch")
            if of == batch:
                added += [state.log.file(action) for action in added_by(actions)]
            elif of is not None and of < batch:
                break
        return added

    def metadata_since(self, table: Table, version: int) -> Iterator[dict[str, Any]]:
        """The metadata of the commits after a version, oldest first. Raises FileNotFoundError if one is missing."""
        state = self._tables[table.qualified_name]
        with ThreadPoolExecutor(THREADS) as threads:
            yield from threads.map(state.log.metadata, range(version + 1, state.version + 1))

    def _catch_up(self, table: Table) -> None:
        """Read the commits of others since the last look. Raises Fenced, CannotWrite."""
        state = self._tables[table.qualified_name]
        while state.log.has(state.version + 1):
            actions = state.log.actions(state.version + 1)
            epoch = metadata_of(actions).get("epoch", 0)
            if epoch > self.epoch:
                raise Fenced(f"{state.log.path} has been taken over by a newer writer (epoch {epoch})")
            state.log.check_writable(actions)
            added, removed = [state.log.file(action) for action in added_by(actions)], removed_by(actions)
            state.more_files += len(added) - len(removed)
            if state.live is not None:
                state.live.replace(removed, added)
            state.version += 1

    def catch_up(self, table: Table) -> None:
        """Read what maintenance has committed. Raises Fenced."""
        self._catch_up(table)

    def _commit(
        self, table: Table, added: Sequence[DataFile], removed: Sequence[DataFile], metadata: dict[str, Any]
    ) -> None:
        """Commit a version of the table. Raises Fenced, and Changed if a file to remove is no longer live."""
        state = self._tables[table.qualified_name]
        metadata = {"epoch": self.epoch, **metadata}
        while not state.log.put(state.version + 1, metadata, added, removed, (APPLICATION, self.epoch)):
            if state.log.metadata(state.version + 1) == json.loads(json.dumps(metadata)):
                # It is our own commit: only the store's answer was lost.
                break
            self._catch_up(table)
            if removed and state.live is not None and not state.live.has(removed):
                raise Changed(f"{table.qualified_name} was changed at the same time")
        state.version += 1
        state.more_files += len(added) - len(removed)
        state.batch, state.metadata, state.committed_at = metadata["batch"], metadata, time.time()
        # Spread the tables' checkpoints over micro-batches.
        turn = list(self._tables).index(table.qualified_name) * (CHECKPOINT_EVERY // len(self._tables))
        if (state.version + turn) % CHECKPOINT_EVERY == 0:
            self._upkeep.submit(self._checkpoint, state.log)

    @staticmethod
    def _checkpoint(log: TableLog) -> None:
        try:
            log.checkpoint()
        except (OSError, CannotWrite):
            logger.exception("%s: no checkpoint of the log, until %d commits later", log.path, CHECKPOINT_EVERY)


def _newest(log: TableLog, version: int) -> dict[str, Any]:
    """The metadata of the newest commit of a micro-batch up to a version; empty if there is none."""
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

    Raises CannotWrite if the table's protocol has features that we do not support. It suffices to check the commits
    down to the newest with an epoch: that writer has checked the earlier ones.
    """
    checked = False
    for number in range(version, -1, -1):
        actions = log.actions(number)
        checked = checked or log.check_writable(actions)
        metadata = metadata_of(actions)
        if "epoch" in metadata:
            return int(metadata["epoch"])
    return 0
