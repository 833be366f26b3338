"""A Delta table's log: reading commits, the files of a version, and committing a given set of files.

A commit is one JSON file, created atomically as the next version. If two writers create the same version, one is
refused and reads the other's commit. Delta's own writers first load the table's whole state, a Spark job per table and
start, and read the log again after each commit. A writer that knows the last version and the files that it adds and
removes needs neither. Delta's protocol has further duties for tables with features: we write only tables with no
features but FEATURES.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property, partial
from typing import Any, NamedTuple
from urllib.parse import unquote
from uuid import uuid4

import polars as pl
import pyarrow as pa

from lake.delta.checkpoint import (
    LEFTOVER_MILLIS,
    RETENTION_OF_THE_LOG,
    RETENTION_OF_TOMBSTONES,
    ROWS,
    Checkpoint,
    LogCleaner,
    UnknownFormat,
    adds,
    checkpoint_of,
    columns_of,
    encoded_checkpoint,
    expired_before,
    expired_tombstones,
    has_vectors,
    listed,
    newest_of_each,
    only,
    paths_of,
    reaching,
    rows_of_checkpoint,
    rows_of_commits,
    smaller,
    with_statistics_of,
    without_removed,
    without_tombstones,
)
from lake.delta.files import Files
from lake.delta.parquet import EncodedFile

FEATURES = {"appendOnly", "invariants"}
"""Table features that we support: we remove no rows from append-only tables, as_stored checks nullability, and
lake.tables has no other constraints."""
PROTOCOL = {"minReaderVersion": 1, "minWriterVersion": 2}
"""Declares these features and no others."""
_COMMIT = re.compile(r"([0-9]{20})\.json")
_READERS = 8
"""How many threads read commits: each waits for HDFS most of the time."""
_COMMITS = 200
"""How many commits are read at once."""
_ACTIONS = 20_000
"""How many actions of commits are Python objects at once, some 1 KB each."""
MAINTENANCE = "maintenance"
"""In the metadata of a commit that is no micro-batch's; a copy of the last micro-batch's metadata may be beside it."""
DELETIONS = 2_000
"""The most files that a checkpoint deletes: a second or two on HDFS. Usually some fifty have expired."""

_MILLISECOND = timedelta(milliseconds=1)

Action = dict[str, Any]


class CannotWrite(RuntimeError):
    """The table has features that the lake's writer does not support."""


class LogDamaged(RuntimeError):
    """A file of the log is empty or cut short, as after a power cut."""


class LogIncomplete(FileNotFoundError):
    """The log lacks a commit that the version needs."""


@dataclass(frozen=True)
class DataFile:
    """A data file of a table: its `add` action in the log, and its URL with names decoded."""

    add: Action
    path: str

    @cached_property
    def _statistics(self) -> dict[str, Any]:
        return json.loads(self.add.get("stats") or "{}") or {}

    @property
    def lowest(self) -> dict[str, Any]:
        """The lowest value of each column with statistics, as in JSON; other columns are absent."""
        return self._statistics.get("minValues") or {}

    @property
    def highest(self) -> dict[str, Any]:
        """As `lowest`. Times are truncated to milliseconds: a row may be up to a millisecond above."""
        return self._statistics.get("maxValues") or {}

    @property
    def nulls(self) -> dict[str, int]:
        """The number of nulls in each column with statistics."""
        return self._statistics.get("nullCount") or {}

    @property
    def rows(self) -> int:
        """The number of rows; 0 if the statistics lack it."""
        return int(self._statistics.get("numRecords") or 0)

    def ends_before(self, column: str, time: datetime) -> bool:
        """Whether all rows have an earlier time in a column; False if the statistics lack it."""
        highest = self.highest.get(column)
        # Statistics are truncated to milliseconds.
        return highest is not None and datetime.fromisoformat(highest) < time - _MILLISECOND

    @property
    def size(self) -> int:
        """In bytes."""
        return int(self.add["size"])

    def removed(self, data_change: bool = True) -> Action:
        """The action that removes it. data_change: False if its rows only move to other files."""
        return {
            "path": self.add["path"],
            "deletionTimestamp": _now(),
            "dataChange": data_change,
            "extendedFileMetadata": True,
            "partitionValues": self.add["partitionValues"],
            "size": self.size,
        }


