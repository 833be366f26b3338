"""From venues' live feeds to Kafka: `python -m ingestion --feed binance --assets bitcoin,ethereum`

What is received is first made durable in a spool on disk, then sent to Kafka. Runs until SIGINT or SIGTERM, then
sends what the spool holds for up to stop_seconds; the next start sends the rest. Its last line is JSON with its counts.
A second signal ends it at once. `python -m ingestion status` tells how the running one is.

Exit codes: 0 everything received is in Kafka or in the spool; 2 wrong settings; 3 the venue refused the connection;
4 something that was received could not be made durable; `status`: 0 healthy, 1 not, 3 none is running.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

from conf.logs import set_up_logging
from conf.settings import USAGE_ERROR, Settings, SettingsError, arguments, from_command_line
from ingestion.backfill import Backfill
from ingestion.clock import Clock
from ingestion.connection import Connection
from ingestion.counts import Counts
from ingestion.delivery import Delivery
from ingestion.discovery import Refresh
from ingestion.errors import IngestionError, SpoolInUse, VenueRefused
from ingestion.failover import Failover, Source
from ingestion.following import Followed, find_feeds, resume
from ingestion.intake import Intake, Topics
from ingestion.operation import ADDRESS_FILE, Subject, fetch_status, format_status
from ingestion.publisher import publisher
from ingestion.recording import Recording
from ingestion.recovery import SECTION, recover_tracker
from ingestion.spool import Spool
from ingestion.state import State
from operation.server import Server

log = logging.getLogger("ingestion")

REFUSED, LOST, KILLED = 3, 4, 130
UNHEALTHY, NOT_RUNNING = 1, 3
PROGRESS_SECONDS = 5.0
SAVE_SECONDS = 2.0
FLAGS = (
    "feed", "url", "assets", "discover", "top_assets", "discovery_seconds", "rest_urls", "backfill_max_trades",
    "fallback_feeds", "fallback_urls", "all_feeds_at_once", "failover_seconds",
    "healthy_seconds", "kafka_bootstrap_servers", "ticks_topic", "rejects_topic", "gaps_topic", "kafka_partitions",
    "kafka_retention_hours", "kafka_retention_bytes", "kafka_client", "max_frame_bytes", "max_in_flight",
    "stop_seconds", "spool_dir", "spool_fsync_ms", "spool_max_bytes", "record", "record_bytes", "metrics_port",
    "stale_seconds", "state_dir", "log_format",
)  # fmt: skip


class Ingester:
    """The parts, and the order in which they start and stop."""

    def __init__(self, settings: Settings, followed: list[Followed], spool: Spool) -> None:
        self._settings = settings
        self._followed = followed
        self._spool = spool
        self._clock = Clock()
        self._clock_steps = 0
        self._topics = Topics(settings.ticks_topic, settings.rejects_topic, settings.gaps_topic)
        self._state = State.load(spool.folder)
        self._tracker = recover_tracker(self._state, spool, self._topics)
        resume(self._tracker, followed, all_at_once=settings.all_feeds_at_once)
        spool.retain(self._state.position)
        self._recording = Recording(settings.record, settings.record_bytes) if settings.record else None
        self._intakes = [Intake(each.feed, spool, Counts(), self._topics, self._tracker) for each in followed]
        self._failover = Failover(
            [Source(intake, self._connect) for intake in self._intakes],
            failover_seconds=settings.failover_seconds,
            healthy_seconds=settings.healthy_seconds,
            at_once=settings.all_feeds_at_once,
        )
        self._delivery = Delivery(spool, lambda: publisher(settings))
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()

    def _connect(self, intake: Intake) -> Connection:
        record = None if self._recording is None else self._recording.take
        return Connection(intake, self._clock, self._settings.max_frame_bytes, record=record)

    def _parts(self) -> list[Coroutine[Any, Any, None]]:
        """What runs beside reading, writing and sending, until it is cancelled or fails."""
        parts = [self._progress(), self._save()]
        if self._recording is not None:
            parts.append(self._recording.run())
        return parts

    def _looking_after(self, source: Source, followed: Followed) -> list[Coroutine[Any, Any, None]]:
        """A feed's gaps, and its assets where they are looked up."""
        refresh = Refresh(
            followed.discovery,
            followed.feed,
            lambda: source.connection,
            self._tracker,
            self._settings.discovery_seconds,
        )
        refresh.begin(followed.instruments)
        backfill = Backfill(
            followed.feed.name,
            self._tracker,
            source.intake,
            self._clock.now_ns,
            refresh.instrument,
            rest_url=followed.rest_url,
            most_trades=self._settings.backfill_max_trades,
        )
        return [backfill.run()] if self._settings.discover == "named" else [backfill.run(), refresh.run()]

    async def run(self) -> int:
        """Ingest until a signal, then empty the spool as far as Kafka takes it; the exit code."""
        stop = _stop_on_signal()
        writing = asyncio.create_task(self._spool.run())
        listening = asyncio.create_task(self._failover.run())
        sending = asyncio.create_task(self._delivery.run())
        parts = [asyncio.create_task(part) for part in self._parts()]
        caring = [
            asyncio.create_task(part)
            for source, followed in zip(self._failover.sources, self._followed, strict=True)
            for part in self._looking_after(source, followed)
        ]
        stopped = asyncio.create_task(stop.wait())
        everything = (writing, listening, sending, *parts, *caring, stopped)
        await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)

        deadline = self._loop.time() + self._settings.stop_seconds
        listening.cancel()
        # What nobody makes durable is not read either.
        await self._failover.stop(0.0 if writing.done() else self._settings.stop_seconds)
        for care in caring:
            care.cancel()
        await asyncio.wait(caring)
        self._spool.stop()
        await asyncio.wait((writing,), timeout=max(0.0, deadline - self._loop.time()))
        if not sending.done():
            await self._delivery.drain(deadline - self._loop.time())
        for task in everything:
            task.cancel()
        exit_code = 0
        for result in await asyncio.gather(*everything, return_exceptions=True):
            if isinstance(result, IngestionError):
                log.error("%s", result)
                exit_code = REFUSED if isinstance(result, VenueRefused) else LOST
            elif isinstance(result, Exception):
                raise result
        summary = self._summary()
        if summary["lost"]:
            # The tracker has seen these, and they must not pass for received: the state stays as it was saved, and the
            # next start reads from the spool what was kept since.
            log.error("%d messages that were received could not be made durable", summary["lost"])
            exit_code = LOST
        else:
            self._note_gaps()
            self._state.save(self._spool.durable_end)
        if remaining := summary["undelivered"] - summary["lost"]:
            log.warning("%d messages remain in the spool %s; the next start sends them", remaining, self._spool.folder)
        for intake in self._intakes:
            intake.rejects.end_period()
        print(json.dumps(summary), flush=True)
        return exit_code

    def _summary(self) -> dict[str, int]:
        counts = [intake.counts for intake in self._intakes]
        return {
            "frames": sum(each.frames for each in counts),
            "received": sum(each.ticks for each in counts),
            "rejected": sum(each.rejected for each in counts),
            "ignored": sum(each.ignored.total() for each in counts),
            "published": self._delivery.published,
            "undelivered": self._spool.undelivered,
            "lost": self._spool.end - self._spool.durable_end,
            "connections": sum(each.connections for each in counts),
            "takeovers": self._failover.takeovers,
            "clock_steps": self._clock_steps,
        }

    def status(self) -> dict[str, Any]:
        """How it is; may be asked from another thread."""
        summary = self._summary()
        now = self._loop.time()
        feeds = {}
        for source in self._failover.sources:
            counts, connection = source.intake.counts, source.connection
            heard = max(self._began, counts.heard)
            feeds[source.name] = {
                "frames": counts.frames,
                "bytes": counts.bytes,
                "ticks": counts.ticks,
                "rejected": counts.rejected,
                "connections": counts.connections,
                "backfilled": counts.backfilled,
                "up": int(connection is not None and connection.is_up),
                "quiet_seconds": now - heard,
                "gaps_open": self._tracker.open_gap_count(source.name),
            }
        trouble = []
        quiet = min(feed["quiet_seconds"] for feed in feeds.values())
        if quiet > self._settings.stale_seconds:
            trouble.append(f"no feed has said anything for {quiet:.0f} s")
        if self._spool.is_full:
            trouble.append("the spool is full, and nothing is read")
        if self._spool.age_seconds > self._settings.stale_seconds:
            trouble.append(f"Kafka has acknowledged nothing for {self._spool.age_seconds:.0f} s")
        return summary | {
            "trouble": trouble,
            "producer": self._spool.producer,
            "spool_bytes": self._spool.size,
            "spool_full": int(self._spool.is_full),
            "spool_age_seconds": self._spool.age_seconds,
            "lag_seconds": self._spool.lag_seconds,
            "feeds": feeds,
        }

    def _note_gaps(self) -> None:
        self._state.sections[SECTION] = self._tracker.to_json()

    async def _save(self) -> None:
        """Keep what the next start must know, for as much of the spool as is durable."""
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            if self._spool.end == self._state.position:
                continue
            if self._spool.disk_is_full:
                # What is kept for the next start must not keep the disk full.
                self._spool.retain(self._spool.durable_end)
                continue
            self._note_gaps()
            position = self._spool.end
            await self._spool.durable(position)
            if await asyncio.to_thread(self._state.save, position):
                self._spool.retain(position)

    async def _progress(self) -> None:
        """A line on what is going on, every few seconds."""
        before, since = 0, self._began
        for turn in itertools.count(1):
            await asyncio.sleep(PROGRESS_SECONDS)
            summary = self._summary()
            log.info(
                "received %d, published %d, rejected %d, in the spool %d, %.0f ticks/s",
                summary["received"],
                summary["published"],
                summary["rejected"],
                summary["undelivered"],
                (summary["received"] - before) / (self._loop.time() - since),
            )
            before, since = summary["received"], self._loop.time()
            if turn % 2 == 0:
                for intake in self._intakes:
                    intake.rejects.end_period()
            step = self._clock.check()
            if step:
                self._clock_steps += 1
                log.warning("the machine's clock was set by %+.3f s; receipt times go on from the start's", step / 1e9)


