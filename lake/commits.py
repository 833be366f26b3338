"""A Delta table's log: what its commits say, and committing exactly the files that one wants.

A commit is one file of JSON in the log, put there as the next version or not at all; of two that want to be the same
version one is refused, and sees what the other did. Delta's own writers begin with the table's whole state, which is
the work of a Spark job for each table and each start, and end with reading the log again. Whoever knows the version
it follows, and which files it adds and removes, needs neither. What Delta's protocol asks of a writer beyond that
depends on the table's features: only tables with none but FEATURES are written.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property, reduce
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from py4j.java_gateway import JavaObject
from py4j.protocol import Py4JJavaError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import StructType

from lake.files import is_a
from lake.parquet import EncodedFile
from lake.timeouts import answered

_COMMIT = re.compile(r"[0-9]{20}\.json")
# Table features that a writer here honours: it only appends where rows may only be appended, it checks for null what
# must not be null, and there are no other constraints in lake.tables.
FEATURES = {"appendOnly", "invariants"}
# What says of a table that it has these and no others.
PROTOCOL = {"minReaderVersion": 1, "minWriterVersion": 2}

Action = dict[str, Any]


class CannotWrite(RuntimeError):
    """The table has features that the stream's writer does not know."""


class _Names:
    """The JVM's classes that are used here; to look one up goes through all jars."""

    def __init__(self, jvm: Any) -> None:
        self.delta_log = jvm.org.apache.spark.sql.delta.DeltaLog
        self.path = jvm.org.apache.hadoop.fs.Path
        self.array_list = jvm.java.util.ArrayList
        self.converters = jvm.scala.jdk.javaapi.CollectionConverters
        self.spark_session = jvm.org.apache.spark.sql.SparkSession
        self.log_store = getattr(getattr(jvm.org.apache.spark.sql.delta.storage, "LogStore$"), "MODULE$")


_names = cache(_Names)


@dataclass(frozen=True)
class DataFile:
    """A data file of a table: what the log says of it (`add`), where it is, and its statistics."""

    add: Action
    path: str
    lowest: dict[str, Any]
    highest: dict[str, Any]

    @property
    def size(self) -> int:
        """In bytes."""
        return int(self.add["size"])

    @property
    def rows(self) -> int:
        """By its statistics; 0 if they do not tell."""
        return int(json.loads(self.add.get("stats") or "{}").get("numRecords", 0))

    def removed(self) -> Action:
        return {
            "path": self.add["path"],
            "deletionTimestamp": _now(),
            "dataChange": True,
            "extendedFileMetadata": True,
            "partitionValues": self.add["partitionValues"],
            "size": self.size,
        }