@dataclass(frozen=True)
class State:
    """A version of a table. files: by their path in the log; configuration: the table's properties."""

    version: int
    files: dict[str, DataFile]
    configuration: dict[str, str]
    protocol: dict[str, Any]
    schema_string: str


class Cleaned(NamedTuple):
    """The number of deleted data files and log files, and of files that have expired but are left for the next time."""

    data_files: int
    log_files: int
    left: int


class BatchFiles(NamedTuple):
    """The first version that a micro-batch committed (behind the newest if its commits are gone), and the files that
    it added."""

    first: int
    files: list[DataFile]


class Columns(NamedTuple):
    """A version, its files (see lake.delta.checkpoint.columns_of), and the table's properties."""

    version: int
    files: pl.DataFrame
    configuration: dict[str, str]


class _Replay(NamedTuple):
    """A version, and the actions in force at it as rows; see `newest_of_each`."""

    version: int
    rows: pa.Table


class TableLog:
    """The log of the Delta table at a URL (`path`). Methods raise StoreError (see Files)."""

    def __init__(self, files: Files, url: str) -> None:
        self.path = url
        self._files = files
        self._folder = f"{url}/_delta_log"
        self._cleaner = LogCleaner(files, self._folder)

    def newest(self, after: int | None = None) -> int:
        """The number of the newest version; -1 if there is no table.

        after: a version that exists. We then try the following versions one by one instead of listing the log.
        """
        if after is None:
            return self._list(self._last_checkpoint())[0]
        while self.has(after + 1):
            after += 1
        return after

    def has(self, version: int) -> bool:
        """Whether the log has this version's commit."""
        return self._files.exists(self._commit(version))

    def actions(self, version: int) -> list[Action]:
        """A commit's actions: each maps its kind (`add`, `remove`, `commitInfo`, ...) to its content.

        Raises LogIncomplete if the commit is missing, and LogDamaged if it is empty or cut short.
        """
        return self._actions_of(version, self._content(version))

    def _actions_of(self, version: int, content: bytes) -> list[Action]:
        try:
            actions = [dict(json.loads(line)) for line in content.split(b"\n") if line.strip()]
        except (ValueError, TypeError):
            actions = []
        if not actions:
            raise LogDamaged(
                f"{self._commit(version)} is empty or cut short: bring it back from a copy. If there is none and it "
                "is the newest of its log, move it away, and let --rebuild make silver and gold anew from bronze; the "
                "records of a lost commit of bronze are then read from Kafka once more."
            )
        return actions

    def _content(self, version: int) -> bytes:
        try:
            return self._files.read(self._commit(version))
        except FileNotFoundError:
            raise LogIncomplete(
                f"{self._commit(version)} is missing: the table has no such version, or its log was cleaned up"
            ) from None

    def metadata(self, version: int) -> dict[str, Any]:
        """The metadata that `put` stored in a commit; empty for another writer's commit."""
        return metadata_of(self.actions(version))

    def create(
        self, description: str, schema_json: str, partitioned_by: Sequence[str], properties: Mapping[str, str]
    ) -> bool:
        """Create the empty table as version 0; False if it exists. schema_json: see delta_schema."""
        commit_info = {
            "timestamp": _now(),
            "operation": "CREATE TABLE",
            "operationParameters": {
                "isManaged": "false",
                "description": description,
                "partitionBy": json.dumps(partitioned_by),
                "properties": json.dumps(properties),
            },
            "isBlindAppend": True,
        }
        metadata = {
            "id": str(uuid4()),
            "description": description,
            "format": {"provider": "parquet", "options": {}},
            "schemaString": schema_json,
            "partitionColumns": partitioned_by,
            "configuration": properties,
            "createdTime": _now(),
        }
        return self._put(0, [{"commitInfo": commit_info}, {"metaData": metadata}, {"protocol": PROTOCOL}])

    def put(
        self,
        version: int,
        metadata: dict[str, Any],
        added: Iterable[DataFile] = (),
        removed: Iterable[DataFile] = (),
        application: tuple[str, int] | None = None,
        data_change: bool = True,
        definition: dict[str, Any] | None = None,
    ) -> bool:
        """Commit as this version; False if it exists already.

        application: the writer's name for Delta, and its epoch. data_change: False if rows only move between files;
        streams that read the table then skip the commit. definition: a new one; see `definition`.
        """
        adds = [{"add": {**file.add, "dataChange": data_change}} for file in added]
        removes = [{"remove": file.removed(data_change)} for file in removed]
        commit_info = {
            "timestamp": _now(),
            "operation": "WRITE",
            "operationParameters": {"mode": "Overwrite" if removes else "Append"},
            "isBlindAppend": not removes,
            "userMetadata": json.dumps(metadata, separators=(",", ":")),
        }
        actions: list[Action] = [{"commitInfo": commit_info}, *removes, *adds]
        if definition:
            actions.append({"metaData": definition})
        if application:
            name, epoch = application
            actions.append({"txn": {"appId": name, "version": epoch, "lastUpdated": _now()}})
        return self._put(version, actions)

    def _put(self, version: int, actions: Iterable[Action]) -> bool:
        """Commit these actions; False if the version exists already."""
        content = "".join(json.dumps(action) + "\n" for action in actions)
        return self._files.create(self._commit(version), content.encode())

    def state(self, version: int | None = None) -> State:
        """The state of a version, or of the newest.

        Raises LogIncomplete if a commit or the table is missing, and CannotWrite if the table has deletion vectors or
        checkpoints of Delta's format 2, which we do not read.
        """
        version, rows = self._replay(version)
        return State(
            version,
            {add["path"]: self.file(add) for add in adds(rows)},
            _configuration(rows),
            only(rows, "protocol"),
            only(rows, "metaData").get("schemaString", ""),
        )

    def files(self, version: int | None = None) -> list[DataFile]:
        """The data files of a version, or of the newest. Raises as `state`."""
        return list(self.state(version).files.values())

    def small_files(self, order: str, below: int, limit: int) -> tuple[list[DataFile], int]:
        """Up to `limit` of the newest version's files below a size in bytes, and how many such files there are.

        order: a column with statistics; of more than `limit` files those with the highest values. Raises as `state`.
        """
        rows, count = smaller(self._replay().rows, order, below, limit)
        return [self.file(add) for add in adds(rows)], count

    def files_since(self, columns: Sequence[str], since: datetime) -> list[DataFile]:
        """The newest version's files that may have a row in which one of these columns has a time of `since` or later.

        A file is left out only if its statistics of all these columns rule it out. Raises as `state`.
        """
        return [self.file(add) for add in adds(reaching(self._replay().rows, columns, since))]

    def file_count(self, version: int) -> int:
        """The number of data files of a version. Raises as `state`."""
        files = self._replay(version).rows["add"]
        return int(len(files) - files.null_count)

    def checkpointed(self) -> int:
        """The version of the newest checkpoint by `_last_checkpoint`; -1 if there is none."""
        last = self._last_checkpoint()
        return -1 if last is None else last.version

    def property(self, name: str) -> str | None:
        """A property of the table, as of its newest version. Raises as `state`."""
        return _configuration(self._replay().rows).get(name)

    def definition(self, version: int | None = None) -> dict[str, Any]:
        """The table's `metaData` action: schema, partitions, properties (`configuration`). Raises as `state`."""
        return only(self._replay(version).rows, "metaData")

    def last_batch(self, version: int) -> dict[str, Any]:
        """The metadata of the newest commit of a micro-batch up to a version; empty if there is none."""
        for number in range(version, -1, -1):
            try:
                metadata = self.metadata(number)
            except FileNotFoundError:
                # The log has been cleaned up to here.
                return {}
            if "batch" in metadata:
                return metadata
        return {}

    def batch_files(self, version: int, batch: int | None = None) -> BatchFiles:
        """What a recent micro-batch committed up to a version. Raises LogIncomplete if the log no longer says.

        batch: None is the last one; of that the result has what is left in the log.
        """
        is_last = batch is None
        first, added = version + 1, list[DataFile]()
        for number in range(version, -1, -1):
            try:
                actions = self.actions(number)
            except LogIncomplete:
                if is_last:
                    break
                raise
            metadata = metadata_of(actions)
            of = metadata.get("batch")
            if of is None or MAINTENANCE in metadata:
                continue
            batch = of if batch is None else batch
            if of < batch:
                break
            if of == batch:
                first = number
                added += [self.file(action) for action in added_by(actions)]
        return BatchFiles(first, added)

    def columns(self, partitions: Sequence[str], times: Collection[str]) -> Columns:
        """The newest version's files as columns, which take a tenth of the memory of `files`. Raises as `state`.

        partitions: the partition columns. times: columns with statistics.
        """
        version, rows = self._replay(change=partial(with_statistics_of, names=times))
        return Columns(version, columns_of(rows, partitions, times), _configuration(rows))

    def check_writable(self, actions: Iterable[Action]) -> bool:
        """Whether these actions contain the table's protocol. Raises CannotWrite if we do not support it."""
        for protocol in _of_kind(actions, "protocol"):
            version, features = protocol["minWriterVersion"], set(protocol.get("writerFeatures") or ())
            if version > 2 and (version < 7 or features - FEATURES):
                raise CannotWrite(
                    f"{self.path} has features of Delta that the streaming job cannot write: writer version "
                    f"{version}, {', '.join(sorted(features - FEATURES)) or 'no list of features'}. "
                    "Drop them (ALTER TABLE ... DROP FEATURE), or let --rebuild fill another lake_root."
                )
            return True
        return False

    def add(self, file: EncodedFile) -> DataFile:
        """Write a data file. It joins the table with its commit."""
        self._files.write(f"{self.path}/{file.name}", file.content)
        return self.file(file.action)

    def file(self, add: Action) -> DataFile:
        """The data file of an `add` action."""
        path = unquote(add["path"])
        return DataFile(add, path if _is_whole(path) else f"{self.path}/{path}")

    def checkpoint(
        self,
        version: int | None = None,
        now: int | None = None,
        deletions: int = DELETIONS,
        *,
        delete_data: bool = False,
        keep: int | None = None,
    ) -> Cleaned:
        """Write the state of a version, or of the newest, as one file, and delete expired log files.

        delete_data: also delete data files that left the table before its horizon (RETENTION_OF_TOMBSTONES).
        keep: the log files from this version on stay.
        now: in milliseconds since 1970. deletions: the most files to delete, of the log and of data each.
        Raises as `state`.
        """
        now = _now() if now is None else now
        version, rows = self._replay(version, tombstones=True)
        # A feature that we do not know may add rows or fields, which we would drop.
        self.check_writable([{"protocol": only(rows, "protocol")}])
        configuration = _configuration(rows)
        last, paths, log_files, left = self._last_checkpoint(), list[str](), 0, 0
        if last is None or last.version < version:
            paths = expired_tombstones(rows, expired_before(configuration, RETENTION_OF_TOMBSTONES, now))
            if delete_data:
                # A tombstone stays in the checkpoint until its file is gone, so a killed process leaves no file behind.
                left, paths = max(0, len(paths) - deletions), paths[:deletions]
                self._delete(paths)
            encoded = encoded_checkpoint(version, without_tombstones(rows, paths))
            # A checkpoint of this version by another writer has the same content.
            self._files.create(f"{self._folder}/{Checkpoint(version, 0).names()[0]}", encoded.content)
            # On a local disk Hadoop keeps a checksum of the file that Spark wrote; it would not match ours.
            self._files.delete(f"{self._folder}/._last_checkpoint.crc")
            self._files.replace(f"{self._folder}/_last_checkpoint", encoded.pointer)
        if configuration.get("delta.enableExpiredLogCleanup", "true").lower() == "true":
            before = expired_before(configuration, RETENTION_OF_THE_LOG, now)
            log_files = self._cleaner.clean(before, now, deletions, keep)
            left += deletions if log_files == deletions else 0
        return Cleaned(len(paths) if delete_data else 0, log_files, left)

    def clean(self, keep: int | None = None, now: int | None = None) -> Cleaned:
        """As `checkpoint`, which deletes data too, for a log that has been neglected: everything expired goes at once.

        The first checkpoint is of the last version that has expired, so that all log files before it may go.
        """
        now = _now() if now is None else now
        configuration = self.definition().get("configuration") or {}
        before = expired_before(configuration, RETENTION_OF_THE_LOG, now)
        expired, last, superseding = self._expired(before), self._last_checkpoint(), -1
        if (-1 if last is None else last.version) < expired < self.newest():
            self.checkpoint(expired, now, keep=keep)
            superseding = expired
        data_files, log_files, _ = self.checkpoint(None, now, sys.maxsize, delete_data=True, keep=keep)
        if configuration.get("delta.enableExpiredLogCleanup", "true").lower() == "true":
            while count := self._cleaner.clean(before, now, DELETIONS, keep, superseding):
                log_files += count
        return Cleaned(data_files, log_files, 0)

    def expired(self, keep: int | None = None, now: int | None = None) -> Cleaned:
        """About what `clean` would delete: of log files the commits only. `left`: all commits in the log."""
        now = _now() if now is None else now
        rows = self._replay(tombstones=True).rows
        configuration = _configuration(rows)
        data_files = len(expired_tombstones(rows, expired_before(configuration, RETENTION_OF_TOMBSTONES, now)))
        last = self._expired(expired_before(configuration, RETENTION_OF_THE_LOG, now))
        end = last if keep is None else min(last, keep)
        matches = (_COMMIT.fullmatch(status.name) for status in listed(self._files, self._folder))
        commits = Counter(int(match[1]) < end for match in matches if match)
        return Cleaned(data_files, commits[True], commits.total())

    def _expired(self, before: int) -> int:
        """The last version whose commit, and each one before it, was written before a time; -1 if there is none."""
        version = -1
        for status in listed(self._files, self._folder):
            if match := _COMMIT.fullmatch(status.name):
                if status.modified >= before:
                    break
                version = int(match[1])
        return version

    def orphans(self, now: int) -> Iterator[str]:
        """URLs of old data files that the log does not know: a killed process wrote them, and nobody committed them.

        now: in milliseconds since 1970. A file that is younger than LEFTOVER_MILLIS or than the table's history is left
        out: a job may be about to commit it, or a reader of an old version may need it. Raises as `state`.
        """
        rows = self._replay(tombstones=True).rows
        horizon = expired_before(_configuration(rows), RETENTION_OF_TOMBSTONES, now)
        before = min(now - LEFTOVER_MILLIS, horizon)
        known = {unquote(path) for kind in ("add", "remove") for path in paths_of(rows, kind)}
        folders = [""]
        while folders:
            folder = folders.pop()
            for status in listed(self._files, f"{self.path}/{folder}".rstrip("/")):
                name = f"{folder}{status.name}"
                if status.name[0] in "_.":
                    continue
                if status.is_folder:
                    folders.append(f"{name}/")
                elif name not in known and status.modified < before:
                    yield f"{self.path}/{name}"

    def _delete(self, paths: Iterable[str]) -> None:
        """Delete data files of these paths, as the log names them. A file outside of the table's folder stays."""
        own = [path for path in map(unquote, paths) if not _is_whole(path)]
        with ThreadPoolExecutor(_READERS) as threads:
            list(threads.map(self._files.delete, (f"{self.path}/{path}" for path in own)))

    def _commit(self, version: int) -> str:
        return f"{self._folder}/{version:020d}.json"

    def _last_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint by `_last_checkpoint`; None if that file is absent or unreadable."""
        try:
            pointer = json.loads(self._files.read(f"{self._folder}/_last_checkpoint"))
            return Checkpoint(pointer["version"], -1 if "v2Checkpoint" in pointer else pointer.get("parts") or 0)
        except (FileNotFoundError, ValueError, KeyError):
            # A writer may be about to replace it.
            return None

    def _list(self, start: Checkpoint | None) -> tuple[int, list[Checkpoint]]:
        """The newest version, and the complete checkpoints; both from the checkpoint `start` on.

        A log may have a hundred thousand commits, so we do not list those before `start`.
        """
        after = "" if start is None else f"{start.version:020d}.json"
        versions, parts = [-1 if start is None else start.version], Counter[Checkpoint]()
        for status in self._files.list(self._folder, after):
            if match := _COMMIT.fullmatch(status.name):
                versions.append(int(match[1]))
            elif part := checkpoint_of(status.name):
                parts[part] += 1
        return max(versions), [checkpoint for checkpoint, count in parts.items() if count >= checkpoint.parts]

    def _replay(
        self, version: int | None = None, tombstones: bool = False, change: Callable[[pa.Table], pa.Table] = lambda r: r
    ) -> _Replay:
        """The actions in force at a version, or at the newest. Raises LogIncomplete and CannotWrite.

        tombstones: include those of the last checkpoint, which only the next checkpoint needs. change: what is made of
        each part of the rows when it was read.
        """
        checkpoint = self._last_checkpoint()
        if checkpoint is not None and (version is None or checkpoint.version <= version):
            # It is only a hint: the checkpoint's files, or commits after it, may be deleted.
            with suppress(FileNotFoundError, LogIncomplete):
                return self._replay_from(checkpoint, version, tombstones, change)
        return self._replay_from(None, version, tombstones, change)

    def _replay_from(
        self,
        start: Checkpoint | None,
        version: int | None,
        tombstones: bool,
        change: Callable[[pa.Table], pa.Table],
    ) -> _Replay:
        """As `_replay`. start: a checkpoint of the version or before; None: search for one."""
        if version is None or start is None:
            newest, checkpoints = self._list(start)
            if newest < 0:
                raise LogIncomplete(f"there is no Delta table at {self.path}")
            version = newest if version is None else version
            start = max((checkpoint for checkpoint in checkpoints if checkpoint.version <= version), default=start)
        commits = range(0 if start is None else start.version + 1, version + 1)
        if commits and not self.has(version):
            raise LogIncomplete(f"{self._commit(version)} is missing: the table has no such version")
        rows = ROWS.empty_table() if start is None else self._rows_of(start, tombstones, change)
        reduced_rows = rows.num_rows
        for added in self._rows_of_commits(commits):
            rows = pa.concat_tables([rows, change(added)])
            # Only once the rows have doubled: a log of 100,000 commits takes a time linear in its length.
            if rows.num_rows > 2 * reduced_rows + _ACTIONS:
                rows = newest_of_each(rows)
                rows = rows if tombstones else without_removed(rows)
                reduced_rows = rows.num_rows
        if commits:
            rows = newest_of_each(rows)
            rows = rows if tombstones else without_removed(rows)
        if has_vectors(rows):
            raise CannotWrite(
                f"{self.path} has deletion vectors, which the lake's code cannot read. Drop them: ALTER TABLE ... "
                "SET TBLPROPERTIES (delta.enableDeletionVectors = false), then REORG TABLE ... APPLY (PURGE)"
            )
        return _Replay(version, rows)

    def _rows_of_commits(self, versions: Sequence[int]) -> Iterator[pa.Table]:
        """The actions of these commits as rows, oldest first. Raises LogIncomplete."""
        waiting, count = list[list[Action]](), 0
        with ThreadPoolExecutor(_READERS) as threads:
            try:
                for first in range(0, len(versions), _COMMITS):
                    part = versions[first : first + _COMMITS]
                    for version, content in zip(part, threads.map(self._content, part), strict=True):
                        waiting.append(self._actions_of(version, content))
                        count += len(waiting[-1])
                        if count >= _ACTIONS:
                            yield rows_of_commits(waiting)
                            waiting, count = [], 0
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        if waiting:
            yield rows_of_commits(waiting)

    def _rows_of(self, checkpoint: Checkpoint, tombstones: bool, change: Callable[[pa.Table], pa.Table]) -> pa.Table:
        try:
            urls = [f"{self._folder}/{name}" for name in checkpoint.names()]
            return pa.concat_tables(rows_of_checkpoint(self._files.read(url), tombstones, change) for url in urls)
        except pa.ArrowInvalid as error:
            raise LogDamaged(
                f"the checkpoint of version {checkpoint.version} in {self._folder} is empty or cut short ({error}): "
                "bring it back from a copy, or move it away, if the log still has all commits since the one before it."
            ) from error
        except UnknownFormat:
            raise CannotWrite(
                f"{self.path} has checkpoints of version 2, which the lake's code cannot read. Drop them: "
                "ALTER TABLE ... DROP FEATURE v2Checkpoint"
            ) from None


def _is_whole(path: str) -> bool:
    """Whether a path in a log is not relative to the table's folder."""
    return path.startswith("/") or bool(re.match(r"[a-z][a-z0-9+.-]*:/", path))


