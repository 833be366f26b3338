"""silver.gaps: which ticks are known to be missing, at the cost of what changed.

An id is missing if it lies between two trade ids that silver has seen, and neither silver nor quarantine has it. Each
missing id is in one row that is open or unfillable, and no other id is:

- The ingester reports (topic `gaps`) and silver decides: a report counts for those of its ids that are missing. The
  last report of an id gives its row's reason, times and status. A hole that nobody reported is a row all the same.
- A row of which some ids have come is split: the part that came is filled, the rest stays as it was.
- Ids above the highest that silver has seen are not missing yet. Reports of them wait (`EarlyReports`).
- A venue that does not number its trades has only the reports, and they are its rows.

A lake may have thousands of rows that stay open for ever. A micro-batch looks only at those that it can change: rows
that share ids with its runs, with its reports, or with the stretch in which silver had seen nothing before.
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
# Below every trade id, which is a BIGINT: the highest id of an instrument that silver has not seen.
NOTHING_SEEN = -(2**63)


@dataclass(frozen=True)
class Gap:
    """A row of silver.gaps, or a report of the ingester in the same form; ids and times as there."""

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
        """What this row says, of an interval of the same instrument."""
        first, last = interval
        gap_id = f"{self.source}:{self.symbol}:{self.trade_epoch}:{first}"
        return replace(self, gap_id=gap_id, first_missing=first, last_missing=last)


@dataclass(frozen=True)
class InstrumentChange:
    """What a micro-batch adds to the trade ids of an instrument; nothing, where only a report speaks of it.

    seen, rejected: the ids that silver and quarantine have after the micro-batch, as lake.intervals has them.
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
        """Where ids may have ceased or begun to be missing: the runs, and the stretches that are new to silver."""
        return [*self.new_ticks, *self.new_rejects, *self._new_stretches()]

    def _new_stretches(self) -> Iterator[Interval]:
        """Between the highest id seen before and now, and between the lowest now and before.

        What silver had before is worked out from what it has now: after a crash between the commits of silver.ticks and
        silver.gaps there is no other account of it.
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
    """The changes of all instruments whose ids a micro-batch has, or of whose ids a report speaks.

    seen, rejected: after the micro-batch, of all instruments.
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
    """The rows of silver.gaps that are not filled: of numbered venues per instrument, sorted by id, and the others."""

    def __init__(self, rows: Iterable[Gap] = ()) -> None:
        """rows: of silver.gaps, in any order; of rows with the same gap_id the last counts."""
        self._numbered: dict[Instrument, list[Gap]] = defaultdict(list)
        self._unnumbered: dict[str, Gap] = {}
        # In order of ids each one is appended. The sort is stable, so that the last of a gap_id stays the last.
        self.accept(sorted(rows, key=lambda row: row.first_missing or 0))

    def __iter__(self) -> Iterator[Gap]:
        yield from self._unnumbered.values()
        for rows in self._numbered.values():
            yield from rows

    def changes(self, batch: Mapping[Instrument, InstrumentChange], reports: Iterable[Gap], at: datetime) -> list[Gap]:
        """The rows of silver.gaps that a micro-batch changes: new, altered, filled. Replace those of the same gap_id.

        It changes nothing here: the same question has the same answer until `accept`.

        batch: of all instruments that reports with ids speak of, at least; KeyError if one is absent.
        reports: each instrument's oldest first, so `EarlyReports.due` before those of the micro-batch itself.
        at: when a hole that nobody reported was found, and when ids came of which nobody says who brought them.
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
        """Take over rows of `changes`, once they are committed. To take them over twice does no harm."""
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
    """The reports that speak of ids, oldest first. Raises KeyError if the batch lacks the instrument of one.

    A report whose last id is below its first one speaks of none.
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
    """The rows of an instrument that change. rows: those that are not filled, sorted."""
    gap_reports = [report for report in reports if report.status != "filled"]
    fill_reports = [report for report in reports if report.status == "filled"]
    windows = add_intervals((), [*change.affected(), *map(_ids, gap_reports)])
    before = {_first(row): row for window in windows for row in rows[_overlap(rows, window)]}
    # A row that is split has parts outside of the window.
    windows = add_intervals(windows, map(_ids, before.values()))
    missing = [hole for window in windows for hole in holes_within(change.seen, change.rejected, window)]
    # A row stays one of its own where it meets another: each is looked at by itself.
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
    """The rows, sorted before, each part of them as the last report of it says.

    The last report is first to take its ids out of `rows`, so that none is looked at again for an earlier one.
    """
    after: list[Gap] = []
    for report in reversed(gap_reports):
        overlap = _overlap(rows, _ids(report))
        taken = rows[overlap]
        after += [report.of(part) for part in common(map(_ids, taken), [_ids(report)])]
        rows[overlap] = [row.of(part) for row in taken for part in minus([_ids(row)], [_ids(report)])]
    return after + rows


