"""Promise 4: a tick that could not be received is named."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestion.gaps import Gap, GapTracker
from ingestion.ticks import Reject, Tick

SECOND = 10**9
START = 1_723_161_600 * SECOND


def tick(trade_id: int | None, at: float = 0.0, *, event: float | None = None, symbol: str = "BTCUSDT") -> Tick:
    made = at if event is None else event
    at_ns, event_ns = START + int(at * SECOND), START + int(made * SECOND)
    return Tick(
        at_ns, "bitcoin", "1.5", "USDT", "binance", symbol, None if trade_id is None else event_ns, "1", trade_id
    )


def now(at: float) -> int:
    return START + int(at * SECOND)


def brief(gaps: list[Gap]) -> list[tuple[int | None, int | None, str]]:
    return [(gap.first_missing, gap.last_missing, gap.status) for gap in gaps]


def with_hole() -> GapTracker:
    """20 to 29 are missing, and reported."""
    tracker = GapTracker()
    for number in (*range(10, 20), 30):
        tracker.observe(tick(number))
    assert brief(tracker.changes(now(1))) == [(20, 29, "open")]
    return tracker


def test_numbers_without_a_hole_are_no_gap() -> None:
    tracker = GapTracker()
    for number in range(100):
        assert tracker.observe(tick(number)) is not None
    assert tracker.changes(now(100)) == []


def test_a_hole_is_a_row_with_the_contracts_fields_once() -> None:
    tracker = GapTracker()
    tracker.observe(tick(10, 1))
    tracker.disconnected("binance", now(2))
    tracker.observe(tick(13, 5))
    assert tracker.changes(now(5.5)) == []
    (gap,) = tracker.changes(now(6))
    assert json.loads(gap.to_json()) == {
        "gap_id": "binance:BTCUSDT:0:11",
        "source": "binance",
        "symbol": "BTCUSDT",
        "trade_epoch": 0,
        "first_missing": 11,
        "last_missing": 12,
        "disconnected_at": "2024-08-09T00:00:02.000000Z",
        "detected_at": "2024-08-09T00:00:05.000000Z",
        "status": "open",
        "reason": None,
        "filled_at": None,
        "filled_by": None,
    }
    assert gap.key == b"binance:BTCUSDT"
    assert tracker.changes(now(7)) == []


def test_trades_that_mix_for_a_moment_are_no_gap() -> None:
    """Two connections overlap while one replaces the other."""
    tracker = GapTracker()
    for number in (1, 4, 2, 5, 3, 6):
        tracker.observe(tick(number))
    assert tracker.changes(now(60)) == []


def test_a_gap_that_the_feed_fills_is_filled() -> None:
    tracker = with_hole()
    for number in range(20, 30):
        tracker.observe(tick(number))
    (gap,) = tracker.changes(now(3))
    assert (gap.gap_id, gap.status, gap.filled_by, gap.filled_at) == ("binance:BTCUSDT:0:20", "filled", "feed", now(3))
    assert tracker.open_gap_count("binance") == 0


def test_a_partial_fill_splits_the_row() -> None:
    tracker = with_hole()
    for number in (23, 24, 27):
        assert tracker.observe_backfilled(tick(number), 0)
    assert not tracker.observe_backfilled(tick(23), 0)
    rows = tracker.changes(now(3))
    assert brief(rows) == [
        (20, 22, "open"), (23, 24, "filled"), (25, 26, "open"), (27, 27, "filled"), (28, 29, "open")
    ]  # fmt: skip
    assert [row.gap_id for row in rows] == [f"binance:BTCUSDT:0:{first}" for first in (20, 23, 25, 27, 28)]
    assert {row.filled_by for row in rows if row.status == "filled"} == {"backfill"}
    assert brief([gap for gap, _ in tracker.open_gaps()]) == [(20, 22, "open"), (25, 26, "open"), (28, 29, "open")]


def test_what_cannot_be_filled_is_unfillable_with_its_reason_and_the_rest_filled() -> None:
    tracker = with_hole()
    ((gap, before_ns),) = tracker.open_gaps()
    assert before_ns == START
    for number in range(20, 26):
        tracker.observe_backfilled(tick(number), 0)
    rows = tracker.give_up(gap, "the venue has no such trade", now(4))
    assert brief(rows) == [(20, 25, "filled"), (26, 29, "open"), (26, 29, "unfillable")]
    assert rows[-1].reason == "the venue has no such trade"
    assert tracker.open_gaps() == []
    assert tracker.changes(now(60)) == []


def test_a_hole_across_a_restart_is_a_gap_since_the_last_tick() -> None:
    tracker = GapTracker()
    tracker.observe(tick(10, 1))
    tracker.observe(tick(11, 2))
    again = GapTracker.from_json(json.loads(json.dumps(tracker.to_json())))
    again.resumed()
    again.observe(tick(20, 50))
    (gap,) = again.changes(now(51))
    assert (gap.first_missing, gap.last_missing, gap.disconnected_at) == (12, 19, now(2))


def test_what_was_observed_after_the_last_save_is_observed_again() -> None:
    """A crash: the state is older than what is durable in the spool."""
    tracker = GapTracker()
    for number in (10, 11, 20):
        tracker.observe(tick(number))
    state = json.loads(json.dumps(tracker.to_json()))
    spooled = [tracker.observe(tick(number, at)) for number, at in ((13, 0), (21, 0), (2, 5), (3, 5), (7, 5))]
    assert [one.trade_epoch for one in spooled] == [0, 0, 1, 1, 1]
    again = GapTracker.from_json(state)
    for one in spooled:
        again.observe_again(one)
    again.resumed()
    assert again.observe(tick(9, 60)).trade_epoch == 1
    rows = again.changes(now(62))
    assert brief(rows) == [(12, 12, "open"), (14, 19, "open"), (4, 6, "open"), (8, 8, "open")]
    assert [row.trade_epoch for row in rows] == [0, 0, 1, 1]


def test_open_gaps_survive_a_restart() -> None:
    tracker = with_hole()
    again = GapTracker.from_json(json.loads(json.dumps(tracker.to_json())))
    assert again.open_gaps() == tracker.open_gaps()
    assert again.changes(now(9)) == []
    for number in range(20, 25):
        again.observe_backfilled(tick(number), 0)
    # Filled, and not reported when it ended.
    again = GapTracker.from_json(json.loads(json.dumps(again.to_json())))
    assert brief(again.changes(now(10))) == [(20, 24, "filled"), (25, 29, "open")]


def test_a_heartbeat_names_the_last_trade_when_it_never_comes() -> None:
    """A trailing hole counts once a later id is known, and the trade has had its time."""
    tracker = GapTracker()
    tracker.observe(tick(10))
    tracker.mentioned("binance", "BTCUSDT", 12, now(1))
    assert tracker.changes(now(2)) == []
    assert brief(tracker.changes(now(3))) == [(11, 12, "open")]
    tracker.mentioned("binance", "BTCUSDT", 13, now(4))
    tracker.observe(tick(13, 4.1))
    assert tracker.changes(now(60)) == []


def test_a_heartbeat_before_the_first_trade_is_where_following_begins() -> None:
    tracker = GapTracker()
    tracker.mentioned("binance", "BTCUSDT", 12, now(1))
    tracker.observe(tick(15, 2))
    assert brief(tracker.changes(now(9))) == [(13, 14, "open")]


def test_repeats_are_neither_gaps_nor_a_new_epoch() -> None:
    """A snapshot after a reconnect repeats old trades; a bad venue repeats any."""
    tracker = GapTracker()
    for number in range(100):
        tracker.observe(tick(number, number))
    for number in (*range(50, 100), 99, 0):
        assert tracker.observe(tick(number, 200, event=number)).trade_epoch == 0
    assert tracker.changes(now(300)) == []


@pytest.mark.parametrize(("highest", "first", "later"), [(5_000_000, 1, 0.0), (90, 1, 1.5), (50_000, 49_990, 2.0)])
def test_a_venue_that_starts_its_numbers_again_raises_the_epoch(highest: int, first: int, later: float) -> None:
    tracker = GapTracker()
    tracker.observe(tick(highest))
    one = tracker.observe(tick(first, later))
    two = tracker.observe(tick(first + 1, later))
    assert (one.trade_epoch, two.trade_epoch) == (1, 1)
    tracker.observe(tick(first + 5, later))
    (gap,) = tracker.changes(now(10))
    assert gap.gap_id == f"binance:BTCUSDT:1:{first + 2}"
    again = GapTracker.from_json(tracker.to_json())
    assert again.observe(tick(first + 6, 11)).trade_epoch == 1


def test_a_rejected_trade_is_not_missing_and_a_mad_number_is_not_believed() -> None:
    def reject(trade_id: int) -> Reject:
        return Reject(START, "binance", "price p is '0'", b"", "BTCUSDT", trade_id)

    tracker = GapTracker()
    tracker.observe(tick(10))
    tracker.observe_reject(reject(11))
    tracker.observe(tick(12))
    tracker.observe_reject(reject(10**15))
    tracker.observe(tick(13))
    tracker.observe(tick(15))
    tracker.observe_reject(reject(14))
    assert tracker.changes(now(60)) == []


def test_a_symbol_that_was_left_and_comes_back_has_no_gap_between() -> None:
    tracker = with_hole()
    tracker.follow_anew("binance", "BTCUSDT")
    tracker.disconnected("binance", now(30))
    tracker.observe(tick(1_000, 60))
    tracker.observe(tick(1_002, 60))
    assert brief(tracker.changes(now(62))) == [(1_001, 1_001, "open")]
    assert tracker.open_gap_count("binance") == 2


def test_a_symbol_that_is_not_wanted_after_a_restart_has_no_gap_until_it_is() -> None:
    tracker = GapTracker()
    for symbol in ("BTCUSDT", "ETHUSDT"):
        tracker.observe(tick(10, symbol=symbol))
        tracker.observe(tick(None, symbol=f"price of {symbol}"))
    tracker.follow_only("binance", ["BTCUSDT", "price of BTCUSDT"])
    tracker.resumed()
    assert [gap.symbol for gap in tracker.changes(now(1))] == ["price of BTCUSDT"]
    for symbol in ("BTCUSDT", "ETHUSDT"):
        tracker.observe(tick(20, 5, symbol=symbol))
    assert [gap.symbol for gap in tracker.changes(now(9))] == ["BTCUSDT"]


def test_without_numbers_the_time_of_the_disconnection_is_the_gap() -> None:
    def price(at: float) -> Tick:
        return replace(tick(None, at, symbol="bitcoin"), source="coincap")

    tracker = GapTracker()
    tracker.observe(price(1))
    tracker.disconnected("coincap", now(2))
    tracker.disconnected("coincap", now(3))
    (opened,) = tracker.changes(now(3))
    assert opened.gap_id == "coincap:bitcoin:2024-08-09T00:00:02.000000Z"
    assert (opened.first_missing, opened.disconnected_at, opened.status) == (None, now(2), "open")
    tracker = GapTracker.from_json(tracker.to_json())
    tracker.resumed()
    tracker.observe(price(9))
    tracker.observe(price(10))
    (closed,) = tracker.changes(now(11))
    assert (closed.gap_id, closed.status) == (opened.gap_id, "unfillable")
    assert closed.reason is not None
    assert "2024-08-09T00:00:09" in closed.reason
    assert tracker.changes(now(60)) == []


@given(st.permutations(range(1, 40)), st.sets(st.integers(2, 38)), st.integers(0, 39))
def test_exactly_what_never_came_is_open_whatever_the_order_and_wherever_it_restarts(
    order: list[int], lost: set[int], restart: int
) -> None:
    tracker = GapTracker()
    tracker.observe(tick(0))
    rows: dict[str, Gap] = {}
    for place, number in enumerate(order):
        if place == restart:
            tracker = GapTracker.from_json(json.loads(json.dumps(tracker.to_json())))
            tracker.resumed()
        if number not in lost:
            tracker.observe(tick(number))
        if place % 5 == 0:
            rows |= {gap.gap_id: gap for gap in tracker.changes(now(place))}
    tracker.observe(tick(40))
    rows |= {gap.gap_id: gap for gap in tracker.changes(now(100))}
    named = [
        number
        for gap in rows.values()
        if gap.status == "open" and gap.first_missing is not None and gap.last_missing is not None
        for number in range(gap.first_missing, gap.last_missing + 1)
    ]
    assert sorted(named) == sorted(lost)


def test_thousands_of_open_holes_cost_little() -> None:
    """A venue whose REST is away for long, while one frame in a hundred is broken."""
    tracker = GapTracker()
    for number in range(400_000):
        if number % 100:
            tracker.observe(tick(number, number / 2000))
    began = time.process_time()
    assert len(tracker.changes(now(300))) == 3_999
    for turn in range(20):
        tracker.changes(now(300 + turn))
        assert len(tracker.open_gaps()) == 3_999 - turn
        assert tracker.observe_backfilled(tick(100 * (turn + 1)), 0)
    for gap, _ in tracker.open_gaps():
        assert brief(tracker.give_up(gap, "refused", now(400)))[-1][2] == "unfillable"
    assert tracker.open_gap_count("binance") == 0
    assert time.process_time() - began < 5


# A number that is known without its trade has no time, and its trade may still come.


def coinbase_like(*, mention_at: float = 60) -> GapTracker:
    """Trade 100 has come, and of 101 it is known that it was made a minute later."""
    tracker = GapTracker()
    tracker.observe(tick(100, 0))
    tracker.mentioned("binance", "BTCUSDT", 101, now(mention_at))
    assert brief(tracker.changes(now(mention_at + 5))) == [(101, 101, "open")]
    return tracker


@pytest.mark.parametrize("between", ["nothing", "a backfill", "giving up", "a restart", "a backfill and a restart"])
def test_a_trade_that_was_announced_and_comes_later_is_no_new_epoch(between: str) -> None:
    """Coinbase's ticker told of it, its match was never sent, and it is the last_match after a reconnect."""
    tracker = coinbase_like()
    if "backfill" in between:
        assert tracker.observe_backfilled(tick(101, 66, event=60), 0)
    if between == "giving up":
        tracker.give_up(tracker.open_gaps()[0][0], "no history", now(66))
    if "restart" in between:
        tracker = GapTracker.from_json(json.loads(json.dumps(tracker.to_json())))
        tracker.resumed()
    tracker.disconnected("binance", now(70))
    came = [tracker.observe(tick(number, at, event=made)) for number, at, made in ((101, 72, 60), (102, 80, 80))]
    assert [each.trade_epoch for each in came] == [0, 0]
    assert tracker.open_gaps() == []