class TableLog:
    """The log of the Delta table at a path."""

    def __init__(self, spark: SparkSession, path: str) -> None:
        jvm = spark._jvm
        assert jvm is not None
        self._names = _names(jvm)
        self._session = spark._jsparkSession
        self._hadoop_conf = self._session.sessionState().newHadoopConf()
        self._store = self._names.log_store.createLogStore(self._session)
        self._folder = self._names.path(f"{path}/_delta_log")
        self._files = self._folder.getFileSystem(self._hadoop_conf)
        self.path = path

    @cached_property
    def _log(self) -> JavaObject:
        return self._names.delta_log.forTable(self._session, self.path)

    def newest(self) -> int:
        """The number of the newest version; -1 if there is no table."""
        try:
            names = [status.getPath().getName() for status in self._files.listStatus(self._folder)]
        except Py4JJavaError as error:
            if not is_a(error, "java.io.FileNotFoundException"):
                raise
            return -1
        return max((int(name.removesuffix(".json")) for name in names if _COMMIT.fullmatch(name)), default=-1)

    def has(self, version: int) -> bool:
        """Whether there is a commit of this number."""
        return bool(self._files.exists(self._file(version)))

    def actions(self, version: int) -> list[Action]:
        """What a commit says: each a mapping of its kind (`add`, `remove`, `commitInfo`, ...) to its content."""
        lines = self._store.read(self._file(version), self._hadoop_conf)
        return [json.loads(lines.apply(number)) for number in range(lines.size())]

    def metadata(self, version: int) -> dict[str, Any]:
        """What a commit was given as metadata; empty if it was given none of ours."""
        return metadata_of(self.actions(version))

    def create(
        self, description: str, schema: StructType, partitioned_by: Sequence[str], properties: Mapping[str, str]
    ) -> None:
        """Create the table, without rows, as version 0, unless there is one."""
        told = {
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
            "schemaString": schema.json(),
            "partitionColumns": partitioned_by,
            "configuration": properties,
            "createdTime": _now(),
        }
        self._files.mkdirs(self._folder)
        self._put(0, [{"commitInfo": told}, {"metaData": metadata}, {"protocol": PROTOCOL}])

    def put(
        self,
        version: int,
        metadata: dict[str, Any],
        added: Iterable[DataFile] = (),
        removed: Iterable[DataFile] = (),
        application: tuple[str, int] | None = None,
    ) -> bool:
        """Commit as a version; False if that is taken. application: whose commit it is to Delta, and of which epoch."""
        adds, removes = [{"add": file.add} for file in added], [{"remove": file.removed()} for file in removed]
        told = {
            "timestamp": _now(),
            "operation": "WRITE",
            "operationParameters": {"mode": "Overwrite" if removes else "Append"},
            "isBlindAppend": not removes,
            "userMetadata": json.dumps(metadata, separators=(",", ":")),
        }
        actions: list[Action] = [{"commitInfo": told}, *removes, *adds]
        if application:
            name, epoch = application
            actions.append({"txn": {"appId": name, "version": epoch, "lastUpdated": _now()}})
        return self._put(version, actions)

    def _put(self, version: int, actions: Iterable[Action]) -> bool:
        """Make a commit of these actions; False if the version is taken."""
        lines = self._names.array_list()
        for action in actions:
            lines.add(json.dumps(action))
        try:
            self._store.write(
                self._file(version), self._names.converters.asScala(lines.iterator()), False, self._hadoop_conf
            )
        except Py4JJavaError as error:
            if not is_a(error, "java.nio.file.FileAlreadyExistsException"):
                raise
            return False
        return True

    def files(self, version: int, times: Sequence[str] = (), since: datetime | None = None) -> list[DataFile]:
        """The data files of a version; if `since`, without those in which all of these `times` are before it."""
        found = answered(lambda: pa.table(DeltaTable(self.path, version=version).get_add_actions()))
        if since is not None and found.num_rows:
            highest = [pc.struct_field(found["max"], name) for name in times]
            before = [
                pc.fill_null(pc.less(time, pa.scalar(since, pa.timestamp("us", "UTC"))), False) for time in highest
            ]
            found = found.filter(pc.invert(reduce(pc.and_, before)))
        return [self._known(row) for row in found.to_pylist()]

    def check_writable(self, actions: Iterable[Action]) -> bool:
        """Whether a commit of these actions says what the table asks of its writers. Raises CannotWrite."""
        for told in _of_kind(actions, "protocol"):
            version, features = told["minWriterVersion"], set(told.get("writerFeatures") or ())
            if version > 2 and (version < 7 or features - FEATURES):
                raise CannotWrite(
                    f"{self.path} has features of Delta that the streaming job cannot write: writer version "
                    f"{version}, {', '.join(sorted(features - FEATURES)) or 'no list of features'}. "
                    "Drop them (ALTER TABLE ... DROP FEATURE), or let --rebuild fill another lake_root."
                )
            return True
        return False

    def property(self, name: str) -> str | None:
        """A property of the table."""
        value: str | None = answered(lambda: DeltaTable(self.path).metadata().configuration.get(name))
        return value

    def write(self, rows: DataFrame) -> list[DataFile]:
        """Write rows into new data files, by Spark; they belong to the table once they are committed."""
        self._names.spark_session.setActiveSession(self._session)
        added = self._log.startTransaction().writeFiles(rows._jdf)
        return [self.file(json.loads(added.apply(number).json())["add"]) for number in range(added.size())]

    def add(self, file: EncodedFile) -> DataFile:
        """Write a data file, which belongs to the table once it is committed."""
        stream = self._files.create(self._names.path(f"{self.path}/{file.name}"), False)
        try:
            stream.write(file.content)
        finally:
            stream.close()
        return self.file(file.action)

    def file(self, add: Action) -> DataFile:
        """A file that is there already, of which the log says or will say this."""
        statistics = json.loads(add.get("stats") or "{}")
        lowest, highest = (statistics.get(name, {}) for name in ("minValues", "maxValues"))
        return DataFile(add, f"{self.path}/{add['path']}", lowest, highest)

    def checkpoint(self) -> None:
        """Write the newest version's state as one file, and delete log files that nobody needs any more.

        Raises DeltaError and TimeoutError.
        """

        def write() -> None:
            table = DeltaTable(self.path)
            table.create_checkpoint()
            table.cleanup_metadata()

        answered(write, patience=[60.0])

    def _file(self, version: int) -> JavaObject:
        return self._names.path(self._folder, f"{version:020d}.json")

    def _known(self, row: dict[str, Any]) -> DataFile:
        add = {
            "path": row["path"],
            "size": row["size_bytes"],
            "partitionValues": {name: str(value) for name, value in (row.get("partition") or {}).items()},
            "stats": json.dumps({"numRecords": row["num_records"] or 0}),
        }
        lowest, highest = (
            {column: value.isoformat() if isinstance(value, datetime) else value for column, value in told.items()}
            for told in (row.get("min") or {}, row.get("max") or {})
        )
        return DataFile(add, f"{self.path}/{row['path']}", lowest, highest)


def metadata_of(actions: Sequence[Action]) -> dict[str, Any]:
    """What was given as metadata with a commit; empty if it was given none of ours."""
    for told in _of_kind(actions, "commitInfo"):
        text = told.get("userMetadata") or ""
        return dict(json.loads(text)) if text.startswith("{") else {}
    return {}


def removed_by(actions: Sequence[Action]) -> set[str]:
    """The paths of the data files that a commit removes, as the log has them."""
    return {told["path"] for told in _of_kind(actions, "remove")}


def added_by(actions: Sequence[Action]) -> list[Action]:
    return list(_of_kind(actions, "add"))


def redefines(actions: Sequence[Action]) -> bool:
    """Whether a commit changes the table's schema, properties or features."""
    return any(_of_kind(actions, "metaData")) or any(_of_kind(actions, "protocol"))


def _of_kind(actions: Iterable[Action], kind: str) -> Iterator[Action]:
    return (action[kind] for action in actions if kind in action)


def _now() -> int:
    return time.time_ns() // 1_000_000
