"""What the streaming job tells those who run it (operation/server.py): /metrics, /healthz, /status.

It is unhealthy if records have been in Kafka for longer than stream_stale_seconds and are not in the tables, if Kafka's
offsets cannot be seen, if another writer has taken the lake over, or if the lease of the lake is not held.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pyspark.sql import SparkSession

from conf.settings import Settings
from lake.delta.files import Files
from lake.delta.lease import Lease
from lake.delta.log import CannotWrite
from lake.tables import SILVER_TICKS, STREAMED, Table
from operation.lag import KafkaLag, Place, lag_metrics
from operation.server import Server
from streaming.lakehouse import Lakehouse
from streaming.progress import Progress

logger = logging.getLogger(__name__)

READER = "stream"
COUNT_SECONDS = 60.0
"""How long a log is, is looked up so often."""

_LEVELS = (
    ("epoch", "the writer's epoch: a higher one fences it"),
    ("lease_held", "1 while the lease of the lake is held"),
    ("fenced", "1 if another writer has taken the lake over"),
    ("jvm_resident_memory_bytes", "resident memory of the driver's JVM"),
)
_OF_TABLES = (
    ("version", "newest version that the stream knows"),
    ("files", "live data files"),
    ("log_files", "commits since the log's last checkpoint"),
    ("commit_timestamp_seconds", "time of the stream's newest commit"),
)
# Of streaming.upkeep.Upkeep.figures. Those that count are counters.
_OF_UPKEEP = (
    ("rounds", "rounds of the tables' upkeep"),
    ("failures", "failures of upkeep; each is in the log"),
    ("joined_files", "small files that were joined to larger ones"),
    ("joined_bytes", "bytes of the files that they became"),
    ("dropped_files", "files whose rows keep_days let drop"),
    ("orphans", "deleted files that killed processes left"),
    ("cpu_seconds", "CPU time of upkeep"),
    ("deleted_data_files", "deleted data files that had been out of the tables for history_minutes"),
    ("deleted_log_files", "deleted files of the tables' logs"),
)
_DEBT = ("debt_files", "small or expired files that wait to be joined or deleted")


class Subject:
    """The streaming job's figures."""

    def __init__(self, settings: Settings, lakehouse: Lakehouse, lease: Lease, jvm: psutil.Process | None) -> None:
        self._lakehouse, self._lease, self._jvm = lakehouse, lease, jvm
        self._progress: Progress = lakehouse.progress
        self._stale_seconds = settings.stream_stale_seconds
        self._root = settings.lake_root
        self._ended = threading.Event()
        self.lag = KafkaLag(
            settings.kafka_bootstrap_servers,
            (settings.ticks_topic, settings.rejects_topic, settings.gaps_topic),
            settings.stream_stale_seconds,
            processed=lambda: self._processed(settings.checkpoint_location),
        )

    def _processed(self, checkpoint: str) -> Mapping[Place, int]:
        last, lake = self._lakehouse.last, self._lakehouse.writer
        return processed_offsets(lake.files, checkpoint, last.number if last else lake.batch(SILVER_TICKS))

    def start(self) -> None:
        """Begin to look at Kafka and the logs, beside the stream."""
        self.lag.start()
        threading.Thread(target=self._count, name="count-files", daemon=True).start()

    def stop(self) -> None:
        self.lag.stop()
        self._ended.set()

    def _count(self) -> None:
        while not self._ended.is_set():
            for table in STREAMED:
                try:
                    self._lakehouse.writer.count(table)
                except (OSError, CannotWrite) as error:
                    logger.debug("%s: its files are not counted: %s", table.qualified_name, error)
            self._ended.wait(COUNT_SECONDS)

    def trouble(self) -> list[str]:
        """What is wrong, in words."""
        trouble = []
        if self._lakehouse.fenced:
            trouble.append(str(self._lakehouse.fenced))
        elif not self._lease.is_held:
            trouble.append(f"the lease of the lake {self._root} is not held")
        if behind := self.lag.trouble():
            last = self._progress.last
            ended = f"{time.time() - last.ended:.0f} s ago" if last else "not since the start"
            trouble += [*behind[:-1], f"{behind[-1]}; a micro-batch was last written {ended}"]
        return trouble

    def status(self) -> dict[str, Any]:
        progress, lake = self._progress, self._lakehouse.writer
        progress.observe_commits(lake)
        last, recent = progress.last, progress.recent()
        return {
            "trouble": self.trouble(),
            "lake": self._root,
            "last_batch": None
            if last is None
            else {
                "number": last.number,
                "records": last.records,
                "seconds": last.seconds,
                "seconds_ago": time.time() - last.ended,
            },
            "recent_batches": len(recent),
            "recent_records": sum(each.records for each in recent),
            "recent_batch_seconds": sum(each.seconds for each in recent),
            "lag_records": self.lag.total,
            "stale_records": self.lag.stale_total,
            "epoch": lake.epoch,
            "lease_held": self._lease.is_held,
            "fenced": self._lakehouse.fenced is not None,
            "jvm_resident_memory_bytes": self._memory_of_jvm(),
            "tables": {table.qualified_name: self._table(table) for table in STREAMED},
            "upkeep": dict(upkeep.figures()) if (upkeep := self._lakehouse.upkeep) else None,
        }

    def _table(self, table: Table) -> dict[str, Any]:
        figures = self._lakehouse.writer.figures(table)
        return {
            "version": figures.version,
            "files": figures.files,
            "log_files": figures.log_files,
            "commit_timestamp_seconds": figures.committed_at,
            "freshness_seconds": self._progress.freshness(table.qualified_name),
        }

    def _memory_of_jvm(self) -> int | None:
        try:
            return None if self._jvm is None else int(self._jvm.memory_info().rss)
        except psutil.Error:
            return None

    def metrics(self, status: dict[str, Any]) -> Iterator[Metric]:
        yield from self._progress.metrics()
        yield from lag_metrics({READER: self.lag})
        for name, meaning in _LEVELS:
            if status[name] is not None:
                yield GaugeMetricFamily(f"tickhouse_stream_{name}", meaning, value=status[name])
        for name, meaning in _OF_TABLES:
            family = GaugeMetricFamily(f"tickhouse_table_{name}", meaning, labels=["table"])
            for table, figures in status["tables"].items():
                if figures[name] is not None:
                    family.add_metric([table], figures[name])
            yield family
        if (upkeep := status["upkeep"]) is not None:
            for name, meaning in _OF_UPKEEP:
                yield CounterMetricFamily(f"tickhouse_upkeep_{name}", meaning, value=upkeep[name])
            name, meaning = _DEBT
            yield GaugeMetricFamily(f"tickhouse_upkeep_{name}", meaning, value=upkeep[name])


def processed_offsets(files: Files, checkpoint: str, batch: int) -> dict[Place, int]:
    """Of each partition, the offset after the last record of a micro-batch and those before it, as Spark's checkpoint
    says. Empty before the first micro-batch. Raises OSError, and ValueError if the file is damaged."""
    if batch < 0:
        return {}
    lines = files.read(f"{checkpoint}/offsets/{batch}").decode().splitlines()
    topics = json.loads(lines[-1])
    return {(topic, int(number)): offset for topic, ends in topics.items() for number, offset in ends.items()}


def jvm_of(spark: SparkSession) -> psutil.Process | None:
    """The process of the driver's JVM."""
    jvm = spark._jvm
    assert jvm is not None
    try:
        return psutil.Process(jvm.java.lang.ProcessHandle.current().pid())
    except psutil.Error:
        return None


@contextmanager
def served(settings: Settings, subject: Subject) -> Iterator[Server]:
    """Serve the job's figures meanwhile."""
    subject.start()
    try:
        with Server("streaming", settings.stream_metrics_port, subject, settings.state_dir, or_any=True) as server:
            yield server
    finally:
        subject.stop()
