"""silver.gaps: the missing ticks. A micro-batch's cost depends only on what it changes.

A trade id is missing if it lies between two ids that silver has seen, and neither silver nor quarantine has it. Each
missing id is in exactly one open or unfillable row, and no other id is in such a row:

- The ingester reports gaps (topic `gaps`), and a report counts only for ids that are missing. The last report of an id
  gives its row's reason, times and status. A hole without a report gets a row too.
- If some ids of a row come, the row is split: the part that came is filled, the rest stays.
- Ids above the highest that silver has seen are not missing yet. Their reports wait (`EarlyReports`).
- For a venue without trade ids the reports themselves are the rows.

A lake may have thousands of rows that stay open for ever. A micro-batch reads only those that it can change: rows that
share ids with its runs, with its reports, or with the range of ids that is new to silver.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

from lake.intervals import (
    Instrument,
    Interval,
    add_intervals,
    common,
    holes_within,
    minus,
    overlapping,
)

STATUSES = ("open", "filled", "unfillable")
UNREPORTED = "no tick with these ids has come"
LATER_DELIVERY = "a later delivery"
# Below every trade id (a BIGINT): the highest id of an instrument of which silver has seen nothing.
NOTHING_SEEN = -(2**63)


@dataclass(frozen=True)
class Gap:
    """A row of silver.gaps, or an ingester's report in the same form; ids and times as in the table."""

    gap_id: str
    source: str
    symbol: str
    trade_epoch: int
    first_missing: int | None
    last_missing: int | None
    disconnected_at: datetime | None
    detected_at: datetime
    status: str
    reason: str | None
    filled_at: datetime | None = None
    filled_by: str | None = None

    @property
    def instrument(self) -> Instrument:
        return (self.source, self.symbol, self.trade_epoch)

    @property
    def interval(self) -> Interval | None:
        if self.first_missing is None or self.last_missing is None:
            return None
        return (self.first_missing, self.last_missing)

    def to_json(self) -> dict[str, Any]:
        return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Gap:
        times = ("disconnected_at", "detected_at", "filled_at")
        return cls(**{**row, **{name: datetime.fromisoformat(row[name]) for name in times if row[name]}})

    def of(self, interval: Interval) -> Gap:
        """This row for another interval of the same instrument."""
        first, last = interval
        gap_id = f"{self.source}:{self.symbol}:{self.trade_epoch}:{first}"
        return replace(self, gap_id=gap_id, first_missing=first, last_missing=last)


@dataclass(frozen=True)
class InstrumentChange:
    """The trade ids that a micro-batch adds to an instrument; none if only a report names the instrument.

    seen, rejected: the ids in silver and in quarantine after the micro-batch (lake.intervals).
    new_ticks, new_rejects: the runs that the micro-batch adds to them, in any order.
    """

    seen: Sequence[Interval]
    rejected: Sequence[Interval] = ()
    new_ticks: Sequence[Interval] = ()
    new_rejects: Sequence[Interval] = ()

    @property
    def highest(self) -> int:
        """The highest id that silver has seen."""
        return self.seen[-1][1] if self.seen else NOTHING_SEEN

    def affected(self) -> list[Interval]:
        """The ids that may have become, or ceased to be, missing: the runs, and the ranges that are new to silver."""
        return [*self.new_ticks, *self.new_rejects, *self._new_stretches()]

    def _new_stretches(self) -> Iterator[Interval]:
        """From the highest id seen before to the highest now, and from the lowest now to the lowest before.

        The earlier limits are computed from the present ids: after a crash between the commits of silver.ticks and
        silver.gaps there is no other record of them.
        """
        if not self.new_ticks:
            return
        added = add_intervals((), self.new_ticks)
        lowest, highest = self.seen[0][0], self.seen[-1][1]
        from_above = (minus([run], overlapping(added, run)) for run in reversed(self.seen))
        highest_before = next((old[-1][1] for old in from_above if old), None)
        if highest_before is None:
            yield (lowest, highest)
            return
        from_below = (minus([run], overlapping(added, run)) for run in self.seen)
        lowest_before = next(old[0][0] for old in from_below if old)
        if highest_before < highest:
            yield (highest_before + 1, highest)
        if lowest < lowest_before:
            yield (lowest, lowest_before - 1)


def instrument_changes(
    seen: Mapping[Instrument, Sequence[Interval]],
    rejected: Mapping[Instrument, Sequence[Interval]],
    new_ticks: Iterable[tuple[Instrument, Interval]],
    new_rejects: Iterable[tuple[Instrument, Interval]],
    reports: Iterable[Gap],
) -> dict[Instrument, InstrumentChange]:
    """The changes of all instruments with ids in a micro-batch or in a report.

    seen, rejected: of all instruments, after the micro-batch.
    """
    ticks: dict[Instrument, list[Interval]] = defaultdict(list)
    rejects: dict[Instrument, list[Interval]] = defaultdict(list)
    for runs, added in ((ticks, new_ticks), (rejects, new_rejects)):
        for instrument, run in added:
            runs[instrument].append(run)
    numbered = {report.instrument: None for report in reports if report.interval}
    return {
        instrument: InstrumentChange(
            *(seen.get(instrument, ()), rejected.get(instrument, ())),
            *(ticks.get(instrument, ()), rejects.get(instrument, ())),
        )
        for instrument in {**ticks, **rejects, **numbered}
    }


