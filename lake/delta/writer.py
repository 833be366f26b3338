"""The stream's only way to create and write Delta tables: exactly once, by one writer at a time.

- **Replays.** A commit's metadata names its query and micro-batch. A micro-batch writes a table at most once, so if the
  table's newest commit of a micro-batch is of this one or a later one, the write is skipped. Only the first micro-batch
  after a start can be a replay, so the log is read once, at the start.
- **One writer.** To claim a lake, a writer commits an epoch, one above the last, to every table. It then commits the
  version after the last one that it knows. If that version exists, it reads that commit, and raises Fenced if its epoch
  is newer. So a driver that was paused and wakes up writes nothing.
- **Maintenance** (OPTIMIZE, VACUUM, a repair) may commit too. Appends simply follow its commit. A replacement of files
  that it has removed raises Changed, and the caller computes the replacement again.
- **Upkeep** in the same process moves rows to other files with `reorganize`, between micro-batches.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pyarrow as pa

from lake.delta.drop import dropped, is_older
from lake.delta.files import Files
from lake.delta.live import LiveFiles
from lake.delta.log import (
    MAINTENANCE,
    Action,
    CannotWrite,
    Cleaned,
    DataFile,
    TableLog,
    added_by,
    changes_rows,
    metadata_of,
    operation_of,
    removed_by,
)
from lake.delta.parquet import EncodedFile, delta_schema, encoded_file
from lake.delta.version import PROPERTY as VERSION_PROPERTY
from lake.tables import VERSION, Table

logger = logging.getLogger(__name__)


def horizon(history: timedelta) -> dict[str, str]:
    """The properties by which a table's old versions stay readable for so long."""
    interval = f"interval {history // timedelta(seconds=1)} seconds"
    return {"delta.logRetentionDuration": interval, "delta.deletedFileRetentionDuration": interval}


APPLICATION = "tickhouse.writer"
# A start reads the commits after the log's last checkpoint, some 3 ms each. Checkpoints are written in the background.
CHECKPOINT_EVERY = 50
# Upkeep knows so many small files per table at once; 20,000 take some 30 MB.
SMALL_FILES = 20_000
PROPERTIES = {"delta.checkpointInterval": "1000000000", **horizon(timedelta(days=1))}
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

    files: live data files. log_files: commits since the log's last checkpoint. Both are None until they are known:
    call `count`.
    committed_at: when this writer last committed a micro-batch, in Unix seconds; None before that.
    """

    version: int
    files: int | None
    log_files: int | None
    committed_at: float | None


_NOTHING = Cleaned(0, 0, 0)


@dataclass
class _TableState:
    """A writer's view of a table: its log, newest version, last micro-batch and live files."""

    table: Table
    log: TableLog
    version: int = -1
    batch: int = -1
    # The metadata of the newest commit of a micro-batch.
    metadata: dict[str, Any] = field(default_factory=dict)
    # None: not read yet. Of a table that is only appended to: its small files.
    live: LiveFiles | None = None
    # The paths of the files that the last micro-batch appended.
    appended: list[str] = field(default_factory=list)
    # The number of live files at the start, and how many more there are since. None: not counted yet.
    first_files: int | None = None
    more_files: int = 0
    # When a checkpoint of the log was last begun, by a monotonic clock.
    tidied_at: float = 0.0
    # The version of the log's last checkpoint; -1: there is none. None: not looked up yet.
    checkpointed: int | None = None
    # When this writer last committed a micro-batch, in Unix seconds.
    committed_at: float | None = None
    # What checkpoints have deleted since the start, and what the last one left.
    cleaned: Cleaned = _NOTHING
    # The log files from this version on are needed by a start; None: no older ones than usual.
    needed_since: int | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)


