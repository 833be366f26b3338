"""Gaps: promise 4, every missing id is in one row that says so, and no other id is; at the cost of what changed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from itertools import count, pairwise
from typing import Any, TypeVar, overload

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lake.intervals import (
    Instrument,
    Interval,
    add_interval,
    add_intervals,
    common,
    holes,
    holes_within,
    minus,
    overlapping,
    overlaps,
)
from lake.silver.gaps import (
    LATER_DELIVERY,
    STATUSES,
    UNREPORTED,
    EarlyReports,
    Gap,
    InstrumentChange,
    UnfilledGaps,
    instrument_changes,
)
from lake.tables import SILVER_GAPS

AT = datetime(2024, 8, 9, tzinfo=UTC)
BTC: Instrument = ("binance", "BTCUSDT", 0)
ETH: Instrument = ("kraken", "ETH/USD", 1)

Run = tuple[Instrument, Interval]
Item = TypeVar("Item")


def report(
    first: int, last: int, status: str = "open", reason: str = "disconnected", of: Instrument = BTC, **more: Any
) -> Gap:
    return Gap("ingester", *of, first, last, AT, AT, status, reason, **more)


def ids(intervals: Iterable[Interval]) -> set[int]:
    return {number for first, last in intervals for number in range(first, last + 1)}


@dataclass
class Job:
    """What the streaming job does with a micro-batch's ids and reports, and the table silver.gaps."""

    seen: dict[Instrument, tuple[Interval, ...]] = field(default_factory=dict)
    rejected: dict[Instrument, tuple[Interval, ...]] = field(default_factory=dict)
    early: EarlyReports = field(default_factory=EarlyReports)
    unfilled: UnfilledGaps = field(default_factory=UnfilledGaps)
    table: dict[str, Gap] = field(default_factory=dict)

    def run(
        self,
        ticks: Sequence[Run] = (),
        reports: Sequence[Gap] = (),
        rejects: Sequence[Run] = (),
        at: datetime = AT,
        crash: bool = False,
    ) -> list[Gap]:
        """The rows that change. crash: the job ends when silver.ticks is committed and silver.gaps is not yet."""
        new = [(of, part) for of, run in ticks for part in minus([run], self.seen.get(of, ()))]
        for known, runs in ((self.seen, new), (self.rejected, rejects)):
            for of, run in runs:
                known[of] = add_interval(known.get(of, ()), run)
        batch = instrument_changes(self.seen, self.rejected, new, rejects, reports)
        self.early = self.early.after(batch, reports)
        changes = self.unfilled.changes(batch, (*self.early.due, *reports), at)
        if crash:
            self.early = EarlyReports.from_json(json.loads(json.dumps(self.early.to_json())))
            self.unfilled = UnfilledGaps(self.table.values())
            batch = instrument_changes(self.seen, self.rejected, new, rejects, (*self.early.due, *reports))
        again = self.unfilled.changes(batch, (*self.early.due, *reports), at)
        assert by_id(again) == by_id(changes), "until they are accepted, the changes stay the same"
        assert all(self.table.get(row.gap_id) != row for row in changes), "only rows that change"
        self.table |= by_id(changes)
        self.unfilled.accept(changes)
        return changes


def by_id(rows: Iterable[Gap]) -> dict[str, Gap]:
    named = [(row.gap_id, row) for row in rows]
    assert len(dict(named)) == len(named), "a row changes once in a micro-batch"
    return dict(named)


def unfilled(rows: Iterable[Gap]) -> dict[str, Gap]:
    return {row.gap_id: row for row in rows if row.status != "filled"}


# The arithmetic of intervals

runs = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)).map(lambda run: (run[0], run[0] + run[1])), max_size=8)
sorted_runs = runs.map(lambda added: add_intervals((), added))


