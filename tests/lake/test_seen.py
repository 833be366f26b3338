"""Deduplication: promise 1, silver has each tick once, whatever came again, in whatever order and cut."""

from __future__ import annotations

import itertools
import json
from decimal import Decimal

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from lake.canonical import canonical
from lake.intervals import Interval, add_interval
from lake.metrics import Bucket, Newest
from lake.overview import Overview, overview
from lake.seen import Found, Seen
from lake.summaries import Summary
from tests.lake.test_ticks import TICK, arrow

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


def ticks(*rows: tuple[int, int | None, int | None]) -> pa.Table:
    """Of one producer in one partition: offset, trade id, sequence."""
    values = [
        json.dumps({**TICK, "trade_id": trade_id, "sequence": sequence}, separators=(",", ":")).encode()
        for _, trade_id, sequence in rows
    ]
    offsets = pa.array([offset for offset, *_ in rows], pa.int64())
    return canonical(arrow(values).set_column(4, "offset", offsets), (), 5.0).ticks


def found(*parts: list[tuple[int, int | None, int | None]]) -> Overview:
    """By as many tasks."""
    whole = Overview()
    for part in parts:
        whole.add(overview(ticks(*part), {})[0])
    return whole


def test_an_overview_tells_new_ticks_from_repeats_and_from_holes() -> None:
    """Of all tasks together, and whatever the order in which a task has them."""
    seen = Seen({("binance", "BTCUSDT", 0): ((1, 4), (8, 9))}, {("p", 0): 70})
    new = found([(0, 7, 1), (1, 5, 2)], [(2, 12, 3), (3, 11, 4)])
    assert sorted(new.runs) == [(("binance", "BTCUSDT", 0), run) for run in ((5, 5), (7, 7), (11, 12))]
    assert seen.has_none_of(new)
    for repeated in (
        found([(0, 7, 1), (1, 5, 2), (2, 7, 3)]),
        found([(0, 7, 1)], [(1, 7, 2)]),
        found([(0, 10, 1), (1, 9, 2)]),
        found([(0, 2, 1)]),
    ):
        assert not seen.has_none_of(repeated)


def test_an_overview_tells_sequences_that_ascend_from_those_that_came_before() -> None:
    seen = Seen({}, {("p", 0): 70})
    new = found([(8, None, 90), (5, None, 71)], [(9, None, 91)])
    assert sorted(part[2:] for part in new.sequences) == [(5, 8, 71, 90), (9, 9, 91, 91)]
    assert seen.has_none_of(new)
    assert seen.with_found(Found.of(new, {})).producers == {("p", 0): 91}
    for repeated in (
        found([(5, None, 70)]),
        found([(5, None, 72), (6, None, 71)]),
        found([(5, None, 71), (6, None, 71)]),
        found([(5, None, 71)], [(6, None, 71)]),
        # The one in the middle is above the last: offsets decide, whichever task had them.
        found([(5, None, 71), (7, None, 72)], [(6, None, 80)]),
    ):
        assert not seen.has_none_of(repeated)
    assert seen.has_none_of(found([(5, None, None), (6, None, None)])), "they are told apart by their offsets"
