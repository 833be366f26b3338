"""What ingestion costs: `python -m benchmarks.ingestion [--ticks 200000]`, with the suite's Kafka running.

Prints lines of JSON: the processor time of each stage, in us a tick, in a loop of its own; then a simulated venue and
an ingester as processes: the ingester's processor time a tick with what that makes in ticks/s on one core, and at
2,000 ticks/s the time from a frame's receipt to Kafka's acknowledgement (of the oldest of each group that is synced
together), and to a consumer, in ms; then what an ingester takes that was killed (-9) with 1,000,000 ticks in its spool:
to find them, to read them, and from its start to its first answer, to the first of them in Kafka, and to the last.
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
NOBODY = "127.0.0.1:1"


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
def venue(*market: str) -> Iterator[str]:
    """A simulated venue; its address."""
    command = [sys.executable, "-m", "simulator", "--assets", ",".join(ASSETS), *market]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as source:
        assert source.stdout is not None
        try:
            yield json.loads(source.stdout.readline())["url"]
        finally:
            source.terminate()
            source.communicate()


@contextmanager
def ingester(settings: Settings, topics: Topics, folder: Path, url: str) -> Iterator[psutil.Popen]:
    """An ingester that listens to a venue, with its spool in the folder."""
    values = {
        "url": url, "assets": ",".join(ASSETS), "spool_dir": folder, "metrics_port": 0,
        "kafka_bootstrap_servers": settings.kafka_bootstrap_servers, "ticks_topic": topics.ticks,
        "rejects_topic": topics.rejects, "gaps_topic": topics.gaps, "backfill_max_trades": 0,
        "kafka_client": settings.kafka_client,
    }  # fmt: skip
    flags = [text for name, value in values.items() for text in (flag(name), str(value))]
    command = [sys.executable, "-m", "ingestion", *flags]
    with psutil.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as program:
        try:
            yield program
        finally:
            if program.poll() is None:
                program.terminate()
            program.wait()


def status(folder: Path) -> dict[str, Any]:
    """What the ingester says of itself, once it does."""
    while True:
        status = fetch_status(folder)
        if status is not None:
            return status
        time.sleep(0.1)


def throughput(settings: Settings, topics: Topics, count: int, folder: Path) -> None:
    with venue("--speed", "0", "--trades", str(count)) as url, ingester(settings, topics, folder, url) as program:
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
    with venue("--rate", str(PACE)) as url, ingester(settings, topics, folder, url):
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
        frame_to_acknowledged={"p50": round(acknowledged[49], 1), "p99": round(acknowledged[98], 1)},
        frame_to_consumer={"p50": round(consumed[49], 1), "p99": round(consumed[98], 1)},
    )  # fmt: skip


def recovery(settings: Settings, topics: Topics, count: int, folder: Path) -> None:
    without_kafka = settings.model_copy(update={"kafka_bootstrap_servers": NOBODY})
    with (
        venue("--speed", "0", "--trades", str(count)) as url,
        ingester(without_kafka, topics, folder, url) as program,
    ):
        while status(folder)["received"] < count:
            time.sleep(0.2)
        # The last of them become durable.
        time.sleep(1)
        memory = status(folder)["memory_bytes"]
        program.kill()
        program.wait()
    opened, read = asyncio.run(reopened(folder))
    began = time.monotonic()
    with ingester(settings, topics, folder, f"ws://{NOBODY}/stream"):
        waiting = status(folder)["undelivered"]
        answers = time.monotonic() - began
        while not status(folder)["published"]:
            time.sleep(0.01)
        first = time.monotonic() - began
        while status(folder)["undelivered"]:
            time.sleep(0.1)
        last = time.monotonic() - began
    say(
        figure=f"recovery after kill -9, {settings.kafka_client}", ticks=waiting, memory_mb=round(memory / 1e6),
        opened_in=round(opened, 2), read_in=round(read, 2), answers_after=round(answers, 2),
        first_in_kafka_after=round(first, 2), all_in_kafka_after=round(last, 1),
    )  # fmt: skip


async def reopened(folder: Path) -> tuple[float, float]:
    """Seconds that opening a spool takes, and reading it."""
    began = time.monotonic()
    spool = Spool(folder, 10.0, 1 << 40)
    opened = time.monotonic() - began
    while spool.read():
        pass
    read = time.monotonic() - began - opened
    spool.close()
    return opened, read


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "kafka_bootstrap_servers", "kafka_client")
    parser.add_argument("--ticks", type=int, default=200_000, metavar="N", help="default: 200000")
    parser.add_argument("--seconds", type=int, default=20, metavar="N", help="of 2,000 ticks/s (default: 20)")
    parser.add_argument("--backlog", type=int, default=1_000_000, metavar="N", help="ticks (default: 1000000)")
    settings, options = from_command_line(parser, argv)
    name = uuid.uuid4().hex[:8]
    topics = Topics(f"ticks-{name}", f"rejects-{name}", f"gaps-{name}")
    own = settings.model_copy(
        update={"ticks_topic": topics.ticks, "rejects_topic": topics.rejects, "gaps_topic": topics.gaps}
    )
    with tempfile.TemporaryDirectory(dir=PROJECT / ".tickhouse") as folder:
        asyncio.run(stages(own, topics, options.ticks, Path(folder, "stages")))
        throughput(own, topics, options.ticks, Path(folder, "throughput"))
        latency(own, topics, options.seconds, Path(folder, "latency"))
        recovery(own, topics, options.backlog, Path(folder, "recovery"))


if __name__ == "__main__":
    main()
