"""From a venue's live feed to Kafka: `python -m ingestion --feed binance --assets bitcoin,ethereum`

Runs until SIGINT or SIGTERM, then delivers what it has received, and prints one line of JSON with its counts.
A second signal ends it at once.

Exit codes: 0 everything received is in Kafka; 2 wrong settings; 3 the venue refused the connection;
4 some of what was received is not in Kafka.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from conf.settings import USAGE_ERROR, Settings, SettingsError, arguments, from_command_line
from ingestion.clock import Clock
from ingestion.connection import Connection
from ingestion.counts import Counts
from ingestion.errors import IngestionError, VenueRefused
from ingestion.feeds import Feed, make_feed
from ingestion.intake import Intake
from ingestion.publisher import KafkaPublisher

log = logging.getLogger("ingestion")

REFUSED, UNDELIVERED, KILLED = 3, 4, 130
PROGRESS_SECONDS = 5.0
FLAGS = (
    "feed", "url", "assets", "kafka_bootstrap_servers", "ticks_topic", "rejects_topic", "kafka_partitions",
    "kafka_retention_hours", "kafka_retention_bytes", "max_frame_bytes", "max_in_flight", "stop_seconds",
)  # fmt: skip


async def ingest(settings: Settings, feed: Feed) -> int:
    """Ingest until a signal, then deliver what is in hand; the exit code."""
    clock = Clock()
    counts = Counts()
    publisher = KafkaPublisher(settings)
    intake = Intake(
        feed,
        publisher,
        counts,
        producer=uuid.uuid4().hex[:16],
        ticks_topic=settings.ticks_topic,
        rejects_topic=settings.rejects_topic,
    )
    connection = Connection(intake, clock, settings.max_frame_bytes)
    stop = _stop_on_signal()
    progress = asyncio.create_task(_progress(intake, publisher, clock))
    loop = asyncio.get_running_loop()
    deadline = loop.time()
    exit_code = 0
    try:
        if await _before(stop, asyncio.create_task(publisher.start())):
            running = asyncio.create_task(connection.run())
            await _before(stop, running, cancel=False)
            connection.stop()
            deadline = loop.time() + settings.stop_seconds
            await asyncio.wait((running,), timeout=settings.stop_seconds)
            # Still running only if Kafka takes no more: what is in hand is counted as undelivered.
            running.cancel()
            await running
    except IngestionError as error:
        log.error("%s", error)
        exit_code = REFUSED if isinstance(error, VenueRefused) else UNDELIVERED
        deadline = loop.time() + settings.stop_seconds
    progress.cancel()
    await publisher.flush(deadline - loop.time())
    await publisher.close()
    undelivered = counts.ticks + counts.rejected - publisher.published
    intake.rejects.end_period()
    if undelivered:
        log.error("%d messages that were received are not in Kafka", undelivered)
        exit_code = UNDELIVERED
    summary = {
        "frames": counts.frames,
        "received": counts.ticks,
        "rejected": counts.rejected,
        "ignored": counts.ignored.total(),
        "published": publisher.published,
        "undelivered": undelivered,
        "connections": counts.connections,
        "clock_steps": counts.clock_steps,
    }
    print(json.dumps(summary), flush=True)
    return exit_code


def _stop_on_signal() -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; the second ends the process at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(KILLED)
        log.info("stopping; a second signal stops at once and loses what is not delivered")
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


async def _before(stop: asyncio.Event, task: asyncio.Task[None], *, cancel: bool = True) -> bool:
    """Wait for the task or for `stop`; whether the task came first. Raises what the task raised."""
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        task.result()
        return True
    if cancel:
        task.cancel()
    return False


async def _progress(intake: Intake, publisher: KafkaPublisher, clock: Clock) -> None:
    """A line on what is going on, every few seconds."""
    counts = intake.counts
    loop = asyncio.get_running_loop()
    before, since = 0, loop.time()
    for turn in itertools.count(1):
        await asyncio.sleep(PROGRESS_SECONDS)
        in_flight = publisher.in_flight
        log.info(
            "received %d, published %d, rejected %d, in flight %d, %.0f ticks/s",
            counts.ticks,
            publisher.published,
            counts.rejected,
            in_flight,
            (counts.ticks - before) / (loop.time() - since),
        )
        before, since = counts.ticks, loop.time()
        if turn % 2 == 0:
            intake.rejects.end_period()
        step = clock.check()
        if step:
            counts.clock_steps += 1
            log.warning("the machine's clock was set by %+.3f s; receipt times go on from the start's", step / 1e9)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, *FLAGS)
    parser.prog = "python -m ingestion"
    settings, _ = from_command_line(parser, argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Each attempt of kafka-python's to reach a broker is a line; `publisher` says it in one.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    try:
        feed = make_feed(settings.feed, settings.assets, settings.url)
    except SettingsError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return USAGE_ERROR
    return asyncio.run(ingest(settings, feed))


if __name__ == "__main__":
    sys.exit(main())
