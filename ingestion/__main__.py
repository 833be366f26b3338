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
from collections.abc import Coroutine, Mapping, Sequence
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
from ingestion.failover import Failover
from ingestion.feeds import VENUES
from ingestion.following import Followed, find_feeds, resume
from ingestion.gate import Gate
from ingestion.instruments import Instrument
from ingestion.intake import Intake, Topics
from ingestion.liveness import Liveness
from ingestion.operation import ADDRESS_FILE, Subject, fetch_status, format_status
from ingestion.proxies import proxy_of
from ingestion.publisher import publisher
from ingestion.recording import Recording
from ingestion.recovery import SECTION, recover_tracker
from ingestion.source import Source
from ingestion.spool import Spool
from ingestion.state import State
from operation.server import Server

log = logging.getLogger("ingestion")

REFUSED, LOST, KILLED = 3, 4, 130
UNHEALTHY, NOT_RUNNING = 1, 3
PROGRESS_SECONDS = 5.0
# A stopping ingester waits at least so long for its disk, whatever stop_seconds is.
DURABLE_SECONDS = 3.0
FEED_COUNTS = ("frames", "bytes", "ticks", "rejected", "connections", "backfilled", "repeats")
# Instruments that a status names; the others it counts.
NAMED_AT_MOST = 100
SAVE_SECONDS = 2.0
FLAGS = (
    "feed", "url", "assets", "discover", "top_assets", "discovery_seconds", "rest_urls", "market_data_urls",
    "backfill_max_trades",
    "fallback_feeds", "fallback_urls", "all_feeds_at_once", "failover_seconds",
    "healthy_seconds", "kafka_bootstrap_servers", "ticks_topic", "rejects_topic", "gaps_topic", "kafka_partitions",
    "kafka_retention_hours", "kafka_retention_bytes", "kafka_client", "max_frame_bytes", "max_in_flight",
    "stop_seconds", "spool_dir", "spool_fsync_ms", "spool_max_bytes", "record", "record_bytes", "metrics_port",
    "stale_seconds", "state_dir", "log_format", "sockets", "clock_step_seconds",
)  # fmt: skip


