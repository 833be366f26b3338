"""Run micro-batches without Kafka, and mostly without Spark.

A micro-batch needs Spark only to run its tasks. `WithoutSpark` and `Records` run the tasks here, one after another, in
milliseconds instead of seconds. The lakehouse, the executors' code and the tables are the real ones.
"""

from __future__ import annotations

import itertools
import json
import pickle
import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from pyspark import cloudpickle
from pyspark.sql import DataFrame, SparkSession

from conf.settings import Settings
from lake.contract import RECORD
from lake.delta.slices import Sink
from streaming.lakehouse import Lakehouse, resume
from tests.oracle import Record
from tests.ticks import arrow_records

START = datetime(2024, 8, 9, 23, 50, tzinfo=UTC)
QUERY = "q"


class WithoutSpark:
    """The methods of a Spark session and its context that the lakehouse uses."""

    @property
    def sparkContext(self) -> WithoutSpark:
        return self

    def getLocalProperty(self, name: str) -> str:
        assert name == "sql.streaming.queryId"
        return QUERY

    def parallelize(self, items: Iterable[Any], parts: int) -> _Items:
        return _Items(list(items))


@dataclass(frozen=True)
class _Items:
    """The methods of an RDD that the lakehouse uses."""

    items: list[Any]

    def map(self, task: Callable[[Any], Any]) -> _Items:
        task = pickled_copy(task)
        return _Items([task(pickled_copy(item)) for item in self.items])

    def collect(self) -> list[Any]:
        return self.items


@dataclass(frozen=True)
class Records:
    """The methods of a DataFrame of Kafka's records that the lakehouse uses.

    tasks: the number of tasks, each with a contiguous range of the records.
    """

    records: Sequence[Record]
    tasks: int

    def coalesce(self, _: int) -> Records:
        return self

    def mapInArrow(self, task: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]], _: str) -> _Items:
        in_order = sorted(self.records, key=lambda record: record.place)
        rows = arrow_records(in_order).select(RECORD)
        each = -(-len(in_order) // self.tasks) or 1
        task = pickled_copy(task)
        # A task without records has no batch, as in Spark.
        parts = [rows.slice(n * each, each) for n in range(self.tasks)]
        return _Items([row for part in parts for out in task(iter(part.to_batches())) for row in out.to_pylist()])


def pickled_copy(what: Any) -> Any:
    """A copy by pickling, as Spark sends it to an executor."""
    return pickle.loads(cloudpickle.dumps(what))  # type: ignore[no-untyped-call]


def checkpoint_of(folder: Path, query: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata").write_text(json.dumps({"id": query}))


def frame(spark: SparkSession, records: list[Record]) -> DataFrame:
    """A micro-batch as a Spark DataFrame."""
    return spark.createDataFrame(
        [
            (None, None if r.value is None else bytearray(r.value), r.topic, r.partition, r.offset, r.kafka_timestamp)
            for r in records
        ],
        "key BINARY, value BINARY, topic STRING, partition INT, offset BIGINT, kafka_timestamp TIMESTAMP",
    )


def in_kafka(values: Iterable[bytes | None], topic: str = "ticks", partition: int = 0, first: int = 0) -> list[Record]:
    """Values as records of one Kafka partition."""
    return [Record(topic, partition, offset, None, value) for offset, value in enumerate(values, first)]


def pieces(records: Sequence[Record], chance: random.Random, count: int) -> list[list[Record]]:
    """Split the records into `count` micro-batches of random sizes."""
    cuts = [0, *sorted(chance.sample(range(1, len(records)), count - 1)), len(records)]
    return [list(records[begin:end]) for begin, end in itertools.pairwise(cuts)]


def market(chance: random.Random) -> list[bytes]:
    """Ticks of three pairs around midnight: bursts, silences, jumps that alert, clocks that run ahead."""
    ticks: list[tuple[float, bytes]] = []
    for source, symbol, price in (("a", "X", 100.0), ("a", "Y", 0.5), ("b", "X", 101.0)):
        now = chance.uniform(0, 5)
        for trade_id in range(1, 260):
            now += chance.choice([0.0, 0.001, 0.2, 1.0, 3.0, 9.0, 31.0 if chance.random() < 0.5 else 0.5])
            price *= 1 + chance.choice(
                [0, 0, 0.001, -0.001, 0.004, -0.004, 0.012, -0.012, 0.03 * chance.choice([0, 0, 1, -1])]
            )
            at = START + timedelta(seconds=now)
            ahead = timedelta(seconds=chance.choice([0, -0.1, 1.25, 600 if chance.random() < 0.1 else 0]))
            tick: dict[str, object] = {
                "timestamp": at.isoformat(timespec="microseconds"),
                "asset": symbol.lower(),
                "price_usd": f"{price:.4f}",
                "quote": "USD",
                "source": source,
                "symbol": symbol,
                "event_time": (at + ahead).isoformat(timespec="microseconds"),
                "quantity": None if chance.random() < 0.1 else f"{chance.random():.5f}",
                "trade_id": trade_id if symbol == "X" else None,
                "trade_epoch": 0,
                "producer": f"p-{source}",
                "sequence": trade_id,
            }
            ticks.append((now, json.dumps(tick, separators=(",", ":")).encode()))
    ticks.sort(key=lambda pair: pair[0])
    return [value for _, value in ticks]


def lake_in(folder: Path, spark: SparkSession | None = None, **settings: Any) -> Settings:
    """The settings of an empty lake, with the checkpoint of the query that writes it."""
    checkpoint_of(folder / "checkpoint", QUERY)
    if spark:
        spark.sparkContext.setLocalProperty("sql.streaming.queryId", QUERY)
    return Settings(lake_root=f"file:{folder / 'lake'}", checkpoint=f"file:{folder / 'checkpoint'}", **settings)


def of_its_own(settings: Settings, folder: Path) -> Settings:
    """Topics of its own in the suite's Kafka, and a lake and a checkpoint in the folder, for a job that ends."""
    name = uuid.uuid4().hex[:8]
    topics = {topic: f"{topic.partition('_')[0]}-{name}" for topic in ("ticks_topic", "rejects_topic", "gaps_topic")}
    places = {"lake_root": f"file:{folder / 'lake'}", "checkpoint": f"file:{folder / 'checkpoint'}"}
    return settings.model_copy(update={**topics, **places, "once": True})


def opened(settings: Settings, spark: SparkSession | None = None, sink: Sink | None = None) -> Lakehouse:
    """Open the lakehouse, as a starting driver does."""
    return resume(spark or cast(SparkSession, WithoutSpark()), settings, sink)


def write_one(lakehouse: Lakehouse, records: list[Record], batch: int, tasks: int = 1) -> None:
    """Write a micro-batch without Spark."""
    lakehouse.write_batch(cast(DataFrame, Records(records, tasks)), batch)


def write(
    spark: SparkSession | None,
    settings: Settings,
    parts: Sequence[list[Record]],
    first: int = 0,
    sink: Sink | None = None,
    tasks: int = 1,
) -> Lakehouse:
    """Write each part as a micro-batch, numbered from `first` on, by a driver that starts before and ends after.

    spark: None: write without Spark, in `tasks` tasks.
    """
    lakehouse = opened(settings, spark, sink)
    for batch, part in enumerate(parts, first):
        if spark:
            lakehouse.write_batch(frame(spark, part), batch)
        else:
            write_one(lakehouse, part, batch, tasks)
    lakehouse.finish()
    return lakehouse
