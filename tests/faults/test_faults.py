"""Promises 1 and 4 under each fault: what was acknowledged is in Kafka and once in silver, what is missing is named,
and nothing else is.

Compared are the sets of ids: of the simulator, which makes the same trades from the same seed, of the spool on disk, of
Kafka, of the reported gaps, and of silver.ticks and silver.gaps after streaming.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path

import psutil
import pytest

import services
from conf.settings import Settings
from ingestion.clock import Clock
from ingestion.connection import Connection
from ingestion.counts import Counts
from ingestion.delivery import Delivery
from ingestion.feeds import VENUES, make_feed
from ingestion.gaps import GapTracker
from ingestion.intake import Intake, Topics
from ingestion.operation import fetch_status
from ingestion.publisher import publisher
from ingestion.spool import Spool
from services.control import states
from simulator.faults import restarted_ids
from simulator.market import trades
from tests.faults.conftest import (
    ASSETS,
    MEMORY_LIMIT,
    RATE,
    SEED,
    Delivered,
    Events,
    Memory,
    Trades,
    in_one_epoch,
    market,
    scaled,
    simulated,
)
from tests.programs import Program, ingestion, kafka_count, kafka_records, simulator, wait_until
from tests.spools import spooled

pytestmark = pytest.mark.services
Show = Callable[..., None]
InSilver = Callable[[Delivered, Events], dict[str, object]]


@contextmanager
def ingester(folder: Path, settings: Settings, url: str, *arguments: str) -> Iterator[Program]:
    """It fills gaps from the simulator's REST."""
    rest = "binance=" + url.replace("ws://", "http://").removesuffix("/stream")
    with ingestion(folder, settings, url, "--assets", ",".join(ASSETS), "--rest-urls", rest, *arguments) as program:
        yield program


def all_made(source: Program, unsent: int = 0) -> Trades:
    """Stop the market; the trades that it has made."""
    source.stop()
    return market(sum(source.line()["sent"].values()) + unsent)


def status(folder: Path, name: str) -> float:
    """A figure of the running ingester's status; 0 before it runs."""
    told = fetch_status(folder / "spool")
    return 0 if told is None else float(told[name])


def until_in_kafka(settings: Settings, expected: Trades, limit: float = 120) -> Delivered:
    """Wait until what Kafka has and what is named as missing are all of them."""
    until = time.monotonic() + limit
    counted = 0
    while True:
        before, counted = counted, kafka_count(settings, settings.ticks_topic)
        # Reading it all takes a while: only once nothing comes any more.
        if counted == before:
            found = Delivered.of(settings)
            if found.trades | found.missing >= expected:
                return found
            absent = expected - found.trades - found.missing
            assert time.monotonic() < until, f"{len(absent)} trades neither in Kafka nor missing: {sorted(absent)[:5]}"
        time.sleep(0.5)


def until_gaps_are_filled(folder: Path) -> None:
    """Wait until the ingester has found what it missed, and has filled or given up all of it."""

    def settled() -> bool:
        feeds = (fetch_status(folder / "spool") or {"feeds": {}})["feeds"].values()
        return any(feed["backfilled"] for feed in feeds) and not any(feed["gaps_open"] for feed in feeds)

    wait_until(settled, "the gaps are filled")


def broker_pid(settings: Settings) -> int:
    (broker,) = states(settings, ["kafka"])
    assert broker.pid is not None
    return broker.pid


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_killed_ingester(own: Settings, folder: Path, show: Show, in_silver: InSilver) -> None:
    """kill -9 at 2,000 ticks/s: what its spool held is sent by the next one, under the same numbers.

    What was made meanwhile is filled, but for trades that the venue's history has lost too.
    """
    kills = scaled(2, 20)
    forgotten = 40
    acknowledged: Trades = set()
    with simulator(folder, *simulated(10**9, "--forget", f"1000:{forgotten}")) as (source, url):
        for _ in range(kills):
            before = kafka_count(own, own.ticks_topic)
            with ingester(folder, own, url) as program:
                wait_until(lambda: kafka_count(own, own.ticks_topic) > before + 1_500, "some flow")  # noqa: B023
                program.stop(signal.SIGKILL)
            acknowledged |= {(tick["symbol"], tick["trade_id"]) for tick in spooled(folder / "spool", own.ticks_topic)}
        with ingester(folder, own, url) as program:
            until_gaps_are_filled(folder)
            made = all_made(source, forgotten)
            found = until_in_kafka(own, made)
            assert program.stop() == 0
    found.assert_one_identity_without_holes()
    assert acknowledged <= found.trades
    assert found.trades | found.missing == made
    assert not found.trades & found.missing
    repeats = found.records - sum(map(len, found.sequences.values()))
    streamed = in_silver(found, in_one_epoch(made))
    show(
        kills=kills, made=len(made), in_kafka=len(found.trades), missing=len(found.missing), repeats=repeats, **streamed
    )  # fmt: skip