@given(runs, runs, st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted))
def test_interval_arithmetic_is_that_of_sets(left: list[Interval], right: list[Interval], ends: list[int]) -> None:
    a, b, window = add_intervals((), left), add_intervals((), right), (ends[0], ends[1])
    both = add_intervals(a, right)
    assert ids(both) == ids(left) | ids(right)
    assert all(one[1] + 1 < other[0] for one, other in pairwise(both))
    one_by_one = a
    for run in right:
        one_by_one = add_interval(one_by_one, run)
    assert one_by_one == both
    assert ids(minus(a, b)) == ids(a) - ids(b)
    assert ids(common(a, b)) == ids(a) & ids(b)
    missing = set(range(min(ids(a)), max(ids(a)))) - ids(a) - ids(b) if a else set()
    assert ids(holes(a, b)) == missing
    assert ids(holes_within(a, b, window)) == missing & ids([window])
    assert list(overlapping(a, window)) == [run for run in a if ids([run]) & ids([window])]
    assert overlaps(a, window) == bool(ids(a) & ids([window]))


@given(sorted_runs, sorted_runs)
def test_adjacent_intervals_keep_their_ends(a: tuple[Interval, ...], b: tuple[Interval, ...]) -> None:
    """Rows of silver.gaps may be adjacent, and are rows of their own."""
    single = [(number, number) for number in sorted(ids(a))]
    assert minus(single, b) == [(number, number) for number in sorted(ids(a) - ids(b))]
    assert common(single, b) == [(number, number) for number in sorted(ids(a) & ids(b))]
    assert common(b, single) == common(single, b)


# The promise, by plain sets


@dataclass
class Promise:
    """What silver.gaps must say of an instrument, id by id."""

    seen: set[int] = field(default_factory=set)
    rejected: set[int] = field(default_factory=set)
    missing: set[int] = field(default_factory=set)
    came: set[int] = field(default_factory=set)
    # The last report of an id that was missing, or above all that silver had seen.
    says: dict[int, Gap] = field(default_factory=dict)
    since: dict[int, datetime] = field(default_factory=dict)

    def run(self, ticks: set[int], rejects: set[int], reports: Iterable[Gap], at: datetime) -> None:
        was_missing = self.missing
        self.seen |= ticks
        self.rejected |= rejects
        highest = max(self.seen, default=-1)
        self.missing = set(range(min(self.seen, default=0), highest)) - self.seen - self.rejected
        self.came |= was_missing - self.missing
        self.since |= dict.fromkeys(self.missing - was_missing, at)
        # What was reported of an id below all that silver has seen is forgotten.
        counts = self.missing | self.came
        self.says = {n: gap for n, gap in self.says.items() if n in counts or n > highest}
        for gap in reports:
            if gap.status != "filled" and gap.interval:
                self.says |= {n: gap for n in ids([gap.interval]) if n in self.missing or n > highest}

    def of(self, number: int) -> tuple[str, str | None, datetime | None, datetime]:
        """status, reason, disconnected_at and detected_at of an id that is or was missing."""
        gap = self.says.get(number)
        if gap is None:
            return ("open", UNREPORTED, None, self.since[number])
        return (gap.status, gap.reason, gap.disconnected_at, gap.detected_at)


def each_id(rows: Iterable[Gap], of: Instrument) -> Iterator[tuple[int, Gap]]:
    for row in rows:
        if row.instrument == of and row.interval:
            yield from ((number, row) for number in range(row.interval[0], row.interval[1] + 1))


instruments = st.sampled_from([BTC, BTC, ETH])
intervals = st.tuples(st.integers(0, 40), st.integers(0, 9)).map(lambda run: (run[0], run[0] + run[1]))
named_runs = st.lists(st.tuples(instruments, intervals), max_size=4)
drawn_reports = st.lists(st.tuples(instruments, st.none() | intervals, st.sampled_from(STATUSES)), max_size=4)
steps = st.lists(st.tuples(named_runs, drawn_reports, named_runs | st.just([]), st.booleans()), max_size=7)
Step = tuple[list[Run], list[tuple[Instrument, Interval | None, str]], list[Run], bool]


