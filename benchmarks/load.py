"""The load of benchmarks/run.py: sends ticks of N instruments, invalid records and repeats to Kafka.

The records are ingestion's: ingestion/ticks.py encodes them, and ingestion/publisher.py chooses their partition.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from conf.settings import Settings
from ingestion.publisher import publisher
from ingestion.ticks import Tick

# Key and value of a Kafka record.
Record = tuple[bytes, bytes]

# A venue whose trade ids have no holes. The streaming job looks for holes, and finds none here.
SOURCE = "binance"
FIRST_TRADE_ID = 1_000
# From the trade to its frame.
DELAY_NS = 20_000_000
# Standard deviation of a price's relative change in a second: a calm market, so that the load opens no alerts.
VOLATILITY = 2e-4
# Every second repeat comes so much later than its tick, in another micro-batch.
REPEAT_AFTER_NS = 3_000_000_000
# Seconds between two groups of records.
PAUSE = 0.005
# Kafka must create the topics, and acknowledge the last record, within so many seconds.
KAFKA_LIMIT = 60.0


class LoadFailed(RuntimeError):
    """Kafka did not take the load."""

    exit_code = 7


@dataclass(frozen=True)
class Shape:
    """The mix of records. odd_share: invalid records, repeat_share: repeats, both as a share of the ticks."""

    instruments: int
    odd_share: float = 0.0
    repeat_share: float = 0.0


class Market:
    """Makes the records. Trade ids ascend per instrument, sequences ascend."""

    def __init__(self, shape: Shape, rate: float, producer: str, seed: int = 5, after: Market | None = None) -> None:
        """after: a market of the same instruments and another producer, whose prices and trade ids go on."""
        self._shape = shape
        self._producer = producer
        self._random = random.Random(seed)
        # The more instruments share the rate, the rarer and so the larger are an instrument's price changes.
        self._step = VOLATILITY * math.sqrt(shape.instruments / rate)
        self._prices = [self._random.uniform(0.1, 50_000) for _ in range(shape.instruments)]
        self._trade_ids = [FIRST_TRADE_ID] * shape.instruments
        if after:
            self._prices, self._trade_ids = list(after._prices), list(after._trade_ids)
        self._late_repeats: deque[tuple[int, Record]] = deque()
        self.ticks = self.non_ticks = self.repeats = 0

    @property
    def records(self) -> int:
        """The number of records made so far, without the late repeats still to come."""
        return self.ticks + self.non_ticks + self.repeats - len(self._late_repeats)

    def next_records(self, now_ns: int) -> Iterator[Record]:
        """The next tick, late repeats that are due, and perhaps an invalid record or a repeat."""
        while self._late_repeats and self._late_repeats[0][0] <= now_ns:
            yield self._late_repeats.popleft()[1]
        tick = self._next_tick(now_ns)
        record = (tick.key, tick.to_json(self._producer, self.ticks))
        yield record
        if self._random.random() < self._shape.odd_share:
            self.non_ticks += 1
            yield tick.key, self._non_tick(record[1])
        if self._random.random() < self._shape.repeat_share:
            self.repeats += 1
            if self.repeats % 2:
                yield record
            else:
                self._late_repeats.append((now_ns + REPEAT_AFTER_NS, record))

    def last_records(self) -> Iterator[Record]:
        """The late repeats that are still to come at the load's end."""
        while self._late_repeats:
            yield self._late_repeats.popleft()[1]

    def _next_tick(self, now_ns: int) -> Tick:
        number = self._random.randrange(self._shape.instruments)
        self._prices[number] *= 1 + self._random.gauss(0, self._step)
        self._trade_ids[number] += 1
        self.ticks += 1
        return Tick(
            received_ns=now_ns,
            asset=f"a{number:05d}",
            price_usd=f"{self._prices[number]:.4f}",
            quote="USDT",
            source=SOURCE,
            symbol=f"A{number:05d}USDT",
            event_ns=now_ns - DELAY_NS,
            quantity=f"{self._random.uniform(0.001, 5):.5f}",
            trade_id=self._trade_ids[number],
        )

    def _non_tick(self, value: bytes) -> bytes:
        """An invalid record: in turn no JSON, JSON without a tick's fields, and a truncated tick."""
        return (b"no JSON", b'{"timestamp":"x"}', value[: len(value) // 2])[self.non_ticks % 3]


class Load(threading.Thread):
    """Creates the topics, and sends a market's records at a rate."""

    def __init__(self, settings: Settings, market: Market, rate: float, seconds: float) -> None:
        super().__init__(name="load", daemon=True)
        self._settings = settings.model_copy(update={"kafka_client": "confluent-kafka"})
        self._market = market
        self._rate = rate
        self._count = round(rate * seconds)
        self._gate = threading.Event()
        self._stop_event = threading.Event()
        self._failure: Exception | None = None
        self.topics_exist = threading.Event()
        # Seconds since 1970.
        self.began = self.ended = 0.0

    def begin(self) -> None:
        """Send the first record."""
        self.began = time.time()
        self._gate.set()

    def stop(self) -> None:
        """Stop sending, for instance because the job has died."""
        self._stop_event.set()
        self._gate.set()
        self.join(2 * KAFKA_LIMIT)

    def check(self) -> None:
        """Raises LoadFailed if Kafka did not take the load."""
        if self._failure is not None:
            raise LoadFailed(f"Kafka at {self._settings.kafka_bootstrap_servers}: {self._failure!r}")

    def run(self) -> None:
        try:
            asyncio.run(self._send_all())
        except Exception as error:  # noqa: BLE001 - the main thread raises it, in check()
            self._failure = error
        finally:
            self.ended = time.time()

    async def _send_all(self) -> None:
        kafka, topic, market = publisher(self._settings), self._settings.ticks_topic, self._market
        await asyncio.wait_for(kafka.start(), KAFKA_LIMIT)
        self.topics_exist.set()
        await asyncio.to_thread(self._gate.wait)
        try:
            while market.ticks < self._count and not self._stop_event.is_set():
                due = min(self._count, int((time.time() - self.began) * self._rate))
                while market.ticks < due:
                    for key, value in market.next_records(time.time_ns()):
                        await kafka.send(topic, key, value)
                await asyncio.sleep(PAUSE)
            for key, value in market.last_records():
                await kafka.send(topic, key, value)
            if open_records := await kafka.flush(KAFKA_LIMIT):
                raise LoadFailed(f"{open_records} records are not acknowledged after {KAFKA_LIMIT:.0f} s")
        finally:
            await kafka.close()
