"""Which feeds follow what, and what a restart makes of what the last run followed."""

from __future__ import annotations

import asyncio

import pytest

from conf.settings import Settings, SettingsError
from ingestion.errors import VenueRefused
from ingestion.following import find_feeds, resume
from ingestion.gaps import GapTracker
from ingestion.ticks import Tick
from simulator.dialects import Listing
from simulator.dialects.coincap import CoinCap
from simulator.venue import Venue


def test_each_feed_follows_those_of_the_named_assets_that_its_venue_trades() -> None:
    settings = Settings(
        feed="binance",
        fallback_feeds=["kraken", "coincap"],
        assets=["bitcoin", "binance-coin"],
        url="ws://127.0.0.1:1/stream",
        fallback_urls={"kraken": "ws://127.0.0.1:2/v2"},
    )
    binance, kraken, coincap = asyncio.run(find_feeds(settings))
    assert [one.symbol for one in binance.instruments] == ["BTCUSDT", "BNBUSDT"]
    assert [one.symbol for one in kraken.instruments] == ["BTC/USD"]
    assert [one.symbol for one in coincap.instruments] == ["bitcoin", "binance-coin"]
    assert binance.feed.url.startswith("ws://127.0.0.1:1/stream?streams=btcusdt@trade")
    assert kraken.feed.url == "ws://127.0.0.1:2/v2"


def test_a_simulated_venues_gaps_are_not_filled_with_real_trades() -> None:
    settings = Settings(
        feed="binance",
        url="ws://127.0.0.1:1/stream",
        fallback_feeds=["kraken", "coinbase"],
        fallback_urls={"kraken": "ws://127.0.0.1:2/v2"},
        rest_urls={"kraken": "http://127.0.0.1:2"},
    )
    assert [each.rest_url for each in asyncio.run(find_feeds(settings))] == [
        None,
        "http://127.0.0.1:2",
        "https://api.exchange.coinbase.com",
    ]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"feed": "nowhere"}, "feed = 'nowhere'"),
        ({"feed": "nowhere", "discover": "all"}, "feed = 'nowhere'"),
        ({"feed": "kraken", "assets": ["gold"]}, "kraken has no gold"),
        ({"feed": "binance", "fallback_feeds": ["binance"]}, "fallback_feeds"),
        ({"feed": "binance", "fallback_urls": {"kraken": "ws://127.0.0.1:1/"}}, "fallback_urls"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        asyncio.run(find_feeds(Settings.model_validate(wrong)))


def test_a_list_that_is_refused_ends_it_and_an_empty_one_is_a_wrong_setting() -> None:
    async def scenario() -> None:
        listing = Listing("coincap", [])
        venue = Venue(lambda _: iter(()), 1.0, CoinCap(listing), listing.history)
        async with await venue.listen(0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            with pytest.raises(SettingsError, match="coincap has none"):
                await find_feeds(Settings(feed="coincap", discover="top", rest_urls={"coincap": url}))
            with pytest.raises(VenueRefused, match="HTTP 404"):
                await find_feeds(Settings(feed="kraken", discover="all", rest_urls={"kraken": url}))

    asyncio.run(scenario())


def test_after_a_restart_only_what_is_listened_to_has_a_gap() -> None:
    tracker = GapTracker()
    for source, symbol in (("binance", "BTCUSDT"), ("binance", "ETHUSDT"), ("kraken", "BTC/USD"), ("coincap", "aave")):
        tracker.observe(Tick(10**18, "any", "1", "USD", source, symbol, 10**18, "1", 10))
    settings = Settings(feed="binance", fallback_feeds=["kraken"], assets=["bitcoin"])
    resume(tracker, asyncio.run(find_feeds(settings)), all_at_once=False)
    for source, symbol in (("binance", "BTCUSDT"), ("binance", "ETHUSDT"), ("kraken", "BTC/USD"), ("coincap", "aave")):
        tracker.observe(Tick(10**18, "any", "1", "USD", source, symbol, 10**18, "1", 20))
    assert [(gap.symbol, gap.count) for gap in tracker.changes(2 * 10**18)] == [("BTCUSDT", 9)]


def test_a_venue_that_refuses_its_list_is_left_out_as_long_as_another_is_left() -> None:
    async def scenario() -> None:
        listing = Listing("coincap", ["bitcoin"])
        venue = Venue(lambda _: iter(()), 1.0, CoinCap(listing), listing.history)
        async with await venue.listen(0) as server:
            # It answers HTTP 404 to what is Kraken's.
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            settings = Settings(
                feed="kraken", fallback_feeds=["coincap"], discover="all", rest_urls={"kraken": url, "coincap": url}
            )
            assert [each.feed.name for each in await find_feeds(settings)] == ["coincap"]

    asyncio.run(scenario())