def test_killed_and_stopped_broker(own: Settings, folder: Path, show: Show, in_silver: InSilver) -> None:
    times = scaled(1, 5)
    with simulator(folder, *simulated(10**9)) as (source, url), ingester(folder, own, url) as program:
        memory = Memory(program)
        for _ in range(times):
            before = kafka_count(own, own.ticks_topic)
            wait_until(lambda: kafka_count(own, own.ticks_topic) > before + 1_000, "some flow")  # noqa: B023
            os.kill(broker_pid(own), signal.SIGKILL)
            waits = status(folder, "received")
            wait_until(lambda: status(folder, "received") > waits + 2_000, "reading goes on")  # noqa: B023
            services.up(own, ["kafka"])
            with stopped(broker_pid(own)):
                waits = status(folder, "received")
                wait_until(
                    lambda: status(folder, "received") > waits + scaled(4_000, 80_000),  # noqa: B023
                    "reading goes on",
                )
                memory.look()
        made = all_made(source)
        found = until_in_kafka(own, made)
        assert program.stop() == 0
        assert program.line()["connections"] >= 1
    found.assert_one_identity_without_holes()
    assert found.trades == made
    assert not found.missing
    assert memory.most < MEMORY_LIMIT
    streamed = in_silver(found, in_one_epoch(made))
    show(
        kills=times, stops=times, made=len(made), records=found.records, memory_mb=round(memory.most / 1e6), **streamed
    )  # fmt: skip


def test_kafka_away(own: Settings, folder: Path, show: Show, in_silver: InSilver) -> None:
    """Absent at the start, and for long: the ingester goes on, memory stays flat, and all arrives in order."""
    seconds = scaled(6, 600)
    services.down(own, ["kafka"])
    try:
        with (
            simulator(folder, *simulated(RATE * seconds)) as (source, url),
            ingester(folder, own, url) as program,
        ):
            memory = Memory(program)
            wait_until(lambda: memory.look() and source.process.poll() is not None, "all sent", 2 * seconds + 60)
            expected = market(RATE * seconds)
            wait_until(lambda: status(folder, "received") == len(expected), "all received")
            spool_bytes = status(folder, "spool_bytes")
            services.up(own, ["kafka"])
            began = time.monotonic()
            wait_until(
                lambda: memory.look() and kafka_count(own, own.ticks_topic) >= len(expected), "all in Kafka", 600
            )
            took = time.monotonic() - began
            assert program.stop() == 0
    finally:
        services.up(own, ["kafka"])
    found = Delivered.of(own)
    found.assert_one_identity_without_holes()
    assert found.trades == expected
    assert found.records == len(expected)
    assert memory.most < MEMORY_LIMIT
    streamed = in_silver(found, in_one_epoch(expected))
    show(
        seconds=seconds, ticks=len(expected), spool_mb=round(spool_bytes / 1e6), memory_mb=round(memory.most / 1e6),
        caught_up_in=round(took, 1), **streamed,
    )  # fmt: skip


def test_full_disk(own: Settings, folder: Path, show: Show, in_silver: InSilver) -> None:
    """The spool's disk is full while Kafka does not answer: reading pauses, goes on by itself, and nothing is lost."""
    megabytes = scaled(8, 64)
    count = megabytes * 6_000
    disk = folder / "spool"
    disk.mkdir()
    options = f"size={megabytes}m"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    try:
        with (
            simulator(folder, *simulated(count, "--speed", "0")) as (source, url),
            ingester(folder, own, url) as program,
        ):
            memory = Memory(program)
            wait_until(lambda: kafka_count(own, own.ticks_topic) > 500, "some flow")
            with stopped(broker_pid(own)):
                wait_until(lambda: program.logged("its disk is full; reading from the venue pauses"), "it is said")
                held = status(folder, "received")
                time.sleep(1)
                assert status(folder, "received") == held < count
                memory.look()
            assert source.process.wait(300) == 0
            expected = market(count)
            found = until_in_kafka(own, expected)
            assert program.logged("reading goes on")
            assert program.stop() == 0
            assert program.line()["connections"] == 1
    finally:
        subprocess.run(["umount", disk], check=True)
    found.assert_one_identity_without_holes()
    assert found.trades == expected
    assert memory.most < MEMORY_LIMIT
    streamed = in_silver(found, in_one_epoch(expected))
    show(disk_mb=megabytes, ticks=count, held_at=int(held), memory_mb=round(memory.most / 1e6), **streamed)


