"""Micro-batches without Kafka: records in, and what the tables hold then."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession

from conf.settings import Settings
from lake.sinks import Sink
from streaming.lakehouse import Lakehouse, resume
from tests.oracle import Record

START = datetime(2024, 8, 9, 23, 50, tzinfo=UTC)


def checkpoint_of(folder: Path, query: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metadata").write_text(json.dumps({"id": query}))


def frame(spark: SparkSession, records: list[Record]) -> DataFrame:
    """A micro-batch, as the lakehouse takes it."""
    return spark.createDataFrame(
        [
            (None, None if r.value is None else bytearray(r.value), r.topic, r.partition, r.offset, r.kafka_timestamp)
            for r in records
        ],
        "key BINARY, value BINARY, topic STRING, partition INT, offset BIGINT, kafka_timestamp TIMESTAMP",
    )


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


def lake_in(folder: Path, spark: SparkSession) -> Settings:
    """An empty lake, and the checkpoint of query q."""
    checkpoint_of(folder / "checkpoint", "q")
    spark.sparkContext.setLocalProperty("sql.streaming.queryId", "q")
    return Settings(lake_root=f"file:{folder / 'lake'}", checkpoint=f"file:{folder / 'checkpoint'}")


def write(
    spark: SparkSession, settings: Settings, parts: Sequence[list[Record]], first: int = 0, sink: Sink | None = None
) -> Lakehouse:
    """Each part as a micro-batch, from the one numbered `first` on."""
    lakehouse = resume(spark, settings, sink)
    for batch, part in enumerate(parts, first):
        lakehouse.write_batch(frame(spark, part), batch)
    lakehouse.finish()
    return lakehouse
