"""Deduplication: promise 1, silver has each tick once, whatever came again, in whatever order and cut."""

from __future__ import annotations

import itertools
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from lake.intervals import Interval, add_interval
from lake.metrics import Bucket, Newest
from lake.seen import Found, Seen
from lake.summaries import Summary

runs = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 8)).map(lambda run: (run[0], run[0] + run[1])), max_size=12
)


@given(runs)
def test_intervals_hold_exactly_the_numbers_added_in_the_fewest_runs(added: list[Interval]) -> None:
    intervals: tuple[Interval, ...] = ()
    for run in added:
        intervals = add_interval(intervals, run)
    held = [number for first, last in intervals for number in range(first, last + 1)]
    assert held == sorted({number for first, last in added for number in range(first, last + 1)})
    assert all(last + 1 < first for (_, last), (first, _) in itertools.pairwise(intervals))


def test_the_state_survives_its_journey_through_a_commit() -> None:
    seen = Seen(
        {("binance", "BTCUSDT", 0): ((1, 5), (9, 9)), ("kraken", "BTC/USD", 2): ((-3, 4),)},
        {("p-1", 3): 77},
        {("binance", "bitcoin"): 1_723_161_600},
    )
    assert Seen.from_json(seen.to_json()) == seen


def test_what_is_found_widens_what_was_seen_and_never_narrows_it() -> None:
    instrument, one = ("s", "y", 0), Decimal(1)
    order = (0, 0, None, None, None, "")
    prices = Summary(1, one, 0.0, one, one, one, order, one, order, None, None)
    newest = Newest((0, 0, "s", None, None, None, ""), one, 0)
    seen = Seen()
    for last in (10, 4, 7):
        bucket = Bucket(("s", "a"), last * 12 + 11, prices, newest)
        seen = seen.with_found(Found([(instrument, (last - 2, last))], [(("p", 1), last)], [bucket]))
    assert seen == Seen({instrument: ((2, 10),)}, {("p", 1): 10}, {("s", "a"): 600})
