"""What the fault tests share. Each runs small in scripts/test, and with its full count in scripts/faults."""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from pyspark.sql import SparkSession

from conf.settings import Settings
from ingestion.feeds import VENUES
from lake import reader
from lake.tables import SILVER_QUARANTINE
from simulator.market import trades
from streaming.lakehouse import resume
from streaming.ticks import start
from tests.programs import Program, kafka_count, kafka_records

FULL = os.environ.get("TICKHOUSE_FAULTS") == "full"
ASSETS = ("bitcoin", "ethereum")
RATE = 2_000
SEED = 7
MEMORY_LIMIT = 300e6

Trades = set[tuple[str, int]]
Events = set[tuple[str, int, int]]


def scaled(small: int, full: int) -> int:
    """How often, how many or how long: in scripts/test, and in scripts/faults."""
    return full if FULL else small


def market(count: int) -> Trades:
    """(symbol, trade id) of what the simulator makes of ASSETS, RATE and SEED."""
    symbols = {asset: VENUES["binance"].instruments[asset].symbol for asset in ASSETS}
    return {(symbols[trade.asset], trade.trade_id) for trade in islice(trades(ASSETS, RATE, SEED), count)}


def simulated(count: int, *more: str) -> tuple[str, ...]:
    """Arguments of a simulator that makes `count` such trades."""
    return (
        "--assets", ",".join(ASSETS), "--rate", str(RATE), "--seed", str(SEED), "--trades", str(count), *more,
    )  # fmt: skip


@dataclass
class Delivered:
    """What Kafka holds of one ingester's ticks, and what it says is missing."""

    trades: Trades = field(default_factory=set)
    """(symbol, trade id)"""
    records: int = 0
    sequences: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """By producer."""
    epochs: set[int] = field(default_factory=set)
    events: Events = field(default_factory=set)
    """(symbol, epoch, trade id)"""
    missing: Trades = field(default_factory=set)
    """Named by gaps that are open or unfillable."""

    @classmethod
    def of(cls, settings: Settings) -> Delivered:
        """Reads the topics. Checks that a number of a producer means one tick, and that numbers rise in a partition."""
        found = cls()
        meaning: dict[tuple[str, int], bytes] = {}
        newest: dict[tuple[str, int], int] = defaultdict(int)
        for record in kafka_records(settings, settings.ticks_topic):
            message = json.loads(record.value)
            producer, sequence = message["producer"], message["sequence"]
            assert meaning.setdefault((producer, sequence), record.value) == record.value
            if sequence not in found.sequences[producer]:
                assert sequence > newest[producer, record.partition]
                newest[producer, record.partition] = sequence
            found.records += 1
            found.sequences[producer].add(sequence)
            found.trades.add((message["symbol"], message["trade_id"]))
            found.epochs.add(message["trade_epoch"])
            found.events.add((message["symbol"], message["trade_epoch"], message["trade_id"]))
        rows: dict[str, dict[str, Any]] = {}
        for record in kafka_records(settings, settings.gaps_topic):
            row = json.loads(record.value)
            rows[row["gap_id"]] = row
        for row in rows.values():
            if row["status"] != "filled" and row["first_missing"] is not None:
                found.missing |= {(row["symbol"], n) for n in range(row["first_missing"], row["last_missing"] + 1)}
        return found

    def assert_one_identity_without_holes(self) -> None:
        (numbers,) = self.sequences.values()
        assert numbers == set(range(1, len(numbers) + 1))


@pytest.fixture
def own(running: Callable[..., Settings]) -> Settings:
    """Kafka answers; the topics are this test's own."""
    settings = running("kafka")
    name = uuid.uuid4().hex[:8]
    topics = {topic: f"{topic.partition('_')[0]}-{name}" for topic in ("ticks_topic", "rejects_topic", "gaps_topic")}
    return settings.model_copy(update=topics)


def in_one_epoch(trades: Iterable[tuple[str, int]]) -> Events:
    """The events of a venue that never starts its numbers again."""
    return {(symbol, 0, trade_id) for symbol, trade_id in trades}


def lost(made: Events, delivered: Events) -> Events:
    """What was made and not delivered between the first and the last that was, of each symbol and epoch."""
    ids: dict[tuple[str, int], list[int]] = defaultdict(list)
    for symbol, epoch, trade_id in delivered:
        ids[symbol, epoch].append(trade_id)
    ends = {key: (min(numbers), max(numbers)) for key, numbers in ids.items()}
    return {
        (symbol, epoch, trade_id)
        for symbol, epoch, trade_id in made - delivered
        if (symbol, epoch) in ends and ends[symbol, epoch][0] < trade_id < ends[symbol, epoch][1]
    }


@pytest.fixture
def in_silver(own: Settings, spark: SparkSession, tmp_path: Path) -> Callable[[Delivered, Events], dict[str, object]]:
    """`in_silver(found, made)`: streams this test's topics into a lake of its own, and compares ids. Returns figures.

    silver.ticks has each event that Kafka has exactly once. silver.gaps names as open or unfillable exactly those of
    `made` that are lost, and as filled only what silver.ticks has.
    """

    def check(found: Delivered, made: Events) -> dict[str, object]:
        began = time.monotonic()
        root = f"file:{tmp_path / 'lake'}"
        lake = {"lake_root": root, "checkpoint": f"file:{tmp_path / 'checkpoint'}", "once": True}
        # In several micro-batches silver sees gaps open that are filled later.
        cut = {"max_offsets_per_trigger": found.records // 5 + 1} if FULL else {}
        settings = own.model_copy(update=lake | cut)
        start(spark, settings, resume(spark, settings)).awaitTermination()
        ticks = reader.query(root, "SELECT symbol, trade_epoch, trade_id FROM silver.ticks")
        events = set(zip(*(column.to_pylist() for column in ticks.columns), strict=True))
        assert events == found.events
        assert ticks.num_rows == len(events)
        missing: list[tuple[str, int, int]] = []
        filled: Events = set()
        for gap in reader.query(root, "SELECT * FROM silver.gaps").to_pylist():
            ids = range(gap["first_missing"], gap["last_missing"] + 1)
            rows = [(gap["symbol"], gap["trade_epoch"], trade_id) for trade_id in ids]
            if gap["status"] == "filled":
                filled.update(rows)
            else:
                missing += rows
        assert set(missing) == lost(made, found.events)
        assert len(missing) == len(set(missing))
        assert filled <= events
        assert reader.row_count(root, SILVER_QUARANTINE) == kafka_count(own, own.rejects_topic)
        figures = {"silver": len(events), "silver_missing": len(missing), "silver_filled": len(filled)}
        return {**figures, "streamed_in": round(time.monotonic() - began, 1)}

    return check


class Memory:
    """The most that a program has held."""

    def __init__(self, program: Program) -> None:
        self._process = psutil.Process(program.process.pid)
        self.most = 0

    def look(self) -> bool:
        """Take note; always true, to stand in a condition that is polled."""
        self.most = max(self.most, self._process.memory_info().rss)
        return True


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`show(name=figure, ...)`: one line of JSON that scripts/faults prints."""

    def say(**figures: object) -> None:
        name = request.node.name.removeprefix("test_")
        print(json.dumps({"fault": name, **figures}), file=sys.stderr, flush=True)

    return say


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
