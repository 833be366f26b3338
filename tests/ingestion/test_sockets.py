"""Several connections to a venue: to divide thousands of instruments, and to miss nothing while one of them is cut."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from conf.settings import Settings
from ingestion.clock import Clock
from ingestion.connection import Connection
from ingestion.counts import Counts
from ingestion.feeds import VENUES, feed_of
from ingestion.gaps import GapTracker
from ingestion.instruments import Instrument
from ingestion.intake import Intake, Topics
from ingestion.liveness import Liveness
from ingestion.source import Source
from ingestion.spool import Spool
from ingestion.ticks import Reject, Tick
from simulator.dialects import Listing
from simulator.dialects.binance import Binance
from simulator.market import trades
from simulator.venue import Venue
from tests.ingestion.test_liveness import ask
from tests.programs import ingestion, running_program, simulator, wait_until
from tests.spools import spooled

SECOND = 10**9


@pytest.fixture
def nowhere(suite: Settings) -> Settings:
    """Kafka does not answer: everything stays in the spool."""
    return suite.model_copy(update={"kafka_bootstrap_servers": "127.0.0.1:1"})


def received(folder: Path) -> int:
    return int(ask(folder, "/status")[1].get("received", 0))


def ids_of(folder: Path, settings: Settings) -> dict[str, list[int]]:
    """The numbers of the trades in the spool, by symbol, in their order."""
    ids: dict[str, list[int]] = {}
    for tick in spooled(folder / "spool", settings.ticks_topic):
        ids.setdefault(tick["symbol"], []).append(tick["trade_id"])
    return ids


def missing(ids: dict[str, list[int]]) -> int:
    return sum(max(of) - min(of) + 1 - len(set(of)) for of in ids.values())


@pytest.mark.parametrize("venue", ["binance", "coinbase", "kraken"])
def test_two_sockets_bring_each_trade_once_and_a_cut_of_one_loses_nothing(
    nowhere: Settings, tmp_path: Path, venue: str
) -> None:
    """Promise 4 needs no gap where another connection has the trade. Each connection is cut every ten seconds."""
    assets = "bitcoin,ethereum,solana"
    simulated = ("--venue", venue, "--assets", assets, "--rate", "300", "--cut-seconds", "10")
    follows = ("--feed", venue, "--assets", assets, "--stop-seconds", "5", "--sockets", "2")
    with simulator(tmp_path, *simulated) as (source, url), ingestion(tmp_path, nowhere, url, *follows) as program:
        wait_until(lambda: ask(tmp_path, "/status")[1].get("connections", 0) >= 6, "each connection was cut twice")
        status = ask(tmp_path, "/status")[1]
        assert status["feeds"][venue]["repeats"] > status["received"] / 2
        assert program.stop() == 0
        source.process.send_signal(signal.SIGTERM)
    ids = ids_of(tmp_path, nowhere)
    assert len(ids) == 3
    assert missing(ids) == 0
    assert {count for of in ids.values() for count in Counter(of).values()} == {1}
    assert spooled(tmp_path / "spool", nowhere.gaps_topic) == []


@pytest.mark.parametrize(
    ("venue", "count", "connections"), [("binance", 3_000, 3), ("coinbase", 700, 3), ("kraken", 700, 3)]
)
def test_instruments_by_the_thousand_are_divided_within_the_venues_rules(
    nowhere: Settings, tmp_path: Path, venue: str, count: int, connections: int
) -> None:
    """Streams a connection and messages a second: the simulated venue cuts off who asks for more, and keeps count."""
    made_up = ("--venue", venue, "--assets", "bitcoin", "--made-up", str(count - 1), "--rate", str(count))
    with running_program("simulator", ["--port", "0", *made_up], tmp_path / "simulator.log") as source:
        addresses = source.line()
        follows = ("--feed", venue, "--discover", "all", "--rest-urls", f"{venue}={addresses['rest_url']}")
        with ingestion(tmp_path, nowhere, addresses["url"], *follows, "--stop-seconds", "5") as program:
            wait_until(lambda: program.logged(f"following {count} symbols"), "discovery")
            wait_until(lambda: len(ids_seen(tmp_path, nowhere, 3 * count)) > 0.9 * count, "nearly all deliver", 240.0)
            status = ask(tmp_path, "/status")[1]
            assert status["feeds"][venue]["sockets_up"] == status["connections"] == connections
            assert program.stop() == 0
        source.process.send_signal(signal.SIGTERM)
        assert "violations" not in source.line()
    assert missing(ids_of(tmp_path, nowhere)) == 0


def ids_seen(folder: Path, settings: Settings, least: int) -> set[str]:
    """The symbols that have delivered, once so many ticks have come."""
    return set(ids_of(folder, settings)) if received(folder) > least else set()


def test_each_venues_share_keeps_within_what_it_documents() -> None:
    assert 0 < VENUES["binance"].most_instruments <= 1_024
    most, seconds = VENUES["binance"].attempts
    assert most / seconds <= 300 / 300
    most, seconds = VENUES["coinbase"].attempts
    assert most / seconds <= 8


# Which trades have come before


def tick(trade_id: int, at: float, epoch: int = 0) -> Tick:
    made = 10**18 + int(at * SECOND)
    return Tick(made, "bitcoin", "1", "USDT", "binance", "BTCUSDT", made, "1", trade_id, epoch)


def tracker_of(*ids: int) -> GapTracker:
    tracker = GapTracker()
    for number in ids:
        tracker.observe(tick(number, number))
    return tracker


def test_a_trade_has_come_before_only_if_it_did() -> None:
    tracker = tracker_of(10, 11, 14, 15)
    had = [number for number in range(5, 20) if tracker.has(tick(number, number))]
    # What was before the first is not known, 12 and 13 are missing, and 16 is new.
    assert had == [10, 11, 14, 15]
    again = GapTracker.from_json(json.loads(json.dumps(tracker.to_json())))
    assert [number for number in range(5, 20) if again.has(tick(number, number))] == had


def test_a_trade_that_was_given_up_has_not_come() -> None:
    tracker = tracker_of(10, 11, 14, 15)
    tracker.changes(10**18 + 60 * SECOND)
    tracker.give_up(tracker.open_gaps()[0][0], "no history", 10**18 + 60 * SECOND)
    assert not tracker.has(tick(12, 12))
    assert tracker.has(tick(11, 11))


def test_a_number_of_a_new_epoch_has_not_come() -> None:
    tracker = tracker_of(*range(1, 20))
    assert not tracker.has(tick(5, 100))
    assert tracker.observe(tick(5, 100)).trade_epoch == 1
    assert tracker.has(tick(5, 100))


def test_a_mentioned_trade_has_not_come_and_a_rejected_one_has() -> None:
    tracker = GapTracker()
    tracker.mentioned("binance", "BTCUSDT", 10, 10**18)
    assert not tracker.has(tick(10, 10))
    tracker.observe(tick(10, 10))
    tracker.observe(tick(11, 11))
    tracker.mentioned("binance", "BTCUSDT", 12, 10**18)
    tracker.changes(10**18 + 60 * SECOND)
    assert not tracker.has(tick(12, 12))
    reject = Reject(10**18, "binance", "price", b"", "BTCUSDT", 13)
    tracker.observe_reject(reject)
    assert tracker.has(reject)


def test_instruments_that_come_later_get_a_connection_more_where_the_others_are_full(tmp_path: Path) -> None:
    async def scenario() -> None:
        listing = Listing("binance", ["bitcoin", "ethereum", "solana", "dogecoin", "xrp"])
        dialect = Binance(listing)
        venue = Venue(
            lambda opened_ms: dialect.frames(trades(listing.assets, 200.0, 4), opened_ms), 1.0, dialect, listing.history
        )
        async with await venue.listen(0) as server:
            playing = asyncio.create_task(venue.play())
            url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}{dialect.path}"
            spool, tracker, liveness = Spool(tmp_path, 10.0, 1 << 30), GapTracker(), Liveness()
            writing = asyncio.create_task(spool.run())
            table = VENUES["binance"].instruments
            everything = [table[asset] for asset in listing.assets]

            def divide(instruments: Sequence[Instrument]) -> Intake:
                topics = Topics("ticks", "rejects", "gaps")
                return Intake(feed_of("binance", instruments, url), spool, Counts(), topics, tracker, liveness)

            source = Source(
                divide(everything[:2]),
                lambda intake: Connection(intake, Clock(), 1 << 20),
                instruments=everything[:3],
                divide=divide,
                most_instruments=2,
            )

            async def until(condition: Callable[[], bool]) -> None:
                async with asyncio.timeout(60):
                    while True:
                        source.look(60.0)
                        if condition():
                            return
                        await asyncio.sleep(0.05)

            def delivered() -> set[str]:
                return {json.loads(record.value)["symbol"] for record in spool.records(0)}

            source.start()
            await until(lambda: len(delivered()) == 3)
            assert source.count("connections") == 2
            source.follow(everything[3:], everything[:1])
            await until(lambda: len(delivered()) == 5)
            assert source.count("connections") == 3
            assert source.is_up
            # One goes: the others' numbers go on without a hole, and no connection is made anew.
            assert tracker.changes(time.time_ns() + 10 * SECOND) == []
            source.stop()
            await source.ended()
            spool.stop()
            await writing
            spool.close()
            playing.cancel()
            await asyncio.wait([playing])

    asyncio.run(scenario())


def test_a_cut_of_one_share_disconnects_no_other(tmp_path: Path) -> None:
    tracker = GapTracker()
    for symbol in ("BTCUSDT", "ETHUSDT"):
        tracker.observe(Tick(10**18, "any", "1", "USDT", "binance", symbol, 10**18, "1", 10))
    tracker.disconnected("binance", 10**18 + SECOND, {"BTCUSDT"})
    for symbol in ("BTCUSDT", "ETHUSDT"):
        tracker.observe(Tick(10**18, "any", "1", "USDT", "binance", symbol, 10**18, "1", 12))
    rows = {gap.symbol: gap.disconnected_at for gap in tracker.changes(10**18 + 9 * SECOND)}
    assert rows == {"BTCUSDT": 10**18 + SECOND, "ETHUSDT": None}