def test_broken_disk(own: Settings, folder: Path, show: Show, in_silver: InSilver) -> None:
    """The spool's disk fails: the ingester ends and says so, and what it could not keep is named by the next one."""
    with simulator(folder, *simulated(10**9)) as (source, url):
        with ingester(folder, own, url) as program:
            wait_until(lambda: kafka_count(own, own.ticks_topic) > 1_000, "some flow")
            # No file may grow beyond this: a segment of the spool soon wants to, what is kept beside it does not.
            psutil.Process(program.process.pid).rlimit(psutil.RLIMIT_FSIZE, (4 << 20, 4 << 20))
            assert program.process.wait(300) == 4
            unkept = program.line()["lost"]
            assert program.logged("cannot be written")
        assert unkept > 0
        with ingester(folder, own, url) as program:
            until_gaps_are_filled(folder)
            made = all_made(source)
            found = until_in_kafka(own, made)
            assert program.stop() == 0
    found.assert_one_identity_without_holes()
    assert found.trades | found.missing == made
    assert not found.trades & found.missing
    streamed = in_silver(found, in_one_epoch(made))
    show(made=len(made), unkept=unkept, missing=len(found.missing), **streamed)


def test_slow_broker(own: Settings, folder: Path, show: Show, in_silver: InSilver) -> None:
    """A broker that answers a tenth of the time."""
    rounds = scaled(5, 60)
    with simulator(folder, *simulated(10**9)) as (source, url), ingester(folder, own, url) as program:
        wait_until(lambda: status(folder, "received") > 1_000, "some flow")
        for _ in range(rounds):
            with stopped(broker_pid(own)):
                time.sleep(0.9)
            time.sleep(0.1)
        age = status(folder, "spool_age_seconds")
        made = all_made(source)
        found = until_in_kafka(own, made)
        assert program.stop() == 0
    found.assert_one_identity_without_holes()
    assert found.trades == made
    assert not found.missing
    streamed = in_silver(found, in_one_epoch(made))
    show(rounds=rounds, ticks=len(made), oldest_seconds=round(age, 1), **streamed)


def test_silent_venue(own: Settings, folder: Path, show: Show, in_silver: InSilver) -> None:
    """A half-open connection: no frame, no goodbye. It is left, and what was missed is filled."""
    with (
        simulator(folder, *simulated(10**9, "--rate", "400", "--fault", "silence")) as (source, url),
        ingester(folder, own, url) as program,
    ):
        wait_until(lambda: program.logged(": left"), "the silence is noticed")
        until_gaps_are_filled(folder)
        source.stop()
        count = sum(source.line()["sent"].values())
        symbols = {asset: VENUES["binance"].instruments[asset].symbol for asset in ASSETS}
        made = {(symbols[trade.asset], trade.trade_id) for trade in islice(trades(ASSETS, 400.0, SEED), count)}
        found = until_in_kafka(own, made)
        assert program.stop() == 0
        assert program.line()["connections"] == 2
    assert found.trades | found.missing == made
    assert not found.trades & found.missing
    streamed = in_silver(found, in_one_epoch(made))
    show(made=len(made), missing=len(found.missing), **streamed)


def test_cut_connections(own: Settings, folder: Path, show: Show, in_silver: InSilver) -> None:
    """A venue that cuts each connection off in mid-flow, without a goodbye: what was missed is filled or named."""
    cuts = scaled(2, 8)
    with (
        simulator(folder, *simulated(10**9, "--fault", "cuts")) as (source, url),
        ingester(folder, own, url) as program,
    ):
        wait_until(lambda: status(folder, "connections") > cuts, "it is connected again", 900)
        until_gaps_are_filled(folder)
        # It may be cut off at any moment: what comes after the last trade that it has received is not missed yet.
        assert program.stop() == 0
        summary = program.line()
        made = all_made(source)
    assert summary["undelivered"] == 0
    found = Delivered.of(own)
    found.assert_one_identity_without_holes()
    assert found.trades <= made
    assert not found.trades & found.missing
    streamed = in_silver(found, in_one_epoch(made))
    show(cuts=cuts, received=summary["received"], missing=len(found.missing), **streamed)


@pytest.mark.parametrize("fault", ["fragments", "malformed", "duplicates"])
def test_odd_frames(own: Settings, folder: Path, fault: str, show: Show, in_silver: InSilver) -> None:
    """Promise 5 too: a frame that is no tick stops nothing, and is on the topic of rejects."""
    count = RATE * scaled(3, 30)
    with (
        simulator(folder, *simulated(count, "--fault", fault)) as (source, url),
        ingester(folder, own, url) as program,
    ):
        assert source.process.wait(300) == 0
        found = until_in_kafka(own, market(count))
        assert program.stop() == 0
        summary = program.line()
    assert found.trades == market(count)
    assert not found.missing
    rejected = kafka_count(own, own.rejects_topic)
    assert rejected == summary["rejected"]
    if fault == "malformed":
        assert rejected == count // 100
    else:
        assert rejected == 0
    if fault == "duplicates":
        assert found.records > 1.25 * count
    assert summary["connections"] == 1
    streamed = in_silver(found, in_one_epoch(market(count)))
    show(ticks=count, records=found.records, rejected=rejected, **streamed)