def test_a_rejected_trade_that_comes_whole_later_is_no_new_epoch() -> None:
    tracker = GapTracker()
    tracker.observe(tick(100, 0))
    tracker.observe_reject(Reject(now(60), "binance", "price", b"", "BTCUSDT", 101))
    assert tracker.observe(tick(101, 72, event=60)).trade_epoch == 0
    assert tracker.observe(tick(102, 80)).trade_epoch == 0


def test_a_first_number_that_was_only_mentioned_is_no_new_epoch_when_its_trade_comes() -> None:
    tracker = GapTracker()
    tracker.mentioned("binance", "BTCUSDT", 101, now(0))
    assert tracker.observe(tick(101, 50)).trade_epoch == 0
    assert tracker.observe(tick(102, 60)).trade_epoch == 0


def test_numbers_that_begin_again_after_an_announcement_are_a_new_epoch() -> None:
    tracker = coinbase_like()
    assert [tracker.observe(tick(number, 80 + number)).trade_epoch for number in (1, 2, 3)] == [1, 1, 1]


def test_a_trade_that_was_spooled_before_a_crash_and_announced_is_no_new_epoch() -> None:
    tracker = coinbase_like()
    tracker.observe_again(tick(101, 66, event=60))
    assert tracker.observe(tick(101, 72, event=60)).trade_epoch == 0


def test_an_announced_number_beyond_belief_moves_nothing() -> None:
    tracker = GapTracker()
    tracker.observe(tick(100, 0))
    tracker.mentioned("binance", "BTCUSDT", 10**17, now(1))
    assert tracker.changes(now(60)) == []
    tracker.observe(tick(103, 61))
    assert brief(tracker.changes(now(70))) == [(101, 102, "open")]
