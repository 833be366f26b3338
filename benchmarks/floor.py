"""The floor: a hand-written consumer of a topic of ticks, with confluent-kafka, polars and deltalake.

    python -m benchmarks.floor --servers HOST:PORT --topic TOPIC --lake FOLDER

Reads what the topic holds now, in batches, into Delta tables below FOLDER: bronze.ticks (the records as delivered),
silver.ticks (distinct ticks), gold.price_1m (a minute of an asset at a venue). Prints one line of JSON: the seconds
from the first read to the end. Runs in the environment that scripts/bench makes.

It is what the job costs at least, and no more than that: every record has to be a tick with a trade id, nothing else
of gold is made, a crash in the middle is not recovered from, and nobody keeps a second writer away. It writes to the
local disk: to HDFS, deltalake waits for half a second whenever it closes a file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import polars as pl
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Message, TopicPartition

BATCH = 100_000
PRICE, SUM = pl.Decimal(28, 12), pl.Decimal(38, 12)
INSTRUMENT, WINDOW = ["source", "symbol", "trade_epoch"], ["source", "asset", "window_start"]
ORDER = ("event_time", "trade_id")
MESSAGE: dict[str, type[pl.DataType]] = {
    "timestamp": pl.String,
    "asset": pl.String,
    "price_usd": pl.String,
    "quote": pl.String,
    "source": pl.String,
    "symbol": pl.String,
    "event_time": pl.String,
    "quantity": pl.String,
    "trade_id": pl.Int64,
    "trade_epoch": pl.Int64,
    "producer": pl.String,
    "sequence": pl.Int64,
}


def records(servers: str, topic: str) -> Iterator[list[Message]]:
    """What the topic holds now, in batches."""
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "floor", "enable.auto.commit": False})
    partitions = [TopicPartition(topic, number) for number in consumer.list_topics(topic).topics[topic].partitions]
    left = sum(high - low for low, high in map(consumer.get_watermark_offsets, partitions))
    consumer.assign([TopicPartition(topic, place.partition, OFFSET_BEGINNING) for place in partitions])
    while left:
        batch = consumer.consume(min(BATCH, left), timeout=60)
        for message in batch:
            if error := message.error():
                raise KafkaException(error)
        if not batch:
            raise TimeoutError(f"Kafka does not give the last {left} records of {topic}")
        left -= len(batch)
        yield batch
    consumer.close()


def bronze(batch: list[Message]) -> pl.DataFrame:
    """Records as delivered."""
    columns = {
        "key": [message.key() for message in batch],
        "value": [message.value() for message in batch],
        "topic": [message.topic() for message in batch],
        "partition": pl.Series([message.partition() for message in batch], dtype=pl.Int32),
        "offset": [message.offset() for message in batch],
        "kafka_timestamp": pl.Series([message.timestamp()[1] for message in batch]).cast(pl.Datetime("ms", "UTC")),
    }
    now = datetime.now(UTC)
    return pl.DataFrame(columns).with_columns(pl.lit(now).alias("ingested_at"), pl.lit(now.date()).alias("ingest_date"))


def silver(records: pl.DataFrame) -> pl.DataFrame:
    """Records as ticks."""
    ticks = pl.read_ndjson(b"\n".join(records["value"]), schema=MESSAGE)
    event_time = pl.col("event_time").str.to_datetime("%Y-%m-%dT%H:%M:%S%.fZ", time_unit="us", time_zone="UTC")
    received_at = pl.col("timestamp").str.to_datetime("%Y-%m-%dT%H:%M:%S%.fZ", time_unit="us", time_zone="UTC")
    return ticks.select(
        pl.format("{}:{}:{}:{}", *INSTRUMENT, "trade_id").alias("event_id"),
        *("source", "symbol", "asset", "quote"),
        pl.col("price_usd", "quantity").cast(PRICE),
        *("trade_id", "trade_epoch"),
        event_time,
        received_at.alias("received_at"),
        *("producer", "sequence"),
        records["partition"].alias("kafka_partition"),
        records["offset"].alias("kafka_offset"),
        event_time.dt.date().alias("event_date"),
    )


class Seen:
    """The trade ids so far, as the intervals [first, last] of each instrument without a hole."""

    def __init__(self) -> None:
        instrument = {name: MESSAGE[name] for name in INSTRUMENT}
        self.intervals = pl.DataFrame(schema={**instrument, "first": pl.Int64, "last": pl.Int64})

    def only_new(self, ticks: pl.DataFrame) -> pl.DataFrame:
        """The ticks whose ids were not seen, each once; from now on they are seen."""
        ticks = ticks.unique([*INSTRUMENT, "trade_id"], keep="first", maintain_order=True)
        lowest = ticks.group_by(INSTRUMENT).agg(pl.col("trade_id").min().alias("lowest"))
        near_runs = self.intervals.join(lowest, on=INSTRUMENT).filter(pl.col("last") >= pl.col("lowest"))
        if not near_runs.is_empty():
            within = pl.col("trade_id").is_between("first", "last")
            repeated = ticks.join(near_runs, on=INSTRUMENT).filter(within)
            ticks = ticks.join(repeated, on=[*INSTRUMENT, "trade_id"], how="anti", maintain_order="left")
        ids = ticks.select(*INSTRUMENT, pl.col("trade_id").alias("first"), pl.col("trade_id").alias("last"))
        intervals = pl.concat([self.intervals, ids]).sort(*INSTRUMENT, "first")
        after_a_hole = pl.col("first") > pl.col("last").shift(1).over(INSTRUMENT) + 1
        run = after_a_hole.fill_null(True).cum_sum().alias("run")
        joined = intervals.with_columns(run).group_by(*INSTRUMENT, "run")
        self.intervals = joined.agg(pl.col("first").min(), pl.col("last").max()).drop("run")
        return ticks


def summaries(ticks: pl.DataFrame) -> pl.DataFrame:
    """Each tick as a summary of one."""
    price, quantity = pl.col("price_usd"), pl.col("quantity")
    return ticks.select(
        *("source", "asset"),
        pl.col("event_time").dt.truncate("1m").alias("window_start"),
        *(price.alias(name) for name in ("open", "high", "low", "close")),
        price.cast(SUM).alias("price_sum"),
        quantity.cast(SUM).alias("volume"),
        (price * quantity).cast(SUM).alias("notional"),
        pl.lit(1, pl.Int64).alias("tick_count"),
        *(pl.col(name).alias(f"{end}_{name}") for end in ("first", "last") for name in ORDER),
    )


def merged(summaries: pl.DataFrame) -> pl.DataFrame:
    """One summary a window."""
    first, last = ([f"{end}_{name}" for name in ORDER] for end in ("first", "last"))
    return summaries.group_by(WINDOW).agg(
        pl.col("open", *first).sort_by(first).first(),
        pl.col("close", *last).sort_by(last).last(),
        pl.col("high").max(),
        pl.col("low").min(),
        pl.col("price_sum", "volume", "notional", "tick_count").sum(),
    )


def prices(summaries: pl.DataFrame) -> pl.DataFrame:
    """Summaries as rows of gold."""
    return summaries.select(
        *WINDOW,
        *("open", "high", "low", "close"),
        (pl.col("price_sum") / pl.col("tick_count")).cast(PRICE).alias("average"),
        "volume",
        (pl.col("notional") / pl.col("volume")).cast(PRICE).alias("vwap"),
        "tick_count",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", required=True, help="HOST:PORT of Kafka brokers")
    parser.add_argument("--topic", required=True, help="topic of the ticks")
    parser.add_argument("--lake", required=True, metavar="FOLDER", help="where the tables are made")
    options = parser.parse_args()
    seen, gold = Seen(), None
    began = time.monotonic()
    for batch in records(options.servers, options.topic):
        delivered = bronze(batch)
        delivered.write_delta(f"{options.lake}/bronze/ticks", mode="append")
        ticks = seen.only_new(silver(delivered))
        ticks.write_delta(f"{options.lake}/silver/ticks", mode="append")
        new = summaries(ticks)
        gold = merged(new if gold is None else pl.concat([gold, new.select(gold.columns)]))
        prices(gold).write_delta(f"{options.lake}/gold/price_1m", mode="overwrite")
    print(json.dumps({"first_read_to_end": round(time.monotonic() - began, 2)}))


if __name__ == "__main__":
    main()