def micro_batches(drawn: list[Step]) -> Iterator[tuple[list[Run], list[Gap], list[Run], datetime, bool]]:
    """Reports that differ from each other, and a time for each micro-batch."""
    serial = count(1)
    for minute, (ticks, drawn_gaps, rejects, crash) in enumerate(drawn):
        reports = []
        for of, interval, status in drawn_gaps:
            number = next(serial)
            found = AT + timedelta(seconds=number)
            filled = (found, f"history {number}") if status == "filled" else (None, None)
            first, last = interval or (None, None)
            gap_id = f"{of[0]}:{number % 3}"
            reports.append(Gap(gap_id, *of, first, last, found, found, status, f"reason {number}", *filled))
        yield ticks, reports, rejects, AT + timedelta(minutes=minute + 1), crash


@settings(max_examples=300, deadline=None)
@given(steps)
def test_rows_name_exactly_the_missing_ids_however_they_come(drawn: list[Step]) -> None:
    """A missing id is in one open or unfillable row, as its last report says; one that came is in one filled row."""
    job, promises = Job(), {BTC: Promise(), ETH: Promise()}
    without_ids: dict[str, Gap] = {}
    for ticks, reports, rejects, at, crash in micro_batches(drawn):
        changes = job.run(ticks, reports, rejects, at, crash)
        for of, promise in promises.items():
            come, broken = (ids(run for other, run in runs if other == of) for runs in (ticks, rejects))
            said = [gap for gap in reports if gap.instrument == of]
            promise.run(come, broken, said, at)
            open_ids = list(each_id(unfilled(job.table.values()).values(), of))
            assert sorted(number for number, _ in open_ids) == sorted(promise.missing), "each once, and no other"
            for number, row in open_ids:
                assert (row.status, row.reason, row.disconnected_at, row.detected_at) == promise.of(number)
                assert (row.filled_at, row.filled_by) == (None, None)
            filled = list(each_id((row for row in job.table.values() if row.status == "filled"), of))
            assert sorted(number for number, _ in filled) == sorted(promise.came), "each once, and no other"
            for number, row in filled:
                assert row.reason == promise.of(number)[1]
            for row in changes:
                if row.instrument == of and row.status == "filled" and row.interval:
                    fills = [gap for gap in said if gap.status == "filled" and gap.interval]
                    of_it = [gap for gap in fills if ids([gap.interval or (0, -1)]) & ids([row.interval])]
                    by = (of_it[-1].filled_at, of_it[-1].filled_by) if of_it else (at, LATER_DELIVERY)
                    assert (row.filled_at, row.filled_by) == by
        numbered = [row for row in job.table.values() if row.interval]
        assert all(row.gap_id == f"{':'.join(map(str, row.instrument))}:{row.first_missing}" for row in numbered)
        without_ids |= {gap.gap_id: gap for gap in reports if gap.interval is None}
        assert {row.gap_id: row for row in job.table.values() if not row.interval} == without_ids
        assert by_id(job.unfilled) == unfilled(job.table.values())
        everything = {of: InstrumentChange(runs, job.rejected.get(of, ()), runs) for of, runs in job.seen.items()}
        assert job.unfilled.changes(everything, [], at) == [], "nothing new changes nothing, wherever one looks"


# The rules, one by one


def test_a_gap_has_the_columns_of_the_table() -> None:
    assert tuple(column.name for column in fields(Gap)) == tuple(SILVER_GAPS.column_names)
    gap = report(5, 9, "filled", filled_at=AT, filled_by="history")
    assert Gap.from_json(json.loads(json.dumps(gap.to_json()))) == gap


def test_a_hole_that_nobody_reported_is_a_row_until_it_is_filled() -> None:
    job = Job()
    [gap] = job.run([(BTC, (1, 4)), (BTC, (10, 12))])
    assert (gap.gap_id, gap.interval, gap.status, gap.reason) == ("binance:BTCUSDT:0:5", (5, 9), "open", UNREPORTED)
    later = AT + timedelta(hours=1)
    [filled] = job.run([(BTC, (5, 9))], at=later)
    assert (filled.gap_id, filled.interval) == (gap.gap_id, (5, 9))
    assert (filled.status, filled.filled_at, filled.filled_by) == ("filled", later, LATER_DELIVERY)
    assert list(job.unfilled) == []


