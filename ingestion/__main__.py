"""From a venue's live feed to Kafka: `python -m ingestion --feed binance --assets bitcoin,ethereum`

What is received is first made durable in a spool on disk, then sent to Kafka. Runs until SIGINT or SIGTERM, then
sends what the spool holds for up to stop_seconds; the next start sends the rest. Its last line is JSON with its counts.
A second signal ends it at once.

Exit codes: 0 everything received is in Kafka or in the spool; 2 wrong settings; 3 the venue refused the connection;
4 something that was received could not be made durable.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence

from conf.settings import USAGE_ERROR, Settings, SettingsError, arguments, from_command_line
from ingestion.clock import Clock
from ingestion.connection import Connection
from ingestion.counts import Counts
from ingestion.delivery import Delivery
from ingestion.errors import IngestionError, SpoolInUse, VenueRefused
from ingestion.feeds import Feed, make_feed
from ingestion.intake import Intake, Topics
from ingestion.publisher import KafkaPublisher
from ingestion.spool import Spool

log = logging.getLogger("ingestion")

REFUSED, LOST, KILLED = 3, 4, 130
PROGRESS_SECONDS = 5.0
FLAGS = (
    "feed", "url", "assets", "kafka_bootstrap_servers", "ticks_topic", "rejects_topic", "kafka_partitions",
    "kafka_retention_hours", "kafka_retention_bytes", "max_frame_bytes", "max_in_flight", "stop_seconds",
    "spool_dir", "spool_fsync_ms", "spool_max_bytes",
)  # fmt: skip


class Ingester:
    """The parts, and the order in which they start and stop."""

    def __init__(self, settings: Settings, feed: Feed, spool: Spool) -> None:
        self._settings = settings
        self._spool = spool
        self._clock = Clock()
        self._clock_steps = 0
        self._intake = Intake(feed, spool, Counts(), Topics(settings.ticks_topic, settings.rejects_topic))
        self._connection = Connection(self._intake, self._clock, settings.max_frame_bytes)
        self._delivery = Delivery(spool, lambda: KafkaPublisher(settings))

    async def run(self) -> int:
        """Ingest until a signal, then empty the spool as far as Kafka takes it; the exit code."""
        stop = _stop_on_signal()
        loop = asyncio.get_running_loop()
        exit_code = 0
        writing = asyncio.create_task(self._spool.run())
        reading = asyncio.create_task(self._connection.run())
        # They end only by an error, or when they are cancelled.
        others = [asyncio.create_task(part) for part in (self._delivery.run(), self._progress())]
        stopped = asyncio.create_task(stop.wait())
        everything = (writing, reading, *others, stopped)
        await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
        deadline = loop.time() + self._settings.stop_seconds
        self._connection.stop()
        await asyncio.wait((reading, writing), timeout=self._settings.stop_seconds, return_when=asyncio.FIRST_COMPLETED)
        reading.cancel()
        self._spool.stop()
        await asyncio.wait((writing,), timeout=max(0.0, deadline - loop.time()))
        if not others[0].done():
            await self._delivery.drain(deadline - loop.time())
        for task in everything:
            task.cancel()
        for result in await asyncio.gather(*everything, return_exceptions=True):
            if isinstance(result, IngestionError):
                log.error("%s", result)
                exit_code = REFUSED if isinstance(result, VenueRefused) else LOST
            elif isinstance(result, Exception):
                raise result
        remaining = self._spool.undelivered
        lost = self._spool.end - self._spool.durable_end
        if lost:
            log.error("%d messages that were received could not be made durable", lost)
            exit_code = LOST
        if remaining - lost:
            log.warning("%d messages remain in the spool %s; the next start sends them", remaining, self._spool.folder)
        self._intake.rejects.end_period()
        print(json.dumps(self._summary()), flush=True)
        return exit_code

    def _summary(self) -> dict[str, int]:
        counts = self._intake.counts
        return {
            "frames": counts.frames,
            "received": counts.ticks,
            "rejected": counts.rejected,
            "ignored": counts.ignored.total(),
            "published": self._delivery.published,
            "undelivered": self._spool.undelivered,
            "lost": self._spool.end - self._spool.durable_end,
            "connections": counts.connections,
            "clock_steps": self._clock_steps,
        }

    async def _progress(self) -> None:
        """A line on what is going on, every few seconds."""
        counts = self._intake.counts
        loop = asyncio.get_running_loop()
        before, since = 0, loop.time()
        for turn in itertools.count(1):
            await asyncio.sleep(PROGRESS_SECONDS)
            log.info(
                "received %d, published %d, rejected %d, in the spool %d, %.0f ticks/s",
                counts.ticks,
                self._delivery.published,
                counts.rejected,
                self._spool.undelivered,
                (counts.ticks - before) / (loop.time() - since),
            )
            before, since = counts.ticks, loop.time()
            if turn % 2 == 0:
                self._intake.rejects.end_period()
            step = self._clock.check()
            if step:
                self._clock_steps += 1
                log.warning("the machine's clock was set by %+.3f s; receipt times go on from the start's", step / 1e9)


async def ingest(settings: Settings, feed: Feed) -> int:
    """The exit code. Raises SettingsError where there can be no spool."""
    try:
        spool = Spool(settings.spool_location, settings.spool_fsync_ms, settings.spool_max_bytes)
    except (SpoolInUse, OSError) as error:
        raise SettingsError(f"spool_dir: {error}") from error
    try:
        return await Ingester(settings, feed, spool).run()
    finally:
        spool.close()


def _stop_on_signal() -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; the second ends the process at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(KILLED)
        log.info("stopping; a second signal stops at once")
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, *FLAGS)
    parser.prog = "python -m ingestion"
    settings, _ = from_command_line(parser, argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Each attempt of kafka-python's to reach a broker is a line; `publisher` says it in one.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    try:
        return asyncio.run(ingest(settings, make_feed(settings.feed, settings.assets, settings.url)))
    except SettingsError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