class LakeWriter:
    """The writer of the lake at root, whose tables exist. Call `claim` before writing."""

    def __init__(self, files: Files, root: str, tables: Iterable[Table]) -> None:
        self.root = root
        self.files = files
        self.epoch = 0
        self._tables = {table.qualified_name: _TableState(table, TableLog(files, table.path(root))) for table in tables}
        self._look()
        # Whether checkpoints delete data files that have passed the horizon.
        self.deletes_data = False
        # One task at a time. The queue stays short: a table adds a task per CHECKPOINT_EVERY commits.
        self._background = ThreadPoolExecutor(1, "background")

    def close(self) -> None:
        """Wait for the background tasks."""
        self._background.shutdown()

    def in_background(self, task: Callable[[], None]) -> None:
        """Queue a task to run beside the stream."""
        self._background.submit(task)

    def _look(self) -> None:
        def look(state: _TableState) -> None:
            state.version = state.log.newest()
            state.metadata = state.log.last_batch(state.version)
            state.batch = state.metadata.get("batch", -1)
            state.live = None
            state.first_files, state.more_files = None, 0

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
        return {**log.last_batch(version - 1), "epoch": self.epoch}

    def empty(self, table: Table) -> None:
        """Remove all rows, and the record of micro-batches. Raises Fenced."""
        self.catch_up(table)
        state = self._tables[table.qualified_name]
        self._commit(table, [], state.log.files(state.version), {"batch": -1, "emptied": True})
        state.live = LiveFiles(table, [])

    def forget(self, table: Table, **more: Any) -> None:
        """Keep the rows and the last micro-batch's metadata, but not its number. more: new metadata. Raises Fenced."""
        metadata = {name: value for name, value in self.metadata(table).items() if name not in ("query", "epoch")}
        self._commit(table, [], [], {**metadata, "batch": -1, **more})

    def batch(self, table: Table) -> int:
        """The table's last micro-batch; -1 if it has none."""
        return self._tables[table.qualified_name].batch

    def version(self, table: Table) -> int:
        """The newest version of the table that this writer knows."""
        return self._tables[table.qualified_name].version

    def count(self, table: Table) -> None:
        """Look up what `figures` needs of the log; from any thread. Raises StoreError, LogIncomplete, CannotWrite."""
        state = self._tables[table.qualified_name]
        if state.first_files is None:
            # Micro-batches may commit meanwhile.
            with state.lock:
                version, more = state.version, state.more_files
            state.first_files = state.log.file_count(version) - more
        newest = state.log.checkpointed()
        state.checkpointed = newest if state.checkpointed is None else max(newest, state.checkpointed)

    def figures(self, table: Table) -> TableFigures:
        """The table's figures; from any thread."""
        state = self._tables[table.qualified_name]
        files = None if state.first_files is None else state.first_files + state.more_files
        # Another program may have written a checkpoint of a version that we have not seen yet.
        log_files = None if state.checkpointed is None else max(0, state.version - state.checkpointed)
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
        state = self._tables[table.qualified_name]
        with state.lock:
            self._commit(table, added, [], {"query": query, "batch": batch, **metadata})
            state.appended = [file.add["path"] for file in added]
            if state.live is not None:
                state.live.add(added)
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
        with state.lock:
            if state.live is None:
                self.catch_up(table)
                files = state.log.files(state.version)
                state.live, state.first_files = LiveFiles(table, files), len(files) - state.more_files
            return state.live

    def small_files(self, table: Table, below: int) -> tuple[list[DataFile], int]:
        """Of a table that is only appended to: its files below a size in bytes, but for the last micro-batch's.

        Also returns how many more there are: with more than SMALL_FILES only the newest are returned. Call
        `forget_files` after joining those. Raises Fenced, StoreError.
        """
        state = self._tables[table.qualified_name]
        with state.lock:
            more = 0
            if state.live is None:
                self.catch_up(table)
                small, count = state.log.small_files(table.arrival_time, below, SMALL_FILES)
                state.live, more = LiveFiles(table, small, below), count - len(small)
            appended = set(state.appended)
            return [file for file in state.live.all() if file.add["path"] not in appended], more

    def forget_files(self, table: Table) -> None:
        """Read the table's live files from the log at their next use."""
        with self._tables[table.qualified_name].lock:
            self._tables[table.qualified_name].live = None

    def files_since(self, table: Table, columns: Sequence[str], since: datetime) -> list[DataFile]:
        """The newest version's files that may have a row with a time of `since` or later; see TableLog.files_since."""
        return self._tables[table.qualified_name].log.files_since(columns, since)

    def reorganize(
        self,
        table: Table,
        removed: Sequence[DataFile],
        added: Sequence[DataFile],
        dropped_before: datetime | None = None,
    ) -> bool:
        """Replace files by files of the same rows, between micro-batches.

        dropped_before: the removed rows go, since they are from before this time. Returns False, without a change, if a
        file to remove is no longer live. Raises Fenced.
        """
        state = self._tables[table.qualified_name]
        with state.lock:
            if state.live is None or not state.live.has(removed):
                return False
            try:
                if dropped_before:
                    self._put_drop(state, removed, dropped_before)
                else:
                    self._put(state, added, removed, self._of_upkeep(state), data_change=False)
            except Changed:
                return False
            state.live.replace([file.add["path"] for file in removed], added)
            return True

    def drop(self, table: Table, before: datetime) -> list[DataFile]:
        """Remove files with only rows from before a time from an append-only table, between micro-batches.

        Returns the removed files: none if maintenance commits at the same time. Raises Fenced, StoreError.
        """
        state = self._tables[table.qualified_name]
        with state.lock:
            self.catch_up(table)
            removed = [file for file in state.log.files(state.version) if is_older(file, table, before)]
            state.live = LiveFiles(table, removed)
            try:
                if removed:
                    self._put_drop(state, removed, before)
            except Changed:
                return []
            finally:
                state.live = None
            return removed

    def define(self, table: Table, properties: Mapping[str, str]) -> None:
        """Give the table these properties, if it has others. Raises Fenced, StoreError."""
        state = self._tables[table.qualified_name]
        with state.lock:
            self.catch_up(table)
            configuration = state.log.definition(state.version).get("configuration") or {}
            if not configuration.items() >= properties.items():
                self._put(state, [], [], self._of_upkeep(state), properties=lambda _: properties)

    def _put_drop(self, state: _TableState, removed: Sequence[DataFile], before: datetime) -> None:
        """Remove files, and record that rows from before a time are dropped."""
        self._put(state, [], removed, self._of_upkeep(state), properties=partial(dropped, before=before))

    def _of_upkeep(self, state: _TableState) -> dict[str, Any]:
        # With the last micro-batch's metadata, as in a claim: cleaning the log must not delete it.
        return {**state.metadata, "epoch": self.epoch, MAINTENANCE: "upkeep"}

    def write_file(self, table: Table, file: EncodedFile) -> DataFile:
        """Write a data file. It joins the table with its commit."""
        return self._tables[table.qualified_name].log.add(file)

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
        return state.log.batch_files(state.version, batch).files

    def metadata_since(self, table: Table, version: int) -> Iterator[dict[str, Any]]:
        """The metadata of the commits after a version, oldest first. Raises FileNotFoundError if one is missing."""
        state = self._tables[table.qualified_name]
        with ThreadPoolExecutor(THREADS) as threads:
            yield from threads.map(state.log.metadata, range(version + 1, state.version + 1))

    def catch_up(self, table: Table) -> None:
        """Read the commits of others since the last look. Raises Fenced, CannotWrite."""
        state = self._tables[table.qualified_name]
        with state.lock:
            while state.log.has(state.version + 1):
                actions = state.log.actions(state.version + 1)
                metadata = metadata_of(actions)
                epoch = metadata.get("epoch", 0)
                if epoch > self.epoch:
                    raise Fenced(f"{state.log.path} has been taken over by a newer writer (epoch {epoch})")
                state.log.check_writable(actions)
                if "epoch" not in metadata and MAINTENANCE not in metadata and changes_rows(actions):
                    logger.error(
                        "%s: version %d (%s) is another program's and changed rows. batch/prove.py tells what is wrong "
                        "now, and --repair mends gold; --rebuild makes silver and gold anew from bronze",
                        *(state.log.path, state.version + 1, operation_of(actions)),
                    )
                added, removed = [state.log.file(action) for action in added_by(actions)], removed_by(actions)
                if state.live is not None:
                    state.live.replace(removed, added)
                state.more_files += len(added) - len(removed)
                state.version += 1

    def _commit(
        self, table: Table, added: Sequence[DataFile], removed: Sequence[DataFile], metadata: dict[str, Any]
    ) -> None:
        """Commit a micro-batch's version of the table. Raises Fenced, and Changed as `_put`."""
        state = self._tables[table.qualified_name]
        metadata = {"epoch": self.epoch, **metadata}
        with state.lock:
            self._put(state, added, removed, metadata)
            state.batch, state.metadata, state.committed_at = metadata["batch"], metadata, time.time()

    def _put(
        self,
        state: _TableState,
        added: Sequence[DataFile],
        removed: Sequence[DataFile],
        metadata: dict[str, Any],
        data_change: bool = True,
        properties: Callable[[Mapping[str, str]], Mapping[str, str]] | None = None,
    ) -> None:
        """Commit a version. Raises Fenced, and Changed if a file to remove is no longer live.

        properties: new ones of the table, from those that it has.
        """

        def put() -> bool:
            definition = None
            if properties:
                definition = state.log.definition(state.version)
                configuration = definition.get("configuration") or {}
                definition = {**definition, "configuration": {**configuration, **properties(configuration)}}
            options: dict[str, Any] = {"data_change": data_change, "definition": definition}
            return state.log.put(state.version + 1, metadata, added, removed, (APPLICATION, self.epoch), **options)

        while not put():
            if state.log.metadata(state.version + 1) == json.loads(json.dumps(metadata)):
                # It is our own commit: only the store's answer was lost.
                break
            self.catch_up(state.table)
            live = state.live
            has_changed = live is not None and not live.has(removed)
            # A file that others have joined may reach over the spans of a new one.
            if has_changed or (live and state.table.file_time and live.interleave(added, removed)):
                raise Changed(f"{state.table.qualified_name} was changed at the same time")
        state.version += 1
        state.more_files += len(added) - len(removed)
        # Spread the tables' checkpoints over micro-batches.
        turn = list(self._tables).index(state.table.qualified_name) * (CHECKPOINT_EVERY // len(self._tables))
        if (state.version + turn) % CHECKPOINT_EVERY == 0:
            self._background.submit(self._checkpoint, state)

    def tidy(self, table: Table, seconds: float) -> None:
        """Write a checkpoint in the background if the last one is so old, and delete what has passed the horizon."""
        state = self._tables[table.qualified_name]
        is_due = time.monotonic() - state.tidied_at >= seconds
        if is_due and (state.checkpointed is None or state.checkpointed < state.version):
            self._background.submit(self._checkpoint, state)

    def keep_log(self, table: Table, since: int) -> None:
        """Keep the log files from a version on, however old they become."""
        self._tables[table.qualified_name].needed_since = since

    def cleaned(self, table: Table) -> Cleaned:
        """What the table's checkpoints have deleted since the start, and what the last one left."""
        return self._tables[table.qualified_name].cleaned

    def _checkpoint(self, state: _TableState) -> None:
        state.tidied_at, version = time.monotonic(), state.version
        try:
            cleaned = state.log.checkpoint(delete_data=self.deletes_data, keep=state.needed_since)
            before = state.cleaned
            state.cleaned = Cleaned(
                before.data_files + cleaned.data_files, before.log_files + cleaned.log_files, cleaned.left
            )
            state.checkpointed = version
        except (OSError, CannotWrite):
            logger.exception("%s: no checkpoint of the log, until %d commits later", state.log.path, CHECKPOINT_EVERY)


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
