"""What the fault tests share. Each runs small in scripts/test, and with its full count in scripts/faults."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest

from conf.settings import Settings
from ingestion.instruments import INSTRUMENTS
from simulator.market import trades
from tests.programs import Program, kafka_records

FULL = os.environ.get("TICKHOUSE_FAULTS") == "full"
ASSETS = ("bitcoin", "ethereum")
RATE = 2_000
SEED = 7
MEMORY_LIMIT = 300e6

Trades = set[tuple[str, int]]


def scaled(small: int, full: int) -> int:
    """How often, how many or how long: in scripts/test, and in scripts/faults."""
    return full if FULL else small


def market(count: int) -> Trades:
    """(symbol, trade id) of what the simulator makes of ASSETS, RATE and SEED."""
    symbols = {asset: INSTRUMENTS["binance"][asset].symbol for asset in ASSETS}
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
    events: set[tuple[str, int, int]] = field(default_factory=set)
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