def _configuration(rows: pa.Table) -> dict[str, str]:
    return only(rows, "metaData").get("configuration") or {}


def metadata_of(actions: Sequence[Action]) -> dict[str, Any]:
    """The metadata that `put` stored in a commit; empty for another writer's commit."""
    for commit_info in _of_kind(actions, "commitInfo"):
        text = commit_info.get("userMetadata") or ""
        return dict(json.loads(text)) if text.startswith("{") else {}
    return {}


def operation_of(actions: Sequence[Action]) -> str:
    """A commit's operation, as its writer names it: WRITE, OPTIMIZE, RESTORE, ..."""
    return next((str(info.get("operation")) for info in _of_kind(actions, "commitInfo")), "unknown")


def changes_rows(actions: Sequence[Action]) -> bool:
    """Whether a commit adds or removes rows; moving them to other files does not."""
    return any(file.get("dataChange", True) for kind in ("add", "remove") for file in _of_kind(actions, kind))


def removed_by(actions: Sequence[Action]) -> set[str]:
    """The paths of the data files that a commit removes, as the log names them."""
    return {remove["path"] for remove in _of_kind(actions, "remove")}


def added_by(actions: Sequence[Action]) -> list[Action]:
    """The `add` actions of a commit; see TableLog.file."""
    return list(_of_kind(actions, "add"))


def redefines(actions: Sequence[Action]) -> bool:
    """Whether a commit changes the table's schema, properties or features."""
    return any(_of_kind(actions, "metaData")) or any(_of_kind(actions, "protocol"))


def _of_kind(actions: Iterable[Action], kind: str) -> Iterator[Action]:
    return (action[kind] for action in actions if kind in action)


def _now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
