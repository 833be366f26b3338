"""What the driver has done since it started: times, counts and freshness of micro-batches.

A micro-batch's stages: stage (its Spark job), deduplicate, the commits of bronze.ticks, silver.ticks and
silver.quarantine, silver.gaps, gold, and whole. Those from bronze.ticks on run side by side. A table's freshness is the
time from the receipt of the newest tick in a commit to the commit, by the clocks of the ingester and the driver.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric

from lake.delta.log import DataFile
from lake.delta.writer import LakeWriter
from lake.silver.stage import Staged, TickFiles
from lake.tables import SILVER_QUARANTINE, SILVER_TICKS, STREAMED

STAGE_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
FRESHNESS_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3_600.0)
RECENT_SECONDS = 60.0
RECENT_BATCHES = 1_000
"""A rate is over the micro-batches of the last RECENT_SECONDS, at most so many."""


@dataclass(frozen=True)
class Written:
    """A micro-batch. receipt: of its newest tick, in Unix seconds; None if it has no tick, or is a replay."""

    number: int
    records: int
    seconds: float
    ended: float
    receipt: float | None


class Progress:
    """Written by the driver's threads, read by others."""

    def __init__(self) -> None:
        # Of this driver's own: a process may have several in tests.
        self._registry = CollectorRegistry()

        def counter(name: str, meaning: str) -> Counter:
            return Counter(f"tickhouse_stream_{name}", meaning, registry=self._registry)

        def histogram(name: str, meaning: str, label: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(
                f"tickhouse_stream_{name}", meaning, [label], registry=self._registry, buckets=(*buckets, float("inf"))
            )

        self._stages = histogram("stage_seconds", "time of a micro-batch's stage", "stage", STAGE_SECONDS)
        self._freshness = histogram(
            "freshness_seconds", "from a commit's newest tick's receipt to the commit", "table", FRESHNESS_SECONDS
        )
        self.micro_batches = counter("micro_batches", "micro-batches written, replays too")
        self.records = counter("records", "Kafka records in them")
        self.ticks = counter("ticks", "distinct valid ticks in them")
        self.quarantined = counter("quarantined", "invalid records in them")
        self.repeats = counter("repeats", "repeats of ticks in them")
        self._recent: deque[Written] = deque(maxlen=RECENT_BATCHES)
        self._newest: dict[str, float] = {}
        self._observed: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Measure a stage of a micro-batch: for `with`, or to decorate the function that does it."""
        with self._stages.labels(stage).time():
            yield

    @property
    def last(self) -> Written | None:
        """The last micro-batch."""
        return self._recent[-1] if self._recent else None

    def recent(self) -> list[Written]:
        """The micro-batches that ended within the last RECENT_SECONDS."""
        since = time.time() - RECENT_SECONDS
        return [each for each in list(self._recent) if each.ended >= since]

    def freshness(self, table: str) -> float | None:
        """The freshness of a table's newest commit of ticks, in seconds."""
        return self._newest.get(table)

    def metrics(self) -> Iterable[Metric]:
        return self._registry.collect()

    def wrote(
        self,
        number: int,
        staged: Staged,
        ticks: Sequence[TickFiles],
        lake: LakeWriter,
        seconds: float,
        *,
        replayed: bool,
    ) -> None:
        """A micro-batch is in all tables. ticks: those that silver has of it. seconds: how long it took."""
        files = lake.files_at(SILVER_TICKS, staged.of(SILVER_TICKS))
        written = Written(number, staged.records, seconds, time.time(), None if replayed else newest_receipt(files))
        self.micro_batches.inc()
        self.records.inc(staged.records)
        if not replayed:
            distinct = sum(int(part.summaries["tick_count"].sum()) for part in ticks)
            quarantined = sum(file.rows for file in lake.files_at(SILVER_QUARANTINE, staged.of(SILVER_QUARANTINE)))
            self.ticks.inc(distinct)
            self.quarantined.inc(quarantined)
            # Each record is a tick, quarantined, a report of a gap, or a repeat.
            self.repeats.inc(max(0, staged.records - distinct - quarantined - len(staged.reports)))
        self._recent.append(written)
        self.observe_commits(lake)

    def observe_commits(self, lake: LakeWriter) -> None:
        """Note the freshness of the commits since the last look. The longer windows' are not part of a micro-batch."""
        receipts = {each.number: each.receipt for each in list(self._recent)}
        with self._lock:
            for table in STREAMED:
                name, committed_at = table.qualified_name, lake.figures(table).committed_at
                receipt = receipts.get(lake.batch(table))
                if committed_at is None or receipt is None or self._observed.get(name) == committed_at:
                    continue
                self._observed[name] = committed_at
                self._newest[name] = committed_at - receipt
                self._freshness.labels(name).observe(self._newest[name])


def newest_receipt(files: Iterable[DataFile]) -> float | None:
    """The newest received_at of files of silver.ticks, to the millisecond, in Unix seconds; None if no file says it."""
    return max(_receipts(files), default=None)


def _receipts(files: Iterable[DataFile]) -> Iterator[float]:
    for file in files:
        if text := file.highest.get("received_at"):
            yield datetime.fromisoformat(text).timestamp()
