"""What each venue declares: its names, and what its feed and its REST have to agree with."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from ingestion.feeds import VENUES, feed_of
from ingestion.instruments import NAME, QUOTES, TICKERS
from ingestion.ticks import Tick
from simulator.__main__ import DIALECTS
from simulator.dialects import Listing
from simulator.market import trades


def test_names_fit_the_contract_and_mean_one_asset_each() -> None:
    for venue in VENUES.values():
        symbols = [instrument.symbol for instrument in venue.instruments.values()]
        assert len(set(symbols)) == len(symbols)
        for asset, instrument in venue.instruments.items():
            assert instrument.asset == asset == asset.lower()
            assert asset in TICKERS
            assert instrument.quote in QUOTES
            assert NAME.fullmatch(asset)
            assert NAME.fullmatch(instrument.symbol)


def test_the_same_asset_has_each_venues_own_name() -> None:
    names = {name: venue.instruments["bitcoin"].symbol for name, venue in VENUES.items()}
    assert names == {"binance": "BTCUSDT", "coinbase": "BTC-USD", "kraken": "BTC/USD", "coincap": "bitcoin"}
    assert len(VENUES["binance"].instruments) >= 20


@pytest.mark.parametrize("name", VENUES)
def test_a_venues_ticks_are_its_own_and_have_ids_where_it_says_that_those_have_no_holes(name: str) -> None:
    venue = VENUES[name]
    feed = feed_of(name, list(venue.instruments.values()))
    assert feed.name == venue.name == name
    assets = list(TICKERS)
    frames = DIALECTS[name](Listing(name, assets)).frames(islice(trades(assets, 50.0, 3), 1000), 10**12)
    events = [event for frame in frames for event in feed.receive(frame.text.encode(), 10**18)]
    ticks = [event for event in events if isinstance(event, Tick)]
    assert {tick.source for tick in ticks} == {name}
    ids: dict[str, set[int | None]] = {}
    for tick in ticks:
        ids.setdefault(tick.symbol, set()).add(tick.trade_id)
    assert len(ids) > 10
    for of_symbol in ids.values():
        numbers = {trade_id for trade_id in of_symbol if trade_id is not None}
        if venue.contiguous_ids:
            assert of_symbol == set(range(min(numbers), max(numbers) + 1))
        else:
            assert not numbers


def test_a_venue_that_cannot_work_is_refused_when_it_is_declared() -> None:
    with pytest.raises(ValueError, match="kraken: gaps are filled by trade ids without holes"):
        replace(VENUES["kraken"], contiguous_ids=False)
    with pytest.raises(ValueError, match="kraken: either it lists its pairs"):
        replace(VENUES["kraken"], pairs=None)
