"""Gaps are filled from each venue's own REST, which the simulator serves over real HTTP, or are named unfillable."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import islice

import pytest

import ingestion.backfill
import ingestion.rest
from ingestion.backfill import Backfill
from ingestion.feeds import VENUES, make_feed
from ingestion.gaps import Gap, GapTracker
from ingestion.rest import Rest, RestBusy, RestRefused
from ingestion.ticks import Reject, Tick
from simulator.__main__ import DIALECTS
from simulator.dialects import Listing, Reply
from simulator.frames import Frame
from simulator.market import trades
from simulator.venue import Venue

ASSETS = ["bitcoin", "cardano"]
OPENED_MS = 1_723_161_600_000


class Memory:
    """Takes everything at once, and keeps it."""

    def __init__(self) -> None:
        self.rows: dict[str, Gap] = {}
        self.trades: list[Tick | Reject] = []

    async def room(self) -> None:
        pass

    def report(self, gap: Gap) -> None:
        self.rows[gap.gap_id] = gap

    def backfilled(self, trade: Tick | Reject) -> None:
        self.trades.append(trade)

    def statuses(self) -> dict[str, int]:
        """How many trades are in gaps of each status."""
        found: dict[str, int] = {}
        for gap in self.rows.values():
            found[gap.status] = found.get(gap.status, 0) + gap.count
        return found


class Desk:
    """A simulated venue with a past, and what a feed of it has made of the frames."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self.listing = Listing(name, ASSETS)
        self.dialect = DIALECTS[name](self.listing)
        self.frames = list(self.dialect.frames(islice(trades(ASSETS, 50.0, 3), count), OPENED_MS))
        self.feed = make_feed(name, ASSETS)
        # One moment for all: else a slow machine reports holes one by one, and a page for the first fills the others.
        self.received_ns = time.time_ns()
        self.tracker = GapTracker()
        self.memory = Memory()
        self.instruments = {one.symbol: one for one in VENUES[name].instruments.values()}

    def ticks(self, frame: Frame) -> list[Tick]:
        return [event for event in self.feed.receive(frame.text.encode(), self.received_ns) if isinstance(event, Tick)]

    def remember(self, forgotten: Callable[[int], bool] = lambda place: False) -> None:
        for place, frame in enumerate(self.frames):
            if not forgotten(place):
                for execution in frame.executions:
                    self.listing.history.add(execution.trade, execution.at_ms)

    def hear(self, deaf: Callable[[int], bool]) -> list[Tick]:
        """Give the tracker what is heard; what is not."""
        unheard = []
        for place, frame in enumerate(self.frames):
            for tick in self.ticks(frame):
                if deaf(place):
                    unheard.append(tick)
                else:
                    self.tracker.observe(tick)
        return unheard

    @asynccontextmanager
    async def filling(self, most_trades: int = 100_000) -> AsyncIterator[Backfill]:
        venue = Venue(lambda _: iter(()), 1.0, self.dialect, self.listing.history)
        async with await venue.listen(0) as server:
            backfill = Backfill(
                self.name,
                self.tracker,
                self.memory,
                time.time_ns,
                self.instruments.get,
                rest_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
                most_trades=most_trades,
            )
            task = asyncio.create_task(backfill.run())
            try:
                yield backfill
            finally:
                task.cancel()
                await asyncio.wait([task])

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while True:
                if condition():
                    return
                await asyncio.sleep(0.05)


def content(ticks: list[Tick]) -> list[tuple[object, ...]]:
    return sorted(
        (t.symbol, t.trade_id, t.price_usd, t.quantity, t.event_ns, t.asset, t.quote, t.source) for t in ticks
    )


@pytest.mark.parametrize("name", ["binance", "coinbase", "kraken"])
def test_what_was_missed_is_brought_with_the_same_ids_and_digits(name: str) -> None:
    """More than a page of one symbol, and some small holes."""

    async def scenario() -> None:
        desk = Desk(name, 6_000)
        desk.remember()
        count = len(desk.frames)
        unheard = desk.hear(lambda place: count // 10 < place < count // 2 or place % 997 == 5)
        async with desk.filling() as backfill:
            await desk.until(lambda: "filled" in desk.memory.statuses() and desk.tracker.open_gap_count(desk.name) == 0)
        brought = [trade for trade in desk.memory.trades if isinstance(trade, Tick)]
        assert content(brought) == content(unheard)
        assert backfill.filled == len(unheard) > 1_500
        assert desk.memory.statuses() == {"filled": len(unheard)}
        assert {gap.filled_by for gap in desk.memory.rows.values()} == {"backfill"}

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["binance", "coinbase", "kraken"])
def test_what_the_venue_has_not_is_unfillable_and_the_rest_of_the_gap_filled(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestion.backfill, "PATIENCE_SECONDS", (0.1,))

    async def scenario() -> None:
        desk = Desk(name, 600)
        desk.remember(lambda place: 105 <= place < 110)
        unheard = desk.hear(lambda place: 100 <= place < 120)
        forgotten = [tick for frame in desk.frames[105:110] for tick in desk.ticks(frame)]
        async with desk.filling() as backfill:
            await desk.until(lambda: bool(desk.memory.rows) and desk.tracker.open_gap_count(desk.name) == 0)
        lost, kept = len(forgotten), len(unheard) - len(forgotten)
        # Coinbase's frames are matches and tickers by turns.
        assert desk.memory.statuses() == {"unfillable": lost, "filled": kept}
        assert (backfill.filled, backfill.unfillable) == (kept, lost)
        reasons = {gap.reason for gap in desk.memory.rows.values() if gap.status == "unfillable"}
        assert reasons == {"the venue's history does not have it"}

    asyncio.run(scenario())