class UnfilledGaps:
    """The unfilled rows of silver.gaps: those with ids per instrument, sorted by id, and the others."""

    def __init__(self, rows: Iterable[Gap] = ()) -> None:
        """rows: of silver.gaps, in any order; the last of rows with the same gap_id counts."""
        self._numbered: dict[Instrument, list[Gap]] = defaultdict(list)
        self._unnumbered: dict[str, Gap] = {}
        # Sorted rows are appended cheaply. The sort is stable, so the last row of a gap_id stays the last.
        self.accept(sorted(rows, key=lambda row: row.first_missing or 0))

    def __iter__(self) -> Iterator[Gap]:
        yield from self._unnumbered.values()
        for rows in self._numbered.values():
            yield from rows

    def changes(self, batch: Mapping[Instrument, InstrumentChange], reports: Iterable[Gap], at: datetime) -> list[Gap]:
        """The rows of silver.gaps that a micro-batch adds, changes or fills; they replace rows of the same gap_id.

        This changes no state: until `accept`, the same arguments give the same rows.

        batch: must have all instruments that reports with ids name; else KeyError.
        reports: each instrument's oldest first, so `EarlyReports.due` before those of the micro-batch itself.
        at: the detection time of holes without a report, and the filling time of ids without a fill report.
        """
        reports = list(reports)
        unnumbered = {report.gap_id: report for report in reports if report.interval is None}
        changed = [report for gap_id, report in unnumbered.items() if self._unnumbered.get(gap_id) != report]
        numbered = _by_instrument(reports, batch)
        for instrument, change in batch.items():
            rows = self._numbered.get(instrument, [])
            changed += _row_changes(rows, instrument, change, numbered.get(instrument, []), at)
        return changed

    def accept(self, changed: Iterable[Gap]) -> None:
        """Apply rows from `changes` after their commit. Applying them twice is harmless."""
        for row in changed:
            if row.interval is None:
                self._unnumbered.pop(row.gap_id, None)
                if row.status != "filled":
                    self._unnumbered[row.gap_id] = row
                continue
            rows = self._numbered[row.instrument]
            at = bisect_left(rows, _first(row), key=_first)
            if at < len(rows) and _first(rows[at]) == _first(row):
                del rows[at]
            if row.status != "filled":
                rows.insert(at, row)


def _by_instrument(reports: Iterable[Gap], batch: Mapping[Instrument, InstrumentChange]) -> dict[Instrument, list[Gap]]:
    """The reports with ids, oldest first. Raises KeyError if the batch lacks a report's instrument.

    A report whose last id is below its first has no ids.
    """
    numbered: dict[Instrument, list[Gap]] = defaultdict(list)
    for report in reports:
        if report.interval and report.interval[0] <= report.interval[1]:
            numbered[report.instrument].append(report)
    if absent := numbered.keys() - batch.keys():
        raise KeyError(f"the batch lacks instruments that reports speak of: {sorted(absent)}")
    return numbered


def _row_changes(
    rows: Sequence[Gap], instrument: Instrument, change: InstrumentChange, reports: Sequence[Gap], at: datetime
) -> Iterator[Gap]:
    """The changed rows of an instrument. rows: its unfilled rows, sorted."""
    gap_reports = [report for report in reports if report.status != "filled"]
    fill_reports = [report for report in reports if report.status == "filled"]
    windows = add_intervals((), [*change.affected(), *map(_ids, gap_reports)])
    before = {_first(row): row for window in windows for row in rows[_overlap(rows, window)]}
    # A split row may have parts outside the window.
    windows = add_intervals(windows, map(_ids, before.values()))
    missing = [hole for window in windows for hole in holes_within(change.seen, change.rejected, window)]
    # Adjacent rows stay separate: each is handled by itself.
    still_missing, came = [], []
    for row in before.values():
        holes = overlapping(missing, _ids(row))
        still_missing += [row.of(part) for part in common([_ids(row)], holes)]
        came += [row.of(part) for part in minus([_ids(row)], holes)]
    unreported = Gap("", *instrument, None, None, None, at, "open", UNREPORTED)
    new = [unreported.of(hole) for hole in minus(missing, [_ids(row) for row in before.values()])]
    for row in _reported(sorted([*still_missing, *new], key=_first), gap_reports):
        if before.get(_first(row)) != row:
            yield row
    yield from _filled(came, fill_reports, at)