def test_a_partial_fill_splits_the_row_and_its_reason_stays() -> None:
    job = Job()
    [gap] = job.run([(BTC, (1, 9)), (BTC, (21, 30))], [report(10, 20)])
    assert (gap.interval, gap.reason) == ((10, 20), "disconnected")
    fill = report(13, 14, "filled", filled_by="history")
    changes = {row.first_missing: row for row in job.run([(BTC, (13, 14))], [fill])}
    assert {first: (row.interval, row.status) for first, row in changes.items()} == {
        10: ((10, 12), "open"),
        13: ((13, 14), "filled"),
        15: ((15, 20), "open"),
    }
    assert (changes[15].reason, changes[13].filled_by) == ("disconnected", "history")


def test_what_cannot_be_filled_says_why_and_what_has_come_is_not_reported_missing() -> None:
    lost = report(10, 20, "unfillable", "the venue keeps an hour")
    [gap] = Job().run([(BTC, (1, 14)), (BTC, (21, 21))], [report(10, 20), lost])
    assert (gap.interval, gap.status, gap.reason) == ((15, 20), "unfillable", "the venue keeps an hour")


def test_a_report_of_a_part_of_a_row_splits_it() -> None:
    job = Job()
    job.run([(BTC, (1, 9)), (BTC, (31, 31))], [report(10, 30)])
    changes = job.run(reports=[report(15, 20, "unfillable", "lost")])
    assert sorted((row.interval, row.status) for row in changes if row.interval) == [
        ((10, 14), "open"),
        ((15, 20), "unfillable"),
        ((21, 30), "open"),
    ]


def test_a_report_over_two_rows_leaves_them_two() -> None:
    job = Job()
    job.run([(BTC, (1, 9)), (BTC, (31, 31))], [report(10, 20, reason="one"), report(21, 30, reason="other")])
    changes = job.run(reports=[report(1, 40, "unfillable", "lost")])
    assert [(row.interval, row.reason) for row in changes] == [((10, 20), "lost"), ((21, 30), "lost")]


def test_a_fill_that_is_reported_before_its_ticks_leaves_the_row_open() -> None:
    job = Job()
    job.run([(BTC, (1, 9)), (BTC, (21, 21))])
    assert job.run(reports=[report(10, 20, "filled", filled_by="history")]) == []


def test_ids_in_quarantine_are_not_missing() -> None:
    job = Job()
    [gap] = job.run([(BTC, (1, 9)), (BTC, (21, 21))], rejects=[(BTC, (10, 12)), (BTC, (22, 30))])
    assert gap.interval == (13, 20)
    changes = job.run(rejects=[(BTC, (13, 14))])
    assert sorted((row.interval, row.status) for row in changes if row.interval) == [
        ((13, 14), "filled"),
        ((15, 20), "open"),
    ]
    [tail] = job.run([(BTC, (35, 35))])
    assert tail.interval == (31, 34)


def test_an_id_below_all_others_makes_the_ids_above_it_missing() -> None:
    job = Job()
    job.run([(BTC, (100, 110)), (BTC, (120, 130))])
    [gap] = job.run([(BTC, (90, 91)), (BTC, (95, 95))])[:1]
    assert gap.interval == (92, 94)
    assert sorted(row.interval for row in job.unfilled if row.interval) == [(92, 94), (96, 99), (111, 119)]


def test_a_venue_without_numbers_has_only_the_reports() -> None:
    away = Gap("coincap:bitcoin:1723", "coincap", "bitcoin", 0, None, None, AT, AT, "open", "disconnected")
    unfilled_gaps = UnfilledGaps()
    assert unfilled_gaps.changes({}, [away], AT) == [away]
    unfilled_gaps.accept([away])
    assert unfilled_gaps.changes({}, [away], AT) == []


