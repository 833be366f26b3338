"""The made-up market is realistic where it matters: bursts, many trades in a millisecond, jumps; and repeatable."""

from __future__ import annotations

from collections import Counter, defaultdict
from decimal import Decimal
from itertools import islice

import pytest

from ingestion.feeds import VENUES
from simulator.market import ASSETS, Trade, trades

FIVE = ["bitcoin", "ethereum", "cardano", "solana", "dogecoin"]


@pytest.fixture(scope="module")
def minutes() -> list[Trade]:
    """About five minutes at 200 trades a second."""
    return list(islice(trades(FIVE, 200.0, seed=3), 60_000))


def test_the_same_seed_makes_the_same_trades(minutes: list[Trade]) -> None:
    assert list(islice(trades(FIVE, 200.0, seed=3), 5_000)) == minutes[:5_000]
    assert list(islice(trades(FIVE, 200.0, seed=4), 5_000)) != minutes[:5_000]


def test_ids_of_an_asset_have_no_holes(minutes: list[Trade]) -> None:
    ids = defaultdict(list)
    for trade in minutes:
        ids[trade.asset].append(trade.trade_id)
    assert set(ids) == set(FIVE)
    for numbers in ids.values():
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_the_rate_is_the_chosen_one_and_comes_in_bursts(minutes: list[Trade]) -> None:
    seconds = Counter(trade.at_ms // 1000 for trade in minutes)
    assert 140 < len(minutes) / (minutes[-1].at_ms / 1000) < 280
    assert max(seconds.values()) > 3 * sorted(seconds.values())[len(seconds) // 2]
    assert [trade.at_ms for trade in minutes] == sorted(trade.at_ms for trade in minutes)


def test_several_trades_share_a_millisecond(minutes: list[Trade]) -> None:
    assert max(Counter((trade.asset, trade.at_ms) for trade in minutes).values()) >= 20


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_now_and_then_a_price_moves_more_than_two_percent_within_ten_seconds(seed: int) -> None:
    recent: dict[str, list[Trade]] = defaultdict(list)
    jumps = set()
    for trade in trades(FIVE, 50.0, seed):
        if trade.at_ms > 60_000:
            break
        window = [old for old in recent[trade.asset] if old.at_ms > trade.at_ms - 10_000]
        prices = [Decimal(old.price) for old in window] or [Decimal(trade.price)]
        change = max(Decimal(trade.price) / min(prices) - 1, 1 - Decimal(trade.price) / max(prices))
        if change > Decimal("0.02"):
            jumps.add((trade.asset, trade.at_ms // 10_000))
        recent[trade.asset] = [*window, trade]
    # The first comes within 20 s, and it stays an exception.
    assert jumps
    assert min(ten for _, ten in jumps) <= 2
    assert len(jumps) < 12


def test_prices_are_whole_ticks_above_zero_in_eight_decimals() -> None:
    for trade in islice(trades(list(ASSETS), 1000.0, seed=5), 20_000):
        _, price_decimals, quantity_decimals, _ = ASSETS[trade.asset]
        for text, decimals in ((trade.price, price_decimals), (trade.quantity, quantity_decimals)):
            whole, point, fraction = text.partition(".")
            assert point
            assert len(fraction) == 8
            assert set(fraction[decimals:]) <= {"0"}
            assert whole == str(int(whole))
            assert Decimal(text) > 0


def test_every_asset_of_the_market_has_a_name_at_binance() -> None:
    assert set(ASSETS) == set(VENUES["binance"].instruments)
