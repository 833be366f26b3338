"""What ingestion costs: `python -m benchmarks.ingestion [--ticks 200000]`, with the suite's Kafka running.

Prints lines of JSON: the processor time of each stage, in us a tick, in a loop of its own; then a simulated venue and
an ingester as processes: the ingester's processor time a tick with what that makes in ticks/s on one core, and at
2,000 ticks/s the time from a frame's receipt to Kafka's acknowledgement, and to a consumer, in ms; then how long an
ingester takes to find 1,000,000 ticks in its spool.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from statistics import quantiles
from typing import Any

import psutil
from kafka import KafkaConsumer

from conf.settings import PROJECT, Settings, arguments, flag, from_command_line
from ingestion.counts import Counts
from ingestion.feeds import make_feed
from ingestion.gaps import GapTracker
from ingestion.intake import Intake, Topics
from ingestion.operation import fetch_status
from ingestion.publisher import publisher
from ingestion.spool import Spool
from ingestion.ticks import Tick
from simulator.dialects import Listing
from simulator.dialects.binance import Binance
from simulator.market import trades

ASSETS = ["bitcoin", "ethereum"]
PACE = 2_000
BACKLOG = 1_000_000


def say(**figures: object) -> None:
    print(json.dumps(figures), flush=True)


class Stage:
    """The processor time of this process within `with`, threads too."""

    def __init__(self, name: str, ticks: int) -> None:
        self._name, self._ticks = name, ticks

    def __enter__(self) -> None:
        self._began = time.process_time()

    def __exit__(self, *_: object) -> None:
        say(stage=self._name, us_a_tick=round((time.process_time() - self._began) / self._ticks * 1e6, 2))


async def stages(settings: Settings, topics: Topics, count: int, folder: Path) -> None:
    """Each stage by itself."""
    market = islice(trades(ASSETS, PACE, 1), count)
    frames = [frame.text.encode() for frame in Binance(Listing("binance", ASSETS)).frames(market, 1_700_000_000_000)]
    feed = make_feed("binance", ASSETS)
    with Stage("decode", count):
        events = [event for frame in frames for event in feed.receive(frame, 1_700_000_000_000_000_000)]
    ticks = [event for event in events if isinstance(event, Tick)]
    tracker = GapTracker()
    with Stage("follow the numbers", count):
        for tick in ticks:
            tracker.observe(tick)
    with Stage("encode", count):
        for number, tick in enumerate(ticks):
            tick.to_json("0123456789abcdef", number)

    spool = Spool(folder, settings.spool_fsync_ms, settings.spool_max_bytes)
    writing = asyncio.create_task(spool.run())
    intake = Intake(feed, spool, Counts(), topics, GapTracker())
    with Stage("decode, follow, encode, spool durably", count):
        for number, frame in enumerate(frames):
            await intake.frame(frame, 1_700_000_000_000_000_000)
            if number % 100 == 0:
                await asyncio.sleep(0)
        await spool.durable(spool.end)
    with Stage("read the spool", count):
        while spool.read():
            pass
    spool.rewind()
    kafka = publisher(settings)
    await kafka.start()
    with Stage(f"read the spool, send by {settings.kafka_client} until acknowledged", count):
        while records := spool.read():
            for record in records:
                await kafka.send(*record)
            await asyncio.sleep(0)
        await kafka.flush(600)
    await kafka.close()
    spool.stop()
    await writing
    spool.close()


@contextmanager
def running(settings: Settings, topics: Topics, folder: Path, *market: str) -> Iterator[psutil.Popen]:
    """A simulated venue, and the ingester that listens to it."""
    venue = [sys.executable, "-m", "simulator", "--assets", ",".join(ASSETS), *market]
    with subprocess.Popen(venue, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as source:
        assert source.stdout is not None
        url = json.loads(source.stdout.readline())["url"]
        given = {
            "url": url, "assets": ",".join(ASSETS), "spool_dir": folder, "metrics_port": 0,
            "kafka_bootstrap_servers": settings.kafka_bootstrap_servers, "ticks_topic": topics.ticks,
            "rejects_topic": topics.rejects, "gaps_topic": topics.gaps, "backfill_max_trades": 0,
            "kafka_client": settings.kafka_client,
        }  # fmt: skip
        flags = [text for name, value in given.items() for text in (flag(name), str(value))]
        command = [sys.executable, "-m", "ingestion", *flags]
        with psutil.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as program:
            try:
                yield program
            finally:
                program.terminate()
                program.wait()
                source.terminate()


def status(folder: Path) -> dict[str, Any]:
    """What the ingester says of itself, once it does."""
    while True:
        told = fetch_status(folder)
        if told is not None:
            return told
        time.sleep(0.1)


def throughput(settings: Settings, topics: Topics, count: int, folder: Path) -> None:
    with running(settings, topics, folder, "--speed", "0", "--trades", str(count)) as program:
        first = status(folder)
        before, began = program.cpu_times(), time.monotonic()
        while (last := status(folder))["published"] < count:
            time.sleep(0.2)
        after, took = program.cpu_times(), time.monotonic() - began
    ticks = last["published"] - first["published"]
    cpu = after.user + after.system - before.user - before.system
    say(
        figure=f"throughput, spool on, {settings.kafka_client}", ticks=ticks, cpu_us_a_tick=round(cpu / ticks * 1e6, 1),
        ticks_a_second_on_one_core=round(ticks / cpu), ticks_a_second_here=round(ticks / took),
        memory_mb=round(last["memory_bytes"] / 1e6),
    )  # fmt: skip


def latency(settings: Settings, topics: Topics, seconds: int, folder: Path) -> None:
    lags: list[float] = []
    delays: list[float] = []
    with running(settings, topics, folder, "--rate", str(PACE)):
        status(folder)
        consumer = KafkaConsumer(topics.ticks, bootstrap_servers=settings.kafka_bootstrap_servers)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for records in consumer.poll(timeout_ms=50).values():
                now = time.time()
                for record in records:
                    received = datetime.fromisoformat(json.loads(record.value)["timestamp"]).timestamp()
                    delays.append((now - received) * 1e3)
            lags.append(status(folder)["lag_seconds"] * 1e3)
        consumer.close()
    acknowledged, consumed = quantiles(lags, n=100), quantiles(delays, n=100)
    say(
        figure=f"ms at {PACE}/s", samples=len(delays),
        durable_to_acknowledged={"p50": round(acknowledged[49], 1), "p99": round(acknowledged[98], 1)},
        frame_to_consumer={"p50": round(consumed[49], 1), "p99": round(consumed[98], 1)},
    )  # fmt: skip


async def recovery(folder: Path) -> None:
    spool = Spool(folder, 10.0, 1 << 40)
    writing = asyncio.create_task(spool.run())
    for number in range(BACKLOG):
        spool.append("ticks", b"binance:BTCUSDT", b"%-300d" % number, numbered=True)
        if number % 1_000 == 0:
            await spool.room()
    spool.stop()
    await writing
    spool.close()
    began = time.monotonic()
    spool = Spool(folder, 10.0, 1 << 40)
    opened = time.monotonic() - began
    assert spool.undelivered == spool.sequence == BACKLOG
    while spool.read():
        pass
    say(figure="recovery", ticks=BACKLOG, opened_in=round(opened, 3), read_again_in=round(time.monotonic() - began, 2))
    spool.close()


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "kafka_bootstrap_servers", "kafka_client")
    parser.add_argument("--ticks", type=int, default=200_000, metavar="N", help="default: 200000")
    parser.add_argument("--seconds", type=int, default=20, metavar="N", help="of 2,000 ticks/s (default: 20)")
    settings, given = from_command_line(parser, argv)
    name = uuid.uuid4().hex[:8]
    topics = Topics(f"ticks-{name}", f"rejects-{name}", f"gaps-{name}")
    own = settings.model_copy(
        update={"ticks_topic": topics.ticks, "rejects_topic": topics.rejects, "gaps_topic": topics.gaps}
    )
    with tempfile.TemporaryDirectory(dir=PROJECT / ".tickhouse") as folder:
        asyncio.run(stages(own, topics, given.ticks, Path(folder, "stages")))
        throughput(own, topics, given.ticks, Path(folder, "throughput"))
        latency(own, topics, given.seconds, Path(folder, "latency"))
        asyncio.run(recovery(Path(folder, "recovery")))


if __name__ == "__main__":
    main()