def _filled(came: list[Gap], fill_reports: Sequence[Gap], at: datetime) -> Iterator[Gap]:
    """Rows all of whose ids came, sorted before, as filled by what the last report that speaks of any of them says."""
    for report in reversed(fill_reports):
        overlap = _overlap(came, _ids(report))
        for row in came[overlap]:
            yield replace(row, status="filled", filled_at=report.filled_at, filled_by=report.filled_by)
        del came[overlap]
    for row in came:
        yield replace(row, status="filled", filled_at=at, filled_by=LATER_DELIVERY)


def _overlap(rows: Sequence[Gap], window: Interval) -> slice:
    """Where in sorted, disjoint rows those are that share an id with the window."""
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
    """A report that waits."""

    first_missing: int
    number: int  # ascends in an instrument's order of delivery
    report: Gap


@dataclass(frozen=True)
class EarlyReports:
    """Reports of ids above the highest that silver has seen of their instrument. They count once silver has passed it.

    A report counts once for an id: one that waits must not overrule a later one. Where silver has passed it in part,
    the rest waits on. `due` are those that silver has passed in a micro-batch, each instrument's oldest first:
    `UnfilledGaps.changes` gets them before the reports of the micro-batch itself. They are kept until the next one, so
    that a micro-batch that is replayed, because silver.ticks has it and silver.gaps has not, still has them.
    """

    due: tuple[Gap, ...] = ()
    # Sorted, per instrument.
    _waiting: Mapping[Instrument, Sequence[_Waiting]] = field(default_factory=dict)
    _delivered: int = 0

    def __iter__(self) -> Iterator[Gap]:
        """Those that wait, each instrument's oldest first."""
        everything = (waiting for of_instrument in self._waiting.values() for waiting in of_instrument)
        return iter([waiting.report for waiting in sorted(everything, key=_number)])

    def after(self, batch: Mapping[Instrument, InstrumentChange], reports: Iterable[Gap]) -> EarlyReports:
        """Those that wait after a micro-batch, and those that are due in it.

        batch, reports: as in `UnfilledGaps.changes`, without those that waited.
        """
        # What was filled was seen, so the report of it never waits.
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
        # A lake that an earlier version wrote has a list of those that wait.
        kept = state if isinstance(state, Mapping) else {"waiting": state, "due": []}
        waiting: dict[Instrument, list[_Waiting]] = defaultdict(list)
        for number, report in enumerate(map(Gap.from_json, kept["waiting"])):
            waiting[report.instrument].append(_Waiting(_first(report), number, report))
        due = tuple(map(Gap.from_json, kept["due"]))
        return cls(due, {instrument: sorted(reports) for instrument, reports in waiting.items()}, len(kept["waiting"]))


def _above(highest: int, waiting: _Waiting) -> _Waiting:
    """What it says of ids above the highest."""
    if waiting.first_missing > highest:
        return waiting
    report = waiting.report.of((highest + 1, _last(waiting.report)))
    return _Waiting(highest + 1, waiting.number, report)


def _first_missing(waiting: _Waiting) -> int:
    return waiting.first_missing


def _number(waiting: _Waiting) -> int:
    return waiting.number