class Ingester:
    """The parts, and the order in which they start and stop."""

    def __init__(self, settings: Settings, followed: list[Followed], spool: Spool) -> None:
        self._settings = settings
        self._followed = followed
        self._spool = spool
        self._clock = Clock(persist_seconds=settings.clock_step_seconds)
        self._clock_steps = self._clock_takeovers = 0
        self._topics = Topics(settings.ticks_topic, settings.rejects_topic, settings.gaps_topic)
        self._state = State.load(spool.folder)
        self._tracker = recover_tracker(self._state, spool, self._topics)
        resume(self._tracker, followed, all_at_once=settings.all_feeds_at_once)
        spool.retain(self._state.position)
        try:
            self._recording = Recording(settings.record, settings.record_bytes) if settings.record else None
        except OSError as error:
            raise SettingsError(f"record = {settings.record}: {error}") from error
        self._failover = Failover(
            [self._source(each) for each in followed],
            failover_seconds=settings.failover_seconds,
            healthy_seconds=settings.healthy_seconds,
            at_once=settings.all_feeds_at_once,
        )
        self._delivery = Delivery(spool, lambda: publisher(settings))
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()

    def _source(self, followed: Followed) -> Source:
        """A venue, with as many connections as its rules and the settings want."""
        settings, venue = self._settings, VENUES[followed.feed.name]
        liveness, gate = Liveness(settings.stale_seconds), Gate(*venue.attempts)

        def divide(instruments: Sequence[Instrument]) -> Intake:
            feed = followed.make_feed(instruments)
            return Intake(feed, self._spool, Counts(), self._topics, self._tracker, liveness)

        def connect(intake: Intake) -> Connection:
            return Connection(
                intake,
                self._clock,
                settings.max_frame_bytes,
                record=None if self._recording is None else self._recording.take,
                stale_seconds=settings.stale_seconds,
                gate=gate,
                proxy=proxy_of(intake.feed.url, settings.venue_proxy),
                number=intake.number,
            )

        if settings.sockets > 1 and not followed.feed.has_trade_ids:
            log.warning("%s gives no ids by which repeats are known: one connection brings each price", venue.name)
        most = venue.most_instruments
        return Source(
            divide(followed.instruments[: most or None]),
            connect,
            instruments=followed.instruments,
            divide=divide,
            sockets=settings.sockets,
            most_instruments=most,
        )

    def _parts(self) -> list[Coroutine[Any, Any, None]]:
        """What runs beside reading, writing and sending, until it is cancelled or fails."""
        parts = [self._progress(), self._save(), self._watch_clock()]
        if self._recording is not None:
            parts.append(self._recording.run())
        return parts

    def _looking_after(self, source: Source, followed: Followed) -> list[Coroutine[Any, Any, None]]:
        """A feed's gaps, and its assets where they are looked up."""
        refresh = Refresh(followed.discovery, source, self._tracker, self._settings.discovery_seconds)
        refresh.begin(followed.instruments)
        backfill = Backfill(
            followed.feed.name,
            self._tracker,
            source.intake,
            self._clock.now_ns,
            refresh.instrument,
            rest_url=followed.rest_url,
            most_trades=self._settings.backfill_max_trades,
            market_data_url=followed.market_data_url,
            proxy=proxy_of(followed.rest_url or "", self._settings.venue_proxy),
        )
        return [backfill.run(), refresh.run(look_up=self._settings.discover != "named")]

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
        # The goodbyes may have taken all the time; what they brought is kept all the same.
        await asyncio.wait((writing,), timeout=max(DURABLE_SECONDS, deadline - self._loop.time()))
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
        self._end_period()
        print(json.dumps(summary), flush=True)
        return exit_code

    def _summary(self) -> dict[str, int]:
        counts = [intake.counts for source in self._failover.sources for intake in source.intakes]
        return {
            "frames": sum(each.frames for each in counts),
            "received": sum(each.ticks for each in counts),
            "rejected": sum(each.rejected for each in counts),
            "repeats": sum(each.repeats for each in counts),
            "ignored": sum(each.ignored.total() for each in counts),
            "published": self._delivery.published,
            "undelivered": self._spool.undelivered,
            "lost": self._spool.end - self._spool.durable_end,
            "connections": sum(each.connections for each in counts),
            "takeovers": self._failover.takeovers,
            "clock_steps": self._clock_steps,
            "clock_takeovers": self._clock_takeovers,
        }

    def status(self) -> dict[str, Any]:
        """How it is; may be asked from another thread."""
        summary = self._summary()
        now = self._loop.time()
        feeds = {}
        for source, followed in zip(self._failover.sources, self._followed, strict=True):
            connections = source.connections
            feeds[source.name] = {
                **{name: source.count(name) for name in FEED_COUNTS},
                "up": int(bool(connections) and source.is_up),
                "sockets": len(connections),
                "sockets_up": sum(connection.is_up for connection in connections),
                "quiet_seconds": now - max(self._began, source.heard),
                "tickless_seconds": now - max(self._began, source.liveness.last),
                "gaps_open": self._tracker.open_gap_count(source.name),
                "undelivered_instruments": len(missing := source.undelivered(now)),
                "left_out": len(followed.discovery.left_out),
                "left_out_names": followed.discovery.left_out[:NAMED_AT_MOST],
                "undelivered": dict(itertools.islice(missing.items(), NAMED_AT_MOST)),
            }
        trouble = self._feed_trouble(now, feeds)
        if self._spool.is_full:
            trouble.append("the spool is full, and nothing is read")
        if self._spool.age_seconds > self._settings.stale_seconds:
            trouble.append(f"Kafka has acknowledged nothing for {self._spool.age_seconds:.0f} s")
        return summary | {
            "trouble": trouble,
            "notes": self._notes(feeds),
            "producer": self._spool.producer,
            "spool_bytes": self._spool.size,
            "spool_full": int(self._spool.is_full),
            "spool_age_seconds": self._spool.age_seconds,
            "lag_seconds": self._spool.lag_seconds,
            "feeds": feeds,
        }

    def _end_period(self) -> None:
        for source in self._failover.sources:
            for intake in source.intakes:
                intake.rejects.end_period()

    def _feed_trouble(self, now: float, feeds: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """What is wrong with the feeds: they say nothing, or they say something and deliver no ticks."""
        stale = self._settings.stale_seconds
        quiet = min(feed["quiet_seconds"] for feed in feeds.values())
        if quiet > stale:
            return [f"no feed has said anything for {quiet:.0f} s"]
        tickless = min(feed["tickless_seconds"] for feed in feeds.values())
        if tickless > stale:
            return [f"no feed has delivered a tick for {tickless:.0f} s"]
        wanted = [source for source in self._failover.sources if source.is_wanted]
        fresh = [source.liveness.fresh_assets(now) for source in wanted]
        trouble = []
        for at, source in enumerate(wanted):
            elsewhere = set[str]().union(*fresh[:at], *fresh[at + 1 :])
            if (source.is_up or len(wanted) == 1) and source.is_dead(now, elsewhere):
                symbols = ", ".join(list(source.undelivered(now))[:NAMED_AT_MOST])
                trouble.append(f"{source.name} does not deliver ticks of {symbols}")
        return trouble

    def _notes(self, feeds: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """What whoever runs this should know, though it is no reason to act at once."""
        notes = []
        if ahead := self._clock.ahead_ns:
            notes.append(f"the machine's clock was set: it is {ahead / 1e9:+.3f} s ahead of the receipt times")
        if self._clock_takeovers:
            notes.append(f"receipt times have followed the machine's clock after {self._clock_takeovers} steps of it")
        if self._recording is not None and self._recording.failure is not None:
            notes.append(self._recording.failure)
        for name, feed in feeds.items():
            if feed["left_out"]:
                names = ", ".join(feed["left_out_names"])
                notes.append(
                    f"{name}: {feed['left_out']} instruments have names that the contract does not take: {names}"
                )
            for symbol, reason in feed["undelivered"].items():
                notes.append(f"{name} does not deliver {symbol}: {reason}")
            if (more := feed["undelivered_instruments"] - len(feed["undelivered"])) > 0:
                notes.append(f"{name} does not deliver {more} other instruments")
        return notes

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
                self._end_period()

    async def _watch_clock(self) -> None:
        """Notice when the machine's clock is set, and go by it once that has lasted."""
        persist = self._settings.clock_step_seconds
        while True:
            await asyncio.sleep(min(PROGRESS_SECONDS, max(0.1, persist / 4)))
            if step := self._clock.check():
                self._clock_steps += 1
                log.warning(
                    "the machine's clock was set by %+.3f s; receipt times follow if that lasts for %.0f s",
                    step / 1e9,
                    persist,
                )
            if moved := self._clock.take_over():
                self._clock_takeovers += 1
                self._tracker.clock_moved(moved)
                log.warning("receipt times were moved by %+.3f s, to the machine's clock as it now is", moved / 1e9)


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
