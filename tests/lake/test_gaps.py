"""Gaps: promise 4, every number that is missing is in one row that says so, and no other is."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from lake.gaps import LATER_DELIVERY, UNREPORTED, Gap, reconciled, unfilled
from lake.intervals import Instrument, Interval, add_interval, common, holes, minus

AT = datetime(2024, 8, 9, tzinfo=UTC)
BTC: Instrument = ("binance", "BTCUSDT", 0)

runs = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)).map(lambda run: (run[0], run[0] + run[1])), max_size=8)


def intervals(added: list[Interval]) -> tuple[Interval, ...]:
    whole: tuple[Interval, ...] = ()
    for run in added:
        whole = add_interval(whole, run)
    return whole


def numbers(of: list[Interval] | tuple[Interval, ...]) -> set[int]:
    return {number for first, last in of for number in range(first, last + 1)}


def report(first: int, last: int, status: str = "open", reason: str = "disconnected", **more: str) -> Gap:
    return Gap(f"{':'.join(map(str, BTC))}:{first}", *BTC, first, last, AT, AT, status, reason, **more)  # type: ignore[arg-type]


@given(runs, runs)
def test_interval_arithmetic_is_that_of_sets(left: list[Interval], right: list[Interval]) -> None:
    a, b = intervals(left), intervals(right)
    assert numbers(minus(a, b)) == numbers(a) - numbers(b)
    assert numbers(common(a, b)) == numbers(a) & numbers(b)
    missing = set(range(min(numbers(a)), max(numbers(a)))) - numbers(a) - numbers(b) if a else set()
    assert numbers(holes(a, b)) == missing


@given(st.lists(st.tuples(runs, st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9), st.booleans())))), runs)
def test_rows_name_exactly_the_missing_numbers_however_they_come(
    steps: list[tuple[list[Interval], list[tuple[int, int, bool]]]], rejected: list[Interval]
) -> None:
    """At each step: open and unfillable rows are disjoint and cover the holes; filled rows' numbers have come."""
    rows: dict[str, Gap] = {}
    table: dict[str, Gap] = {}
    seen: tuple[Interval, ...] = ()
    for delivered, said in steps:
        for run in delivered:
            seen = add_interval(seen, run)
        missing = holes(seen, intervals(rejected))
        reports = [report(first, first + more, "unfillable" if lost else "open") for first, more, lost in said]
        changed = reconciled(rows, {BTC: missing}, reports, AT)
        rows = unfilled([*rows.values(), *changed])
        table |= {gap.gap_id: gap for gap in changed}
        named = [gap.interval for gap in table.values() if gap.status != "filled" and gap.interval]
        assert sorted(number for run in named for number in range(run[0], run[1] + 1)) == sorted(numbers(missing))
        filled = [gap.interval for gap in table.values() if gap.status == "filled" and gap.interval]
        assert numbers(filled) <= numbers(seen) | numbers(rejected)
        assert all(gap.gap_id.endswith(f":{gap.first_missing}") for gap in table.values())
        assert reconciled(rows, {BTC: missing}, [], AT) == [], "nothing new changes nothing"


def test_a_hole_that_nobody_reported_is_a_row_until_it_is_filled() -> None:
    [gap] = reconciled({}, {BTC: [(5, 9)]}, [], AT)
    assert (gap.gap_id, gap.interval, gap.status, gap.reason) == ("binance:BTCUSDT:0:5", (5, 9), "open", UNREPORTED)
    [filled] = reconciled({gap.gap_id: gap}, {BTC: []}, [], AT)
    assert (filled.status, filled.filled_at, filled.filled_by) == ("filled", AT, LATER_DELIVERY)


def test_a_partial_fill_splits_the_row_and_what_was_said_stays() -> None:
    [gap] = reconciled({}, {BTC: [(10, 20)]}, [report(10, 20)], AT)
    assert gap.reason == "disconnected"
    told = report(13, 14, "filled", filled_by="history")
    changed = {
        row.gap_id.rpartition(":")[2]: row
        for row in reconciled({gap.gap_id: gap}, {BTC: [(10, 12), (15, 20)]}, [told], AT)
    }
    assert {key: (row.interval, row.status) for key, row in changed.items()} == {
        "10": ((10, 12), "open"),
        "13": ((13, 14), "filled"),
        "15": ((15, 20), "open"),
    }
    assert (changed["15"].reason, changed["13"].filled_by) == ("disconnected", "history")


def test_what_cannot_be_filled_says_why_and_what_has_come_is_not_reported_missing() -> None:
    lost = report(10, 20, "unfillable", "the venue keeps an hour")
    [gap] = reconciled({}, {BTC: [(15, 20)]}, [report(10, 20), lost], AT)
    assert (gap.interval, gap.status, gap.reason) == ((15, 20), "unfillable", "the venue keeps an hour")


def test_a_venue_without_numbers_has_only_the_reports() -> None:
    away = Gap("coincap:bitcoin:1723", "coincap", "bitcoin", 0, None, None, AT, AT, "open", "disconnected")
    assert reconciled({}, {}, [away], AT) == [away]
    assert reconciled({away.gap_id: away}, {}, [away], AT) == []