async def ingest(settings: Settings) -> int:
    """The exit code. Raises SettingsError, also where there can be no spool, or the port for metrics is taken."""
    followed = await find_feeds(settings)
    try:
        spool = Spool(settings.spool_location, settings.spool_fsync_ms, settings.spool_max_bytes)
    except (SpoolInUse, OSError) as error:
        raise SettingsError(f"spool_dir: {error}") from error
    try:
        ingester = Ingester(settings, followed, spool)
        try:
            server = Server("ingestion", settings.metrics_port, Subject(ingester.status), settings.state_dir)
        except OSError as error:
            raise SettingsError(f"metrics_port = {settings.metrics_port}: {error}") from error
        try:
            server.announce(spool.folder / ADDRESS_FILE)
            return await ingester.run()
        finally:
            await asyncio.to_thread(server.close)
    finally:
        spool.close()


def tell_status(settings: Settings) -> int:
    """Print how the running ingester is; the exit code."""
    status = fetch_status(settings.spool_location)
    if status is None:
        print(f"no ingester is running with the spool {settings.spool_location}")
        return NOT_RUNNING
    print(format_status(status))
    return UNHEALTHY if status["trouble"] else 0


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
    parser.add_argument("command", nargs="?", choices=["run", "status"], default="run", help="default: run")
    settings, options = from_command_line(parser, argv)
    if options.command == "status":
        return tell_status(settings)
    set_up_logging(settings.log_format)
    try:
        return asyncio.run(ingest(settings))
    except SettingsError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except VenueRefused as error:
        log.error("%s", error)
        return REFUSED
    except KeyboardInterrupt:
        # While the assets were looked up: nothing is in hand then.
        return KILLED


if __name__ == "__main__":
    sys.exit(main())