def test_a_report_whose_ends_are_swapped_speaks_of_no_id() -> None:
    job = Job()
    [gap] = job.run([(BTC, (1, 1)), (BTC, (9, 9))], [report(6, 3), report(60, 30)])
    assert (gap.interval, gap.reason) == ((2, 8), UNREPORTED)
    assert list(job.early) == []


def test_a_report_of_an_instrument_that_the_batch_lacks_is_an_error() -> None:
    with pytest.raises(KeyError, match="BTCUSDT"):
        UnfilledGaps().changes({}, [report(1, 2)], AT)
    with pytest.raises(KeyError, match="BTCUSDT"):
        EarlyReports().after({}, [report(1, 2)])


def test_rows_of_the_table_may_come_in_any_order() -> None:
    rows = [report(5, 6).of((5, 6)), report(1, 2).of((1, 2)), report(5, 6, "filled").of((5, 6))]
    assert list(UnfilledGaps(rows)) == [rows[1]]


# Reports that come before the ticks that show them true


def test_a_report_of_ids_above_the_highest_waits_until_a_later_one_is_seen() -> None:
    job = Job()
    assert job.run([(BTC, (1, 9))], [report(10, 20), report(12, 14, "unfillable", "lost")]) == []
    assert [gap.interval for gap in job.early] == [(10, 20), (12, 14)]
    assert job.run([(ETH, (1, 9))]) == []
    assert len(job.run([(BTC, (13, 13))])) == 2
    assert {row.interval: row.reason for row in job.unfilled} == {(10, 11): "disconnected", (12, 12): "lost"}
    assert [gap.interval for gap in job.early] == [(14, 20), (14, 14)]
    job.run([(BTC, (30, 30))])
    assert {row.interval: row.reason for row in job.unfilled} == {
        (10, 11): "disconnected",
        (12, 12): "lost",
        (14, 14): "lost",
        (15, 20): "disconnected",
        (21, 29): UNREPORTED,
    }
    assert list(job.early) == []


def test_a_report_that_waits_does_not_overrule_a_later_one() -> None:
    job = Job()
    job.run([(BTC, (1, 9)), (BTC, (15, 15))], [report(10, 20)])
    job.run(reports=[report(10, 14, "unfillable", "lost")])
    job.run([(BTC, (16, 16))])
    assert {row.interval: row.status for row in job.unfilled} == {(10, 14): "unfillable"}


def test_of_reports_that_waited_the_last_one_delivered_counts() -> None:
    job = Job()
    job.run([(BTC, (1, 9))], [report(14, 20), report(10, 30, "unfillable", "lost")])
    job.run([(BTC, (31, 31))])
    assert {row.interval: row.reason for row in job.unfilled} == {(10, 30): "lost"}


def test_a_report_of_the_highest_id_waits_no_more() -> None:
    job = Job()
    job.run([(BTC, (1, 9))], [report(10, 10)])
    job.run([(BTC, (10, 10))])
    assert list(job.early) == []


def test_a_report_that_is_due_is_kept_for_a_replay() -> None:
    """silver.ticks had the micro-batch, and with it this state; silver.gaps had not."""
    job = Job()
    job.run([(BTC, (1, 9))], [report(10, 20)])
    [gap] = job.run([(BTC, (21, 21))], crash=True)
    assert (gap.interval, gap.reason) == ((10, 20), "disconnected")


def test_reports_that_wait_are_read_as_an_earlier_version_kept_them() -> None:
    kept = [report(10, 20).to_json(), report(5, 30, "unfillable").to_json()]
    assert list(EarlyReports.from_json(kept)) == [report(10, 20), report(5, 30, "unfillable")]


def test_reports_wait_for_ids_of_their_own_instrument() -> None:
    job = Job()
    job.run(reports=[report(5, 6, of=ETH), report(5, 6), report(1, 2, of=ETH)])
    assert [gap for gap in job.early if gap.instrument == ETH] == [report(5, 6, of=ETH), report(1, 2, of=ETH)]
    job.run([(ETH, (1, 9))])
    assert list(job.early) == [report(5, 6)]


# The cost