def _reported(rows: list[Gap], gap_reports: Sequence[Gap]) -> list[Gap]:
    """The rows, split so that each part has the values of its last report. The rows must be sorted.

    The last report takes its ids out of `rows` first, so that earlier reports do not see them.
    """
    after: list[Gap] = []
    for report in reversed(gap_reports):
        overlap = _overlap(rows, _ids(report))
        touched = rows[overlap]
        after += [report.of(part) for part in common(map(_ids, touched), [_ids(report)])]
        rows[overlap] = [row.of(part) for row in touched for part in minus([_ids(row)], [_ids(report)])]
    return after + rows


def _filled(came: list[Gap], fill_reports: Sequence[Gap], at: datetime) -> Iterator[Gap]:
    """Rows whose ids have all come, as filled by the last report that overlaps them. The rows must be sorted."""
    for report in reversed(fill_reports):
        overlap = _overlap(came, _ids(report))
        for row in came[overlap]:
            yield replace(row, status="filled", filled_at=report.filled_at, filled_by=report.filled_by)
        del came[overlap]
    for row in came:
        yield replace(row, status="filled", filled_at=at, filled_by=LATER_DELIVERY)


def _overlap(rows: Sequence[Gap], window: Interval) -> slice:
    """The slice of sorted, disjoint rows that share an id with the window."""
    start = bisect_left(rows, window[0], key=_last)
    return slice(start, bisect_right(rows, window[1], start, key=_first))


def _ids(row: Gap) -> Interval:
    assert row.interval is not None, "only rows of numbered venues are sorted by id"
    return row.interval


def _first(row: Gap) -> int:
    return _ids(row)[0]


def _last(row: Gap) -> int:
    return _ids(row)[1]


class _Waiting(NamedTuple):
    """A waiting report."""

    first_missing: int
    number: int  # ascends in an instrument's order of delivery
    report: Gap


@dataclass(frozen=True)
class EarlyReports:
    """Reports of ids above the highest that silver has seen of an instrument. They wait until silver passes them.

    A report counts once per id: a waiting report must not overrule a later one. If silver has passed a part of one, the
    rest goes on waiting. `due` has the reports that silver passed in a micro-batch, each instrument's oldest first:
    `UnfilledGaps.changes` gets them before the reports of the micro-batch itself. They are kept until the next
    micro-batch, for a replay after a crash between the commits of silver.ticks and silver.gaps.
    """

    due: tuple[Gap, ...] = ()
    # Sorted, per instrument.
    _waiting: Mapping[Instrument, Sequence[_Waiting]] = field(default_factory=dict)
    _delivered: int = 0

    def __iter__(self) -> Iterator[Gap]:
        """The waiting reports, each instrument's oldest first."""
        everything = (waiting for of_instrument in self._waiting.values() for waiting in of_instrument)
        return iter([waiting.report for waiting in sorted(everything, key=_number)])

    def after(self, batch: Mapping[Instrument, InstrumentChange], reports: Iterable[Gap]) -> EarlyReports:
        """The waiting reports after a micro-batch, and those due in it.

        batch, reports: as in `UnfilledGaps.changes`, without the waiting reports.
        """
        # A fill report never waits: silver has seen its ids.
        arrived = _by_instrument((report for report in reports if report.status != "filled"), batch)
        everything, delivered = dict(self._waiting), self._delivered
        due: list[_Waiting] = []
        for instrument, change in batch.items():
            waiting = everything.get(instrument, ())
            passed = waiting[: bisect_right(waiting, change.highest, key=_first_missing)]
            new = [_Waiting(_first(each), n, each) for n, each in enumerate(arrived.get(instrument, ()), delivered)]
            if not passed and not new:
                continue
            due += passed
            delivered += len(new)
            rest = [_above(change.highest, each) for each in (*passed, *new) if _last(each.report) > change.highest]
            everything[instrument] = sorted([*rest, *waiting[len(passed) :]])
        everything = {instrument: waiting for instrument, waiting in everything.items() if waiting}
        return EarlyReports(tuple(each.report for each in sorted(due, key=_number)), everything, delivered)

    def to_json(self) -> dict[str, Any]:
        return {"waiting": [report.to_json() for report in self], "due": [report.to_json() for report in self.due]}

    @classmethod
    def from_json(cls, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> EarlyReports:
        # An earlier version stored only a list of waiting reports.
        kept_state = state if isinstance(state, Mapping) else {"waiting": state, "due": []}
        waiting: dict[Instrument, list[_Waiting]] = defaultdict(list)
        for number, report in enumerate(map(Gap.from_json, kept_state["waiting"])):
            waiting[report.instrument].append(_Waiting(_first(report), number, report))
        due = tuple(map(Gap.from_json, kept_state["due"]))
        return cls(
            due, {instrument: sorted(reports) for instrument, reports in waiting.items()}, len(kept_state["waiting"])
        )


def _above(highest: int, waiting: _Waiting) -> _Waiting:
    """The part of a waiting report above the highest id."""
    if waiting.first_missing > highest:
        return waiting
    report = waiting.report.of((highest + 1, _last(waiting.report)))
    return _Waiting(highest + 1, waiting.number, report)


def _first_missing(waiting: _Waiting) -> int:
    return waiting.first_missing


def _number(waiting: _Waiting) -> int:
    return waiting.number
