"""A Delta table's log: what its commits say, and committing exactly the files that one wants.

Delta's public writers begin with a Spark job that looks for a transaction id in the table's whole state (four times the
processor time of a small append), and can replace rows only by searching for them (MERGE). Whoever knows which files a
commit adds and removes needs neither. This module calls the class behind those writers, OptimisticTransaction, which
checks schema, constraints and conflicts all the same. It is Delta's own, not a public interface: the tests run it
against the one version that conf/ivy.xml pins.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any
from uuid import uuid4

from py4j.java_gateway import JavaObject
from py4j.protocol import Py4JJavaError
from pyspark.sql import DataFrame, SparkSession

from lake.files import is_a

_COMMIT = re.compile(r"[0-9]{20}\.json")


class _Names:
    """The JVM's classes that are used here; to look one up goes through all jars."""

    def __init__(self, jvm: Any) -> None:
        delta = jvm.org.apache.spark.sql.delta
        self.delta_log = delta.DeltaLog
        self.action = delta.actions.Action
        self.set_transaction = delta.actions.SetTransaction
        self.write = getattr(delta, "DeltaOperations$Write")
        self.path = jvm.org.apache.hadoop.fs.Path
        self.array_list = jvm.java.util.ArrayList
        self.option = jvm.scala.Option
        self.converters = jvm.scala.jdk.javaapi.CollectionConverters
        self.spark_session = jvm.org.apache.spark.sql.SparkSession
        self.log_store = getattr(getattr(delta.storage, "LogStore$"), "MODULE$")
        self.save_mode = jvm.org.apache.spark.sql.SaveMode


_names = cache(_Names)


@dataclass(frozen=True)
class DataFile:
    """A data file of a table: Delta's own AddFile, where it is, its bytes, its partition, and its statistics."""

    add: JavaObject
    path: str
    size: int
    partition: dict[str, str]
    lowest: dict[str, Any]
    highest: dict[str, Any]


class TableLog:
    """The log of the Delta table at a path.

    What needs no more than the log's newest files is done on them: Delta's own view of a table is the work of a Spark
    job, a second each for a job that has just started, and is made when there is something to write.
    """

    def __init__(self, spark: SparkSession, path: str) -> None:
        jvm = spark._jvm
        assert jvm is not None
        self._names = _names(jvm)
        self._session = spark._jsparkSession
        self._hadoop_conf = self._session.sessionState().newHadoopConf()
        self._store = self._names.log_store.createLogStore(self._session)
        self._folder = self._names.path(f"{path}/_delta_log")
        self.path = path

    @cached_property
    def _log(self) -> JavaObject:
        return self._names.delta_log.forTable(self._session, self.path)

    def newest(self) -> int:
        """The number of the newest version; -1 if there is no table."""
        files = self._folder.getFileSystem(self._hadoop_conf)
        try:
            names = [status.getPath().getName() for status in files.listStatus(self._folder)]
        except Py4JJavaError as error:
            if not is_a(error, "java.io.FileNotFoundException"):
                raise
            return -1
        return max((int(name.removesuffix(".json")) for name in names if _COMMIT.fullmatch(name)), default=-1)

    def note(self, version: int, metadata: dict[str, Any], application: str, application_version: int) -> bool:
        """Commit `metadata` and no rows as a version, known to Delta as the application's; False if it is taken."""
        told = {
            "timestamp": time.time_ns() // 1_000_000,
            "operation": "Claim",
            "operationParameters": {},
            "isBlindAppend": False,
            "userMetadata": json.dumps(metadata, separators=(",", ":")),
        }
        transaction = {"appId": application, "version": application_version, "lastUpdated": told["timestamp"]}
        lines = self._names.array_list()
        for action in ({"commitInfo": told}, {"txn": transaction}):
            lines.add(json.dumps(action))
        file = self._names.path(self._folder, f"{version:020d}.json")
        try:
            self._store.write(file, self._names.converters.asScala(lines.iterator()), False, self._hadoop_conf)
        except Py4JJavaError as error:
            if not is_a(error, "java.nio.file.FileAlreadyExistsException"):
                raise
            return False
        return True

    def metadata(self, version: int) -> dict[str, Any]:
        """What a commit was given as metadata; empty if it was given none of ours."""
        file = self._names.path(self._folder, f"{version:020d}.json")
        actions = self._store.read(file, self._hadoop_conf)
        for number in range(actions.size()):
            action = json.loads(actions.apply(number))
            if "commitInfo" in action:
                told = action["commitInfo"].get("userMetadata", "")
                return dict(json.loads(told)) if told.startswith("{") else {}
        return {}

    def checkpoint(self) -> None:
        """Write the newest version's state as one file, and delete log files that nobody needs any more."""
        self._names.spark_session.setActiveSession(self._session)
        self._log.checkpoint()

    def property(self, name: str) -> str | None:
        """A property of the table."""
        found = self._log.update(False, self._names.option.empty(), self._names.option.empty()).metadata()
        value = found.configuration().get(name)
        return str(value.get()) if value.isDefined() else None

    def begin(self) -> Transaction:
        """A transaction on the newest version."""
        # Of the calling thread; Delta asks for it when it writes a checkpoint of the log.
        self._names.spark_session.setActiveSession(self._session)
        return Transaction(self._names, self._hadoop_conf, self._log.startTransaction(), self.path)


