"""Pathway at the smaller job: ticks and their minutes as lines of JSON.

    python -m benchmarks.with_pathway --servers HOST:PORT --topic TOPIC --out FOLDER

Reads what the topic holds now (mode "static"), writes each tick to FOLDER/ticks.jsonl, and each change of a minute of
an asset at a venue to FOLDER/windows.jsonl. Prints one line of JSON: the seconds from the first read to the end. Runs
in the environment that scripts/bench makes.

There is no bronze, nothing is deduplicated or checked, prices are floats, and nothing else of gold is made: Delta
output wants a licence key. A minute is grouped by its beginning, which costs Pathway a tenth less than its own
tumbling window. Without a licence key it sends no telemetry.
"""

from __future__ import annotations

import argparse
import json
import time
import uuid
from pathlib import Path

import pathway as pw


class Message(pw.Schema):  # type: ignore[misc]  # Pathway is not there where types are checked
    timestamp: str
    asset: str
    price_usd: str
    quote: str
    source: str
    symbol: str
    event_time: str
    quantity: str
    trade_id: int
    trade_epoch: int
    producer: str
    sequence: int


def ticks(messages: pw.Table) -> pw.Table:
    return messages.with_columns(
        event_time=pw.this.event_time.dt.strptime("%Y-%m-%dT%H:%M:%S.%fZ"),
        price_usd=pw.this.price_usd.str.parse_float(),
        quantity=pw.this.quantity.str.parse_float(),
    )


def windows(ticks: pw.Table) -> pw.Table:
    minutes = ticks.with_columns(window_start=pw.this.event_time.dt.floor("1min"))
    return minutes.groupby(minutes.source, minutes.asset, minutes.window_start).reduce(
        pw.this.source,
        pw.this.asset,
        pw.this.window_start,
        high=pw.reducers.max(pw.this.price_usd),
        low=pw.reducers.min(pw.this.price_usd),
        average=pw.reducers.avg(pw.this.price_usd),
        volume=pw.reducers.sum(pw.this.quantity),
        tick_count=pw.reducers.count(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", required=True, help="HOST:PORT of Kafka brokers")
    parser.add_argument("--topic", required=True, help="topic of the ticks")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the lines of JSON are written")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    consumer = {
        "bootstrap.servers": options.servers,
        "group.id": f"pathway-{uuid.uuid4().hex[:8]}",
        "auto.offset.reset": "earliest",
    }
    messages = pw.io.kafka.read(consumer, topic=options.topic, schema=Message, format="json", mode="static")
    every_tick = ticks(messages)
    pw.io.jsonlines.write(every_tick, options.out / "ticks.jsonl")
    pw.io.jsonlines.write(windows(every_tick), options.out / "windows.jsonl")
    began = time.monotonic()
    pw.run(monitoring_level=pw.MonitoringLevel.NONE)
    print(json.dumps({"first_read_to_end": round(time.monotonic() - began, 2)}))


if __name__ == "__main__":
    main()
