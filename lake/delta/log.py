"""A Delta table's log: what its commits say, which files its versions have, and commits of exactly the files we want.

A commit is one JSON file in the log, created as the next version or not at all; of two writers that want the same
version one is refused, and sees what the other did. Delta's own writers begin with the table's whole state, which is
a Spark job for each table and each start, and end with another read of the log. A writer that knows the version that
it follows, and which files it adds and removes, needs neither. What Delta's protocol asks of a writer beyond that
depends on the table's features: we write only tables with none but FEATURES.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple
from urllib.parse import unquote
from uuid import uuid4

import pyarrow as pa

from lake.delta.checkpoint import (
    RETENTION_OF_THE_LOG,
    RETENTION_OF_TOMBSTONES,
    ROWS,
    Checkpoint,
    LogCleaner,
    UnknownFormat,
    adds,
    checkpoint_of,
    encoded_checkpoint,
    expired_before,
    has_vectors,
    newest_of_each,
    only,
    reaching,
    rows_of_checkpoint,
    rows_of_commits,
)
from lake.delta.files import Files
from lake.delta.parquet import EncodedFile

FEATURES = {"appendOnly", "invariants"}
"""Table features that a writer here honours: it only appends where rows may only be appended, as_stored checks for null
what must not be null, and lake.tables has no other constraints."""
PROTOCOL = {"minReaderVersion": 1, "minWriterVersion": 2}
"""What says of a table that it has these and no others."""
_COMMIT = re.compile(r"([0-9]{20})\.json")
_READERS = 8
"""How many threads read commits: each waits for HDFS most of the time."""
_COMMITS = 500
"""So many commits are in memory as Python objects at a time."""
DELETIONS = 2_000
"""So many files a checkpoint deletes at most: a second or two on HDFS. Some fifty are due each time."""

Action = dict[str, Any]


class CannotWrite(RuntimeError):
    """The table has features that the lake's writer does not know."""


class LogIncomplete(FileNotFoundError):
    """A commit is missing that the version needs."""


@dataclass(frozen=True)
class DataFile:
    """A data file of a table: what the log says of it (`add`), and where it is: a URL, with names decoded."""

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
        """As `lowest`. Times are cut to milliseconds: a row may be up to a millisecond above."""
        return self._statistics.get("maxValues") or {}

    @property
    def nulls(self) -> dict[str, int]:
        """How many nulls each column with statistics has."""
        return self._statistics.get("nullCount") or {}

    @property
    def rows(self) -> int:
        """By its statistics; 0 if they do not say."""
        return int(self._statistics.get("numRecords") or 0)

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


class _Replay(NamedTuple):
    """A version, and what the actions up to it leave: a row each, see `newest_of_each`."""

    version: int
    rows: pa.Table