class Transaction:
    """A transaction: sees one version of the table, and becomes the next one or fails.

    It fails if a commit of another writer (an application id, see `commit`) came in between.
    """

    def __init__(self, names: _Names, hadoop_conf: JavaObject, transaction: JavaObject, path: str) -> None:
        self._names = names
        self._hadoop_conf = hadoop_conf
        self._transaction = transaction
        self._path = path
        self.version: int = transaction.readVersion()

    def files(self) -> list[DataFile]:
        """All data files of this version; runs a Spark job."""
        return self._data_files(self._transaction.snapshot().allFiles().collect())

    def write(self, rows: DataFrame) -> list[DataFile]:
        """Write rows into new data files, which belong to the table once they are committed."""
        added = self._transaction.writeFiles(rows._jdf)
        return self._data_files([added.apply(number) for number in range(added.size())])

    def commit(
        self,
        added: Sequence[DataFile],
        removed: Sequence[DataFile],
        metadata: dict[str, Any],
        application: str | None = None,
        application_version: int = 0,
    ) -> int:
        """Make it the next version, with `metadata`; returns its number.

        Of two transactions that name the same `application`, Delta's conflict check lets the later fail; of any two
        that remove the same file too.
        """
        names = self._names
        actions = names.array_list()
        for file in removed:
            actions.add(file.add.remove())
        for file in added:
            actions.add(file.add)
        none = names.option.empty()
        if application:
            actions.add(names.set_transaction(application, application_version, none))
            self._transaction.readTxn().addOne(application)
        told = names.option.apply(json.dumps(metadata, separators=(",", ":")))
        mode = names.save_mode.valueOf("Overwrite" if removed else "Append")
        operation = names.write(mode, none, none, told, none, none, none, none, none)
        return int(self._transaction.commit(names.converters.asScala(actions).toSeq(), operation))

    def add(self, content: bytes, partition: dict[str, str], statistics: str) -> DataFile:
        """Write a Parquet file, which belongs to the table once it is committed."""
        folder = "".join(f"{name}={value}/" for name, value in partition.items())
        name = f"{folder}part-{uuid4()}.snappy.parquet"
        path = self._names.path(f"{self._path}/{name}")
        files = path.getFileSystem(self._hadoop_conf)
        stream = files.create(path, False)
        try:
            stream.write(content)
        finally:
            stream.close()
        told = {
            "path": name,
            "partitionValues": partition,
            "size": len(content),
            "modificationTime": time.time_ns() // 1_000_000,
            "dataChange": True,
            "stats": statistics,
        }
        return self._data_file(self._names.action.fromJson(json.dumps({"add": told})))

    def discard(self, files: Sequence[DataFile]) -> None:
        """Delete files that were written and are not to be committed."""
        for file in files:
            path = self._names.path(file.path)
            path.getFileSystem(self._hadoop_conf).delete(path, False)

    def _data_files(self, adds: Any) -> list[DataFile]:
        return [self._data_file(add) for add in adds]

    def _data_file(self, add: JavaObject) -> DataFile:
        action = json.loads(add.json())["add"]
        statistics = json.loads(action.get("stats") or "{}")
        return DataFile(
            add,
            f"{self._path}/{action['path']}",
            action["size"],
            action["partitionValues"],
            statistics.get("minValues", {}),
            statistics.get("maxValues", {}),
        )