def test_a_refusal_makes_a_gap_unfillable_and_a_busy_venue_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        desk = Desk("binance", 300)
        desk.remember()
        desk.hear(lambda place: place == 100)
        answers = iter([Reply(500, {}), Reply(429, {}, {"Retry-After": "1"}), Reply(403, {}), Reply(400, {})])
        monkeypatch.setattr(desk.dialect, "rest", lambda path, query: next(answers))
        monkeypatch.setattr(ingestion.rest, "AGAIN_SECONDS", 0.2)
        async with desk.filling():
            await desk.until(lambda: "unfillable" in desk.memory.statuses())
        (gap,) = desk.memory.rows.values()
        assert gap.reason == "/api/v3/historicalTrades: HTTP 400"

    asyncio.run(scenario())


def test_a_gap_beyond_the_setting_or_before_the_numbers_began_again_is_not_asked_for() -> None:
    async def scenario() -> None:
        desk = Desk("binance", 300)
        desk.hear(lambda place: 50 < place < 200)
        one = next(desk.ticks(frame)[0] for frame in desk.frames[::-1])
        later = Tick(
            one.received_ns, one.asset, "1", one.quote, one.source, one.symbol, (one.event_ns or 0) + 10**10, "1", 1
        )
        assert desk.tracker.observe(later).trade_epoch == 1
        async with desk.filling(most_trades=10):
            await desk.until(lambda: bool(desk.memory.rows) and desk.tracker.open_gap_count(desk.name) == 0)
        assert {gap.symbol: gap.reason for gap in desk.memory.rows.values()} == {
            one.symbol: "the venue has started its numbers again since",
            next(symbol for symbol in ("BTCUSDT", "ADAUSDT") if symbol != one.symbol): (
                "it is larger than backfill_max_trades (10)"
            ),
        }
        assert desk.memory.trades == []

    asyncio.run(scenario())


def test_without_an_address_of_its_rest_a_gap_is_unfillable() -> None:
    async def scenario() -> None:
        desk = Desk("binance", 100)
        desk.hear(lambda place: place == 50)
        backfill = Backfill(
            "binance", desk.tracker, desk.memory, time.time_ns, desk.instruments.get, rest_url=None, most_trades=10
        )
        task = asyncio.create_task(backfill.run())
        await desk.until(lambda: desk.memory.statuses() == {"unfillable": 1})
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(scenario())


def test_requests_keep_their_distance_and_a_limit_is_waited_out() -> None:
    async def scenario() -> None:
        desk = Desk("coinbase", 10)
        venue = Venue(lambda _: iter(()), 1.0, desk.dialect, desk.listing.history)
        async with await venue.listen(0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            began = time.monotonic()
            async with Rest(url, 0.3) as rest:
                await asyncio.gather(*(rest.get("/products", {}) for _ in range(4)))
            assert 0.85 < time.monotonic() - began < 30
            async with Rest(url, 0.0) as rest:
                with pytest.raises(RestRefused, match="/nowhere: HTTP 404"):
                    await rest.get("/nowhere", {"apiKey": "canary"})
            async with Rest("http://127.0.0.1:1", 0.0) as rest:
                with pytest.raises(RestBusy, match="/nowhere: ConnectError"):
                    await rest.get("/nowhere", {})

    asyncio.run(scenario())


def test_the_distance_keeps_within_each_venues_limit() -> None:
    least = {name: venue.history.least_seconds for name, venue in VENUES.items() if venue.history is not None}
    # Weight 25 of 6,000 a minute; 10 a second; one a second.
    assert least["binance"] >= 60 / (6000 / 25)
    assert least["coinbase"] >= 1 / 10
    assert least["kraken"] >= 1