class TableLog:
    """The log of the Delta table at a URL (`path`). Methods raise StoreError if the store refuses, or is away."""

    def __init__(self, files: Files, url: str) -> None:
        self.path = url
        self._files = files
        self._folder = f"{url}/_delta_log"
        self._cleaner = LogCleaner(files, self._folder)

    def newest(self, after: int | None = None) -> int:
        """The number of the newest version; -1 if there is no table.

        after: a version that exists. From there we ask for one version after the other, instead of for a listing.
        """
        if after is None:
            return self._list(self._last_checkpoint())[0]
        while self.has(after + 1):
            after += 1
        return after

    def has(self, version: int) -> bool:
        """Whether there is a commit of this number."""
        return self._files.exists(self._commit(version))

    def actions(self, version: int) -> list[Action]:
        """What a commit says: each a mapping of its kind (`add`, `remove`, `commitInfo`, ...) to its content.

        Raises LogIncomplete if it is missing.
        """
        try:
            content = self._files.read(self._commit(version))
        except FileNotFoundError:
            raise LogIncomplete(
                f"{self._commit(version)} is missing: the table has no such version, or its log was cleaned up"
            ) from None
        return [json.loads(line) for line in content.split(b"\n") if line.strip()]

    def metadata(self, version: int) -> dict[str, Any]:
        """The metadata that `put` got for a commit; empty for a commit of another writer."""
        return metadata_of(self.actions(version))

    def create(
        self, description: str, schema_json: str, partitioned_by: Sequence[str], properties: Mapping[str, str]
    ) -> bool:
        """Create the table, without rows, as version 0; False if there is one. schema_json: see delta_schema."""
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
    ) -> bool:
        """Commit as a version; False if that is taken.

        application: whose commit it is to Delta, and of which epoch. data_change: False if rows only move between
        files; streams that read the table then pass over the commit.
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
        if application:
            name, epoch = application
            actions.append({"txn": {"appId": name, "version": epoch, "lastUpdated": _now()}})
        return self._put(version, actions)

    def _put(self, version: int, actions: Iterable[Action]) -> bool:
        """Make a commit of these actions; False if the version is taken."""
        content = "".join(json.dumps(action) + "\n" for action in actions)
        return self._files.create(self._commit(version), content.encode())

    def state(self, version: int | None = None) -> State:
        """The state of a version, or of the newest.

        Raises LogIncomplete if a commit is missing or there is no table, and CannotWrite if the state is kept in a way
        that we do not read: deletion vectors, or a checkpoint of version 2 (of Delta's format).
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

    def files_since(self, columns: Sequence[str], since: datetime) -> list[DataFile]:
        """The newest version's files that may have a row in which one of these columns has a time of `since` or later.

        A file is left out only if its statistics of all these columns say so. Raises as `state`.
        """
        return [self.file(add) for add in adds(reaching(self._replay().rows, columns, since))]

    def property(self, name: str) -> str | None:
        """A property of the table, as of its newest version. Raises as `state`."""
        return _configuration(self._replay().rows).get(name)

    def check_writable(self, actions: Iterable[Action]) -> bool:
        """Whether these actions say what the table asks of its writers. Raises CannotWrite."""
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
        """Write a data file, which belongs to the table once it is committed."""
        self._files.write(f"{self.path}/{file.name}", file.content)
        return self.file(file.action)

    def file(self, add: Action) -> DataFile:
        """A file that is there already, of which the log says or will say this."""
        path = unquote(add["path"])
        is_whole = path.startswith("/") or re.match(r"[a-z][a-z0-9+.-]*:/", path)
        return DataFile(add, path if is_whole else f"{self.path}/{path}")

    def checkpoint(self, version: int | None = None, now: int | None = None, deletions: int = DELETIONS) -> None:
        """Write the state of a version, or of the newest, as one file, and delete log files that nobody needs any more.

        now: in milliseconds since 1970. deletions: how many files are deleted at most. Raises as `state`.
        """
        now = _now() if now is None else now
        version, rows = self._replay(version, tombstones=True)
        # A feature may have rows or fields of its own, which we would lose.
        self.check_writable([{"protocol": only(rows, "protocol")}])
        configuration = _configuration(rows)
        last = self._last_checkpoint()
        if last is None or last.version < version:
            encoded = encoded_checkpoint(version, rows, expired_before(configuration, RETENTION_OF_TOMBSTONES, now))
            # If another writer has made one of this version, it says the same.
            self._files.create(f"{self._folder}/{Checkpoint(version, 0).names()[0]}", encoded.content)
            # On a local disk Hadoop keeps a checksum, where Spark wrote the file before: it would not be that of ours.
            self._files.delete(f"{self._folder}/._last_checkpoint.crc")
            self._files.replace(f"{self._folder}/_last_checkpoint", encoded.pointer)
        if configuration.get("delta.enableExpiredLogCleanup", "true").lower() == "true":
            self._cleaner.clean(expired_before(configuration, RETENTION_OF_THE_LOG, now), now, deletions)

    def _commit(self, version: int) -> str:
        return f"{self._folder}/{version:020d}.json"

    def _last_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint, as the file that points to it says; None if it says nothing that helps."""
        try:
            pointer = json.loads(self._files.read(f"{self._folder}/_last_checkpoint"))
            return Checkpoint(pointer["version"], -1 if "v2Checkpoint" in pointer else pointer.get("parts") or 0)
        except (FileNotFoundError, ValueError, KeyError):
            # A writer may be about to replace it.
            return None

    def _list(self, start: Checkpoint | None) -> tuple[int, list[Checkpoint]]:
        """The newest version, and the checkpoints of which all files are there; both from a checkpoint on.

        A log may have a hundred thousand commits: what is before a checkpoint that we know is not listed.
        """
        after = "" if start is None else f"{start.version:020d}.json"
        versions, parts = [-1 if start is None else start.version], Counter[Checkpoint]()
        for status in self._files.list(self._folder, after):
            if match := _COMMIT.fullmatch(status.name):
                versions.append(int(match[1]))
            elif found := checkpoint_of(status.name):
                parts[found] += 1
        return max(versions), [checkpoint for checkpoint, count in parts.items() if count >= checkpoint.parts]

    def _replay(self, version: int | None = None, tombstones: bool = False) -> _Replay:
        """What the actions up to a version, or to the newest, leave. Raises LogIncomplete and CannotWrite.

        tombstones: with those of the last checkpoint, which only the next one needs.
        """
        checkpoint = self._last_checkpoint()
        if checkpoint is not None and (version is None or checkpoint.version <= version):
            # It is a hint only: its files may be gone, and commits after it cleaned up.
            with suppress(FileNotFoundError, LogIncomplete):
                return self._replay_from(checkpoint, version, tombstones)
        return self._replay_from(None, version, tombstones)

    def _replay_from(self, start: Checkpoint | None, version: int | None, tombstones: bool) -> _Replay:
        """As `_replay`. start: a checkpoint that is not after the version; None: look for one."""
        if version is None or start is None:
            newest, checkpoints = self._list(start)
            if newest < 0:
                raise LogIncomplete(f"there is no Delta table at {self.path}")
            version = newest if version is None else version
            start = max((checkpoint for checkpoint in checkpoints if checkpoint.version <= version), default=start)
        commits = range(0 if start is None else start.version + 1, version + 1)
        if commits and not self.has(version):
            raise LogIncomplete(f"{self._commit(version)} is missing: the table has no such version")
        rows = ROWS.empty_table() if start is None else self._rows_of(start, tombstones)
        with ThreadPoolExecutor(_READERS) as threads:
            try:
                for first in range(0, len(commits), _COMMITS):
                    added = rows_of_commits(threads.map(self.actions, commits[first : first + _COMMITS]))
                    rows = newest_of_each(pa.concat_tables([rows, added]))
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        if has_vectors(rows):
            raise CannotWrite(
                f"{self.path} has deletion vectors, which the lake's code cannot read. Drop them: ALTER TABLE ... "
                "SET TBLPROPERTIES (delta.enableDeletionVectors = false), then REORG TABLE ... APPLY (PURGE)"
            )
        return _Replay(version, rows)

    def _rows_of(self, checkpoint: Checkpoint, tombstones: bool) -> pa.Table:
        try:
            urls = [f"{self._folder}/{name}" for name in checkpoint.names()]
            return pa.concat_tables(rows_of_checkpoint(self._files.read(url), tombstones) for url in urls)
        except UnknownFormat:
            raise CannotWrite(
                f"{self.path} has checkpoints of version 2, which the lake's code cannot read. Drop them: "
                "ALTER TABLE ... DROP FEATURE v2Checkpoint"
            ) from None


def _configuration(rows: pa.Table) -> dict[str, str]:
    return only(rows, "metaData").get("configuration") or {}


def metadata_of(actions: Sequence[Action]) -> dict[str, Any]:
    """The metadata that `put` got for a commit; empty for a commit of another writer."""
    for commit_info in _of_kind(actions, "commitInfo"):
        text = commit_info.get("userMetadata") or ""
        return dict(json.loads(text)) if text.startswith("{") else {}
    return {}


def removed_by(actions: Sequence[Action]) -> set[str]:
    """The paths of the data files that a commit removes, as the log has them."""
    return {remove["path"] for remove in _of_kind(actions, "remove")}


def added_by(actions: Sequence[Action]) -> list[Action]:
    """What a commit says of the data files that it adds; see TableLog.file."""
    return list(_of_kind(actions, "add"))


def redefines(actions: Sequence[Action]) -> bool:
    """Whether a commit changes the table's schema, properties or features."""
    return any(_of_kind(actions, "metaData")) or any(_of_kind(actions, "protocol"))


def _of_kind(actions: Iterable[Action], kind: str) -> Iterator[Action]:
    return (action[kind] for action in actions if kind in action)


def _now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