class Counted(Sequence[Item]):
    """Counts how many of its items are looked at."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items, self.looks = items, 0

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, at: int) -> Item: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Item]: ...
    def __getitem__(self, at: int | slice) -> Item | Sequence[Item]:
        if isinstance(at, slice):
            part = self.items[at]
            self.looks += len(part)
            return part
        self.looks += 1
        return self.items[at]


def looks(open_gaps: int, change: str) -> int:
    """How many rows and intervals a micro-batch looks at, of an instrument that has so many gaps."""
    seen = tuple((number * 10, number * 10 + 6) for number in range(open_gaps + 1))
    rejected = tuple((number * 10 + 7, number * 10 + 7) for number in range(open_gaps))
    end, middle = open_gaps * 10 + 6, open_gaps // 2 * 10
    ticks: list[Interval] = {"a later id": [(end + 1, end + 5)], "a hole": [(end + 4, end + 8)]}.get(change, [])
    rejects: list[Interval] = []
    reports: list[Gap] = []
    if change == "a fill":
        ticks = [(middle + 8, middle + 8)]
    elif change == "an id below all others":
        ticks = [(-9, -9)]
    elif change == "a reject":
        rejects = [(middle + 8, middle + 8)]
    elif change == "a report":
        reports = [report(middle + 8, middle + 18, "unfillable")]
    unfilled_gaps = UnfilledGaps()
    unfilled_gaps.accept(unfilled_gaps.changes({BTC: InstrumentChange(seen, rejected, seen)}, [], AT))
    assert len(list(unfilled_gaps)) == open_gaps
    rows = Counted(unfilled_gaps._numbered[BTC])
    unfilled_gaps._numbered[BTC] = rows  # type: ignore[assignment]
    after = Counted(add_intervals(seen, ticks)), Counted(add_intervals(rejected, rejects))
    changes = unfilled_gaps.changes({BTC: InstrumentChange(*after, ticks, rejects)}, reports, AT)
    assert bool(changes) == (change != "a later id")
    return rows.looks + after[0].looks + after[1].looks


@pytest.mark.parametrize("change", ["a later id", "a hole", "a fill", "an id below all others", "a reject", "a report"])
def test_a_micro_batch_looks_at_what_it_changes_however_many_gaps_are_open(change: str) -> None:
    few, many = looks(500, change), looks(4000, change)
    # A bisection of eight times as many takes three more looks, and there are a few bisections.
    assert many <= few + 3 * 12
    assert many < 200


def test_early_reports_cost_nothing_while_they_wait() -> None:
    """Of thousands that wait, those that silver passes are looked at."""

    def waiting(reports: int) -> int:
        early = EarlyReports().after(
            {BTC: InstrumentChange(((1, 9),))}, [report(n, n) for n in range(10, 10 + reports)]
        )
        assert len(list(early)) == reports
        counted = Counted(early._waiting[BTC])
        early = EarlyReports((), {BTC: counted})
        assert early.after({BTC: InstrumentChange(((1, 9),)), ETH: InstrumentChange(((1, 20),))}, []).due == ()
        return counted.looks

    assert waiting(4000) <= waiting(500) + 3


def test_many_reports_in_a_micro_batch_are_looked_at_once() -> None:
    """Each report takes its ids out of what is left for earlier ones: n reports of the same n rows are not n * n."""
    many = 3000
    seen = tuple((number * 10, number * 10 + 8) for number in range(many + 1))
    unfilled_gaps = UnfilledGaps()
    unfilled_gaps.accept(unfilled_gaps.changes({BTC: InstrumentChange(seen, (), seen)}, [], AT))
    rows = Counted(unfilled_gaps._numbered[BTC])
    unfilled_gaps._numbered[BTC] = rows  # type: ignore[assignment]
    reports = [report(0, many * 10, "unfillable", f"reason {number}") for number in range(many)]
    changes = unfilled_gaps.changes({BTC: InstrumentChange(seen)}, reports, AT)
    assert {row.reason for row in changes} == {f"reason {many - 1}"}
    assert len(changes) == many
    assert rows.looks < 2 * many