def test_oversized_frame(own: Settings, folder: Path, show: Show, in_silver: InSilver) -> None:
    """It costs the connection; what was missed by that is filled, and the frame is among the rejects."""
    with (
        simulator(folder, *simulated(10**9, "--fault", "oversized")) as (source, url),
        ingester(folder, own, url) as program,
    ):
        wait_until(lambda: program.logged("a frame larger than"), "the frame has come")
        until_gaps_are_filled(folder)
        source.stop()
        made = market(sum(source.line()["sent"].values()) - 1)
        found = until_in_kafka(own, made)
        assert program.stop() == 0
        assert program.line()["connections"] == 2
    assert found.trades | found.missing == made
    assert not found.trades & found.missing
    assert kafka_count(own, own.rejects_topic) == 1
    streamed = in_silver(found, in_one_epoch(made))
    show(made=len(made), missing=len(found.missing), **streamed)


def test_restarted_ids(own: Settings, folder: Path, show: Show, in_silver: InSilver) -> None:
    """A venue starts its numbers again: the ticks are of the next epoch, and none is taken for one seen before."""
    count = RATE * scaled(3, 30)
    with (
        simulator(folder, *simulated(count, "--fault", "restarted-ids")) as (source, url),
        ingester(folder, own, url) as program,
    ):
        assert source.process.wait(300) == 0
        wait_until(lambda: kafka_count(own, own.ticks_topic) >= count, "all in Kafka")
        assert program.stop() == 0
    symbols = {asset: VENUES["binance"].instruments[asset].symbol for asset in ASSETS}
    made = islice(restarted_ids(trades(ASSETS, RATE, SEED)), count)
    expected = {(symbols[trade.asset], int(number >= 2_000), trade.trade_id) for number, trade in enumerate(made)}
    found = Delivered.of(own)
    assert found.events == expected
    assert not found.missing
    streamed = in_silver(found, expected)
    show(ticks=count, epochs=sorted(found.epochs), **streamed)


def test_stepped_clock(own: Settings, folder: Path, show: Show, in_silver: InSilver) -> None:
    """The machine's clock is set an hour ahead and back: every tick keeps its place in time, and it is noticed."""
    stepped_ns = 0
    clock = Clock(lambda: time.time_ns() + stepped_ns)
    counts = Counts()
    steps: list[int] = []

    async def flow(connection: Connection) -> None:
        """Some ticks, while the connection lasts."""
        before = counts.ticks
        until = time.monotonic() + 120
        while counts.ticks < before + 1_500:
            assert connection.is_up or time.monotonic() < until
            await asyncio.sleep(0.01)

    async def scenario(url: str) -> None:
        nonlocal stepped_ns
        spool = Spool(folder / "spool", 5.0, 1 << 30)
        topics = Topics(own.ticks_topic, own.rejects_topic, own.gaps_topic)
        intake = Intake(make_feed("binance", ASSETS, url), spool, counts, topics, GapTracker())
        connection = Connection(intake, clock, 1 << 20)
        delivery = Delivery(spool, lambda: publisher(own))
        reading, writing, sending = (asyncio.create_task(part.run()) for part in (connection, spool, delivery))
        for step_ns in (3_600 * 10**9, -3_600 * 10**9):
            await flow(connection)
            stepped_ns += step_ns
            steps.append(clock.check())
        await flow(connection)
        connection.stop()
        await reading
        spool.stop()
        await writing
        await delivery.drain(60.0)
        sending.cancel()
        await asyncio.wait([sending])
        spool.close()

    with simulator(folder, *simulated(10**9)) as (source, url):
        asyncio.run(scenario(url))
        made = all_made(source)
    found = Delivered.of(own)
    found.assert_one_identity_without_holes()
    assert found.records == counts.ticks
    assert found.trades <= made
    assert [round(step / 3.6e12) for step in steps] == [1, -1]
    times = {
        message["sequence"]: message["timestamp"]
        for message in (json.loads(record.value) for record in kafka_records(own, own.ticks_topic))
    }
    in_order = [times[number] for number in sorted(times)]
    assert in_order == sorted(in_order)
    first, last = (datetime.fromisoformat(text) for text in (in_order[0], in_order[-1]))
    assert (last - first).total_seconds() < 600
    streamed = in_silver(found, in_one_epoch(made))
    show(ticks=counts.ticks, steps_seconds=[round(step / 1e9) for step in steps], **streamed)
